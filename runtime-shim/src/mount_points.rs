// SPDX-License-Identifier: Apache-2.0
//! Makes the places in a root file system that something gets mounted on. The tree may be hostile:
//! every lookup happens inside of it, whatever links it holds.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, chmodat, mkdirat, openat, openat2};
use rustix::io::Errno;

use crate::plan::{MountPoint, ShareKind};

#[derive(Debug, thiserror::Error)]
#[error("mount point {path} in the root file system")]
pub struct MountPointError {
    path: String,
    source: io::Error,
}

pub fn make(rootfs: &Path, points: &[MountPoint]) -> Result<(), MountPointError> {
    if points.is_empty() {
        return Ok(());
    }
    let fail = |path: &str, error: Errno| MountPointError {
        path: path.to_owned(),
        source: error.into(),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, rootfs, flags, Mode::empty()).map_err(|error| fail("/", error))?;
    for point in points {
        make_one(root.as_fd(), point).map_err(|error| fail(&point.path, error))?;
    }
    Ok(())
}

fn make_one(root: BorrowedFd<'_>, point: &MountPoint) -> rustix::io::Result<()> {
    let components = normal_components(&point.path)?;
    let mut path = PathBuf::new();
    let last = components.len();
    for (index, name) in components.into_iter().enumerate() {
        let parent = path.clone();
        path.push(name);
        match inside(root, &path, OFlags::PATH) {
            Ok(_) => continue,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        let parent = inside(root, &parent, OFlags::PATH | OFlags::DIRECTORY)?;
        if index + 1 == last && point.kind == ShareKind::File {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(&parent, name, flags, Mode::from_raw_mode(0o644))?;
        } else {
            mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
            if index + 1 == last && point.mode != 0o755 {
                // Whatever the umask of the caller is.
                let mode = Mode::from_raw_mode(point.mode);
                chmodat(&parent, name, mode, AtFlags::empty())?;
            }
        }
    }
    Ok(())
}

fn normal_components(path: &str) -> rustix::io::Result<Vec<&Path>> {
    let mut components = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => components.push(Path::new(name)),
            Component::ParentDir | Component::Prefix(_) => return Err(Errno::INVAL),
        }
    }
    Ok(components)
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
        let made = make(&root, &points);
        let dangling = make(&root, &[point("/outer/x", ShareKind::Directory)]);
        let absolute = make(&root, &[point("/absolute/x", ShareKind::File)]);
        let upward = make(&root, &[point("/a/../../x", ShareKind::File)]);
        let inside = (
            root.join("real/a/b").is_dir(),
            root.join("real/file").is_file(),
        );
        let mode = |path: &str| fs::metadata(root.join(path)).unwrap().mode() & 0o7777;
        let modes = (mode("real/a"), mode("real/a/b"));
        let outside = fs::read_dir(base.join("outside")).unwrap().count();
        fs::remove_dir_all(&base).unwrap();
        made.unwrap();
        assert_eq!(inside, (true, true));
        assert_eq!(modes, (0o755, 0o1777));
        assert_eq!(outside, 0);
        assert!(dangling.is_err() && absolute.is_err() && upward.is_err());
    }
}
