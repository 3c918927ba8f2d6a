// SPDX-License-Identifier: Apache-2.0
//! The loopback interface of a network namespace.

use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Sets `lo` of the current network namespace up; the kernel gives it its addresses.
pub(crate) fn loopback_up() -> Result<()> {
    // ioctl(2) on interfaces works on any socket, and a Unix one is always compiled in.
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    crate::syscalls::loopback_up(socket.as_fd())
}
