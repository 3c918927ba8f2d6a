// SPDX-License-Identifier: Apache-2.0
//! Open regular files: their data goes straight between the host's page cache and guest memory.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::abi;
use super::credentials::Credentials;
use super::inodes::{NodeId, Version};
use super::name::Name;
use super::passthrough::{Passthrough, require_regular};
use super::self_fd;
use crate::devices::virtio::chain::{Iovecs, Reader, Writer};

/// The largest READ and WRITE, as told to the guest in INIT.
pub(super) const LARGEST_TRANSFER: u32 = 1 << 20;
/// A copy takes the thread of the file server: more is copied piece by piece, as copy_file_range(2) allows.
const LARGEST_COPY: u64 = 16 << 20;

/// Flags of open(2) that mean something to the host. The guest itself appends, so that its page cache can write
/// anywhere; O_DIRECT would pass on alignment rules of a device that it does not see.
const HOST_FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

#[derive(Debug)]
pub(super) struct OpenFile {
    file: OwnedFd,
    /// What it was opened with, for a snapshot.
    flags: OFlags,
}

impl OpenFile {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn reads(&self) -> bool {
        self.flags & OFlags::RWMODE != OFlags::WRONLY
    }

    pub(super) fn flags(&self) -> u32 {
        self.flags.bits()
    }
}

fn host_flags(flags: u32) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags) & HOST_FLAGS;
    if flags & OFlags::RWMODE == OFlags::RWMODE {
        return Err(Errno::INVAL);
    }
    Ok(flags)
}

impl Passthrough {
    pub(super) fn open(
        &self,
        credentials: &mut Credentials,
        node: NodeId,
        input: &abi::OpenIn,
    ) -> Result<abi::OpenOut, Errno> {
        require_regular(self.inodes.nature(node)?)?;
        self.files.check_room()?;
        let flags =
            host_flags(input.flags)? | (OFlags::from_bits_retain(input.flags) & OFlags::TRUNC);
        let path = self.inodes.path(node)?;
        let open = || self.self_fd.reopen(path.as_fd(), flags);
        let file = if input.open_flags & abi::OPEN_KILL_SUIDGID != 0 {
            credentials.drop_privileges_of_file(open)?
        } else {
            open()?
        };
        self.opened(node, file, flags)
    }

    /// Opens a file of a snapshot again.
    pub(super) fn open_again(&self, path: BorrowedFd<'_>, flags: u32) -> Result<OpenFile, Errno> {
        let flags = host_flags(flags)?;
        let file = self.self_fd.reopen(path, flags)?;
        Ok(OpenFile { file, flags })
    }

    fn opened(&self, node: NodeId, file: OwnedFd, flags: OFlags) -> Result<abi::OpenOut, Errno> {
        // What the guest has of the data is good if the file is as it was at the last open: then nobody but the guest
        // has written, and its writes go through its page cache.
        let version = Version::of(&self_fd::stat(&file)?);
        let flags = flags & HOST_FLAGS;
        let open_flags = if self.inodes.is_unchanged(node, version) {
            abi::FOPEN_KEEP_CACHE
        } else {
            0
        };
        Ok(abi::OpenOut {
            fh: self.files.add(node, OpenFile { file, flags })?,
            open_flags,
            backing_id: 0,
        })
    }

