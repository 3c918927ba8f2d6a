// SPDX-License-Identifier: Apache-2.0
//! What all virtio devices share: the device trait, what a device is given when the driver is ready,
//! and the error for a guest that breaks the rules.

pub(crate) mod balloon;
pub(crate) mod chain;
pub(crate) mod fs;
pub(crate) mod interrupt;
pub(crate) mod mmio;
pub(crate) mod net;
pub(crate) mod rng;
#[cfg(any(test, fuzzing))]
pub(crate) mod test_support;
pub(crate) mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
pub(crate) use interrupt::Interrupt;

/// The guest's driver broke the rules of the device (a malformed ring, an impossible request). The
/// transport marks the device NEEDS_RESET and logs one rate-limited line; nothing else happens.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestFault {
    #[error("virtqueue {queue}: {source}")]
    Queue {
        queue: usize,
        source: virtio_queue::Error,
    },
    #[error("virtqueue {queue}: a descriptor chain is malformed")]
    Chain { queue: usize },
}

/// The host could not start the device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActivateError {
    #[error("the device has no threads yet")]
    NotStarted,
}

/// A virtqueue that the driver has set up, and the event fd that is signalled when the driver kicks it.
#[derive(Debug)]
pub(crate) struct ActiveQueue {
    pub(crate) queue: Queue,
    /// Shared with KVM (ioeventfd); non-blocking.
    pub(crate) kick: Arc<EventFd>,
}

/// What a device owns from DRIVER_OK to reset.
#[derive(Debug)]
pub(crate) struct Activation {
    pub(crate) memory: GuestMemory,
    /// As many as `queue_sizes` has, in that order. A queue that the driver left disabled is there too,
    /// and not `ready()`.
    pub(crate) queues: Vec<ActiveQueue>,
    pub(crate) interrupt: Interrupt,
    /// What the driver has accepted.
    pub(crate) features: u64,
}

/// Who waits for the driver's kicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kicks {
    /// The event loop, which calls `process_queue`.
    EventLoop,
    /// A thread of the device.
    Device,
}

/// A virtio device behind the MMIO transport. The transport holds the acknowledged features, the status and
/// the interrupt bits, so that a device is only its own logic.
pub(crate) trait VirtioDevice: Send + std::fmt::Debug {
    /// virtio 1.2, section 5; 0 while the slot is unplugged and drivers are to leave it alone.
    fn device_type(&self) -> u32;

    /// Offered feature bits, without VIRTIO_F_VERSION_1 and VIRTIO_RING_F_EVENT_IDX handled by the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    fn kicks(&self) -> Kicks {
        Kicks::EventLoop
    }

    /// Fills `data` from the device configuration space; bytes beyond its end are left zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A write to the configuration space; most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready. Called once between resets, by the thread of a vCPU, which cannot open files or start
    /// threads (`crate::seccomp`).
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver kicked queue `index` (below the number of queues). Only for [`Kicks::EventLoop`].
    /// May be called although the device is not active: then there is nothing to do.
    fn process_queue(&mut self, index: usize) -> Result<(), GuestFault>;

    /// One further file descriptor that the event loop waits on for reading (an epoll instance for a device with many).
    /// Level-triggered; constant over the life of the device.
    fn event_source(&self) -> Option<RawFd> {
        None
    }

    /// The file descriptor of `event_source` is readable.
    fn process_event(&mut self) -> Result<(), GuestFault> {
        Ok(())
    }

    /// How far an active device is in its queues, in queue order, for a snapshot. None: it has not looked at them.
    fn queues(&self) -> Option<Vec<QueueState>> {
        None
    }

    /// Back to the state before `activate`: queues dropped, no device thread uses them. By the thread of a vCPU too.
    fn reset(&mut self);
}
