// SPDX-License-Identifier: Apache-2.0
//! `delete`: removes what is left of a container. It needs nothing but the state directory.

use std::time::{Duration, Instant};

use super::create::oci_state;
use super::start::host_hooks;
use super::{Error, chain, live};
use crate::cgroup::Cgroup;
use crate::cli::Delete;
use crate::hooks::{self, Environment};
use crate::status::Status;
use crate::store::{Locked, State, Store, StoreError};

/// For the last processes of a cgroup to be gone.
const CGROUP: Duration = Duration::from_secs(10);

pub fn run(store: &Store, arguments: &Delete) -> Result<u8, Error> {
    if arguments.regex {
        return Err(Error::Unsupported("delete --regex"));
    }
    match store.load(&arguments.id) {
        Ok(state) => end(store, &state, arguments.force)?,
        Err(StoreError::NotFound) if arguments.force => return Ok(0),
        // Left behind by a create that was killed: nothing of it is alive.
        Err(StoreError::NoState) => {}
        Err(StoreError::Truncated(_) | StoreError::Damaged { .. }) if arguments.force => {}
        Err(error) => return Err(error.into()),
    }
    match store.lock(&arguments.id) {
        Ok(container) => destroy(store, container)?,
        Err(StoreError::NotFound) if arguments.force => {}
        Err(error) => return Err(error.into()),
    }
    Ok(0)
}

/// Without the lock, since another verb may hold it while it waits for this very container.
fn end(store: &Store, state: &State, force: bool) -> Result<(), Error> {
    let status = state.status();
    if !force {
        status.can_delete(&state.id)?;
    }
    if status == Status::Stopped {
        return Ok(());
    }
    live::end(store, state)
}

/// Removes a container that has ended: cgroup, hooks, state. The state goes last, so that what fails
/// can be tried again.
pub fn destroy(store: &Store, container: Locked) -> Result<(), Error> {
    let state = match container.load() {
        Ok(state) => state,
        Err(StoreError::NoState | StoreError::Truncated(_) | StoreError::Damaged { .. }) => {
            return Ok(container.remove()?);
        }
        Err(error) => return Err(error.into()),
    };
    // Started again between the look without the lock and now.
    let status = state.status();
    if status != Status::Stopped {
        status.can_delete(&state.id)?;
        return Err(Error::StillThere(state.process.pid));
    }
    if !state.cgroups.is_empty() {
        let cgroup = Cgroup::open(state.cgroups.clone());
        cgroup.kill(Instant::now() + CGROUP)?;
        cgroup.delete(Instant::now() + CGROUP)?;
    }
    poststop(store, &state);
    Ok(container.remove()?)
}

/// All of them, and whatever becomes of them the container is gone.
fn poststop(store: &Store, state: &State) {
    let run = || -> Result<(), Error> {
        let hooks = host_hooks(store, &state.id)?.poststop;
        if hooks.is_empty() {
            return Ok(());
        }
        let text = oci_state(state, 0, Status::Stopped)?;
        let environment = Environment {
            state: &text,
            directory: &state.bundle,
            network: None,
        };
        for error in hooks::run_all("poststop", &hooks, &environment) {
            log::warn!("{}", chain(&error));
        }
        Ok(())
    };
    if let Err(error) = run() {
        log::warn!("poststop hooks: {}", chain(&error));
    }
}
