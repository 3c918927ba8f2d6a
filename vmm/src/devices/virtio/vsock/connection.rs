// SPDX-License-Identifier: Apache-2.0
//! One stream between the guest and the host: virtio 1.2, 5.10.6.3 (credit) to 5.10.6.5 (shutdown).
//!
//! The guest's peer is the pair of an inlet and an outlet. An absent one is a direction that is over: the guest is
//! told by a SHUTDOWN packet. When both directions are over the guest is done with, and what remains is to bring
//! the bytes in the outlet's buffer to the host.

use serde::{Deserialize, Serialize};

use super::super::chain::{Reader, Writer};
use super::host::HostFd;
use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::stream::{Inlet, Outlet};

/// How much of the guest's output is kept for a slow host, in bytes a connection.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// What the guest has to be told at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Nothing,
    Reset,
}

#[derive(Debug)]
pub(super) struct Connection {
    port: u32,
    serial: u32,
    state: State,
    inlet: Option<Inlet>,
    outlet: Option<Outlet>,
    input_token: u64,
    /// It waits for its turn to send to the guest. Kept by the muxer.
    pub(super) queued: bool,
    /// It waits for the end of the batch to flush. Kept by the muxer.
    pub(super) unflushed: bool,
}

/// A stream without its host end, for a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SavedStream {
    pub(super) port: u32,
    state: State,
    /// Whether the host's input had not ended, and whether its output was still of use.
    input: bool,
    output: bool,
    /// What the guest has sent and the host has not taken.
    buffer: Vec<u8>,
}

impl SavedStream {
    /// Within the bounds that a connection keeps.
    pub(super) fn is_sound(&self) -> bool {
        self.buffer.len() <= BUF_ALLOC as usize
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum State {
    /// The guest may connect.
    Announced,
    Connected(Link),
    /// Over for the guest; the outlet is still being flushed.
    Draining,
}

/// The guest's end.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Link {
    peer_port: u32,
    credit: Credit,
    /// Bytes that came from the guest.
    received: u32,
    /// The `fwd_cnt` that the guest was told last.
    announced: u32,
    respond: bool,
    credit_requested: bool,
    /// SHUTDOWN flags that came from the guest.
    guest_shutdown: u32,
    /// SHUTDOWN flags that went to the guest.
    host_shutdown: u32,
}

impl Link {
    fn new(request: &Header) -> Link {
        let mut link = Link {
            peer_port: request.src_port,
            credit: Credit::default(),
            received: 0,
            announced: 0,
            respond: true,
            credit_requested: false,
            guest_shutdown: 0,
            host_shutdown: 0,
        };
        link.credit.update(request.buf_alloc, request.fwd_cnt);
        link
    }

    /// Neither side has anything to send that the other would take.
    fn is_over(&self) -> bool {
        let sender_done = |sender: u32, receiver: u32| {
            sender & SHUTDOWN_SEND != 0 || receiver & SHUTDOWN_RECEIVE != 0
        };
        sender_done(self.guest_shutdown, self.host_shutdown)
            && sender_done(self.host_shutdown, self.guest_shutdown)
    }

    /// The guest waits for a word on how much it may send, or soon will.
    fn credit_update_due(&self, buffered: u32) -> bool {
        let forwarded = self.received.wrapping_sub(buffered);
        let taken = self.received.wrapping_sub(self.announced);
        self.credit_requested
            || (taken > BUF_ALLOC / 2
                && forwarded != self.announced
                && self.guest_shutdown & SHUTDOWN_SEND == 0)
    }
}

/// How much the guest has room for. Its numbers are claims: whatever it says, the host sends no more than fits the
/// buffers that the guest posted, so that a lie only hurts the guest.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Credit {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

impl Credit {
    fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        let outstanding = self.sent.wrapping_sub(self.fwd_cnt);
        let advance = fwd_cnt.wrapping_sub(self.fwd_cnt);
        // Anything else is older than what is known (packets of two vCPUs may pass one another), or a lie.
        if advance <= outstanding {
            self.fwd_cnt = fwd_cnt;
        }
    }

    fn available(&self) -> u32 {
        self.buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.fwd_cnt))
    }
}

impl Connection {
    /// A port that the guest may connect to. The host's descriptors come with the tokens of their events.
    /// The guest has not connected.
    pub(super) fn is_announced(&self) -> bool {
        matches!(self.state, State::Announced)
    }

