// SPDX-License-Identifier: Apache-2.0
//! The monitor's jail. Assume that a guest takes the monitor over one day: what it then finds is a
//! root directory with this container's files in it, read-only ones mounted read-only, and nothing
//! else of the host.
//!
//! To be entered while the process has one thread.

mod privileges;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, mkdirat, open, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount,
    fsopen, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, fchdir, getrlimit, pivot_root, set_dumpable_behavior,
    setrlimit,
};
use rustix::thread::{UnshareFlags, set_no_new_privs, unshare_unsafe};

use crate::plan::{Overlay, ReadOnly, Share, ShareKind};

/// Open files for the file server, where the container does not say more.
const OPEN_FILES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("jail: {0}")]
    Step(&'static str, #[source] io::Error),
    #[error("{path}: {0}", path = .1.display())]
    Source(&'static str, PathBuf, #[source] io::Error),
    #[error("{path}: is not a {0} any more", path = .1.display())]
    SourceKind(&'static str, PathBuf),
}

/// What the file server keeps, as a set of capabilities(7).
pub fn capabilities() -> u64 {
    privileges::FILE_SERVER.bits()
}

/// Names the step at which a system call failed.
fn step<T>(name: &'static str, result: rustix::io::Result<T>) -> Result<T, Error> {
    result.map_err(|error| Error::Step(name, error.into()))
}

/// Someone who is not root gets to mount by owning a user namespace, in which they are. Their files
/// show up as root's in the guest.
pub fn become_root_of_own_namespace() -> Result<(), Error> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if uid.is_root() {
        return Ok(());
    }
    // The mount namespace too: before the jail the file server takes its piece of /proc.
    let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNS;
    step("user namespace", unshare(flags))?;
    write_map("/proc/self/setgroups", "deny")?;
    write_map("/proc/self/uid_map", &format!("0 {} 1", uid.as_raw()))?;
    write_map("/proc/self/gid_map", &format!("0 {} 1", gid.as_raw()))
}

fn write_map(path: &str, content: &str) -> Result<(), Error> {
    std::fs::write(path, content).map_err(|error| Error::Source("write", path.into(), error))
}

/// Moves the process into a root directory of its own, which holds the shares by name, and gives up
/// what it does not need any more. Returns that directory.
pub fn enter(shares: &[Share], open_files: Option<u64>) -> Result<OwnedFd, Error> {
    let mapper = match crate::store::is_host_root() {
        true => Some(privileges::Mapper::start()?),
        false => None,
    };
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC | UnshareFlags::NEWCGROUP;
    step("namespaces", unshare(flags))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    step("private mounts", mount_change("/", private))?;
    let root = attach_root()?;
    for share in shares {
        attach(root.as_fd(), share)?;
    }
    step(
        "read-only root",
        set_attributes(
            root.as_fd(),
            MountAttrFlags::MOUNT_ATTR_RDONLY,
            MountAttrFlags::empty(),
            false,
        ),
    )?;
    change_root(root.as_fd())?;
    limit(open_files)?;
    if let Some(mapper) = mapper {
        privileges::drop_to_own_user(mapper)?;
    }
    privileges::drop_capabilities()?;
    step("no_new_privs", set_no_new_privs(true))?;
    step(
        "dumpable",
        set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    step("open the root", open("/", flags, Mode::empty()))
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: the file descriptor table is not unshared, CLONE_FILES is never among the flags here.
    unsafe { unshare_unsafe(flags) }
}

/// Mounts a small tmpfs over the root directory. Paths still lead to the old root, so the shares'
/// sources are found while the new root is filled through its descriptor.
fn attach_root() -> Result<OwnedFd, Error> {
    let context = step("tmpfs", fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC))?;
    for (key, value) in [("size", "1m"), ("mode", "0755")] {
        step(
            "tmpfs options",
            fsconfig_set_string(context.as_fd(), key, value),
        )?;
    }
    step("tmpfs", fsconfig_create(context.as_fd()))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = step(
        "tmpfs mount",
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes),
    )?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    step(
        "attach the root",
        move_mount(root.as_fd(), "", CWD, "/", flags),
    )?;
    Ok(root)
}

/// Mounts a share below the new root.
fn attach(root: BorrowedFd<'_>, share: &Share) -> Result<(), Error> {
    let fail = |doing| move |error: Errno| Error::Source(doing, share.source.clone(), error.into());
    let tree = tree(share)?;
    make_mount_point(root, share).map_err(fail("make a mount point"))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree.as_fd(), "", root, share.name.as_str(), flags).map_err(fail("mount"))
}

