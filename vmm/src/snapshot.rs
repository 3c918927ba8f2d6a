// SPDX-License-Identifier: Apache-2.0
//! A VM at rest in two files: a small state file (versioned, checksummed) and a sparse memory file that is mapped
//! privately when the VM is restored, so that nothing is copied and all clones share one page cache.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use crate::devices::ioapic::IoapicState;
use crate::devices::virtio::mmio::TransportState;
use crate::memory::{GuestMemory, PAGE};
use crate::vcpu_state::VcpuState;

const MAGIC: &[u8; 8] = b"SBOXSNAP";
/// Raised with every change of what follows.
const VERSION: u32 = 1;
const HEADER: usize = MAGIC.len() + 4 + 4 + 4;
/// More than 32 vCPUs need.
const MAX_STATE: usize = 4 << 20;

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
        file.write_all(&MachineState::envelope(&body))
            .map_err(SnapshotError::State)
    }

    /// `body` with the header that `decode` checks.
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

    pub(crate) fn read(file: &mut File) -> Result<MachineState, SnapshotError> {
        let mut bytes = Vec::new();
        file.take((HEADER + MAX_STATE) as u64)
            .read_to_end(&mut bytes)
            .map_err(SnapshotError::State)?;
        MachineState::decode(&bytes)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<MachineState, SnapshotError> {
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
        match postcard::take_from_bytes(body) {
            Ok((state, [])) => Ok(state),
            _ => Err(SnapshotError::Damaged),
        }
    }
}

fn word(bytes: &[u8]) -> Result<(u32, &[u8]), SnapshotError> {
    let (word, rest) = bytes.split_first_chunk().ok_or(SnapshotError::Damaged)?;
    Ok((u32::from_le_bytes(*word), rest))
}

/// Writes the pages that are not zero; the others are holes. The regions follow each other in the file.
pub(crate) fn write_memory(memory: &GuestMemory, file: &File) -> Result<MemoryId, SnapshotError> {
    let mut id = MemoryId::default();
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| SnapshotError::Memory(error.into()))?;
    let size = memory.iter().map(GuestMemoryRegion::len).sum();
    file.write_all_at(&id, size)
        .map_err(SnapshotError::Memory)?;
    let mut start = 0;
    for region in memory.iter() {
        write_region(region, file, start)?;
        start += region.len();
    }
    Ok(id)
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

fn write_region(
    region: &vm_memory::GuestRegionMmap<()>,
    file: &File,
    start: u64,
) -> Result<(), SnapshotError> {
    let pages = usize::try_from(region.len() / PAGE).map_err(|_| SnapshotError::Guest)?;
    let mut resident = vec![0u8; pages];
    // SAFETY: the range is one whole mapping of this process, and the vector has one byte for each of its pages.
    let result = unsafe {
        libc::mincore(
            region.as_ptr().cast(),
            pages * PAGE as usize,
            resident.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(SnapshotError::Memory(std::io::Error::last_os_error()));
    }
    let mut page = [0u8; PAGE as usize];
    for (index, _) in (0u64..)
        .zip(&resident)
        .filter(|(_, flags)| **flags & 1 != 0)
    {
        let offset = index * PAGE;
        region
            .read_slice(&mut page, MemoryRegionAddress(offset))
            .map_err(|_| SnapshotError::Guest)?;
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(&page, start + offset)
                .map_err(SnapshotError::Memory)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};
    use std::os::fd::{FromRawFd, IntoRawFd};

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::GuestAddress;

    use super::*;

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
        let id = write_memory(&memory, &file).unwrap();
        check_memory(&file, 2 << 20, &id).unwrap();
        assert!(check_memory(&file, 1 << 20, &id).is_err());
        assert!(check_memory(&file, 2 << 20, &MemoryId::default()).is_err());
        let mut word = [0; 4];
        file.read_exact_at(&mut word, (1 << 20) + 0x7000).unwrap();
        assert_eq!(&word, b"high");
        use std::os::unix::fs::MetadataExt;
        assert!(file.metadata().unwrap().blocks() * 512 <= 5 * PAGE);
    }
}
