// SPDX-License-Identifier: Apache-2.0
//! Which device answers at a guest physical address.

use std::sync::Arc;

/// A device behind memory-mapped registers. Called by vCPU threads; the device does its own locking.
pub(crate) trait BusDevice: Send + Sync + std::fmt::Debug {
    /// Fills `data`, 1 to 8 bytes, from the registers at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data`, 1 to 8 bytes, to the registers at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

#[derive(Debug)]
struct Entry {
    start: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// The address ranges of all devices, complete before the first vCPU runs.
#[derive(Debug, Default)]
pub(crate) struct Bus {
    entries: Vec<Entry>,
}

impl Bus {
    /// Puts `device` at `start`. The ranges of the layout do not overlap.
    pub(crate) fn add(&mut self, start: u64, size: u64, device: Arc<dyn BusDevice>) {
        let entry = Entry {
            start,
            size,
            device,
        };
        debug_assert!(self.find(start).is_none() && self.find(start + size - 1).is_none());
        self.entries.push(entry);
    }

    /// Reads of addresses where nothing is give ones, as on a real bus.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        self.entries.iter().find_map(|entry| {
            let offset = address.checked_sub(entry.start)?;
            (offset < entry.size).then_some((&*entry.device, offset))
        })
    }
}
