// SPDX-License-Identifier: Apache-2.0
//! A small virtual machine monitor on KVM: a PVH kernel, virtio-mmio devices, files shared in process, host streams
//! over vsock. [`Machine`] is all there is to it; `DESIGN.md` beside this crate tells how it is made.

mod arch;
mod boot;
mod bus;
mod config;
mod devices;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod logging;
mod machine;
mod memory;
mod plan;
mod probe;
mod seccomp;
mod snapshot;
mod vcpu;
mod vcpu_state;
mod vm;
mod working_set;

pub use config::{ConfigError, VmConfig};
pub use devices::virtio::net::NetworkCard;
pub use devices::virtio::vsock::HostStream;
pub use machine::{Error, Machine, MachineEvent, SHARE_TAG};
pub use plan::NETWORK_CARDS;
pub use probe::{ProbeError, probe};
pub use seccomp::{ConfineError, ThreadKind, confine, drop_capabilities, report_violations};
pub use snapshot::{SnapshotError, SnapshotFiles};
pub use vcpu::StopReason;
pub use vm::VmError;
