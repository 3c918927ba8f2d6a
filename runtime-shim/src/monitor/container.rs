// SPDX-License-Identifier: Apache-2.0
//! What the monitor does when something happens: an answer of the agent, a request of a verb, a
//! signal, a stream that ends, time that passes. Each goes in by one method and comes out as
//! [`Action`]s, which the event loop carries out. No system call is made here but for the clock and
//! entropy, so all of it is tested without a VM.

mod action;
mod checkpoint;
mod ending;
mod exec;
mod signals;
mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::{
    AgentError, Card, Clock, ErrorKind, Event, GuestPlan, Reply as AgentReply,
    Request as AgentRequest, Stdio, VERSION,
};

pub use action::{Action, Asked, Verb};
pub use checkpoint::{RestoreError, SavedContainer};
pub use streams::Streams;

use super::order::{Deadlines, Failure, Report, Stage};
use super::wording::start_error;
use crate::agent_client::Incoming;
use crate::control::{Reply, Request};
use crate::network::Joined;
use action::{answer, refuse, reply, unopened};
use checkpoint::Hold;
use exec::Exec;
use streams::{FIRST_PORT, streams};

/// A killed process need not get rid of its output; a short time is given to a reader that reads.
const FLUSH_AFTER_KILL: Duration = Duration::from_secs(1);

/// How long the output of execs may take once the container's init process has ended.
const FLUSH_EXECS: Duration = Duration::from_secs(2);

/// An agent that does not confirm a SIGKILL by then is gone, and its VM with it.
const KILL_ANSWER: Duration = Duration::from_millis(1500);

/// A process that got SIGKILL has ended by then, whatever the agent says.
const KILL_EXIT: Duration = Duration::from_secs(10);

/// For writing back file data at the end.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// The status of a container whose VM went away under it.
const KILLED: u8 = 128 + 9;

/// The init process, in the protocol.
const INIT: u32 = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Booting {
        until: Instant,
    },
    Creating,
    Created,
    Starting,
    /// It was running when it was saved.
    Restoring,
    Running,
    /// The init process has ended.
    Ending {
        status: u8,
        shut_down: bool,
    },
}

/// The container that is to be made, and the descriptors of its init process.
#[derive(Debug)]
pub struct Template {
    pub id: String,
    pub guest: GuestPlan,
    pub start: bool,
    pub streams: Streams,
    pub deadlines: Deadlines,
}

#[derive(Debug)]
pub struct Container {
    id: String,
    /// Sent when the agent is ready.
    guest: Option<GuestPlan>,
    stdio: Stdio,
    args: Vec<String>,
    start: bool,
    start_deadline: Option<Duration>,
    deadlines: Deadlines,
    phase: Phase,
    paused: bool,
    has_terminal: bool,
    ports: BTreeSet<u32>,
    next_port: u32,
    execs: BTreeMap<u32, Exec>,
    next_exec: u32,
    listeners: BTreeSet<Verb>,
    hold: Option<Hold>,
    killed: bool,
    /// The agent tells of the end of a process when its output is on its way. After a SIGKILL that
    /// must not depend on a reader.
    cut_at: Option<Instant>,
    flush_until: Option<Instant>,
    flush_execs_until: Option<Instant>,
    kill_until: Option<Instant>,
}

impl Container {
    /// The actions make its streams available to the guest, which is about to boot.
    pub fn new(template: Template, now: Instant) -> (Container, Vec<Action>) {
        let mut container = Container {
            id: template.id,
            stdio: Stdio::Terminal { port: 0 },
            args: template.guest.process.args.clone(),
            start: template.start,
            start_deadline: start_deadline(&template.guest, template.deadlines),
            guest: Some(template.guest),
            deadlines: template.deadlines,
            phase: Phase::Booting {
                until: now + template.deadlines.boot,
            },
            paused: false,
            has_terminal: false,
            ports: BTreeSet::new(),
            next_port: FIRST_PORT,
            execs: BTreeMap::new(),
            next_exec: INIT + 1,
            listeners: BTreeSet::new(),
            hold: None,
            killed: false,
            cut_at: None,
            flush_until: None,
            flush_execs_until: None,
            kill_until: None,
        };
        let mut actions = Vec::new();
        let mut ports = BTreeSet::new();
        container.stdio = container.connect(template.streams, &mut ports, &mut actions);
        container.has_terminal = matches!(container.stdio, Stdio::Terminal { .. });
        container.ports = ports;
        (container, actions)
    }

    pub fn has_terminal(&self) -> bool {
        self.has_terminal
    }

    /// Something that the agent sent.
    pub fn from_agent(&mut self, incoming: Incoming<Asked>, now: Instant) -> Vec<Action> {
        match incoming {
            Incoming::Event(event) => self.event(event, now),
            Incoming::Answer { asked, result } => self.answer(asked, result, now),
        }
    }

