// SPDX-License-Identifier: Apache-2.0
//! The streams of a process: bytes between a pipe or terminal in the guest and a socket to the host.
//!
//! Nothing here blocks and nothing is read that cannot be passed on: a host that does not read makes
//! the process wait, not the agent.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, read, write};
use rustix::net::{SendFlags, Shutdown, send, shutdown, sockopt};

use crate::poll::Token;
use crate::transport::Connection;

/// How much is moved at once, and the most that is held.
pub(crate) const BUFFER: usize = 64 << 10;

/// Buffers moved before others get their turn.
const ROUNDS: usize = 16;

/// What a pipe can hold at most (fs.pipe-max-size): as much as can have been written by a process
/// that has ended.
const MAX_LEFT: usize = 1 << 20;

/// A descriptor of a stream, as the event loop knows it.
#[derive(Debug)]
struct End {
    fd: OwnedFd,
    token: Option<Token>,
    readable: bool,
    writable: bool,
}

impl End {
    fn new(fd: OwnedFd) -> End {
        End {
            fd,
            token: None,
            readable: false,
            writable: false,
        }
    }
}

/// One direction.
#[derive(Debug, Default)]
struct Copy {
    /// Read but not written yet.
    pending: Vec<u8>,
    /// The source has ended.
    ended: bool,
    /// What may still be read, once the process has ended while others have its output open.
    left: Option<usize>,
}

#[derive(Debug, PartialEq, Eq)]
enum Copied {
    Blocked,
    /// There may be more to do.
    Again,
    /// Everything that the source had is written.
    Ended,
    /// The target takes no more.
    Refused,
}

