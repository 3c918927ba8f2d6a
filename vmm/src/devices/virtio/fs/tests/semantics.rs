// SPDX-License-Identifier: Apache-2.0
//! What a program in the guest relies on.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use rustix::io::Errno;
use vm_memory::ByteValued;

use super::super::abi::{self, fattr, opcode};
use super::super::test_support::{Guest, ROOT, first};

/// Whether this process can give files to others.
fn is_privileged() -> bool {
    use rustix::thread::CapabilitySet;
    let needed = CapabilitySet::CHOWN | CapabilitySet::SETUID | CapabilitySet::SETGID;
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

#[test]
fn init_negotiates() {
    let mut guest = Guest::new();
    let output = guest.init().unwrap();
    assert_eq!((output.major, output.minor), (7, 41));
    assert_eq!(output.max_write, 1 << 20);
    assert_eq!(output.max_pages, 256);
    // A newer major version is told ours and tries again; an old one is refused.
    let newer = abi::InitIn {
        major: 8,
        ..abi::InitIn::default()
    };
    let output: abi::InitOut = guest.ask(opcode::INIT, 0, &[newer.as_slice()]).unwrap();
    assert_eq!((output.major, output.flags), (7, 0));
    assert_eq!(guest.getattr(ROOT).unwrap_err(), Errno::NOTCONN);
    let older = abi::InitIn {
        major: 7,
        minor: 31,
        flags: u32::MAX,
        ..abi::InitIn::default()
    };
    let refused = guest.call(opcode::INIT, 0, &[older.as_slice()]);
    assert_eq!(refused, Err(Errno::PROTO));
    guest.init().unwrap();
    guest.getattr(ROOT).unwrap();
    assert_eq!(guest.call(opcode::DESTROY, 0, &[]), Ok(Vec::new()));
    assert_eq!(guest.getattr(ROOT).unwrap_err(), Errno::NOTCONN);
}

#[test]
fn files_are_created_written_and_read() {
    let mut guest = Guest::new();
    let (entry, open) = guest
        .create(ROOT, c"file", libc::O_RDWR | libc::O_EXCL, 0o100_664)
        .unwrap();
    assert_eq!(entry.attr.mode, 0o100_644);
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, b"hello"), Ok(5));
    assert_eq!(guest.write(entry.nodeid, open.fh, 5, b" world"), Ok(6));
    assert_eq!(fs::read(guest.host("file")).unwrap(), b"hello world");
    assert_eq!(guest.read(entry.nodeid, open.fh, 6, 100).unwrap(), b"world");
    assert_eq!(guest.read(entry.nodeid, open.fh, 11, 100).unwrap(), b"");
    assert_eq!(guest.getattr(entry.nodeid).unwrap().size, 11);
    guest.release(entry.nodeid, open.fh).unwrap();
    assert_eq!(
        guest.read(entry.nodeid, open.fh, 0, 1),
        Err(Errno::BADF),
        "the handle is gone"
    );

    let exclusive = guest.create(ROOT, c"file", libc::O_RDWR | libc::O_EXCL, 0o644);
    assert_eq!(exclusive.unwrap_err(), Errno::EXIST);
    let (again, open) = guest.create(ROOT, c"file", libc::O_RDONLY, 0o644).unwrap();
    assert_eq!(again.nodeid, entry.nodeid);
    assert_eq!(guest.read(entry.nodeid, open.fh, 0, 5).unwrap(), b"hello");
    assert_eq!(
        guest.write(entry.nodeid, open.fh, 0, b"x"),
        Err(Errno::BADF),
        "opened for reading"
    );
    let truncated = guest.open(entry.nodeid, libc::O_WRONLY | libc::O_TRUNC);
    truncated.unwrap();
    assert_eq!(guest.getattr(entry.nodeid).unwrap().size, 0);
}

#[test]
fn a_mebibyte_moves_in_one_request() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, c"big", libc::O_RDWR, 0o644).unwrap();
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, &data), Ok(1 << 20));
    let read = guest.read(entry.nodeid, open.fh, 0, 1 << 20).unwrap();
    assert!(read == data);
    // More than was agreed on.
    assert_eq!(
        guest
            .read(entry.nodeid, open.fh, 0, u32::MAX)
            .unwrap()
            .len(),
        1 << 20
    );
}

