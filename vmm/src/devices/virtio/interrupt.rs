// SPDX-License-Identifier: Apache-2.0
//! How a device tells its driver something: virtio 1.2, 4.2.3.4 (notifications from the device).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// InterruptStatus bit 0: a used buffer.
pub(crate) const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration has changed.
pub(crate) const CONFIG_CHANGE: u32 = 2;

/// The interrupt line of one device: status bits that the driver reads and acknowledges, and an event fd that
/// KVM turns into an interrupt. Cheap to clone; usable from any thread.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    pub(crate) fn new(line: Arc<EventFd>) -> Interrupt {
        Interrupt {
            status: Arc::new(AtomicU32::new(0)),
            line,
        }
    }

    /// A buffer was put on a used ring and the driver wants to know.
    pub(crate) fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The device configuration space or the device status has changed.
    pub(crate) fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// The InterruptStatus register.
    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// A write to the InterruptACK register.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn line(&self) -> &EventFd {
        &self.line
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // An event fd write only fails when the counter is at its maximum: then the interrupt is pending anyway.
        let _ = self.line.write(1);
    }
}
