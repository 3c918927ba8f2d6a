// SPDX-License-Identifier: Apache-2.0
//! `start`: lets the process of a created container run.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use agent_protocol::Hook;
use oci_spec::runtime::Spec;

use super::create::oci_state;
use super::{Error, live};
use crate::bundle::parse_spec;
use crate::hooks::{self, Environment};
use crate::network::{self, Joined};
use crate::plan::{self, HostHooks};
use crate::status::Status;
use crate::store::{State, Store, is_host_root};

pub fn run(store: &Store, id: &str) -> Result<u8, Error> {
    let container = store.lock(id)?;
    let mut state = container.load()?;
    state.status().can_start()?;
    let spec = spec_of(store, id)?;
    let (hooks, _) = plan::hooks(spec.hooks().as_ref())?;
    let (cards, taps) = new_links(&state, &spec)?.into_iter().unzip();
    // Without a deadline here: a hook in the guest may have none, and the monitor has one otherwise.
    live::connect(store, id)?.start(cards, taps)?;
    state.status = Status::Running;
    // What runs without anybody knowing, or against a hook, is not to run.
    let saved = container.save(&state).map_err(Error::from);
    if let Err(error) = saved.and_then(|()| poststart(&state, &hooks.poststart)) {
        live::end(store, id, state.process)?;
        return Err(error);
    }
    Ok(0)
}

/// The links that an engine has moved into the container's network namespace since `create`.
fn new_links(state: &State, spec: &Spec) -> Result<Vec<(Joined, OwnedFd)>, Error> {
    let Some(monitor) = state.process.open().filter(|_| plan::joins_links(spec)) else {
        return Ok(Vec::new());
    };
    match network::join_for(monitor.as_fd()) {
        // Nobody could have moved anything into a namespace that only the monitor may enter.
        Err(network::Error::Step(_, error))
            if error.kind() == io::ErrorKind::PermissionDenied && !is_host_root() =>
        {
            Ok(Vec::new())
        }
        result => Ok(result?),
    }
}

/// Since version 1.3 of the specification a poststart hook that fails fails the start.
pub fn poststart(state: &State, hooks: &[Hook]) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let text = oci_state(state, state.process.pid, Status::Running)?;
    let environment = Environment {
        state: &text,
        directory: &state.bundle,
        network: None,
    };
    Ok(hooks::run("poststart", hooks, &environment)?)
}

/// The configuration that the container was created from.
pub fn spec_of(store: &Store, id: &str) -> Result<Spec, Error> {
    let config = store.config(id)?;
    Ok(parse_spec(
        &store.directory(id).join("config.json"),
        &config,
    )?)
}

pub fn host_hooks(store: &Store, id: &str) -> Result<HostHooks, Error> {
    let spec = spec_of(store, id)?;
    let (hooks, _) = plan::hooks(spec.hooks().as_ref())?;
    Ok(hooks)
}