#[test]
fn appending_is_up_to_the_file_as_it_is() {
    let mut guest = Guest::new();
    fs::write(guest.host("log"), "one\n").unwrap();
    let node = guest.find("log").unwrap().nodeid;
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let open = guest.open(node, flags).unwrap();
    // The host wrote in the meantime; the guest does not know.
    fs::write(guest.host("log"), "one\ntwo\n").unwrap();
    let input = abi::WriteIn {
        fh: open.fh,
        offset: 4,
        size: 6,
        flags: flags.cast_unsigned(),
        ..abi::WriteIn::default()
    };
    assert_eq!(guest.write_with(node, &input, b"three\n"), Ok(6));
    assert_eq!(fs::read(guest.host("log")).unwrap(), b"one\ntwo\nthree\n");
    // A page of a shared mapping goes where it belongs.
    let input = abi::WriteIn {
        offset: 0,
        size: 3,
        write_flags: abi::WRITE_CACHE,
        ..input
    };
    assert_eq!(guest.write_with(node, &input, b"ONE"), Ok(3));
    assert_eq!(fs::read(guest.host("log")).unwrap(), b"ONE\ntwo\nthree\n");
}

#[test]
fn names_are_moved() {
    let mut guest = Guest::new();
    let a = guest.mkdir(ROOT, c"a").unwrap().nodeid;
    let b = guest.mkdir(ROOT, c"b").unwrap().nodeid;
    let (one, _) = guest.create(a, c"one", libc::O_RDWR, 0o644).unwrap();
    let (two, _) = guest.create(b, c"two", libc::O_RDWR, 0o644).unwrap();
    guest.rename((a, c"one"), (b, c"uno"), 0).unwrap();
    assert_eq!(guest.lookup(a, c"one").unwrap_err(), Errno::NOENT);
    assert_eq!(guest.lookup(b, c"uno").unwrap().nodeid, one.nodeid);
    let refused = guest.rename((b, c"uno"), (b, c"two"), libc::RENAME_NOREPLACE);
    assert_eq!(refused, Err(Errno::EXIST));
    guest
        .rename((b, c"uno"), (b, c"two"), libc::RENAME_EXCHANGE)
        .unwrap();
    assert_eq!(guest.lookup(b, c"two").unwrap().nodeid, one.nodeid);
    assert_eq!(guest.lookup(b, c"uno").unwrap().nodeid, two.nodeid);
    guest
        .rename((b, c"uno"), (a, c"x"), libc::RENAME_WHITEOUT)
        .unwrap();
    let whiteout = guest.lookup(b, c"uno").unwrap();
    assert_eq!((whiteout.attr.mode, whiteout.attr.rdev), (libc::S_IFCHR, 0));
    assert_eq!(
        guest.rename((ROOT, c"b"), (ROOT, c"c"), 1 << 7),
        Err(Errno::INVAL)
    );
    // What is in a directory moves with it.
    guest.rename((ROOT, c"b"), (a, c"b"), 0).unwrap();
    assert_eq!(guest.find("a/b/two").unwrap().nodeid, one.nodeid);
    assert!(guest.host("a/b/two").exists());
    // The old call too.
    let input = abi::RenameIn { newdir: ROOT };
    let parts = [input.as_slice(), &b"x\0"[..], &b"y\0"[..]];
    guest.call(opcode::RENAME, a, &parts).unwrap();
    assert_eq!(guest.find("y").unwrap().nodeid, two.nodeid);
}

#[test]
fn an_open_file_outlives_its_name() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, c"gone", libc::O_RDWR, 0o600).unwrap();
    let node = entry.nodeid;
    guest.write(node, open.fh, 0, b"data").unwrap();
    guest.unlink(ROOT, c"gone").unwrap();
    assert!(!guest.host("gone").exists());
    assert_eq!(guest.lookup(ROOT, c"gone").unwrap_err(), Errno::NOENT);
    let attr = guest.getattr(node).unwrap();
    assert_eq!((attr.nlink, attr.size), (0, 4));
    assert_eq!(guest.read(node, open.fh, 0, 10).unwrap(), b"data");
    // Another one of that name is another file.
    let (other, _) = guest.create(ROOT, c"gone", libc::O_RDWR, 0o600).unwrap();
    assert_ne!(other.nodeid, node);
    assert_eq!(guest.getattr(node).unwrap().size, 4);
    // It can be opened once more (/proc/self/fd in the guest).
    let again = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, again.fh, 0, 10).unwrap(), b"data");
    guest.release(node, open.fh).unwrap();
    guest.release(node, again.fh).unwrap();
    guest.forget(node, 1);
    assert_eq!(guest.getattr(node).unwrap_err(), Errno::STALE);
}

#[test]
fn a_replaced_file_and_a_removed_directory_stay_usable() {
    let mut guest = Guest::new();
    fs::write(guest.host("target"), "old").unwrap();
    fs::write(guest.host("source"), "new").unwrap();
    let old = guest.find("target").unwrap().nodeid;
    guest.find("source").unwrap();
    guest
        .rename((ROOT, c"source"), (ROOT, c"target"), 0)
        .unwrap();
    assert_eq!(guest.getattr(old).unwrap().nlink, 0);
    let open = guest.open(old, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(old, open.fh, 0, 10).unwrap(), b"old");
    let directory = guest.mkdir(ROOT, c"cwd").unwrap().nodeid;
    guest.rmdir(ROOT, c"cwd").unwrap();
    assert_eq!(guest.getattr(directory).unwrap().nlink, 0);
    assert_eq!(guest.mkdir(directory, c"x").unwrap_err(), Errno::NOENT);
}