/// The mounts of a share, attached nowhere yet. The source is looked up once, everything after goes by its descriptor.
fn tree(share: &Share) -> Result<OwnedFd, Error> {
    let fail = |doing| move |error: Errno| Error::Source(doing, share.source.clone(), error.into());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let source = open(&share.source, flags, Mode::empty()).map_err(fail("open"))?;
    check_kind(source.as_fd(), share)?;
    let tree = match &share.overlay {
        Some(overlay) => mount_overlay(source.as_fd(), overlay).map_err(fail("overlay"))?,
        None => {
            let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH;
            if share.recursive {
                flags |= OpenTreeFlags::AT_RECURSIVE;
            }
            open_tree(source.as_fd(), "", flags).map_err(fail("bind"))?
        }
    };
    let set = |attributes, below| {
        set_attributes(tree.as_fd(), attributes, MountAttrFlags::empty(), below)
            .map_err(fail("set mount attributes"))
    };
    // The file server executes nothing and opens no devices, and must not be able to.
    let never = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    set(never, true)?;
    if share.readonly != ReadOnly::No {
        let below = share.readonly == ReadOnly::Recursive;
        set(MountAttrFlags::MOUNT_ATTR_RDONLY, below)?;
    }
    Ok(tree)
}

/// A view of a directory whose changes go elsewhere, attached nowhere yet.
fn mount_overlay(lower: BorrowedFd<'_>, overlay: &Overlay) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // By descriptor: a path may have characters that mean something to overlayfs.
    let lower = format!("/proc/self/fd/{}", lower.as_raw_fd());
    fsconfig_set_string(context.as_fd(), "lowerdir", lower.as_str())?;
    fsconfig_set_string(context.as_fd(), "upperdir", &*overlay.upper)?;
    fsconfig_set_string(context.as_fd(), "workdir", &*overlay.work)?;
    if !crate::store::is_host_root() {
        fsconfig_set_flag(context.as_fd(), "userxattr")?;
    }
    fsconfig_create(context.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    fsmount(context.as_fd(), flags, MountAttrFlags::empty())
}

/// Attaches a further share to the root of a monitor that is in its jail, from outside: it gets no right by it. The
/// caller is root and has one thread.
pub fn share_more(monitor: &OwnedFd, share: &Share) -> Result<(), Error> {
    let fail = |doing| move |error: Errno| Error::Source(doing, share.source.clone(), error.into());
    let tree = tree(share)?;
    in_jail(monitor, || {
        make_mount_point(writable_root()?.as_fd(), share)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        let attached = move_mount(tree.as_fd(), "", CWD, share.name.as_str(), flags);
        if attached.is_err() {
            remove_mount_point(&share.name, share.kind)?;
        }
        attached
    })
    .map_err(fail("share with the monitor"))
}

/// Undoes [`share_more`].
pub fn share_less(monitor: &OwnedFd, name: &str, kind: ShareKind) -> Result<(), Error> {
    let removed = in_jail(monitor, || {
        unmount(name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        remove_mount_point(name, kind)
    });
    step("take a share from the monitor", removed)
}

/// Does something in the mount namespace of a monitor, in whose root it then is. In a child: there is no way back.
fn in_jail(
    monitor: &OwnedFd,
    act: impl FnOnce() -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let mounts = rustix::thread::ThreadNameSpaceType::MOUNT;
    // SAFETY: the verbs that come here have one thread, so the child may go on as usual; it ends in this block.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
        0 => {
            let result = rustix::thread::move_into_thread_name_spaces(monitor.as_fd(), mounts)
                .and_then(|()| act());
            // Error numbers fit into an exit status.
            let status = result.map_or_else(Errno::raw_os_error, |()| 0);
            // SAFETY: ends the child at once; nothing of the parent's is flushed or dropped.
            unsafe { libc::_exit(status) }
        }
        pid => {
            let pid = rustix::process::Pid::from_raw(pid);
            let options = rustix::process::WaitOptions::empty();
            let status = rustix::process::waitpid(pid, options)?;
            match status.and_then(|(_, status)| status.exit_status()) {
                Some(0) => Ok(()),
                Some(errno) => Err(Errno::from_raw_os_error(errno)),
                None => Err(Errno::INTR),
            }
        }
    }
}

/// The root of the jail by way of another mount of it, which unlike the monitor's is not read-only.
fn writable_root() -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(CWD, "/", flags)?;
    let none = MountAttrFlags::empty();
    set_attributes(root.as_fd(), none, MountAttrFlags::MOUNT_ATTR_RDONLY, false)?;
    Ok(root)
}

