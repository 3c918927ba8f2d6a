// SPDX-License-Identifier: Apache-2.0
//! The kernel: an uncompressed ELF `vmlinux` with a PVH entry note. Its segments are copied into guest memory, where huge
//! pages hold them. Mapping them from the file was tried and given up: the kernel patches much of its text while it
//! boots, so that most pages became private anyway, each by two nested page faults (a cold boot took twice as long).

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::memory::GuestMemory;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTES: u64 = 64 << 10;
/// XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry point of the PVH boot ABI.
const NOTE_PVH_ENTRY: u32 = 18;

#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("kernel: the file is truncated or cannot be read")]
    Read(#[source] std::io::Error),
    #[error("kernel: not an uncompressed x86-64 ELF vmlinux")]
    NotElf,
    #[error("kernel: damaged ELF header ({0})")]
    Damaged(&'static str),
    #[error("kernel: no PVH entry note (needs CONFIG_PVH)")]
    NoPvhEntry,
    #[error("kernel needs memory up to {end:#x}, the guest has {limit:#x} bytes below the hole")]
    DoesNotFit { end: u64, limit: u64 },
    #[error("kernel: cannot be copied into guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Where the kernel lies and starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Physical address of the PVH entry point.
    pub(crate) entry: u64,
    /// First address behind the kernel, its zero-initialised data included.
    pub(crate) end: u64,
}

#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Header(Elf64_Ehdr);
// SAFETY: a C struct of integers without padding; any bytes are a valid value.
unsafe impl ByteValued for Header {}
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Program(Elf64_Phdr);
// SAFETY: a C struct of integers without padding; any bytes are a valid value.
unsafe impl ByteValued for Program {}
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Note(Elf64_Nhdr);
// SAFETY: a C struct of three 32-bit integers; any bytes are a valid value.
unsafe impl ByteValued for Note {}

/// Loads `file`, which may use guest memory below `limit`.
pub(crate) fn load(memory: &GuestMemory, file: &File, limit: u64) -> Result<Kernel, KernelError> {
    let size = file.metadata().map_err(KernelError::Read)?.len();
    let mut entry = None;
    let mut end = 0;
    for program in program_headers(file)? {
        match program.p_type {
            PT_LOAD => {
                end = end.max(load_segment(memory, file, size, &program, limit)?);
            }
            PT_NOTE if entry.is_none() => entry = pvh_entry(file, &program)?,
            _ => {}
        }
    }
    let entry = entry.ok_or(KernelError::NoPvhEntry)?;
    if end == 0 || entry >= end {
        return Err(KernelError::Damaged("entry point outside the segments"));
    }
    Ok(Kernel { entry, end })
}

fn read<T: ByteValued + Default>(file: &File, offset: u64) -> Result<T, KernelError> {
    let mut value = T::default();
    file.read_exact_at(value.as_mut_slice(), offset)
        .map_err(KernelError::Read)?;
    Ok(value)
}

fn program_headers(file: &File) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let header = read::<Header>(file, 0)?.0;
    const ELF64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
    if !header.e_ident.starts_with(ELF64_LITTLE_ENDIAN) || header.e_machine != EM_X86_64 {
        return Err(KernelError::NotElf);
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>()
        || header.e_phnum > MAX_PROGRAM_HEADERS
    {
        return Err(KernelError::Damaged("program header table"));
    }
    (0..u64::from(header.e_phnum))
        .map(|index| {
            let offset = header
                .e_phoff
                .checked_add(index * size_of::<Elf64_Phdr>() as u64)
                .ok_or(KernelError::Damaged("program header table"))?;
            Ok(read::<Program>(file, offset)?.0)
        })
        .collect()
}

/// Brings one segment in; returns the first address behind it.
fn load_segment(
    memory: &GuestMemory,
    file: &File,
    file_size: u64,
    program: &Elf64_Phdr,
    limit: u64,
) -> Result<u64, KernelError> {
    let start = program.p_paddr;
    let end = start
        .checked_add(program.p_memsz.max(program.p_filesz))
        .ok_or(KernelError::Damaged("segment size"))?;
    if end > limit {
        return Err(KernelError::DoesNotFit { end, limit });
    }
    let offset = program.p_offset;
    if offset
        .checked_add(program.p_filesz)
        .is_none_or(|last| last > file_size)
    {
        return Err(KernelError::Damaged("segment beyond the end of the file"));
    }
    let mut file = file;
    file.seek(SeekFrom::Start(offset))
        .map_err(KernelError::Read)?;
    let size =
        usize::try_from(program.p_filesz).map_err(|_| KernelError::Damaged("segment size"))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size)
        .map_err(KernelError::Write)?;
    Ok(end)
}

/// Looks for the PVH entry point in a note segment. Notes are padded to four bytes.
fn pvh_entry(file: &File, program: &Elf64_Phdr) -> Result<Option<u64>, KernelError> {
    if program.p_filesz > MAX_NOTES {
        return Err(KernelError::Damaged("note segment"));
    }
    let note_size = size_of::<Elf64_Nhdr>() as u64;
    let mut at = 0;
    while at + note_size <= program.p_filesz {
        let position = program
            .p_offset
            .checked_add(at)
            .ok_or(KernelError::Damaged("note segment"))?;
        let note = read::<Note>(file, position)?.0;
        let name_size = u64::from(note.n_namesz).next_multiple_of(4);
        let description = position
            .checked_add(note_size + name_size)
            .ok_or(KernelError::Damaged("note segment"))?;
        if note.n_type == NOTE_PVH_ENTRY && note.n_namesz == 4 && note.n_descsz >= 4 {
            let mut name = [0; 4];
            file.read_exact_at(&mut name, position + note_size)
                .map_err(KernelError::Read)?;
            if &name == b"Xen\0" {
                return Ok(Some(u64::from(read::<u32>(file, description)?)));
            }
        }
        at += note_size + name_size + u64::from(note.n_descsz).next_multiple_of(4);
    }
    Ok(None)
}