    pub(super) fn create(
        &self,
        credentials: &mut Credentials,
        owner: (u32, u32),
        parent: NodeId,
        input: &abi::CreateIn,
        name: Name<'_>,
    ) -> Result<(abi::EntryOut, abi::OpenOut), Errno> {
        let directory = self.inodes.directory(parent)?;
        self.files.check_room()?;
        let name = name.as_c_str();
        // Always exclusively: what exists may be anything and is looked at before it is opened.
        let flags = host_flags(input.flags)? | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(input.mode & 0o7777);
        let created = credentials.create_as(owner, input.umask, || {
            rustix::fs::openat(&directory, name, flags, mode)
        });
        match created {
            Ok(file) => {
                let stat = self_fd::stat(&file)?;
                let entry = self.entry_of(&directory, name, &stat)?;
                let open = self.opened(entry.nodeid, file, flags);
                self.with_entry(entry, open)
            }
            Err(Errno::EXIST) if input.flags & libc::O_EXCL.cast_unsigned() == 0 => {
                let entry = self.entry(&directory, name)?;
                let open = self.open(
                    credentials,
                    entry.nodeid,
                    &abi::OpenIn {
                        flags: input.flags,
                        open_flags: input.open_flags,
                    },
                );
                self.with_entry(entry, open)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn tmpfile(
        &self,
        credentials: &mut Credentials,
        owner: (u32, u32),
        parent: NodeId,
        input: &abi::CreateIn,
    ) -> Result<(abi::EntryOut, abi::OpenOut), Errno> {
        let directory = self.inodes.directory(parent)?;
        self.files.check_room()?;
        let flags = host_flags(input.flags)? | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(input.mode & 0o7777);
        let file = credentials.create_as(owner, input.umask, || {
            rustix::fs::openat(&directory, c".", flags, mode)
        })?;
        let stat = self_fd::stat(&file)?;
        let path = self.self_fd.reopen(file.as_fd(), OFlags::PATH)?;
        self.inodes
            .learn_mount(&stat, || self.self_fd.reopen(file.as_fd(), OFlags::PATH))?;
        let (node, nature) = self.inodes.add_nameless(parent, &stat, path)?;
        let entry = self.entry_out(node, nature, &stat);
        let open = self.opened(node, file, flags);
        self.with_entry(entry, open)
    }

    /// An entry whose file could not be opened is one that the guest does not hear of.
    fn with_entry(
        &self,
        entry: abi::EntryOut,
        open: Result<abi::OpenOut, Errno>,
    ) -> Result<(abi::EntryOut, abi::OpenOut), Errno> {
        match open {
            Ok(open) => Ok((entry, open)),
            Err(error) => {
                self.inodes.forget(entry.nodeid, 1);
                Err(error)
            }
        }
    }

    /// Returns how many bytes were put at the start of `data`.
    pub(super) fn read(
        &self,
        node: NodeId,
        input: &abi::ReadIn,
        data: &Writer<'_>,
    ) -> Result<usize, Errno> {
        let open = self.files.get(node, input.fh)?;
        let size = input.size.min(LARGEST_TRANSFER);
        let vectors = data.iovecs(size as usize);
        read_at(open.file(), &vectors, input.offset)
    }

    pub(super) fn write(
        &self,
        credentials: &mut Credentials,
        node: NodeId,
        input: &abi::WriteIn,
        data: &Reader<'_>,
    ) -> Result<abi::WriteOut, Errno> {
        let open = self.files.get(node, input.fh)?;
        if input.size as usize != data.remaining() || input.size > LARGEST_TRANSFER {
            return Err(Errno::INVAL);
        }
        let append = input.flags & libc::O_APPEND.cast_unsigned() != 0
            && input.write_flags & abi::WRITE_CACHE == 0;
        let vectors = data.iovecs(input.size as usize);
        let write = || write_at(open.file(), &vectors, input.offset, append);
        let size = if input.write_flags & abi::WRITE_KILL_SUIDGID != 0 {
            credentials.drop_privileges_of_file(write)?
        } else {
            write()?
        };
        Ok(abi::WriteOut {
            size: u32::try_from(size).unwrap_or(input.size),
            padding: 0,
        })
    }

    pub(super) fn release(&self, node: NodeId, handle: u64) -> Result<(), Errno> {
        self.files.remove(node, handle)
    }

    pub(super) fn fsync(&self, node: NodeId, input: &abi::FsyncIn) -> Result<(), Errno> {
        let open = self.files.get(node, input.fh)?;
        sync(open.file(), input)
    }

    pub(super) fn fallocate(&self, node: NodeId, input: &abi::FallocateIn) -> Result<(), Errno> {
        let open = self.files.get(node, input.fh)?;
        let mode = FallocateFlags::from_bits_retain(input.mode);
        rustix::fs::fallocate(open.file(), mode, input.offset, input.length)
    }

    pub(super) fn lseek(&self, node: NodeId, input: &abi::LseekIn) -> Result<abi::LseekOut, Errno> {
        let open = self.files.get(node, input.fh)?;
        let position = match input.whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(input.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(input.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = rustix::fs::seek(open.file(), position)?;
        Ok(abi::LseekOut { offset })
    }

    pub(super) fn copy_file_range(
        &self,
        node: NodeId,
        input: &abi::CopyFileRangeIn,
    ) -> Result<abi::WriteOut, Errno> {
        if input.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.files.get(node, input.fh_in)?;
        let to = self.files.get(input.nodeid_out, input.fh_out)?;
        let (mut offset_in, mut offset_out) = (input.off_in, input.off_out);
        let length = usize::try_from(input.len.min(LARGEST_COPY)).unwrap_or(0);
        let size = rustix::fs::copy_file_range(
            from.file(),
            Some(&mut offset_in),
            to.file(),
            Some(&mut offset_out),
            length,
        )?;
        Ok(abi::WriteOut {
            size: u32::try_from(size).map_err(|_| Errno::OVERFLOW)?,
            padding: 0,
        })
    }
}

/// FSYNC and FSYNCDIR.
pub(super) fn sync(file: BorrowedFd<'_>, input: &abi::FsyncIn) -> Result<(), Errno> {
    if input.fsync_flags & abi::FSYNC_FDATASYNC != 0 {
        rustix::fs::fdatasync(file)
    } else {
        rustix::fs::fsync(file)
    }
}

fn read_at(file: BorrowedFd<'_>, vectors: &Iovecs<'_>, offset: u64) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    let count = i32::try_from(vectors.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: `vectors` are `count` valid iovecs whose memory is guest memory that stays mapped while they live; only
    // the kernel writes through them, and nothing in this process holds a reference into guest memory.
    let read = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
    usize::try_from(read).map_err(|_| last_error())
}

fn write_at(
    file: BorrowedFd<'_>,
    vectors: &Iovecs<'_>,
    offset: u64,
    append: bool,
) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    let count = i32::try_from(vectors.len()).map_err(|_| Errno::INVAL)?;
    let flags = if append { libc::RWF_APPEND } else { 0 };
    // SAFETY: as for `read_at`; the kernel only reads.
    let written =
        unsafe { libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), count, offset, flags) };
    usize::try_from(written).map_err(|_| last_error())
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
