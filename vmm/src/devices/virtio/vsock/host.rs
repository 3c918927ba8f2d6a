// SPDX-License-Identifier: Apache-2.0
//! The host's file descriptors, whatever they are, used so that the event loop neither blocks nor spins.
//!
//! Readiness comes edge-triggered from an epoll instance and is kept by the caller as a flag: it is set by an event
//! and cleared by [`std::io::ErrorKind::WouldBlock`]. So a hang-up is heard once, and a descriptor that nobody
//! can serve at the moment costs nothing.
//!
//! The descriptors are shared with other processes, so their O_NONBLOCK is never touched.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FileType, OFlags};

use super::super::chain::Iovecs;

/// What a blocking FIFO that is ready has room for: PIPE_BUF.
const FIFO_ROOM: usize = 4096;

/// What a terminal that is ready takes for sure if output processing leaves it alone: the smallest of the buffers
/// of a pseudo-terminal.
const TERMINAL_ROOM: usize = 256;

/// What to be told about a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    Input,
    Output,
}

/// How a descriptor is asked not to block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// epoll refuses it: regular files and most of the memory devices. It never blocks for long.
    AlwaysReady,
    /// MSG_DONTWAIT.
    Socket,
    /// RWF_NOWAIT, which pipes have but FIFOs do not: the first attempt tells.
    NoWait,
    /// The description has O_NONBLOCK.
    NonBlocking,
    /// A FIFO in blocking mode: poll first, then write only what surely fits.
    BlockingFifo,
    /// A terminal in blocking mode, the same; see [`terminal_room`].
    Terminal,
}

/// One direction of a host stream.
#[derive(Debug)]
pub(super) struct HostFd {
    fd: OwnedFd,
    epoll: Arc<OwnedFd>,
    access: Access,
    watched: bool,
}

impl HostFd {
    pub(super) fn new(fd: OwnedFd, epoll: &Arc<OwnedFd>) -> io::Result<HostFd> {
        let probe = epoll::EventData::new_u64(0);
        let access = match epoll::add(epoll, &fd, probe, epoll::EventFlags::empty()) {
            Ok(()) => {
                epoll::delete(epoll, &fd)?;
                match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
                    FileType::Socket => Access::Socket,
                    FileType::Fifo => Access::NoWait,
                    _ if is_non_blocking(&fd)? => Access::NonBlocking,
                    _ => Access::Terminal,
                }
            }
            Err(rustix::io::Errno::PERM) => Access::AlwaysReady,
            Err(error) => return Err(error.into()),
        };
        Ok(HostFd {
            fd,
            epoll: Arc::clone(epoll),
            access,
            watched: false,
        })
    }

    /// Bytes have to be written from the host's own memory.
    pub(super) fn needs_copy(&self) -> bool {
        self.access == Access::Terminal
    }

    /// Asks for events with `token`; the first comes at once if the descriptor is ready. Nothing comes for a
    /// descriptor that is always ready.
    pub(super) fn watch(&mut self, token: u64, interest: Interest) -> io::Result<()> {
        if self.watched || self.access == Access::AlwaysReady {
            return Ok(());
        }
        let flags = match interest {
            Interest::Input => epoll::EventFlags::IN | epoll::EventFlags::RDHUP,
            Interest::Output => epoll::EventFlags::OUT,
        };
        let data = epoll::EventData::new_u64(token);
        epoll::add(&self.epoll, &self.fd, data, flags | epoll::EventFlags::ET)?;
        self.watched = true;
        Ok(())
    }

    /// No more events.
    pub(super) fn unwatch(&mut self) {
        if self.watched {
            // Fails only if it is not watched.
            let _ = epoll::delete(&self.epoll, &self.fd);
            self.watched = false;
        }
    }

    /// Reads into guest memory. 0 is the end of the stream, provided that there is room.
    pub(super) fn read(&mut self, room: &Iovecs<'_>) -> io::Result<usize> {
        loop {
            let result = match self.access {
                Access::AlwaysReady | Access::NonBlocking => self.readv(room),
                Access::Socket => self.recvmsg(room),
                Access::NoWait => self.preadv2(room),
                Access::BlockingFifo | Access::Terminal => {
                    self.poll(PollFlags::IN).and_then(|()| self.readv(room))
                }
            };
            if !self.try_again(&result)? {
                return self.never_again(result);
            }
        }
    }

    /// Writes some of `source`.
    pub(super) fn write(&mut self, source: Source<'_>) -> io::Result<usize> {
        loop {
            let result = match self.access {
                Access::AlwaysReady | Access::NonBlocking => self.writev(source),
                Access::Socket => self.sendmsg(source),
                Access::NoWait => self.pwritev2(source),
                Access::BlockingFifo => self.write_ready(source, FIFO_ROOM),
                Access::Terminal => self.write_ready(source, terminal_room(source)),
            };
            if !self.try_again(&result)? {
                return self.never_again(result);
            }
        }
    }

    /// Whether the same call has to be made again, perhaps by other means.
    fn try_again(&mut self, result: &io::Result<usize>) -> io::Result<bool> {
        let Err(error) = result else {
            return Ok(false);
        };
        if error.kind() == io::ErrorKind::Interrupted {
            return Ok(true);
        }
        if self.access == Access::NoWait && error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            self.access = match is_non_blocking(&self.fd)? {
                true => Access::NonBlocking,
                false => Access::BlockingFifo,
            };
            return Ok(true);
        }
        Ok(false)
    }

    /// A descriptor without readiness events that is not ready can only be given up.
    fn never_again(&self, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    && self.access == Access::AlwaysReady =>
            {
                Err(io::ErrorKind::Unsupported.into())
            }
            result => result,
        }
    }

    /// WouldBlock unless the descriptor is ready, or in a state that a call reports without blocking.
    fn poll(&self, flags: PollFlags) -> io::Result<()> {
        let mut fds = [PollFd::from_borrowed_fd(self.fd.as_fd(), flags)];
        match poll(&mut fds, Some(&Timespec::default()))? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }

    fn readv(&self, room: &Iovecs<'_>) -> io::Result<usize> {
        // SAFETY: `Iovecs` points to guest memory that stays mapped while it is borrowed, and that is only ever
        // accessed as raw bytes, so that the kernel may write any value to it.
        returned(unsafe { libc::readv(self.fd.as_raw_fd(), room.as_ptr(), count(room)) })
    }

    fn preadv2(&self, room: &Iovecs<'_>) -> io::Result<usize> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: as in `readv`. Offset -1 stands for the position of the description.
        returned(unsafe { libc::preadv2(fd, room.as_ptr(), count(room), -1, libc::RWF_NOWAIT) })
    }

    fn recvmsg(&self, room: &Iovecs<'_>) -> io::Result<usize> {
        let mut message = message(room);
        // SAFETY: as in `readv` for the vectors that `message` points to; it has neither name nor control buffer.
        returned(unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
    }

    /// Writes the first `room` bytes at most, if the descriptor is ready.
    fn write_ready(&self, source: Source<'_>, mut room: usize) -> io::Result<usize> {
        self.poll(PollFlags::OUT)?;
        let mut clipped = [NO_BYTES; CLIPPED];
        for (iovec, original) in clipped.iter_mut().zip(source.iovecs()) {
            iovec.iov_base = original.iov_base;
            iovec.iov_len = original.iov_len.min(room);
            room -= iovec.iov_len;
        }
        let fd = self.fd.as_raw_fd();
        // SAFETY: as in `writev`: the vectors are no longer than those of `source`.
        returned(unsafe { libc::writev(fd, clipped.as_ptr(), count(&clipped)) })
    }

    fn writev(&self, source: Source<'_>) -> io::Result<usize> {
        let iovecs = source.iovecs();
        // SAFETY: the vectors point to memory that is mapped while `source` is borrowed; the kernel only reads it.
        returned(unsafe { libc::writev(self.fd.as_raw_fd(), iovecs.as_ptr(), count(iovecs)) })
    }

    fn pwritev2(&self, source: Source<'_>) -> io::Result<usize> {
        let iovecs = source.iovecs();
        let fd = self.fd.as_raw_fd();
        // SAFETY: as in `writev`. Offset -1 stands for the position of the description.
        returned(unsafe {
            libc::pwritev2(fd, iovecs.as_ptr(), count(iovecs), -1, libc::RWF_NOWAIT)
        })
    }

    fn sendmsg(&self, source: Source<'_>) -> io::Result<usize> {
        let message = message(source.iovecs());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as in `writev` for the vectors that `message` points to; it has neither name nor control buffer.
        returned(unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, flags) })
    }
}