    fn event(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match (event, self.phase) {
            (
                Event::Ready {
                    version: VERSION, ..
                },
                Phase::Booting { .. },
            ) => self.ready(now),
            (Event::Ready { version, .. }, Phase::Booting { .. }) => self.fail_guest(format!(
                "the agent speaks version {version} of the protocol"
            )),
            (_, Phase::Booting { .. }) => self.fail_guest("the agent did not say hello".into()),
            (Event::Ready { .. }, _) => self.fail_guest("the agent started twice".into()),
            (Event::Exited { .. }, Phase::Creating) => {
                self.fail_guest("the container's process ended before it was created".into())
            }
            (
                Event::Exited {
                    container,
                    process,
                    status,
                },
                _,
            ) if container == self.id => self.process_exited(process, status, now),
            (Event::OutOfMemory { container }, _) if container == self.id => self.out_of_memory(),
            // About something that does not exist.
            (Event::Exited { .. } | Event::OutOfMemory { .. }, _) => Vec::new(),
        }
    }

    /// The guest is up. Everything up to the container goes out at once.
    fn ready(&mut self, now: Instant) -> Vec<Action> {
        let Some(guest) = self.guest.take() else {
            return Vec::new();
        };
        let prepare = match self.prepare(now) {
            Ok(prepare) => prepare,
            Err(error) => return self.fail_host(Stage::Create, error),
        };
        self.phase = Phase::Creating;
        let deadline = Some(now + self.deadlines.request);
        vec![
            Action::Report(Report::Stage(Stage::Create)),
            prepare,
            Action::Ask {
                request: AgentRequest::Create {
                    container: self.id.clone(),
                    plan: Box::new(guest),
                    stdio: self.stdio,
                },
                asked: Asked::Create,
                deadline,
            },
        ]
    }

