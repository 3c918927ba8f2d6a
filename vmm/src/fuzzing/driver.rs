// SPDX-License-Identifier: Apache-2.0
//! A driver that does what the fuzzer says, lawful or not, with a device behind its registers.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::Input;
use crate::bus::BusDevice;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::mmio::{MmioTransport, TransportState};
use crate::memory::GuestMemory;

/// Two regions with a hole between them.
const LOW: u64 = 0x4_0000;
const HIGH_START: u64 = 0x8_0000;
const HIGH: u64 = 0x1_0000;
/// The rings of a queue, up to 1024 entries: descriptors, available ring, used ring.
const QUEUE_SPACE: u64 = 0x8000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Behind the rings of four queues.
pub(crate) const BUFFERS: u64 = 0x2_0000;

/// Register offsets of virtio 1.2, 4.2.2.
mod register {
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub(super) const QUEUE_SELECT: u64 = 0x030;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const CONFIG: u64 = 0x100;
}

/// ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK (virtio 1.2, 2.1).
const STATUS_STEPS: [u32; 4] = [1, 3, 11, 15];
const DRIVER_OK: u32 = 15;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

/// The longest program, so that one input takes milliseconds.
const STEPS: usize = 256;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
}

impl Buffer {
    pub(crate) fn readable(address: u64, length: u32) -> Buffer {
        let flags = 0;
        Buffer {
            address,
            length,
            flags,
        }
    }

