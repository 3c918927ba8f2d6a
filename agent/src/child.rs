// SPDX-License-Identifier: Apache-2.0
//! What runs in the children that the agent forks: each function begins right after the fork, is in
//! no hurry to be elegant about resources, and ends in an exec or an exit.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use agent_protocol::{AgentError, ErrorKind, GuestPlan, IdMapping, Mount, Process};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{
    DumpableBehavior, chdir, fchdir, ioctl_tiocsctty, pivot_root, set_dumpable_behavior,
};

use crate::channel::Upward;
use crate::devices::{self, Terminal};
use crate::error::{Result, Stage, Within, refused};
use crate::mounts::{self, CgroupView, Sources};
use crate::process::{self, ChildStdio};
use crate::rootfs::{Kind, Rootfs};
use crate::{hooks, namespaces, network, syscalls};

pub(crate) const NEW_USER: u64 = libc::CLONE_NEWUSER as u64;
pub(crate) const NEW_MOUNT: u64 = libc::CLONE_NEWNS as u64;
pub(crate) const NEW_PID: u64 = libc::CLONE_NEWPID as u64;
pub(crate) const NEW_NETWORK: u64 = libc::CLONE_NEWNET as u64;
const NEW_CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
const NEW_TIME: u64 = libc::CLONE_NEWTIME as u64;

/// These the child makes itself: the cgroup namespace begins where its maker is, and the clocks of a
/// time namespace can be set only before the first process is in it.
pub(crate) const MADE_BY_CHILD: u64 = NEW_CGROUP | NEW_TIME;

/// Every namespace of which a container can have its own.
pub(crate) const ALL: u64 = NEW_USER
    | NEW_MOUNT
    | NEW_PID
    | NEW_NETWORK
    | MADE_BY_CHILD
    | libc::CLONE_NEWUTS as u64
    | libc::CLONE_NEWIPC as u64;

#[derive(Debug)]
pub(crate) struct Init<'a> {
    pub(crate) plan: &'a GuestPlan,
    pub(crate) sources: Sources,
    pub(crate) stdio: ChildStdio,
    pub(crate) cgroup: &'a Path,
}

/// The init process of a container.
pub(crate) fn run_init(upward: Upward, init: Init<'_>) -> i32 {
    end(&upward, || {
        let Init {
            plan,
            mut sources,
            stdio,
            cgroup,
        } = init;
        let keep: Vec<RawFd> = sources
            .mounts
            .iter()
            .flatten()
            .chain([&sources.rootfs])
            .map(AsRawFd::as_raw_fd)
            .collect();
        process::begin(&upward, stdio, &keep)?;
        upward.wait()?;
        enter_namespaces(plan)?;
        let mounts = std::mem::take(&mut sources.mounts);
        let terminal = build_rootfs(plan, sources.rootfs, mounts, cgroup)?;
        run(&upward, &plan.process, terminal, || {
            hooks::run(&plan.start_hooks, &plan.state)
        })
    })
}

#[derive(Debug)]
pub(crate) struct Exec<'a> {
    pub(crate) process: &'a Process,
    /// Of the container's init process.
    pub(crate) init: BorrowedFd<'a>,
    /// Those that the container does not share with the agent.
    pub(crate) namespaces: u64,
    pub(crate) has_root: bool,
    pub(crate) stdio: ChildStdio,
}

/// A further process of a container, born in its cgroup and pid namespace.
pub(crate) fn run_exec(upward: Upward, exec: Exec<'_>) -> i32 {
    end(&upward, || {
        process::begin(&upward, exec.stdio, &[exec.init.as_raw_fd()])?;
        upward.wait()?;
        not_dumpable()?;
        syscalls::set_namespaces(exec.init, exec.namespaces).stage("enter the container")?;
        process::become_namespace_root(exec.has_root)?;
        let terminal = match exec.process.terminal {
            Some(size) => Some(devices::open_terminal(
                &own_root()?,
                size,
                exec.process.uid,
            )?),
            None => None,
        };
        run(&upward, exec.process, terminal, || Ok(()))
    })
}

/// A change of a running container's mounts.
#[derive(Debug)]
pub(crate) enum MountChange<'a> {
    Attach {
        mount: &'a Mount,
        source: Option<OwnedFd>,
        cgroup: CgroupView<'a>,
    },
    Detach {
        destination: &'a str,
    },
}

/// Changes the mounts of a running container, from inside its mount namespace.
pub(crate) fn run_mount_change(
    upward: Upward,
    init: BorrowedFd<'_>,
    change: MountChange<'_>,
) -> i32 {
    end(&upward, || {
        // So that a file system that does not answer keeps no stream of another process open.
        let mut keep = vec![init.as_raw_fd(), upward.as_raw_fd()];
        if let MountChange::Attach { source, .. } = &change {
            keep.extend(source.as_ref().map(AsRawFd::as_raw_fd));
        }
        syscalls::close_others(&mut keep).stage("close descriptors")?;
        not_dumpable()?;
        syscalls::set_namespaces(init, NEW_MOUNT).stage("enter the container")?;
        rustix::process::umask(Mode::empty());
        let rootfs = own_root()?;
        match change {
            MountChange::Attach {
                mount,
                source,
                cgroup,
            } => mounts::attach(&rootfs, mount, source, &cgroup)
                .within(format_args!("mount {}", mount.destination)),
            MountChange::Detach { destination } => mounts::detach(&rootfs, destination),
        }
    })
}

