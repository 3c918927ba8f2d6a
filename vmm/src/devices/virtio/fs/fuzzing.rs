// SPDX-License-Identifier: Apache-2.0
//! FUSE requests made of the fuzzer's bytes, to a share with a canary beside it.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::symlink;

use vm_memory::ByteValued;

use super::abi::{self, opcode};
use super::test_support::{Guest, ROOT, inventory};
use crate::fuzzing::Input;

/// The longest conversation.
const REQUESTS: usize = 64;

const NAMES: [&CStr; 16] = [
    c"file",
    c"dir",
    c"absolute",
    c"relative",
    c"tree",
    c"inner",
    c"new",
    c"fifo",
    c"",
    c".",
    c"..",
    c"a/b",
    c"/etc/passwd",
    c"../canary/secret",
    c"user.x",
    c"security.capability",
];

/// A conversation, on a thread of its own: serving changes its credentials and its umask.
pub(crate) fn requests(data: &[u8]) {
    std::thread::scope(|scope| {
        scope.spawn(|| converse(&mut Input::new(data)));
    });
}

/// Known nodes and handles are used, and others.
fn converse(input: &mut Input<'_>) {
    let mut guest = Guest::new();
    fs::create_dir(guest.host("dir")).unwrap();
    fs::write(guest.host("dir/inner"), "inner").unwrap();
    fs::write(guest.host("file"), "text").unwrap();
    let outside = guest.outside();
    symlink(outside.join("secret"), guest.host("absolute")).unwrap();
    symlink("../canary/secret", guest.host("relative")).unwrap();
    symlink(&outside, guest.host("tree")).unwrap();
    let canary = inventory(&outside);
    let mut nodes = vec![ROOT];
    let mut handles = Vec::new();
    for name in ["file", "dir", "absolute", "tree"] {
        nodes.push(guest.find(name).unwrap().nodeid);
    }
    for _ in 0..REQUESTS {
        if input.is_empty() {
            break;
        }
        let opcode = match input.u8() {
            // Whatever the number.
            255 => input.u32(),
            number => u32::from(number) % 56,
        };
        let node = known(input, &nodes);
        let body = body(opcode, input, &nodes, &handles);
        let room = match input.index(8) {
            0 => u32::from(input.u16()),
            _ => 0x2000,
        };
        let Ok(reply) = guest.call_with_room(opcode, node, &[&body], room) else {
            continue;
        };
        let number = |at: usize| {
            let bytes = reply.get(at..at + 8);
            bytes.map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap()))
        };
        match opcode {
            opcode::LOOKUP | opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
                nodes.extend(number(0));
            }
            opcode::CREATE | opcode::TMPFILE => {
                nodes.extend(number(0));
                handles.extend(number(size_of::<abi::EntryOut>()));
            }
            opcode::OPEN | opcode::OPENDIR => handles.extend(number(0)),
            _ => {}
        }
    }
    // It still serves, and has touched nothing outside.
    guest.init().unwrap();
    guest.getattr(ROOT).unwrap();
    assert_eq!(inventory(&outside), canary);
}

fn known(input: &mut Input<'_>, list: &[u64]) -> u64 {
    match input.u8() {
        255 => input.u64(),
        index if list.is_empty() => index.into(),
        index => list[usize::from(index) % list.len()],
    }
}

