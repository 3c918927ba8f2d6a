// SPDX-License-Identifier: Apache-2.0
//! The device as its driver sees it: configuration space, threads, rings, reset.

use std::fs;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::super::Fs;
use super::super::abi::{self, opcode};
use super::super::test_support::{Scratch, first};
use crate::devices::virtio::test_support::{
    DriverQueue, activation, guest_memory, interrupt, readable, writable,
};
use crate::devices::virtio::{Interrupt, Kicks, VirtioDevice};
use crate::memory::GuestMemory;

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x11_0000;

struct Driver {
    device: Fs,
    memory: GuestMemory,
    queues: [DriverQueue; 2],
    interrupt: Interrupt,
    kicks: Vec<std::sync::Arc<vmm_sys_util::eventfd::EventFd>>,
    _share: Scratch,
}

impl Driver {
    fn new() -> Driver {
        let share = Scratch::new();
        let mut device = Fs::new("share", 1 << 26).unwrap();
        let root = fs::File::open(share.path()).unwrap();
        device.plug(root.into(), &["rootfs"]).unwrap();
        device.start().unwrap();
        let memory = guest_memory(0x20_0000);
        let high = DriverQueue::new(&memory, 0, 128).with_event_idx();
        let request = DriverQueue::new(&memory, high.end(), 1024).with_event_idx();
        Driver {
            device,
            memory,
            queues: [high, request],
            interrupt: interrupt(),
            kicks: Vec::new(),
            _share: share,
        }
    }

    fn activate(&mut self) {
        let queues = [&self.queues[0], &self.queues[1]];
        let activation = activation(&self.memory, &queues, &self.interrupt);
        self.kicks = activation
            .queues
            .iter()
            .map(|queue| queue.kick.clone())
            .collect();
        assert!(activation.queues.iter().all(|queue| queue.queue.ready()));
        self.device.activate(activation).unwrap();
    }

    /// Waits for the interrupt.
    fn wait(&self) {
        let mut poll = libc::pollfd {
            fd: self.interrupt.line().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, alive during the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 10_000) };
        assert_eq!(ready, 1, "no interrupt");
        self.interrupt.line().read().unwrap();
    }

    fn put(&mut self, queue: usize, opcode: u32, body: &[u8], slot: u64) {
        let header = abi::InHeader {
            len: u32::try_from(40 + body.len()).unwrap(),
            opcode,
            unique: slot,
            nodeid: 1,
            ..abi::InHeader::default()
        };
        let request = [header.as_slice(), body].concat();
        let (at, reply) = (REQUEST + slot * 256, REPLY + slot * 256);
        self.memory.write_slice(&request, GuestAddress(at)).unwrap();
        let length = u32::try_from(request.len()).unwrap();
        self.queues[queue].add(&[readable(at, length), writable(reply, 256)]);
    }

    fn reply(&self, slot: u64) -> abi::OutHeader {
        let mut bytes = [0; 16];
        self.memory
            .read_slice(&mut bytes, GuestAddress(REPLY + slot * 256))
            .unwrap();
        first(&bytes)
    }

    fn init(&mut self) {
        let input = abi::InitIn {
            major: 7,
            minor: 41,
            flags: u32::MAX,
            flags2: u32::MAX,
            ..abi::InitIn::default()
        };
        self.put(1, opcode::INIT, input.as_slice(), 0);
        self.kicks[1].write(1).unwrap();
        self.wait();
        assert_eq!(self.queues[1].used().map(|(_, length)| length), Some(80));
        assert_eq!(self.reply(0).error, 0);
    }
}

