// SPDX-License-Identifier: Apache-2.0
//! The process that stands for a detached exec on the host: it passes on the signals it gets and ends
//! with the status of its process. If it is killed, its connection breaks and the process is killed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{DumpableBehavior, ioctl_tiocsctty, set_dumpable_behavior, setsid};

use super::Error;
use super::exec::{KILLED, exit_status, forward, quietly};
use crate::channel::poll_until;
use crate::control::{Client, Request};
use crate::{console, sandbox, signal_fd, stdio};

/// Forks the stub off. Nothing has to be handed over, and the process runs already: there is nothing
/// left that could fail for a reason that the caller would want to hear.
pub fn start(client: Client, terminal: Option<OwnedFd>, signals: &OwnedFd) -> Result<i32, Error> {
    // SAFETY: `exec` has one thread, so the child finds no lock taken and no data half changed.
    match unsafe { libc::fork() } {
        -1 => Err(Error::Fork(std::io::Error::last_os_error())),
        0 => stand(client, terminal, signals.as_fd()),
        pid => Ok(pid),
    }
}

fn stand(mut client: Client, terminal: Option<OwnedFd>, signals: BorrowedFd<'_>) -> ! {
    // The log file, too, is left to others.
    log::set_max_level(log::LevelFilter::Off);
    let status = leave_caller(&client, terminal.as_ref(), signals)
        .and_then(|()| attend(&mut client, terminal.as_ref(), signals))
        .unwrap_or(KILLED);
    std::process::exit(status.into())
}

/// Nobody is to wait for a descriptor that this process happens to hold.
fn leave_caller(
    client: &Client,
    terminal: Option<&OwnedFd>,
    signals: BorrowedFd<'_>,
) -> Result<(), Error> {
    setsid().map_err(|error| Error::Stdio(error.into()))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| Error::Stdio(error.into()))?;
    if let Some(terminal) = terminal {
        // So that changes of its size come as signals.
        ioctl_tiocsctty(terminal).map_err(|error| Error::Stdio(error.into()))?;
    }
    stdio::detach().map_err(Error::Stdio)?;
    let mut keep = vec![client.as_fd(), signals];
    keep.extend(terminal.map(AsFd::as_fd));
    Ok(sandbox::close_all_but(&keep)?)
}

fn attend(
    client: &mut Client,
    terminal: Option<&OwnedFd>,
    signals: BorrowedFd<'_>,
) -> Result<u8, Error> {
    let pid = std::process::id();
    quietly(client.send(&Request::StandIn { pid }, &[]))?;
    // Set by an engine before there was somebody to get a signal for it.
    if let Some(terminal) = terminal {
        resize(client, terminal)?;
    }
    loop {
        // What came together with the first answer is read already, and wakes no poll.
        if let Some(status) = exit_status(client)? {
            return Ok(status);
        }
        let mut fds = [
            PollFd::from_borrowed_fd(signals, PollFlags::IN),
            PollFd::new(client, PollFlags::IN),
        ];
        poll_until(&mut fds, None).map_err(Error::Wait)?;
        while let Some(signal) = signal_fd::next(signals) {
            match terminal {
                Some(terminal) if signal == libc::SIGWINCH => resize(client, terminal)?,
                _ => forward(client, signal)?,
            }
        }
    }
}

fn resize(client: &mut Client, terminal: &OwnedFd) -> Result<(), Error> {
    match console::size(terminal.as_fd()) {
        Ok(size) => quietly(client.send(&Request::Resize(size), &[])),
        Err(_) => Ok(()),
    }
}
