// SPDX-License-Identifier: Apache-2.0
//! PID 1 of the guest: makes containers as the host asks.
//!
//! The agent has one thread and one event loop. What takes time or enters a container is done in
//! forked children, so nothing that a container or a slow host does holds up anyone else.
//!
//! Namespaces that a plan does not name are the agent's own: two containers without a network
//! namespace share the machine's interfaces, and `hostname` without a UTS namespace names the machine.
//! The mount namespace alone is always a new one.
//!
//! A development machine can run the agent without a virtual machine, as PID 1 of fresh pid, mount, UTS
//! and network namespaces: `agent --development SOCKETS SHARE CGROUP`, where SOCKETS is a directory in
//! which Unix sockets named after the port numbers stand for vsock, SHARE a directory that stands for
//! the virtio-fs share, and CGROUP a cgroup that stands for the root of the hierarchy.

mod cgroup;
mod channel;
mod child;
mod container;
mod copy_up;
mod core;
mod devices;
mod early;
mod error;
mod hooks;
mod instance;
mod log;
mod mounts;
mod namespaces;
mod netlink;
mod network;
mod passwd;
mod poll;
mod power;
mod process;
mod rootfs;
mod server;
mod stdio;
mod syscalls;
mod transport;

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::core::{Core, ShareSource};
use crate::error::Result;
use crate::server::Server;
use crate::transport::Transport;

fn main() {
    let error = match start() {
        Ok(mut server) => server.run().to_string(),
        Err(error) => error.to_string(),
    };
    ::log::error!("{error}");
    power::restart()
}

fn start() -> Result<Server> {
    let begun = Instant::now();
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let core = match arguments.as_slice() {
        [development, sockets, share, cgroup] if development == Path::new("--development") => {
            log::start("/proc/self/fd/2");
            early::prepare_development_machine()?;
            early::prepare_agent(cgroup)?;
            Core::new(
                Transport::Unix(sockets.clone()),
                ShareSource::Directory(share.clone()),
                cgroup.clone(),
            )?
        }
        // The kernel passes what it does not know of its command line.
        _ => {
            early::prepare_machine()?;
            log::start("/dev/kmsg");
            let cgroup = Path::new(early::CGROUP_ROOT);
            early::prepare_agent(cgroup)?;
            Core::new(Transport::Vsock, ShareSource::VirtioFs, cgroup.into())?
        }
    };
    Server::new(core, begun)
}
