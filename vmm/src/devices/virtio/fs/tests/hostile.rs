// SPDX-License-Identifier: Apache-2.0
//! Requests that no kernel sends.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use vm_memory::ByteValued;

use super::super::abi::{self, fattr, opcode};
use super::super::test_support::{Guest, ROOT, Scratch, inventory};

/// A share with something of everything; the node ids of a directory, a file and links out of the share.
struct Prey {
    guest: Guest,
    directory: u64,
    file: u64,
    links: Vec<u64>,
}

fn prey() -> Prey {
    let mut guest = Guest::new();
    fs::create_dir(guest.host("dir")).unwrap();
    fs::write(guest.host("file"), "text").unwrap();
    let canary = guest.outside();
    symlink(canary.join("secret"), guest.host("absolute")).unwrap();
    symlink("../canary/secret", guest.host("relative")).unwrap();
    symlink(&canary, guest.host("tree")).unwrap();
    let directory = guest.find("dir").unwrap().nodeid;
    let file = guest.find("file").unwrap().nodeid;
    let links = ["absolute", "relative", "tree"];
    let links = links.map(|name| guest.find(name).unwrap().nodeid);
    Prey {
        guest,
        directory,
        file,
        links: links.to_vec(),
    }
}

fn hostile_names() -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = [
        &b""[..],
        b".",
        b"..",
        b"/",
        b"a/b",
        b"/etc/passwd",
        b"../canary/secret",
        b"dir/../../canary",
        b"file/",
        b"./file",
        b"dir/new",
    ]
    .map(Vec::from)
    .to_vec();
    names.extend([256, 4096, 65_000].map(|length| vec![b'x'; length]));
    names
}

/// All requests with `name` where a name goes, and a good one where there is a second.
fn requests_with(name: &[u8], prey: &Prey) -> Vec<(u32, u64, Vec<u8>)> {
    let name = [name, b"\0"].concat();
    let with = |structure: &[u8]| [structure, &name].concat();
    let rename = abi::Rename2In {
        newdir: prey.directory,
        ..abi::Rename2In::default()
    };
    let mknod = |mode: u32| abi::MknodIn {
        mode,
        ..abi::MknodIn::default()
    };
    let create = abi::CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: 0o644,
        ..abi::CreateIn::default()
    };
    let link = abi::LinkIn {
        oldnodeid: prey.file,
    };
    let newdir = prey.directory.to_ne_bytes();
    vec![
        (opcode::LOOKUP, ROOT, name.clone()),
        (opcode::UNLINK, ROOT, name.clone()),
        (opcode::RMDIR, ROOT, name.clone()),
        (opcode::SYMLINK, ROOT, [&name[..], b"target\0"].concat()),
        (opcode::MKNOD, ROOT, with(mknod(libc::S_IFREG).as_slice())),
        (opcode::MKNOD, ROOT, with(mknod(libc::S_IFCHR).as_slice())),
        (opcode::MKNOD, ROOT, with(mknod(libc::S_IFIFO).as_slice())),
        (
            opcode::MKDIR,
            ROOT,
            with(abi::MkdirIn::default().as_slice()),
        ),
        (opcode::CREATE, ROOT, with(create.as_slice())),
        (opcode::LINK, ROOT, with(link.as_slice())),
        (
            opcode::RENAME,
            ROOT,
            [&newdir[..], &name, b"new\0"].concat(),
        ),
        (
            opcode::RENAME,
            ROOT,
            [&newdir[..], b"file\0", &name].concat(),
        ),
        (
            opcode::RENAME2,
            ROOT,
            [rename.as_slice(), &name, b"new\0"].concat(),
        ),
        (
            opcode::RENAME2,
            ROOT,
            [rename.as_slice(), b"file\0", &name].concat(),
        ),
    ]
}

