// SPDX-License-Identifier: Apache-2.0
//! Guest memory: anonymous, private, not reserved, so that only what the guest touches costs anything.

use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap};

use crate::arch::boot_params::Range;

/// The memory of a guest: regions mapped into this process.
pub(crate) type GuestMemory = vm_memory::GuestMemoryMmap<()>;

pub(crate) const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("cannot map {size} bytes of guest memory")]
    Map {
        size: u64,
        #[source]
        source: MmapRegionError,
    },
    #[error("guest memory regions")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    #[error("a file cannot be mapped at guest address {address:#x}")]
    File {
        address: u64,
        #[source]
        source: std::io::Error,
    },
    #[error("guest address {0:#x} is not in guest memory")]
    Outside(u64),
}

/// Maps the regions of `ram`.
pub(crate) fn create(ram: &[Range]) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::new();
    for range in ram {
        let size = range.size;
        let mapping = MmapRegionBuilder::new(size as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { size, source })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or(MemoryError::Outside(range.start))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(MemoryError::Regions)
}

/// Replaces whole pages of guest memory at `range` by a private mapping of `file` at `offset`: the guest sees the
/// file's bytes, what it writes stays its own. All three are multiples of the page size.
pub(crate) fn map_file(
    memory: &GuestMemory,
    range: Range,
    file: &File,
    offset: u64,
) -> Result<(), MemoryError> {
    let Range {
        start: address,
        size,
    } = range;
    let region = memory
        .find_region(GuestAddress(address))
        .filter(|region| {
            size > 0
                && address
                    .checked_add(size - 1)
                    .is_some_and(|last| last <= region.last_addr().raw_value())
        })
        .ok_or(MemoryError::Outside(address))?;
    let host = region
        .get_host_address(vm_memory::MemoryRegionAddress(
            address - region.start_addr().raw_value(),
        ))
        .map_err(|_| MemoryError::Outside(address))?;
    if [address, size, offset]
        .iter()
        .any(|value| !value.is_multiple_of(PAGE))
    {
        return Err(MemoryError::Outside(address));
    }
    // SAFETY: the range lies inside one region of guest memory, which this process mapped and which nothing but
    // volatile accesses touches; MAP_FIXED replaces just these pages. They stay mapped as long as the region.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            size as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset.cast_signed(),
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(MemoryError::File {
            address,
            source: std::io::Error::last_os_error(),
        });
    }
    Ok(())
}
