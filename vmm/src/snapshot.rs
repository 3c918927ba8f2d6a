// SPDX-License-Identifier: Apache-2.0
//! A VM at rest in two files: a small state file (versioned, checksummed) and a sparse memory file that is mapped
//! privately when the VM is restored, so that nothing is copied and all clones share one page cache.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use crate::devices::ioapic::IoapicState;
use crate::devices::virtio::fs::SavedFiles;
use crate::devices::virtio::mmio::TransportState;
use crate::devices::virtio::vsock::SavedStreams;
use crate::memory::{GuestMemory, PAGE};
use crate::vcpu_state::VcpuState;

const MAGIC: &[u8; 8] = b"SBOXSNAP";
/// Raised with every change of what follows.
const VERSION: u32 = 3;
const HEADER: usize = MAGIC.len() + 4 + 4 + 4;
/// More than 32 vCPUs and the tables of a busy file server need, and than what deleted files may hold.
const MAX_STATE: usize = 128 << 20;

/// The two files of a snapshot, opened by the caller.
#[derive(Debug)]
pub struct SnapshotFiles {
    pub state: File,
    pub memory: File,
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("snapshot state: cannot be read or written")]
    State(#[source] std::io::Error),
    #[error("snapshot memory: cannot be read or written")]
    Memory(#[source] std::io::Error),
    #[error("snapshot state: not a snapshot")]
    Foreign,
    #[error("snapshot state: version {0}, expected {VERSION}")]
    Version(u32),
    #[error("snapshot state: damaged")]
    Damaged,
    #[error("snapshot memory: cut short, or of another snapshot")]
    MemoryFile,
    #[error("snapshot: made for another kind of VM")]
    Shape,
    #[error(
        "snapshot: made on another CPU model, or on one with more features than this host has ({0})"
    )]
    Cpu(&'static str),
    #[error("snapshot: not of a running container")]
    NotRunning,
    #[error("snapshot: the guest is already using its files")]
    Busy,
    #[error("snapshot: guest memory cannot be read")]
    Guest,
}

/// Random, one for each snapshot.
pub(crate) type MemoryId = [u8; 16];

/// Everything but memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    /// What the VM is: [`crate::plan::VmPlan`] as text. A state fits the same plan only.
    pub(crate) plan: String,
    /// What stands behind the memory in its file, so that the two cannot be taken for those of different snapshots.
    pub(crate) memory_id: MemoryId,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) clock: kvm_clock_data,
    pub(crate) ioapic: IoapicState,
    pub(crate) transports: Vec<TransportState>,
    /// None: of a guest that nothing of the host is in yet.
    pub(crate) running: Option<Running>,
}

/// What a VM with a container in it has beyond.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Running {
    /// What KVM could do for the guest.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) streams: SavedStreams,
    pub(crate) files: SavedFiles,
    /// What the owner of the machine wants to know again.
    pub(crate) owner: Vec<u8>,
}

/// CRC-32 (IEEE 802.3), enough against accidents; against people the cache directory's owner and mode stand.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

impl MachineState {
    pub(crate) fn write(&self, file: &mut File) -> Result<(), SnapshotError> {
        let body = postcard::to_stdvec(self).map_err(|_| SnapshotError::Damaged)?;
        file.write_all(&envelope(&body))
            .map_err(SnapshotError::State)
    }