#[test]
fn hard_links_are_one_file() {
    let mut guest = Guest::new();
    let (entry, _) = guest.create(ROOT, c"one", libc::O_RDWR, 0o644).unwrap();
    let linked = guest.link(entry.nodeid, ROOT, c"two").unwrap();
    assert_eq!(linked.nodeid, entry.nodeid);
    assert_eq!((linked.attr.nlink, linked.attr.ino), (2, entry.attr.ino));
    guest.rename((ROOT, c"one"), (ROOT, c"two"), 0).unwrap();
    assert!(
        guest.host("one").exists(),
        "two names of one file: no change"
    );
    guest.unlink(ROOT, c"two").unwrap();
    assert_eq!(guest.getattr(entry.nodeid).unwrap().nlink, 1);
    guest.unlink(ROOT, c"one").unwrap();
    assert_eq!(guest.getattr(entry.nodeid).unwrap().nlink, 0);
    // A symbolic link can have several names as well.
    let link = guest.symlink(ROOT, c"l", c"/nowhere").unwrap();
    let second = guest.link(link.nodeid, ROOT, c"m").unwrap();
    assert_eq!(second.nodeid, link.nodeid);
    assert_eq!(
        fs::read_link(guest.host("m")).unwrap().to_str(),
        Some("/nowhere")
    );
}

#[test]
fn a_nameless_file_gets_a_name() {
    let mut guest = Guest::new();
    let input = abi::CreateIn {
        flags: (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned(),
        mode: 0o100_600,
        ..abi::CreateIn::default()
    };
    let reply = match guest.call(opcode::TMPFILE, ROOT, &[input.as_slice(), &b"/\0"[..]]) {
        Err(Errno::OPNOTSUPP) => return,
        reply => reply.unwrap(),
    };
    let (entry, open): (abi::EntryOut, abi::OpenOut) = (first(&reply), first(&reply[128..]));
    guest.write(entry.nodeid, open.fh, 0, b"tmp").unwrap();
    assert_eq!(guest.getattr(entry.nodeid).unwrap().nlink, 0);
    assert_eq!(fs::read_dir(guest.host("")).unwrap().count(), 0);
    let named = guest.link(entry.nodeid, ROOT, c"named").unwrap();
    assert_eq!(named.nodeid, entry.nodeid);
    assert_eq!(fs::read(guest.host("named")).unwrap(), b"tmp");
}

#[test]
fn attributes_are_set() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, c"f", libc::O_RDWR, 0o644).unwrap();
    let node = entry.nodeid;
    let attr = guest
        .setattr(
            node,
            &abi::SetattrIn {
                valid: fattr::MODE | fattr::SIZE | fattr::ATIME | fattr::MTIME,
                mode: libc::S_IFREG | 0o4755,
                size: 1 << 20,
                atime: 1,
                atimensec: 2,
                mtime: (-3i64).cast_unsigned(),
                mtimensec: 999_999_999,
                ..abi::SetattrIn::default()
            },
        )
        .unwrap();
    // Who is not privileged cannot keep set-user-ID over a change of size.
    let special = if is_privileged() { 0o4000 } else { 0 };
    assert_eq!(attr.mode, libc::S_IFREG | special | 0o755);
    assert_eq!(attr.size, 1 << 20);
    assert_eq!((attr.atime, attr.atimensec), (1, 2));
    assert_eq!(
        (attr.mtime.cast_signed(), attr.mtimensec),
        (-3, 999_999_999)
    );
    let shorter = abi::SetattrIn {
        valid: fattr::SIZE | fattr::FH | fattr::MTIME_NOW,
        fh: open.fh,
        size: 10,
        ..abi::SetattrIn::default()
    };
    let attr = guest.setattr(node, &shorter).unwrap();
    assert_eq!(attr.size, 10);
    assert!(attr.mtime > 1_000_000_000);
    assert_eq!(attr.atime, 1, "not touched");
    if is_privileged() {
        let owner = abi::SetattrIn {
            valid: fattr::UID | fattr::GID,
            uid: 1000,
            gid: 2000,
            ..abi::SetattrIn::default()
        };
        let attr = guest.setattr(node, &owner).unwrap();
        assert_eq!((attr.uid, attr.gid), (1000, 2000));
        assert_eq!(attr.mode, 0o100_755, "a new owner ends set-user-ID");
        let nobody = abi::SetattrIn {
            valid: fattr::UID,
            uid: u32::MAX,
            ..abi::SetattrIn::default()
        };
        assert_eq!(guest.setattr(node, &nobody).unwrap_err(), Errno::INVAL);
    }
    for (what, input) in [
        (
            "times",
            abi::SetattrIn {
                valid: fattr::ATIME,
                atimensec: 0x3fff_fffe,
                ..abi::SetattrIn::default()
            },
        ),
        (
            "size",
            abi::SetattrIn {
                valid: fattr::SIZE,
                size: u64::MAX,
                ..abi::SetattrIn::default()
            },
        ),
    ] {
        assert_eq!(
            guest.setattr(node, &input).unwrap_err(),
            Errno::INVAL,
            "{what}"
        );
    }
}