/// A body of the right shape with any content, or any bytes.
fn body(opcode: u32, input: &mut Input<'_>, nodes: &[u64], handles: &[u64]) -> Vec<u8> {
    let shape = input.u8();
    if shape == 255 {
        let length = usize::from(input.u8());
        return input.bytes(length).to_vec();
    }
    // Where a name follows, and how long what comes before it is.
    let (fixed, names) = match opcode {
        opcode::LOOKUP | opcode::UNLINK | opcode::RMDIR | opcode::REMOVEXATTR => (0, 1),
        opcode::SYMLINK => (0, 2),
        opcode::MKNOD | opcode::CREATE => (16, 1),
        opcode::MKDIR | opcode::LINK | opcode::GETXATTR => (8, 1),
        opcode::SETXATTR => (16, 1),
        opcode::RENAME => (8, 2),
        opcode::RENAME2 => (16, 2),
        opcode::TMPFILE => (16, 1),
        opcode::FORGET | opcode::OPEN | opcode::OPENDIR | opcode::LISTXATTR => (8, 0),
        opcode::GETATTR | opcode::FSYNC | opcode::FSYNCDIR => (16, 0),
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS | opcode::WRITE => (40, 0),
        opcode::RELEASE | opcode::RELEASEDIR | opcode::LSEEK => (24, 0),
        opcode::SETATTR => (88, 0),
        opcode::FALLOCATE => (32, 0),
        opcode::COPY_FILE_RANGE => (56, 0),
        opcode::INIT => (64, 0),
        opcode::BATCH_FORGET => (24, 0),
        opcode::INTERRUPT | opcode::SYNCFS => (8, 0),
        _ => (0, 0),
    };
    let mut body = vec![0; fixed];
    // Words of the fixed part, where the input has something to say.
    for _ in 0..input.index(5) {
        let word = 4 * input.index(fixed.max(4) / 4);
        let value = match input.index(4) {
            0 => input.u32(),
            _ => u32::from(input.u8()),
        };
        if let Some(place) = body.get_mut(word..word + 4) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
    }
    let fh = known(input, handles).to_ne_bytes();
    match opcode {
        opcode::READ
        | opcode::READDIR
        | opcode::READDIRPLUS
        | opcode::WRITE
        | opcode::RELEASE
        | opcode::RELEASEDIR
        | opcode::FSYNC
        | opcode::FSYNCDIR
        | opcode::LSEEK
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE => body[..8].copy_from_slice(&fh),
        opcode::RENAME | opcode::RENAME2 | opcode::LINK => {
            body[..8].copy_from_slice(&known(input, nodes).to_ne_bytes());
        }
        _ => {}
    }
    if opcode == opcode::BATCH_FORGET {
        body[..4].copy_from_slice(&1u32.to_ne_bytes());
        body[8..16].copy_from_slice(&known(input, nodes).to_ne_bytes());
    }
    if opcode == opcode::COPY_FILE_RANGE {
        body[16..24].copy_from_slice(&known(input, nodes).to_ne_bytes());
        body[24..32].copy_from_slice(&known(input, handles).to_ne_bytes());
    }
    for _ in 0..names {
        match input.u8() {
            255 => {
                let length = usize::from(input.u16() % 5000);
                body.extend(std::iter::repeat_n(b'x', length));
            }
            254 => {
                let length = input.index(32);
                body.extend_from_slice(input.bytes(length));
            }
            index => {
                let name = NAMES[usize::from(index) % NAMES.len()];
                body.extend_from_slice(name.to_bytes());
            }
        }
        body.push(0);
    }
    match opcode {
        opcode::WRITE => {
            let length = usize::from(input.u8());
            body.resize(40 + length, b'w');
            if shape != 254 {
                let size = u32::try_from(length).unwrap();
                body[16..20].copy_from_slice(&size.to_ne_bytes());
            }
        }
        opcode::SETXATTR => {
            let length = usize::from(input.u8());
            let value = vec![b'v'; length];
            body.extend_from_slice(&value);
            if shape != 254 {
                body[..4].copy_from_slice(&u32::try_from(length).unwrap().to_ne_bytes());
            }
        }
        opcode::INIT if shape != 254 => {
            let init = abi::InitIn {
                major: 7,
                minor: 36 + u32::from(input.u8() % 8),
                flags: u32::MAX,
                flags2: input.u32(),
                ..abi::InitIn::default()
            };
            body.copy_from_slice(init.as_slice());
        }
        _ => {}
    }
    body
}
