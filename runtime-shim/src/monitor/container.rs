// SPDX-License-Identifier: Apache-2.0
//! What the monitor does when something happens: an answer of the agent, a request of a verb, a
//! signal, a stream that ends, time that passes. Each goes in by one method and comes out as
//! [`Action`]s, which the event loop carries out. No system call is made here but for the clock and
//! entropy, so all of it is tested without a VM.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::{
    AgentError, Clock, ErrorKind, Event, GuestPlan, Process, Reply as AgentReply,
    Request as AgentRequest, Stdio, VERSION, WindowSize,
};
use vmm::{HostStream, StopReason};

use super::order::{Deadlines, Failure, Report, Stage};
use super::wording::start_error;
use crate::agent_client::Incoming;
use crate::control::{Descriptors, Reply, Request};
use crate::signal_fd;

/// Ports below are the protocol's own.
const FIRST_PORT: u32 = 1024;

/// A killed process need not get rid of its output; a short time is given to a reader that reads.
const FLUSH_AFTER_KILL: Duration = Duration::from_secs(1);

/// How long the output of execs may take once the container's init process has ended.
const FLUSH_EXECS: Duration = Duration::from_secs(2);

/// An agent that does not confirm a SIGKILL by then is gone, and its VM with it.
const KILL_ANSWER: Duration = Duration::from_secs(2);

/// A process that got SIGKILL has ended by then, whatever the agent says.
const KILL_EXIT: Duration = Duration::from_secs(10);

/// For writing back file data at the end.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// The status of a container whose VM went away under it.
const KILLED: u8 = 128 + 9;

/// The init process, in the protocol.
const INIT: u32 = 0;

/// A connection of a verb. Numbers are not reused.
pub type Verb = u64;

#[derive(Debug)]
pub enum Action {
    /// Send a request to the agent.
    Ask {
        request: AgentRequest,
        asked: Asked,
        deadline: Option<Instant>,
    },
    /// Let the guest connect to a port.
    Accept { port: u32, stream: HostStream },
    /// Forget a port and its stream.
    Reset { port: u32 },
    Answer { verb: Verb, reply: Reply },
    Hangup { verb: Verb },
    Report(Report),
    /// End the process and with it the VM.
    Exit(u8),
}

/// What the answer to a request to the agent is for.
#[derive(Debug, PartialEq)]
pub enum Asked {
    Prepare,
    Create,
    /// Without a verb: as ordered from the beginning.
    Start(Option<Verb>),
    Exec(u32),
    Pause(Verb),
    Resume(Verb),
    /// The verb gets the answer as it is.
    Verb(Verb),
    /// SIGKILL for the init process.
    Kill(Option<Verb>),
    Shutdown,
    /// Nobody waits for it.
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Booting { until: Instant },
    Creating,
    Created,
    Starting,
    Running,
    /// The init process has ended.
    Ending { status: u8, shut_down: bool },
}