#[test]
fn no_name_leads_out_of_its_directory() {
    let mut prey = prey();
    let canary = inventory(&prey.guest.outside());
    let share = inventory(&prey.guest.host(""));
    for name in hostile_names() {
        for (opcode, node, body) in requests_with(&name, &prey) {
            let result = prey.guest.call(opcode, node, &[&body]);
            assert!(
                matches!(result, Err(Errno::INVAL | Errno::NAMETOOLONG)),
                "{opcode}: {:?}: {result:?}",
                String::from_utf8_lossy(&name[..name.len().min(20)])
            );
        }
    }
    // A NUL inside: either part of the name is not what was meant, the rest is not taken for something else.
    for (opcode, node, body) in requests_with(b"file\0x", &prey) {
        let result = prey.guest.call(opcode, node, &[&body]);
        assert!(result.is_err(), "{opcode}");
    }
    assert_eq!(inventory(&prey.guest.outside()), canary);
    assert_eq!(inventory(&prey.guest.host("")), share);
}

#[test]
fn names_need_not_be_text() {
    let mut guest = Guest::new();
    for name in [
        &b"\xff\xfe"[..],
        b"-rf",
        b"a\nb",
        b"...",
        b" ",
        &[b'x'; 255],
    ] {
        let name = CString::new(name).unwrap();
        let (entry, _) = guest.create(ROOT, &name, libc::O_RDWR, 0o644).unwrap();
        assert_eq!(guest.lookup(ROOT, &name).unwrap().nodeid, entry.nodeid);
        guest.unlink(ROOT, &name).unwrap();
    }
}

#[test]
fn links_are_never_followed() {
    let mut prey = prey();
    let canary = inventory(&prey.guest.outside());
    for link in prey.links.clone() {
        let guest = &mut prey.guest;
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
            assert_eq!(guest.open(link, flags).unwrap_err(), Errno::LOOP);
        }
        assert_eq!(guest.opendir(link).unwrap_err(), Errno::NOTDIR);
        assert_eq!(guest.lookup(link, c"secret").unwrap_err(), Errno::NOTDIR);
        let created = guest.create(link, c"new", libc::O_RDWR, 0o644);
        assert_eq!(created.unwrap_err(), Errno::NOTDIR);
        assert_eq!(guest.mkdir(link, c"new").unwrap_err(), Errno::NOTDIR);
        assert_eq!(guest.unlink(link, c"secret"), Err(Errno::NOTDIR));
        let set = |valid| abi::SetattrIn {
            valid,
            mode: 0o777,
            uid: 7,
            gid: 7,
            mtime: 1,
            ..abi::SetattrIn::default()
        };
        assert_eq!(
            guest.setattr(link, &set(fattr::SIZE)).unwrap_err(),
            Errno::LOOP
        );
        assert_eq!(
            guest.setattr(link, &set(fattr::MODE)).unwrap_err(),
            Errno::OPNOTSUPP
        );
        // The link itself.
        let attr = guest.setattr(link, &set(fattr::MTIME)).unwrap();
        assert_eq!((attr.mtime, attr.mode & libc::S_IFMT), (1, libc::S_IFLNK));
        if let Ok(attr) = guest.setattr(link, &set(fattr::UID)) {
            assert_eq!(attr.uid, 7);
        }
        assert!(guest.setxattr(link, c"user.x", b"1").is_err());
        assert_eq!(guest.getxattr(link, c"user.x", 10), Err(Errno::NODATA));
        assert_eq!(guest.listxattr(link, 100).unwrap(), b"");
    }
    // O_CREAT on a name that is a link.
    for name in [c"absolute", c"relative", c"tree"] {
        for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC, libc::O_EXCL] {
            assert!(prey.guest.create(ROOT, name, flags, 0o644).is_err());
        }
        let renamed = prey.guest.rename((ROOT, c"file"), (ROOT, name), 0);
        assert_eq!(renamed, Ok(()), "replaces the link");
        prey.guest.rename((ROOT, name), (ROOT, c"file"), 0).unwrap();
    }
    assert_eq!(inventory(&prey.guest.outside()), canary);
}

