// SPDX-License-Identifier: Apache-2.0
//! The driver's side of virtio for device tests: a small guest memory, and a virtqueue as a driver sees it. It
//! follows the rules of virtio 1.2, 2.7 unless a test writes descriptors and ring entries itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Interrupt};
use crate::memory::GuestMemory;

/// Guest memory of one region from address 0.
pub(crate) fn guest_memory(size: usize) -> GuestMemory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

/// An interrupt whose event fd the test reads with [`interrupts`].
pub(crate) fn interrupt() -> Interrupt {
    Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())
}

/// How often the interrupt was raised since the last call.
pub(crate) fn interrupts(interrupt: &Interrupt) -> u64 {
    interrupt.line().read().unwrap_or(0)
}

/// What a device is given when the driver has set up `queues`.
pub(crate) fn activation(
    memory: &GuestMemory,
    queues: &[&DriverQueue],
    interrupt: &Interrupt,
) -> Activation {
    Activation {
        memory: memory.clone(),
        queues: queues.iter().map(|queue| queue.device_side()).collect(),
        interrupt: interrupt.clone(),
        features: 0,
    }
}

/// One buffer of a descriptor chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// The device reads it.
pub(crate) fn readable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: false,
    }
}

/// The device writes it.
pub(crate) fn writable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: true,
    }
}

/// A split virtqueue, driver's side.
#[derive(Debug)]
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    base: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    /// The descriptors of the chain that starts at this index.
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    next_used: u16,
}

impl DriverQueue {
    /// Lays out a queue of `size` (a power of two) at `base`, which is page-aligned; returns it without EVENT_IDX.
    pub(crate) fn new(memory: &GuestMemory, base: u64, size: u16) -> DriverQueue {
        let queue = DriverQueue {
            memory: memory.clone(),
            base,
            size,
            event_idx: false,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_avail: 0,
            next_used: 0,
        };
        memory
            .write_slice(
                &vec![0; usize::try_from(queue.end() - base).unwrap()],
                GuestAddress(base),
            )
            .unwrap();
        queue
    }

    pub(crate) fn with_event_idx(mut self) -> DriverQueue {
        self.event_idx = true;
        self
    }

    /// The first address after the rings, page-aligned.
    pub(crate) fn end(&self) -> u64 {
        (self.used_ring() + 6 + 8 * u64::from(self.size)).next_multiple_of(4096)
    }

    fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// What the transport hands to the device. A fresh view: both indexes start at 0.
    #[expect(clippy::cast_possible_truncation, reason = "halves of an address")]
    pub(crate) fn device_side(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.base);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.avail_ring());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used_ring());
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        ActiveQueue {
            queue,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    /// Forgets everything outstanding, as a driver does after a device reset.
    pub(crate) fn reset(&mut self) {
        *self = DriverQueue {
            event_idx: self.event_idx,
            ..DriverQueue::new(&self.memory, self.base, self.size)
        };
    }

    /// How many descriptors are free.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// The descriptor that `add` will take next, the head of its chain.
    pub(crate) fn next_free(&self) -> u16 {
        *self.free.last().expect("a free descriptor")
    }

    /// Makes a chain of `buffers` available and returns its head.
    #[expect(clippy::cast_possible_truncation, reason = "flags are 16 bits")]
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let indexes: Vec<u16> = buffers
            .iter()
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (position, buffer) in buffers.iter().enumerate() {
            let mut flags = 0;
            let mut next = 0;
            if buffer.writable {
                flags |= VRING_DESC_F_WRITE as u16;
            }
            if let Some(&index) = indexes.get(position + 1) {
                flags |= VRING_DESC_F_NEXT as u16;
                next = index;
            }
            self.write_descriptor(indexes[position], buffer.address, buffer.len, flags, next);
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = indexes;
        self.publish(head);
        head
    }

    /// Writes one descriptor as it is told.
    pub(crate) fn write_descriptor(
        &self,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(self.base + 16 * u64::from(index));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Puts `head` on the available ring, whatever it is.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.next_avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(self.next_avail);
    }

    /// Sets the index of the available ring, whatever was published.
    pub(crate) fn set_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        self.memory
            .store(
                index,
                GuestAddress(self.avail_ring() + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// With EVENT_IDX: interrupt when the used index passes `index`.
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// With EVENT_IDX: the available index at which the device wants a kick.
    pub(crate) fn avail_event(&self) -> u16 {
        let at = self.used_ring() + 4 + 8 * u64::from(self.size);
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// The index of the used ring.
    pub(crate) fn used_index(&self) -> u16 {
        let at = GuestAddress(self.used_ring() + 2);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }

    /// Takes the next chain from the used ring: its head and how many bytes the device wrote.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.next_used % self.size);
        let id: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(id).unwrap();
        self.free.append(&mut self.chains[usize::from(head)]);
        Some((head, len))
    }
}