    pub(crate) fn writable(address: u64, length: u32) -> Buffer {
        let flags = DESC_WRITE;
        Buffer {
            address,
            length,
            flags,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Driver {
    device: Arc<Mutex<dyn VirtioDevice>>,
    transport: MmioTransport,
    pub(crate) memory: GuestMemory,
    sizes: Vec<u16>,
    /// The next descriptor and available index of each queue.
    next: Vec<(u16, u16)>,
}

impl Driver {
    pub(crate) fn new(device: Arc<Mutex<dyn VirtioDevice>>) -> Driver {
        let memory = GuestMemory::from_ranges(&[
            (GuestAddress(0), LOW as usize),
            (GuestAddress(HIGH_START), HIGH as usize),
        ])
        .unwrap();
        let sizes = device.lock().unwrap().queue_sizes().to_vec();
        let transport = MmioTransport::new(device.clone(), memory.clone()).unwrap();
        Driver {
            device,
            transport,
            memory,
            next: vec![(0, 0); sizes.len()],
            sizes,
        }
    }

    /// Runs the program in `input`; afterwards the device has to be as good as new.
    pub(crate) fn run(
        &mut self,
        input: &mut Input<'_>,
        extra: impl FnMut(&mut Driver, &mut Input<'_>),
    ) {
        self.steps(input, extra);
        self.must_start_again();
    }

    /// The steps of the program in `input`. `extra` are those that only this device has.
    pub(crate) fn steps(
        &mut self,
        input: &mut Input<'_>,
        mut extra: impl FnMut(&mut Driver, &mut Input<'_>),
    ) {
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            match input.index(16) {
                0 => self.set(4 * u64::from(input.u8() & 0x3f), input.u32()),
                1 => {
                    let mut data = [0xff; 8];
                    let width = 1 + input.index(8);
                    self.transport
                        .read(u64::from(input.u16()), &mut data[..width]);
                }
                2 => {
                    let width = 1 + input.index(8);
                    let offset = register::CONFIG + u64::from(input.u8());
                    self.transport.write(offset, input.bytes(width));
                }
                3 => self.start(u64::from(input.u8()), input.u8()),
                4 => self.post_any(input),
                5 => {
                    let address = u64::from(input.u32() % 0x10_0000);
                    let length = usize::from(input.u8());
                    let _ = self
                        .memory
                        .write_slice(input.bytes(length), GuestAddress(address));
                }
                6 => self.kick(input.index(4)),
                7 => self.transport.process_event(),
                8 => self.set(register::STATUS, 0),
                9 => {
                    let queue = input.index(self.sizes.len());
                    let index = input.u16();
                    self.set_avail_index(queue, index);
                }
                10 => self.move_to_another_transport(),
                11 => {
                    // Writes of any width at any offset.
                    let offset = u64::from(input.u16());
                    let width = 1 + input.index(8);
                    self.transport.write(offset, input.bytes(width));
                }
                _ => extra(self, input),
            }
        }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
        if register == register::STATUS && value == 0 {
            self.next.fill((0, 0));
        }
    }

    fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Does what a good driver does after a reset, but takes only the features in `mask` (the low ones; the transport's
    /// own are taken), and sets up only the queues in `queues`.
    pub(crate) fn start(&mut self, mask: u64, queues: u8) {
        self.set(register::STATUS, 0);
        self.set(register::STATUS, STATUS_STEPS[0]);
        self.set(register::STATUS, STATUS_STEPS[1]);
        for select in 0..2 {
            self.set(register::DEVICE_FEATURES_SELECT, select);
            let mut features = self.get(register::DEVICE_FEATURES);
            if select == 0 {
                // EVENT_IDX is bit 29, here bit 7 of the mask.
                let event_idx = u32::try_from(mask >> 7 & 1).unwrap() << 29;
                features &= u32::try_from(mask & 0x7f).unwrap() | event_idx | 0x00ff_ff80;
            }
            self.set(register::DRIVER_FEATURES_SELECT, select);
            self.set(register::DRIVER_FEATURES, features);
        }
        self.set(register::STATUS, STATUS_STEPS[2]);
        for (number, size) in (0u8..).zip(self.sizes.clone()) {
            if queues >> number & 1 == 0 {
                continue;
            }
            let base = u32::try_from(QUEUE_SPACE).unwrap() * u32::from(number);
            self.set(register::QUEUE_SELECT, number.into());
            self.set(register::QUEUE_SIZE, size.into());
            self.set(register::QUEUE_DESC_LOW, base);
            self.set(
                register::QUEUE_DRIVER_LOW,
                base + u32::try_from(AVAIL).unwrap(),
            );
            self.set(
                register::QUEUE_DEVICE_LOW,
                base + u32::try_from(USED).unwrap(),
            );
            self.set(register::QUEUE_READY, 1);
            // The flags and the index of both rings.
            for ring in [AVAIL, USED] {
                let at = GuestAddress(QUEUE_SPACE * u64::from(number) + ring);
                self.memory.write_obj(0u32, at).unwrap();
            }
        }
        self.set(register::STATUS, STATUS_STEPS[3]);
    }

    /// Makes a chain available.
    pub(crate) fn post(&mut self, queue: usize, buffers: &[Buffer]) {
        let Some(size) = self.sizes.get(queue).copied() else {
            return;
        };
        let base = QUEUE_SPACE * queue as u64;
        let (first, avail) = self.next[queue];
        let mut at = first % size;
        for (position, buffer) in buffers.iter().enumerate() {
            let next = (at + 1) % size;
            let more = u16::from(position + 1 < buffers.len()) * DESC_NEXT;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&buffer.address.to_le_bytes());
            bytes[8..12].copy_from_slice(&buffer.length.to_le_bytes());
            bytes[12..14].copy_from_slice(&(buffer.flags | more).to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            let slot = GuestAddress(base + 16 * u64::from(at));
            self.memory.write_slice(&bytes, slot).unwrap();
            at = next;
        }
        let slot = base + AVAIL + 4 + 2 * u64::from(avail % size);
        self.memory
            .write_obj(first % size, GuestAddress(slot))
            .unwrap();
        self.next[queue] = (at, avail);
        self.set_avail_index(queue, avail.wrapping_add(1));
    }

    fn set_avail_index(&mut self, queue: usize, index: u16) {
        self.next[queue].1 = index;
        let at = GuestAddress(QUEUE_SPACE * queue as u64 + AVAIL + 2);
        self.memory.write_obj(index, at).unwrap();
    }

    /// A chain of any buffers: mostly in memory, mostly short.
    fn post_any(&mut self, input: &mut Input<'_>) {
        let queue = input.index(self.sizes.len());
        let count = 1 + input.index(6);
        let buffers: Vec<Buffer> = (0..count)
            .map(|_| {
                let address = match input.index(4) {
                    0 => input.u64(),
                    1 => HIGH_START + u64::from(input.u16()),
                    _ => BUFFERS + u64::from(input.u16()),
                };
                let length = match input.index(4) {
                    0 => input.u32(),
                    _ => u32::from(input.u16()),
                };
                // NEXT, WRITE, INDIRECT and a flag that does not exist.
                let flags = u16::from(input.u8() & 0xf);
                Buffer {
                    address,
                    length,
                    flags,
                }
            })
            .collect();
        self.post(queue, &buffers);
    }

    /// What the ioeventfd and then the event loop or the device's thread do.
    pub(crate) fn kick(&mut self, queue: usize) {
        use crate::devices::virtio::Kicks;
        let Some(kick) = self.transport.kicks().get(queue) else {
            return;
        };
        let _ = kick.write(1);
        let kicks = self.device.lock().unwrap().kicks();
        if kicks == Kicks::EventLoop {
            self.transport.process_queue(queue);
        }
    }

    /// What a snapshot would hold; none if there is none now.
    pub(crate) fn save(&self) -> Option<TransportState> {
        self.transport.save().ok()
    }

    /// Whether a saved state was taken over.
    pub(crate) fn restore(&mut self, saved: &TransportState) -> bool {
        self.device.lock().unwrap().reset();
        self.transport = MmioTransport::new(self.device.clone(), self.memory.clone()).unwrap();
        self.transport.restore(saved).is_ok()
    }

    /// A snapshot, restored with the same memory.
    fn move_to_another_transport(&mut self) {
        if let Some(saved) = self.save() {
            // Refused if the guest has set up queues that no device takes.
            self.restore(&saved);
        }
    }

    /// Whatever was done to the device, after a reset it is as new.
    pub(crate) fn must_start_again(&mut self) {
        self.start(0xff, 0xff);
        assert_eq!(self.get(register::STATUS), DRIVER_OK, "a reset cures");
        self.set(register::STATUS, 0);
        assert_eq!(self.get(register::STATUS), 0);
    }
}
