// SPDX-License-Identifier: Apache-2.0
//! The initramfs: mapped, not copied, at the top of low memory.

use std::fs::File;

use crate::arch::boot_params::Range;
use crate::memory::{GuestMemory, MemoryError, PAGE, map_file};

#[derive(Debug, thiserror::Error)]
pub(crate) enum InitramfsError {
    #[error("initramfs: cannot read its size")]
    Size(#[source] std::io::Error),
    #[error("initramfs of {size} bytes does not fit into {available} bytes of guest memory")]
    DoesNotFit { size: u64, available: u64 },
    #[error("initramfs is empty")]
    Empty,
    #[error("initramfs")]
    Map(#[source] MemoryError),
}

/// Maps `file` so that it ends at `top`, leaving everything below `bottom` alone. Says where it lies.
pub(crate) fn load(
    memory: &GuestMemory,
    file: &File,
    bottom: u64,
    top: u64,
) -> Result<Range, InitramfsError> {
    let size = file.metadata().map_err(InitramfsError::Size)?.len();
    if size == 0 {
        return Err(InitramfsError::Empty);
    }
    let available = top.saturating_sub(bottom);
    let pages = size
        .checked_next_multiple_of(PAGE)
        .filter(|pages| *pages <= available)
        .ok_or(InitramfsError::DoesNotFit { size, available })?;
    let start = top - pages;
    let range = Range { start, size: pages };
    map_file(memory, range, file, 0).map_err(InitramfsError::Map)?;
    Ok(Range { start, size })
}