    /// Time and entropy of its own, before anything of a container runs.
    fn prepare(&self, now: Instant) -> Result<Action, String> {
        let mut entropy = vec![0; 64];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| format!("entropy for the guest: {error}"))?;
        Ok(Action::Ask {
            request: AgentRequest::Prepare {
                clock: clock(),
                entropy,
            },
            asked: Asked::Prepare,
            deadline: Some(now + self.deadlines.request),
        })
    }

    fn ask_start(&self, verb: Option<Verb>, cards: Vec<Card>, now: Instant) -> Action {
        Action::Ask {
            request: AgentRequest::Start {
                container: self.id.clone(),
                cards,
            },
            asked: Asked::Start(verb),
            deadline: self.start_deadline.map(|time| now + time),
        }
    }

    fn answer(
        &mut self,
        asked: Asked,
        result: Result<AgentReply, AgentError>,
        now: Instant,
    ) -> Vec<Action> {
        match (asked, result) {
            (Asked::Prepare, Ok(_)) | (Asked::Nothing, _) => Vec::new(),
            (Asked::Prepare, Err(error)) => self.fail_guest(format!("prepare the guest: {error}")),
            (Asked::Create, Ok(AgentReply::Created { .. })) => self.created(now),
            (Asked::Create, Ok(_)) => self.fail_guest("the agent gave a wrong answer".into()),
            (Asked::Create, Err(error)) => {
                self.fail(Failure::Refused(start_error(&self.args, error)))
            }
            (Asked::Start(verb), result) => self.started(verb, result.err()),
            (Asked::Exec(process), result) => self.exec_started(process, result, now),
            (Asked::Pause(verb), result) => self.pause_changed(verb, true, result),
            (Asked::Resume(verb), result) => self.pause_changed(verb, false, result),
            (Asked::Freeze, result) => self.frozen(result.err()),
            (Asked::Identified, Ok(_)) => vec![self.go_on(now)],
            (Asked::Identified, Err(error)) => {
                self.fail_guest(format!("give the container the id of a boot: {error}"))
            }
            (Asked::Restored, Ok(_)) => self.restored(),
            (Asked::Restored, Err(error)) => {
                self.fail_guest(format!("resume the container: {error}"))
            }
            (Asked::Verb(verb), result) => vec![answer(verb, reply(result))],
            (Asked::Kill(verb), result) => {
                if result.is_ok() {
                    self.kill_until.get_or_insert(now + KILL_EXIT);
                    self.cut_at.get_or_insert(now + FLUSH_AFTER_KILL);
                }
                verb.map(|verb| answer(verb, reply(result)))
                    .into_iter()
                    .collect()
            }
            (Asked::Shutdown, result) => {
                if let Err(error) = result {
                    log::warn!("container {}: write back file data: {error}", self.id);
                }
                self.shut_down(now)
            }
        }
    }

    fn created(&mut self, now: Instant) -> Vec<Action> {
        if self.phase != Phase::Creating {
            return Vec::new();
        }
        self.phase = Phase::Created;
        let mut actions = vec![Action::Report(Report::Created)];
        if self.start {
            self.phase = Phase::Starting;
            let stage = Report::Stage(Stage::Start);
            actions.extend([Action::Report(stage), self.ask_start(None, Vec::new(), now)]);
        }
        actions
    }

    fn started(&mut self, verb: Option<Verb>, error: Option<AgentError>) -> Vec<Action> {
        let Some(error) = error else {
            if self.phase == Phase::Starting {
                self.phase = Phase::Running;
            }
            return vec![match verb {
                Some(verb) => answer(verb, Reply::Done),
                None => Action::Report(Report::Started),
            }];
        };
        let error = start_error(&self.args, error);
        match verb {
            Some(verb) => vec![answer(verb, Reply::Failed(error)), Action::Exit(1)],
            None => self.fail(Failure::Refused(error)),
        }
    }

    fn pause_changed(
        &mut self,
        verb: Verb,
        paused: bool,
        result: Result<AgentReply, AgentError>,
    ) -> Vec<Action> {
        if result.is_ok() {
            self.paused = paused;
        }
        vec![answer(verb, reply(result))]
    }

    fn out_of_memory(&self) -> Vec<Action> {
        let listeners = self.listeners.iter();
        listeners
            .map(|&verb| answer(verb, Reply::OutOfMemory))
            .collect()
    }

    fn process_exited(&mut self, process: u32, status: u8, now: Instant) -> Vec<Action> {
        if process == INIT {
            return self.init_exited(status, now);
        }
        let Some(exec) = self.execs.get_mut(&process) else {
            return Vec::new();
        };
        exec.status.get_or_insert(status);
        let mut actions = unopened(&exec.ports);
        actions.extend(self.finish_exec(process, now));
        actions
    }

    /// A stream is over: its bytes are with their reader, or nobody reads any more.
    pub fn stream_closed(&mut self, port: u32, now: Instant) -> Vec<Action> {
        if self.ports.remove(&port) {
            return self.exit_if_over(now);
        }
        let owner = self
            .execs
            .iter_mut()
            .find(|(_, exec)| exec.ports.contains(&port));
        let Some((&process, exec)) = owner else {
            return Vec::new();
        };
        exec.ports.remove(&port);
        let mut actions = self.finish_exec(process, now);
        actions.extend(self.exit_if_over(now));
        actions
    }

    /// A request of a verb, and the descriptors that came with it.
    pub fn request(
        &mut self,
        verb: Verb,
        request: Request,
        fds: Vec<OwnedFd>,
        now: Instant,
    ) -> Vec<Action> {
        match request {
            Request::Start { cards } => self.start(verb, cards.into_iter().zip(fds).collect(), now),
            Request::Exec {
                process,
                stdio,
                ignore_paused,
            } => match streams(stdio, fds) {
                Some(streams) => self.exec(verb, *process, streams, ignore_paused, now),
                None => vec![refuse(verb, "exec without its file descriptors")],
            },
            Request::Signal { signal, all } => match self.exec_of(verb) {
                Some(process) => self.signal_exec(process, signal, now),
                None => self.signal_init(Some(verb), signal, all, now),
            },
            Request::Resize(size) => match self.exec_of(verb) {
                Some(process) => vec![self.ask_resize(process, size)],
                None => vec![refuse(verb, "no process of this connection has a terminal")],
            },
            Request::StandIn { pid } => self.stand_in(verb, pid),
            Request::Processes => {
                let stubs = self.execs.values().filter_map(|exec| exec.stands_in);
                vec![answer(verb, Reply::Processes(stubs.collect()))]
            }
            Request::Events => {
                self.listeners.insert(verb);
                Vec::new()
            }
            Request::Pause => self.ask_live(verb, Asked::Pause(verb), now, |container| {
                AgentRequest::Pause { container }
            }),
            Request::Resume => self.ask_live(verb, Asked::Resume(verb), now, |container| {
                AgentRequest::Resume { container }
            }),
            Request::Checkpoint => self.checkpoint(verb, fds, now),
            Request::Thaw => self.thaw(verb, now),
            Request::End => self.end_frozen(verb),
            Request::Update(cgroup) => self.ask_live(verb, Asked::Verb(verb), now, |container| {
                AgentRequest::Update { container, cgroup }
            }),
            Request::Mount(mount) => self.ask_live(verb, Asked::Verb(verb), now, |container| {
                AgentRequest::Mount { container, mount }
            }),
            Request::Unmount { destination } => {
                self.ask_live(verb, Asked::Verb(verb), now, |container| {
                    AgentRequest::Unmount {
                        container,
                        destination,
                    }
                })
            }
            Request::Usage => self.ask_live(verb, Asked::Verb(verb), now, |container| {
                AgentRequest::Usage { container }
            }),
        }
    }

    fn is_live(&self) -> bool {
        matches!(
            self.phase,
            Phase::Created | Phase::Starting | Phase::Restoring | Phase::Running
        )
    }

    fn ask_live(
        &self,
        verb: Verb,
        asked: Asked,
        now: Instant,
        request: impl FnOnce(String) -> AgentRequest,
    ) -> Vec<Action> {
        if !self.is_live() {
            return vec![refuse(verb, "container not running")];
        }
        vec![Action::Ask {
            request: request(self.id.clone()),
            asked,
            deadline: Some(now + self.deadlines.request),
        }]
    }

    fn start(&mut self, verb: Verb, cards: Vec<(Joined, OwnedFd)>, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Created => {
                self.phase = Phase::Starting;
                match cards.is_empty() {
                    true => vec![self.ask_start(Some(verb), Vec::new(), now)],
                    false => vec![Action::Plug { verb, cards }],
                }
            }
            Phase::Starting | Phase::Restoring | Phase::Running => {
                vec![refuse(verb, "cannot start an already running container")]
            }
            Phase::Ending { .. } => vec![refuse(verb, "cannot start a container that has stopped")],
            Phase::Booting { .. } | Phase::Creating => {
                vec![refuse(
                    verb,
                    "cannot start a container in the creating state",
                )]
            }
        }
    }

    /// The machine has the cards of a start, or cannot have them.
    pub fn plugged(
        &mut self,
        verb: Verb,
        result: Result<Vec<Card>, String>,
        now: Instant,
    ) -> Vec<Action> {
        match result {
            Ok(cards) => vec![self.ask_start(Some(verb), cards, now)],
            Err(message) => {
                let kind = ErrorKind::System;
                self.started(Some(verb), Some(AgentError { kind, message }))
            }
        }
    }

    /// A verb has closed its connection. With it goes the process that it stood for.
    pub fn verb_gone(&mut self, verb: Verb, now: Instant) -> Vec<Action> {
        self.listeners.remove(&verb);
        if self.holds(verb) {
            return self.let_go(now);
        }
        let Some(process) = self.exec_of(verb) else {
            return Vec::new();
        };
        if let Some(exec) = self.execs.get_mut(&process) {
            exec.verb = None;
            exec.stands_in = None;
            exec.flush_until = Some(now + FLUSH_AFTER_KILL);
            if exec.status.is_some() {
                return Vec::new();
            }
        }
        vec![Action::Ask {
            request: self.ask_signal(process, libc::SIGKILL, false),
            asked: Asked::Nothing,
            deadline: None,
        }]
    }

    /// The agent has not answered in time.
    pub fn overdue(&mut self, asked: Asked, now: Instant) -> Vec<Action> {
        let late = |what: &str| AgentError {
            kind: ErrorKind::System,
            message: format!("the agent did not {what} in time"),
        };
        match asked {
            Asked::Prepare | Asked::Create => {
                self.fail_guest("the agent did not create the container in time".into())
            }
            Asked::Start(verb) => self.started(verb, Some(late("start the container"))),
            Asked::Exec(process) => {
                let mut actions = vec![Action::Ask {
                    request: self.ask_signal(process, libc::SIGKILL, false),
                    asked: Asked::Nothing,
                    deadline: None,
                }];
                actions.extend(self.exec_started(process, Err(late("start the process")), now));
                actions
            }
            Asked::Freeze => self.frozen(Some(late("pause the container"))),
            Asked::Identified | Asked::Restored => {
                self.fail_guest("the agent did not resume the container in time".into())
            }
            Asked::Pause(verb) | Asked::Resume(verb) | Asked::Verb(verb) => {
                vec![answer(verb, Reply::Failed(late("answer")))]
            }
            Asked::Kill(verb) => {
                let answered = verb.map(|verb| answer(verb, Reply::Done));
                let mut actions: Vec<_> = answered.into_iter().collect();
                log::error!(
                    "container {}: the agent does not answer, its VM is ended",
                    self.id
                );
                actions.push(Action::Exit(KILLED));
                actions
            }
            Asked::Shutdown => {
                log::warn!("container {}: file data not written back in time", self.id);
                self.shut_down(now)
            }
            Asked::Nothing => Vec::new(),
        }
    }
}

/// Hooks run before the start is answered. One without a limit may take as long as it likes.
fn start_deadline(guest: &GuestPlan, deadlines: Deadlines) -> Option<Duration> {
    let mut time = deadlines.request;
    for hook in &guest.start_hooks {
        time += Duration::from_secs(u64::from(hook.timeout?));
    }
    Some(time)
}

fn clock() -> Clock {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Clock {
        seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: now.subsec_nanos(),
    }
}

#[cfg(test)]
mod tests;