#[test]
fn a_directory_that_becomes_a_link_is_not_followed() {
    let mut prey = prey();
    let canary = inventory(&prey.guest.outside());
    fs::create_dir(prey.guest.host("swap")).unwrap();
    fs::write(prey.guest.host("swap/secret"), "mine").unwrap();
    let directory = prey.guest.find("swap").unwrap().nodeid;
    let secret = prey.guest.lookup(directory, c"secret").unwrap().nodeid;
    prey.guest.init().unwrap();
    let directory = {
        // Known to the guest, not opened on the host yet.
        assert!(directory != 0 && secret != 0);
        prey.guest.find("swap").unwrap().nodeid
    };
    fs::rename(prey.guest.host("swap"), prey.guest.host("away")).unwrap();
    symlink(prey.guest.outside(), prey.guest.host("swap")).unwrap();
    assert_eq!(
        prey.guest.lookup(directory, c"secret").unwrap_err(),
        Errno::STALE
    );
    assert_eq!(
        prey.guest
            .create(directory, c"new", libc::O_RDWR, 0o644)
            .unwrap_err(),
        Errno::STALE
    );
    assert_eq!(inventory(&prey.guest.outside()), canary);
}

/// While the guest works on names, the host (or another guest of the same files) keeps exchanging a directory and a file
/// with links out of the share.
#[test]
fn names_that_are_swapped_for_links_lead_nowhere_else() {
    let mut guest = Guest::new();
    let outside = guest.outside();
    fs::create_dir(guest.host("swap")).unwrap();
    fs::write(guest.host("swap/secret"), "mine").unwrap();
    fs::write(guest.host("name"), "mine").unwrap();
    symlink(&outside, guest.host("swapped")).unwrap();
    symlink(outside.join("secret"), guest.host("link")).unwrap();
    let canary = inventory(&outside);
    let pairs = [("swap", "swapped"), ("name", "link")];
    let pairs = pairs.map(|(one, other)| (guest.host(one), guest.host(other)));
    let over = AtomicBool::new(false);
    let (mut directories, mut links) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (one, other) in &pairs {
                    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
                }
            }
        });
        let end = Over(&over);
        for turn in 0..2000 {
            if let Ok(entry) = guest.lookup(ROOT, c"swap") {
                match entry.attr.mode & libc::S_IFMT {
                    libc::S_IFDIR => directories += 1,
                    _ => links += 1,
                }
                attack(&mut guest, entry.nodeid, turn);
                guest.forget(entry.nodeid, 1);
            }
            let created = guest.create(ROOT, c"name", libc::O_RDWR | libc::O_TRUNC, 0o644);
            if let Ok((entry, open)) = created {
                let _ = guest.write(entry.nodeid, open.fh, 0, b"overwritten");
                guest.release(entry.nodeid, open.fh).unwrap();
                guest.forget(entry.nodeid, 1);
            }
            if let Ok(entry) = guest.lookup(ROOT, c"name") {
                change(&mut guest, entry.nodeid);
                guest.forget(entry.nodeid, 1);
            }
        }
        drop(end);
    });
    assert!(directories > 0 && links > 0, "{directories}, {links}");
    assert_eq!(inventory(&outside), canary);
}

/// Ends the thread of a test, however the test ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Everything that makes or changes names below `directory`, which may be anything by now.
fn attack(guest: &mut Guest, directory: u64, turn: usize) {
    if let Ok(secret) = guest.lookup(directory, c"secret") {
        change(guest, secret.nodeid);
        let _ = guest.link(secret.nodeid, ROOT, c"stolen");
        let _ = guest.unlink(ROOT, c"stolen");
        guest.forget(secret.nodeid, 1);
    }
    if let Ok((entry, open)) = guest.create(directory, c"new", libc::O_RDWR, 0o644) {
        guest.release(entry.nodeid, open.fh).unwrap();
        guest.forget(entry.nodeid, 1);
    }
    let made = match turn % 3 {
        0 => guest.mkdir(directory, c"made"),
        1 => guest.symlink(directory, c"made", c"/etc/passwd"),
        _ => guest.mknod(directory, c"made", libc::S_IFREG | 0o644, 0),
    };
    if let Ok(entry) = made {
        guest.forget(entry.nodeid, 1);
    }
    let _ = guest.rename((directory, c"secret"), (directory, c"moved"), 0);
    let _ = guest.rename((directory, c"moved"), (directory, c"secret"), 0);
    let _ = guest.unlink(directory, c"new");
    let _ = guest.unlink(directory, c"made");
    let _ = guest.rmdir(directory, c"made");
}

