// SPDX-License-Identifier: Apache-2.0
//! The memory balloon device: virtio 1.2, 5.5. What the guest does not need goes back to the host: pages in the
//! balloon, and free pages that the driver reports by itself (free page reporting).
//!
//! Going back means MADV_DONTNEED, for which no mapping is split. The driver has to take such pages for
//! uninitialized (5.5.6, 5.5.6.5), so either outcome is right when it uses one again: zeroes from anonymous
//! memory, or from a private file mapping the bytes of the file, whose page cache all sandboxes share.

use virtio_queue::{QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};

use super::chain::{self, Reader, Writer};
use super::{ActivateError, Activation, ActiveQueue, GuestFault, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

/// virtio 1.2, 5.5.1.
const DEVICE_TYPE: u32 = 5;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const FEATURE_PAGE_REPORTING: u64 = 1 << 5;

/// Virtqueues: virtio 1.2, 5.5.2. Those of features that are not offered do not count, as drivers have it.
const INFLATE: usize = 0;
#[cfg(test)]
const DEFLATE: usize = 1;
pub(crate) const REPORTING: usize = 2;
/// Linux reports up to 32 ranges in one chain; the other queues hold one buffer.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];

/// Pages of the balloon are 4 KiB, their numbers have 4 bytes (5.5.6).
const PFN_SHIFT: u32 = 12;
const PAGE_LEN: usize = 1 << PFN_SHIFT;
const PFN_LEN: usize = 4;

/// The most page numbers in one buffer. Linux has 256.
const MAX_PFNS: usize = 4096;

/// How many chains are processed on one kick.
const MAX_BATCH: usize = 8;

/// `struct virtio_balloon_config`, the two fields that do not depend on a feature.
const CONFIG_LEN: usize = 8;
const ACTUAL: usize = 4;

#[derive(Debug, Default)]
pub(crate) struct Balloon {
    config: [u8; CONFIG_LEN],
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    queues: Vec<ActiveQueue>,
    interrupt: Interrupt,
}

impl Balloon {
    pub(crate) fn new() -> Balloon {
        Balloon::default()
    }

    /// Asks the guest to keep `pages` of 4 KiB in the balloon. It does so in its own time.
    pub(crate) fn set_target(&mut self, pages: u32) {
        self.config[..ACTUAL].copy_from_slice(&pages.to_le_bytes());
        if let Some(active) = &self.active {
            active.interrupt.config_change();
        }
    }
}

impl Active {
    fn process(&mut self, index: usize) -> Result<(), GuestFault> {
        let Some(ActiveQueue { queue, kick }) = self.queues.get_mut(index) else {
            return Ok(());
        };
        if !queue.ready() {
            return Ok(());
        }
        let fault = |source| GuestFault::Queue {
            queue: index,
            source,
        };
        let mut processed = 0;
        while processed < MAX_BATCH {
            let Some(chain) = chain::pop(index, queue, &self.memory)? else {
                match queue.enable_notification(&self.memory).map_err(fault)? {
                    true => continue,
                    false => break,
                }
            };
            let head = chain.head_index();
            let (mut reader, writer) = chain::split(index, chain, &self.memory)?;
            match index {
                INFLATE => inflate(&self.memory, &mut reader)?,
                REPORTING => report(&writer),
                // A page that leaves the balloon is there again as soon as the guest touches it.
                _ => {}
            }
            queue.add_used(&self.memory, head, 0).map_err(fault)?;
            processed += 1;
        }
        if processed == MAX_BATCH {
            // The driver may not kick again for what it has queued already. The counter cannot be at its maximum.
            let _ = kick.write(1);
        }
        if processed > 0 && queue.needs_notification(&self.memory).map_err(fault)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }
}

/// Gives back the pages whose numbers are in the buffer.
fn inflate(memory: &GuestMemory, reader: &mut Reader<'_>) -> Result<(), GuestFault> {
    let fault = || GuestFault::Chain { queue: INFLATE };
    let len = reader.remaining();
    if !len.is_multiple_of(PFN_LEN) || len > MAX_PFNS * PFN_LEN {
        return Err(fault());
    }
    let mut bytes = vec![0; len];
    reader.read_exact(&mut bytes).map_err(|_| fault())?;
    let mut pfns: Vec<u32> = bytes
        .as_chunks::<PFN_LEN>()
        .0
        .iter()
        .map(|pfn| u32::from_le_bytes(*pfn))
        .collect();
    pfns.sort_unstable();
    pfns.dedup();
    let runs = || pfns.chunk_by(|pfn, next| pfn.checked_add(1) == Some(*next));
    // All is checked before the first page goes.
    for discard_them in [false, true] {
        for run in runs() {
            let first = u64::from(run.first().copied().unwrap_or_default());
            let address = GuestAddress(first << PFN_SHIFT);
            for slice in memory.get_slices(address, run.len() * PAGE_LEN) {
                let slice = slice.map_err(|_| fault())?;
                if discard_them {
                    discard(slice.ptr_guard_mut().as_ptr(), slice.len());
                }
            }
        }
    }
    Ok(())
}

/// Gives back the ranges that the buffers of a chain are.
fn report(writer: &Writer<'_>) {
    for iovec in writer.iovecs(usize::MAX).iter() {
        discard(iovec.iov_base.cast(), iovec.iov_len);
    }
}

/// Gives back the whole pages in a range of guest memory.
fn discard(start: *mut u8, len: usize) {
    let before = start.align_offset(PAGE_LEN);
    let Some(len) = len.checked_sub(before).map(|len| len - len % PAGE_LEN) else {
        return;
    };
    if len == 0 {
        return;
    }
    // SAFETY: the range lies in guest memory, as the checks of its chain or page numbers have found. It is mapped
    // privately and accessed only as raw bytes, with no references to it, so its contents may change.
    let result =
        unsafe { libc::madvise(start.wrapping_add(before).cast(), len, libc::MADV_DONTNEED) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        log::debug!("balloon: {len} bytes stay with the guest: {error}");
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        FEATURE_DEFLATE_ON_OOM | FEATURE_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.config.get(at..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    /// The driver writes how many pages are in the balloon. Nothing depends on it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let actual = usize::try_from(offset)
            .ok()
            .filter(|&at| at >= ACTUAL)
            .and_then(|at| self.config.get_mut(at..));
        for (byte, value) in actual.unwrap_or_default().iter_mut().zip(data) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.active = Some(Active {
            memory: activation.memory,
            queues: activation.queues,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn process_queue(&mut self, index: usize) -> Result<(), GuestFault> {
        match &mut self.active {
            Some(active) => active.process(index),
            None => Ok(()),
        }
    }

    /// The target stays; the balloon is empty.
    fn queues(&self) -> Option<Vec<QueueState>> {
        let active = self.active.as_ref()?;
        Some(
            active
                .queues
                .iter()
                .map(|queue| queue.queue.state())
                .collect(),
        )
    }

    fn reset(&mut self) {
        self.active = None;
        self.config[ACTUAL..].fill(0);
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small constants")]
mod tests {
    use super::super::test_support::{self, DriverQueue, readable, writable};
    use super::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    const PAGE: u64 = PAGE_LEN as u64;
    const PAGES: u64 = 256;
    const BUFFER: u64 = 0x8000;
    /// Pages from here on are filled with ones.
    const DATA: u64 = 64;

    struct Guest {
        memory: GuestMemory,
        queues: [DriverQueue; 3],
        interrupt: Interrupt,
        device: Balloon,
    }

    impl Guest {
        /// Two regions with a hole of the same size between them.
        fn new() -> Guest {
            let half = (PAGES / 2 * PAGE) as usize;
            let hole_end = GuestAddress(PAGES * PAGE);
            let memory =
                GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (hole_end, half)]).unwrap();
            let ones = vec![1; PAGE as usize];
            for pfn in (DATA..PAGES / 2).chain(PAGES..PAGES * 3 / 2) {
                memory.write_slice(&ones, GuestAddress(pfn * PAGE)).unwrap();
            }
            let inflate = DriverQueue::new(&memory, 0x1000, 16);
            let deflate = DriverQueue::new(&memory, inflate.end(), 16);
            let reporting = DriverQueue::new(&memory, deflate.end(), 32);
            assert!(reporting.end() <= BUFFER);
            let mut guest = Guest {
                memory,
                queues: [inflate, deflate, reporting],
                interrupt: test_support::interrupt(),
                device: Balloon::new(),
            };
            guest.activate();
            guest
        }

        fn activate(&mut self) {
            let queues: Vec<_> = self.queues.iter().collect();
            let activation = test_support::activation(&self.memory, &queues, &self.interrupt);
            self.device.activate(activation).unwrap();
        }

        fn tell(&mut self, queue: usize, pfns: &[u32]) -> Result<(), GuestFault> {
            let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
            self.memory
                .write_slice(&bytes, GuestAddress(BUFFER))
                .unwrap();
            self.queues[queue].add(&[readable(BUFFER, bytes.len() as u32)]);
            self.device.process_queue(queue)
        }

        fn report(&mut self, ranges: &[(u64, u32)]) -> Result<(), GuestFault> {
            let buffers: Vec<_> = ranges.iter().map(|&(at, len)| writable(at, len)).collect();
            self.queues[REPORTING].add(&buffers);
            self.device.process_queue(REPORTING)
        }

        /// The numbers of the data pages that are gone.
        fn gone(&self) -> Vec<u64> {
            let first =
                |pfn: u64| -> u8 { self.memory.read_obj(GuestAddress(pfn * PAGE)).unwrap() };
            (DATA..PAGES / 2)
                .chain(PAGES..PAGES * 3 / 2)
                .filter(|&pfn| first(pfn) == 0)
                .collect()
        }

        /// How many of the data pages the host has memory for.
        fn resident(&self) -> usize {
            let start = self
                .memory
                .get_host_address(GuestAddress(DATA * PAGE))
                .unwrap();
            let pages = (PAGES / 2 - DATA) as usize;
            let mut states = vec![0u8; pages];
            // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
            let result =
                unsafe { libc::mincore(start.cast(), pages * PAGE as usize, states.as_mut_ptr()) };
            assert_eq!(result, 0);
            states.iter().filter(|&state| state & 1 == 1).count()
        }
    }

    #[test]
    fn inflated_pages_go_back_to_the_host() {
        let mut guest = Guest::new();
        let before = guest.resident();
        // Any order, and twice.
        guest.tell(INFLATE, &[71, 70, 90, 72, 70, 91, 300]).unwrap();
        assert_eq!(guest.resident(), before - 5);
        assert_eq!(guest.gone(), [70, 71, 72, 90, 91, 300]);
        assert_eq!(guest.queues[INFLATE].used().unwrap().1, 0);
        assert_eq!(test_support::interrupts(&guest.interrupt), 1);
        guest.tell(DEFLATE, &[70, u32::MAX]).unwrap();
        assert!(guest.queues[DEFLATE].used().is_some());
        assert_eq!(guest.gone().len(), 6);
    }

    #[test]
    fn pages_outside_of_memory_are_faults_and_nothing_goes() {
        for bad in [
            u32::MAX,
            PAGES as u32 / 2,
            PAGES as u32 - 1,
            PAGES as u32 * 3 / 2,
            1 << 20,
        ] {
            let mut guest = Guest::new();
            let result = guest.tell(INFLATE, &[70, bad, 71]);
            assert!(matches!(result, Err(GuestFault::Chain { .. })), "{bad}");
            assert!(guest.gone().is_empty());
        }
        // A run that leaves the first region.
        let mut guest = Guest::new();
        let end = PAGES as u32 / 2;
        assert!(guest.tell(INFLATE, &[end - 2, end - 1, end]).is_err());
        assert!(guest.gone().is_empty());
    }

    #[test]
    fn odd_and_huge_buffers_are_faults() {
        for len in [1, 3, 5, MAX_PFNS as u32 * 4 + 4, 0x7_0000] {
            let mut guest = Guest::new();
            guest.queues[INFLATE].add(&[readable(BUFFER, len)]);
            assert!(guest.device.process_queue(INFLATE).is_err(), "{len}");
        }
        for index in [INFLATE, DEFLATE, REPORTING] {
            let mut guest = Guest::new();
            guest.queues[index].publish(99);
            assert!(guest.device.process_queue(index).is_err());
            let mut guest = Guest::new();
            guest.queues[index].set_avail_index(1000);
            assert!(guest.device.process_queue(index).is_err());
        }
    }

    #[test]
    fn reported_ranges_go_back_to_the_host() {
        let mut guest = Guest::new();
        let before = guest.resident();
        let page = PAGE as u32;
        guest
            .report(&[(70 * PAGE, 4 * page), (80 * PAGE, page), (300 * PAGE, page)])
            .unwrap();
        assert_eq!(guest.resident(), before - 5);
        assert_eq!(guest.gone(), [70, 71, 72, 73, 80, 300]);
        // Only whole pages.
        guest
            .report(&[
                (90 * PAGE + 1, 3 * page - 2),
                (100 * PAGE + 8, page - 8),
                (110 * PAGE, page - 1),
            ])
            .unwrap();
        assert_eq!(guest.gone(), [70, 71, 72, 73, 80, 91, 300]);
        assert_eq!(guest.queues[REPORTING].used_index(), 2);
        // The guest uses them again.
        let address = GuestAddress(70 * PAGE);
        guest.memory.write_obj(7u8, address).unwrap();
        assert_eq!(guest.memory.read_obj::<u8>(address).unwrap(), 7);
    }

    #[test]
    fn ranges_outside_of_memory_are_faults_and_nothing_goes() {
        let page = PAGE as u32;
        for (start, len) in [
            (PAGES / 2 * PAGE, page),
            ((PAGES / 2 - 1) * PAGE, 2 * page),
            (PAGES * 3 / 2 * PAGE, page),
            (u64::MAX - 4095, page),
            (70 * PAGE, u32::MAX),
        ] {
            let mut guest = Guest::new();
            let result = guest.report(&[(70 * PAGE, page), (start, len)]);
            assert!(
                matches!(result, Err(GuestFault::Chain { .. })),
                "{start:#x}"
            );
            assert!(guest.gone().is_empty());
        }
    }

    #[test]
    fn a_kick_is_answered_in_parts() {
        let mut guest = Guest::new();
        for pfn in 70..80 {
            guest.queues[REPORTING].add(&[writable(pfn * PAGE, PAGE as u32)]);
        }
        guest.device.process_queue(REPORTING).unwrap();
        assert_eq!(guest.gone().len(), MAX_BATCH);
        let active = guest.device.active.as_ref().unwrap();
        assert_eq!(active.queues[REPORTING].kick.read().unwrap(), 1);
        guest.device.process_queue(REPORTING).unwrap();
        assert_eq!(guest.gone().len(), 10);
    }

    #[test]
    fn the_target_is_in_the_configuration_space() {
        let mut guest = Guest::new();
        guest.device.set_target(0x0102_0304);
        assert_eq!(test_support::interrupts(&guest.interrupt), 1);
        let mut config = [0; 16];
        guest.device.read_config(0, &mut config);
        assert_eq!(config[..8], [4, 3, 2, 1, 0, 0, 0, 0]);
        // The driver owns the second field only.
        guest.device.write_config(4, &[9, 9]);
        for offset in [0, 2, 8, 100, u64::MAX] {
            guest.device.write_config(offset, &[7; 4]);
        }
        guest.device.write_config(6, &[8; 10]);
        guest.device.read_config(0, &mut config);
        assert_eq!(config[..8], [4, 3, 2, 1, 9, 9, 8, 8]);
        guest.device.reset();
        let mut config = [0; 8];
        guest.device.read_config(0, &mut config);
        assert_eq!(config, [4, 3, 2, 1, 0, 0, 0, 0]);
        guest.device.set_target(0);
        assert_eq!(test_support::interrupts(&guest.interrupt), 0);
    }

    #[test]
    fn inactive_devices_do_nothing() {
        let mut guest = Guest::new();
        guest.device.reset();
        guest.report(&[(70 * PAGE, PAGE as u32)]).unwrap();
        assert!(guest.gone().is_empty());
        guest.device.process_queue(9).unwrap();
        guest.activate();
        guest.device.process_queue(9).unwrap();
        guest.device.process_queue(REPORTING).unwrap();
        assert_eq!(guest.gone(), [70]);
    }
}
