// SPDX-License-Identifier: Apache-2.0
//! The monitor's one loop: it waits for descriptors and deadlines, tells the [`Container`], and
//! carries out what that answers.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use agent_protocol::{Event, Request as AgentRequest};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm::{Machine, MachineEvent, SnapshotFiles, ThreadKind};

use super::checkpoint::Checkpoint;
use super::container::{Action, Asked, Container, Verb};
use super::order::{Failure, Report, chain};
use crate::agent_client::{AgentClient, Incoming};
use crate::channel::{Channel, Error as ChannelError, remaining};
use crate::control::{self, Reply, Request};
use crate::templates::Draft;
use crate::{console, signal_fd, stages};

/// A verb that lets more than this pile up has stopped reading.
const BACKLOG: usize = 8 << 20;

/// Verbs that may be connected at once.
const MAX_VERBS: usize = 4096;

/// Events taken from the kernel in one turn.
const EVENTS: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Machine,
    Agent,
    Listener,
    Signals,
    Creator,
    Verb(Verb),
}

impl Source {
    const FIRST_VERB: u64 = 16;

    fn token(self) -> EventData {
        EventData::new_u64(match self {
            Source::Machine => 0,
            Source::Agent => 1,
            Source::Listener => 2,
            Source::Signals => 3,
            Source::Creator => 4,
            Source::Verb(verb) => Self::FIRST_VERB + verb,
        })
    }

    fn of(token: u64) -> Source {
        match token {
            0 => Source::Machine,
            1 => Source::Agent,
            2 => Source::Listener,
            3 => Source::Signals,
            4 => Source::Creator,
            verb => Source::Verb(verb.saturating_sub(Self::FIRST_VERB)),
        }
    }
}

/// The loop ends with this exit status.
struct Exit(u8);

/// What this machine is to give to the templates.
#[derive(Debug, Default)]
pub struct Owed {
    /// The template that it is to fill.
    pub draft: Option<Draft>,
    /// The file for the pages that it uses, having been restored.
    pub working_set: Option<File>,
}

/// All that the loop waits for and acts upon.
#[derive(Debug)]
pub struct Parts {
    pub machine: Machine,
    pub owed: Owed,
    pub agent: AgentClient<Asked>,
    /// The guest was up when the machine was restored.
    pub agent_heard: bool,
    pub container: Container,
    /// What the container wants done before the guest boots.
    pub first: Vec<Action>,
    pub listener: OwnedFd,
    pub signals: OwnedFd,
    /// The host's side of the terminal of the init process, whose size is to be followed.
    pub terminal: Option<OwnedFd>,
    /// The user beside root whose verbs are accepted.
    pub owner: u32,
    /// Names of what the guest may see of the host's files.
    pub shares: Vec<String>,
}

#[derive(Debug)]
pub struct EventLoop {
    epoll: OwnedFd,
    machine: Machine,
    owed: Owed,
    agent: AgentClient<Asked>,
    agent_waits_to_write: bool,
    /// The agent has said something: the guest is up.
    agent_heard: bool,
    container: Container,
    first: Vec<Action>,
    creator: Option<Channel>,
    listener: OwnedFd,
    signals: OwnedFd,
    terminal: Option<OwnedFd>,
    owner: u32,
    shares: Vec<String>,
    verbs: BTreeMap<Verb, Channel>,
    next_verb: Verb,
}

