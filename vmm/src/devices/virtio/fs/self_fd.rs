// SPDX-License-Identifier: Apache-2.0
//! System calls on what an `O_PATH` descriptor stands for.
//!
//! Such a descriptor pins one file without opening it; its type can be looked at first. To open, change or link that
//! very file, whatever its name leads to meanwhile, one goes through its entry in `/proc/self/fd`. A descriptor of that
//! directory goes on working after the process has left for a root without `/proc`, in threads with other
//! credentials, and in a process that is not dumpable.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::path::DecInt;

/// What is asked of every file.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// `/proc/self/fd` of this process.
#[derive(Debug)]
pub(super) struct SelfFd(OwnedFd);

impl SelfFd {
    /// To be called in the process that will use it, while `/proc` is still there.
    ///
    /// The directory becomes a mount of its own that is not attached anywhere: `..` leads nowhere from there, neither
    /// to the program of this process nor to other processes.
    pub(super) fn open() -> io::Result<SelfFd> {
        const DIRECTORY: &CStr = c"/proc/self/fd";
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        match rustix::mount::open_tree(CWD, DIRECTORY, flags) {
            Ok(mount) => Ok(SelfFd(mount)),
            // Nobody who can build a jail.
            Err(Errno::PERM) => {
                log::warn!("virtio-fs: /proc stays within reach: not allowed to mount");
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(SelfFd(rustix::fs::openat(
                    CWD,
                    DIRECTORY,
                    flags,
                    Mode::empty(),
                )?))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this is still the process that `open` was called in: its descriptors would mean other files otherwise.
    /// `file` is any descriptor.
    pub(super) fn check(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let found = stat(self.reopen(file, OFlags::PATH)?)?;
        let meant = stat(file)?;
        let identity = |stat: &Statx| (stat.stx_mnt_id, stat.stx_ino, stat.stx_dev_minor);
        if identity(&found) == identity(&meant) {
            Ok(())
        } else {
            Err(Errno::SRCH)
        }
    }

    /// Opens the file that `path` pins. The caller knows that it is a regular file or a directory: opening anything
    /// else may block or reach a driver.
    pub(super) fn reopen(&self, path: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::openat(
            &self.0,
            DecInt::from_fd(path),
            flags | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::empty(),
        )
    }
}

impl AsFd for SelfFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Pins what `name` in `directory` is. Never follows a symbolic link; `name` is one component.
pub(super) fn pin(directory: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

pub(super) fn stat_at(directory: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(directory, name, flags, WANTED)
}

pub(super) fn stat(file: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, WANTED)
}

pub(super) fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_way_up_from_the_descriptors() {
        let own = SelfFd::open().unwrap();
        own.check(own.as_fd()).unwrap();
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        for path in [c"../status", c"../exe", c"../../version", c"../../self"] {
            assert_eq!(stat_at(&own, path).unwrap_err(), Errno::NOENT, "{path:?}");
        }
    }
}