#[test]
fn new_files_belong_to_the_process_that_made_them() {
    if !is_privileged() {
        return;
    }
    let mut guest = Guest::new();
    // A group that the process may have among its supplementary ones; the guest's kernel has checked.
    fs::create_dir(guest.host("team")).unwrap();
    std::os::unix::fs::chown(guest.host("team"), Some(0), Some(50)).unwrap();
    fs::set_permissions(guest.host("team"), PermissionsExt::from_mode(0o2770)).unwrap();
    let team = guest.find("team").unwrap().nodeid;
    guest.owner = (1234, 5678);
    let (file, _) = guest
        .create(team, c"file", libc::O_RDWR, 0o100_666)
        .unwrap();
    assert_eq!(
        (file.attr.uid, file.attr.gid),
        (1234, 50),
        "set-group-ID directory"
    );
    assert_eq!(file.attr.mode, 0o100_644);
    let directory = guest.mkdir(ROOT, c"d").unwrap();
    assert_eq!((directory.attr.uid, directory.attr.gid), (1234, 5678));
    let link = guest.symlink(ROOT, c"l", c"x").unwrap();
    assert_eq!((link.attr.uid, link.attr.gid), (1234, 5678));
    let fifo = guest.mknod(ROOT, c"p", libc::S_IFIFO | 0o666, 0).unwrap();
    assert_eq!((fifo.attr.uid, fifo.attr.mode), (1234, 0o10_644));
    guest.owner = (0, 0);
    let (file, _) = guest
        .create(ROOT, c"root", libc::O_RDWR, 0o100_600)
        .unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (0, 0));
    guest.owner = (u32::MAX, 0);
    assert_eq!(guest.mkdir(ROOT, c"e").unwrap_err(), Errno::OVERFLOW);
}

#[test]
fn writers_without_privilege_drop_those_of_the_file() {
    if !is_privileged() {
        return;
    }
    let mut guest = Guest::new();
    let make = |guest: &Guest, name: &str| {
        fs::write(guest.host(name), "x").unwrap();
        fs::set_permissions(guest.host(name), PermissionsExt::from_mode(0o6755)).unwrap();
    };
    let mode = |guest: &Guest, name: &str| fs::metadata(guest.host(name)).unwrap().mode() & 0o7777;
    make(&guest, "write");
    let node = guest.find("write").unwrap().nodeid;
    let open = guest.open(node, libc::O_WRONLY).unwrap();
    guest.write(node, open.fh, 0, b"root").unwrap();
    assert_eq!(mode(&guest, "write"), 0o6755);
    let input = abi::WriteIn {
        fh: open.fh,
        size: 4,
        write_flags: abi::WRITE_KILL_SUIDGID,
        ..abi::WriteIn::default()
    };
    guest.write_with(node, &input, b"user").unwrap();
    assert_eq!(mode(&guest, "write"), 0o755);

    make(&guest, "truncate");
    let node = guest.find("truncate").unwrap().nodeid;
    let input = abi::SetattrIn {
        valid: fattr::SIZE | fattr::KILL_SUIDGID,
        ..abi::SetattrIn::default()
    };
    assert_eq!(guest.setattr(node, &input).unwrap().mode & 0o7777, 0o755);

    make(&guest, "open");
    let node = guest.find("open").unwrap().nodeid;
    let input = abi::OpenIn {
        flags: (libc::O_WRONLY | libc::O_TRUNC).cast_unsigned(),
        open_flags: abi::OPEN_KILL_SUIDGID,
    };
    guest.call(opcode::OPEN, node, &[input.as_slice()]).unwrap();
    assert_eq!(mode(&guest, "open"), 0o755);
}

