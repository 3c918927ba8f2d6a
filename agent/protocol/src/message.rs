// SPDX-License-Identifier: Apache-2.0
//! Requests of the host, replies and events of the agent.

use serde::{Deserialize, Serialize};

use crate::plan::{Card, CgroupPlan, GuestPlan, Mount, Process, WindowSize};

/// A numbered request, host to guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the host, returned in [`FromAgent::Reply`].
    pub number: u64,
    pub request: Request,
}

/// What comes from the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    Reply {
        number: u64,
        result: Result<Reply, AgentError>,
    },
    Event(Event),
}

/// What the host can ask for. A process is named by its container and a number that the host chose:
/// 0 is the container's init process, others are execs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Sets the wall clock and stirs the bytes into the entropy pool, before any container process.
    Prepare {
        clock: Clock,
        entropy: Vec<u8>,
    },
    /// Everything but the exec of the init process. Answered by [`Reply::Created`].
    Create {
        container: String,
        plan: Box<GuestPlan>,
        stdio: Stdio,
    },
    /// Executes the init process of a created container, with the cards that came after its creation. Answered when the
    /// exec has happened or failed.
    Start {
        container: String,
        cards: Vec<Card>,
    },
    /// Runs a further process. Answered by [`Reply::Created`] when its exec has happened, or by an error.
    Exec {
        container: String,
        process: u32,
        plan: Box<Process>,
        stdio: Stdio,
        /// Allowed although the container is paused.
        ignore_paused: bool,
    },
    /// Sends a signal to one process, or with `all` to each process of the container.
    Signal {
        container: String,
        process: u32,
        signal: i32,
        all: bool,
    },
    Resize {
        container: String,
        process: u32,
        size: WindowSize,
    },
    Pause {
        container: String,
    },
    Resume {
        container: String,
    },
    /// Writes further cgroup files of the container.
    Update {
        container: String,
        cgroup: CgroupPlan,
    },
    /// Answered by [`Reply::Usage`].
    Usage {
        container: String,
    },
    /// Answered by [`Reply::Processes`]: pids as the guest kernel counts them.
    Processes {
        container: String,
    },
    /// Mounts something into a running container.
    Mount {
        container: String,
        mount: Box<Mount>,
    },
    /// Undoes [`Request::Mount`].
    Unmount {
        container: String,
        destination: String,
    },
    /// Kills what is left of a container and forgets it: cgroup, mounts.
    Delete {
        container: String,
    },
    /// Writes back and detaches everything. The host ends the VM after the answer.
    Shutdown,
}

/// Seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// Where the streams of a process go: vsock ports on the host that the agent connects to before it
/// answers. A stream without a port is `/dev/null`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    Streams {
        stdin: Option<u32>,
        stdout: Option<u32>,
        stderr: Option<u32>,
    },
    /// One connection for both directions; a pseudo-terminal is made in the container.
    Terminal { port: u32 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// `pid` is for logs only: a pid in the guest means nothing to the host.
    Created {
        pid: u32,
    },
    Usage(Box<Usage>),
    Processes(Vec<u32>),
}

/// Raw cgroup v2 numbers. The text files are passed as they are, the host parses them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// File name in the container's cgroup and its content: `cpu.stat`, `memory.current`, …
    pub files: Vec<(String, String)>,
    /// `/proc/net/dev` of the container's network namespace.
    pub network: String,
}

/// What went wrong, coarsely: decides wording and exit code on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The host asked for something that the state of the container does not allow.
    State,
    /// No such container or process.
    NotFound,
    /// args[0] does not exist or is not found in PATH.
    ExecutableNotFound,
    /// args[0] cannot be executed: permission, a directory, wrong format.
    ExecutableRefused,
    /// A field of the plan cannot be applied.
    Plan,
    /// A system call failed.
    System,
}

/// An error of the agent: one line that names the stage or field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    pub kind: ErrorKind,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// First frame on a connection, and how long the agent has run, in nanoseconds: before that, the kernel booted.
    Ready { version: u32, age_ns: u64 },
    /// A process has ended. `status` is 0 to 255, 128 + n for death by signal n.
    /// All its output has been written to its streams, which are closed.
    Exited {
        container: String,
        process: u32,
        status: u8,
    },
    /// The guest kernel killed a process of the container for lack of memory.
    OutOfMemory { container: String },
}
