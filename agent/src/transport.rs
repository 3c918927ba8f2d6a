// SPDX-License-Identifier: Apache-2.0
//! How the host is reached: vsock in a virtual machine, Unix sockets on a development machine.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::{Errno, Result};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

#[derive(Debug)]
pub(crate) enum Transport {
    Vsock,
    /// Each port is a socket of that name in the directory.
    Unix(PathBuf),
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: OwnedFd,
    /// False while the host has not accepted yet: the socket becomes writable when it has.
    pub(crate) established: bool,
}

impl Transport {
    /// Begins to connect to a port of the host; does not wait for it.
    pub(crate) fn connect(&self, port: u32) -> Result<Connection> {
        self.open(port, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    /// Connects to a port of the host.
    pub(crate) fn connect_and_wait(&self, port: u32) -> Result<OwnedFd> {
        let connection = self.open(port, SocketFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&connection.socket, true)?;
        Ok(connection.socket)
    }

    fn open(&self, port: u32, flags: SocketFlags) -> Result<Connection> {
        let family = match self {
            Transport::Vsock => AddressFamily::VSOCK,
            Transport::Unix(_) => AddressFamily::UNIX,
        };
        let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
        let connected = match self {
            Transport::Vsock => crate::syscalls::connect_to_host(socket.as_fd(), port),
            Transport::Unix(directory) => {
                let address = SocketAddrUnix::new(directory.join(port.to_string()))?;
                net::connect(&socket, &address)
            }
        };
        match connected {
            Ok(()) => Ok(Connection {
                socket,
                established: true,
            }),
            Err(Errno::INPROGRESS) => Ok(Connection {
                socket,
                established: false,
            }),
            Err(errno) => Err(errno),
        }
    }
}
