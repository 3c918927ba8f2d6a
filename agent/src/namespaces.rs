// SPDX-License-Identifier: Apache-2.0
//! User namespace maps and time offsets.

use std::fmt::Write;
use std::fs;
use std::os::fd::OwnedFd;

use agent_protocol::{IdMapping, TimeOffset};
use rustix::process::Pid;

use crate::error::{Result, Stage, refused};

const USER: u64 = libc::CLONE_NEWUSER as u64;

/// Writes the maps of a process that was born in a new user namespace.
pub(crate) fn write_mappings(pid: Pid, uids: &[IdMapping], gids: &[IdMapping]) -> Result<()> {
    for (file, mappings) in [("uid_map", uids), ("gid_map", gids)] {
        if mappings.is_empty() {
            return Err(refused(format!("{file}: empty")));
        }
        // The kernel takes a map in one write, and once.
        fs::write(format!("/proc/{pid}/{file}"), lines(mappings)).field(file)?;
    }
    Ok(())
}

fn lines(mappings: &[IdMapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, mapping| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {} {}",
            mapping.inside, mapping.outside, mapping.size
        );
        text
    })
}

/// What an id inside is outside. Without mappings there is no user namespace and it is the same.
pub(crate) fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    if mappings.is_empty() {
        return Some(id);
    }
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.inside)?;
        (offset < mapping.size).then_some(())?;
        mapping.outside.checked_add(offset)
    })
}

/// A user namespace that exists only to map the ids of a mount.
pub(crate) fn with_mappings(uids: &[IdMapping], gids: &[IdMapping]) -> Result<OwnedFd> {
    let holder = crate::syscalls::fork(USER, None, || {
        loop {
            // SAFETY: has no precondition; returns when a signal was handled, of which there is none.
            unsafe { libc::pause() };
        }
    })
    .stage("id mappings: namespace")?;
    let namespace = write_mappings(holder.pid, uids, gids).and_then(|()| {
        fs::File::open(format!("/proc/{}/ns/user", holder.pid)).stage("id mappings: namespace")
    });
    // Dies at once, so waiting for it here holds nothing up.
    let ended = crate::syscalls::kill(holder.pid, libc::SIGKILL).and_then(|()| {
        rustix::process::waitpid(Some(holder.pid), rustix::process::WaitOptions::empty())
    });
    ended.stage("id mappings: namespace")?;
    namespace.map(OwnedFd::from)
}

/// Sets the clocks of the time namespace that the calling process will enter by its exec.
pub(crate) fn set_time_offsets(offsets: &[TimeOffset]) -> Result<()> {
    for offset in offsets {
        let line = format!("{} {} {}", offset.clock, offset.seconds, offset.nanoseconds);
        fs::write("/proc/self/timens_offsets", line)
            .field(format_args!("time_offsets: {}", offset.clock))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside() {
        let mappings = [
            IdMapping {
                inside: 0,
                outside: 1000,
                size: 1,
            },
            IdMapping {
                inside: 10,
                outside: 5000,
                size: 5,
            },
            IdMapping {
                inside: 100,
                outside: u32::MAX - 1,
                size: 10,
            },
        ];
        for (inside, expected) in [
            (0, Some(1000)),
            (1, None),
            (14, Some(5004)),
            (15, None),
            (105, None),
        ] {
            assert_eq!(outside(&mappings, inside), expected, "{inside}");
        }
        assert_eq!(outside(&[], 7), Some(7));
        assert_eq!(lines(&mappings[..2]), "0 1000 1\n10 5000 5\n");
    }
}
