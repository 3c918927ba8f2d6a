// SPDX-License-Identifier: Apache-2.0
//! The file system that the guest sees: the tree below one directory of the host.
//!
//! Everything is relative to a descriptor: of the directory a checked [`Name`] is in, or of the file itself. No path
//! from the guest is ever resolved here, symbolic links are never followed, and nothing but regular files and
//! directories is ever opened. What may not be written is mounted read-only on the host.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Statx, StatxAttributes, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::abi::{self, fattr};
use super::credentials::Credentials;
use super::directory::OpenDirectory;
use super::file::OpenFile;
use super::handles::Handles;
use super::inert::{self, Inert};
use super::inodes::{Directory, Inodes, Limits, Nature, NodeId};
use super::name::Name;
use super::request::Rename;
use super::self_fd::{self, SelfFd};

/// How long the guest may believe what it was told without asking again.
#[derive(Debug, Clone, Copy)]
struct Caching {
    entry: Duration,
    attributes: Duration,
    /// That a name does not exist.
    absence: Duration,
}

/// A tree that the host changes too: what it does shows within a second, and at once where something did not exist.
const SHARED: Caching = Caching {
    entry: Duration::from_secs(1),
    attributes: Duration::from_secs(1),
    absence: Duration::ZERO,
};

/// What is not a directory in such a tree. Opening a file drops its cached data, but not its cached size: without a
/// lookup before each opening, a file that the host has made longer would be cut off at its old end.
const SHARED_FILE: Caching = Caching {
    entry: Duration::ZERO,
    ..SHARED
};

/// A single file of the host mounted by itself: the guest's mount point is never looked up again, so that each use has
/// to ask for the size.
const SHARED_MOUNT: Caching = Caching {
    attributes: Duration::ZERO,
    ..SHARED_FILE
};

/// A tree that is the container's own. The host changes it rarely (`docker cp`), so that it shows only later.
const PRIVATE: Caching = Caching {
    entry: Duration::from_secs(60),
    attributes: Duration::from_secs(60),
    absence: Duration::from_secs(10),
};

impl Caching {
    /// For names in a directory that does or does not belong to the container alone.
    fn of(private: bool) -> Caching {
        if private { PRIVATE } else { SHARED }
    }

    fn of_node(nature: Nature, stat: &Statx) -> Caching {
        if nature.private || nature.file_type == FileType::Directory {
            Caching::of(nature.private)
        } else if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            SHARED_MOUNT
        } else {
            SHARED_FILE
        }
    }
}

/// Open files and memory that one guest can take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    pub(super) inodes: Limits,
    pub(super) files: usize,
    pub(super) directories: usize,
}

impl Budget {
    /// For a process that may have `descriptors` open, and a guest with `memory` bytes.
    pub(super) fn new(descriptors: u64, memory: u64) -> Budget {
        /// For everything else in the process.
        const OTHERS: u64 = 256;
        /// Linux needs more than this for an inode and its dentry: nobody can hold more nodes.
        const NODE: u64 = 1024;
        let descriptors = usize::try_from(descriptors.saturating_sub(OTHERS))
            .unwrap_or(usize::MAX)
            .clamp(64, 1 << 20);
        let nodes = usize::try_from(memory / NODE).unwrap_or(usize::MAX);
        Budget {
            inodes: Limits {
                nodes: nodes.max(1 << 16),
                cached: (descriptors / 4).min(1 << 14),
                nameless: descriptors / 8,
            },
            files: descriptors / 2,
            directories: descriptors / 16,
        }
    }
}

#[derive(Debug)]
pub(super) struct Passthrough {
    pub(super) inodes: Inodes,
    pub(super) files: Handles<OpenFile>,
    pub(super) directories: Handles<OpenDirectory>,
    pub(super) self_fd: Arc<SelfFd>,
    /// SYNCFS means nothing any more.
    over: AtomicBool,
}

impl Passthrough {
    /// Serves `root`. Names in `private` are of trees in it that the host is not expected to change.
    pub(super) fn new(
        self_fd: Arc<SelfFd>,
        root: OwnedFd,
        private: Vec<CString>,
        budget: Budget,
    ) -> Result<Passthrough, Errno> {
        Ok(Passthrough {
            inodes: Inodes::new(root, private, budget.inodes)?,
            files: Handles::new(budget.files),
            directories: Handles::new(budget.directories),
            self_fd,
            over: AtomicBool::new(false),
        })
    }

