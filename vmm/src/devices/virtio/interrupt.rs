// SPDX-License-Identifier: Apache-2.0
//! How a device tells its driver something: virtio 1.2, 4.2.3.4 (notifications from the device).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// InterruptStatus bit 0: a used buffer.
pub(crate) const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration or the device status has changed.
pub(crate) const CONFIG_CHANGE: u32 = 2;

/// The interrupt line of one device: status bits that the driver reads and acknowledges, and an event fd that
/// KVM turns into an interrupt. Cheap to clone; usable from any thread.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    status: AtomicU32,
    broken: AtomicBool,
    line: EventFd,
}

impl Interrupt {
    /// `line` is non-blocking.
    pub(crate) fn new(line: EventFd) -> Interrupt {
        Interrupt {
            shared: Arc::new(Shared {
                status: AtomicU32::new(0),
                broken: AtomicBool::new(false),
                line,
            }),
        }
    }

    /// A buffer was put on a used ring and the driver wants to know.
    pub(crate) fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The device configuration space has changed.
    pub(crate) fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// The driver broke the rules: the device status shows DEVICE_NEEDS_RESET until it resets the device.
    pub(crate) fn needs_reset(&self) {
        self.shared.broken.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.shared.broken.load(Ordering::Acquire)
    }

    /// After a reset nothing is pending.
    pub(crate) fn clear(&self) {
        self.shared.status.store(0, Ordering::Release);
        self.shared.broken.store(false, Ordering::Release);
    }

    /// The InterruptStatus register of a restored device.
    pub(crate) fn restore(&self, status: u32) {
        self.shared.status.store(status, Ordering::Release);
    }

    /// The InterruptStatus register.
    pub(crate) fn status(&self) -> u32 {
        self.shared.status.load(Ordering::Acquire)
    }

    /// A write to the InterruptACK register.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.shared.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn line(&self) -> &EventFd {
        &self.shared.line
    }

    fn raise(&self, bit: u32) {
        self.shared.status.fetch_or(bit, Ordering::AcqRel);
        // An event fd write only fails when the counter is at its maximum: then the interrupt is pending anyway.
        let _ = self.shared.line.write(1);
    }
}
