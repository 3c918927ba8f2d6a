// SPDX-License-Identifier: Apache-2.0
//! What a guest can make the host keep.

use std::fs;

use rustix::io::Errno;

use super::super::inodes::Limits;
use super::super::passthrough::Budget;
use super::super::test_support::{Guest, ROOT};

fn small() -> Budget {
    Budget {
        inodes: Limits {
            nodes: 1000,
            cached: 8,
            nameless: 4,
        },
        files: 5,
        directories: 3,
    }
}

#[test]
fn descriptors_are_given_up_and_opened_again() {
    let mut guest = Guest::with(small(), &[]);
    let mut nodes = Vec::new();
    for number in 0..40 {
        let path = format!("d{number}/deeper");
        fs::create_dir_all(guest.host(&path)).unwrap();
        fs::write(guest.host(&path).join("file"), format!("{number}")).unwrap();
        nodes.push(guest.find(&format!("{path}/file")).unwrap().nodeid);
    }
    for _ in 0..3 {
        for (number, node) in nodes.iter().enumerate() {
            let open = guest.open(*node, libc::O_RDONLY).unwrap();
            let data = guest.read(*node, open.fh, 0, 10).unwrap();
            assert_eq!(data, number.to_string().as_bytes());
            guest.release(*node, open.fh).unwrap();
            let (_, open) = guest.server().usage().unwrap();
            assert!(open <= 9, "{open} descriptors");
        }
    }
    // Moved by the guest, several levels above.
    let directory = guest.mkdir(ROOT, c"new").unwrap().nodeid;
    guest.rename((ROOT, c"d3"), (directory, c"x"), 0).unwrap();
    for node in &nodes {
        guest.getattr(*node).unwrap();
    }
    // Moved by the host: not where it was any more.
    fs::rename(guest.host("d5"), guest.host("elsewhere")).unwrap();
    for node in &nodes[6..] {
        guest
            .open(*node, libc::O_RDONLY)
            .map(|open| guest.release(*node, open.fh))
            .unwrap()
            .unwrap();
    }
    assert_eq!(guest.getattr(nodes[5]).unwrap_err(), Errno::STALE);
    assert_eq!(
        guest.find("elsewhere/deeper/file").unwrap().nodeid,
        nodes[5]
    );
    guest.getattr(nodes[5]).unwrap();
}

#[test]
fn looking_costs_no_descriptor() {
    let mut guest = Guest::new();
    for number in 0..500 {
        fs::write(guest.host(&format!("{number}")), "").unwrap();
    }
    let fh = guest.opendir(ROOT).unwrap();
    let mut offset = 0;
    loop {
        let list = guest.readdir((ROOT, fh), offset, 65_536, true).unwrap();
        let Some(last) = list.last() else { break };
        offset = last.offset;
    }
    assert_eq!(guest.server().usage().unwrap(), (501, 1));
}

#[test]
fn limits_are_errors_and_pass() {
    let mut guest = Guest::with(small(), &[]);
    for number in 0..1200 {
        fs::write(guest.host(&format!("{number}")), "").unwrap();
    }
    let mut found = Vec::new();
    let mut refused = 0;
    for number in 0..1200 {
        match guest.find(&format!("{number}")) {
            Ok(entry) => found.push(entry.nodeid),
            Err(error) => {
                assert_eq!(error, Errno::NFILE);
                refused += 1;
            }
        }
    }
    assert_eq!((found.len(), refused), (999, 201));
    for node in &found[10..] {
        guest.forget(*node, 1);
    }
    guest.find("1100").unwrap();

    let mut open = Vec::new();
    let error = loop {
        match guest.open(found[0], libc::O_RDONLY) {
            Ok(opened) => open.push(opened.fh),
            Err(error) => break error,
        }
    };
    assert_eq!((open.len(), error), (5, Errno::NFILE));
    assert_eq!(
        guest.create(ROOT, c"new", libc::O_RDWR, 0o644).unwrap_err(),
        Errno::NFILE
    );
    assert!(!guest.host("new").exists());
    guest.release(found[0], open[0]).unwrap();
    guest.create(ROOT, c"new", libc::O_RDWR, 0o644).unwrap();

    for _ in 0..3 {
        guest.opendir(ROOT).unwrap();
    }
    assert_eq!(guest.opendir(ROOT).unwrap_err(), Errno::NFILE);
    // A new connection starts with nothing.
    guest.init().unwrap();
    assert_eq!(guest.server().usage().unwrap(), (1, 1));
    guest.opendir(ROOT).unwrap();
}

#[test]
fn names_that_are_lost_cost_a_bounded_number() {
    let mut guest = Guest::with(small(), &[]);
    let mut nodes = Vec::new();
    for number in 0..20 {
        let name = std::ffi::CString::new(number.to_string()).unwrap();
        fs::write(guest.host(name.to_str().unwrap()), "x").unwrap();
        nodes.push(guest.lookup(ROOT, &name).unwrap().nodeid);
        guest.unlink(ROOT, &name).unwrap();
    }
    let alive = nodes
        .iter()
        .filter(|node| guest.getattr(**node).is_ok())
        .count();
    assert_eq!(alive, 4);
    for node in &nodes {
        guest.forget(*node, 1);
    }
    assert_eq!(guest.server().usage().unwrap(), (1, 1));
}

/// A number that the host gives to another file must not make that one look like the file the guest knows.
#[test]
fn recycled_inode_numbers_are_other_files() {
    use std::os::unix::fs::MetadataExt;
    let mut guest = Guest::new();
    let mut recycled = 0;
    for _ in 0..20 {
        fs::write(guest.host("a"), "old").unwrap();
        let ino = fs::metadata(guest.host("a")).unwrap().ino();
        let old = guest.find("a").unwrap().nodeid;
        fs::remove_file(guest.host("a")).unwrap();
        // The clock of file times is coarse: the new file must be younger.
        let before = fs::metadata(guest.host("")).unwrap().modified().unwrap();
        loop {
            fs::write(guest.host("tick"), "").unwrap();
            let now = fs::metadata(guest.host("tick"))
                .unwrap()
                .modified()
                .unwrap();
            fs::remove_file(guest.host("tick")).unwrap();
            if now > before {
                break;
            }
        }
        fs::write(guest.host("b"), "new").unwrap();
        if fs::metadata(guest.host("b")).unwrap().ino() == ino {
            recycled += 1;
            assert_eq!(guest.getattr(old).unwrap_err(), Errno::STALE);
            assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), Errno::STALE);
        }
        fs::remove_file(guest.host("b")).unwrap();
        guest.forget(old, 1);
    }
    eprintln!("{recycled} inode numbers were used again");
}
