// SPDX-License-Identifier: Apache-2.0
//! A user namespace and a user id of the monitor's own: the capabilities that the file server needs work on files,
//! and on nothing else of the host.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::process::{Gid, Pid, Uid, WaitOptions, waitpid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set,
    set_capabilities, set_keep_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::{Error, step, unshare};
use crate::identity;

/// Each monitor runs as this plus its pid: no two alike at a time, and nobody's login. Below 2^31, for tools that
/// take a user id for signed; pids are below 2^22.
const FIRST_USER: u32 = 2_000_000_000;

/// What acting on files for a guest's users takes.
pub const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// A child that stays behind in the host's namespaces until it has mapped the ids of its parent's new one, which nobody
/// inside is allowed to.
#[derive(Debug)]
pub struct Mapper {
    pid: Pid,
    /// This process, as the host knows it.
    parent: u32,
    go: OwnedFd,
    done: OwnedFd,
}

impl Mapper {
    /// To be called while the process has one thread and sees the host's `/proc`.
    pub fn start() -> Result<Mapper, Error> {
        let (go_reader, go) = step("pipe", pipe())?;
        let (done, done_writer) = step("pipe", pipe())?;
        let parent =
            identity::pid_on_host().map_err(|error| Error::Step("find the own pid", error))?;
        // SAFETY: the process has one thread, so the child may go on as usual; it ends in this block.
        match unsafe { libc::fork() } {
            -1 => Err(Error::Step("fork", io::Error::last_os_error())),
            0 => {
                drop((go, done));
                let mapped = map_when_told(parent, go_reader, done_writer);
                // SAFETY: ends the child at once; nothing of the parent's is flushed or dropped.
                unsafe { libc::_exit(i32::from(mapped.is_err())) }
            }
            pid => {
                let pid =
                    Pid::from_raw(pid).ok_or(Error::Step("fork", io::ErrorKind::Other.into()))?;
                Ok(Mapper {
                    pid,
                    parent,
                    go,
                    done,
                })
            }
        }
    }

    fn map(self) -> Result<(), Error> {
        drop(self.go);
        let mut answer = Vec::new();
        let read = File::from(self.done).read_to_end(&mut answer);
        step("wait", waitpid(Some(self.pid), WaitOptions::empty()))?;
        match (read, answer.as_slice()) {
            (Ok(_), [_]) => Ok(()),
            _ => Err(Error::Step(
                "map the ids of the user namespace",
                io::ErrorKind::PermissionDenied.into(),
            )),
        }
    }
}

fn pipe() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
}

/// The child: waits for the end of `go`, maps, and says so.
fn map_when_told(process: u32, go: OwnedFd, done: OwnedFd) -> io::Result<()> {
    let mut nothing = Vec::new();
    File::from(go).read_to_end(&mut nothing)?;
    for map in ["uid_map", "gid_map"] {
        // All ids but the one that means none.
        std::fs::write(format!("/proc/{process}/{map}"), "0 0 4294967295")?;
    }
    File::from(done).write_all(b"1")
}

/// Enters the user namespace and becomes its unprivileged user.
pub fn drop_to_own_user(mapper: Mapper) -> Result<(), Error> {
    let id = FIRST_USER + mapper.parent;
    step("user namespace", unshare(UnshareFlags::NEWUSER))?;
    mapper.map()?;
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    step("groups", set_thread_groups(&[]))?;
    step("group id", set_thread_res_gid(group, group, group))?;
    step("keep capabilities", set_keep_capabilities(true))?;
    step("user id", set_thread_res_uid(user, user, user))?;
    step("keep capabilities", set_keep_capabilities(false))
}

/// Gives up all capabilities but those for files, for good.
pub fn drop_capabilities() -> Result<(), Error> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        // Fails where the kernel has no capability of that number.
        if !FILE_SERVER.contains(capability)
            && remove_capability_from_bounding_set(capability).is_err()
        {
            break;
        }
    }
    let sets = CapabilitySets {
        effective: FILE_SERVER,
        permitted: FILE_SERVER,
        inheritable: CapabilitySet::empty(),
    };
    step("capabilities", set_capabilities(None, sets))
}