fn remove_mount_point(name: &str, kind: ShareKind) -> rustix::io::Result<()> {
    let flags = match kind {
        ShareKind::Directory => AtFlags::REMOVEDIR,
        ShareKind::File => AtFlags::empty(),
    };
    unlinkat(writable_root()?, name, flags)
}

/// The plan was made from an earlier look at the source.
fn check_kind(source: BorrowedFd<'_>, share: &Share) -> Result<(), Error> {
    let stat = fstat(source)
        .map_err(|error| Error::Source("look at", share.source.clone(), error.into()))?;
    let (expected, name) = match share.kind {
        ShareKind::Directory => (FileType::Directory, "directory"),
        ShareKind::File => (FileType::RegularFile, "regular file"),
    };
    if FileType::from_raw_mode(stat.st_mode) == expected {
        Ok(())
    } else {
        Err(Error::SourceKind(name, share.source.clone()))
    }
}

fn make_mount_point(root: BorrowedFd<'_>, share: &Share) -> rustix::io::Result<()> {
    let name = Path::new(&share.name);
    match share.kind {
        ShareKind::Directory => mkdirat(root, name, Mode::RWXU),
        ShareKind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(root, name, flags, Mode::RUSR).map(drop)
        }
    }
}

/// mount_setattr(2), which rustix does not have. Makes the mounts private besides: what is unmounted in a jail stays
/// mounted on the host.
fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttrFlags,
    clear: MountAttrFlags,
    recursive: bool,
) -> rustix::io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let mut flags = AtFlags::EMPTY_PATH.bits();
    if recursive {
        // The AT_RECURSIVE of open_tree(2).
        flags |= OpenTreeFlags::AT_RECURSIVE.bits();
    }
    let attributes = MountAttr {
        set: u64::from(attributes.bits()),
        clear: u64::from(clear.bits()),
        propagation: libc::MS_PRIVATE,
        user_namespace: 0,
    };
    // SAFETY: the path is a NUL-terminated string and `attributes` a struct mount_attr of the first
    // version, both alive during the call, which reads no more than the size it is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    }
}

/// Makes the new root the root, and lets the old one go with all its mounts.
fn change_root(root: BorrowedFd<'_>) -> Result<(), Error> {
    step("enter the new root", fchdir(root))?;
    step("pivot_root", pivot_root(".", "."))?;
    step("detach the old root", unmount(".", UnmountFlags::DETACH))?;
    step("enter the new root", rustix::process::chdir("/"))
}

fn limit(open_files: Option<u64>) -> Result<(), Error> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    step("core limit", setrlimit(Resource::Core, none))?;
    let wanted = Rlimit {
        current: Some(OPEN_FILES.max(open_files.unwrap_or(0))),
        maximum: Some(OPEN_FILES.max(open_files.unwrap_or(0))),
    };
    if setrlimit(Resource::Nofile, wanted).is_ok() {
        return Ok(());
    }
    // Not allowed to raise the hard limit, or beyond what the kernel allows at all.
    let allowed = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: allowed,
        maximum: allowed,
    };
    step("open file limit", setrlimit(Resource::Nofile, all))
}

/// Closes what the caller of the verb has left open, except the standard streams and one more: to be
/// called before the process opens anything.
pub fn close_inherited_except(keep: i32) -> Result<(), Error> {
    close_around(vec![keep.unsigned_abs()])
}

/// Closes everything but the standard streams and a few more. Owners of what is closed must not be
/// used or dropped any more: this is for a forked process that never returns to them.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) -> Result<(), Error> {
    let keep = keep.iter().map(|fd| fd.as_raw_fd().unsigned_abs());
    close_around(keep.collect())
}

fn close_around(mut keep: Vec<u32>) -> Result<(), Error> {
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        close_range(first, fd - 1)?;
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> Result<(), Error> {
    if first > last {
        return Ok(());
    }
    // SAFETY: the callers see to it that what is closed has no owner that would use or close it again.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(Error::Step(
            "close inherited files",
            io::Error::last_os_error(),
        )),
    }
}

/// Enters the network namespace at a path.
pub fn join_network(path: &Path) -> Result<(), Error> {
    let fail = |error| Error::Source("network namespace", path.to_owned(), error);
    let namespace = File::open(path).map_err(fail)?;
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)
        .map_err(|error| fail(error.into()))
}

/// For processes that are started from now on.
pub fn new_pid_namespace_for_children() -> Result<(), Error> {
    step("pid namespace", unshare(UnshareFlags::NEWPID))
}

