// SPDX-License-Identifier: Apache-2.0
//! `exec`: a further process in a container. Its streams go to the monitor; what stays here, or in a
//! process of its own when detached, stands for it on the host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use agent_protocol::{Process, WindowSize};
use rustix::event::{PollFd, PollFlags};

use super::create::send_pidfd;
use super::exec_process::oci_process;
use super::{Error, check_console, exec_stub, live};
use crate::bundle::parse_spec;
use crate::channel::poll_until;
use crate::cli::Exec;
use crate::console::{self, Pty, Ready, Relay};
use crate::control::{self, Client, Descriptors, Reply, Request};
use crate::identity::Identity;
use crate::store::Store;
use crate::{channel, pid_file, plan, signal_fd, stdio};

/// The status of a process whose container has gone.
pub const KILLED: u8 = 128 + 9;

pub fn run(store: &Store, arguments: &Exec) -> Result<u8, Error> {
    let state = store.load(&arguments.id)?;
    state.status().can_exec(arguments.ignore_paused)?;
    let mut process = plan_process(store, arguments)?;
    let terminal = process.terminal.is_some();
    check_console(
        terminal,
        !arguments.detach,
        arguments.console_socket.as_deref(),
    )?;
    let signals = signal_fd::take().map_err(Error::Signals)?;
    let streams = Streams::open(arguments, &mut process)?;

    let mut client = live::connect(store, &arguments.id)?;
    let request = Request::Exec {
        process: Box::new(process),
        stdio: streams.descriptors(),
        ignore_paused: arguments.ignore_paused,
    };
    client.send(&request, &streams.files())?;
    match client.receive(live::guest_deadline())? {
        Reply::Done => {}
        _ => return Err(control::Error::OutOfTurn.into()),
    }
    if arguments.detach {
        let stub = exec_stub::start(client, streams.into_terminal(), &signals)?;
        return announce(arguments, stub).map(|()| 0);
    }
    stand_in(arguments, &mut client)?;
    let relay = streams.into_master().map(Relay::start).transpose()?;
    attend(&mut client, relay, signals.as_fd())
}

fn plan_process(store: &Store, arguments: &Exec) -> Result<Process, Error> {
    if arguments.preserve_fds > 0 {
        return Err(Error::PreserveFds);
    }
    if arguments.cgroup.iter().any(|path| path != "/") {
        return Err(Error::Unsupported("exec --cgroup"));
    }
    let config = store.config(&arguments.id)?;
    let spec = parse_spec(&store.directory(&arguments.id).join("config.json"), &config)?;
    let (process, mut warnings) = oci_process(&spec, arguments)?;
    let (process, more) = plan::plan_exec(&spec, &process, None)?;
    warnings.extend(more);
    for warning in warnings {
        log::warn!("{warning}");
    }
    Ok(process)
}

/// The streams of the process, before they go to the monitor.
enum Streams {
    Separate([stdio::Stream; 3]),
    Terminal {
        pty: Pty,
        /// Somebody else got the master.
        sent: bool,
    },
}

impl Streams {
    fn open(arguments: &Exec, process: &mut Process) -> Result<Streams, Error> {
        let Some(size) = &mut process.terminal else {
            let stdin = rustix::stdio::stdin();
            let all = [stdin, rustix::stdio::stdout(), rustix::stdio::stderr()];
            let [stdin, stdout, stderr] = all.map(stdio::stream);
            let all = (stdin.map_err(Error::Stdio)?, stdout.map_err(Error::Stdio)?);
            return Ok(Streams::Separate([
                all.0,
                all.1,
                stderr.map_err(Error::Stdio)?,
            ]));
        };
        if *size == WindowSize::default()
            && arguments.console_socket.is_none()
            && let Some(own) = console::own_size()
        {
            *size = own;
        }
        let pty = Pty::open(*size)?;
        if let Some(socket) = &arguments.console_socket {
            pty.send_master(socket)?;
        }
        let sent = arguments.console_socket.is_some();
        Ok(Streams::Terminal { pty, sent })
    }

