// SPDX-License-Identifier: Apache-2.0
//! The mounts of a container. Sources are opened by the agent, which may see the share and may map
//! ids; they are attached by the container's child, in its mount namespace.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use agent_protocol::{GuestPlan, Mount, MountSource};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::fchdir;

use crate::copy_up;
use crate::error::{Result, Stage, Within, refused};
use crate::rootfs::{Kind, Rootfs, open_in_share};
use crate::syscalls::{MountAttributes, mount_set_attributes};

/// `MS_*` and the `MOUNT_ATTR_*` that means the same. (linux/mount.h)
const ATTRIBUTES: [(u64, u64); 6] = [
    (libc::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
    (libc::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
    (libc::MS_NODEV, libc::MOUNT_ATTR_NODEV),
    (libc::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    (libc::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    (0x100, libc::MOUNT_ATTR_NOSYMFOLLOW), // MS_NOSYMFOLLOW
];

/// mount(2) takes no descriptor and no `/proc` can be relied on to make a path of one: the destination
/// is entered instead. The caller's working directory is set at the end of all set-up anyway.
const HERE: &str = ".";

/// The sources of a plan: detached copies of what is to be bound.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) rootfs: OwnedFd,
    /// One for each mount; none where the source is not a path.
    pub(crate) mounts: Vec<Option<OwnedFd>>,
}

pub(crate) fn open_sources(share: BorrowedFd<'_>, plan: &GuestPlan) -> Result<Sources> {
    let rootfs = open_in_share(share, &plan.rootfs)
        .and_then(|fd| clone_tree(fd.as_fd(), true))
        .field(format_args!("rootfs {:?}", plan.rootfs))?;
    let mounts = plan
        .mounts
        .iter()
        .enumerate()
        .map(|(index, mount)| open_source(share, mount).within(name(index, mount)))
        .collect::<Result<_>>()?;
    Ok(Sources { rootfs, mounts })
}

/// How errors name a mount.
pub(crate) fn name(index: usize, mount: &Mount) -> String {
    format!("mounts[{index}] {}", mount.destination)
}

pub(crate) fn open_source(share: BorrowedFd<'_>, mount: &Mount) -> Result<Option<OwnedFd>> {
    let mapped = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    let (source, recursive) = match &mount.source {
        MountSource::Share { path, recursive } => {
            (open_in_share(share, path).stage("source")?, *recursive)
        }
        MountSource::Guest { path, recursive } => {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let source = openat(CWD, path, flags, Mode::empty());
            (source.stage(format_args!("source {path}"))?, *recursive)
        }
        MountSource::Kernel(_) | MountSource::Cgroup if mapped => {
            return Err(refused("id mappings: only for bind mounts"));
        }
        MountSource::Kernel(_) | MountSource::Cgroup => return Ok(None),
    };
    let tree = clone_tree(source.as_fd(), recursive).stage("source")?;
    if mapped {
        let namespace = crate::namespaces::with_mappings(&mount.uid_mappings, &mount.gid_mappings)?;
        let attributes = MountAttributes {
            set: libc::MOUNT_ATTR_IDMAP,
            user_namespace: u64::try_from(namespace.as_raw_fd()).unwrap_or(u64::MAX),
            ..MountAttributes::default()
        };
        mount_set_attributes(tree.as_fd(), recursive, attributes)
            .field("id mappings (the file system may not support them)")?;
    }
    Ok(Some(tree))
}

/// A copy of the mounts at and, if recursive, below a place, attached nowhere.
pub(crate) fn clone_tree(place: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(place, "", flags)
}

pub(crate) fn attach_tree(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Where a container's `cgroup` mounts come from.
#[derive(Debug)]
pub(crate) struct CgroupView<'a> {
    /// In a cgroup namespace a new mount shows the container's own tree; else a bind mount does.
    pub(crate) namespaced: bool,
    pub(crate) path: &'a Path,
}

/// Makes one mount. `source` is what [`open_source`] returned for it.
pub(crate) fn attach(
    rootfs: &Rootfs,
    mount: &Mount,
    source: Option<OwnedFd>,
    cgroup: &CgroupView<'_>,
) -> Result<()> {
    if !mount.destination.starts_with('/') {
        return Err(refused("destination: not an absolute path"));
    }
    match (&mount.source, source) {
        (_, Some(tree)) => attach_bind(rootfs, mount, tree),
        (MountSource::Cgroup, None) if cgroup.namespaced => {
            attach_new(rootfs, mount, "cgroup2", "cgroup2")
        }
        (MountSource::Cgroup, None) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let tree = openat(CWD, cgroup.path, flags, Mode::empty())
                .and_then(|directory| clone_tree(directory.as_fd(), false))
                .stage("cgroup")?;
            attach_bind(rootfs, mount, tree)
        }
        (MountSource::Kernel(source), None) => attach_new(rootfs, mount, source, &mount.kind),
        (MountSource::Share { .. } | MountSource::Guest { .. }, None) => {
            Err(refused("source: missing"))
        }
    }
}

fn attach_bind(rootfs: &Rootfs, mount: &Mount, tree: OwnedFd) -> Result<()> {
    let source = fstat(&tree).stage("source")?;
    let kind = match FileType::from_raw_mode(source.st_mode) {
        FileType::Directory => Kind::Directory,
        _ => Kind::File,
    };
    let target = rootfs.make(&mount.destination, kind).stage("destination")?;
    set_attributes(tree.as_fd(), false, attributes_of(mount.flags))?;
    attach_tree(tree.as_fd(), target.as_fd()).stage("mount")?;
    finish(tree.as_fd(), mount)
}

fn attach_new(rootfs: &Rootfs, mount: &Mount, source: &str, kind: &str) -> Result<()> {
    // Its mode, unless that is given, is that of the directory it is mounted on.
    let takes_mode = kind == "tmpfs"
        && !mount
            .data
            .split(',')
            .any(|option| option.starts_with("mode="))
        && rootfs.open(&mount.destination).is_ok();
    let target = match kind {
        // Were it a link, masked paths would hide something else than they name.
        "proc" | "sysfs" => real_directory(rootfs, &mount.destination)?,
        _ => rootfs
            .make(&mount.destination, Kind::Directory)
            .stage("destination")?,
    };
    let mut data = mount.data.clone();
    if takes_mode {
        let mode = fstat(&target).stage("destination")?.st_mode & 0o7777;
        let separator = if data.is_empty() { "" } else { "," };
        data.push_str(&format!("{separator}mode={mode:o}"));
    }
    let data = CString::new(data).map_err(|_| refused("options: contain a nul byte"))?;
    let copy = mount.copy_up && kind == "tmpfs";
    let mut flags = mount.flags;
    if copy {
        flags &= !libc::MS_RDONLY;
    }
    let flags = u32::try_from(flags).map_err(|_| refused("flags: out of range"))?;
    let flags = MountFlags::from_bits_retain(flags);
    fchdir(&target).stage("destination")?;
    self::mount(source, HERE, kind, flags, Some(data.as_c_str())).stage("mount")?;
    if !copy && !needs_finish(mount) {
        return Ok(());
    }
    let new = rootfs.open(&mount.destination).stage("mount")?;
    if copy {
        copy_up::copy(target.as_fd(), new.as_fd()).stage("tmpcopyup")?;
        set_attributes(
            new.as_fd(),
            false,
            attributes_of(mount.flags & libc::MS_RDONLY),
        )?;
    }
    finish(new.as_fd(), mount)
}

fn real_directory(rootfs: &Rootfs, path: &str) -> Result<OwnedFd> {
    let open = || rootfs.open_directory_without_links(path);
    let opened = match open() {
        Err(Errno::NOENT) => rootfs.make(path, Kind::Directory).and_then(|_| open()),
        other => other,
    };
    match opened {
        Err(Errno::LOOP | Errno::NOTDIR) => {
            Err(refused("destination: must be an ordinary directory"))
        }
        other => other.stage("destination"),
    }
}

fn needs_finish(mount: &Mount) -> bool {
    mount.recursive_set | mount.recursive_clear != 0 || !mount.propagation.is_empty()
}

/// What is set on a mount once it is in its place.
fn finish(tree: BorrowedFd<'_>, mount: &Mount) -> Result<()> {
    let recursive = MountAttributes {
        set: mount.recursive_set,
        clear: mount.recursive_clear | time_mask(mount.recursive_set),
        ..MountAttributes::default()
    };
    set_attributes(tree, true, recursive)?;
    for &flags in &mount.propagation {
        let attributes = MountAttributes {
            propagation: flags & !libc::MS_REC,
            ..MountAttributes::default()
        };
        mount_set_attributes(tree, flags & libc::MS_REC != 0, attributes).field("propagation")?;
    }
    Ok(())
}

fn set_attributes(
    tree: BorrowedFd<'_>,
    recursive: bool,
    attributes: MountAttributes,
) -> Result<()> {
    if attributes.set | attributes.clear == 0 {
        return Ok(());
    }
    mount_set_attributes(tree, recursive, attributes).field("flags")
}

/// The access time mode is a number, not a bit: to set one the old one has to be cleared.
fn time_mask(set: u64) -> u64 {
    const TIMES: u64 = libc::MOUNT_ATTR_NOATIME | libc::MOUNT_ATTR_STRICTATIME;
    if set & TIMES != 0 {
        libc::MOUNT_ATTR__ATIME
    } else {
        0
    }
}

fn attributes_of(flags: u64) -> MountAttributes {
    let mut set = ATTRIBUTES
        .iter()
        .filter(|(flag, _)| flags & flag != 0)
        .fold(0, |set, (_, attribute)| set | attribute);
    let times = libc::MS_NOATIME | libc::MS_STRICTATIME | libc::MS_RELATIME;
    if flags & libc::MS_NOATIME != 0 {
        set |= libc::MOUNT_ATTR_NOATIME;
    } else if flags & libc::MS_STRICTATIME != 0 {
        set |= libc::MOUNT_ATTR_STRICTATIME;
    }
    let clear = if flags & times != 0 {
        libc::MOUNT_ATTR__ATIME
    } else {
        0
    };
    MountAttributes {
        set,
        clear,
        ..MountAttributes::default()
    }
}

/// A path is masked by nothing: an empty directory, or the null device of the agent's own `/dev`.
pub(crate) fn mask(rootfs: &Rootfs, path: &str) -> rustix::io::Result<()> {
    let Some(target) = open_if_there(rootfs, path)? else {
        return Ok(());
    };
    if FileType::from_raw_mode(fstat(&target)?.st_mode) == FileType::Directory {
        fchdir(&target)?;
        return mount(
            "tmpfs",
            HERE,
            "tmpfs",
            MountFlags::RDONLY,
            Some(c"nr_blocks=1,nr_inodes=1"),
        );
    }
    let null = openat(
        CWD,
        "/dev/null",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    attach_tree(clone_tree(null.as_fd(), false)?.as_fd(), target.as_fd())
}

pub(crate) fn make_read_only(rootfs: &Rootfs, path: &str) -> rustix::io::Result<()> {
    let Some(target) = open_if_there(rootfs, path)? else {
        return Ok(());
    };
    let tree = clone_tree(target.as_fd(), true)?;
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY,
        ..MountAttributes::default()
    };
    mount_set_attributes(tree.as_fd(), false, attributes)?;
    attach_tree(tree.as_fd(), target.as_fd())
}

fn open_if_there(rootfs: &Rootfs, path: &str) -> rustix::io::Result<Option<OwnedFd>> {
    match rootfs.open(path) {
        Ok(target) => Ok(Some(target)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Sets the propagation of the container's root, from inside.
pub(crate) fn set_root_propagation(flags: u64) -> Result<()> {
    let flags = u32::try_from(flags).map_err(|_| refused("rootfs_propagation: out of range"))?;
    mount_change("/", MountPropagationFlags::from_bits_retain(flags)).field("rootfs_propagation")
}

/// Detaches what is mounted at a place of a running container.
pub(crate) fn detach(rootfs: &Rootfs, destination: &str) -> Result<()> {
    let path = Path::new(destination);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(refused(format!("unmount {destination}: invalid path")));
    };
    rootfs
        .open(parent)
        .and_then(fchdir)
        .and_then(|()| unmount(name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW))
        .field(format_args!("unmount {destination}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_attributes() {
        let cases = [
            (0, 0, 0),
            (
                libc::MS_RDONLY | libc::MS_NOEXEC,
                libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC,
                0,
            ),
            (
                libc::MS_NOATIME,
                libc::MOUNT_ATTR_NOATIME,
                libc::MOUNT_ATTR__ATIME,
            ),
            (libc::MS_RELATIME, 0, libc::MOUNT_ATTR__ATIME),
        ];
        for (flags, set, clear) in cases {
            let attributes = attributes_of(flags);
            assert_eq!(
                (attributes.set, attributes.clear),
                (set, clear),
                "{flags:#x}"
            );
        }
    }
}
