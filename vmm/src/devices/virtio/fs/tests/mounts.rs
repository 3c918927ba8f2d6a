// SPDX-License-Identifier: Apache-2.0
//! A share over several mounts. Needs root, to mount; without it these tests say so and pass.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_remount};
use rustix::thread::UnshareFlags;
use vm_memory::ByteValued;

use super::super::abi::{self, fattr, opcode};
use super::super::test_support::{Guest, ROOT};

/// Gives the calling thread a mount namespace of its own.
fn can_mount() -> bool {
    // SAFETY: nothing depends on which mount namespace the thread of a test is in.
    if unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.is_err() {
        eprintln!("skipped: no privilege to mount");
        return false;
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    true
}

fn tmpfs(at: &Path) {
    mount("tmpfs", at, "tmpfs", MountFlags::empty(), None).unwrap();
}

#[test]
fn read_only_is_read_only_whatever_else_leads_there() {
    if !can_mount() {
        return;
    }
    let mut guest = Guest::new();
    let outside = guest.outside();
    for name in ["rw", "ro"] {
        fs::create_dir(guest.host(name)).unwrap();
        mount_bind(&outside, guest.host(name)).unwrap();
    }
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(guest.host("ro"), flags, "").unwrap();
    let writable = guest.find("rw/secret").unwrap();
    let readonly = guest.find("ro/secret").unwrap();
    assert_ne!(writable.nodeid, readonly.nodeid);
    assert_eq!(
        writable.attr.ino, readonly.attr.ino,
        "one file all the same"
    );
    let open = guest.open(writable.nodeid, libc::O_RDWR).unwrap();
    guest.write(writable.nodeid, open.fh, 0, b"S").unwrap();

    let node = readonly.nodeid;
    let directory = guest.find("ro").unwrap().nodeid;
    for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags).unwrap_err(), Errno::ROFS);
    }
    let open = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 10).unwrap(), b"Secret");
    assert_eq!(guest.write(node, open.fh, 0, b"x"), Err(Errno::BADF));
    for valid in [fattr::MODE, fattr::UID, fattr::SIZE, fattr::MTIME_NOW] {
        let input = abi::SetattrIn {
            valid,
            ..abi::SetattrIn::default()
        };
        assert_eq!(guest.setattr(node, &input).unwrap_err(), Errno::ROFS);
    }
    assert_eq!(guest.setxattr(node, c"user.x", b"1"), Err(Errno::ROFS));
    let created = guest.create(directory, c"new", libc::O_RDWR, 0o644);
    assert_eq!(created.unwrap_err(), Errno::ROFS);
    assert_eq!(guest.mkdir(directory, c"new").unwrap_err(), Errno::ROFS);
    let device = guest.mknod(directory, c"new", libc::S_IFCHR, 0x103);
    assert_eq!(device.unwrap_err(), Errno::ROFS);
    assert_eq!(guest.unlink(directory, c"secret"), Err(Errno::ROFS));
    let renamed = guest.rename((directory, c"secret"), (directory, c"x"), 0);
    assert_eq!(renamed, Err(Errno::ROFS));
    let input = abi::FallocateIn {
        fh: open.fh,
        length: 100,
        ..abi::FallocateIn::default()
    };
    let allocated = guest.call(opcode::FALLOCATE, node, &[input.as_slice()]);
    assert_eq!(allocated, Err(Errno::BADF));
    // Not by way of the other mount either.
    let rw = guest.find("rw").unwrap().nodeid;
    assert_eq!(guest.link(node, rw, c"l").unwrap_err(), Errno::XDEV);
    let link = guest.link(writable.nodeid, directory, c"l");
    assert!(matches!(link, Err(Errno::XDEV | Errno::ROFS)));
    let renamed = guest.rename((rw, c"secret"), (directory, c"x"), 0);
    assert!(matches!(renamed, Err(Errno::XDEV | Errno::ROFS)));
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"Secret");
}