#[test]
fn holes_stay_holes() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, c"sparse", libc::O_RDWR, 0o644).unwrap();
    let (node, fh) = (entry.nodeid, open.fh);
    guest.write(node, fh, 1 << 20, b"end").unwrap();
    let seek = |guest: &mut Guest, offset: u64, whence: i32| {
        let input = abi::LseekIn {
            fh,
            offset,
            whence: whence.cast_unsigned(),
            padding: 0,
        };
        let output: Result<abi::LseekOut, Errno> =
            guest.ask(opcode::LSEEK, node, &[input.as_slice()]);
        output.map(|output| output.offset)
    };
    assert_eq!(seek(&mut guest, 0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(&mut guest, 0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(
        seek(&mut guest, 1 << 20, libc::SEEK_HOLE),
        Ok((1 << 20) + 3)
    );
    assert_eq!(seek(&mut guest, 1 << 21, libc::SEEK_DATA), Err(Errno::NXIO));
    assert_eq!(seek(&mut guest, 0, libc::SEEK_SET), Err(Errno::INVAL));
    let punch = abi::FallocateIn {
        fh,
        offset: 1 << 20,
        length: 4096,
        mode: (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned(),
        padding: 0,
    };
    guest
        .call(opcode::FALLOCATE, node, &[punch.as_slice()])
        .unwrap();
    assert_eq!(guest.read(node, fh, 1 << 20, 10).unwrap(), [0; 3]);
    let odd = abi::FallocateIn {
        mode: 1 << 20,
        ..punch
    };
    assert_eq!(
        guest.call(opcode::FALLOCATE, node, &[odd.as_slice()]),
        Err(Errno::OPNOTSUPP)
    );
}

#[test]
fn ranges_are_copied_on_the_host() {
    let mut guest = Guest::new();
    fs::write(guest.host("from"), "0123456789").unwrap();
    let from = guest.find("from").unwrap().nodeid;
    let from_open = guest.open(from, libc::O_RDONLY).unwrap();
    let (to, to_open) = guest.create(ROOT, c"to", libc::O_RDWR, 0o644).unwrap();
    let input = abi::CopyFileRangeIn {
        fh_in: from_open.fh,
        off_in: 2,
        nodeid_out: to.nodeid,
        fh_out: to_open.fh,
        off_out: 1,
        len: u64::MAX,
        flags: 0,
    };
    let output: abi::WriteOut = guest
        .ask(opcode::COPY_FILE_RANGE, from, &[input.as_slice()])
        .unwrap();
    assert_eq!(output.size, 8);
    assert_eq!(fs::read(guest.host("to")).unwrap(), b"\x0023456789");
    let swapped = abi::CopyFileRangeIn {
        fh_in: to_open.fh,
        ..input
    };
    let refused = guest.call(opcode::COPY_FILE_RANGE, from, &[swapped.as_slice()]);
    assert_eq!(refused, Err(Errno::BADF), "a handle of another node");
}

#[test]
fn extended_attributes_pass() {
    let mut guest = Guest::new();
    let (entry, _) = guest.create(ROOT, c"f", libc::O_RDWR, 0o644).unwrap();
    let node = entry.nodeid;
    assert_eq!(guest.getxattr(node, c"user.a", 0), Err(Errno::NODATA));
    guest.setxattr(node, c"user.a", b"value").unwrap();
    guest.setxattr(node, c"user.b", b"").unwrap();
    let size: abi::GetxattrOut = first(&guest.getxattr(node, c"user.a", 0).unwrap());
    assert_eq!(size.size, 5);
    assert_eq!(guest.getxattr(node, c"user.a", 5).unwrap(), b"value");
    assert_eq!(guest.getxattr(node, c"user.a", 4), Err(Errno::RANGE));
    let list = guest.listxattr(node, 1000).unwrap();
    assert_eq!(list, b"user.a\0user.b\0");
    let size: abi::GetxattrOut = first(&guest.listxattr(node, 0).unwrap());
    assert_eq!(size.size, 14);
    assert_eq!(guest.listxattr(node, 13), Err(Errno::RANGE));
    guest
        .call(opcode::REMOVEXATTR, node, &[b"user.a\0"])
        .unwrap();
    assert_eq!(guest.getxattr(node, c"user.a", 5), Err(Errno::NODATA));
    // Of those that the host would take for its own another name is kept, which the guest does not get at.
    guest
        .setxattr(node, c"trusted.overlay.opaque", b"y")
        .unwrap();
    assert_eq!(
        guest.getxattr(node, c"trusted.overlay.opaque", 5).unwrap(),
        b"y"
    );
    let list = guest.listxattr(node, 1000).unwrap();
    assert_eq!(list, b"user.b\0trusted.overlay.opaque\0");
    let kept = c"user.sandbox.trusted.overlay.opaque";
    assert_eq!(guest.getxattr(node, kept, 5), Err(Errno::NODATA));
    assert_eq!(guest.setxattr(node, kept, b"n"), Err(Errno::PERM));
    let mut value = [0; 5];
    let length = rustix::fs::getxattr(guest.host("f"), kept, &mut value[..]);
    assert_eq!(length, Ok(1));
    guest
        .call(opcode::REMOVEXATTR, node, &[b"trusted.overlay.opaque\0"])
        .unwrap();
    assert_eq!(guest.listxattr(node, 1000).unwrap(), b"user.b\0");
    let capability = *b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    if guest
        .setxattr(node, c"security.capability", &capability)
        .is_ok()
    {
        assert_eq!(
            guest.getxattr(node, c"security.capability", 100).unwrap(),
            capability
        );
        // A write by someone without CAP_FSETID ends that.
        let open = guest.open(node, libc::O_WRONLY).unwrap();
        let input = abi::WriteIn {
            fh: open.fh,
            size: 1,
            write_flags: abi::WRITE_KILL_SUIDGID,
            ..abi::WriteIn::default()
        };
        guest.write_with(node, &input, b"x").unwrap();
        assert_eq!(
            guest.getxattr(node, c"security.capability", 100),
            Err(Errno::NODATA)
        );
    }
    // A default ACL instead of the umask.
    let directory = guest.mkdir(ROOT, c"acl").unwrap().nodeid;
    let acl = [
        &[2u8, 0, 0, 0][..],
        &[1, 0, 7, 0, 255, 255, 255, 255],
        &[4, 0, 7, 0, 255, 255, 255, 255],
        &[32, 0, 7, 0, 255, 255, 255, 255],
    ]
    .concat();
    if guest
        .setxattr(directory, c"system.posix_acl_default", &acl)
        .is_ok()
    {
        let (file, _) = guest
            .create(directory, c"f", libc::O_RDWR, 0o100_666)
            .unwrap();
        assert_eq!(file.attr.mode, 0o100_666);
    }
}

#[test]
fn directories_are_listed_in_pieces_while_they_shrink() {
    let mut guest = Guest::new();
    for number in 0..3000 {
        fs::write(
            guest.host(&format!("file-with-a-longer-name-{number:05}")),
            "",
        )
        .unwrap();
    }
    fs::create_dir(guest.host("sub")).unwrap();
    symlink("x", guest.host("link")).unwrap();
    for plus in [false, true] {
        let fh = guest.opendir(ROOT).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let list = guest.readdir((ROOT, fh), offset, 4096, plus).unwrap();
            let Some(last) = list.last() else { break };
            offset = last.offset;
            for entry in &list {
                let expected = match entry.name.as_str() {
                    "." | ".." | "sub" => libc::DT_DIR,
                    "link" => libc::DT_LNK,
                    _ => libc::DT_REG,
                };
                assert_eq!(entry.kind, u32::from(expected), "{}", entry.name);
                let dot = entry.name.starts_with('.');
                assert_eq!(entry.entry.nodeid != 0, plus && !dot, "{}", entry.name);
                if plus && !dot {
                    assert_eq!(entry.entry.attr.ino, entry.ino);
                    guest.forget(entry.entry.nodeid, 1);
                }
            }
            // What was listed is removed at once, as `rm -r` does; in the second round by the guest itself.
            for entry in list.iter().filter(|entry| entry.name.starts_with("file")) {
                let round = entry.name.as_bytes()[entry.name.len() - 1] % 2 == 0;
                if plus {
                    let name = std::ffi::CString::new(entry.name.clone()).unwrap();
                    guest.unlink(ROOT, &name).unwrap();
                } else if round {
                    fs::remove_file(guest.host(&entry.name)).unwrap();
                }
            }
            names.extend(list.into_iter().map(|entry| entry.name));
        }
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "each once");
        assert_eq!(count, if plus { 1504 } else { 3004 });
        // From the start again, and from somewhere.
        let list = guest.readdir((ROOT, fh), 0, 4096, false).unwrap();
        assert!(list.len() >= 3);
        let resumed = guest
            .readdir((ROOT, fh), list[0].offset, 4096, false)
            .unwrap();
        assert_eq!(resumed[0].name, list[1].name);
    }
    assert_eq!(fs::read_dir(guest.host("")).unwrap().count(), 2);
    assert_eq!(guest.server().usage().unwrap().0, 1, "all is forgotten");
}

#[test]
fn inode_numbers_agree_and_do_not_collide() {
    let mut guest = Guest::new();
    fs::create_dir(guest.host("d")).unwrap();
    fs::write(guest.host("d/f"), "").unwrap();
    let directory = guest.find("d").unwrap();
    let file = guest.find("d/f").unwrap();
    let fh = guest.opendir(directory.nodeid).unwrap();
    let list = guest
        .readdir((directory.nodeid, fh), 0, 4096, false)
        .unwrap();
    let ino = |name: &str| list.iter().find(|entry| entry.name == name).unwrap().ino;
    assert_eq!(ino("."), directory.attr.ino);
    assert_eq!(ino("f"), file.attr.ino);
    assert_eq!(
        file.attr.ino,
        fs::metadata(guest.host("d/f")).unwrap().ino()
    );
    let fh = guest.opendir(ROOT).unwrap();
    let list = guest.readdir((ROOT, fh), 0, 4096, false).unwrap();
    let root = guest.getattr(ROOT).unwrap().ino;
    let above = list.iter().find(|entry| entry.name == "..").unwrap().ino;
    assert_eq!(above, root, "what is above the share stays unknown");
}

#[test]
fn devices_are_shown_and_kept_inert() {
    let mut guest = Guest::new();
    let device = super::super::inert::encode_device(1, 3);
    let character = match guest.mknod(ROOT, c"null", libc::S_IFCHR | 0o666, device) {
        // No user attributes here.
        Err(Errno::PERM) => return,
        entry => entry.unwrap(),
    };
    assert_eq!(character.attr.mode, libc::S_IFCHR | 0o644);
    assert_eq!(character.attr.rdev, device);
    let on_host = fs::symlink_metadata(guest.host("null")).unwrap();
    assert!(on_host.is_file() && on_host.len() == 0);
    let block = guest
        .mknod(ROOT, c"sda", libc::S_IFBLK | 0o600, 0x800)
        .unwrap();
    assert_eq!(block.attr.mode, libc::S_IFBLK | 0o600);
    // Found again, also by another guest.
    guest.init().unwrap();
    let again = guest.find("null").unwrap();
    assert_eq!(
        (again.attr.mode, again.attr.rdev),
        (libc::S_IFCHR | 0o644, device)
    );
    let fh = guest.opendir(ROOT).unwrap();
    let list = guest.readdir((ROOT, fh), 0, 4096, true).unwrap();
    let listed = list.iter().find(|entry| entry.name == "sda").unwrap();
    assert_eq!(listed.kind, u32::from(libc::DT_BLK));
    // It has no data and no other nature.
    let node = again.nodeid;
    assert_eq!(guest.open(node, libc::O_RDWR).unwrap_err(), Errno::NXIO);
    let size = abi::SetattrIn {
        valid: fattr::SIZE,
        size: 10,
        ..abi::SetattrIn::default()
    };
    assert_eq!(guest.setattr(node, &size).unwrap_err(), Errno::NXIO);
    let mode = abi::SetattrIn {
        valid: fattr::MODE,
        mode: libc::S_IFREG | 0o4600,
        ..abi::SetattrIn::default()
    };
    let attr = guest.setattr(node, &mode).unwrap();
    assert_eq!(attr.mode, libc::S_IFCHR | 0o600);
    assert_eq!(guest.find("null").unwrap().attr.rdev, device);
    guest.link(node, ROOT, c"link").unwrap();
    guest.rename((ROOT, c"link"), (ROOT, c"moved"), 0).unwrap();
    assert_eq!(guest.find("moved").unwrap().attr.rdev, device);
    guest.unlink(ROOT, c"null").unwrap();
    // The attribute is not there for the guest, on no file.
    let marker = super::super::inert::ATTRIBUTE;
    assert_eq!(guest.getxattr(node, marker, 100), Err(Errno::NODATA));
    assert_eq!(guest.listxattr(node, 100).unwrap(), b"");
    assert_eq!(guest.setxattr(node, marker, b"c 5:5"), Err(Errno::PERM));
    let (file, _) = guest
        .create(ROOT, c"fake", libc::O_RDWR, 0o101_644)
        .unwrap();
    assert_eq!(
        guest.setxattr(file.nodeid, marker, b"c 1:1"),
        Err(Errno::PERM)
    );
    let name = marker.to_bytes_with_nul();
    let removed = guest.call(opcode::REMOVEXATTR, node, &[name]);
    assert_eq!(removed, Err(Errno::PERM));
    assert_eq!(
        guest.find("fake").unwrap().attr.mode & libc::S_IFMT,
        libc::S_IFREG
    );
}

#[test]
fn fifos_and_sockets_are_made_and_never_opened() {
    let mut guest = Guest::new();
    for (name, file_type) in [(c"fifo", libc::S_IFIFO), (c"socket", libc::S_IFSOCK)] {
        let node = guest
            .mknod(ROOT, name, file_type | 0o600, 0)
            .unwrap()
            .nodeid;
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR | libc::O_NONBLOCK,
        ] {
            assert_eq!(guest.open(node, flags).unwrap_err(), Errno::NXIO);
        }
        assert_eq!(guest.opendir(node).unwrap_err(), Errno::NOTDIR);
        let created = guest.create(ROOT, name, libc::O_WRONLY, 0o644);
        assert_eq!(created.unwrap_err(), Errno::NXIO);
        let again = guest.lookup(ROOT, name).unwrap();
        assert_eq!(again.attr.mode & libc::S_IFMT, file_type);
    }
    let plain = guest.mknod(ROOT, c"file", 0o644, 0).unwrap();
    assert_eq!(plain.attr.mode, libc::S_IFREG | 0o644);
    let odd = guest.mknod(ROOT, c"dir", libc::S_IFDIR | 0o755, 0);
    assert_eq!(odd.unwrap_err(), Errno::INVAL);
    let whiteout = guest.mknod(ROOT, c"wh", libc::S_IFCHR, 0).unwrap();
    assert_eq!(whiteout.attr.rdev, 0);
    let on_host = fs::symlink_metadata(guest.host("wh")).unwrap();
    assert_eq!(
        (on_host.mode() & libc::S_IFMT, on_host.rdev()),
        (libc::S_IFCHR, 0)
    );
}

