// SPDX-License-Identifier: Apache-2.0
//! What the monitor on the host and the agent in the guest say to each other.
//!
//! The agent connects from the guest to [`CONTROL_PORT`] on the host and sends [`Event::Ready`].
//! From then on the host sends [`Request`]s, each answered by one [`Reply`] with the same number, and
//! the agent sends [`Event`]s when something happens. Stdio is not in it: each stream is a
//! connection of its own, made by the agent to a port that the host named in [`Stdio`].
//!
//! Both directions distrust each other: frames are length-capped ([`MAX_FRAME`]), ids are chosen by
//! the host, and whoever receives validates.

mod frame;
mod message;
mod plan;

pub use frame::{FrameError, FrameReader, decode, encode};
pub use message::{
    AgentError, Clock, ErrorKind, Event, FromAgent, Reply, Request, Stdio, ToAgent, Usage,
};
pub use plan::{
    Address, Capabilities, Card, CgroupPlan, Device, DeviceKind, GuestPlan, Hook, IdMapping,
    IoPriority, Mount, MountSource, Neighbour, Process, Rlimit, Route, Scheduler, Seccomp,
    TimeOffset, WindowSize,
};

/// Version of the messages. Both sides come from one build, so anything else is refused.
pub const VERSION: u32 = 3;

/// The vsock port on the host (CID 2) that the agent connects to when it is up.
pub const CONTROL_PORT: u32 = 1;

/// The mount tag of the one virtio-fs device.
pub const SHARE_TAG: &str = "share";

/// Largest frame in bytes, both directions. A process may have 1 MiB of arguments and environment.
pub const MAX_FRAME: usize = 4 << 20;
