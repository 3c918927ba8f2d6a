// SPDX-License-Identifier: Apache-2.0
//! Where a container is in its life, and what may be done with it there.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub const ALL: [Status; 5] = [
        Status::Creating,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Stopped,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }

    /// runc's texts: engines and scripts compare them.
    pub fn can_start(self) -> Result<(), StatusError> {
        match self {
            Status::Created => Ok(()),
            Status::Stopped => Err(StatusError::StartStopped),
            Status::Running => Err(StatusError::StartRunning),
            Status::Creating | Status::Paused => Err(StatusError::Start(self)),
        }
    }

    pub fn can_exec(self, ignore_paused: bool) -> Result<(), StatusError> {
        match self {
            Status::Running => Ok(()),
            Status::Created => Ok(()),
            Status::Paused if ignore_paused => Ok(()),
            Status::Paused => Err(StatusError::ExecPaused),
            Status::Stopped => Err(StatusError::ExecStopped),
            Status::Creating => Err(StatusError::NotRunning),
        }
    }

    /// A signal goes to anything that has a process.
    pub fn can_kill(self) -> Result<(), StatusError> {
        match self {
            Status::Created | Status::Running | Status::Paused => Ok(()),
            Status::Creating | Status::Stopped => Err(StatusError::NotRunning),
        }
    }

    /// Without force. A created container is killed first.
    pub fn can_delete(self, id: &str) -> Result<(), StatusError> {
        match self {
            Status::Stopped | Status::Created => Ok(()),
            Status::Creating | Status::Running | Status::Paused => Err(StatusError::Delete {
                id: id.to_owned(),
                status: self,
            }),
        }
    }

    pub fn can_pause(self) -> Result<(), StatusError> {
        match self {
            Status::Running | Status::Created => Ok(()),
            _ => Err(StatusError::Pause(self)),
        }
    }

    pub fn can_checkpoint(self) -> Result<(), StatusError> {
        match self {
            Status::Running | Status::Paused => Ok(()),
            _ => Err(StatusError::Checkpoint(self)),
        }
    }

    pub fn can_resume(self) -> Result<(), StatusError> {
        match self {
            Status::Paused => Ok(()),
            _ => Err(StatusError::NotPaused),
        }
    }

    /// ps, events and update need a live guest.
    pub fn is_live(self) -> Result<(), StatusError> {
        self.can_kill()
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatusError {
    #[error("cannot start a container that has stopped")]
    StartStopped,
    #[error("cannot start an already running container")]
    StartRunning,
    #[error("cannot start a container in the {0} state")]
    Start(Status),
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecPaused,
    #[error("container not running")]
    NotRunning,
    #[error("container not running or created: {0}")]
    Pause(Status),
    #[error("Container cannot be checkpointed in {0} state")]
    Checkpoint(Status),
    #[error("container not paused")]
    NotPaused,
    #[error("cannot delete container {id} that is not stopped: {status}")]
    Delete { id: String, status: Status },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_in_each_state() {
        //                   start  exec   kill   delete pause  resume
        let table = [
            (Status::Creating, [false, false, false, false, false, false]),
            (Status::Created, [true, true, true, true, true, false]),
            (Status::Running, [false, true, true, false, true, false]),
            (Status::Paused, [false, false, true, false, false, true]),
            (Status::Stopped, [false, false, false, true, false, false]),
        ];
        for (status, expected) in table {
            let allowed = [
                status.can_start().is_ok(),
                status.can_exec(false).is_ok(),
                status.can_kill().is_ok(),
                status.can_delete("c").is_ok(),
                status.can_pause().is_ok(),
                status.can_resume().is_ok(),
            ];
            assert_eq!(allowed, expected, "{status}");
        }
        assert!(Status::Paused.can_exec(true).is_ok());
        assert!(Status::Stopped.can_exec(true).is_err());
    }
}
