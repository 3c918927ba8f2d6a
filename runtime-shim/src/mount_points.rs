// SPDX-License-Identifier: Apache-2.0
//! Makes the places in a root file system that something gets mounted on. The tree may be hostile:
//! every lookup happens inside of it, whatever links it holds.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, chmodat, mkdirat, openat, openat2,
    readlinkat, statat,
};
use rustix::io::Errno;

use crate::plan::{MountPoint, ShareKind};

/// As the kernel: MAXSYMLINKS.
const MAX_LINKS: usize = 40;

#[derive(Debug, thiserror::Error)]
#[error("mount point {path} in the root file system")]
pub struct MountPointError {
    path: String,
    source: io::Error,
}

/// Returns the paths of those that were not there.
pub fn make(rootfs: &Path, points: &[MountPoint]) -> Result<Vec<String>, MountPointError> {
    if points.is_empty() {
        return Ok(Vec::new());
    }
    let fail = |path: &str, error: Errno| MountPointError {
        path: path.to_owned(),
        source: error.into(),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, rootfs, flags, Mode::empty()).map_err(|error| fail("/", error))?;
    let mut made = Vec::new();
    for point in points {
        if make_one(root.as_fd(), point).map_err(|error| fail(&point.path, error))? {
            made.push(point.path.clone());
        }
    }
    Ok(made)
}

/// Links that lead nowhere are followed, as in runc: their targets are made, inside the root.
fn make_one(root: BorrowedFd<'_>, point: &MountPoint) -> rustix::io::Result<bool> {
    let path = Path::new(&point.path);
    match inside(root, path, OFlags::PATH) {
        Ok(_) => return Ok(false),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    // Holds no links, so that `..` is the removal of its last component.
    let mut done = PathBuf::new();
    let mut todo = names(path);
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            done.pop();
            continue;
        }
        let directory = inside(root, &done, OFlags::PATH | OFlags::DIRECTORY)?;
        match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = readlinkat(&directory, &name, Vec::new())?.into_bytes();
                let target = PathBuf::from(OsString::from_vec(target));
                if target.is_absolute() {
                    done = PathBuf::new();
                }
                for name in names(&target).into_iter().rev() {
                    todo.push_front(name);
                }
                continue;
            }
            Ok(_) => {}
            Err(Errno::NOENT) if point.kind == ShareKind::File && todo.is_empty() => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                openat(&directory, &name, flags, Mode::from_raw_mode(0o644))?;
            }
            Err(Errno::NOENT) => {
                mkdirat(&directory, &name, Mode::from_raw_mode(0o755))?;
                if todo.is_empty() && point.mode != 0o755 {
                    // Whatever the umask of the caller is.
                    let mode = Mode::from_raw_mode(point.mode);
                    chmodat(&directory, &name, mode, AtFlags::empty())?;
                }
            }
            Err(error) => return Err(error),
        }
        done.push(name);
    }
    Ok(true)
}

fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir))
        .map(|component| component.as_os_str().to_owned())
        .collect()
}

fn inside(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn point(path: &str, kind: ShareKind) -> MountPoint {
        MountPoint {
            path: path.into(),
            kind,
            mode: 0o1777,
        }
    }

    #[test]
    fn links_do_not_lead_out() {
        let base = std::env::temp_dir().join(format!("sandbox-points-{}", std::process::id()));
        let root = base.join("root");
        fs::create_dir_all(root.join("real")).unwrap();
        fs::create_dir(base.join("outside")).unwrap();
        symlink("/real", root.join("inner")).unwrap();
        symlink("../../outside", root.join("outer")).unwrap();
        symlink(base.join("outside"), root.join("absolute")).unwrap();
        let points = [
            point("/inner/a/b", ShareKind::Directory),
            point("/inner/file", ShareKind::File),
            point("/inner/file", ShareKind::File),
        ];
        symlink("a", root.join("circle")).unwrap();
        symlink("circle", root.join("a")).unwrap();
        let made = make(&root, &points);
        let others = [
            point("/outer/x", ShareKind::Directory),
            point("/absolute/x", ShareKind::File),
            point("/a/../../x", ShareKind::File),
        ]
        .map(|point| make(&root, &[point]));
        let inside = (
            root.join("real/a/b").is_dir(),
            root.join("real/file").is_file(),
            root.join("outside/x").is_dir(),
            root.join(base.join("outside").strip_prefix("/").unwrap())
                .join("x")
                .is_file(),
        );
        let mode = |path: &str| fs::metadata(root.join(path)).unwrap().mode() & 0o7777;
        let modes = (mode("real/a"), mode("real/a/b"));
        let outside = fs::read_dir(base.join("outside")).unwrap().count();
        fs::remove_dir_all(&base).unwrap();
        assert_eq!(made.unwrap(), ["/inner/a/b", "/inner/file"]);
        assert_eq!(inside, (true, true, true, true));
        assert_eq!(modes, (0o755, 0o1777));
        assert_eq!(outside, 0);
        let [dangling, absolute, circle] = others;
        assert!(dangling.is_ok() && absolute.is_ok() && circle.is_err());
    }
}
