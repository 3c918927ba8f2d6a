// SPDX-License-Identifier: Apache-2.0
//! The creating verb's side of a monitor: starting it, and hearing what becomes of it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::event::PollFlags;
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::LinkNameSpaceType;

use super::CONSOLE_VARIABLE;
use super::order::{Deadlines, Failure, Go, Order, Report, Stage};
use crate::channel::{self, Channel, wait};
use crate::cli::{self, Global};
use crate::signal_fd;
use crate::{sandbox, stages, store, templates};

/// The monitor keeps its own deadlines; this is for one that hangs.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("start the monitor")]
    Spawn(#[source] io::Error),
    #[error("tell the monitor what to do")]
    Order(#[source] channel::Error),
    #[error("no word from the monitor while {0}")]
    Silent(Stage, #[source] channel::Error),
    #[error("the monitor ended while {stage} ({status}{})", killed(*status))]
    Died { stage: Stage, status: ExitStatus },
    #[error("wait for the monitor")]
    Wait(#[source] io::Error),
    #[error("interrupted by signal {0} while {1}")]
    Interrupted(i32, Stage),
    #[error(transparent)]
    Failed(Failure),
}

/// A monitor that is this process's child. It is killed if it is dropped.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    pidfd: OwnedFd,
    channel: Channel,
    stage: Stage,
    deadline: Instant,
    keep: bool,
}

impl Monitor {
    /// Starts the process. With `streams` it inherits the standard streams, for the container.
    pub fn spawn(id: &str, streams: bool, global: &Global) -> Result<Monitor, Error> {
        let (own, other) = Channel::pair().map_err(Error::Spawn)?;
        let child = command(id, other.as_fd(), streams, global).and_then(spawn_as_init);
        let child = child.map_err(Error::Spawn)?;
        drop(other);
        // The child has not been waited for, so its pid is its own.
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| Error::Spawn(error.into()))?;
        Ok(Monitor {
            child,
            pidfd,
            channel: Channel::new(own),
            stage: Stage::Setup,
            deadline: Instant::now() + GRACE,
            keep: false,
        })
    }

    pub fn pid(&self) -> i32 {
        // Linux pids are below 2^22.
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub fn order(&mut self, order: &Order, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let Deadlines { boot, request } = order.deadlines;
        self.deadline = Instant::now() + boot + request + GRACE;
        let sent = self.channel.send_all(order, files, Some(self.deadline));
        sent.map_err(|error| self.explain(error, Error::Order))
    }

    /// The hooks that it waits for have run.
    pub fn go(&mut self) -> Result<(), Error> {
        let sent = self.channel.send_all(&Go, &[], Some(self.deadline));
        sent.map_err(|error| self.explain(error, Error::Order))
    }

    /// Waits for what was ordered: the container's namespaces, its creation, its start. Signals that
    /// arrive at `signals` meanwhile end the wait, if they are of those that end a process.
    pub fn expect(&mut self, expected: &Report, signals: BorrowedFd<'_>) -> Result<(), Error> {
        loop {
            let report = self.next_report(signals)?;
            match report {
                report if report == *expected => return Ok(()),
                Report::Stage(stage) => self.stage = stage,
                Report::Failed(failure) => return Err(Error::Failed(failure)),
                // Earlier steps that nobody waited for.
                Report::Namespaces | Report::Created | Report::Started => {}
            }
        }
    }

    fn next_report(&mut self, signals: BorrowedFd<'_>) -> Result<Report, Error> {
        let stage = self.stage;
        loop {
            let silent = |error| Error::Silent(stage, error);
            match self.channel.next() {
                Ok(Some(report)) => return Ok(report),
                Ok(None) => {}
                Err(error) => return Err(silent(error)),
            }
            channel::wait_for_any(&[self.channel.as_fd(), signals], Some(self.deadline))
                .map_err(silent)?;
            while let Some(signal) = signal_fd::next(signals) {
                if signal_fd::ENDING.contains(&signal) {
                    return Err(Error::Interrupted(signal, stage));
                }
            }
            if let Err(error) = self.channel.fill() {
                return Err(self.explain(error, silent));
            }
        }
    }

    /// A connection that is closed means a monitor that has died, about which there is more to say.
    fn explain(&mut self, error: channel::Error, or: impl Fn(channel::Error) -> Error) -> Error {
        match error {
            channel::Error::Closed => match self.wait() {
                Ok(status) => Error::Died {
                    stage: self.stage,
                    status,
                },
                Err(error) => Error::Wait(error),
            },
            error => or(error),
        }
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.keep = true;
        self.child.wait()
    }

    /// Why it has ended, if not because the container has. To be asked after its end.
    pub fn failure(&mut self) -> Option<Failure> {
        loop {
            match self.channel.next() {
                Ok(Some(Report::Failed(failure))) => return Some(failure),
                Ok(Some(_)) => {}
                Ok(None) if matches!(self.channel.fill(), Ok(true)) => {}
                _ => return None,
            }
        }
    }

    /// Sends any signal on to the container, by way of the monitor.
    pub fn forward(&self, signal: i32) {
        // SAFETY: kill(2) takes numbers only. The pid is that of a child that has not been waited
        // for, so it is nobody else's.
        unsafe { libc::kill(self.pid(), signal) };
    }

    /// Lets the monitor live on after this process.
    pub fn release(mut self) {
        self.keep = true;
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.keep {
            // It may have ended already.
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// Root's monitors are each the first process of a pid namespace, in which they see nobody. They have the pid that this
/// process knows them by all the same. A user's own monitor has no such namespace: its user namespace comes first, and
/// that is its own doing.
fn spawn_as_init(mut command: Command) -> io::Result<Child> {
    if !store::is_host_root() {
        return command.spawn();
    }
    let own = File::open("/proc/self/ns/pid")?;
    sandbox::new_pid_namespace_for_children().map_err(io::Error::other)?;
    let child = command.spawn();
    // Hooks and whatever else is started are the host's.
    let kind = Some(LinkNameSpaceType::ProcessID);
    let back = rustix::thread::move_into_link_name_space(own.as_fd(), kind);
    match (child, back) {
        (Ok(mut child), Err(error)) => {
            child.kill()?;
            child.wait()?;
            Err(error.into())
        }
        (child, _) => child,
    }
}

/// The environment variables that a monitor is given.
pub const HANDED_ON: [&str; 3] = [CONSOLE_VARIABLE, stages::VARIABLE, templates::VARIABLE];

/// The same program again, which is what `/proc/self/exe` is even if the file has been replaced.
fn command(
    id: &str,
    socket: BorrowedFd<'_>,
    streams: bool,
    global: &Global,
) -> io::Result<Command> {
    // Inherited by the one process that is started before the socket is closed here.
    rustix::io::fcntl_setfd(socket, FdFlags::empty())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("sandbox").env_clear();
    for variable in HANDED_ON {
        if let Some(path) = std::env::var_os(variable) {
            command.env(variable, path);
        }
    }
    command.arg(cli::MONITOR).args(logging(global));
    command.args(["--fd", &socket.as_raw_fd().to_string(), "--", id]);
    if !streams {
        command.stdin(Stdio::null());
        command.stdout(Stdio::null());
        command.stderr(Stdio::null());
    }
    Ok(command)
}

/// The monitor logs to where the verb does.
fn logging(global: &Global) -> Vec<OsString> {
    let mut arguments = Vec::new();
    let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
    if let Some(path) = global
        .log
        .as_deref()
        .and_then(|path| std::path::absolute(path).ok())
    {
        option("--log", path.into());
    }
    if let Some(format) = global.log_format.to_possible_value() {
        option("--log-format", format.get_name().into());
    }
    let level = global.log_level.and_then(|level| level.to_possible_value());
    if let Some(level) = level {
        option("--log-level", level.get_name().into());
    }
    if global.debug {
        arguments.push("--debug".into());
    }
    arguments
}

/// What the kernel does not say.
fn killed(status: ExitStatus) -> &'static str {
    match status.signal() {
        Some(libc::SIGKILL) => ", from outside or for lack of memory in its cgroup",
        _ => "",
    }
}

/// The exit status that a shell would give.
pub fn shell_status(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255)
}

/// Waits for the end of a process that need not be a child.
pub fn wait_for_end(
    pidfd: BorrowedFd<'_>,
    deadline: Option<Instant>,
) -> Result<(), channel::Error> {
    wait(pidfd, PollFlags::IN, deadline)
}
