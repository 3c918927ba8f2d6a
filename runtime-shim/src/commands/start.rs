// SPDX-License-Identifier: Apache-2.0
//! `start`: lets the process of a created container run.

use agent_protocol::Hook;

use super::create::oci_state;
use super::{Error, live};
use crate::bundle::parse_spec;
use crate::control::Request;
use crate::hooks::{self, Environment};
use crate::plan::{self, HostHooks};
use crate::status::Status;
use crate::store::{State, Store};

pub fn run(store: &Store, id: &str) -> Result<u8, Error> {
    let container = store.lock(id)?;
    let mut state = container.load()?;
    state.status().can_start()?;
    let hooks = host_hooks(store, id)?;
    // Without a deadline here: a hook in the guest may have none, and the monitor has one otherwise.
    live::connect(store, id)?.command(&Request::Start, None)?;
    state.status = Status::Running;
    // What runs without anybody knowing, or against a hook, is not to run.
    let saved = container.save(&state).map_err(Error::from);
    if let Err(error) = saved.and_then(|()| poststart(&state, &hooks.poststart)) {
        live::end(store, id, state.process)?;
        return Err(error);
    }
    Ok(0)
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

/// The hooks of the configuration that the container was created from.
pub fn host_hooks(store: &Store, id: &str) -> Result<HostHooks, Error> {
    let config = store.config(id)?;
    let spec = parse_spec(&store.directory(id).join("config.json"), &config)?;
    let (hooks, _) = plan::hooks(spec.hooks().as_ref())?;
    Ok(hooks)
}
