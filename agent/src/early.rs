// SPDX-License-Identifier: Apache-2.0
//! What PID 1 does to a bare kernel before anyone can use it. This is on the way of every cold start:
//! as few system calls as can be, and no waiting.

use std::fs;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, mkdir};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_move, unmount};
use rustix::process::{Resource, Rlimit, chdir, chroot, setrlimit};

use crate::error::{Result, Stage};
use agent_protocol::SHARE_TAG;

pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Where the share is mounted, once it is plugged.
const SHARE: &str = "/run/share";

/// Descriptors: three streams for each process, each a pipe and a socket, and the mounts of a plan.
const MAX_FILES: u64 = 1 << 20;

/// Mounts what the agent itself works with.
pub(crate) fn prepare_machine() -> Result<()> {
    leave_initramfs()?;
    let common = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (kind, target, flags, data) in [
        ("proc", "/proc", common, None),
        ("sysfs", "/sys", common, None),
        (
            "devtmpfs",
            "/dev",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            None,
        ),
        (
            "tmpfs",
            "/run",
            MountFlags::NOSUID | MountFlags::NODEV,
            Some(c"mode=0755"),
        ),
        ("cgroup2", CGROUP_ROOT, common, None),
    ] {
        mount(kind, target, kind, flags, data).stage(format_args!("mount {target}"))?;
    }
    for (kind, target, data) in [
        ("devpts", "/dev/pts", c"mode=0620,ptmxmode=0666,gid=5"),
        ("tmpfs", "/dev/shm", c"mode=1777"),
    ] {
        make_directory(target)?;
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        mount(kind, target, kind, flags, data).stage(format_args!("mount {target}"))?;
    }
    Ok(())
}

/// The same for a machine and a development machine, where the rest is already there.
pub(crate) fn prepare_agent(cgroup_root: &Path) -> Result<()> {
    crate::cgroup::enable_controllers(cgroup_root).stage("cgroup controllers")?;
    // A container without memory must never cost the machine its agent.
    fs::write("/proc/self/oom_score_adj", "-1000").stage("oom_score_adj")?;
    let limit = Rlimit {
        current: Some(MAX_FILES),
        maximum: Some(MAX_FILES),
    };
    setrlimit(Resource::Nofile, limit).stage("RLIMIT_NOFILE")?;
    crate::network::loopback_up().stage("lo")
}

/// Puts a copy of the initramfs's root on top of it: pivot_root(2) refuses to replace the root that
/// the kernel began with. The original stays below every mount namespace for ever, so it is emptied.
fn leave_initramfs() -> Result<()> {
    match rustix::fs::unlink("/init") {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno).stage("unlink /init"),
    }
    mount_bind("/", "/run").stage("bind the root")?;
    chdir("/run").stage("enter the root")?;
    mount_move(".", "/").stage("move the root")?;
    chroot(".").stage("change the root")
}

/// Mounts the virtio-fs share: at the first container, since before it the slot may be empty.
pub(crate) fn mount_share() -> Result<std::os::fd::OwnedFd> {
    make_directory(SHARE)?;
    mount(SHARE_TAG, SHARE, "virtiofs", MountFlags::empty(), None).stage("mount the share")?;
    open_share(Path::new(SHARE))
}

pub(crate) fn open_share(path: &Path) -> Result<std::os::fd::OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).stage("open the share")
}

fn make_directory(path: &str) -> Result<()> {
    match mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).stage(format_args!("mkdir {path}")),
    }
}

pub(crate) fn unmount_share() -> Result<()> {
    unmount(SHARE, UnmountFlags::DETACH).stage("unmount the share")
}

/// Makes `/proc` that of the agent's own pid namespace, and its signals those of PID 1.
pub(crate) fn prepare_development_machine() -> Result<()> {
    crate::syscalls::default_signals();
    mount("proc", "/proc", "proc", MountFlags::empty(), None).stage("mount /proc")
}
