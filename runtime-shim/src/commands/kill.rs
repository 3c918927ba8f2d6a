// SPDX-License-Identifier: Apache-2.0
//! `kill`: needs neither the lock, which another verb may hold for long, nor an agent that answers.

use super::{Error, live};
use crate::cli::Kill;
use crate::status::Status;
use crate::store::Store;

pub fn run(store: &Store, arguments: &Kill) -> Result<u8, Error> {
    if arguments.regex {
        return Err(Error::Unsupported("kill --regex"));
    }
    let state = store.load(&arguments.id)?;
    let status = state.status();
    if arguments.all && status == Status::Stopped {
        return Ok(0);
    }
    status.can_kill()?;
    // Signal 0 asks whether there is something to signal, which has just been found out.
    if arguments.signal != 0 {
        live::signal(
            store,
            &state.id,
            state.process,
            arguments.signal,
            arguments.all,
        )?;
    }
    Ok(0)
}
