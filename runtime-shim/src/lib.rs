// SPDX-License-Identifier: Apache-2.0
//! The `sandbox` command: an OCI runtime that runs each container in a microVM.

pub mod agent_client;
pub mod bundle;
pub mod cgroup;
pub mod channel;
pub mod cli;
pub mod commands;
pub mod console;
pub mod control;
pub mod facts;
pub mod guest_files;
pub mod hooks;
pub mod identity;
pub mod logging;
pub mod monitor;
pub mod mount_points;
pub mod pid_file;
pub mod plan;
pub mod sandbox;
pub mod signal;
pub mod signal_fd;
pub mod stats;
pub mod status;
pub mod stdio;
pub mod store;
pub mod time;