/// A process that a verb waits for.
#[derive(Debug)]
struct Exec {
    /// None: it went away.
    verb: Option<Verb>,
    args: Vec<String>,
    ports: BTreeSet<u32>,
    running: bool,
    status: Option<u8>,
    stands_in: Option<u32>,
    flush_until: Option<Instant>,
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
pub enum Streams {
    Separate {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// Two descriptors of the same terminal.
    Terminal { input: OwnedFd, output: OwnedFd },
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

    /// Gives each stream a port.
    fn connect(
        &mut self,
        streams: Streams,
        ports: &mut BTreeSet<u32>,
        actions: &mut Vec<Action>,
    ) -> Stdio {
        let mut accept = |stream: HostStream| {
            let port = self.next_port;
            // Wrapping is 4 billion streams away, and a port in use is refused by the VM.
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            ports.insert(port);
            actions.push(Action::Accept { port, stream });
            port
        };
        match streams {
            Streams::Terminal { input, output } => Stdio::Terminal {
                port: accept(HostStream {
                    input: Some(input),
                    output: Some(output),
                }),
            },
            Streams::Separate {
                stdin,
                stdout,
                stderr,
            } => {
                let output = |fd: OwnedFd| HostStream {
                    input: None,
                    output: Some(fd),
                };
                Stdio::Streams {
                    stdin: stdin.map(|fd| {
                        accept(HostStream {
                            input: Some(fd),
                            output: None,
                        })
                    }),
                    stdout: stdout.map(|fd| accept(output(fd))),
                    stderr: stderr.map(|fd| accept(output(fd))),
                }
            }
        }
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
            (Event::Ready { version: VERSION }, Phase::Booting { .. }) => self.ready(now),
            (Event::Ready { version }, Phase::Booting { .. }) => {
                self.fail_guest(format!("the agent speaks version {version} of the protocol"))
            }
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
        let mut entropy = vec![0; 64];
        if let Err(error) = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty()) {
            return self.fail_host(Stage::Create, format!("entropy for the guest: {error}"));
        }
        self.phase = Phase::Creating;
        let deadline = Some(now + self.deadlines.request);
        vec![
            Action::Report(Report::Stage(Stage::Create)),
            Action::Ask {
                request: AgentRequest::Prepare {
                    clock: clock(),
                    entropy,
                },
                asked: Asked::Prepare,
                deadline,
            },
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

    fn ask_start(&self, verb: Option<Verb>, now: Instant) -> Action {
        Action::Ask {
            request: AgentRequest::Start {
                container: self.id.clone(),
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
            (Asked::Create, Err(error)) => self.fail(Failure::Refused(start_error(&self.args, error))),
            (Asked::Start(verb), result) => self.started(verb, result.err()),
            (Asked::Exec(process), result) => self.exec_started(process, result, now),
            (Asked::Pause(verb), result) => self.pause_changed(verb, true, result),
            (Asked::Resume(verb), result) => self.pause_changed(verb, false, result),
            (Asked::Verb(verb), result) => vec![answer(verb, reply(result))],
            (Asked::Kill(verb), result) => {
                if result.is_ok() {
                    self.kill_until.get_or_insert(now + KILL_EXIT);
                    self.cut_at.get_or_insert(now + FLUSH_AFTER_KILL);
                }
                verb.map(|verb| answer(verb, reply(result))).into_iter().collect()
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
            actions.extend([Action::Report(stage), self.ask_start(None, now)]);
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
        self.finish_exec(process, now)
    }

    /// The file data goes back to the host while the rest of the output is read.
    fn init_exited(&mut self, status: u8, now: Instant) -> Vec<Action> {
        if matches!(self.phase, Phase::Ending { .. }) {
            return Vec::new();
        }
        self.phase = Phase::Ending {
            status,
            shut_down: false,
        };
        self.kill_until = None;
        self.flush_execs_until = Some(now + FLUSH_EXECS);
        if self.killed {
            self.flush_until = Some(now + FLUSH_AFTER_KILL);
        }
        vec![Action::Ask {
            request: AgentRequest::Shutdown,
            asked: Asked::Shutdown,
            deadline: Some(now + SHUTDOWN),
        }]
    }

    fn shut_down(&mut self, now: Instant) -> Vec<Action> {
        if let Phase::Ending { shut_down, .. } = &mut self.phase {
            *shut_down = true;
        }
        self.exit_if_over(now)
    }

    /// All is said and done: the status is the last thing that is left.
    fn exit_if_over(&mut self, now: Instant) -> Vec<Action> {
        let Phase::Ending {
            status,
            shut_down: true,
        } = self.phase
        else {
            return Vec::new();
        };
        let passed = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        let flushed = self.ports.is_empty() || passed(self.flush_until);
        let execs_flushed = self.execs.values().all(|exec| exec.ports.is_empty());
        if flushed && (execs_flushed || passed(self.flush_execs_until)) {
            vec![Action::Exit(status)]
        } else {
            Vec::new()
        }
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

    /// Tells the verb about the end of its process, once the process has run, ended and been read.
    fn finish_exec(&mut self, process: u32, now: Instant) -> Vec<Action> {
        let Some(exec) = self.execs.get_mut(&process) else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        if exec.flush_until.is_some_and(|until| until <= now) {
            actions.extend(cut(&mut exec.ports));
        }
        let (true, Some(status), true) = (exec.running, exec.status, exec.ports.is_empty()) else {
            return actions;
        };
        if let Some(verb) = exec.verb {
            actions.push(answer(verb, Reply::Exited(status)));
            actions.push(Action::Hangup { verb });
        }
        self.execs.remove(&process);
        actions
    }

    fn exec_started(
        &mut self,
        process: u32,
        result: Result<AgentReply, AgentError>,
        now: Instant,
    ) -> Vec<Action> {
        let Some(exec) = self.execs.get_mut(&process) else {
            return Vec::new();
        };
        let error = match result {
            Ok(_) => {
                exec.running = true;
                let started = exec.verb.map(|verb| answer(verb, Reply::Done));
                let mut actions: Vec<_> = started.into_iter().collect();
                actions.extend(self.finish_exec(process, now));
                return actions;
            }
            Err(error) => start_error(&exec.args, error),
        };
        let mut actions = cut(&mut exec.ports);
        if let Some(verb) = exec.verb {
            actions.push(answer(verb, Reply::Failed(error)));
            actions.push(Action::Hangup { verb });
        }
        self.execs.remove(&process);
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
            Request::Start => self.start(verb, now),
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
            Request::Update(cgroup) => self.ask_live(verb, Asked::Verb(verb), now, |container| {
                AgentRequest::Update { container, cgroup }
            }),
            Request::Usage => self.ask_live(verb, Asked::Verb(verb), now, |container| {
                AgentRequest::Usage { container }
            }),
        }
    }

    fn exec_of(&self, verb: Verb) -> Option<u32> {
        let mut execs = self.execs.iter();
        execs
            .find(|(_, exec)| exec.verb == Some(verb))
            .map(|(&process, _)| process)
    }

    fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Created | Phase::Starting | Phase::Running)
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

    fn start(&mut self, verb: Verb, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Created => {
                self.phase = Phase::Starting;
                vec![self.ask_start(Some(verb), now)]
            }
            Phase::Starting | Phase::Running => {
                vec![refuse(verb, "cannot start an already running container")]
            }
            Phase::Ending { .. } => vec![refuse(verb, "cannot start a container that has stopped")],
            Phase::Booting { .. } | Phase::Creating => {
                vec![refuse(verb, "cannot start a container in the creating state")]
            }
        }
    }

    fn exec(
        &mut self,
        verb: Verb,
        process: Process,
        streams: Streams,
        ignore_paused: bool,
        now: Instant,
    ) -> Vec<Action> {
        if !self.is_live() {
            return vec![refuse(verb, "cannot exec in a stopped container")];
        }
        if self.paused && !ignore_paused {
            let text = "cannot exec in a paused container (use --ignore-paused to override)";
            return vec![refuse(verb, text)];
        }
        let (Some(number), None) = (self.free_number(), self.exec_of(verb)) else {
            return vec![refuse(verb, "one exec a connection")];
        };
        let mut actions = Vec::new();
        let mut ports = BTreeSet::new();
        let stdio = self.connect(streams, &mut ports, &mut actions);
        let exec = Exec {
            verb: Some(verb),
            args: process.args.clone(),
            ports,
            running: false,
            status: None,
            stands_in: None,
            flush_until: None,
        };
        self.execs.insert(number, exec);
        actions.push(Action::Ask {
            request: AgentRequest::Exec {
                container: self.id.clone(),
                process: number,
                plan: Box::new(process),
                stdio,
                ignore_paused,
            },
            asked: Asked::Exec(number),
            deadline: Some(now + self.deadlines.request),
        });
        actions
    }

    /// Numbers of processes are not used twice: a late event must not hit a later process.
    fn free_number(&mut self) -> Option<u32> {
        let number = self.next_exec;
        self.next_exec = number.checked_add(1)?;
        Some(number)
    }

    fn stand_in(&mut self, verb: Verb, pid: u32) -> Vec<Action> {
        let mut execs = self.execs.values_mut();
        if let Some(exec) = execs.find(|exec| exec.verb == Some(verb)) {
            exec.stands_in = Some(pid);
        }
        Vec::new()
    }

    fn ask_signal(&self, process: u32, signal: i32, all: bool) -> AgentRequest {
        AgentRequest::Signal {
            container: self.id.clone(),
            process,
            signal,
            all,
        }
    }

    fn ask_resize(&self, process: u32, size: WindowSize) -> Action {
        Action::Ask {
            request: AgentRequest::Resize {
                container: self.id.clone(),
                process,
                size,
            },
            asked: Asked::Nothing,
            deadline: None,
        }
    }

    /// Signals on the connection of an exec are not answered: its verb waits for something else.
    fn signal_exec(&mut self, process: u32, signal: i32, now: Instant) -> Vec<Action> {
        if signal == libc::SIGKILL
            && let Some(exec) = self.execs.get_mut(&process)
        {
            exec.flush_until = Some(now + FLUSH_AFTER_KILL);
        }
        vec![Action::Ask {
            request: self.ask_signal(process, signal, false),
            asked: Asked::Nothing,
            deadline: None,
        }]
    }

    fn signal_init(
        &mut self,
        verb: Option<Verb>,
        signal: i32,
        all: bool,
        now: Instant,
    ) -> Vec<Action> {
        let kill = signal == libc::SIGKILL;
        self.killed |= kill;
        match self.phase {
            Phase::Ending { .. } => {
                if kill && self.flush_until.is_none() {
                    self.flush_until = Some(now + FLUSH_AFTER_KILL);
                }
                let gone = verb.map(|verb| refuse(verb, "container not running"));
                gone.into_iter().collect()
            }
            Phase::Booting { .. } | Phase::Creating | Phase::Created => {
                self.signal_before_start(verb, signal)
            }
            Phase::Starting | Phase::Running => vec![Action::Ask {
                request: self.ask_signal(INIT, signal, all),
                asked: match (kill, verb) {
                    (true, verb) => Asked::Kill(verb),
                    (false, Some(verb)) => Asked::Verb(verb),
                    (false, None) => Asked::Nothing,
                },
                deadline: Some(now + if kill { KILL_ANSWER } else { self.deadlines.request }),
            }],
        }
    }

    /// There is no process yet that could handle a signal: those that end a process end it all.
    fn signal_before_start(&mut self, verb: Option<Verb>, signal: i32) -> Vec<Action> {
        let answered = verb.map(|verb| answer(verb, Reply::Done));
        let mut actions: Vec<_> = answered.into_iter().collect();
        let number = u8::try_from(signal).unwrap_or(0);
        if signal != libc::SIGKILL && !signal_fd::ENDING.contains(&signal) {
            return actions;
        }
        if self.phase != Phase::Created {
            let message = format!("ended by signal {signal}");
            let stage = self.stage();
            actions.push(Action::Report(Report::Failed(Failure::Host { stage, message })));
        }
        actions.push(Action::Exit(128 + number));
        actions
    }

    /// A signal that the monitor itself got. It stands for the init process.
    pub fn signal(&mut self, signal: i32, now: Instant) -> Vec<Action> {
        self.signal_init(None, signal, false, now)
    }

    /// The terminal of the init process has another size.
    pub fn resized(&mut self, size: WindowSize) -> Vec<Action> {
        if self.has_terminal && self.is_live() {
            vec![self.ask_resize(INIT, size)]
        } else {
            Vec::new()
        }
    }

    /// A verb has closed its connection. With it goes the process that it stood for.
    pub fn verb_gone(&mut self, verb: Verb, now: Instant) -> Vec<Action> {
        self.listeners.remove(&verb);
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

    /// The creating verb has gone away.
    pub fn creator_gone(&mut self) -> Vec<Action> {
        match self.phase {
            // Nobody knows of this container.
            Phase::Booting { .. } | Phase::Creating => vec![Action::Exit(1)],
            _ => Vec::new(),
        }
    }

    /// The guest cannot even be booted.
    pub fn start_failed(&mut self, reason: String) -> Vec<Action> {
        self.fail_host(Stage::Boot, reason)
    }

    /// The connection to the agent has broken.
    pub fn agent_lost(&mut self, reason: String, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Ending { .. } => self.guest_gone(now),
            _ => self.fail_guest(reason),
        }
    }

    /// The VM does not run any more.
    pub fn machine_stopped(&mut self, reason: &StopReason, now: Instant) -> Vec<Action> {
        let how = match reason {
            StopReason::Reset => String::new(),
            StopReason::Failed(reason) => format!(" ({reason})"),
        };
        match self.phase {
            Phase::Booting { .. } => {
                self.fail_guest(format!("guest kernel stopped while booting{how}"))
            }
            Phase::Ending { .. } => self.guest_gone(now),
            _ => self.fail_guest(format!("guest kernel stopped{how}")),
        }
    }

    /// At the end, nothing more is to be had from the guest.
    fn guest_gone(&mut self, now: Instant) -> Vec<Action> {
        self.flush_until.get_or_insert(now + FLUSH_AFTER_KILL);
        self.shut_down(now)
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
            Asked::Pause(verb) | Asked::Resume(verb) | Asked::Verb(verb) => {
                vec![answer(verb, Reply::Failed(late("answer")))]
            }
            Asked::Kill(verb) => {
                let answered = verb.map(|verb| answer(verb, Reply::Done));
                let mut actions: Vec<_> = answered.into_iter().collect();
                log::error!("container {}: the agent does not answer, its VM is ended", self.id);
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

    /// When [`time`](Self::time) has something to do next. It has been called with `now`.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let boot = match self.phase {
            Phase::Booting { until } => Some(until),
            _ => None,
        };
        let waits = [
            boot,
            self.kill_until,
            self.cut_at,
            self.flush_until,
            self.flush_execs_until,
        ];
        let execs = self.execs.values().map(|exec| exec.flush_until);
        let all = waits.into_iter().chain(execs).flatten();
        all.filter(|&until| until > now).min()
    }

    /// Deadlines have passed.
    pub fn time(&mut self, now: Instant) -> Vec<Action> {
        if let Phase::Booting { until } = self.phase
            && until <= now
        {
            let seconds = self.deadlines.boot.as_secs();
            return self.fail_guest(format!("guest did not come up within {seconds} s"));
        }
        if self.kill_until.is_some_and(|until| until <= now) {
            log::error!("container {}: survived SIGKILL, its VM is ended", self.id);
            return vec![Action::Exit(KILLED)];
        }
        let late: Vec<_> = self
            .execs
            .iter()
            .filter(|(_, exec)| exec.flush_until.is_some_and(|until| until <= now))
            .map(|(&process, _)| process)
            .collect();
        let mut actions = Vec::new();
        if self.cut_at.is_some_and(|at| at <= now) {
            self.cut_at = None;
            actions.extend(cut(&mut self.ports));
        }
        for process in late {
            actions.extend(self.finish_exec(process, now));
        }
        actions.extend(self.exit_if_over(now));
        actions
    }

    fn stage(&self) -> Stage {
        match self.phase {
            Phase::Booting { .. } => Stage::Boot,
            Phase::Creating => Stage::Create,
            Phase::Created | Phase::Starting => Stage::Start,
            Phase::Running | Phase::Ending { .. } => Stage::Run,
        }
    }

    fn fail_host(&mut self, stage: Stage, message: String) -> Vec<Action> {
        self.fail(Failure::Host { stage, message })
    }

    /// The console is added by the event loop, which has the machine.
    fn fail_guest(&mut self, message: String) -> Vec<Action> {
        let console = String::new();
        self.fail(Failure::Guest { message, console })
    }

    fn fail(&mut self, failure: Failure) -> Vec<Action> {
        let status = match self.phase {
            Phase::Running | Phase::Created => KILLED,
            _ => 1,
        };
        vec![Action::Report(Report::Failed(failure)), Action::Exit(status)]
    }

    /// The last words to verbs that wait for a process. Those whose end was not heard of die with
    /// the guest.
    pub fn farewell(&mut self) -> Vec<Action> {
        let execs = std::mem::take(&mut self.execs);
        let waiting = execs.into_values().filter_map(|exec| {
            let verb = exec.verb?;
            Some(answer(verb, Reply::Exited(exec.status.unwrap_or(KILLED))))
        });
        waiting.collect()
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
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Clock {
        seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: now.subsec_nanos(),
    }
}

fn streams(stdio: Descriptors, fds: Vec<OwnedFd>) -> Option<Streams> {
    if fds.len() != stdio.count() {
        return None;
    }
    let mut fds = fds.into_iter();
    Some(match stdio {
        Descriptors::Terminal => {
            let input = fds.next()?;
            Streams::Terminal {
                output: input.try_clone().ok()?,
                input,
            }
        }
        Descriptors::Streams {
            stdin,
            stdout,
            stderr,
        } => {
            let mut next = |is: bool| if is { fds.next() } else { None };
            Streams::Separate {
                stdin: next(stdin),
                stdout: next(stdout),
                stderr: next(stderr),
            }
        }
    })
}

/// Gives up streams: what is on its way in them is lost.
fn cut(ports: &mut BTreeSet<u32>) -> Vec<Action> {
    let ports = std::mem::take(ports);
    ports.into_iter().map(|port| Action::Reset { port }).collect()
}

fn answer(verb: Verb, reply: Reply) -> Action {
    Action::Answer { verb, reply }
}

fn refuse(verb: Verb, message: &str) -> Action {
    let error = AgentError {
        kind: ErrorKind::State,
        message: message.to_owned(),
    };
    answer(verb, Reply::Failed(error))
}

fn reply(result: Result<AgentReply, AgentError>) -> Reply {
    match result {
        Ok(AgentReply::Usage(usage)) => Reply::Usage(usage),
        Ok(_) => Reply::Done,
        Err(error) => Reply::Failed(error),
    }
}

#[cfg(test)]
mod tests;