#[test]
fn what_the_host_changes_is_seen() {
    let mut guest = Guest::new();
    fs::write(guest.host("f"), "one").unwrap();
    let entry = guest.find("f").unwrap();
    // Each opening looks it up, or the guest would read the new content up to the old size.
    assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (0, 0));
    assert!(entry.attr_valid <= 1);
    let node = entry.nodeid;
    let first = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(first.open_flags & abi::FOPEN_KEEP_CACHE, 0);
    let second = guest.open(node, libc::O_RDONLY).unwrap();
    assert_ne!(
        second.open_flags & abi::FOPEN_KEEP_CACHE,
        0,
        "nothing has changed"
    );
    let file = fs::OpenOptions::new()
        .write(true)
        .open(guest.host("f"))
        .unwrap();
    file.write_at(b"longer", 0).unwrap();
    assert_eq!(guest.getattr(node).unwrap().size, 6);
    let third = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(third.open_flags & abi::FOPEN_KEEP_CACHE, 0);
    // Replaced by another file: what is open stays, the node is stale, the name leads to the new one.
    guest.release(node, second.fh).unwrap();
    fs::write(guest.host("g"), "new").unwrap();
    guest.init().unwrap();
    let node = guest.find("f").unwrap().nodeid;
    fs::rename(guest.host("g"), guest.host("f")).unwrap();
    assert_eq!(guest.open(node, libc::O_RDONLY).unwrap_err(), Errno::STALE);
    assert_eq!(guest.getattr(node).unwrap_err(), Errno::STALE);
    let new = guest.find("f").unwrap().nodeid;
    assert_ne!(new, node);
    assert!(guest.open(new, libc::O_RDONLY).is_ok());
    // Negative entries are only cached where nobody else creates files.
    assert_eq!(guest.find("missing").unwrap_err(), Errno::NOENT);
}

