// SPDX-License-Identifier: Apache-2.0
//! The handshake between the agent and the child that becomes a process of a container:
//!
//! | agent                                   | child                                        |
//! |-----------------------------------------|----------------------------------------------|
//! | id maps, limits; `proceed`              | waits                                        |
//! |                                         | builds its world; `ready` or `failed`, waits |
//! | cgroup files; `proceed` when started    |                                              |
//! |                                         | `failed`, or the exec closes the channel     |

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use agent_protocol::{AgentError, ErrorKind, FrameReader, encode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::error::{Result, Stage, error};

/// What a child says: that it is ready, with the descriptor number of its terminal or -1; or what
/// went wrong.
type Report = std::result::Result<RawFd, AgentError>;

pub(crate) fn channel() -> rustix::io::Result<(Channel, Upward)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let channel = Channel {
        socket: ours,
        reader: FrameReader::default(),
    };
    Ok((channel, Upward(theirs)))
}

/// The agent's end.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
    reader: FrameReader,
}

#[derive(Debug)]
pub(crate) enum Received {
    Nothing,
    Report(Report),
    /// The child has executed its program, or is gone.
    Closed,
}

impl Channel {
    pub(crate) fn proceed(&self) -> Result<()> {
        rustix::net::send(
            &self.socket,
            &[1],
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
        .map(drop)
        .stage("process set-up")
    }

    pub(crate) fn receive(&mut self) -> Received {
        let mut buffer = [0; 1024];
        loop {
            match self.reader.next() {
                Ok(Some(report)) => return Received::Report(report),
                Ok(None) => {}
                Err(cause) => {
                    let message = format!("process set-up: {cause}");
                    return Received::Report(Err(error(ErrorKind::System, message)));
                }
            }
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Received::Closed,
                Ok((length, _)) => self.reader.push(&buffer[..length]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Received::Nothing,
                Err(_) => return Received::Closed,
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The child's end.
#[derive(Debug)]
pub(crate) struct Upward(OwnedFd);

impl Upward {
    /// Waits for the agent. Uses read(2), which seccomp filters of containers allow.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut byte = [0];
        loop {
            return match rustix::io::read(&self.0, &mut byte) {
                Ok(0) => Err(error(ErrorKind::System, "process set-up: abandoned")),
                Ok(_) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => Err(errno).stage("process set-up"),
            };
        }
    }

    pub(crate) fn ready(&self, terminal: Option<&OwnedFd>) {
        self.report(&Ok(terminal.map_or(-1, AsRawFd::as_raw_fd)));
    }

    pub(crate) fn failed(&self, error: AgentError) {
        self.report(&Err(error));
    }

    /// When the agent cannot be told there is nobody to tell: the child's end follows, which it sees.
    fn report(&self, report: &Report) {
        let Ok(frame) = encode(report) else { return };
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            match rustix::io::write(&self.0, rest) {
                Ok(length) => rest = rest.get(length..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsRawFd for Upward {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_arrive_in_order_and_the_end_is_seen() {
        let (mut agent, child) = channel().unwrap();
        assert!(matches!(agent.receive(), Received::Nothing));
        child.ready(None);
        child.failed(error(ErrorKind::Plan, "x".repeat(3000)));
        drop(child);
        assert!(matches!(agent.receive(), Received::Report(Ok(-1))));
        let Received::Report(Err(report)) = agent.receive() else {
            panic!("expected the error");
        };
        assert_eq!(report.message.len(), 3000);
        assert!(matches!(agent.receive(), Received::Closed));
    }

    #[test]
    fn a_child_without_an_agent_is_told_to_give_up() {
        let (agent, child) = channel().unwrap();
        agent.proceed().unwrap();
        drop(agent);
        assert!(child.wait().is_ok());
        assert!(child.wait().is_err());
    }
}
