// SPDX-License-Identifier: Apache-2.0
//! Framed messages and file descriptors over a Unix stream socket. The monitor uses it without ever
//! blocking, the verbs with a deadline; the socket itself may be in either mode.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use agent_protocol::{FrameError, FrameReader, encode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};

/// Most file descriptors in one message, and most that wait for theirs.
pub const MAX_FDS: usize = 8;

const READ: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the other side closed the connection")]
    Closed,
    #[error("no answer in time")]
    TimedOut,
    #[error("send a message")]
    Send(#[source] io::Error),
    #[error("receive a message")]
    Receive(#[source] io::Error),
    #[error("wait for a message")]
    Wait(#[source] io::Error),
    #[error("message")]
    Frame(#[from] FrameError),
    #[error("message with {0} file descriptors where another number was announced")]
    Descriptors(usize),
}

#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    reader: FrameReader,
    received: VecDeque<OwnedFd>,
    outgoing: Vec<u8>,
}

impl Channel {
    pub fn new(socket: OwnedFd) -> Self {
        Channel {
            socket,
            reader: FrameReader::default(),
            received: VecDeque::new(),
            outgoing: Vec::new(),
        }
    }

    /// Two connected ends, closed on exec.
    pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC;
        Ok(socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            flags,
            None,
        )?)
    }

    /// Queues a message and sends what the socket takes now.
    pub fn send<T: Serialize>(&mut self, message: &T) -> Result<(), Error> {
        self.outgoing.extend_from_slice(&encode(message)?);
        self.flush()
    }

    pub fn flush(&mut self) -> Result<(), Error> {
        self.flush_with(&[])
    }

    pub fn wants_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Bytes that wait to be sent.
    pub fn backlog(&self) -> usize {
        self.outgoing.len()
    }

    fn flush_with(&mut self, mut fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        while !self.outgoing.is_empty() {
            match send_once(self.socket.as_fd(), &self.outgoing, fds) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                    fds = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::Closed),
                Err(error) => return Err(Error::Send(error.into())),
            }
        }
        if fds.is_empty() {
            Ok(())
        } else {
            Err(Error::Send(Errno::AGAIN.into()))
        }
    }

    /// Sends a whole message and its descriptors, waiting where the socket is full.
    pub fn send_all<T: Serialize>(
        &mut self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), Error> {
        while self.wants_to_write() {
            wait(self.socket.as_fd(), PollFlags::OUT, deadline)?;
            self.flush()?;
        }
        self.outgoing.extend_from_slice(&encode(message)?);
        self.flush_with(fds)?;
        while self.wants_to_write() {
            wait(self.socket.as_fd(), PollFlags::OUT, deadline)?;
            self.flush()?;
        }
        Ok(())
    }

    /// Reads once from the socket. False: there was nothing to read.
    pub fn fill(&mut self) -> Result<bool, Error> {
        let mut bytes = [0; READ];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        let message = match recvmsg(&self.socket, slices, &mut control, flags) {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(Errno::CONNRESET) => return Err(Error::Closed),
            Err(error) => return Err(Error::Receive(error.into())),
        };
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                self.received.extend(fds);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.received.len() > MAX_FDS {
            return Err(Error::Descriptors(self.received.len()));
        }
        if message.bytes == 0 {
            return Err(Error::Closed);
        }
        self.reader.push(&bytes[..message.bytes]);
        Ok(true)
    }

    /// The next message that has been read as a whole.
    #[allow(
        clippy::should_implement_trait,
        reason = "the type is the caller's choice"
    )]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        Ok(self.reader.next()?)
    }

    /// The descriptors of the message that [`next`](Self::next) has just returned.
    pub fn take_fds(&mut self, count: usize) -> Result<Vec<OwnedFd>, Error> {
        if self.received.len() < count {
            return Err(Error::Descriptors(self.received.len()));
        }
        Ok(self.received.drain(..count).collect())
    }

    /// Waits for the next message.
    pub fn receive<T: DeserializeOwned>(&mut self, deadline: Option<Instant>) -> Result<T, Error> {
        loop {
            if let Some(message) = self.next()? {
                return Ok(message);
            }
            wait(self.socket.as_fd(), PollFlags::IN, deadline)?;
            self.fill()?;
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends bytes with descriptors attached to the first of them. Returns the number of bytes taken.
pub fn send_once(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Waits until a descriptor is ready.
pub fn wait(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Option<Instant>) -> Result<(), Error> {
    poll_until(&mut [PollFd::new(&fd, flags)], deadline)
}

/// Waits until one of the descriptors is ready, which their `revents` tell.
pub fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> Result<(), Error> {
    loop {
        match poll(fds, remaining(deadline).as_ref()) {
            Ok(0) => return Err(Error::TimedOut),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::Wait(error.into())),
        }
    }
}

/// Waits until one of several descriptors can be read.
pub fn wait_for_any(fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<(), Error> {
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    poll_until(&mut fds, deadline)
}

/// The time until a deadline as the system calls want it; none: for ever.
pub fn remaining(deadline: Option<Instant>) -> Option<Timespec> {
    let left = deadline?.saturating_duration_since(Instant::now());
    Timespec::try_from(left).ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;

    fn channels() -> (Channel, Channel) {
        let (one, other) = Channel::pair().unwrap();
        (Channel::new(one), Channel::new(other))
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(5))
    }

    #[test]
    fn messages_larger_than_the_socket_buffer_arrive() {
        let (mut one, mut other) = channels();
        let text = "x".repeat(3 << 20);
        let sent = text.clone();
        let sender = std::thread::spawn(move || one.send_all(&sent, &[], soon()).unwrap());
        assert_eq!(other.receive::<String>(soon()).unwrap(), text);
        sender.join().unwrap();
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (mut one, mut other) = channels();
        let null = File::open("/dev/null").unwrap();
        let zero = File::open("/dev/zero").unwrap();
        one.send_all(&1u8, &[null.as_fd()], soon()).unwrap();
        one.send_all(&2u8, &[zero.as_fd(), null.as_fd()], soon())
            .unwrap();
        let name = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_rdev & 0xff;
        assert_eq!(other.receive::<u8>(soon()).unwrap(), 1);
        assert_eq!(name(&other.take_fds(1).unwrap()[0]), 3);
        assert_eq!(other.receive::<u8>(soon()).unwrap(), 2);
        let fds = other.take_fds(2).unwrap();
        assert_eq!(fds.iter().map(name).collect::<Vec<_>>(), [5, 3]);
        assert!(matches!(other.take_fds(1), Err(Error::Descriptors(0))));
    }

    #[test]
    fn more_descriptors_than_allowed_are_an_error() {
        let (mut one, mut other) = channels();
        let null = File::open("/dev/null").unwrap();
        let fds = [null.as_fd(); MAX_FDS];
        one.send_all(&1u8, &fds, soon()).unwrap();
        other.fill().unwrap();
        one.send_all(&2u8, &fds, soon()).unwrap();
        assert!(matches!(other.fill(), Err(Error::Descriptors(_))));
    }

    #[test]
    fn silence_and_end_are_told_apart() {
        let (one, mut other) = channels();
        let past = Some(Instant::now());
        assert!(matches!(other.receive::<u8>(past), Err(Error::TimedOut)));
        drop(one);
        assert!(matches!(other.receive::<u8>(soon()), Err(Error::Closed)));
    }
}
