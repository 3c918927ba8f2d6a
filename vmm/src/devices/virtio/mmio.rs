// SPDX-License-Identifier: Apache-2.0
//! The virtio-mmio transport: register file and device status (virtio 1.2, 4.2 and 3.1).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ActiveQueue, GuestFault, Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::logging::warn_limited;
use crate::memory::GuestMemory;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"SBOX");

/// Register offsets (virtio 1.2, 4.2.2).
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub(super) const QUEUE_SELECT: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LENGTH_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Where the driver's kicks go: the offset that an ioeventfd watches.
pub(crate) const QUEUE_NOTIFY_OFFSET: u64 = register::QUEUE_NOTIFY;

/// Device status bits (virtio 1.2, 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
    pub(super) const FAILED: u32 = 128;
}

const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

/// One device behind its page of registers. Lock order: `state`, then the device.
#[derive(Debug)]
pub(crate) struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemory,
    interrupt: Interrupt,
    kicks: Vec<Arc<EventFd>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: u32,
    offered: u64,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<Queue>,
}

/// A virtqueue, for a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> SavedQueue {
        SavedQueue {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl From<&SavedQueue> for QueueState {
    fn from(saved: &SavedQueue) -> QueueState {
        QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx_enabled,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        }
    }
}

/// The registers of a transport and the queues of its device, for a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TransportState {
    status: u32,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    queues: Vec<SavedQueue>,
}

/// A saved transport does not fit this device, or the device cannot be saved now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotNow;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One half of a 64-bit value, as feature registers show it.
#[allow(clippy::cast_possible_truncation, reason = "takes a half")]
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