#[test]
fn a_private_tree_is_cached_for_long() {
    let mut guest = Guest::with(super::super::test_support::generous(), &[c"rootfs"]);
    fs::create_dir_all(guest.host("rootfs/etc")).unwrap();
    fs::create_dir_all(guest.host("m0/rootfs")).unwrap();
    assert!(guest.find("rootfs/etc").unwrap().entry_valid >= 10);
    assert!(guest.find("m0/rootfs").unwrap().entry_valid <= 1);
    let missing = guest.find("rootfs/missing").unwrap();
    assert_eq!(missing.nodeid, 0);
    assert!(missing.entry_valid > 0);
    let node = guest.find("rootfs/etc").unwrap().nodeid;
    let input = abi::OpenIn::default();
    let output: abi::OpenOut = guest
        .ask(opcode::OPENDIR, node, &[input.as_slice()])
        .unwrap();
    assert_ne!(output.open_flags & abi::FOPEN_CACHE_DIR, 0);
}

#[test]
fn syncing_and_statfs_work() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, c"f", libc::O_RDWR, 0o644).unwrap();
    for fsync_flags in [0, abi::FSYNC_FDATASYNC] {
        let input = abi::FsyncIn {
            fh: open.fh,
            fsync_flags,
            padding: 0,
        };
        guest
            .call(opcode::FSYNC, entry.nodeid, &[input.as_slice()])
            .unwrap();
    }
    let fh = guest.opendir(ROOT).unwrap();
    let input = abi::FsyncIn {
        fh,
        ..abi::FsyncIn::default()
    };
    guest
        .call(opcode::FSYNCDIR, ROOT, &[input.as_slice()])
        .unwrap();
    guest.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    let output: abi::Kstatfs = guest.ask(opcode::STATFS, ROOT, &[]).unwrap();
    assert!(output.blocks > 0 && output.namelen == 255);
}

/// How many requests everyday things take, as the guest's kernel would send them with nothing cached.
#[test]
fn replies_carry_all_that_the_next_step_needs() {
    let mut guest = Guest::new();
    let before = guest.requests;
    let (entry, open) = guest.create(ROOT, c"f", libc::O_WRONLY, 0o644).unwrap();
    guest.write(entry.nodeid, open.fh, 0, b"x").unwrap();
    guest.release(entry.nodeid, open.fh).unwrap();
    assert_eq!(guest.requests - before, 3);
    // Nothing is asked at close, and there is no GETATTR after any of these.
    assert_eq!(guest.call(25, entry.nodeid, &[&[0; 24]]), Err(Errno::NOSYS));
    assert!(entry.attr_valid + u64::from(entry.attr_valid_nsec) > 0);
}
