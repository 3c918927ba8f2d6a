// SPDX-License-Identifier: Apache-2.0
//! The host's file descriptors, whatever they are, used so that the event loop neither blocks nor spins.
//!
//! Readiness comes edge-triggered from an epoll instance and is kept by the caller as a flag: it is set by an event
//! and cleared by [`std::io::ErrorKind::WouldBlock`]. So a hang-up is heard once, and a descriptor that nobody
//! can serve at the moment costs nothing.
//!
//! The descriptors are shared with other processes, so their O_NONBLOCK is never touched.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::OFlags;
use vm_memory::VolatileSlice;

/// How many segments go into one system call; what is longer takes more calls.
const MAX_SEGMENTS: usize = 64;

/// How much is written to a blocking descriptor that is ready: PIPE_BUF, which a pipe has room for then.
const READY_ROOM: usize = 4096;

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
    /// RWF_NOWAIT; the first attempt that the file does not support it decides between the next two.
    NoWait,
    /// The description has O_NONBLOCK.
    NonBlocking,
    /// A terminal or FIFO in blocking mode: poll first, then only what surely fits.
    Blocking,
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
                let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
                match kind {
                    rustix::fs::FileType::Socket => Access::Socket,
                    _ => Access::NoWait,
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

    pub(super) fn is_watched(&self) -> bool {
        self.watched
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

    /// Reads at most `limit` bytes into guest memory. 0 is the end of the stream.
    pub(super) fn read(&mut self, space: &[VolatileSlice<'_>], limit: usize) -> io::Result<usize> {
        let segments = Segments::of_guest(space, 0, limit);
        loop {
            let result = match self.access {
                Access::AlwaysReady | Access::NonBlocking => self.readv(&segments),
                Access::Socket => self.recvmsg(&segments),
                Access::NoWait => self.preadv2(&segments),
                Access::Blocking => self.poll(PollFlags::IN).and_then(|()| self.readv(&segments)),
            };
            if !self.try_again(&result)? {
                return self.never_again(result);
            }
        }
    }

    /// Writes some of `segments`.
    pub(super) fn write(&mut self, segments: &mut Segments<'_>) -> io::Result<usize> {
        loop {
            let result = match self.access {
                Access::AlwaysReady | Access::NonBlocking => self.writev(segments),
                Access::Socket => self.sendmsg(segments),
                Access::NoWait => self.pwritev2(segments),
                Access::Blocking => {
                    segments.truncate(READY_ROOM);
                    self.poll(PollFlags::OUT).and_then(|()| self.writev(segments))
                }
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
            let flags = rustix::fs::fcntl_getfl(&self.fd)?;
            self.access = match flags.contains(OFlags::NONBLOCK) {
                true => Access::NonBlocking,
                false => Access::Blocking,
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

    fn readv(&self, segments: &Segments<'_>) -> io::Result<usize> {
        // SAFETY: `Segments::of_guest` built the array (`read` makes no other) from slices of guest memory that
        // are borrowed, hence mapped, until this call returns. Guest memory is only ever accessed as raw bytes, so
        // the kernel may write any value to it.
        result(unsafe { libc::readv(self.fd.as_raw_fd(), segments.as_ptr(), segments.count()) })
    }

    fn preadv2(&self, segments: &Segments<'_>) -> io::Result<usize> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: as in `readv`. Offset -1 stands for the position of the description.
        result(unsafe {
            libc::preadv2(fd, segments.as_ptr(), segments.count(), -1, libc::RWF_NOWAIT)
        })
    }

    fn recvmsg(&self, segments: &Segments<'_>) -> io::Result<usize> {
        let mut message = segments.message();
        // SAFETY: as in `readv` for the array that `message` points to; it has neither name nor control buffer.
        result(unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
    }

    fn writev(&self, segments: &Segments<'_>) -> io::Result<usize> {
        // SAFETY: the array was built from slices of guest memory or of host memory that are borrowed, hence
        // mapped, until this call returns; the kernel only reads from them.
        result(unsafe { libc::writev(self.fd.as_raw_fd(), segments.as_ptr(), segments.count()) })
    }

    fn pwritev2(&self, segments: &Segments<'_>) -> io::Result<usize> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: as in `writev`. Offset -1 stands for the position of the description.
        result(unsafe {
            libc::pwritev2(fd, segments.as_ptr(), segments.count(), -1, libc::RWF_NOWAIT)
        })
    }

    fn sendmsg(&self, segments: &Segments<'_>) -> io::Result<usize> {
        let message = segments.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as in `writev` for the array that `message` points to; it has neither name nor control buffer.
        result(unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, flags) })
    }
}

impl Drop for HostFd {
    /// The description may live on in another process, and with it what epoll knows about it.
    fn drop(&mut self) {
        self.unwatch();
    }
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// The memory of one vectored system call, which lives as long as `'a`.
#[derive(Debug)]
pub(super) struct Segments<'a> {
    iovecs: [libc::iovec; MAX_SEGMENTS],
    used: usize,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Segments<'a> {
    fn new() -> Segments<'a> {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Segments {
            iovecs: [empty; MAX_SEGMENTS],
            used: 0,
            memory: PhantomData,
        }
    }

    /// At most `limit` bytes of guest memory, after the first `skip`.
    pub(super) fn of_guest(
        slices: &'a [VolatileSlice<'a>],
        mut skip: usize,
        mut limit: usize,
    ) -> Segments<'a> {
        let mut segments = Segments::new();
        for slice in slices {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            let len = (slice.len() - skipped).min(limit);
            limit -= len;
            // Cannot fail: `skipped` is no more than the length.
            let Ok(rest) = slice.offset(skipped) else {
                break;
            };
            if !segments.push(rest.ptr_guard_mut().as_ptr(), len) {
                break;
            }
        }
        segments
    }

    /// The two halves of a ring buffer of the host, for writing only.
    pub(super) fn of_host(halves: (&'a [u8], &'a [u8])) -> Segments<'a> {
        let mut segments = Segments::new();
        segments.push(halves.0.as_ptr().cast_mut(), halves.0.len());
        segments.push(halves.1.as_ptr().cast_mut(), halves.1.len());
        segments
    }

    /// Whether there was room.
    fn push(&mut self, base: *mut u8, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        let Some(iovec) = self.iovecs.get_mut(self.used) else {
            return false;
        };
        *iovec = libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        };
        self.used += 1;
        true
    }

    /// Keeps the first `limit` bytes.
    fn truncate(&mut self, mut limit: usize) {
        for iovec in &mut self.iovecs[..self.used] {
            iovec.iov_len = iovec.iov_len.min(limit);
            limit -= iovec.iov_len;
        }
    }

    fn as_ptr(&self) -> *const libc::iovec {
        self.iovecs.as_ptr()
    }

    fn count(&self) -> libc::c_int {
        // No more than MAX_SEGMENTS.
        libc::c_int::try_from(self.used).unwrap_or(libc::c_int::MAX)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: msghdr is a C structure of integers and pointers, for which all zero bits are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.as_ptr().cast_mut();
        message.msg_iovlen = self.used;
        message
    }
}