pub fn new_network() -> Result<(), Error> {
    step("network namespace", unshare(UnshareFlags::NEWNET))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Command, ExitStatus};

    use super::*;

    /// Runs the test below in a process of its own: the jail has no way out.
    fn jail(directory: &Path) -> ExitStatus {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::jail_child", "--ignored"])
            .env("SANDBOX_TEST_DIRECTORY", directory)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap()
    }

    fn share(name: &str, source: PathBuf, kind: ShareKind, readonly: ReadOnly) -> Share {
        Share {
            name: name.into(),
            source,
            kind,
            readonly,
            recursive: true,
            overlay: None,
        }
    }

    #[test]
    fn the_jail_holds() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let directory = std::env::temp_dir().join(format!("sandbox-jail-{}", std::process::id()));
        fs::create_dir_all(directory.join("tree/sub")).unwrap();
        fs::write(directory.join("tree/file"), "text").unwrap();
        fs::write(directory.join("single"), "alone").unwrap();
        let status = jail(&directory);
        fs::remove_dir_all(&directory).unwrap();
        assert!(status.success());
    }

    #[test]
    #[ignore = "run by the_jail_holds in a process of its own"]
    fn jail_child() {
        let directory = PathBuf::from(std::env::var_os("SANDBOX_TEST_DIRECTORY").unwrap());
        let tree = directory.join("tree");
        let shares = [
            share("rootfs", tree.clone(), ShareKind::Directory, ReadOnly::No),
            share("m0", tree, ShareKind::Directory, ReadOnly::Recursive),
            share(
                "m1",
                directory.join("single"),
                ShareKind::File,
                ReadOnly::Mount,
            ),
        ];
        // The test runner has threads; a child has one.
        // SAFETY: the child allocates, which is fine as no other thread of the runner does just now; it never returns.
        match unsafe { libc::fork() } {
            0 => {
                let held = std::panic::catch_unwind(|| check_jail(&shares)).is_ok();
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(i32::from(!held)) }
            }
            pid => {
                let pid = rustix::process::Pid::from_raw(pid);
                let options = rustix::process::WaitOptions::empty();
                let (_, status) = rustix::process::waitpid(pid, options).unwrap().unwrap();
                assert_eq!(status.exit_status(), Some(0));
            }
        }
    }

    fn check_jail(shares: &[Share]) {
        let root = enter(shares, None).unwrap();

        for path in ["/new", "/m0/file", "/m1"] {
            let error = fs::write(path, "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{path}");
        }
        fs::write("/rootfs/sub/new", "x").unwrap();
        assert_eq!(fs::read_to_string("/m0/sub/new").unwrap(), "x");
        assert_eq!(fs::read_to_string("/m1").unwrap(), "alone");
        let names = fs::read_dir("/").unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["m0", "m1", "rootfs"]);
        assert!(!fs::exists("/rootfs/../../../proc/self").unwrap());
        let own = fstat(&root).unwrap();
        assert_eq!(own.st_ino, rustix::fs::stat("/").unwrap().st_ino);
        assert_eq!(getrlimit(Resource::Core).current, Some(0));
        assert!(rustix::thread::no_new_privs().unwrap());

        // Nobody's user, with power over files alone.
        assert!(rustix::process::getuid().as_raw() > 2_000_000_000);
        let capabilities = rustix::thread::capabilities(None).unwrap();
        assert_eq!(capabilities.effective.bits().count_ones(), 7);
        let init = rustix::process::Pid::INIT;
        let signal = rustix::process::test_kill_process(init);
        assert_eq!(signal, Err(Errno::PERM));
        assert_eq!(unshare(UnshareFlags::NEWNS), Err(Errno::PERM));
        let mount = mount_change("/", MountPropagationFlags::SHARED);
        assert_eq!(mount, Err(Errno::PERM));
        let node = rustix::fs::mknodat(
            &root,
            "rootfs/node",
            FileType::CharacterDevice,
            Mode::RWXU,
            rustix::fs::makedev(1, 1),
        );
        assert_eq!(node, Err(Errno::PERM));
        std::os::unix::fs::chown("/rootfs/sub/new", Some(12345), Some(54321)).unwrap();
    }

    #[test]
    fn a_source_that_changed_its_kind_is_refused() {
        let file = open("/dev/null", OFlags::PATH, Mode::empty()).unwrap();
        let share = share("m0", "/dev/null".into(), ShareKind::File, ReadOnly::No);
        let error = check_kind(file.as_fd(), &share).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/dev/null: is not a regular file any more"
        );
    }
}
