// SPDX-License-Identifier: Apache-2.0
//! What all containers share: the event loop's registrations, the connection to the host, the
//! children, the share.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use agent_protocol::{
    AgentError, CONTROL_PORT, ErrorKind, Event, FrameReader, FromAgent, Reply, ToAgent, encode,
};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::channel::Channel;
use crate::early;
use crate::error::{Result, Stage};
use crate::poll::Poll;
use crate::stdio::{BUFFER, Side};
use crate::transport::Transport;

/// A process: its container, and the host's number for it.
pub(crate) type Key = (Rc<str>, u32);

/// What an event is about.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Control,
    Signals,
    /// `cgroup.events` of a container.
    Cgroup(Rc<str>),
    /// `memory.events` of a container.
    Memory(Rc<str>),
    Channel(Key),
    Stream(Key, u8, Side),
}

/// Who waits for the end of a child.
#[derive(Debug)]
pub(crate) enum Owner {
    Process(Key),
    /// The answer to a request of this number.
    Change {
        number: u64,
        channel: Channel,
    },
}

/// Replies and events that the host does not read are kept up to here; then it is taken for gone.
const MAX_OUTBOX: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("control connection: closed by the host")]
    Closed,
    #[error("control connection: {0}")]
    System(#[from] Errno),
    #[error("control connection: {0}")]
    Frame(#[from] agent_protocol::FrameError),
    #[error("control connection: the host does not read")]
    Stalled,
}

/// The control connection.
#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    reader: FrameReader,
    outbox: Vec<u8>,
}

impl Control {
    pub(crate) fn send(&mut self, message: &FromAgent) {
        match encode(message) {
            Ok(frame) => self.outbox.extend(frame),
            Err(cause) => log::error!("message to the host: {cause}"),
        }
    }

    /// Writes as much as the host takes.
    pub(crate) fn flush(&mut self) -> std::result::Result<(), ControlError> {
        while !self.outbox.is_empty() {
            match send(&self.socket, &self.outbox, SendFlags::NOSIGNAL) {
                Ok(length) => drop(self.outbox.drain(..length)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.outbox.len() > MAX_OUTBOX => {
                    return Err(ControlError::Stalled);
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The next request that has arrived.
    pub(crate) fn receive(
        &mut self,
        scratch: &mut [u8],
    ) -> std::result::Result<Option<ToAgent>, ControlError> {
        loop {
            if let Some(request) = self.reader.next()? {
                return Ok(Some(request));
            }
            match recv(&self.socket, &mut *scratch, RecvFlags::empty()) {
                Ok((0, _)) => return Err(ControlError::Closed),
                Ok((length, _)) => self.reader.push(&scratch[..length]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Where the share comes from.
#[derive(Debug)]
pub(crate) enum ShareSource {
    VirtioFs,
    Directory(PathBuf),
}

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) poll: Poll<Source>,
    pub(crate) control: Control,
    pub(crate) transport: Transport,
    pub(crate) cgroup_root: PathBuf,
    share_source: ShareSource,
    share: Option<OwnedFd>,
    /// The agent's own, by which it comes back to its pid namespace.
    pub(crate) own: OwnedFd,
    /// By pid.
    pub(crate) children: BTreeMap<i32, Owner>,
    /// Streams that used up their turn.
    pub(crate) again: BTreeSet<(Key, u8)>,
    pub(crate) scratch: Vec<u8>,
}

impl Core {
    /// Connects to the host.
    pub(crate) fn new(
        transport: Transport,
        share_source: ShareSource,
        cgroup_root: PathBuf,
    ) -> Result<Core> {
        let socket = transport
            .connect_and_wait(CONTROL_PORT)
            .stage("connect to the host")?;
        let mut poll = Poll::new().stage("epoll")?;
        poll.add(&socket, Source::Control).stage("epoll")?;
        Ok(Core {
            poll,
            control: Control {
                socket,
                reader: FrameReader::default(),
                outbox: Vec::new(),
            },
            transport,
            cgroup_root,
            share_source,
            share: None,
            own: pidfd_open(getpid(), PidfdFlags::empty()).stage("pidfd")?,
            children: BTreeMap::new(),
            again: BTreeSet::new(),
            scratch: vec![0; BUFFER],
        })
    }

    /// The share, mounted when it is first needed: before, the slot may be unplugged.
    pub(crate) fn share(&mut self) -> Result<BorrowedFd<'_>> {
        let share = match self.share.take() {
            Some(share) => share,
            None => match &self.share_source {
                ShareSource::VirtioFs => early::mount_share()?,
                ShareSource::Directory(path) => early::open_share(path)?,
            },
        };
        let share: &OwnedFd = self.share.insert(share);
        Ok(share.as_fd())
    }

    /// Writes back and detaches the share.
    pub(crate) fn release_share(&mut self) -> Result<()> {
        let Some(share) = self.share.take() else {
            return Ok(());
        };
        // A handle cannot be written back.
        openat(
            &share,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(rustix::fs::syncfs)
        .stage("share: write back")?;
        drop(share);
        match self.share_source {
            ShareSource::VirtioFs => early::unmount_share(),
            ShareSource::Directory(_) => Ok(()),
        }
    }

    pub(crate) fn reply(&mut self, number: u64, result: std::result::Result<Reply, AgentError>) {
        self.control.send(&FromAgent::Reply { number, result });
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.control.send(&FromAgent::Event(event));
    }
}

pub(crate) fn state_error(message: &str) -> AgentError {
    crate::error::error(ErrorKind::State, message)
}