    pub(crate) fn read(file: &mut File) -> Result<MachineState, SnapshotError> {
        let mut bytes = Vec::new();
        file.take((HEADER + MAX_STATE) as u64)
            .read_to_end(&mut bytes)
            .map_err(SnapshotError::State)?;
        MachineState::decode(&bytes)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<MachineState, SnapshotError> {
        match postcard::take_from_bytes(body(bytes)?) {
            Ok((state, [])) => Ok(state),
            _ => Err(SnapshotError::Damaged),
        }
    }
}

/// `body` with the header that [`body`] checks.
pub(crate) fn envelope(body: &[u8]) -> Vec<u8> {
    // A body that is too long for its field is refused when it is read.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc32(body).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// What is in an envelope of this version, whole.
pub(crate) fn body(bytes: &[u8]) -> Result<&[u8], SnapshotError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(SnapshotError::Foreign)?;
    let (version, rest) = word(rest)?;
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let (length, rest) = word(rest)?;
    let (checksum, body) = word(rest)?;
    if body.len() != length as usize || crc32(body) != checksum {
        return Err(SnapshotError::Damaged);
    }
    Ok(body)
}

fn word(bytes: &[u8]) -> Result<(u32, &[u8]), SnapshotError> {
    let (word, rest) = bytes.split_first_chunk().ok_or(SnapshotError::Damaged)?;
    Ok((u32::from_le_bytes(*word), rest))
}

/// Where guest memory is not made of zeroes.
#[derive(Debug)]
pub(crate) struct Content {
    /// `/proc/self/pagemap`, to be opened while `/proc` is there. It knows of pages that are swapped out too.
    pagemap: File,
    /// What lies under the pages that the guest has not written to: the memory file that it was restored from.
    base: Option<File>,
}

/// Linux: Documentation/admin-guide/mm/pagemap.rst.
pub(crate) const PAGE_PRESENT: u64 = 1 << 63;
const PAGE_SWAPPED: u64 = 1 << 62;
/// The page is one of a file, or shared.
pub(crate) const PAGE_OF_FILE: u64 = 1 << 61;
/// Entries of the page map that are read at once.
const ENTRIES: u64 = 8192;
/// What is written at once.
const BATCH: usize = 1 << 20;

impl Content {
    pub(crate) fn new(base: Option<File>) -> std::io::Result<Content> {
        let pagemap = File::open("/proc/self/pagemap")?;
        Ok(Content { pagemap, base })
    }

    pub(crate) fn has_base(&self) -> bool {
        self.base.is_some()
    }

    /// Calls `visit` with the number of each page in the region, and its entry of the page map.
    pub(crate) fn each_page(
        &self,
        region: &vm_memory::GuestRegionMmap<()>,
        mut visit: impl FnMut(u64, u64) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut entries = vec![0; ENTRIES as usize * size_of::<u64>()];
        let first = region.as_ptr().addr() as u64 / PAGE;
        let pages = region.len() / PAGE;
        for chunk in (0..pages).step_by(ENTRIES as usize) {
            let count = ENTRIES.min(pages - chunk) as usize * size_of::<u64>();
            let at = (first + chunk) * size_of::<u64>() as u64;
            self.pagemap
                .read_exact_at(&mut entries[..count], at)
                .map_err(SnapshotError::Memory)?;
            for (index, entry) in (chunk..).zip(entries[..count].as_chunks().0) {
                visit(index, u64::from_le_bytes(*entry))?;
            }
        }
        Ok(())
    }

    /// Writes the pages that are not zero; the others are holes. The regions follow each other in the file, as they do
    /// in the file that they were restored from.
    pub(crate) fn write(
        &self,
        memory: &GuestMemory,
        file: &File,
    ) -> Result<MemoryId, SnapshotError> {
        let mut id = MemoryId::default();
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| SnapshotError::Memory(error.into()))?;
        let size = memory.iter().map(GuestMemoryRegion::len).sum();
        file.write_all_at(&id, size)
            .map_err(SnapshotError::Memory)?;
        let mut start = 0;
        for region in memory.iter() {
            self.write_region(region, file, start)?;
            start += region.len();
        }
        Ok(id)
    }

    fn write_region(
        &self,
        region: &vm_memory::GuestRegionMmap<()>,
        file: &File,
        start: u64,
    ) -> Result<(), SnapshotError> {
        let mut batch = Batch::new(file);
        let mut base = Extent::default();
        self.each_page(region, |index, entry| {
            let mapped = entry & (PAGE_PRESENT | PAGE_SWAPPED) != 0;
            let offset = index * PAGE;
            if mapped || base.contains(self.base.as_ref(), start + offset)? {
                let page = batch.next(start + offset)?;
                region
                    .read_slice(page, MemoryRegionAddress(offset))
                    .map_err(|_| SnapshotError::Guest)?;
                batch.keep_unless_zero();
            }
            Ok(())
        })?;
        batch.flush()
    }
}

