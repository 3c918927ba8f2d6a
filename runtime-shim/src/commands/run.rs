// SPDX-License-Identifier: Apache-2.0
//! `run`: create and start in one, and unless detached the container's end too.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags};
use rustix::rand::{GetRandomFlags, getrandom};

use super::create::{Created, Mode, Wanted, create};
use super::{Error, delete, start};
use crate::channel::poll_until;
use crate::cli::{Global, Run};
use crate::console::{Ready, Relay};
use crate::monitor::launch::{Monitor, shell_status};
use crate::monitor::order::Report;
use crate::status::Status;
use crate::store::{Store, StoreError};
use crate::{signal_fd, stages};

pub fn run(store: &Store, global: &Global, arguments: &Run) -> Result<u8, Error> {
    let target = arguments.target(|path: &Path| path.join("config.json").is_file())?;
    let id = match target.id {
        Some(id) => id,
        None => random_id()?,
    };
    let signals = signal_fd::take().map_err(Error::Signals)?;
    let mode = if arguments.detach {
        Mode::Detached
    } else {
        Mode::Foreground
    };
    let created = create(Wanted {
        global,
        store,
        bundle: &target.bundle,
        id: &id,
        options: &arguments.options,
        mode,
        signals: signals.as_fd(),
        checkpoint: None,
        forked_from: None,
    })?;
    let end = End {
        detach: arguments.detach,
        keep: arguments.keep,
    };
    see_through(store, global, created, &end, signals.as_fd())
}

/// What becomes of a container that runs.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// It is left alone.
    pub detach: bool,
    /// It is not deleted when it has ended.
    pub keep: bool,
}

/// Waits for the start, and unless detached for the end.
pub fn see_through(
    store: &Store,
    global: &Global,
    mut created: Created,
    end: &End,
    signals: BorrowedFd<'_>,
) -> Result<u8, Error> {
    let id = created.container.id().to_owned();
    let started = wait_for_start(&mut created, signals);
    if started.is_ok() && end.detach {
        created.monitor.release();
        return Ok(0);
    }
    let Created {
        container,
        mut monitor,
        terminal,
        ..
    } = created;
    // Other verbs have their turn while it runs.
    drop(container);
    let ended = started.and_then(|()| {
        let relay = terminal.map(Relay::start).transpose()?;
        attend(&mut monitor, relay, signals)
    });
    drop(monitor);
    let deleted = if end.keep && ended.is_ok() {
        Ok(())
    } else {
        delete_ended(store, global, &id)
    };
    stages::mark("delete");
    let status = ended?;
    deleted?;
    Ok(shell_status(status))
}

fn random_id() -> Result<String, Error> {
    let mut bytes = [0u8; 6];
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|error| Error::RandomId(error.into()))?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sandbox-{digits}"))
}

pub fn wait_for_start(created: &mut Created, signals: BorrowedFd<'_>) -> Result<(), Error> {
    created.monitor.expect(&Report::Started, signals)?;
    created.state.status = Status::Running;
    created.container.save(&created.state)?;
    start::poststart(&created.state, &created.host.hooks.poststart)
}

/// Forwards signals, and the terminal if there is one, until the container has ended.
fn attend(
    monitor: &mut Monitor,
    mut relay: Option<Relay>,
    signals: BorrowedFd<'_>,
) -> Result<ExitStatus, Error> {
    let mut ended = false;
    while !ended || relay.as_ref().is_some_and(|relay| !relay.finished()) {
        let ready = {
            let mut fds = Vec::with_capacity(5);
            fds.push(PollFd::from_borrowed_fd(signals, PollFlags::IN));
            if !ended {
                fds.push(PollFd::from_borrowed_fd(monitor.pidfd(), PollFlags::IN));
            }
            if let Some(relay) = &relay {
                fds.extend(relay.interest());
            }
            poll_until(&mut fds, None).map_err(Error::Wait)?;
            Ready::of(&fds)
        };
        ended |= ready.has(monitor.pidfd());
        while let Some(signal) = signal_fd::next(signals) {
            match &relay {
                Some(relay) if signal == libc::SIGWINCH => relay.resize(),
                // Its output that nobody reads is not worth more patience.
                _ if ended => return monitor.wait().map_err(Error::WaitForMonitor),
                _ => monitor.forward(signal),
            }
        }
        if let Some(relay) = &mut relay {
            relay.advance(&ready)?;
        }
    }
    // The terminal is itself again before anything is written to it.
    drop(relay);
    let status = monitor.wait().map_err(Error::WaitForMonitor)?;
    if let Some(failure) = monitor.failure() {
        log::error!("{failure}");
    }
    Ok(status)
}

/// What is left of the container, unless somebody else has deleted it.
pub fn delete_ended(store: &Store, global: &Global, id: &str) -> Result<(), Error> {
    match store.lock(id) {
        Ok(container) => delete::destroy(store, global, container),
        Err(StoreError::NotFound) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
