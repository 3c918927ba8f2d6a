// SPDX-License-Identifier: Apache-2.0
//! One process of a container as the agent sees it: from the fork to the event that tells its end.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use agent_protocol::{AgentError, ErrorKind, IdMapping, Process, Stdio};
use rustix::event::epoll::EventFlags;
use rustix::fs::{CWD, Mode, OFlags, Uid, fchown, openat};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdGetfdFlags, pidfd_getfd};

use crate::channel::{Channel, Received};
use crate::core::{Core, Key, Source};
use crate::error::{Result, Stage, error, refused};
use crate::namespaces;
use crate::poll::Token;
use crate::process::ChildStdio;
use crate::stdio::{Direction, Moved, Side, Stream};
use crate::syscalls::Child;

/// Where a process is in its life. Numbers are those of the requests that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The child builds its world; `reported` when it says that it is done.
    SettingUp {
        number: u64,
        reported: bool,
    },
    /// Ready, and waiting to be started.
    Created,
    Starting {
        number: u64,
    },
    Running,
    /// Could not be made. Its end is waited for, so that its number is free when this is told.
    Failed,
    /// What it wrote is on its way.
    Ended {
        status: u8,
    },
}

#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) key: Key,
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) phase: Phase,
    channel: Option<(Channel, Token)>,
    streams: BTreeMap<u8, Stream>,
    /// What to answer when it is gone.
    refusal: Option<(u64, AgentError)>,
}

/// What came of an event.
#[derive(Debug)]
pub(crate) enum Progress {
    None,
    /// The child is ready.
    Reported,
    /// The child executes its program: the request may be answered.
    Executed {
        number: u64,
    },
    /// It could not be set up.
    Failed(AgentError),
    /// The exec failed; the end of the process will follow.
    NotExecuted {
        number: u64,
        error: AgentError,
    },
}

/// The agent's ends and the child's, before there is a child.
#[derive(Debug)]
pub(crate) struct Stdios {
    streams: BTreeMap<u8, Stream>,
    pub(crate) child: ChildStdio,
}

/// Connects to the host for each stream and makes the pipes.
pub(crate) fn open_stdio(
    core: &Core,
    stdio: Stdio,
    process: &Process,
    uids: &[IdMapping],
) -> Result<Stdios> {
    let connect = |port| core.transport.connect(port).stage("stdio: connect");
    match (stdio, process.terminal) {
        (Stdio::Terminal { port }, Some(_)) => Ok(Stdios {
            streams: BTreeMap::from([(0, Stream::new(connect(port)?, None, Direction::Both))]),
            child: ChildStdio::Terminal,
        }),
        (
            Stdio::Streams {
                stdin,
                stdout,
                stderr,
            },
            None,
        ) => {
            let owner = namespaces::outside(uids, process.uid).unwrap_or(0);
            let mut streams = BTreeMap::new();
            let mut open = |slot, port: Option<u32>, direction| -> Result<OwnedFd> {
                let Some(port) = port else {
                    let null = openat(
                        CWD,
                        "/dev/null",
                        OFlags::RDWR | OFlags::CLOEXEC,
                        Mode::empty(),
                    );
                    return null.stage("stdio: /dev/null");
                };
                let connection = connect(port)?;
                let (ours, theirs) = open_pipe(direction, owner).stage("stdio: pipe")?;
                streams.insert(slot, Stream::new(connection, Some(ours), direction));
                Ok(theirs)
            };
            let child = [
                open(0, stdin, Direction::Input)?,
                open(1, stdout, Direction::Output)?,
                open(2, stderr, Direction::Output)?,
            ];
            Ok(Stdios {
                streams,
                child: ChildStdio::Streams(child),
            })
        }
        _ => Err(refused("process.terminal: does not agree with the streams")),
    }
}

/// The agent's end, and the child's.
fn open_pipe(direction: Direction, owner: u32) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours, theirs) = match direction {
        Direction::Input => (writer, reader),
        Direction::Output | Direction::Both => (reader, writer),
    };
    // So that the user can open /dev/stdout and the like.
    if owner != 0 {
        fchown(&theirs, Some(Uid::from_raw(owner)), None)?;
    }
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

impl Instance {
    pub(crate) fn new(
        core: &mut Core,
        key: Key,
        child: Child,
        channel: Channel,
        streams: BTreeMap<u8, Stream>,
        number: u64,
    ) -> Result<Instance> {
        let token = core
            .poll
            .add_reader(&channel, Source::Channel(key.clone()))
            .stage("epoll")?;
        let mut instance = Instance {
            key,
            pid: child.pid,
            pidfd: child.pidfd,
            phase: Phase::SettingUp {
                number,
                reported: false,
            },
            channel: Some((channel, token)),
            streams,
            refusal: None,
        };
        instance.watch(core)?;
        Ok(instance)
    }

    fn watch(&mut self, core: &mut Core) -> Result<()> {
        for (&slot, stream) in &mut self.streams {
            for (side, fd, token) in stream.unwatched() {
                let source = Source::Stream(self.key.clone(), slot, side);
                *token = Some(core.poll.add(fd, source).stage("epoll")?);
            }
        }
        Ok(())
    }

    /// Lets the child go on.
    pub(crate) fn proceed(&self) -> Result<()> {
        match &self.channel {
            Some((channel, _)) => channel.proceed(),
            None => Err(error(
                ErrorKind::System,
                "process set-up: the child is gone",
            )),
        }
    }

