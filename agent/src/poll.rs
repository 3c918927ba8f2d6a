// SPDX-License-Identifier: Apache-2.0
//! One epoll for everything. Registration is edge-triggered and made once for each descriptor, so
//! that moving bytes costs no epoll_ctl(2).

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::{Errno, Result};

/// A registration. Numbers are never used twice, so an event that was already fetched when its
/// source was removed finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Token(u64);

#[derive(Debug)]
pub(crate) struct Poll<S> {
    epoll: OwnedFd,
    sources: BTreeMap<Token, S>,
    next: u64,
}

const BATCH: usize = 64;

impl<S: Clone> Poll<S> {
    pub(crate) fn new() -> Result<Poll<S>> {
        Ok(Poll {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            sources: BTreeMap::new(),
            next: 0,
        })
    }

    /// Watches both directions of a stream.
    pub(crate) fn add(&mut self, fd: impl AsFd, source: S) -> Result<Token> {
        self.register(
            fd,
            source,
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        )
    }

    /// Watches what is only read.
    pub(crate) fn add_reader(&mut self, fd: impl AsFd, source: S) -> Result<Token> {
        self.register(
            fd,
            source,
            EventFlags::IN | EventFlags::RDHUP | EventFlags::ET,
        )
    }

    /// Watches for changes of a file such as `cgroup.events`, level-triggered: until it is read.
    pub(crate) fn add_priority(&mut self, fd: impl AsFd, source: S) -> Result<Token> {
        self.register(fd, source, EventFlags::PRI)
    }

    fn register(&mut self, fd: impl AsFd, source: S, flags: EventFlags) -> Result<Token> {
        let token = Token(self.next);
        epoll::add(&self.epoll, fd, EventData::new_u64(token.0), flags)?;
        self.next += 1;
        self.sources.insert(token, source);
        Ok(token)
    }

    /// To be called before the descriptor is closed: a child that was just forked may still have a
    /// copy, which would keep the registration alive.
    pub(crate) fn remove(&mut self, fd: impl AsFd, token: Token) {
        if self.sources.remove(&token).is_some()
            && let Err(errno) = epoll::delete(&self.epoll, fd)
        {
            log::warn!("epoll: delete: {errno}");
        }
    }

    pub(crate) fn source(&self, token: Token) -> Option<S> {
        self.sources.get(&token).cloned()
    }

    /// Waits for events, or only looks for them.
    pub(crate) fn wait(&self, block: bool) -> Result<Vec<(Token, EventFlags)>> {
        let mut buffer = [MaybeUninit::<Event>::uninit(); BATCH];
        let timeout = (!block).then_some(Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        });
        match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => Ok(events
                .iter()
                .map(|event| (Token(event.data.u64()), event.flags))
                .collect()),
            Err(Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(errno),
        }
    }
}