impl EventLoop {
    pub fn new(parts: Parts, creator: Channel) -> io::Result<EventLoop> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |fd: BorrowedFd<'_>, source: Source| {
            epoll::add(&epoll, fd, source.token(), EventFlags::IN)
        };
        watch(parts.machine.as_fd(), Source::Machine)?;
        watch(parts.agent.as_fd(), Source::Agent)?;
        watch(creator.as_fd(), Source::Creator)?;
        watch(parts.listener.as_fd(), Source::Listener)?;
        watch(parts.signals.as_fd(), Source::Signals)?;
        Ok(EventLoop {
            epoll,
            machine: parts.machine,
            agent: parts.agent,
            agent_heard: parts.agent_heard,
            owed: parts.owed,
            agent_waits_to_write: false,
            container: parts.container,
            first: parts.first,
            creator: Some(creator),
            listener: parts.listener,
            signals: parts.signals,
            terminal: parts.terminal,
            owner: parts.owner,
            shares: parts.shares,
            verbs: BTreeMap::new(),
            next_verb: 0,
        })
    }

    /// Boots the guest and runs until the container is over. Returns the exit status of the process.
    pub fn run(&mut self) -> u8 {
        let Exit(status) = match self.turn_until_exit() {
            Ok(never) => match never {},
            Err(exit) => exit,
        };
        for action in self.container.farewell() {
            // It has ended already.
            let _ = self.perform_one(action);
        }
        stages::mark("exit");
        status
    }

    /// For the end of the process, which ends threads and VM quicker than waiting for each of them does.
    pub fn leave_to_kernel(mut self) {
        // Its files have names that would stay.
        drop(std::mem::take(&mut self.owed));
        std::mem::forget(self);
    }

    fn turn_until_exit(&mut self) -> Result<std::convert::Infallible, Exit> {
        let first = std::mem::take(&mut self.first);
        self.perform(first)?;
        if let Err(message) = self.start() {
            let actions = self.container.start_failed(message);
            self.perform(actions)?;
        }
        loop {
            let now = self.keep_deadlines()?;
            let deadlines = [
                self.container.deadline(now),
                self.agent.deadline(),
                self.machine.deadline(),
            ];
            for source in self.wait(deadlines.into_iter().flatten().min())? {
                let actions = self.handle(source);
                self.perform(actions)?;
            }
        }
    }

    /// Lets the guest run, once no thread of the monitor can do more than it needs.
    fn start(&mut self) -> Result<(), String> {
        self.machine.start().map_err(|error| chain(&error))?;
        if self.owed.draft.is_none() {
            vmm::drop_capabilities().map_err(|error| chain(&error))?;
        }
        vmm::confine(ThreadKind::EventLoop).map_err(|error| chain(&error))?;
        self.machine.resume();
        Ok(())
    }

    fn keep_deadlines(&mut self) -> Result<Instant, Exit> {
        let now = Instant::now();
        for asked in self.agent.overdue(now) {
            let actions = self.container.overdue(asked, now);
            self.perform(actions)?;
        }
        if self.machine.deadline().is_some_and(|due| due <= now) {
            let actions = self.machine_events();
            self.perform(actions)?;
        }
        let actions = self.container.time(now);
        self.perform(actions)?;
        Ok(now)
    }

    fn wait(&self, deadline: Option<Instant>) -> Result<Vec<Source>, Exit> {
        let mut events = Vec::with_capacity(EVENTS);
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, spare, remaining(deadline).as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("monitor: wait for events: {error}");
                return Err(Exit(1));
            }
        }
        let sources = events.iter().map(|event| Source::of(event.data.u64()));
        Ok(sources.collect())
    }

    fn handle(&mut self, source: Source) -> Vec<Action> {
        match source {
            Source::Machine => self.machine_events(),
            Source::Agent => self.agent_messages(),
            Source::Listener => self.accept_verb(),
            Source::Signals => self.signal(),
            Source::Creator => self.creator_gone(),
            Source::Verb(verb) => self.verb_ready(verb),
        }
    }

    fn machine_events(&mut self) -> Vec<Action> {
        let now = Instant::now();
        let events = match self.machine.dispatch() {
            Ok(events) => events,
            Err(error) => return self.container.agent_lost(chain(&error), now),
        };
        let mut actions = Vec::new();
        for event in events {
            actions.extend(match event {
                MachineEvent::StreamClosed { port } => self.container.stream_closed(port, now),
                MachineEvent::Saved(result) => {
                    self.publish(result);
                    Vec::new()
                }
                MachineEvent::Stopped(reason) => self.container.machine_stopped(&reason, now),
            });
        }
        actions
    }

    /// Nothing of a container has reached the guest yet: what is published is the kernel and the agent alone. The
    /// descriptors of the cache are closed before that changes.
    fn publish(&mut self, saved: Result<(), String>) {
        let Some(draft) = self.owed.draft.take() else {
            return;
        };
        let published = saved.and_then(|()| draft.publish().map_err(|error| error.to_string()));
        if let Err(error) = published {
            log::warn!("template: cannot be made: {error}");
        }
        // Nothing else is done by this thread that takes any.
        if let Err(error) = vmm::drop_capabilities() {
            log::error!("monitor: capabilities cannot be given up: {error}");
        }
    }

    /// Nothing that the container brings has run yet; the file is closed before it does.
    fn write_working_set(&mut self) {
        let Some(mut file) = self.owed.working_set.take() else {
            return;
        };
        let written = self.machine.working_set().map_err(|error| chain(&error));
        let written =
            written.and_then(|set| file.write_all(&set).map_err(|error| error.to_string()));
        if let Err(error) = written {
            log::warn!("template: its working set cannot be written: {error}");
        }
    }

    fn agent_messages(&mut self) -> Vec<Action> {
        let now = Instant::now();
        let incoming = self.agent.flush().and_then(|()| self.agent.receive());
        let mut actions = Vec::new();
        match incoming {
            Ok(incoming) => {
                if let Some(first) = incoming.first()
                    && !std::mem::replace(&mut self.agent_heard, true)
                {
                    self.mark_boot(first);
                }
                for message in incoming {
                    actions.extend(self.container.from_agent(message, now));
                }
                self.watch_agent();
            }
            Err(error) => {
                // The guest may be gone for a reason that the machine knows better.
                actions.extend(self.machine_events());
                // Nothing to wait for any more; not registered is as good.
                let _ = epoll::delete(&self.epoll, &self.agent);
                actions.extend(self.container.agent_lost(chain(&error), now));
            }
        }
        actions
    }

    /// Of a guest that was restored the agent is older than this start.
    fn mark_boot(&self, first: &Incoming<Asked>) {
        if let Incoming::Event(Event::Ready { age_ns, .. }) = first
            && !self.machine.is_restored()
        {
            stages::mark_ago("kernel", *age_ns);
        }
        stages::mark("agent");
    }

    /// Waits for the agent's socket to be writable only while something is to be written.
    fn watch_agent(&mut self) {
        let wants = self.agent.wants_to_write();
        if wants != self.agent_waits_to_write {
            self.agent_waits_to_write = wants;
            modify(&self.epoll, self.agent.as_fd(), Source::Agent, wants);
        }
    }

    fn accept_verb(&mut self) -> Vec<Action> {
        match control::accept(self.listener.as_fd(), self.owner) {
            Ok(Some(channel)) if self.verbs.len() < MAX_VERBS => {
                let verb = self.next_verb;
                self.next_verb += 1;
                let token = Source::Verb(verb).token();
                if epoll::add(&self.epoll, &channel, token, EventFlags::IN).is_ok() {
                    self.verbs.insert(verb, channel);
                }
            }
            Ok(_) => {}
            Err(error) => log::warn!("monitor: accept a connection: {error}"),
        }
        Vec::new()
    }

    fn verb_ready(&mut self, verb: Verb) -> Vec<Action> {
        let now = Instant::now();
        let mut actions = Vec::new();
        let Some(channel) = self.verbs.get_mut(&verb) else {
            return actions;
        };
        let mut result = channel.flush().and_then(|()| channel.fill().map(drop));
        modify(
            &self.epoll,
            channel.as_fd(),
            Source::Verb(verb),
            channel.wants_to_write(),
        );
        while result.is_ok() {
            match next_request(channel) {
                Ok(Some((request, fds))) => {
                    actions.extend(self.container.request(verb, request, fds, now));
                }
                Ok(None) => return actions,
                Err(error) => result = Err(error),
            }
        }
        self.verbs.remove(&verb);
        actions.extend(self.container.verb_gone(verb, now));
        actions
    }

    fn signal(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        while let Some(signal) = signal_fd::next(self.signals.as_fd()) {
            actions.extend(match &self.terminal {
                Some(terminal) if signal == libc::SIGWINCH => match console::size(terminal.as_fd())
                {
                    Ok(size) => self.container.resized(size),
                    Err(_) => Vec::new(),
                },
                _ => self.container.signal(signal, Instant::now()),
            });
        }
        actions
    }

    /// The creating verb says nothing any more: it can only have gone.
    fn creator_gone(&mut self) -> Vec<Action> {
        if let Some(creator) = self.creator.take() {
            let _ = epoll::delete(&self.epoll, &creator);
        }
        self.container.creator_gone()
    }

    fn perform(&mut self, actions: Vec<Action>) -> Result<(), Exit> {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            actions.extend(self.perform_one(action)?);
        }
        Ok(())
    }

    /// Carries out an action. What comes of it may be a reason for others.
    fn perform_one(&mut self, action: Action) -> Result<Vec<Action>, Exit> {
        let now = Instant::now();
        match action {
            Action::Ask {
                request,
                asked,
                deadline,
            } => {
                if request == AgentRequest::Shutdown {
                    self.machine.leave_disks_to_host();
                }
                let result = self.agent.send(request, asked, deadline);
                self.watch_agent();
                if let Err(error) = result {
                    return Ok(self.container.agent_lost(chain(&error), now));
                }
            }
            Action::Accept { port, stream } => {
                if let Err(error) = self.machine.accept_stream(port, stream) {
                    log::warn!("monitor: {}", chain(&error));
                    return Ok(self.container.stream_closed(port, now));
                }
            }
            Action::Reset { port } => self.machine.close_stream(port),
            Action::ResetUnopened { port } => {
                if self.machine.close_unopened(port) {
                    return Ok(self.container.stream_closed(port, now));
                }
            }
            Action::Plug { verb, cards } => {
                let plugged = super::plug(&mut self.machine, cards).map_err(|error| chain(&error));
                return Ok(self.container.plugged(verb, plugged, now));
            }
            Action::Answer { verb, reply } => return Ok(self.answer(verb, &reply)),
            Action::Save { files } => return Ok(self.save(files)),
            Action::Thaw => self.machine.thaw(),
            Action::Hangup { verb } => drop(self.verbs.remove(&verb)),
            Action::Report(report) => {
                match report {
                    Report::Created => {
                        stages::mark("container");
                        self.write_working_set();
                    }
                    Report::Started => stages::mark("exec"),
                    _ => {}
                }
                self.report(report);
            }
            Action::Exit(status) => return Err(Exit(status)),
        }
        Ok(Vec::new())
    }

    /// What the agent has said before the machine stood still is heard first: it is not said again.
    fn save(&mut self, files: SnapshotFiles) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut result = self.machine.freeze().map_err(|error| chain(&error));
        if result.is_ok() {
            result = self
                .hear_agent(&mut actions)
                .and_then(|()| self.write_checkpoint(files));
        }
        actions.extend(self.container.saved(result, Instant::now()));
        actions
    }

    /// Takes all that is there, which is bounded: the guest says no more.
    fn hear_agent(&mut self, actions: &mut Vec<Action>) -> Result<(), String> {
        let now = Instant::now();
        loop {
            let mut fds = [PollFd::new(&self.agent, PollFlags::IN)];
            match poll(&mut fds, Some(&Timespec::default())) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(format!("wait for the agent: {error}")),
            }
            let heard = self.agent.receive().map_err(|error| chain(&error))?;
            for message in heard {
                actions.extend(self.container.from_agent(message, now));
            }
        }
    }

    fn write_checkpoint(&mut self, files: SnapshotFiles) -> Result<(), String> {
        let container = self.container.save().ok_or("container not running")?;
        let agent = self.agent.save();
        let checkpoint = Checkpoint {
            container,
            agent: agent.ok_or("the guest is busy with another request")?,
            shares: self.shares.clone(),
        };
        let owner = checkpoint.encode().map_err(|error| chain(&error))?;
        let saved = self.machine.save(files, owner);
        saved.map_err(|error| chain(&error))
    }

    fn answer(&mut self, verb: Verb, reply: &Reply) -> Vec<Action> {
        let Some(channel) = self.verbs.get_mut(&verb) else {
            return Vec::new();
        };
        let result = channel.send(reply);
        if result.is_ok() && channel.backlog() <= BACKLOG {
            modify(
                &self.epoll,
                channel.as_fd(),
                Source::Verb(verb),
                channel.wants_to_write(),
            );
            return Vec::new();
        }
        self.verbs.remove(&verb);
        self.container.verb_gone(verb, Instant::now())
    }

    fn report(&mut self, report: Report) {
        let report = match report {
            Report::Failed(Failure::Guest { message, .. }) => Report::Failed(Failure::Guest {
                message,
                console: self.machine.console_tail(),
            }),
            report => report,
        };
        let sent = match &mut self.creator {
            Some(creator) => creator.send(&report).is_ok(),
            None => false,
        };
        if let (false, Report::Failed(failure)) = (sent, &report) {
            log::error!("{failure}");
        }
    }
}

fn next_request(channel: &mut Channel) -> Result<Option<(Request, Vec<OwnedFd>)>, ChannelError> {
    let Some(request) = channel.next::<Request>()? else {
        return Ok(None);
    };
    let count = match &request {
        Request::Exec { stdio, .. } => stdio.count(),
        Request::Checkpoint => 2,
        Request::Start { cards } => cards.len(),
        _ => 0,
    };
    Ok(Some((request, channel.take_fds(count)?)))
}

fn modify(epoll: &OwnedFd, fd: BorrowedFd<'_>, source: Source, write: bool) {
    let mut flags = EventFlags::IN;
    if write {
        flags |= EventFlags::OUT;
    }
    // The descriptor is registered, and changing its flags needs no memory: it cannot fail.
    let _ = epoll::modify(epoll, fd, source.token(), flags);
}
