// SPDX-License-Identifier: Apache-2.0
//! A datagram socket stands for the tap: it keeps the limits of its messages, too.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::super::test_support::{self, DriverQueue, readable, writable};
use super::*;

const MEMORY: usize = 0x40_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RECEIVED: u64 = 0x10_0000;
const SENT: u64 = 0x8_0000;

struct Guest {
    memory: GuestMemory,
    receive: DriverQueue,
    transmit: DriverQueue,
    interrupt: Interrupt,
    device: Net,
    wire: UnixDatagram,
}

impl Guest {
    fn new(features: u32) -> Guest {
        let memory = test_support::guest_memory(MEMORY);
        let receive = DriverQueue::new(&memory, 0x1000, 256);
        let transmit = DriverQueue::new(&memory, receive.end(), 256);
        let (wire, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        wire.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut device = Net::new();
        assert_eq!(device.device_type(), UNPLUGGED);
        device.plug(NetworkCard {
            tap: tap.into(),
            mac: MAC,
            mtu: 9000,
        });
        assert_eq!(device.device_type(), UNPLUGGED, "at boot");
        device.show();
        assert_eq!(device.device_type(), DEVICE_TYPE);
        let mut guest = Guest {
            interrupt: test_support::interrupt(),
            memory,
            receive,
            transmit,
            device,
            wire,
        };
        let queues = [&guest.receive, &guest.transmit];
        let mut activation = test_support::activation(&guest.memory, &queues, &guest.interrupt);
        activation.features = 1 << features;
        guest.device.activate(activation).unwrap();
        guest
    }

    fn mergeable() -> Guest {
        Guest::new(VIRTIO_NET_F_MRG_RXBUF)
    }

    fn add_buffers(&mut self, count: u64, size: u32) {
        for _ in 0..count {
            let slot = u64::from(self.receive.next_free());
            self.receive
                .add(&[writable(RECEIVED + slot * 0x2000, size)]);
        }
    }

    /// Takes one packet off the used ring as a driver does.
    fn packet(&mut self) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut buffers = 1;
        while buffers > 0 {
            let (head, length) = self.receive.used()?;
            let mut part = vec![0; length as usize];
            let at = GuestAddress(RECEIVED + u64::from(head) * 0x2000);
            self.memory.read_slice(&mut part, at).unwrap();
            if bytes.is_empty() {
                buffers = u16::from_le_bytes([part[NUM_BUFFERS], part[NUM_BUFFERS + 1]]);
                assert_ne!(buffers, 0);
            }
            bytes.extend(part);
            buffers -= 1;
        }
        Some(bytes)
    }

    fn send(&mut self, frame: &[u8]) {
        self.memory.write_slice(frame, GuestAddress(SENT)).unwrap();
        let split = frame.len().min(20);
        let mut buffers = vec![readable(SENT, split as u32)];
        if frame.len() > split {
            buffers.push(readable(SENT + split as u64, (frame.len() - split) as u32));
        }
        self.transmit.add(&buffers);
    }

    fn on_the_wire(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; MAX_FRAME];
        self.wire.set_nonblocking(true).unwrap();
        let length = self.wire.recv(&mut frame).ok()?;
        frame.truncate(length);
        Some(frame)
    }
}

/// A header and a frame from `source`, `length` bytes with both.
fn frame(length: usize, source: [u8; 6]) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    frame[..HEADER].fill(0);
    frame[SOURCE].copy_from_slice(&source);
    frame
}

#[test]
fn frames_arrive_whole_whatever_their_size() {
    let mut guest = Guest::mergeable();
    guest.add_buffers(200, 1536);
    // Large ones after each other, so that some come straight and some by a copy.
    let sizes = [60, 1536, 1537, 65562, 65562, 30000, 100, 9000, 65562, 42];
    for size in sizes {
        guest.wire.send(&frame(size, [9; 6])).unwrap();
        guest.device.process_event().unwrap();
        let packet = guest.packet().unwrap();
        let count = size.div_ceil(1536) as u16;
        assert_eq!(packet[NUM_BUFFERS..HEADER], count.to_le_bytes(), "{size}");
        assert!(packet[HEADER..] == frame(size, [9; 6])[HEADER..], "{size}");
        assert!(guest.packet().is_none());
        while guest.receive.free() > 56 {
            guest.add_buffers(1, 1536);
        }
    }
}

#[test]
fn a_frame_waits_for_buffers() {
    let mut guest = Guest::mergeable();
    guest.add_buffers(2, 1536);
    for size in [4000, 50] {
        guest.wire.send(&frame(size, [9; 6])).unwrap();
    }
    guest.device.process_event().unwrap();
    assert!(guest.packet().is_none());
    assert_eq!(test_support::interrupts(&guest.interrupt), 0);
    guest.add_buffers(2, 1536);
    guest.device.process_queue(RECEIVE).unwrap();
    assert_eq!(guest.packet().unwrap().len(), 4000);
    assert_eq!(guest.packet().unwrap().len(), 50);
    assert_eq!(test_support::interrupts(&guest.interrupt), 1);
}

