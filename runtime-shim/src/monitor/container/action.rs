// SPDX-License-Identifier: Apache-2.0
//! What the event loop is to do, and what a request to the agent was for.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Instant;

use agent_protocol::{AgentError, ErrorKind, Reply as AgentReply, Request as AgentRequest};
use vmm::{HostStream, SnapshotFiles};

use crate::control::Reply;
use crate::monitor::order::Report;
use crate::network::Joined;

/// A connection of a verb. Numbers are not reused.
pub type Verb = u64;

#[derive(Debug)]
pub enum Action {
    /// Send a request to the agent.
    Ask {
        request: AgentRequest,
        asked: Asked,
        deadline: Option<Instant>,
    },
    /// Let the guest connect to a port.
    Accept {
        port: u32,
        stream: HostStream,
    },
    /// Forget a port and its stream.
    Reset {
        port: u32,
    },
    /// Of a process that has ended: the guest opens its streams before that, or not at all.
    ResetUnopened {
        port: u32,
    },
    /// Give the machine network cards.
    Plug {
        verb: Verb,
        cards: Vec<(Joined, OwnedFd)>,
    },
    Answer {
        verb: Verb,
        reply: Reply,
    },
    Hangup {
        verb: Verb,
    },
    /// Stop the machine and save it. It stays stopped.
    Save {
        files: SnapshotFiles,
    },
    /// Let the machine go on.
    Thaw,
    Report(Report),
    /// End the process and with it the VM.
    Exit(u8),
}

/// What the answer to a request to the agent is for.
#[derive(Debug, PartialEq)]
pub enum Asked {
    Prepare,
    Create,
    /// Without a verb: as ordered from the beginning.
    Start(Option<Verb>),
    Exec(u32),
    Pause(Verb),
    Resume(Verb),
    /// Pause for a checkpoint.
    Freeze,
    /// Give a copy the id of a boot of its own.
    Identified,
    /// Resume after a restore.
    Restored,
    /// The verb gets the answer as it is.
    Verb(Verb),
    /// SIGKILL for the init process.
    Kill(Option<Verb>),
    Shutdown,
    /// Nobody waits for it.
    Nothing,
}

/// Gives up streams: what is on its way in them is lost.
pub(super) fn cut(ports: &mut BTreeSet<u32>) -> Vec<Action> {
    let ports = std::mem::take(ports);
    ports
        .into_iter()
        .map(|port| Action::Reset { port })
        .collect()
}

pub(super) fn unopened(ports: &BTreeSet<u32>) -> Vec<Action> {
    let reset = |&port| Action::ResetUnopened { port };
    ports.iter().map(reset).collect()
}

pub(super) fn answer(verb: Verb, reply: Reply) -> Action {
    Action::Answer { verb, reply }
}

pub(super) fn refuse(verb: Verb, message: &str) -> Action {
    let error = AgentError {
        kind: ErrorKind::State,
        message: message.to_owned(),
    };
    answer(verb, Reply::Failed(error))
}

pub(super) fn reply(result: Result<AgentReply, AgentError>) -> Reply {
    match result {
        Ok(AgentReply::Usage(usage)) => Reply::Usage(usage),
        Ok(_) => Reply::Done,
        Err(error) => Reply::Failed(error),
    }
}
