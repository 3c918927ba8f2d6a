// SPDX-License-Identifier: Apache-2.0
//! What the kernel is told at its PVH entry: command line, initramfs, memory map.

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::layout::{COMMAND_LINE, MEMORY_MAP, MODULE_LIST, START_INFO};
use crate::memory::GuestMemory;

const START_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_VERSION: u32 = 1;
const MEMORY_RAM: u32 = 1;

#[derive(Clone, Copy)]
#[repr(transparent)]
#[allow(dead_code, reason = "read as bytes")]
struct StartInfo(hvm_start_info);
// SAFETY: a C struct of integers without padding; any bytes are a valid value.
unsafe impl ByteValued for StartInfo {}
#[derive(Clone, Copy)]
#[repr(transparent)]
#[allow(dead_code, reason = "read as bytes")]
struct Module(hvm_modlist_entry);
// SAFETY: a C struct of four 64-bit integers; any bytes are a valid value.
unsafe impl ByteValued for Module {}
#[derive(Clone, Copy)]
#[repr(transparent)]
#[allow(dead_code, reason = "read as bytes")]
struct MapEntry(hvm_memmap_table_entry);
// SAFETY: a C struct of integers without padding (64, 64, 32, 32 bits); any bytes are a valid value.
unsafe impl ByteValued for MapEntry {}

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

/// Writes the start info. The command line and the initramfs are in their places already.
pub(crate) fn write(
    memory: &GuestMemory,
    initramfs: Range,
    ram: &[Range],
) -> Result<(), vm_memory::GuestMemoryError> {
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: 1,
        modlist_paddr: MODULE_LIST,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(ram.len()).expect("a memory map has a handful of ranges"),
        ..Default::default()
    };
    let module = hvm_modlist_entry {
        paddr: initramfs.start,
        size: initramfs.size,
        ..Default::default()
    };
    memory.write_obj(StartInfo(info), GuestAddress(START_INFO))?;
    memory.write_obj(Module(module), GuestAddress(MODULE_LIST))?;
    let mut address = MEMORY_MAP;
    for range in ram {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: MEMORY_RAM,
            reserved: 0,
        };
        memory.write_obj(MapEntry(entry), GuestAddress(address))?;
        address += size_of::<MapEntry>() as u64;
    }
    Ok(())
}
