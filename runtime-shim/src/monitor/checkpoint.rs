// SPDX-License-Identifier: Apache-2.0
//! What the monitor puts into a checkpoint beside the machine.

use agent_protocol::VERSION;
use serde::{Deserialize, Serialize};

use super::container::SavedContainer;
use crate::agent_client::SavedClient;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub container: SavedContainer,
    pub agent: SavedClient,
    /// Names of what the guest sees of the host's files.
    pub shares: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("checkpoint: cannot be encoded")]
    Encode(#[source] postcard::Error),
    #[error("checkpoint: damaged")]
    Damaged,
    #[error("checkpoint: its agent speaks version {0} of the protocol, this program {VERSION}")]
    Version(u32),
    #[error(
        "mounts: the checkpoint was made with {saved} directories and files of the host, there are {found}"
    )]
    Shares { saved: usize, found: usize },
}

impl Checkpoint {
    pub fn encode(&self) -> Result<Vec<u8>, CheckpointError> {
        postcard::to_stdvec(&(VERSION, self)).map_err(CheckpointError::Encode)
    }

    /// For a container with these shares.
    pub fn decode(bytes: &[u8], shares: &[String]) -> Result<Checkpoint, CheckpointError> {
        let damaged = |_| CheckpointError::Damaged;
        let (version, rest) = postcard::take_from_bytes::<u32>(bytes).map_err(damaged)?;
        if version != VERSION {
            return Err(CheckpointError::Version(version));
        }
        match postcard::take_from_bytes::<Checkpoint>(rest) {
            Ok((checkpoint, [])) if checkpoint.shares == shares => Ok(checkpoint),
            Ok((checkpoint, [])) => Err(CheckpointError::Shares {
                saved: checkpoint.shares.len(),
                found: shares.len(),
            }),
            _ => Err(CheckpointError::Damaged),
        }
    }
}