impl MmioTransport {
    pub(crate) fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemory,
    ) -> std::io::Result<MmioTransport> {
        let (offered, sizes) = {
            let device = lock(&device);
            let offered = device.features() | F_EVENT_IDX | F_VERSION_1;
            (offered, device.queue_sizes().to_vec())
        };
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(MmioTransport {
            device,
            memory,
            interrupt: Interrupt::new(line),
            kicks,
            state: Mutex::new(State::new(offered, &sizes)),
        })
    }

    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The event fds of the queues' kicks, in queue order.
    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    pub(crate) fn device(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        lock(&self.device)
    }

    /// The driver kicked a queue of a device that the event loop serves.
    pub(crate) fn process_queue(&self, index: usize) {
        // Draining first: a kick that comes while the queue is worked on is not lost.
        let _ = self.kicks[index].read();
        let mut device = self.device();
        if !self.interrupt.is_broken() {
            let result = device.process_queue(index);
            self.settle(&*device, result);
        }
    }

    /// The device's own event source is readable.
    pub(crate) fn process_event(&self) {
        let mut device = self.device();
        let result = device.process_event();
        self.settle(&*device, result);
    }

    /// Turns what the guest did wrong into NEEDS_RESET and one line of log. The device is still locked: a reset that a
    /// vCPU does at the same time comes before or after, and is not followed by a fault of what was before.
    fn settle(&self, device: &dyn VirtioDevice, result: Result<(), GuestFault>) {
        if let Err(fault) = result {
            let device = device.device_type();
            warn_limited!("virtio device {device} needs reset: {fault}");
            self.interrupt.needs_reset();
        }
    }

    /// Whether the driver has ever put a chain on queue `index`.
    pub(crate) fn has_chains(&self, index: usize) -> bool {
        let state = lock(&self.state);
        state.queues.get(index).is_some_and(|queue| {
            // virtio 1.2, 2.7.6: flags, then idx.
            let idx = GuestAddress(queue.avail_ring()).checked_add(2);
            let idx = idx.and_then(|idx| self.memory.read_obj::<u16>(idx).ok());
            queue.ready() && idx != Some(0)
        })
    }

    /// The state, while no vCPU runs and the event loop does nothing else.
    pub(crate) fn save(&self) -> Result<TransportState, NotNow> {
        let queues: Vec<SavedQueue> = match self.device().queues() {
            Some(queues) => queues.into_iter().map(SavedQueue::from).collect(),
            None => {
                if (0..self.kicks.len()).any(|index| self.has_chains(index)) {
                    return Err(NotNow);
                }
                let state = lock(&self.state);
                state
                    .queues
                    .iter()
                    .map(|queue| queue.state().into())
                    .collect()
            }
        };
        let state = lock(&self.state);
        if self.interrupt.is_broken() {
            return Err(NotNow);
        }
        Ok(TransportState {
            status: state.status,
            accepted: state.accepted,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            queue_select: state.queue_select,
            interrupt_status: self.interrupt.status(),
            queues,
        })
    }

    /// Takes a saved state over; activates the device if it was active, and lets it look at its queues.
    pub(crate) fn restore(&self, saved: &TransportState) -> Result<(), NotNow> {
        let mut state = lock(&self.state);
        if saved.queues.len() != self.kicks.len() || saved.accepted & !state.offered != 0 {
            return Err(NotNow);
        }
        state.accepted = saved.accepted;
        state.device_features_select = saved.device_features_select;
        state.driver_features_select = saved.driver_features_select;
        state.queue_select = saved.queue_select;
        state.status = saved.status;
        for (queue, saved) in state.queues.iter_mut().zip(&saved.queues) {
            *queue = Queue::try_from(QueueState::from(saved)).map_err(|_| NotNow)?;
        }
        self.interrupt.restore(saved.interrupt_status);
        if saved.status & status::DRIVER_OK != 0 {
            self.activate(&mut state);
            for kick in &self.kicks {
                // A new counter is not at its maximum.
                let _ = kick.write(1);
            }
        }
        match self.interrupt.is_broken() {
            true => Err(NotNow),
            false => Ok(()),
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => return MAGIC,
            register::VERSION => return VERSION,
            register::VENDOR_ID => return VENDOR,
            // Read and acknowledged at each interrupt: without the lock.
            register::INTERRUPT_STATUS => return self.interrupt.status(),
            register::DEVICE_ID => return self.device().device_type(),
            // There is no shared memory region: length and base are all ones.
            register::SHM_LENGTH_LOW..=register::SHM_BASE_HIGH => return u32::MAX,
            _ => {}
        }
        let state = lock(&self.state);
        match offset {
            register::DEVICE_FEATURES => half(state.offered, state.device_features_select),
            register::QUEUE_SIZE_MAX => state.queue().map_or(0, |queue| queue.max_size().into()),
            register::QUEUE_READY => state.queue().map_or(0, |queue| queue.ready().into()),
            register::STATUS if self.interrupt.is_broken() => state.status | status::NEEDS_RESET,
            register::STATUS => state.status,
            // Configuration fields are single words here, or constant: a driver never sees half of a change.
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            register::INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            register::QUEUE_NOTIFY => {
                // Only reached when the ioeventfd does not match, that is for a queue that does not exist.
                return;
            }
            _ => {}
        }
        let mut state = lock(&self.state);
        match offset {
            register::DEVICE_FEATURES_SELECT => state.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => state.driver_features_select = value,
            register::DRIVER_FEATURES => state.accept(value),
            register::QUEUE_SELECT => state.queue_select = value,
            register::STATUS => self.write_status(&mut state, value),
            _ => state.write_queue(offset, value),
        }
    }

    fn write_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            return self.reset(state);
        }
        let added = value & !state.status;
        // Bits are never taken back but by a reset, and come in the order of virtio 1.2, 3.1.1.
        if state.status & !value != 0 || state.status & status::FAILED != 0 {
            return;
        }
        let required = match added {
            status::ACKNOWLEDGE => 0,
            status::DRIVER => status::ACKNOWLEDGE,
            status::FEATURES_OK => status::DRIVER,
            status::DRIVER_OK => status::FEATURES_OK,
            status::FAILED => 0,
            // The driver writes what it read: NEEDS_RESET in it means nothing. More than one new bit: out of order.
            _ => return,
        };
        if state.status & required != required {
            return;
        }
        match added {
            // A driver that takes more than was offered, or not the modern interface, does not get FEATURES_OK.
            status::FEATURES_OK if !state.features_are_legal() => return,
            status::DRIVER_OK => self.activate(state),
            _ => {}
        }
        state.status |= added;
    }

    fn activate(&self, state: &mut State) {
        let event_idx = state.accepted & F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (queue, kick) in state.queues.iter_mut().zip(&self.kicks) {
            queue.set_event_idx(event_idx);
            if queue.ready() && !queue.is_valid(&self.memory) {
                warn_limited!("a virtqueue lies outside guest memory");
                return self.interrupt.needs_reset();
            }
            let Ok(queue) = Queue::try_from(queue.state()) else {
                return self.interrupt.needs_reset();
            };
            let kick = kick.clone();
            queues.push(ActiveQueue { queue, kick });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: state.accepted,
        };
        if let Err(error) = self.device().activate(activation) {
            log::error!("virtio device cannot start: {error}");
            self.interrupt.needs_reset();
        }
    }

    fn reset(&self, state: &mut State) {
        let mut device = self.device();
        if state.status & status::DRIVER_OK != 0 {
            device.reset();
        }
        let sizes: Vec<u16> = state.queues.iter().map(Queue::max_size).collect();
        *state = State::new(state.offered, &sizes);
        self.interrupt.clear();
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.device().read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.device().write_config(offset, data);
        } else if let (Ok(bytes), 0) = (data.try_into(), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

impl State {
    fn new(offered: u64, sizes: &[u16]) -> State {
        let queue = |size: &u16| {
            Queue::new(*size).expect("queue sizes are constants of the devices, powers of two")
        };
        State {
            status: 0,
            offered,
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues: sizes.iter().map(queue).collect(),
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    fn features_are_legal(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }

    /// Features are settled once FEATURES_OK is set.
    fn accept(&mut self, value: u32) {
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.accepted = (self.accepted & !0xffff_ffff) | value,
            1 => self.accepted = (self.accepted & 0xffff_ffff) | (value << 32),
            _ => {}
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK, and a ready queue is not changed any more.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let phase = self.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED);
        let select = self.queue_select as usize;
        let (status::FEATURES_OK, Some(queue)) = (phase, self.queues.get_mut(select)) else {
            return;
        };
        if queue.ready() && offset != register::QUEUE_READY {
            return;
        }
        match offset {
            register::QUEUE_SIZE => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY => queue.set_ready(value == 1),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
