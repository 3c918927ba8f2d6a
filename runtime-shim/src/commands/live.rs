// SPDX-License-Identifier: Apache-2.0
//! What the verbs on a container with a monitor have in common.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Signal, pidfd_send_signal};

use super::Error;
use crate::channel::{self, poll_until};
use crate::control::{self, Client, PATIENCE, Request};
use crate::identity::Identity;
use crate::monitor::launch::wait_for_end;
use crate::monitor::order::Deadlines;
use crate::status::StatusError;
use crate::store::{State, Store, StoreError};

/// How long a monitor that was killed may take to be gone.
const END: Duration = Duration::from_secs(10);

/// How long SIGKILL may take by way of the guest, in which the agent has less, before the monitor itself
/// gets it.
const KILL: Duration = Duration::from_millis(1900);

/// How long an answer that needs the guest may take: the monitor gives up a little earlier.
pub fn guest_deadline() -> Option<Instant> {
    Some(Instant::now() + Deadlines::from_environment().request + PATIENCE)
}

/// Connects to a container's monitor.
pub fn connect(store: &Store, id: &str) -> Result<Client, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory =
        open(store.directory(id), flags, Mode::empty()).map_err(|_| StoreError::NotFound)?;
    Ok(Client::connect(directory.as_fd())?)
}

/// Sends a signal to the init process, or to all processes.
pub fn signal(
    store: &Store,
    id: &str,
    process: Identity,
    signal: i32,
    all: bool,
) -> Result<(), Error> {
    let kill = signal == libc::SIGKILL;
    let deadline = if kill {
        Some(Instant::now() + KILL)
    } else {
        guest_deadline()
    };
    let request = Request::Signal { signal, all };
    let sent = connect(store, id).and_then(|mut client| Ok(client.command(&request, deadline)?));
    match sent {
        Err(Error::Control(error)) if !is_refusal(&error) => {
            let Some(monitor) = process.open() else {
                return Err(StatusError::NotRunning.into());
            };
            if !kill {
                return Err(error.into());
            }
            log::warn!("container {id}: its monitor does not answer and is killed");
            send_kill(&monitor)
        }
        result => result,
    }
}

fn is_refusal(error: &control::Error) -> bool {
    matches!(error, control::Error::Refused(_))
}

fn send_kill(monitor: &OwnedFd) -> Result<(), Error> {
    match pidfd_send_signal(monitor, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(Error::Kill(error.into())),
    }
}

/// Kills a container and waits until its monitor is gone. The guest gets the chance to write back
/// file data; whether it takes it or not, the end comes.
pub fn end(store: &Store, id: &str, process: Identity) -> Result<(), Error> {
    let Some(monitor) = process.open() else {
        return Ok(());
    };
    if let Err(error) = signal(store, id, process, libc::SIGKILL, true) {
        log::debug!("container {id}: kill: {error}");
        send_kill(&monitor)?;
    }
    if gone(&monitor, END)? {
        return Ok(());
    }
    log::warn!("container {id}: its monitor does not end and is killed");
    send_kill(&monitor)?;
    if gone(&monitor, END)? {
        Ok(())
    } else {
        Err(Error::StillThere(process.pid))
    }
}

/// The same for a container whose state does not tell who its monitor is: it is who holds the other end of the control
/// socket.
pub fn end_unknown(store: &Store, id: &str) -> Result<(), Error> {
    let Ok(client) = connect(store, id) else {
        return Ok(());
    };
    let Some(process) = client.monitor().and_then(Identity::of) else {
        return Ok(());
    };
    // The kernel told the pid of the one who listens. If the connection still stands, that has been so all the time.
    if poll_until(
        &mut [PollFd::new(&client, PollFlags::RDHUP)],
        Some(Instant::now()),
    )
    .is_ok()
    {
        return Ok(());
    }
    end(store, id, process)
}

/// Waits for a monitor that is ending.
pub fn wait_for_end_of(state: &State) -> Result<(), Error> {
    match state.process.open() {
        Some(monitor) if !gone(&monitor, END)? => Err(Error::StillThere(state.process.pid)),
        _ => Ok(()),
    }
}

fn gone(monitor: &OwnedFd, within: Duration) -> Result<bool, Error> {
    match wait_for_end(monitor.as_fd(), Some(Instant::now() + within)) {
        Ok(()) => Ok(true),
        Err(channel::Error::TimedOut) => Ok(false),
        Err(error) => Err(control::Error::Channel(error).into()),
    }
}