/// Everything that changes a file.
fn change(guest: &mut Guest, node: u64) {
    for flags in [libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
        if let Ok(open) = guest.open(node, flags) {
            let _ = guest.write(node, open.fh, 0, b"overwritten");
            guest.release(node, open.fh).unwrap();
        }
    }
    for valid in [fattr::SIZE, fattr::MODE, fattr::UID, fattr::MTIME] {
        let input = abi::SetattrIn {
            valid,
            mode: 0o7777,
            ..abi::SetattrIn::default()
        };
        let _ = guest.setattr(node, &input);
    }
    let _ = guest.setxattr(node, c"user.x", b"1");
}

#[test]
fn unknown_nodes_and_handles_are_refused() {
    let mut prey = prey();
    let file = prey.file;
    let open = prey.guest.open(file, libc::O_RDWR).unwrap();
    let other = prey
        .guest
        .create(ROOT, c"other", libc::O_RDWR, 0o644)
        .unwrap()
        .0
        .nodeid;
    let directory = prey.guest.opendir(ROOT).unwrap();
    for node in [0, 2000, u64::MAX, u64::MAX - 1, 1 << 32] {
        assert!(prey.guest.getattr(node).is_err());
        assert!(prey.guest.lookup(node, c"x").is_err());
        assert!(prey.guest.open(node, libc::O_RDONLY).is_err());
        assert!(prey.guest.read(node, open.fh, 0, 1).is_err());
        assert!(prey.guest.rename((ROOT, c"file"), (node, c"x"), 0).is_err());
        assert!(prey.guest.link(node, ROOT, c"x").is_err());
        prey.guest.forget(node, u64::MAX);
    }
    for handle in [0, u64::MAX, open.fh + 1000] {
        assert_eq!(prey.guest.read(file, handle, 0, 1), Err(Errno::BADF));
        assert_eq!(prey.guest.write(file, handle, 0, b"x"), Err(Errno::BADF));
        assert_eq!(prey.guest.release(file, handle), Err(Errno::BADF));
        let list = prey.guest.readdir((ROOT, handle), 0, 100, false);
        assert_eq!(list.unwrap_err(), Errno::BADF);
    }
    // Handles of other nodes, and of the other kind.
    assert_eq!(prey.guest.read(other, open.fh, 0, 1), Err(Errno::BADF));
    assert_eq!(prey.guest.release(other, open.fh), Err(Errno::BADF));
    assert_eq!(prey.guest.read(ROOT, directory, 0, 1), Err(Errno::BADF));
    let list = prey.guest.readdir((file, open.fh), 0, 100, false);
    assert_eq!(list.unwrap_err(), Errno::BADF);
    // Forgotten too often, then used; the handle is still good, and the name leads to a new node.
    prey.guest.forget(file, u64::MAX);
    assert_eq!(prey.guest.getattr(file).unwrap_err(), Errno::STALE);
    assert_eq!(prey.guest.read(file, open.fh, 0, 9).unwrap(), b"text");
    prey.guest.release(file, open.fh).unwrap();
    assert_eq!(prey.guest.release(file, open.fh), Err(Errno::BADF));
    assert_ne!(prey.guest.find("file").unwrap().nodeid, file);
    // The root stays.
    prey.guest.forget(ROOT, u64::MAX);
    prey.guest.getattr(ROOT).unwrap();
    // A parent that is forgotten before what is in it.
    let inner = prey.guest.mkdir(prey.directory, c"inner").unwrap().nodeid;
    prey.guest.forget(prey.directory, 1);
    prey.guest.getattr(inner).unwrap();
    prey.guest.forget(inner, 1);
    assert_eq!(
        prey.guest.getattr(prey.directory).unwrap_err(),
        Errno::STALE
    );
}