impl Drop for HostFd {
    /// The description may live on in another process, and with it what epoll knows about it.
    fn drop(&mut self) {
        self.unwatch();
    }
}

fn is_non_blocking(fd: &OwnedFd) -> io::Result<bool> {
    Ok(rustix::fs::fcntl_getfl(fd)?.contains(OFlags::NONBLOCK))
}

/// How much of `source` a terminal that is ready takes without blocking, whatever its modes. With output processing
/// each control character counts as a write of its own, for which there may be no room any more; other bytes go
/// as one. Nothing can be promised for bytes that the guest may change meanwhile.
fn terminal_room(source: Source<'_>) -> usize {
    let Source::Host(slices) = source else {
        return 1;
    };
    let bytes = slices.iter().find(|slice| !slice.is_empty());
    let plain = bytes.map_or(0, |bytes| {
        let bytes = bytes.iter().take(TERMINAL_ROOM);
        bytes.take_while(|byte| !byte.is_ascii_control()).count()
    });
    plain.max(1)
}

fn returned(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Bytes for a vectored write.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a> {
    Guest(&'a Iovecs<'a>),
    Host(&'a [IoSlice<'a>]),
}

impl Source<'_> {
    /// Pointers to memory that is mapped as long as the source is borrowed.
    fn iovecs(&self) -> &[libc::iovec] {
        match self {
            Source::Guest(iovecs) => iovecs,
            // SAFETY: IoSlice is documented to have the layout of iovec on Unix; the borrow is the same.
            Source::Host(slices) => unsafe {
                std::slice::from_raw_parts(slices.as_ptr().cast(), slices.len())
            },
        }
    }
}

/// How many pieces are kept of a write that is cut short.
const CLIPPED: usize = 8;

const NO_BYTES: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

fn message(iovecs: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is a C structure of integers and pointers, for which all zero bits are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len();
    message
}

fn count(iovecs: &[libc::iovec]) -> libc::c_int {
    // Anything beyond IOV_MAX is refused by the kernel, so that the clamp changes nothing.
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}