/// Reports what the body ends with, and gives the exit status that shells give it.
fn end<T>(upward: &Upward, body: impl FnOnce() -> Result<T>) -> i32 {
    let Err(error) = body() else { return 0 };
    let status = exit_status(&error);
    upward.failed(error);
    status
}

fn exit_status(error: &AgentError) -> i32 {
    match error.kind {
        ErrorKind::ExecutableNotFound => 127,
        ErrorKind::ExecutableRefused => 126,
        _ => 1,
    }
}

/// Other processes of the container must not look into this one before its exec.
fn not_dumpable() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).stage("dumpable")
}

fn own_root() -> Result<Rootfs> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, "/", flags, Mode::empty())
        .map(Rootfs::new)
        .stage("root")
}

pub(crate) fn has_root(uids: &[IdMapping], gids: &[IdMapping]) -> bool {
    !uids.is_empty()
        && namespaces::outside(uids, 0).is_some()
        && namespaces::outside(gids, 0).is_some()
}

fn enter_namespaces(plan: &GuestPlan) -> Result<()> {
    let own = plan.namespaces & MADE_BY_CHILD;
    if own != 0 {
        syscalls::unshare(own).stage("namespaces")?;
    }
    // Before the change of user, after which the files of /proc/self are another's.
    namespaces::set_time_offsets(&plan.time_offsets)?;
    process::become_namespace_root(has_root(&plan.uid_mappings, &plan.gid_mappings))?;
    not_dumpable()?;
    if plan.namespaces & NEW_NETWORK != 0 {
        network::loopback_up().stage("lo")?;
    }
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes()).field("hostname")?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes()).field("domainname")?;
    }
    // By the agent's own /proc: which value a file there stands for depends on who opens it, and no
    // image has had a hand in it.
    for (name, value) in &plan.sysctls {
        let path = Path::new("/proc/sys").join(name.replace('.', "/").trim_start_matches('/'));
        std::fs::write(path, value).field(format_args!("sysctl {name}"))?;
    }
    Ok(())
}

/// Makes the container's file system and moves into it.
fn build_rootfs(
    plan: &GuestPlan,
    root: OwnedFd,
    sources: Vec<Option<OwnedFd>>,
    cgroup: &Path,
) -> Result<Option<Terminal>> {
    // Any directory will do: what is below it is not needed any more in this mount namespace.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, "/run", flags, Mode::empty())
        .and_then(|place| mounts::attach_tree(root.as_fd(), place.as_fd()))
        .stage("rootfs: mount")?;
    let rootfs = Rootfs::new(root);
    let cgroup = CgroupView {
        namespaced: plan.namespaces & NEW_CGROUP != 0,
        path: cgroup,
    };
    for (index, (mount, source)) in plan.mounts.iter().zip(sources).enumerate() {
        mounts::attach(&rootfs, mount, source, &cgroup).within(mounts::name(index, mount))?;
    }
    if plan.default_devices {
        devices::make_default_devices(&rootfs)?;
    }
    devices::make_devices(&rootfs, &plan.devices)?;
    let terminal = match plan.process.terminal {
        Some(size) => {
            let terminal = devices::open_terminal(&rootfs, size, plan.process.uid)?;
            devices::bind_console(&rootfs, &terminal)?;
            Some(terminal)
        }
        None => None,
    };
    // Where it cannot be made, the change into it will say so.
    let _ = rootfs.make(&plan.process.cwd, Kind::Directory);
    restrict(plan, &rootfs)?;
    fchdir(&rootfs).stage("rootfs: enter")?;
    pivot_root(".", ".").stage("rootfs: pivot")?;
    unmount(".", UnmountFlags::DETACH).stage("rootfs: detach the old root")?;
    chdir("/").stage("rootfs: enter")?;
    if plan.rootfs_propagation != 0 {
        mounts::set_root_propagation(plan.rootfs_propagation)?;
    }
    Ok(terminal)
}

fn restrict(plan: &GuestPlan, rootfs: &Rootfs) -> Result<()> {
    for path in &plan.readonly_paths {
        mounts::make_read_only(rootfs, path).field(format_args!("readonlyPaths: {path}"))?;
    }
    for path in &plan.masked_paths {
        mounts::mask(rootfs, path).field(format_args!("maskedPaths: {path}"))?;
    }
    if plan.rootfs_readonly {
        let attributes = syscalls::MountAttributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Default::default()
        };
        syscalls::mount_set_attributes(rootfs.as_fd(), false, attributes).field("root.readonly")?;
    }
    Ok(())
}

/// The common end: everything but the exec, then what comes when the agent says so.
fn run(
    upward: &Upward,
    process: &Process,
    terminal: Option<Terminal>,
    before: impl FnOnce() -> Result<()>,
) -> Result<std::convert::Infallible> {
    let master = match terminal {
        Some(Terminal { master, slave }) => {
            process::set_streams([&slave; 3]).stage("stdio")?;
            ioctl_tiocsctty(&slave).stage("terminal: session")?;
            Some(master)
        }
        None => None,
    };
    let program = process::become_user(process)?;
    upward.ready(master.as_ref());
    upward.wait()?;
    drop(master);
    before()?;
    program.execute(process)
}

/// The namespaces to make for a plan. A mount namespace is always made: a container could not be told
/// from the agent without one.
pub(crate) fn namespaces_of(plan: &GuestPlan) -> Result<u64> {
    if plan.namespaces & !ALL != 0 {
        return Err(refused(format!(
            "namespaces: unknown {:#x}",
            plan.namespaces & !ALL
        )));
    }
    Ok(plan.namespaces | NEW_MOUNT)
}
