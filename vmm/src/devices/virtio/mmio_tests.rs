// SPDX-License-Identifier: Apache-2.0
//! The register file, driven as a driver and as an attacker would.

use vm_memory::GuestAddress;

use super::super::ActivateError;
use super::*;

#[derive(Debug, Default)]
struct Probe {
    activations: usize,
    resets: usize,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(offset..) {
            *byte = index.to_le_bytes()[0];
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.activations += 1;
        assert_eq!(activation.queues.len(), 2);
        Ok(())
    }
    fn process_queue(&mut self, index: usize) -> Result<(), GuestFault> {
        match self.activations > self.resets {
            true => Err(GuestFault::Chain { queue: index }),
            false => Ok(()),
        }
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
}

struct Driver {
    transport: MmioTransport,
    probe: Arc<Mutex<Probe>>,
}

impl Driver {
    fn new() -> Driver {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let probe = Arc::new(Mutex::new(Probe::default()));
        let transport = MmioTransport::new(probe.clone(), memory).unwrap();
        Driver { transport, probe }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self, low: u32, high: u32) -> u32 {
        self.set(register::STATUS, 1);
        self.set(register::STATUS, 3);
        self.set(register::DRIVER_FEATURES_SELECT, 0);
        self.set(register::DRIVER_FEATURES, low);
        self.set(register::DRIVER_FEATURES_SELECT, 1);
        self.set(register::DRIVER_FEATURES, high);
        self.set(register::STATUS, 11);
        self.get(register::STATUS)
    }

    fn set_up_queue(&self, queue: u32, base: u32) {
        self.set(register::QUEUE_SELECT, queue);
        self.set(register::QUEUE_SIZE, 16);
        self.set(register::QUEUE_DESC_LOW, base);
        self.set(register::QUEUE_DRIVER_LOW, base + 0x1000);
        self.set(register::QUEUE_DEVICE_LOW, base + 0x2000);
        self.set(register::QUEUE_READY, 1);
    }

    fn activate(&self) {
        assert_eq!(self.negotiate(1 << 5, 1), 11);
        self.set_up_queue(0, 0x1_0000);
        self.set_up_queue(1, 0x2_0000);
        self.set(register::STATUS, 15);
    }
}

#[test]
fn a_driver_brings_the_device_up_and_resets_it() {
    let driver = Driver::new();
    assert_eq!(driver.get(register::MAGIC_VALUE), MAGIC);
    assert_eq!(driver.get(register::DEVICE_ID), 42);
    driver.activate();
    assert_eq!(driver.get(register::STATUS), 15);
    driver.set(register::STATUS, 0);
    assert_eq!(driver.get(register::STATUS), 0);
    assert_eq!(driver.probe.lock().unwrap().resets, 1);
    driver.activate();
    assert_eq!(driver.probe.lock().unwrap().activations, 2);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let driver = Driver::new();
    assert_eq!(driver.negotiate(1 << 6, 1), 3);
    let driver = Driver::new();
    assert_eq!(driver.negotiate(1 << 5, 0), 3, "legacy");
}

#[test]
fn queue_registers_are_dead_after_driver_ok() {
    let driver = Driver::new();
    driver.activate();
    let before = format!("{:?}", lock(&driver.transport.state).queues);
    for offset in (register::QUEUE_SIZE..register::QUEUE_DEVICE_HIGH + 4).step_by(4) {
        if !(register::QUEUE_NOTIFY..=register::STATUS).contains(&offset) {
            driver.set(offset, 0x40);
        }
    }
    driver.set(register::DRIVER_FEATURES, 0);
    assert_eq!(
        format!("{:?}", lock(&driver.transport.state).queues),
        before
    );
}

#[test]
fn status_bits_come_in_order_and_do_not_go() {
    let driver = Driver::new();
    driver.set(register::STATUS, 4);
    driver.set(register::STATUS, 15);
    assert_eq!(driver.get(register::STATUS), 0);
    driver.activate();
    driver.set(register::STATUS, 1);
    assert_eq!(driver.get(register::STATUS), 15);
    driver.set(register::STATUS, 15);
    assert_eq!(driver.probe.lock().unwrap().activations, 1);
}

#[test]
fn a_queue_outside_memory_breaks_the_device_only() {
    let driver = Driver::new();
    driver.negotiate(1 << 5, 1);
    driver.set_up_queue(0, 0x10_0000 - 16);
    driver.set(register::STATUS, 15);
    assert_eq!(driver.probe.lock().unwrap().activations, 0);
    assert_ne!(driver.get(register::STATUS) & status::NEEDS_RESET, 0);
    assert_eq!(driver.get(register::INTERRUPT_STATUS), 2);
}

#[test]
fn a_fault_needs_a_reset() {
    let driver = Driver::new();
    driver.activate();
    driver.transport.process_queue(1);
    assert_ne!(driver.get(register::STATUS) & status::NEEDS_RESET, 0);
    driver.set(register::INTERRUPT_ACK, 2);
    assert_eq!(driver.get(register::INTERRUPT_STATUS), 0);
    driver.set(register::STATUS, 0);
    assert_eq!(driver.get(register::STATUS), 0);
}

#[test]
fn any_access_of_any_width_in_any_state_is_survived() {
    let driver = Driver::new();
    for state in 0..2 {
        for offset in 0..0x1000 {
            for width in 1..=8usize {
                driver.transport.read(offset, &mut [0; 8][..width]);
                if offset != register::STATUS || width != 4 {
                    driver.transport.write(offset, &[0xff; 8][..width]);
                }
            }
        }
        for value in 0..=255 {
            driver.set(register::STATUS, value);
        }
        driver.set(register::STATUS, 0);
        driver.activate();
        assert_eq!(driver.get(register::STATUS), 15, "round {state}");
    }
}

#[test]
fn a_ring_at_the_end_of_all_addresses_is_no_reason_to_fail() {
    let driver = Driver::new();
    driver.negotiate(1 << 5, 1);
    driver.set_up_queue(0, 0x1_0000);
    assert!(!driver.transport.has_chains(0));
    driver.set(register::QUEUE_READY, 0);
    driver.set(register::QUEUE_DRIVER_LOW, 0xffff_fffe);
    driver.set(register::QUEUE_DRIVER_HIGH, 0xffff_ffff);
    driver.set(register::QUEUE_READY, 1);
    assert!(driver.transport.has_chains(0));
    assert_eq!(driver.transport.save().unwrap_err(), NotNow);
}

/// The event loop may be at a queue when a vCPU resets the device.
#[test]
fn a_fault_is_not_told_after_the_reset() {
    let driver = Driver::new();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                driver.transport.process_queue(0);
            }
        });
        let told = (0..2000)
            .filter(|_| {
                driver.negotiate(1 << 5, 1);
                driver.set(register::STATUS, 15);
                driver.set(register::STATUS, 0);
                driver.get(register::STATUS) != 0
            })
            .count();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(told, 0);
    });
}