#[test]
fn lengths_are_checked() {
    let mut prey = prey();
    let file = prey.file;
    let open = prey.guest.open(file, libc::O_RDWR).unwrap();
    let guest = &mut prey.guest;
    let error = |reply: &[u8]| {
        let out: abi::OutHeader = super::super::test_support::first(reply);
        (reply.len(), -out.error)
    };
    let einval = (16, libc::EINVAL);
    for length in [0u32, 39, 40, 55, 57, u32::MAX] {
        let mut header = guest.header(opcode::GETATTR, ROOT, 16);
        header.len = length;
        let request = [header.as_slice(), &[0; 16]].concat();
        assert_eq!(error(&guest.raw(&request, 4096)), einval, "{length}");
    }
    // Bodies that are cut or too long, of every opcode there is.
    for opcode in 0..60 {
        for length in 0..130 {
            if matches!(
                opcode,
                opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
            ) {
                guest.call(opcode, ROOT, &[&vec![0xff; length]]).unwrap();
            } else if opcode != opcode::INIT && opcode != opcode::DESTROY {
                let _ = guest.call(opcode, u64::MAX, &[&vec![0xff; length]]);
                let _ = guest.call(opcode, u64::MAX, &[&vec![0; length]]);
            }
        }
    }
    // Without room for a reply nothing is done.
    let name: &[u8] = b"nothing\0";
    let body = [abi::MkdirIn::default().as_slice(), name].concat();
    for room in [0, 15, 16, 100, 143] {
        let header = guest.header(opcode::MKDIR, ROOT, body.len());
        let reply = guest.raw(&[header.as_slice(), &body].concat(), room);
        if room < 16 {
            assert!(reply.is_empty());
        } else {
            assert_eq!(error(&reply), einval);
        }
    }
    assert!(!guest.host("nothing").exists());
    // A header that is not whole.
    assert!(guest.raw(&[0; 39], 4096).is_empty());
    // WRITE: size and data do not agree.
    for (size, data) in [(5u32, 4usize), (3, 4), (u32::MAX, 4), (0, 1)] {
        let input = abi::WriteIn {
            fh: open.fh,
            size,
            ..abi::WriteIn::default()
        };
        let result = guest.write_with(file, &input, &vec![b'x'; data]);
        assert_eq!(result, Err(Errno::INVAL));
    }
    for offset in [u64::MAX, 1 << 63, i64::MAX.cast_unsigned()] {
        assert!(guest.write(file, open.fh, offset, b"x").is_err());
        assert!(
            guest.read(file, open.fh, offset, 1).is_err() || offset == i64::MAX.cast_unsigned()
        );
    }
    assert_eq!(fs::read(guest.host("file")).unwrap(), b"text");
    // Attributes that are too large, or whose size is a lie.
    let big = guest.setxattr(file, c"user.x", &vec![0; 65_537]);
    assert_eq!(big, Err(Errno::TOOBIG));
    let huge = guest.setxattr(file, c"user.x", &vec![0; 1 << 18]);
    assert_eq!(huge, Err(Errno::TOOBIG));
    let lie = abi::SetxattrIn {
        size: 100,
        ..abi::SetxattrIn::default()
    };
    let parts = [lie.as_slice(), b"user.x\0", b"value"];
    assert_eq!(
        guest.call(opcode::SETXATTR, file, &parts),
        Err(Errno::INVAL)
    );
    assert_eq!(
        guest.getxattr(file, c"user.x", u32::MAX),
        Err(Errno::NODATA)
    );
    // BATCH_FORGET with a count that is a lie.
    let batch = abi::BatchForgetIn {
        count: u32::MAX,
        dummy: 0,
    };
    guest
        .call(opcode::BATCH_FORGET, 0, &[batch.as_slice(), &[0; 16]])
        .unwrap();
    // Directory offsets of any kind.
    let fh = guest.opendir(ROOT).unwrap();
    for offset in [1, 77, 1 << 40, i64::MAX.cast_unsigned(), u64::MAX] {
        let _ = guest.readdir((ROOT, fh), offset, 4096, true);
    }
    assert_eq!(
        guest.readdir((ROOT, fh), 0, 20, false).unwrap_err(),
        Errno::INVAL
    );
    assert!(
        !guest
            .readdir((ROOT, fh), 0, 4096, false)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn open_flags_of_the_guest_do_not_reach_further() {
    let mut prey = prey();
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_DIRECT | libc::O_NONBLOCK | libc::O_ASYNC;
    let flags = flags | libc::O_NOFOLLOW | libc::O_DIRECTORY | libc::O_PATH | libc::O_TMPFILE;
    let open = prey.guest.open(prey.file, flags | libc::O_RDWR).unwrap();
    assert_eq!(prey.guest.read(prey.file, open.fh, 0, 9).unwrap(), b"text");
    assert_eq!(prey.guest.open(prey.file, 3).unwrap_err(), Errno::INVAL);
    let directory = prey.directory;
    assert_eq!(prey.guest.open(directory, 0).unwrap_err(), Errno::ISDIR);
    assert_eq!(
        prey.guest
            .create(ROOT, c"new", libc::O_TMPFILE | libc::O_PATH, 0o644)
            .map(drop),
        Ok(())
    );
    assert!(prey.guest.host("new").is_file());
}

#[test]
fn a_device_on_the_host_is_never_opened() {
    let mut guest = Guest::new();
    let path = guest.host("zero");
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 5),
    );
    if made.is_err() {
        return;
    }
    let entry = guest.find("zero").unwrap();
    assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFCHR);
    for flags in [libc::O_RDONLY, libc::O_RDWR | libc::O_NONBLOCK] {
        assert_eq!(guest.open(entry.nodeid, flags).unwrap_err(), Errno::NXIO);
    }
    assert_eq!(
        guest
            .create(ROOT, c"zero", libc::O_RDWR, 0o644)
            .unwrap_err(),
        Errno::NXIO
    );
    let size = abi::SetattrIn {
        valid: fattr::SIZE,
        ..abi::SetattrIn::default()
    };
    assert_eq!(guest.setattr(entry.nodeid, &size).unwrap_err(), Errno::NXIO);
}