impl Copy {
    fn run(&mut self, from: &mut End, to: &mut End, scratch: &mut [u8]) -> Copied {
        for _ in 0..ROUNDS {
            if !self.pending.is_empty() {
                if !to.writable {
                    return Copied::Blocked;
                }
                match write(&to.fd, &self.pending) {
                    Ok(length) => drop(self.pending.drain(..length)),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => to.writable = false,
                    Err(_) => return Copied::Refused,
                }
                continue;
            }
            if self.ended || self.left == Some(0) {
                return Copied::Ended;
            }
            if !from.readable && self.left.is_none() || !to.writable {
                return Copied::Blocked;
            }
            let most = self.left.unwrap_or(usize::MAX).min(scratch.len());
            match read(&from.fd, &mut scratch[..most]) {
                Ok(0) => self.ended = true,
                Ok(length) => {
                    self.left = self.left.map(|left| left - length);
                    if let Some(refused) = self.write_or_keep(to, &scratch[..length]) {
                        return refused;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.left.is_some() => self.ended = true,
                Err(Errno::AGAIN) => from.readable = false,
                // A terminal ends with EIO, a connection perhaps with a reset: an end like any other.
                Err(_) => self.ended = true,
            }
        }
        Copied::Again
    }

    fn write_or_keep(&mut self, to: &mut End, bytes: &[u8]) -> Option<Copied> {
        let written = match write(&to.fd, bytes) {
            Ok(length) => length,
            Err(Errno::INTR) => 0,
            Err(Errno::AGAIN) => {
                to.writable = false;
                0
            }
            Err(_) => return Some(Copied::Refused),
        };
        self.pending = bytes.get(written..).unwrap_or_default().to_vec();
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Input,
    Output,
    Both,
}

/// Which descriptor of a stream an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

#[derive(Debug)]
pub(crate) struct Stream {
    direction: Direction,
    host: End,
    /// The pipe or the terminal; a terminal is there only when the child has made it.
    guest: Option<End>,
    established: bool,
    input: Option<Copy>,
    output: Option<Copy>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    Waits,
    Again,
    /// Nothing more will come through: the stream is to be dropped.
    Closed,
}

impl Stream {
    pub(crate) fn new(
        connection: Connection,
        guest: Option<OwnedFd>,
        direction: Direction,
    ) -> Stream {
        Stream {
            direction,
            host: End::new(connection.socket),
            guest: guest.map(End::new),
            established: connection.established,
            input: (direction != Direction::Output).then(Copy::default),
            output: (direction != Direction::Input).then(Copy::default),
        }
    }

    pub(crate) fn set_guest(&mut self, fd: OwnedFd) {
        self.guest = Some(End::new(fd));
    }

    pub(crate) fn is_established(&self) -> bool {
        self.established
    }

    /// The terminal of the process, if this is one.
    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        let guest = self.guest.as_ref()?;
        (self.direction == Direction::Both).then(|| guest.fd.as_fd())
    }

    /// Descriptors that are not yet watched, to be given their tokens.
    pub(crate) fn unwatched(
        &mut self,
    ) -> impl Iterator<Item = (Side, BorrowedFd<'_>, &mut Option<Token>)> {
        let host = (Side::Host, Some(&mut self.host));
        let guest = (Side::Guest, self.guest.as_mut());
        [host, guest].into_iter().filter_map(|(side, end)| {
            let End { fd, token, .. } = end?;
            let fd: &OwnedFd = fd;
            token.is_none().then_some((side, fd.as_fd(), token))
        })
    }

    pub(crate) fn watched(&self) -> impl Iterator<Item = (BorrowedFd<'_>, Token)> {
        [Some(&self.host), self.guest.as_ref()]
            .into_iter()
            .flatten()
            .filter_map(|end| Some((end.fd.as_fd(), end.token?)))
    }

    /// Takes note of an event. An error is that of the connection attempt.
    pub(crate) fn event(&mut self, side: Side, flags: EventFlags) -> rustix::io::Result<Moved> {
        match side {
            Side::Host => {
                if !self.established {
                    sockopt::socket_error(&self.host.fd)??;
                    self.established = true;
                }
                self.host.readable = true;
                self.host.writable = true;
                if self.output.is_some() && self.is_host_gone(flags) {
                    return Ok(Moved::Closed);
                }
            }
            Side::Guest => {
                if let Some(guest) = &mut self.guest {
                    guest.readable = true;
                    guest.writable = true;
                }
                // Nobody reads the pipe any more. A terminal says the same by failing to be read.
                if self.direction == Direction::Input && flags.contains(EventFlags::ERR) {
                    return Ok(self.refuse_input());
                }
            }
        }
        Ok(Moved::Waits)
    }

    /// Whether the host takes no more output. That it sends no more input says nothing, so an end of
    /// file is not enough; sending nothing fails when the other end is closed.
    fn is_host_gone(&self, flags: EventFlags) -> bool {
        flags.intersects(EventFlags::ERR | EventFlags::HUP)
            || matches!(
                send(
                    &self.host.fd,
                    &[],
                    SendFlags::NOSIGNAL | SendFlags::DONTWAIT
                ),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN)
            )
    }

    /// Tells the host that no more input is taken.
    fn refuse_input(&mut self) -> Moved {
        // The connection may be gone already, which is the same.
        let _ = shutdown(&self.host.fd, Shutdown::Read);
        Moved::Closed
    }

    /// Moves what can be moved.
    pub(crate) fn run(&mut self, scratch: &mut [u8]) -> Moved {
        if !self.established {
            return Moved::Waits;
        }
        let Some(guest) = &mut self.guest else {
            return Moved::Waits;
        };
        let mut again = false;
        if let Some(input) = &mut self.input {
            match input.run(&mut self.host, guest, scratch) {
                Copied::Blocked => {}
                Copied::Again => again = true,
                // A terminal has no end of file that only one side could be given.
                Copied::Ended | Copied::Refused if self.direction == Direction::Both => {
                    self.input = None;
                }
                Copied::Ended => return Moved::Closed,
                Copied::Refused => return self.refuse_input(),
            }
        }
        if let Some(output) = &mut self.output {
            match output.run(guest, &mut self.host, scratch) {
                Copied::Blocked => {}
                Copied::Again => again = true,
                Copied::Ended | Copied::Refused => return Moved::Closed,
            }
        }
        if again { Moved::Again } else { Moved::Waits }
    }

    /// The process has ended. Input is of no use any more; output is read to its end or, if others may
    /// hold it open, as far as there is some now.
    pub(crate) fn process_ended(&mut self, to_the_end: bool) -> Moved {
        self.input = None;
        match &mut self.output {
            None => Moved::Closed,
            Some(output) => {
                if !to_the_end && output.left.is_none() {
                    output.left = Some(MAX_LEFT);
                }
                Moved::Again
            }
        }
    }
}
