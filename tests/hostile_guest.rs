// SPDX-License-Identifier: Apache-2.0
//! A guest that attacks the devices instead of booting (tests/hostile): the monitor lives until the guest ends itself, its
//! memory stays flat, files outside of the share stay as they are.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmm::{HostStream, Machine, MachineEvent, StopReason, VmConfig};

/// What the memory of a monitor may grow by while all is repeated.
const GROWTH: u64 = 8 << 20;

/// Emulated hosts need minutes for a million exits of a guest.
const DEADLINE: Timespec = Timespec {
    tv_sec: 600,
    tv_nsec: 0,
};

fn kernel() -> PathBuf {
    harness::top().join("target/hostile/kernel")
}

/// Everything below `path` that a request could change.
fn tree(path: &Path) -> BTreeMap<PathBuf, String> {
    let mut entries = BTreeMap::new();
    let mut todo = vec![path.to_owned()];
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = match metadata.is_file() {
            true => fs::read(&path).unwrap(),
            false => Vec::new(),
        };
        if metadata.is_dir() {
            let inside = fs::read_dir(&path).unwrap();
            todo.extend(inside.map(|entry| entry.unwrap().path()));
        }
        let line = format!(
            "{:o} {}:{} {} {} {content:?}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.nlink(),
            metadata.mtime_nsec(),
        );
        entries.insert(path, line);
    }
    entries
}

/// Resident memory of this process that is no file's.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A socket for each port that the guest may call; the ends of the host are kept and never served.
fn offer_streams(machine: &mut Machine) -> Vec<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    (0..8)
        .map(|port| {
            let (near, far) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            let stream = HostStream {
                input: Some(near.try_clone().unwrap()),
                output: Some(near),
            };
            machine.accept_stream(port, stream).unwrap();
            far
        })
        .collect()
}

/// Runs the guest to its end. Gives what it printed and, for each round of attacks, the memory of this process after it.
fn run_machine(share: &Path) -> (String, Vec<u64>) {
    let mut machine = Machine::new(VmConfig {
        kvm: File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap(),
        kernel: File::open(kernel()).unwrap(),
        initramfs: File::open(kernel()).unwrap(),
        vcpus: 2,
        memory_mib: 128,
        command_line: vec!["hostile=long".to_owned()],
    })
    .unwrap();
    machine
        .share_files(File::open(share).unwrap().into(), &[])
        .unwrap();
    let _far = offer_streams(&mut machine);
    let (output, console) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    machine.echo_console(File::from(console));
    let reader = std::thread::spawn(move || {
        let mut output = File::from(output);
        let (mut text, mut rounds) = (String::new(), Vec::new());
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut bytes) {
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
            if text.matches("\nround ").count() > rounds.len() {
                rounds.push(memory());
            }
        }
        (text, rounds)
    });
    machine.start().unwrap();
    machine.resume();
    let stopped = loop {
        let ready = poll(&mut [PollFd::new(&machine, PollFlags::IN)], Some(&DEADLINE)).unwrap();
        assert_ne!(ready, 0, "the guest does nothing");
        let events = machine.dispatch().unwrap();
        let stop = events.into_iter().find_map(|event| match event {
            MachineEvent::Stopped(reason) => Some(reason),
            _ => None,
        });
        if let Some(reason) = stop {
            break reason;
        }
    };
    drop(machine);
    let (text, rounds) = reader.join().unwrap();
    assert_eq!(stopped, StopReason::Reset, "{text}");
    (text, rounds)
}

/// The guest's own words, without the noise that it sends to the console.
fn words(text: &str) -> String {
    let lines = text.lines().filter(|line| {
        ["FAIL", "device", "files", "round", "survived"]
            .iter()
            .any(|word| line.starts_with(word))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_monitor_survives_a_hostile_guest() {
    let scratch = std::env::temp_dir().join(harness::runtime::new_id());
    let share = scratch.join("share");
    fs::create_dir_all(share.join("rootfs/etc")).unwrap();
    fs::create_dir_all(share.join("a")).unwrap();
    fs::write(share.join("file"), "text").unwrap();
    fs::create_dir(scratch.join("canary")).unwrap();
    fs::write(scratch.join("canary/file"), "canary").unwrap();
    symlink(scratch.join("canary"), share.join("link")).unwrap();
    symlink("../../canary", share.join("rootfs/link")).unwrap();
    let canary = tree(&scratch.join("canary"));
    let before = descriptors();

    let start = Instant::now();
    let (text, rounds) = run_machine(&share);
    let said = words(&text);
    println!("{said}\nin {:.0?}, memory {rounds:?}", start.elapsed());

    assert!(!said.contains("FAIL"), "{said}");
    assert!(said.contains("survived, failures 0"), "{said}");
    assert!(said.contains("files found"), "{said}");
    let [first, second] = rounds[..] else {
        panic!("two rounds: {rounds:?}");
    };
    assert!(second <= first + GROWTH, "memory grows: {rounds:?}");
    assert_eq!(tree(&scratch.join("canary")), canary);
    assert_eq!(descriptors(), before, "descriptors");
    fs::remove_dir_all(scratch).unwrap();
}