#[test]
fn file_systems_do_not_share_inode_numbers() {
    if !can_mount() {
        return;
    }
    let mut guest = Guest::new();
    let mut seen = std::collections::HashMap::new();
    for name in ["a", "b", "c"] {
        fs::create_dir(guest.host(name)).unwrap();
        tmpfs(&guest.host(name));
        for file in 0..50 {
            fs::write(guest.host(&format!("{name}/{file}")), "").unwrap();
            let path = format!("{name}/{file}");
            let ino = guest.find(&path).unwrap().attr.ino;
            assert_eq!(seen.insert(ino, path.clone()), None, "{path}");
        }
        // A mount point shows the number of what is mounted, and listings agree with attributes below it.
        let directory = guest.find(name).unwrap();
        let fh = guest.opendir(directory.nodeid).unwrap();
        let list = guest
            .readdir((directory.nodeid, fh), 0, 65_536, false)
            .unwrap();
        for entry in list.iter().filter(|entry| entry.name != "..") {
            let attr = match entry.name.as_str() {
                "." => directory.attr,
                file => guest.find(&format!("{name}/{file}")).unwrap().attr,
            };
            assert_eq!(entry.ino, attr.ino, "{}", entry.name);
        }
    }
    guest.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    // A mount point cannot be removed.
    assert_eq!(guest.rmdir(ROOT, c"a"), Err(Errno::BUSY));
}

#[test]
fn a_single_file_can_be_a_mount() {
    if !can_mount() {
        return;
    }
    let mut guest = Guest::new();
    fs::write(guest.host("m0"), "").unwrap();
    mount_bind(guest.outside().join("secret"), guest.host("m0")).unwrap();
    let node = guest.find("m0").unwrap().nodeid;
    let open = guest.open(node, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 10).unwrap(), b"secret");
    // The host rewrites it in place.
    fs::write(guest.outside().join("secret"), "rewritten").unwrap();
    assert_eq!(guest.getattr(node).unwrap().size, 9);
    assert_eq!(guest.read(node, open.fh, 0, 10).unwrap(), b"rewritten");
}

#[test]
fn a_file_of_an_overlay_stays_itself_when_it_is_copied_up() {
    if !can_mount() {
        return;
    }
    let mut guest = Guest::new();
    fs::create_dir(guest.host("rootfs")).unwrap();
    // Layers on one file system of their own, as engines have them.
    let layers = guest.outside();
    tmpfs(&layers);
    for name in ["lower", "upper", "work"] {
        fs::create_dir(layers.join(name)).unwrap();
    }
    fs::write(layers.join("lower/file"), "lower").unwrap();
    fs::write(layers.join("lower/other"), "lower").unwrap();
    let options = format!(
        "lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work",
        layers.display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    mount(
        "overlay",
        guest.host("rootfs"),
        "overlay",
        MountFlags::empty(),
        &*options,
    )
    .unwrap();

    let before = guest.find("rootfs/file").unwrap();
    let node = before.nodeid;
    let read = guest.open(node, libc::O_RDONLY).unwrap();
    let write = guest.open(node, libc::O_WRONLY).unwrap();
    guest.write(node, write.fh, 0, b"UPPER").unwrap();
    let after = guest.find("rootfs/file").unwrap();
    assert_eq!((after.nodeid, after.attr.ino), (node, before.attr.ino));
    let again = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, again.fh, 0, 10).unwrap(), b"UPPER");
    guest.release(node, read.fh).unwrap();
    assert_eq!(fs::read(layers.join("upper/file")).unwrap(), b"UPPER");
    assert_eq!(fs::read(layers.join("lower/file")).unwrap(), b"lower");
    // Removed and made again.
    let rootfs = guest.find("rootfs").unwrap().nodeid;
    guest.unlink(rootfs, c"other").unwrap();
    assert_ne!(
        guest.find("rootfs/other").map(|entry| entry.nodeid),
        Ok(node)
    );
    let (new, _) = guest.create(rootfs, c"other", libc::O_RDWR, 0o644).unwrap();
    assert_eq!(guest.find("rootfs/other").unwrap().nodeid, new.nodeid);
    guest
        .rename((rootfs, c"other"), (rootfs, c"file"), 0)
        .unwrap();
    assert_eq!(guest.getattr(node).unwrap().nlink, 0);
    let device = guest.mknod(rootfs, c"null", libc::S_IFCHR | 0o666, 0x103);
    assert_eq!(device.unwrap().attr.rdev, 0x103);
}
