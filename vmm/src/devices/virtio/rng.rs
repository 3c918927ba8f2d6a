// SPDX-License-Identifier: Apache-2.0
//! The entropy device: virtio 1.2, 5.4. The guest's buffers are filled by the host kernel.

use std::io;

use virtio_queue::{QueueOwnedT, QueueState, QueueT};

use super::chain::{self, Writer};
use super::{ActivateError, Activation, ActiveQueue, GuestFault, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

/// virtio 1.2, 5.4.1.
const DEVICE_TYPE: u32 = 4;

/// The one virtqueue, requestq. Linux keeps a single buffer in it.
const REQUEST: usize = 0;
const QUEUE_SIZES: [u16; 1] = [8];

/// How much of a longer buffer is filled: the driver is told, and comes back if it wants more.
const MAX_REQUEST: usize = 64 * 1024;

/// How much is filled on one kick. What is left in the queue then waits for the next.
const MAX_BATCH: usize = 256 * 1024;

#[derive(Debug, Default)]
pub(crate) struct Rng {
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    queue: ActiveQueue,
    interrupt: Interrupt,
}

impl Rng {
    pub(crate) fn new() -> Rng {
        Rng::default()
    }
}

impl Active {
    fn process(&mut self) -> Result<(), GuestFault> {
        let queue = &mut self.queue.queue;
        if !queue.ready() {
            return Ok(());
        }
        let fault = |source| GuestFault::Queue {
            queue: REQUEST,
            source,
        };
        let mut filled = 0;
        let mut used = false;
        while filled < MAX_BATCH {
            let Some(chain) = chain::pop(REQUEST, queue, &self.memory)? else {
                match queue.enable_notification(&self.memory).map_err(fault)? {
                    true => continue,
                    false => break,
                }
            };
            let head = chain.head_index();
            let (_, writer) = chain::split(REQUEST, chain, &self.memory)?;
            if writer.available() == 0 {
                return Err(GuestFault::Chain { queue: REQUEST });
            }
            let len = match fill(&writer) {
                Ok(len) => len,
                Err(error) => {
                    // The chain goes back: its data would be taken for random.
                    log::warn!("entropy: getrandom: {error}");
                    queue.go_to_previous_position();
                    break;
                }
            };
            filled += len;
            // Cannot be truncated: at most MAX_REQUEST.
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            queue.add_used(&self.memory, head, len).map_err(fault)?;
            used = true;
        }
        if filled >= MAX_BATCH {
            // The driver may not kick again for what it has queued already, so the device does it.
            if self.queue.kick.write(1).is_err() {
                log::warn!("entropy: the queue cannot be looked at again");
            }
        }
        if used && queue.needs_notification(&self.memory).map_err(fault)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }
}

/// Fills the front of a buffer; returns how much.
fn fill(writer: &Writer<'_>) -> io::Result<usize> {
    let mut filled = 0;
    for iovec in writer.iovecs(MAX_REQUEST).iter() {
        let mut done = 0;
        while done < iovec.iov_len {
            // SAFETY: the vector lies in guest memory, mapped as long as `writer` borrows it and only ever accessed
            // as raw bytes; `done` is less than its length, so pointer and length stay inside.
            let returned = unsafe {
                let at = iovec.iov_base.cast::<u8>().add(done);
                libc::getrandom(at.cast(), iovec.iov_len - done, 0)
            };
            match usize::try_from(returned) {
                Ok(count) => done += count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        filled += done;
    }
    Ok(filled)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// There is no configuration space.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        self.active = queues.next().map(|queue| Active {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn process_queue(&mut self, index: usize) -> Result<(), GuestFault> {
        match &mut self.active {
            Some(active) if index == REQUEST => active.process(),
            _ => Ok(()),
        }
    }

    fn queues(&self) -> Option<Vec<QueueState>> {
        let active = self.active.as_ref()?;
        Some(vec![active.queue.queue.state()])
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small constants")]
mod tests {
    use super::super::test_support::{self, Buffer, DriverQueue, readable, writable};
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    const MEMORY: u64 = 0x10_0000;
    const BUFFER: u64 = 0x4000;

    struct Guest {
        memory: GuestMemory,
        queue: DriverQueue,
        interrupt: Interrupt,
        device: Rng,
    }

    impl Guest {
        fn new() -> Guest {
            let memory = test_support::guest_memory(MEMORY as usize);
            let mut guest = Guest {
                queue: DriverQueue::new(&memory, 0x1000, 8),
                interrupt: test_support::interrupt(),
                device: Rng::new(),
                memory,
            };
            guest.activate();
            guest
        }

        fn activate(&mut self) {
            let queues = [&self.queue];
            let activation = test_support::activation(&self.memory, &queues, &self.interrupt);
            self.device.activate(activation).unwrap();
        }

        fn kick(&mut self) -> Result<(), GuestFault> {
            self.device.process_queue(REQUEST)
        }

        fn bytes(&self, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.memory
                .read_slice(&mut bytes, GuestAddress(BUFFER))
                .unwrap();
            bytes
        }
    }

    #[test]
    fn fills_buffers_with_different_bytes() {
        let mut guest = Guest::new();
        guest.queue.add(&[
            writable(BUFFER, 5),
            writable(BUFFER + 5, 1),
            writable(BUFFER + 6, 58),
        ]);
        guest.queue.add(&[writable(BUFFER + 64, 64)]);
        guest.kick().unwrap();
        assert_eq!(guest.queue.used().unwrap().1, 64);
        assert_eq!(guest.queue.used().unwrap().1, 64);
        assert_eq!(test_support::interrupts(&guest.interrupt), 1);
        let bytes = guest.bytes(192);
        assert_ne!(bytes[..64], bytes[64..128]);
        assert!(bytes.chunks(32).take(4).all(|part| part != [0; 32]));
        assert_eq!(bytes[128..], [0; 64]);
    }

    #[test]
    fn long_requests_are_answered_in_part() {
        let mut guest = Guest::new();
        for _ in 0..8 {
            guest.queue.add(&[writable(BUFFER, 0x8_0000)]);
        }
        guest.kick().unwrap();
        for _ in 0..4 {
            assert_eq!(guest.queue.used().unwrap().1, 64 * 1024);
        }
        assert!(guest.queue.used().is_none());
        assert_eq!(guest.bytes(0x1_0100)[0x1_0000..], [0; 0x100]);
        // The device comes back for the rest.
        assert_eq!(
            guest
                .device
                .active
                .as_ref()
                .unwrap()
                .queue
                .kick
                .read()
                .unwrap(),
            1
        );
        guest.kick().unwrap();
        assert_eq!(guest.queue.used_index(), 8);
    }

    #[test]
    fn malformed_chains_are_faults() {
        let chains: [&[Buffer]; 6] = [
            &[writable(MEMORY, 16)],
            &[writable(MEMORY - 8, 16)],
            &[writable(BUFFER, u32::MAX)],
            &[writable(BUFFER, 0)],
            &[readable(BUFFER, 16)],
            &[writable(BUFFER, 16), writable(u64::MAX - 4, 16)],
        ];
        for chain in chains {
            let mut guest = Guest::new();
            guest.queue.add(chain);
            assert!(
                matches!(guest.kick(), Err(GuestFault::Chain { .. })),
                "{chain:?}"
            );
            assert_eq!(guest.bytes(16), [0; 16]);
        }
        let mut guest = Guest::new();
        guest.queue.set_avail_index(9);
        assert!(matches!(guest.kick(), Err(GuestFault::Queue { .. })));
    }

    #[test]
    fn inactive_and_reset_devices_do_nothing() {
        let mut guest = Guest::new();
        guest.device.reset();
        guest.queue.add(&[writable(BUFFER, 16)]);
        guest.kick().unwrap();
        assert!(guest.queue.used().is_none());
        guest.device.process_queue(7).unwrap();
        guest.activate();
        guest.kick().unwrap();
        assert_eq!(guest.queue.used().unwrap().1, 16);
    }
}