#[test]
fn nothing_is_served_before_init_or_without_a_share() {
    let server = super::super::server::Server::new().unwrap();
    let mut guest = Guest::of(server, Scratch::new());
    assert_eq!(guest.getattr(ROOT).unwrap_err(), Errno::NODEV);
    assert_eq!(guest.init().unwrap_err(), Errno::NODEV);
    let root = fs::File::open("/").unwrap().into();
    let budget = super::super::test_support::generous();
    guest.server().plug(root, Vec::new(), budget).unwrap();
    assert_eq!(guest.getattr(ROOT).unwrap_err(), Errno::NOTCONN);
    let root = fs::File::open("/").unwrap().into();
    assert!(
        guest.server().plug(root, Vec::new(), budget).is_err(),
        "only once"
    );
    guest.init().unwrap();
    guest.getattr(ROOT).unwrap();
}

/// Bytes that are almost requests: whatever comes, nothing panics and nothing outside changes.
#[test]
fn noise_is_survived() {
    let mut prey = prey();
    let canary = inventory(&prey.guest.outside());
    // A generator is enough here: what matters is that a failure can be repeated.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u32::try_from(state % limit).unwrap()
    };
    for _ in 0..20_000 {
        let opcode = random(56);
        if opcode == opcode::DESTROY {
            continue;
        }
        let node = match random(4) {
            0 => ROOT,
            1 => prey.file,
            2 => prey.directory,
            _ => random(64).into(),
        };
        let mut body = vec![0u8; random(120) as usize];
        for byte in &mut body {
            // Mostly small numbers, so that handles and sizes are hit.
            *byte = match random(8) {
                0 => u8::try_from(random(256)).unwrap(),
                1 => u8::try_from(random(8)).unwrap(),
                2 => b'a',
                _ => 0,
            };
        }
        let _ = prey.guest.call_with_room(opcode, node, &[&body], 4096);
        if random(512) == 0 {
            prey.guest.init().unwrap();
        }
    }
    prey.guest.init().unwrap();
    prey.guest.getattr(ROOT).unwrap();
    assert_eq!(inventory(&prey.guest.outside()), canary);
}