    /// What the guest still brings is for the files, and for their disks when the host sees fit.
    pub(super) fn leave_disks_to_host(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Forgets whatever the guest had open or looked up.
    pub(super) fn reset(&self) -> Result<(), Errno> {
        self.files.clear();
        self.directories.clear();
        self.inodes.reset()
    }

    pub(super) fn lookup(&self, parent: NodeId, name: Name<'_>) -> Result<abi::EntryOut, Errno> {
        let directory = self.inodes.directory(parent)?;
        match self.entry(&directory, name.as_c_str()) {
            Err(Errno::NOENT) => {
                let absence = Caching::of(self.inodes.nature(parent)?.private).absence;
                if absence.is_zero() {
                    return Err(Errno::NOENT);
                }
                Ok(abi::EntryOut {
                    entry_valid: absence.as_secs(),
                    entry_valid_nsec: absence.subsec_nanos(),
                    ..abi::EntryOut::default()
                })
            }
            result => result,
        }
    }

    /// Tells the guest of what `name` in `directory` is now.
    pub(super) fn entry(&self, directory: &Directory, name: &CStr) -> Result<abi::EntryOut, Errno> {
        let stat = self_fd::stat_at(directory, name)?;
        self.entry_of(directory, name, &stat)
    }

    pub(super) fn entry_of(
        &self,
        directory: &Directory,
        name: &CStr,
        stat: &Statx,
    ) -> Result<abi::EntryOut, Errno> {
        self.inodes
            .learn_mount(stat, || self_fd::pin(directory, name))?;
        let inert = Inert::look(directory, name, stat)?;
        let (node, nature) = self.inodes.add(directory.node, name, stat, inert)?;
        Ok(self.entry_out(node, nature, stat))
    }

    pub(super) fn entry_out(&self, node: NodeId, nature: Nature, stat: &Statx) -> abi::EntryOut {
        let caching = Caching::of_node(nature, stat);
        abi::EntryOut {
            nodeid: node,
            generation: 0,
            entry_valid: caching.entry.as_secs(),
            attr_valid: caching.attributes.as_secs(),
            entry_valid_nsec: caching.entry.subsec_nanos(),
            attr_valid_nsec: caching.attributes.subsec_nanos(),
            attr: self.attr(nature, stat),
        }
    }

    fn attr(&self, nature: Nature, stat: &Statx) -> abi::Attr {
        let (mode, (major, minor)) = shown(nature, stat);
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        abi::Attr {
            ino: self.inodes.number(device, stat.stx_ino),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec.cast_unsigned(),
            mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
            ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: inert::encode_device(major, minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }

    fn attr_out(&self, nature: Nature, stat: &Statx) -> abi::AttrOut {
        let valid = Caching::of_node(nature, stat).attributes;
        abi::AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: self.attr(nature, stat),
        }
    }

    /// Attributes of a node, by an open file of it if the guest names one.
    fn stat(&self, node: NodeId, handle: Option<u64>) -> Result<(Statx, Nature), Errno> {
        let Some(handle) = handle else {
            return self.inodes.stat(node);
        };
        let nature = self.inodes.nature(node)?;
        let stat = if nature.file_type == FileType::Directory {
            self_fd::stat(self.directories.get(node, handle)?.file())?
        } else {
            self_fd::stat(self.files.get(node, handle)?.file())?
        };
        Ok((stat, nature))
    }

    pub(super) fn getattr(
        &self,
        node: NodeId,
        input: &abi::GetattrIn,
    ) -> Result<abi::AttrOut, Errno> {
        let handle = (input.getattr_flags & abi::GETATTR_FH != 0).then_some(input.fh);
        let (stat, nature) = self.stat(node, handle)?;
        Ok(self.attr_out(nature, &stat))
    }

    pub(super) fn setattr(
        &self,
        credentials: &mut Credentials,
        node: NodeId,
        input: &abi::SetattrIn,
    ) -> Result<abi::AttrOut, Errno> {
        let valid = |bit| input.valid & bit != 0;
        let nature = self.inodes.nature(node)?;
        let path = self.inodes.path(node)?;
        if valid(fattr::MODE) {
            self.chmod(path.as_fd(), nature, input.mode)?;
        }
        if valid(fattr::UID) || valid(fattr::GID) {
            chown(
                path.as_fd(),
                valid(fattr::UID).then_some(input.uid),
                valid(fattr::GID).then_some(input.gid),
            )?;
        }
        if valid(fattr::SIZE) {
            let open = match valid(fattr::FH) {
                true => Some(self.files.get(node, input.fh)?),
                false => None,
            };
            require_regular(nature)?;
            let truncate = || match &open {
                Some(open) => rustix::fs::ftruncate(open.file(), input.size),
                None => {
                    let file = self.self_fd.reopen(path.as_fd(), OFlags::WRONLY)?;
                    rustix::fs::ftruncate(&file, input.size)
                }
            };
            if valid(fattr::KILL_SUIDGID) {
                credentials.drop_privileges_of_file(truncate)?;
            } else {
                truncate()?;
            }
        }
        if input.valid & (fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW) != 0 {
            let times = Timestamps {
                last_access: time(
                    (valid(fattr::ATIME), valid(fattr::ATIME_NOW)),
                    (input.atime, input.atimensec),
                )?,
                last_modification: time(
                    (valid(fattr::MTIME), valid(fattr::MTIME_NOW)),
                    (input.mtime, input.mtimensec),
                )?,
            };
            let name = DecInt::from_fd(&*path);
            rustix::fs::utimensat(&*self.self_fd, name, &times, AtFlags::empty())?;
        }
        let stat = self_fd::stat(&*path)?;
        Ok(self.attr_out(nature, &stat))
    }

    fn chmod(&self, path: BorrowedFd<'_>, nature: Nature, mode: u32) -> Result<(), Errno> {
        if nature.file_type == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let mut mode = Mode::from_raw_mode(mode & 0o7777);
        if nature.inert.is_some() {
            // It also means: a regular file, which loses nothing by these.
            mode = (mode - Mode::SUID - Mode::SGID) | Mode::SVTX;
        }
        rustix::fs::chmodat(
            &*self.self_fd,
            DecInt::from_fd(path),
            mode,
            AtFlags::empty(),
        )
    }

    pub(super) fn readlink(&self, node: NodeId) -> Result<CString, Errno> {
        if self.inodes.nature(node)?.file_type != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let path = self.inodes.path(node)?;
        rustix::fs::readlinkat(&*path, c"", Vec::new())
    }

    pub(super) fn symlink(
        &self,
        credentials: &mut Credentials,
        owner: (u32, u32),
        parent: NodeId,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<abi::EntryOut, Errno> {
        let directory = self.inodes.directory(parent)?;
        credentials.create_as(owner, 0, || {
            rustix::fs::symlinkat(target, &directory, name.as_c_str())
        })?;
        self.entry(&directory, name.as_c_str())
    }

    pub(super) fn mknod(
        &self,
        credentials: &mut Credentials,
        owner: (u32, u32),
        parent: NodeId,
        input: &abi::MknodIn,
        name: Name<'_>,
    ) -> Result<abi::EntryOut, Errno> {
        let directory = self.inodes.directory(parent)?;
        let file_type = match FileType::from_raw_mode(input.mode) {
            // As for mknod(2).
            FileType::Unknown if input.mode & libc::S_IFMT == 0 => FileType::RegularFile,
            file_type => file_type,
        };
        let mode = Mode::from_raw_mode(input.mode & 0o7777);
        let (major, minor) = inert::decode_device(input.rdev);
        let name = name.as_c_str();
        credentials.create_as(owner, input.umask, || match file_type {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {
                rustix::fs::mknodat(&directory, name, file_type, mode, 0)
            }
            // The whiteout of overlayfs, which no driver stands behind.
            FileType::CharacterDevice if input.rdev == 0 => {
                rustix::fs::mknodat(&directory, name, file_type, mode, 0)
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                let device = Inert {
                    file_type,
                    major,
                    minor,
                };
                device.create(&directory, name, mode - Mode::SUID - Mode::SGID)
            }
            _ => Err(Errno::INVAL),
        })?;
        self.entry(&directory, name)
    }

    pub(super) fn mkdir(
        &self,
        credentials: &mut Credentials,
        owner: (u32, u32),
        parent: NodeId,
        input: &abi::MkdirIn,
        name: Name<'_>,
    ) -> Result<abi::EntryOut, Errno> {
        let directory = self.inodes.directory(parent)?;
        let mode = Mode::from_raw_mode(input.mode & 0o7777);
        credentials.create_as(owner, input.umask, || {
            rustix::fs::mkdirat(&directory, name.as_c_str(), mode)
        })?;
        self.entry(&directory, name.as_c_str())
    }

    /// UNLINK, and RMDIR with `AtFlags::REMOVEDIR`.
    pub(super) fn unlink(
        &self,
        parent: NodeId,
        name: Name<'_>,
        flags: AtFlags,
    ) -> Result<(), Errno> {
        let directory = self.inodes.directory(parent)?;
        let name = name.as_c_str();
        let node = self.inodes.find(&directory, name);
        if let Some(node) = node {
            self.inodes.hold(node, parent, name);
        }
        rustix::fs::unlinkat(&directory, name, flags)?;
        if let Some(node) = node {
            self.inodes.unlinked(node, parent, name);
        }
        Ok(())
    }

    pub(super) fn rename(&self, parent: NodeId, rename: &Rename<'_>) -> Result<(), Errno> {
        let flags = RenameFlags::from_bits(rename.flags).ok_or(Errno::INVAL)?;
        let from = self.inodes.directory(parent)?;
        let to = self.inodes.directory(rename.newdir)?;
        let (name, newname) = (rename.name.as_c_str(), rename.newname.as_c_str());
        let moved = self.inodes.find(&from, name);
        let replaced = self.inodes.find(&to, newname);
        if let Some(replaced) = replaced {
            self.inodes.hold(replaced, to.node, newname);
        }
        rustix::fs::renameat_with(&from, name, &to, newname, flags)?;
        if moved.is_some() && moved == replaced {
            // Two names of one file: nothing has happened.
            return Ok(());
        }
        if let Some(replaced) = replaced {
            if flags.contains(RenameFlags::EXCHANGE) {
                self.inodes.moved(replaced, from.node, name);
            } else {
                self.inodes.unlinked(replaced, to.node, newname);
            }
        }
        if let Some(moved) = moved {
            self.inodes.moved(moved, to.node, newname);
        }
        Ok(())
    }

    pub(super) fn link(
        &self,
        node: NodeId,
        parent: NodeId,
        name: Name<'_>,
    ) -> Result<abi::EntryOut, Errno> {
        let directory = self.inodes.directory(parent)?;
        let path = self.inodes.path(node)?;
        rustix::fs::linkat(
            &*self.self_fd,
            DecInt::from_fd(&*path),
            &directory,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.entry(&directory, name.as_c_str())
    }

    pub(super) fn statfs(&self, node: NodeId) -> Result<abi::Kstatfs, Errno> {
        let stat = rustix::fs::fstatfs(&*self.inodes.path(node)?)?;
        let small = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(abi::Kstatfs {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: small(stat.f_bsize),
            namelen: small(stat.f_namelen),
            frsize: small(stat.f_frsize),
            ..abi::Kstatfs::default()
        })
    }

    /// Brings all file systems of the share to their disks.
    pub(super) fn syncfs(&self) -> Result<(), Errno> {
        if self.over.load(Ordering::Relaxed) {
            return Ok(());
        }
        for anchor in self.inodes.anchors() {
            let file = self.self_fd.reopen(anchor.as_fd(), OFlags::RDONLY)?;
            rustix::fs::syncfs(&file)?;
        }
        Ok(())
    }
}

/// Mode and device number as the guest is to see them.
fn shown(nature: Nature, stat: &Statx) -> (u16, (u32, u32)) {
    let Some(inert) = nature.inert else {
        return (stat.stx_mode, (stat.stx_rdev_major, stat.stx_rdev_minor));
    };
    let permissions = u32::from(stat.stx_mode) & 0o777;
    let mode = inert.file_type.as_raw_mode() | permissions;
    // File types and permissions are 16 bits.
    let mode = u16::try_from(mode).unwrap_or(stat.stx_mode);
    (mode, (inert.major, inert.minor))
}

/// Only a regular file, and none that stands for a device, has data.
pub(super) fn require_regular(nature: Nature) -> Result<(), Errno> {
    match nature.file_type {
        FileType::RegularFile if nature.inert.is_none() => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::NXIO),
    }
}

fn chown(path: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(Errno::INVAL);
    }
    rustix::fs::chownat(
        path,
        c"",
        uid.map(Uid::from_raw),
        gid.map(Gid::from_raw),
        AtFlags::EMPTY_PATH,
    )
}

/// `set` and `now` say what to do, and with which seconds and nanoseconds.
fn time((set, now): (bool, bool), (seconds, nanoseconds): (u64, u32)) -> Result<Timespec, Errno> {
    if nanoseconds > 999_999_999 {
        return Err(Errno::INVAL);
    }
    let (tv_sec, tv_nsec) = if now {
        (0, UTIME_NOW)
    } else if set {
        (seconds.cast_signed(), nanoseconds.into())
    } else {
        (0, UTIME_OMIT)
    };
    Ok(Timespec { tv_sec, tv_nsec })
}