#[test]
fn a_driver_without_mergeable_buffers_loses_what_does_not_fit() {
    let mut guest = Guest::new(VIRTIO_NET_F_MAC);
    guest.add_buffers(3, 1600);
    for size in [2000, 1600, 70] {
        guest.wire.send(&frame(size, [9; 6])).unwrap();
    }
    guest.device.process_event().unwrap();
    assert_eq!(guest.packet().unwrap().len(), 1600);
    assert_eq!(guest.packet().unwrap().len(), 70);
    assert!(guest.packet().is_none());
}

#[test]
fn only_frames_from_the_own_address_leave() {
    let mut guest = Guest::mergeable();
    let large = frame(60000, MAC);
    guest.send(&large);
    guest.device.process_queue(TRANSMIT).unwrap();
    assert!(guest.on_the_wire().unwrap() == large);
    guest.send(&frame(100, [2, 0, 0, 0, 0, 2]));
    guest.device.process_queue(TRANSMIT).unwrap();
    for (at, value) in [(0, 2), (1, 2), (1, 5)] {
        // Flags and kinds of segmentation that were not offered.
        let mut odd = frame(100, MAC);
        odd[at] = value;
        guest.send(&odd);
        guest.device.process_queue(TRANSMIT).unwrap();
    }
    assert!(guest.on_the_wire().is_none());
    assert_eq!(guest.transmit.used_index(), 5, "all buffers come back");
}

#[test]
fn a_full_tap_is_waited_for() {
    let mut guest = Guest::mergeable();
    let sent = frame(2000, MAC);
    let mut rounds = 0;
    while !guest.device.active.as_ref().unwrap().blocked {
        guest.send(&sent);
        guest.device.process_queue(TRANSMIT).unwrap();
        while guest.transmit.used().is_some() {}
        rounds += 1;
        assert!(rounds < 10_000);
    }
    let mut arrived = 0;
    while guest.on_the_wire().is_some() {
        arrived += 1;
    }
    guest.device.process_event().unwrap();
    while guest.on_the_wire().is_some() {
        arrived += 1;
    }
    assert_eq!(arrived, rounds);
}

#[test]
fn a_turn_is_bounded_and_goes_on() {
    let mut guest = Guest::mergeable();
    for _ in 0..MAX_BATCH + 1 {
        let head = guest.transmit.next_free();
        assert!(usize::from(head) < 256);
        guest.send(&frame(60, [0; 6]));
    }
    guest.device.process_queue(TRANSMIT).unwrap();
    assert_eq!(usize::from(guest.transmit.used_index()), MAX_BATCH);
    let kick = &guest.device.active.as_ref().unwrap().transmit.kick;
    assert_eq!(kick.read().unwrap(), 1);
    guest.device.process_queue(TRANSMIT).unwrap();
    assert_eq!(usize::from(guest.transmit.used_index()), MAX_BATCH + 1);
}

#[test]
fn interrupts_come_as_the_driver_wants_them() {
    let mut guest = Guest::mergeable();
    guest.receive = DriverQueue::new(&guest.memory, 0x1000, 256).with_event_idx();
    guest.device.reset();
    let queues = [&guest.receive, &guest.transmit];
    let mut activation = test_support::activation(&guest.memory, &queues, &guest.interrupt);
    activation.features = 1 << VIRTIO_NET_F_MRG_RXBUF;
    guest.device.activate(activation).unwrap();
    guest.add_buffers(100, 1536);
    for (event, size, expected) in [(0, 5000, 1), (10, 5000, 0), (10, 5000, 1), (10, 5000, 0)] {
        guest.receive.set_used_event(event);
        guest.wire.send(&frame(size, [9; 6])).unwrap();
        guest.device.process_event().unwrap();
        assert_eq!(test_support::interrupts(&guest.interrupt), expected);
    }
}

#[test]
fn malformed_chains_are_faults() {
    for bad in [
        readable(SENT, HEAD as u32 - 1),
        readable(MEMORY as u64 - 8, 100),
        writable(SENT, 100),
    ] {
        let mut guest = Guest::mergeable();
        guest.transmit.add(&[bad]);
        let fault = guest.device.process_queue(TRANSMIT).unwrap_err();
        assert!(matches!(fault, GuestFault::Chain { queue: TRANSMIT }));
    }
    for bad in [
        writable(RECEIVED, HEADER as u32 - 1),
        readable(RECEIVED, 2000),
        writable(MEMORY as u64 - 8, 2000),
    ] {
        let mut guest = Guest::mergeable();
        guest.receive.add(&[bad]);
        guest.wire.send(&frame(100, [9; 6])).unwrap();
        let fault = guest.device.process_event().unwrap_err();
        assert!(matches!(fault, GuestFault::Chain { queue: RECEIVE }));
    }
}

#[test]
fn the_configuration_is_that_of_the_card() {
    let guest = Guest::mergeable();
    let mut bytes = [0xff; 14];
    bytes.fill(0);
    guest.device.read_config(0, &mut bytes);
    assert_eq!(bytes[..6], MAC);
    assert_eq!(bytes[10..], [0x28, 0x23, 0, 0]);
    let mut mtu = [0; 2];
    guest.device.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 9000);
    guest.device.read_config(u64::MAX, &mut [0; 8]);
}
