// SPDX-License-Identifier: Apache-2.0
//! `delete`: removes what is left of a container. It needs nothing but the state directory.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::create::oci_state;
use super::start::{host_hooks, spec_of};
use super::{Error, chain, live};
use crate::bundle::parse_spec;
use crate::cgroup::{Cgroup, Hierarchies};
use crate::cli::{Delete, Global};
use crate::hooks::{self, Environment};
use crate::network;
use crate::plan::{self, Network, cgroup_location};
use crate::status::Status;
use crate::store::{Locked, State, Store, StoreError};

/// For the last processes of a cgroup to be gone.
const CGROUP: Duration = Duration::from_secs(10);

pub fn run(store: &Store, global: &Global, arguments: &Delete) -> Result<u8, Error> {
    if arguments.regex {
        return Err(Error::Unsupported("delete --regex"));
    }
    match store.load(&arguments.id) {
        Ok(state) => end(store, &state, arguments.force)?,
        Err(StoreError::NotFound) if arguments.force => return Ok(0),
        Err(error) if arguments.force && error.is_unreadable() => {
            live::end_unknown(store, &arguments.id)?;
        }
        // Left behind by a create that was killed: nothing of it is alive.
        Err(StoreError::NoState) => {}
        Err(error) => return Err(error.into()),
    }
    match store.lock(&arguments.id) {
        Ok(container) => destroy(store, global, container)?,
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
    live::end(store, &state.id, state.process)
}

/// Removes a container that has ended: cgroup, hooks, state. The state goes last, so that what fails
/// can be tried again.
pub fn destroy(store: &Store, global: &Global, container: Locked) -> Result<(), Error> {
    let state = match container.load() {
        Ok(state) => state,
        // Saved before its cgroup was made.
        Err(StoreError::NoState) => return Ok(container.remove()?),
        Err(error) if error.is_unreadable() => {
            remove_cgroups(configured_cgroups(store, global, container.id()))?;
            release_links(store, container.id());
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
    remove_cgroups(state.cgroups.clone())?;
    release_links(store, &state.id);
    poststop(store, &state);
    Ok(container.remove()?)
}

fn remove_cgroups(directories: Vec<PathBuf>) -> Result<(), Error> {
    if directories.is_empty() {
        return Ok(());
    }
    let cgroup = Cgroup::open(directories);
    cgroup.kill(Instant::now() + CGROUP)?;
    Ok(cgroup.delete(Instant::now() + CGROUP)?)
}

/// Where `create` has put the container, worked out again from its configuration. Nothing, if that cannot be read either.
fn configured_cgroups(store: &Store, global: &Global, id: &str) -> Vec<PathBuf> {
    let directories = || -> Option<Vec<PathBuf>> {
        let config = store.config(id).ok()?;
        let spec = parse_spec(&store.directory(id).join("config.json"), &config).ok()?;
        let linux = spec.linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
        let location = cgroup_location(path, id, global.cgroup_manager()).ok()?;
        Some(Cgroup::planned(&Hierarchies::detect().ok()?, &location))
    };
    directories().unwrap_or_default()
}

/// What traffic control the container had in a network namespace that others have made.
fn release_links(store: &Store, id: &str) {
    let spec = spec_of(store, id);
    if let Ok(spec) = spec
        && let Ok(Network::Path(path)) = plan::network(&spec)
        && plan::joins_links(&spec)
    {
        network::release(&path);
    }
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
