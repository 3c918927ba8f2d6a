// SPDX-License-Identifier: Apache-2.0
//! What the creating verb and the monitor say to each other over the inherited socket: the order
//! first, then what became of it.

use std::time::Duration;

use agent_protocol::{AgentError, GuestPlan};
use serde::{Deserialize, Serialize};

use crate::plan::{Network, Share, VmShape};

/// Everything a monitor needs to know. Its descriptors come with it: see [`Files`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    pub id: String,
    pub guest: GuestPlan,
    pub vm: VmShape,
    pub shares: Vec<Share>,
    pub network: Network,
    pub joins_links: bool,
    pub open_files: Option<u64>,
    pub oom_score_adj: Option<i32>,
    /// Start the container as soon as it is created.
    pub start: bool,
    /// Wait for [`Go`] after [`Report::Namespaces`].
    pub hooks: bool,
    /// The slave of a terminal comes with the order; otherwise the inherited streams are used.
    pub terminal: bool,
    pub deadlines: Deadlines,
}

/// The descriptors that come with the order, in this order.
pub const FILES: [&str; 4] = ["control socket", "/dev/kvm", "kernel", "initramfs"];

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Deadlines {
    /// From the start of the vCPUs to the agent's first word.
    pub boot: Duration,
    /// For the answer to a request.
    pub request: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            boot: Duration::from_secs(30),
            request: Duration::from_secs(30),
        }
    }
}

impl Deadlines {
    /// Emulated hosts need more time: `SANDBOX_BOOT_TIMEOUT_S` sets both.
    pub fn from_environment() -> Deadlines {
        let seconds = std::env::var("SANDBOX_BOOT_TIMEOUT_S")
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
            .filter(|seconds| (1..=86_400).contains(seconds));
        match seconds.map(Duration::from_secs) {
            None => Deadlines::default(),
            Some(time) => Deadlines {
                boot: time,
                request: time,
            },
        }
    }
}

/// The hooks have run: the monitor may go on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Go;

/// From the monitor to the creating verb.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// What is being done now, should it be the last that is heard.
    Stage(Stage),
    /// The network namespace exists.
    Namespaces,
    Created,
    Started,
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    Setup,
    Network,
    Jail,
    Machine,
    Boot,
    Create,
    Start,
    Run,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stage::Setup => "setting up the monitor",
            Stage::Network => "joining the network",
            Stage::Jail => "building the jail",
            Stage::Machine => "making the virtual machine",
            Stage::Boot => "booting the guest",
            Stage::Create => "creating the container in the guest",
            Stage::Start => "starting the container's process",
            Stage::Run => "running",
        })
    }
}

/// Why there is no container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Something on the host.
    #[error("{stage}: {message}")]
    Host { stage: Stage, message: String },
    /// The guest did not come up, or went away. Its last words are part of the message.
    #[error("{message}{}", tail(console))]
    Guest { message: String, console: String },
    /// The agent refused, in the words that engines know.
    #[error(transparent)]
    Refused(AgentError),
}

/// The most lines of a console that are shown.
const SHOWN: usize = 12;

/// The end of the guest's console on the same line, or what begins with a panic: its reason comes first
/// and a long trace after it.
fn tail(console: &str) -> String {
    let lines = console
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.collect();
    match lines.as_slice() {
        [] => ": the guest's console is empty (`sandbox check` tells whether KVM runs guests)"
            .to_owned(),
        lines => {
            let panic = lines.iter().position(|line| line.contains("Kernel panic"));
            let first = panic.unwrap_or(lines.len().saturating_sub(SHOWN));
            let shown: Vec<_> = lines.iter().skip(first).take(SHOWN).copied().collect();
            format!(": the guest's console ends with: {}", shown.join(" | "))
        }
    }
}

/// The message of an error and of all its sources.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line() {
        let failure = Failure::Guest {
            message: "guest kernel stopped while booting".into(),
            console: "Linux version 6\n\n  panic: no init \n".into(),
        };
        assert_eq!(
            failure.to_string(),
            "guest kernel stopped while booting: the guest's console ends with: \
             Linux version 6 | panic: no init"
        );
        let trace: String = (0..20).map(|number| format!("call {number}\n")).collect();
        let shown = tail(&format!("early\n[1.0] Kernel panic - no init\n{trace}"));
        assert!(
            shown.contains(": [1.0] Kernel panic - no init | call 0 |"),
            "{shown}"
        );
        assert!(shown.ends_with("call 10"), "{shown}");
        let failure = Failure::Host {
            stage: Stage::Jail,
            message: "/x: open: no such file".into(),
        };
        assert_eq!(
            failure.to_string(),
            "building the jail: /x: open: no such file"
        );
    }
}