/// Where there is data in a sparse file: the extent that was asked for last.
#[derive(Debug, Default)]
struct Extent {
    data: u64,
    end: u64,
}

impl Extent {
    /// Offsets are asked for in rising order.
    fn contains(&mut self, file: Option<&File>, offset: u64) -> Result<bool, SnapshotError> {
        let Some(file) = file else {
            return Ok(false);
        };
        if offset >= self.end {
            use rustix::fs::{SeekFrom, seek};
            let fail = |error: rustix::io::Errno| SnapshotError::Memory(error.into());
            (self.data, self.end) = match seek(file, SeekFrom::Data(offset)) {
                Ok(data) => (data, seek(file, SeekFrom::Hole(data)).map_err(fail)?),
                Err(rustix::io::Errno::NXIO) => (u64::MAX, u64::MAX),
                Err(error) => return Err(fail(error)),
            };
        }
        Ok(offset + PAGE > self.data)
    }
}

/// Pages that follow each other, written together.
struct Batch<'a> {
    file: &'a File,
    start: u64,
    bytes: Vec<u8>,
}

impl Batch<'_> {
    fn new(file: &File) -> Batch<'_> {
        Batch {
            file,
            start: 0,
            bytes: Vec::with_capacity(BATCH),
        }
    }

    /// Room for the page at `offset` of the file.
    fn next(&mut self, offset: u64) -> Result<&mut [u8], SnapshotError> {
        let length = self.bytes.len();
        if length >= BATCH || offset != self.start + length as u64 {
            self.flush()?;
            self.start = offset;
        }
        let length = self.bytes.len();
        self.bytes.resize(length + PAGE as usize, 0);
        Ok(&mut self.bytes[length..])
    }

    fn keep_unless_zero(&mut self) {
        const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];
        if self.bytes.ends_with(&ZEROES) {
            self.bytes.truncate(self.bytes.len() - ZEROES.len());
        }
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        self.file
            .write_all_at(&self.bytes, self.start)
            .map_err(SnapshotError::Memory)?;
        self.bytes.clear();
        Ok(())
    }
}

/// Whether `file` holds the `size` bytes of memory that were saved with `id`.
pub(crate) fn check_memory(file: &File, size: u64, id: &MemoryId) -> Result<(), SnapshotError> {
    let mut found = MemoryId::default();
    match file.read_exact_at(&mut found, size) {
        Ok(()) if found == *id => Ok(()),
        _ => Err(SnapshotError::MemoryFile),
    }
}

/// How finely [`extents`] looks at a file.
const EXTENT: u64 = 2 << 20;

