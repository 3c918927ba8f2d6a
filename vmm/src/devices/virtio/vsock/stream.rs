// SPDX-License-Identifier: Apache-2.0
//! The two directions of a host stream: [`Inlet`] towards the guest, [`Outlet`] with the buffer for what the guest
//! sends faster than the host takes.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use super::super::chain::{Iovecs, Reader};
use super::host::{HostFd, Interest, Source};

/// A packet up to this size is cheaper to copy than to write by itself: it waits for the end of the batch.
const SMALL: usize = 4096;

/// Copied bytes are written when there are this many, without waiting for the end of the batch.
const BATCH: usize = 64 * 1024;

/// The host's input.
#[derive(Debug)]
pub(super) struct Inlet {
    fd: HostFd,
    /// An attempt to read may find something.
    ready: bool,
}

impl Inlet {
    pub(super) fn new(fd: HostFd) -> Inlet {
        Inlet { fd, ready: true }
    }

    pub(super) fn watch(&mut self, token: u64) -> io::Result<()> {
        self.fd.watch(token, Interest::Input)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn set_ready(&mut self) {
        self.ready = true;
    }

    /// Reads into guest memory; `None`, and not ready any more, if there is nothing. 0 is the end.
    pub(super) fn read(&mut self, room: &Iovecs<'_>) -> io::Result<Option<usize>> {
        match self.fd.read(room) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.ready = false;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// The host's output. An error of any method means that it takes no more.
#[derive(Debug)]
pub(super) struct Outlet {
    fd: HostFd,
    token: u64,
    /// An attempt to write may succeed.
    ready: bool,
    /// What the guest sent and `fd` has not taken. The caller bounds it.
    buffer: VecDeque<u8>,
}

impl Outlet {
    pub(super) fn new(fd: HostFd, token: u64) -> Outlet {
        Outlet {
            fd,
            token,
            ready: true,
            buffer: VecDeque::new(),
        }
    }

    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// What the host has not taken yet.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.buffer.iter().copied().collect()
    }

    /// Begins with bytes that an earlier outlet of the stream has left.
    pub(super) fn preload(&mut self, bytes: Vec<u8>) {
        self.buffer = bytes.into();
    }

    /// Takes `len` bytes of `payload`, which has them: straight to the host where possible, else into the buffer.
    /// `flush` at the end of the batch writes what should not wait for more.
    pub(super) fn accept(&mut self, payload: &mut Reader<'_>, len: usize) -> io::Result<()> {
        let direct = len > SMALL && self.buffer.is_empty() && !self.fd.needs_copy();
        let mut left = len;
        while direct && left > 0 && self.ready {
            let iovecs = payload.iovecs(left);
            let Some(written) = self.write(|fd, _| fd.write(Source::Guest(&iovecs)))? else {
                break;
            };
            payload.skip(written).map_err(io::Error::other)?;
            left -= written;
        }
        self.append(payload, left)?;
        if self.buffer.len() >= BATCH {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes as much of the buffer as the host takes; an event follows when it takes more.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.ready && !self.buffer.is_empty() {
            let written = self.write(|fd, buffer| {
                let (front, back) = buffer.as_slices();
                fd.write(Source::Host(&[IoSlice::new(front), IoSlice::new(back)]))
            })?;
            self.buffer.drain(..written.unwrap_or(0));
        }
        if self.buffer.is_empty() && self.buffer.capacity() > 2 * BATCH {
            self.buffer = VecDeque::new();
        }
        Ok(())
    }

    /// The host takes more, or never will again.
    pub(super) fn set_ready(&mut self) {
        self.ready = true;
        if self.buffer.is_empty() {
            // Each read of a pipe's other end is an event, and nobody is interested.
            self.fd.unwatch();
        }
    }

    /// One attempt: how many bytes, or `None`, not ready any more and watched.
    fn write(
        &mut self,
        attempt: impl FnOnce(&mut HostFd, &VecDeque<u8>) -> io::Result<usize>,
    ) -> io::Result<Option<usize>> {
        match attempt(&mut self.fd, &self.buffer) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.ready = false;
                self.fd.watch(self.token, Interest::Output)?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn append(&mut self, payload: &mut Reader<'_>, len: usize) -> io::Result<()> {
        let old = self.buffer.len();
        let new = old + len;
        if new > self.buffer.capacity() {
            // Doubling by ourselves keeps the capacity within the caller's bound, a power of two.
            self.buffer.reserve_exact(new.next_power_of_two() - old);
        }
        self.buffer.resize(new, 0);
        let (front, back) = self.buffer.as_mut_slices();
        let in_front = old.min(front.len());
        let (front, back) = (&mut front[in_front..], &mut back[old - in_front..]);
        payload.read_exact(front).map_err(io::Error::other)?;
        payload.read_exact(back).map_err(io::Error::other)
    }
}