    fn descriptors(&self) -> Descriptors {
        match self {
            Streams::Terminal { .. } => Descriptors::Terminal,
            Streams::Separate([stdin, stdout, stderr]) => Descriptors::Streams {
                stdin: stdin.is_some(),
                stdout: stdout.is_some(),
                stderr: stderr.is_some(),
            },
        }
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Streams::Terminal { pty, .. } => vec![pty.slave.as_fd()],
            Streams::Separate(all) => all.iter().flatten().map(AsFd::as_fd).collect(),
        }
    }

    /// The terminal whose size the stub follows.
    fn into_terminal(self) -> Option<OwnedFd> {
        match self {
            Streams::Terminal { pty, .. } => Some(pty.slave),
            Streams::Separate(_) => None,
        }
    }

    /// The side that this process copies to and from. The other side is the monitor's alone then.
    fn into_master(self) -> Option<OwnedFd> {
        match self {
            Streams::Terminal { pty, sent: false } => Some(pty.master),
            _ => None,
        }
    }
}

fn stand_in(arguments: &Exec, client: &mut Client) -> Result<(), Error> {
    let pid = std::process::id();
    quietly(client.send(&Request::StandIn { pid }, &[]))?;
    announce(arguments, i32::try_from(pid).unwrap_or(0))
}

/// Tells the caller who stands for the process.
fn announce(arguments: &Exec, pid: i32) -> Result<(), Error> {
    if let Some(path) = &arguments.pid_file {
        pid_file::write(path, pid)?;
    }
    if let Some(socket) = &arguments.pidfd_socket {
        let pidfd = Identity::of(pid).and_then(|process| process.open());
        send_pidfd(socket, pidfd.ok_or(Error::NoIdentity)?.as_fd())?;
    }
    Ok(())
}

/// Forwards signals, and the terminal if there is one, until the process has ended.
fn attend(
    client: &mut Client,
    mut relay: Option<Relay>,
    signals: BorrowedFd<'_>,
) -> Result<u8, Error> {
    if let Some(size) = relay.as_ref().and_then(|_| console::own_size()) {
        quietly(client.send(&Request::Resize(size), &[]))?;
    }
    let mut status = None;
    loop {
        // What came together with the first answer is read already, and wakes no poll.
        if status.is_none() {
            status = exit_status(client)?;
        }
        if let Some(status) = status
            && relay.as_ref().is_none_or(Relay::finished)
        {
            return Ok(status);
        }
        let ready = {
            let mut fds = vec![PollFd::from_borrowed_fd(signals, PollFlags::IN)];
            if status.is_none() {
                fds.push(PollFd::new(client, PollFlags::IN));
            }
            if let Some(relay) = &relay {
                fds.extend(relay.interest());
            }
            poll_until(&mut fds, None).map_err(Error::Wait)?;
            Ready::of(&fds)
        };
        while let Some(signal) = signal_fd::next(signals) {
            match (status, &relay) {
                (Some(status), _) => return Ok(status),
                (None, Some(relay)) if signal == libc::SIGWINCH => {
                    relay.resize();
                    forward_size(client)?;
                }
                (None, _) => forward(client, signal)?,
            }
        }
        if let Some(relay) = &mut relay {
            relay.advance(&ready)?;
        }
    }
}

/// Looks for the end of the process in what the monitor has sent. If the monitor went, so did it.
pub fn exit_status(client: &mut Client) -> Result<Option<u8>, Error> {
    match client.poll() {
        Ok(Some(Reply::Exited(status))) => Ok(Some(status)),
        Ok(_) => Ok(None),
        Err(control::Error::Channel(channel::Error::Closed)) => Ok(Some(KILLED)),
        Err(error) => Err(error.into()),
    }
}

pub fn forward(client: &mut Client, signal: i32) -> Result<(), Error> {
    let request = Request::Signal { signal, all: false };
    quietly(client.send(&request, &[]))
}

fn forward_size(client: &mut Client) -> Result<(), Error> {
    match console::own_size() {
        Some(size) => quietly(client.send(&Request::Resize(size), &[])),
        None => Ok(()),
    }
}

/// A monitor that has just gone is found out about when it is read from.
pub fn quietly(sent: Result<(), control::Error>) -> Result<(), Error> {
    match sent {
        Err(control::Error::Channel(channel::Error::Closed)) => Ok(()),
        sent => Ok(sent?),
    }
}