/// The parts of `file` between `start` and `start + size` that hold data, in pieces of 2 MiB, neighbours joined.
pub(crate) fn extents(
    file: &File,
    start: u64,
    size: u64,
) -> Result<Vec<std::ops::Range<u64>>, SnapshotError> {
    let end = start + size;
    let mut found: Vec<std::ops::Range<u64>> = Vec::new();
    let mut at = start;
    while at < end {
        let data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            // Nothing but a hole behind.
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(SnapshotError::Memory(error.into())),
        };
        let from = data - (data - start) % EXTENT;
        at = end.min(from + EXTENT);
        match found.last_mut() {
            Some(last) if last.end == from => last.end = at,
            _ => found.push(from..at),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};
    use std::os::fd::{FromRawFd, IntoRawFd};

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::arch::boot_params::Range;

    fn scratch() -> File {
        let fd = memfd_create("snapshot", MemfdFlags::CLOEXEC).unwrap();
        // SAFETY: a descriptor just made, owned by nobody else.
        unsafe { File::from_raw_fd(fd.into_raw_fd()) }
    }

    fn state() -> MachineState {
        MachineState {
            plan: "plan".into(),
            memory_id: MemoryId::default(),
            vcpus: Vec::new(),
            clock: kvm_clock_data::default(),
            ioapic: IoapicState::default(),
            transports: Vec::new(),
            running: None,
        }
    }

    #[test]
    fn crc_of_the_check_string() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_changed_byte_is_refused_wherever_it_is() {
        let mut file = scratch();
        state().write(&mut file).unwrap();
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(MachineState::decode(&bytes).unwrap().plan, "plan");
        for at in 0..bytes.len() {
            bytes[at] ^= 0x40;
            assert!(MachineState::decode(&bytes).is_err(), "byte {at}");
            bytes[at] ^= 0x40;
        }
        for length in 0..bytes.len() {
            assert!(MachineState::decode(&bytes[..length]).is_err());
        }
        bytes.push(0);
        assert!(MachineState::decode(&bytes).is_err());
    }

    #[test]
    fn extents_are_what_is_not_a_hole() {
        const MIB: u64 = 1 << 20;
        let file = scratch();
        let start = 5 * MIB;
        for at in [MIB, start + 3 * MIB, start + 5 * MIB, start + 20 * MIB] {
            file.write_all_at(b"x", at).unwrap();
        }
        file.write_all_at(b"x", start + 40 * MIB + 5).unwrap();
        let found = extents(&file, start, 21 * MIB).unwrap();
        let expected = [2..6, 20..21].map(|part| start + part.start * MIB..start + part.end * MIB);
        assert_eq!(found, expected);
        assert!(extents(&file, start + 41 * MIB, MIB).unwrap().is_empty());
        assert!(extents(&file, 2 * MIB, MIB).unwrap().is_empty());
    }

    #[test]
    fn memory_comes_back_and_zero_pages_are_holes() {
        let memory = GuestMemory::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(1 << 30), 1 << 20),
        ])
        .unwrap();
        memory.write_slice(b"low", GuestAddress(0x5000)).unwrap();
        memory
            .write_slice(b"high", GuestAddress((1 << 30) + 0x7000))
            .unwrap();
        let file = scratch();
        let id = Content::new(None).unwrap().write(&memory, &file).unwrap();
        check_memory(&file, 2 << 20, &id).unwrap();
        assert!(check_memory(&file, 1 << 20, &id).is_err());
        assert!(check_memory(&file, 2 << 20, &MemoryId::default()).is_err());
        let mut word = [0; 4];
        file.read_exact_at(&mut word, (1 << 20) + 0x7000).unwrap();
        assert_eq!(&word, b"high");
        use std::os::unix::fs::MetadataExt;
        assert!(file.metadata().unwrap().blocks() * 512 <= 5 * PAGE);
    }

    #[test]
    fn what_a_restored_guest_has_not_touched_is_saved_again() {
        let range = Range {
            start: 0,
            size: 1 << 20,
        };
        let first = scratch();
        for page in [3u64, 4, 200] {
            let text = format!("page {page}");
            first.write_all_at(text.as_bytes(), page * PAGE).unwrap();
        }
        first.set_len(1 << 20).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        crate::memory::map_file(&memory, range, &first, 0).unwrap();
        memory.write_slice(b"new", GuestAddress(4 * PAGE)).unwrap();
        memory.write_slice(b"far", GuestAddress(9 * PAGE)).unwrap();
        memory
            .write_slice(&[0; PAGE as usize], GuestAddress(200 * PAGE))
            .unwrap();
        let second = scratch();
        let content = Content::new(Some(first)).unwrap();
        content.write(&memory, &second).unwrap();
        let text = |page: u64| {
            let mut text = [0; 6];
            second.read_exact_at(&mut text, page * PAGE).unwrap();
            String::from_utf8(text.to_vec()).unwrap()
        };
        assert_eq!(text(3), "page 3");
        assert_eq!(text(4), "newe 4");
        assert_eq!(text(9), "far\0\0\0");
        assert_eq!(text(200), "\0\0\0\0\0\0");
    }
}