    pub(super) fn new(
        port: u32,
        serial: u32,
        input: Option<(HostFd, u64)>,
        output: Option<(HostFd, u64)>,
    ) -> Connection {
        Connection {
            port,
            serial,
            state: State::Announced,
            input_token: input.as_ref().map_or(0, |&(_, token)| token),
            inlet: input.map(|(fd, _)| Inlet::new(fd)),
            outlet: output.map(|(fd, token)| Outlet::new(fd, token)),
            queued: false,
            unflushed: false,
        }
    }

    pub(super) fn save(&self) -> SavedStream {
        SavedStream {
            port: self.port,
            state: self.state.clone(),
            input: self.inlet.is_some(),
            output: self.outlet.is_some(),
            buffer: self.outlet.as_ref().map(Outlet::buffer).unwrap_or_default(),
        }
    }

    /// A saved stream goes on with new descriptors of the host. Directions that were over stay so.
    pub(super) fn resume(
        saved: SavedStream,
        serial: u32,
        input: Option<(HostFd, u64)>,
        output: Option<(HostFd, u64)>,
    ) -> Connection {
        let input = input.filter(|_| saved.input);
        let output = output.filter(|_| saved.output);
        let mut connection = Connection::new(saved.port, serial, input, output);
        connection.state = saved.state;
        if let Some(outlet) = &mut connection.outlet {
            outlet.preload(saved.buffer);
        }
        connection
    }

    /// Waits for the host's input, if the guest is connected.
    pub(super) fn watch_input(&mut self) -> std::io::Result<()> {
        match (&self.state, &mut self.inlet) {
            (State::Connected(_), Some(inlet)) => inlet.watch(self.input_token),
            _ => Ok(()),
        }
    }

    pub(super) fn serial(&self) -> u32 {
        self.serial
    }