    /// Set up, with all its streams connected.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::SettingUp { reported: true, .. })
            && self.streams.values().all(Stream::is_established)
    }

    /// Hears what the child has to say.
    pub(crate) fn hear(&mut self, core: &mut Core) -> Progress {
        let Some((channel, _)) = &mut self.channel else {
            return Progress::None;
        };
        match (channel.receive(), self.phase) {
            (Received::Nothing, _) => Progress::None,
            (Received::Report(Ok(terminal)), Phase::SettingUp { number, .. }) => {
                match self.take_terminal(core, terminal) {
                    Ok(()) => {
                        self.phase = Phase::SettingUp {
                            number,
                            reported: true,
                        };
                        Progress::Reported
                    }
                    Err(error) => Progress::Failed(error),
                }
            }
            (Received::Report(Err(error)), Phase::SettingUp { .. }) => Progress::Failed(error),
            (Received::Report(Err(error)), Phase::Starting { number }) => {
                self.close_channel(core);
                self.phase = Phase::Running;
                Progress::NotExecuted { number, error }
            }
            (Received::Closed, Phase::Starting { number }) => {
                self.close_channel(core);
                self.phase = Phase::Running;
                Progress::Executed { number }
            }
            // The end of the process follows.
            (Received::Closed | Received::Report(_), _) => {
                self.close_channel(core);
                Progress::None
            }
        }
    }

    /// The child names its terminal by the number of its descriptor.
    fn take_terminal(&mut self, core: &mut Core, number: i32) -> Result<()> {
        if let Some(stream) = self.streams.values_mut().find(|_| number >= 0) {
            let terminal = pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty());
            let terminal = terminal.stage("terminal")?;
            rustix::io::ioctl_fionbio(&terminal, true).stage("terminal")?;
            stream.set_guest(terminal);
        }
        self.watch(core)
    }

    fn close_channel(&mut self, core: &mut Core) {
        if let Some((channel, token)) = self.channel.take() {
            core.poll.remove(&channel, token);
        }
    }

    /// Takes an event of a stream. An error is that of the connection attempt.
    pub(crate) fn stream_event(
        &mut self,
        core: &mut Core,
        slot: u8,
        side: Side,
        flags: EventFlags,
    ) -> rustix::io::Result<()> {
        let Some(stream) = self.streams.get_mut(&slot) else {
            return Ok(());
        };
        match stream.event(side, flags)? {
            Moved::Closed => self.close_stream(core, slot),
            Moved::Waits | Moved::Again => self.run_stream(core, slot),
        }
        Ok(())
    }

    pub(crate) fn run_stream(&mut self, core: &mut Core, slot: u8) {
        let Some(stream) = self.streams.get_mut(&slot) else {
            return;
        };
        match stream.run(&mut core.scratch) {
            Moved::Waits => {}
            Moved::Again => {
                core.again.insert((self.key.clone(), slot));
            }
            Moved::Closed => self.close_stream(core, slot),
        }
    }

    fn close_stream(&mut self, core: &mut Core, slot: u8) {
        if let Some(stream) = self.streams.remove(&slot) {
            for (fd, token) in stream.watched() {
                core.poll.remove(fd, token);
            }
        }
    }

    pub(crate) fn close_streams(&mut self, core: &mut Core) {
        while let Some(slot) = self.streams.keys().next().copied() {
            self.close_stream(core, slot);
        }
    }

    /// The process has ended: sends on what it left in its pipes.
    pub(crate) fn ended(&mut self, core: &mut Core, status: u8) {
        self.close_channel(core);
        self.phase = Phase::Ended { status };
        // Everything in the container's pid namespace ends with its init process, so its pipes have an
        // end. What another process leaves running may hold them open for ever.
        let to_the_end = self.key.1 == 0;
        for slot in self.streams.keys().copied().collect::<Vec<_>>() {
            match self
                .streams
                .get_mut(&slot)
                .map(|stream| stream.process_ended(to_the_end))
            {
                Some(Moved::Closed) => self.close_stream(core, slot),
                _ => self.run_stream(core, slot),
            }
        }
    }

    /// The status to tell of, once everything it wrote has been passed on.
    pub(crate) fn finished(&self) -> Option<u8> {
        match self.phase {
            Phase::Ended { status } if self.streams.is_empty() => Some(status),
            _ => None,
        }
    }

    /// Gives up on it: what is left is its end, and then the answer.
    pub(crate) fn abandon(&mut self, core: &mut Core, refusal: Option<(u64, AgentError)>) {
        self.refusal = refusal;
        self.close_channel(core);
        self.close_streams(core);
        self.phase = Phase::Failed;
        if let Err(errno) = crate::syscalls::kill(self.pid, libc::SIGKILL) {
            log::warn!("kill {}: {errno}", self.pid);
        }
    }

    /// To be called when it is gone, before it is dropped.
    pub(crate) fn release(&mut self, core: &mut Core) {
        self.close_channel(core);
        self.close_streams(core);
        if let Some((number, error)) = self.refusal.take() {
            core.reply(number, Err(error));
        }
    }

    pub(crate) fn resize(&self, size: agent_protocol::WindowSize) -> Result<()> {
        let terminal = self.streams.values().find_map(Stream::terminal);
        let terminal =
            terminal.ok_or_else(|| error(ErrorKind::State, "process has no terminal"))?;
        crate::devices::resize(terminal.as_fd(), size).stage("terminal: size")
    }

    pub(crate) fn signal(&self, signal: i32) -> Result<()> {
        match self.phase {
            Phase::Ended { .. } | Phase::Failed => Err(error(ErrorKind::State, "no such process")),
            _ => crate::syscalls::kill(self.pid, signal).stage("kill"),
        }
    }
}

impl Stdios {
    /// The child's half is for the child, the other stays.
    pub(crate) fn split(self) -> (ChildStdio, BTreeMap<u8, Stream>) {
        (self.child, self.streams)
    }
}