#[test]
fn configuration_space() {
    let device = Fs::new("share", 0).unwrap();
    assert_eq!(device.device_type(), 26);
    assert_eq!(device.kicks(), Kicks::Device);
    let mut data = [0xff; 44];
    data[40..].fill(0);
    device.read_config(0, &mut data);
    assert_eq!(&data[..6], b"share\0");
    assert_eq!(&data[36..], &[1, 0, 0, 0, 0, 0, 0, 0]);
    let mut word = [0; 4];
    device.read_config(36, &mut word);
    assert_eq!(word, [1, 0, 0, 0]);
    for offset in [40, 1000, u64::MAX] {
        let mut data = [0; 8];
        device.read_config(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
    assert!(Fs::new("", 0).is_err());
    assert!(Fs::new(&"x".repeat(37), 0).is_err());
}

#[test]
fn requests_are_served_in_batches_until_reset() {
    let mut driver = Driver::new();
    for _ in 0..3 {
        driver.activate();
        driver.init();
        // One kick, one interrupt wanted for the last of them.
        for slot in 1..200 {
            driver.put(1, opcode::GETATTR, &[0; 16], slot);
        }
        driver.queues[1].set_used_event(199);
        driver.kicks[1].write(1).unwrap();
        driver.wait();
        for slot in 1..200 {
            let (_, length) = driver.queues[1].used().unwrap();
            assert_eq!(length, 120);
            assert_eq!(driver.reply(slot).error, 0);
            assert_eq!(driver.reply(slot).unique, slot);
        }
        // The other queue.
        driver.put(0, opcode::FORGET, &[0; 8], 1);
        driver.kicks[0].write(1).unwrap();
        driver.wait();
        assert_eq!(driver.queues[0].used().map(|(_, length)| length), Some(0));
        let start = Instant::now();
        driver.device.reset();
        assert!(start.elapsed() < Duration::from_secs(2));
        for queue in &mut driver.queues {
            queue.reset();
        }
    }
}

#[test]
fn malformed_chains_are_returned_and_wild_rings_stop_the_device() {
    let mut driver = Driver::new();
    driver.activate();
    driver.init();
    // Outside of memory; no room for a reply; nothing readable.
    for buffers in [
        vec![readable(1 << 40, 64), writable(REPLY, 64)],
        vec![readable(REQUEST, 40)],
        vec![writable(REPLY, 64)],
        vec![writable(REPLY, 64), readable(REQUEST, 64)],
    ] {
        let expected = driver.queues[1].used_index();
        driver.queues[1].set_used_event(expected);
        driver.queues[1].add(&buffers);
        driver.kicks[1].write(1).unwrap();
        driver.wait();
        assert_eq!(driver.queues[1].used().map(|(_, length)| length), Some(0));
        assert!(!driver.interrupt.is_broken());
    }
    // Still in service.
    let expected = driver.queues[1].used_index();
    driver.queues[1].set_used_event(expected);
    driver.put(1, opcode::GETATTR, &[0; 16], 7);
    driver.kicks[1].write(1).unwrap();
    driver.wait();
    assert_eq!(driver.reply(7).error, 0);
    driver.queues[1].set_avail_index(30_000);
    driver.kicks[1].write(1).unwrap();
    driver.wait();
    assert!(driver.interrupt.is_broken());
    driver.device.reset();
}

/// All threads in turn, some of them at the same time, and no reply lost or doubled.
#[test]
fn slow_requests_are_handed_on() {
    let mut driver = Driver::new();
    driver.activate();
    driver.init();
    for round in 0..50 {
        for slot in 1..100 {
            // A handle that does not exist: as slow as any to the threads.
            let opcode = match slot % 3 {
                0 => opcode::FSYNC,
                1 => opcode::SYNCFS,
                _ => opcode::GETATTR,
            };
            let length = if opcode == opcode::SYNCFS { 8 } else { 16 };
            driver.put(1, opcode, &[0; 16][..length], slot);
            if round % 2 == 0 {
                driver.kicks[1].write(1).unwrap();
            }
        }
        driver.kicks[1].write(1).unwrap();
        let mut slots = std::collections::HashSet::new();
        while slots.len() < 99 {
            let before = driver.queues[1].used_index();
            driver.queues[1].set_used_event(before);
            while let Some((head, _)) = driver.queues[1].used() {
                assert!(slots.insert(head));
            }
            if slots.len() < 99 && driver.queues[1].used_index() == before {
                driver.wait();
            }
        }
        for slot in 1..100 {
            let error = if slot % 3 == 0 { -libc::EBADF } else { 0 };
            assert_eq!(driver.reply(slot).unique, slot);
            assert_eq!(driver.reply(slot).error, error);
        }
    }
    driver.device.reset();
}

/// A driver that never stops asking cannot keep the device from being reset.
#[test]
fn a_flood_does_not_delay_the_reset() {
    let mut driver = Driver::new();
    driver.activate();
    driver.init();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut device = std::mem::replace(&mut driver.device, Fs::new("other", 0).unwrap());
    let flood = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                while driver.queues[1].used().is_some() {}
                while driver.queues[1].free() >= 2 {
                    driver.put(1, opcode::GETATTR, &[0; 16], 1);
                }
                driver.kicks[1].write(1).unwrap();
            }
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    device.reset();
    assert!(start.elapsed() < Duration::from_secs(5));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    flood.join().unwrap();
}

#[test]
fn a_kick_before_the_threads_start_is_not_lost() {
    let mut driver = Driver::new();
    let input = abi::InitIn {
        major: 7,
        minor: 41,
        flags: u32::MAX,
        flags2: u32::MAX,
        ..abi::InitIn::default()
    };
    driver.put(1, opcode::INIT, input.as_slice(), 0);
    let queues = [&driver.queues[0], &driver.queues[1]];
    let activation = activation(&driver.memory, &queues, &driver.interrupt);
    activation.queues[1].kick.write(1).unwrap();
    driver.device.activate(activation).unwrap();
    driver.wait();
    assert_eq!(driver.reply(0).error, 0);
}
