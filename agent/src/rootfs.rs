// SPDX-License-Identifier: Apache-2.0
//! Paths inside a root file system that an image author filled: symbolic links are followed within
//! it and cannot lead out, whatever is planted there.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, readlinkat, statat,
};
use rustix::io::{Errno, Result};

/// As the kernel: MAXSYMLINKS.
const MAX_LINKS: usize = 40;

/// openat2(2) gives up with EAGAIN when something is renamed meanwhile.
const MAX_ATTEMPTS: usize = 32;

#[derive(Debug)]
pub(crate) struct Rootfs(OwnedFd);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
}

impl Rootfs {
    pub(crate) fn new(root: OwnedFd) -> Rootfs {
        Rootfs(root)
    }

    /// A handle (`O_PATH`) on what the path leads to.
    pub(crate) fn open(&self, path: impl AsRef<Path>) -> Result<OwnedFd> {
        self.open_with(path, OFlags::PATH)
    }

    pub(crate) fn open_with(&self, path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
        resolve(
            self.0.as_fd(),
            path.as_ref(),
            flags,
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }

    pub(crate) fn open_directory_without_links(&self, path: impl AsRef<Path>) -> Result<OwnedFd> {
        resolve(
            self.0.as_fd(),
            path.as_ref(),
            OFlags::PATH | OFlags::DIRECTORY,
            ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
        )
    }

    /// A handle on what the path leads to; what is missing of it is made. Dangling symbolic links are
    /// followed: their targets are made, inside the root.
    pub(crate) fn make(&self, path: impl AsRef<Path>, kind: Kind) -> Result<OwnedFd> {
        match self.open(&path) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        // Holds no symbolic links, so that `..` is the removal of its last component.
        let mut done = PathBuf::from("/");
        let mut todo = names(path.as_ref());
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                done.pop();
                continue;
            }
            let directory = self.open(&done)?;
            match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    let target = readlinkat(&directory, &name, Vec::new())?.into_bytes();
                    let target = PathBuf::from(std::ffi::OsString::from_vec(target));
                    if target.is_absolute() {
                        done = PathBuf::from("/");
                    }
                    for name in names(&target).into_iter().rev() {
                        todo.push_front(name);
                    }
                    continue;
                }
                Ok(_) => {}
                Err(Errno::NOENT) if kind == Kind::File && todo.is_empty() => {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    openat(&directory, &name, flags, Mode::from_raw_mode(0o644))?;
                }
                Err(Errno::NOENT) => mkdirat(&directory, &name, Mode::from_raw_mode(0o755))?,
                Err(errno) => return Err(errno),
            }
            done.push(name);
        }
        self.open(&done)
    }

    /// The directory that holds the path's last component, made if missing, and that component.
    pub(crate) fn make_parent<'a>(&self, path: &'a str) -> Result<(OwnedFd, &'a OsStr)> {
        let path = Path::new(path);
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().ok_or(Errno::INVAL)?;
        Ok((self.make(parent, Kind::Directory)?, name))
    }
}

impl AsFd for Rootfs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn names(path: &Path) -> VecDeque<std::ffi::OsString> {
    path.components()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir))
        .map(|component| component.as_os_str().to_owned())
        .collect()
}

/// A handle on something of the share. The host gives paths without links; a link in one was put
/// there by a container.
pub(crate) fn open_in_share(share: BorrowedFd<'_>, path: &str) -> Result<OwnedFd> {
    resolve(
        share,
        Path::new(path),
        OFlags::PATH,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
    )
}

fn resolve(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd> {
    let path: &[u8] = match path.as_os_str().as_bytes() {
        b"" => b".",
        bytes => bytes,
    };
    for _ in 0..MAX_ATTEMPTS {
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A root in a directory of its own, with a canary outside.
    fn scene(name: &str) -> (PathBuf, Rootfs) {
        let top = std::env::temp_dir().join(format!("agent-rootfs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&top);
        fs::create_dir_all(top.join("root")).unwrap();
        fs::create_dir(top.join("canary")).unwrap();
        let root = fs::File::open(top.join("root")).unwrap();
        (top, Rootfs::new(root.into()))
    }

    #[test]
    fn links_stay_inside() {
        let (top, root) = scene("inside");
        symlink("../canary", top.join("root/up")).unwrap();
        symlink(top.join("canary"), top.join("root/absolute")).unwrap();
        symlink("/", top.join("root/top")).unwrap();
        root.make("up/made", Kind::Directory).unwrap();
        root.make("/absolute/made", Kind::File).unwrap();
        root.make("/top/../../../made", Kind::Directory).unwrap();
        assert_eq!(fs::read_dir(top.join("canary")).unwrap().count(), 0);
        assert!(top.join("root/canary/made").is_dir());
        assert!(top.join("root/made").is_dir());
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn dangling_links_are_followed_and_circles_end() {
        let (top, root) = scene("dangling");
        fs::create_dir(top.join("root/var")).unwrap();
        symlink("/run", top.join("root/var/run")).unwrap();
        root.make("/var/run/a/socket", Kind::File).unwrap();
        assert!(top.join("root/run/a/socket").is_file());
        symlink("b", top.join("root/a")).unwrap();
        symlink("a", top.join("root/b")).unwrap();
        assert_eq!(root.make("/a/x", Kind::File).unwrap_err(), Errno::LOOP);
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn a_file_is_no_directory() {
        let (top, root) = scene("file");
        fs::write(top.join("root/file"), "").unwrap();
        assert_eq!(
            root.make("/file/x", Kind::Directory).unwrap_err(),
            Errno::NOTDIR
        );
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn links_in_the_share_are_refused() {
        let (top, root) = scene("share");
        fs::create_dir(top.join("root/volume")).unwrap();
        symlink("volume", top.join("root/link")).unwrap();
        assert!(open_in_share(root.as_fd(), "volume").is_ok());
        assert!(open_in_share(root.as_fd(), "").is_ok());
        assert_eq!(
            open_in_share(root.as_fd(), "link").unwrap_err(),
            Errno::LOOP
        );
        fs::remove_dir_all(top).unwrap();
    }
}
