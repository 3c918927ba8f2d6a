// SPDX-License-Identifier: Apache-2.0
//! rtnetlink(7), as much of it as changing interfaces takes: messages that are answered by an error number.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, Result};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// A request to the kernel.
#[derive(Debug)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: i32, body: &[u8]) -> Message {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Sequence number and port: one question at a time, on a socket of its own.
        bytes.extend([0; 8]);
        bytes.extend(body);
        Message(bytes)
    }

    pub(crate) fn create(kind: u16, body: &[u8]) -> Message {
        Message::new(kind, libc::NLM_F_CREATE | libc::NLM_F_EXCL, body)
    }

    pub(crate) fn replace(kind: u16, body: &[u8]) -> Message {
        Message::new(kind, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, body)
    }

    /// A change of an existing interface.
    pub(crate) fn set_link(index: u32, up: bool) -> Message {
        let flags = if up { libc::IFF_UP as u32 } else { 0 };
        // struct ifinfomsg: family, padding, type, index, flags, those of them to change.
        let mut body = vec![0; 4];
        for word in [index, flags, flags] {
            body.extend(word.to_ne_bytes());
        }
        Message::new(libc::RTM_NEWLINK, 0, &body)
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        // struct nlattr. No value here is longer than an address or a name.
        let length = (4 + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let mut value = value.as_bytes().to_vec();
        value.push(0);
        self.bytes(kind, &value);
    }

    pub(crate) fn address(&mut self, kind: u16, value: IpAddr) {
        match value {
            IpAddr::V4(value) => self.bytes(kind, &value.octets()),
            IpAddr::V6(value) => self.bytes(kind, &value.octets()),
        }
    }

    /// Without its header.
    #[cfg(test)]
    pub(crate) fn body(&self) -> &[u8] {
        &self.0[HEADER..]
    }
}

/// A connection to the kernel, about the network namespace that it was opened in.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn open() -> Result<Socket> {
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        // Protocol 0 is NETLINK_ROUTE.
        socket_with(family, SocketType::RAW, flags, None).map(Socket)
    }

    /// Sends a request and waits for its result, which is there when the request is sent.
    pub(crate) fn call(&self, mut message: Message) -> Result<()> {
        let length = message.0.len() as u32;
        message.0[..4].copy_from_slice(&length.to_ne_bytes());
        send(&self.0, &message.0, SendFlags::empty())?;
        let mut answer = [0; 1024];
        let (length, _) = recv(&self.0, &mut answer, RecvFlags::empty())?;
        // struct nlmsgerr: a negative error number, then the request.
        let error = answer[..length]
            .get(HEADER..)
            .and_then(|body| body.first_chunk())
            .map(|bytes| i32::from_ne_bytes(*bytes));
        match error {
            Some(0) => Ok(()),
            Some(error) => Err(Errno::from_raw_os_error(error.wrapping_neg())),
            None => Err(Errno::PROTO),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
