// SPDX-License-Identifier: Apache-2.0
//! Open directories.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::ByteValued;

use super::abi;
use super::file;
use super::inodes::{Directory, NodeId};
use super::passthrough::Passthrough;
use super::self_fd;

/// What is read from the host at once.
const BUFFER: usize = 32 << 10;
/// The largest reply: more entries take more requests.
const LARGEST_REPLY: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct OpenDirectory {
    file: Arc<OwnedFd>,
    device: (u32, u32),
    stream: Mutex<Stream>,
}

impl OpenDirectory {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Entries that were read from the host, and where they are in the directory.
#[derive(Debug, Default)]
struct Stream {
    buffer: Vec<u8>,
    /// Start of the next entry in `buffer`.
    at: usize,
    /// The offset of the next entry, as the host counts.
    offset: u64,
}

/// An entry as getdents64(2) returns it.
#[derive(Debug)]
struct HostEntry<'a> {
    ino: u64,
    /// Of the entry after it.
    offset: u64,
    length: usize,
    kind: u8,
    name: &'a CStr,
}

impl<'a> HostEntry<'a> {
    /// Where the name starts in `struct linux_dirent64`.
    const NAME: usize = 19;

    fn parse(bytes: &'a [u8]) -> Option<HostEntry<'a>> {
        let (ino, rest) = bytes.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_ne_bytes(*length));
        let name = bytes.get(HostEntry::NAME..length)?;
        Some(HostEntry {
            ino: u64::from_ne_bytes(*ino),
            offset: u64::from_ne_bytes(*offset),
            length,
            kind: *rest.first()?,
            name: CStr::from_bytes_until_nul(name).ok()?,
        })
    }
}

impl Stream {
    fn seek(&mut self, directory: BorrowedFd<'_>, offset: u64) -> Result<(), Errno> {
        if offset == self.offset {
            return Ok(());
        }
        rustix::fs::seek(directory, SeekFrom::Start(offset))?;
        self.buffer.clear();
        self.at = 0;
        self.offset = offset;
        Ok(())
    }

    /// Makes sure that there is an entry at `at`; false at the end of the directory.
    fn fill(&mut self, directory: BorrowedFd<'_>) -> Result<bool, Errno> {
        if self.at < self.buffer.len() {
            return Ok(true);
        }
        self.at = 0;
        self.buffer.resize(BUFFER, 0);
        // SAFETY: the kernel writes at most BUFFER bytes to the start of `buffer`, which has that length.
        let read = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory.as_raw_fd(),
                self.buffer.as_mut_ptr(),
                BUFFER,
            )
        };
        match usize::try_from(read) {
            Ok(length) => {
                self.buffer.truncate(length);
                Ok(length > 0)
            }
            Err(_) => {
                self.buffer.clear();
                let error = std::io::Error::last_os_error();
                Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
            }
        }
    }
}

impl Passthrough {
    pub(super) fn opendir(&self, node: NodeId) -> Result<abi::OpenOut, Errno> {
        self.directories.check_room()?;
        let open = self.open_directory(node)?;
        // The guest drops what it has cached of a directory when it changes it or sees that its times have changed.
        let open_flags = if self.inodes.nature(node)?.private {
            abi::FOPEN_CACHE_DIR | abi::FOPEN_KEEP_CACHE
        } else {
            0
        };
        Ok(abi::OpenOut {
            fh: self.directories.add(node, open)?,
            open_flags,
            backing_id: 0,
        })
    }

    pub(super) fn open_directory(&self, node: NodeId) -> Result<OpenDirectory, Errno> {
        let directory = self.inodes.directory(node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self.self_fd.reopen(directory.as_fd(), flags)?;
        let stat = self_fd::stat(&file)?;
        Ok(OpenDirectory {
            file: Arc::new(file),
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            stream: Mutex::default(),
        })
    }

    /// READDIR and, with `plus`, READDIRPLUS: appends entries to `reply` until `room` is used up.
    pub(super) fn readdir(
        &self,
        node: NodeId,
        input: &abi::ReadIn,
        plus: bool,
        room: usize,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let open = self.directories.get(node, input.fh)?;
        let directory = Directory {
            node,
            path: open.file.clone(),
        };
        let room = room.min(input.size as usize).min(LARGEST_REPLY);
        let mut stream = open.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.seek(open.file(), input.offset)?;
        let start = reply.len();
        loop {
            match stream.fill(open.file()) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // What was found so far first; the error comes again with the next request.
                Err(_) if reply.len() > start => return Ok(()),
                Err(error) => return Err(error),
            }
            let entry = HostEntry::parse(&stream.buffer[stream.at..]).ok_or(Errno::IO)?;
            let size = entry_size(entry.name, plus);
            if reply.len() - start + size > room {
                // A buffer that cannot take a single entry is the guest's mistake.
                return if reply.len() > start {
                    Ok(())
                } else {
                    Err(Errno::INVAL)
                };
            }
            self.put_entry(&directory, open.device, &entry, plus, reply)?;
            let (length, offset) = (entry.length, entry.offset);
            stream.at += length;
            stream.offset = offset;
        }
    }

    fn put_entry(
        &self,
        directory: &Directory,
        device: (u32, u32),
        entry: &HostEntry<'_>,
        plus: bool,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let is_dot = matches!(entry.name.to_bytes(), b"." | b"..");
        let mut ino = self.inodes.number(device, entry.ino);
        let mut kind = u32::from(entry.kind);
        if plus {
            // Neither is one that the guest must forget again: they are not looked up. What is gone meanwhile is
            // listed all the same, as it may be with readdir(3).
            let found = if is_dot {
                abi::EntryOut::default()
            } else {
                self.entry(directory, entry.name).unwrap_or_default()
            };
            if found.nodeid != 0 {
                ino = found.attr.ino;
                kind = (found.attr.mode & libc::S_IFMT) >> 12;
            }
            reply.extend_from_slice(found.as_slice());
        }
        if entry.name.to_bytes() == b".." && directory.node == abi::ROOT_ID {
            // What is above the share is nobody's business.
            let stat = self_fd::stat(directory)?;
            ino = self.inodes.number(device, stat.stx_ino);
        }
        if FileType::from_raw_mode(kind << 12) == FileType::Unknown {
            kind = 0;
        }
        let name = entry.name.to_bytes();
        let head = abi::Dirent {
            ino,
            off: entry.offset,
            namelen: u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?,
            kind,
        };
        reply.extend_from_slice(head.as_slice());
        reply.extend_from_slice(name);
        reply.resize(reply.len().next_multiple_of(abi::DIRENT_ALIGN), 0);
        Ok(())
    }

    pub(super) fn releasedir(&self, node: NodeId, handle: u64) -> Result<(), Errno> {
        self.directories.remove(node, handle)
    }

    pub(super) fn fsyncdir(&self, node: NodeId, input: &abi::FsyncIn) -> Result<(), Errno> {
        let open = self.directories.get(node, input.fh)?;
        file::sync(open.file(), input)
    }
}

fn entry_size(name: &CStr, plus: bool) -> usize {
    let head = size_of::<abi::Dirent>() + if plus { size_of::<abi::EntryOut>() } else { 0 };
    (head + name.count_bytes()).next_multiple_of(abi::DIRENT_ALIGN)
}
