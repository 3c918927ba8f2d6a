// SPDX-License-Identifier: Apache-2.0
//! The `sandbox` command: an OCI runtime that runs each container in a microVM.

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod commands;
pub mod facts;
pub mod guest_files;
pub mod hooks;
pub mod identity;
pub mod logging;
pub mod plan;
pub mod signal;
pub mod status;
pub mod store;
pub mod time;
