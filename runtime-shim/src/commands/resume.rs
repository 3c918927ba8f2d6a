// SPDX-License-Identifier: Apache-2.0
//! `resume`: undoes `pause`.

use super::{Error, live};
use crate::control::Request;
use crate::status::Status;
use crate::store::Store;

pub fn run(store: &Store, id: &str) -> Result<u8, Error> {
    let container = store.lock(id)?;
    let mut state = container.load()?;
    state.status().can_resume()?;
    live::connect(store, id)?.command(&Request::Resume, live::guest_deadline())?;
    state.status = Status::Running;
    if let Err(error) = container.save(&state) {
        // Undone, so that the state tells the truth.
        live::connect(store, id)?.command(&Request::Pause, live::guest_deadline())?;
        return Err(error.into());
    }
    Ok(0)
}