    /// Both directions are over and the host has every byte that it wanted.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Draining) && self.outlet.is_none()
    }

    /// `produce` has something for the guest, as far as is known.
    pub(super) fn wants_turn(&self) -> bool {
        let State::Connected(link) = &self.state else {
            return false;
        };
        link.respond
            || link.credit_update_due(self.buffered())
            || self.shutdown_due(link) != 0
            || (link.credit.available() > 0 && self.inlet.as_ref().is_some_and(Inlet::is_ready))
    }

    /// A packet of the guest for this port.
    pub(super) fn receive(&mut self, header: &Header, payload: &mut Reader<'_>) -> Answer {
        match &mut self.state {
            State::Connected(link) if link.peer_port == header.src_port => {
                link.credit.update(header.buf_alloc, header.fwd_cnt);
                match self.receive_connected(header, payload) {
                    Ok(()) => Answer::Nothing,
                    Err(GuestIsDone) => {
                        self.abort();
                        Answer::Reset
                    }
                }
            }
            State::Announced if header.op == op::REQUEST => self.connect(header),
            _ => Answer::Reset,
        }
    }

    /// The guest is gone, or has to go: nothing more goes to it, and what it sent is still flushed.
    pub(super) fn abort(&mut self) {
        if matches!(self.state, State::Connected(_)) {
            self.state = State::Draining;
            self.inlet = None;
            self.flush();
        }
    }

    /// A packet that ends the connection for the guest, unless it is not connected.
    pub(super) fn reset_packet(&mut self, guest_cid: u64) -> Option<Header> {
        self.header(guest_cid, op::RST, 0, 0)
    }

    pub(super) fn input_ready(&mut self) {
        if let Some(inlet) = &mut self.inlet {
            inlet.set_ready();
        }
    }

    pub(super) fn output_ready(&mut self) {
        if let Some(outlet) = &mut self.outlet {
            outlet.set_ready();
        }
        self.flush();
    }

    /// Brings to the host what it takes.
    pub(super) fn flush(&mut self) {
        let guest_sends = match &self.state {
            State::Announced => true,
            State::Connected(link) => link.guest_shutdown & SHUTDOWN_SEND == 0,
            State::Draining => false,
        };
        let Some(outlet) = &mut self.outlet else {
            return;
        };
        let done = match outlet.flush() {
            Ok(()) => !guest_sends && outlet.buffered() == 0,
            Err(_) => true,
        };
        if done {
            self.outlet = None;
        }
    }

    /// The next packet for the guest; a payload is written to `room`, which is not empty.
    pub(super) fn produce(&mut self, guest_cid: u64, room: &Writer<'_>) -> Option<Header> {
        let State::Connected(link) = &mut self.state else {
            return None;
        };
        if std::mem::take(&mut link.respond) {
            return self.header(guest_cid, op::RESPONSE, 0, 0);
        }
        let limit = link.credit.available();
        if limit > 0 && self.inlet.as_ref().is_some_and(Inlet::is_ready) {
            let len = self.read_input(room, limit);
            if len > 0 {
                return self.header(guest_cid, op::RW, 0, len);
            }
        }
        let State::Connected(link) = &self.state else {
            return None;
        };
        let shutdown = self.shutdown_due(link);
        if shutdown != 0 {
            let packet = self.header(guest_cid, op::SHUTDOWN, shutdown, 0);
            self.shut_down_by_host(shutdown);
            return packet;
        }
        match link.credit_update_due(self.buffered()) {
            true => self.header(guest_cid, op::CREDIT_UPDATE, 0, 0),
            false => None,
        }
    }

    fn connect(&mut self, request: &Header) -> Answer {
        self.state = State::Connected(Link::new(request));
        match self.watch_input() {
            Ok(()) => Answer::Nothing,
            Err(error) => {
                log::warn!("vsock port {}: cannot wait for input: {error}", self.port);
                self.abort();
                Answer::Reset
            }
        }
    }

    fn receive_connected(
        &mut self,
        header: &Header,
        payload: &mut Reader<'_>,
    ) -> Result<(), GuestIsDone> {
        let buffered = self.buffered();
        let State::Connected(link) = &mut self.state else {
            return Ok(());
        };
        match header.op {
            op::RW => {
                let fits = buffered.saturating_add(header.len) <= BUF_ALLOC;
                if !fits || link.guest_shutdown & SHUTDOWN_SEND != 0 {
                    return Err(GuestIsDone);
                }
                link.received = link.received.wrapping_add(header.len);
                if let Some(outlet) = &mut self.outlet
                    && outlet.accept(payload, header.len as usize).is_err()
                {
                    self.outlet = None;
                }
                Ok(())
            }
            op::SHUTDOWN => {
                link.guest_shutdown |= header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                let over = link.is_over();
                if link.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
                    self.inlet = None;
                }
                self.flush();
                match over {
                    true => Err(GuestIsDone),
                    false => Ok(()),
                }
            }
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                link.credit_requested = true;
                Ok(())
            }
            _ => Err(GuestIsDone),
        }
    }

    /// Reads at most `limit` bytes of the host's input into `room`; 0 if there are none now, or no more.
    fn read_input(&mut self, room: &Writer<'_>, limit: u32) -> u32 {
        let Some(inlet) = &mut self.inlet else {
            return 0;
        };
        let room = room.iovecs(MAX_PAYLOAD.min(limit as usize));
        match inlet.read(&room) {
            Ok(None) => 0,
            // Cannot be truncated: the room is at most MAX_PAYLOAD.
            Ok(Some(len @ 1..)) => u32::try_from(len).unwrap_or(0),
            Ok(Some(0)) | Err(_) => {
                self.inlet = None;
                0
            }
        }
    }

    /// A SHUTDOWN packet with these flags is on its way.
    fn shut_down_by_host(&mut self, flags: u32) {
        if let State::Connected(link) = &mut self.state {
            link.host_shutdown |= flags;
            if link.is_over() {
                self.abort();
            }
        }
    }

    /// The flags of the SHUTDOWN packet that the guest has to get now.
    fn shutdown_due(&self, link: &Link) -> u32 {
        let mut flags = 0;
        if self.inlet.is_none() && link.guest_shutdown & SHUTDOWN_RECEIVE == 0 {
            flags |= SHUTDOWN_SEND;
        }
        if self.outlet.is_none() && link.guest_shutdown & SHUTDOWN_SEND == 0 {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !link.host_shutdown
    }

    fn buffered(&self) -> u32 {
        let len = self.outlet.as_ref().map_or(0, Outlet::buffered);
        // At most BUF_ALLOC.
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    /// A header to the guest, which carries the credit; `None` if it is not connected.
    fn header(&mut self, guest_cid: u64, op: u16, flags: u32, len: u32) -> Option<Header> {
        let buffered = self.buffered();
        let State::Connected(link) = &mut self.state else {
            return None;
        };
        link.credit.sent = link.credit.sent.wrapping_add(len);
        link.credit_requested = false;
        link.announced = link.received.wrapping_sub(buffered);
        Some(Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.port,
            dst_port: link.peer_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: link.announced,
        })
    }
}

/// The connection is over for the guest: by its own wish, or since it broke a rule.
#[derive(Debug)]
struct GuestIsDone;
