// SPDX-License-Identifier: Apache-2.0
//! All streams of a guest, and the epoll instance that watches their host ends. It knows packets but not virtqueues.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use serde::{Deserialize, Serialize};

use super::super::chain::{Reader, Writer};
use super::HostStream;
use super::connection::{Answer, Connection, SavedStream};
use super::host::{HostFd, Interest};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};

/// How many ports may be announced or connected at a time.
const MAX_CONNECTIONS: usize = 64;

/// Resets that wait for the guest to post buffers; from then on its packets wait too.
const MAX_REPLIES: usize = 128;

/// VMADDR_PORT_ANY.
const PORT_ANY: u32 = u32::MAX;

/// Event data of `again`. No stream has it, because its port would be [`PORT_ANY`].
const AGAIN: u64 = u64::MAX;

/// All streams and what the guest has still to be told, for a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct SavedStreams {
    streams: Vec<SavedStream>,
    replies: Vec<Header>,
}

#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    epoll: Arc<OwnedFd>,
    /// Wakes the event loop for work that was left for its next turn.
    again: OwnedFd,
    /// By port of the host.
    connections: BTreeMap<u32, Connection>,
    /// Streams of a snapshot that have no host end yet.
    saved: BTreeMap<u32, SavedStream>,
    /// Tells a stream from an earlier one of the same port in events that are late.
    serial: u32,
    /// Packets that belong to no connection (any more).
    replies: VecDeque<Header>,
    /// Ports of connections that have something for the guest, in the order of their turns.
    turns: VecDeque<u32>,
    /// Ports of connections whose outlet was given small packets.
    unflushed: Vec<u32>,
    closed: Vec<u32>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64) -> io::Result<Muxer> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let again = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(AGAIN);
        epoll::add(&epoll, &again, data, epoll::EventFlags::IN)?;
        Ok(Muxer {
            guest_cid,
            epoll: Arc::new(epoll),
            again,
            connections: BTreeMap::new(),
            saved: BTreeMap::new(),
            serial: 0,
            replies: VecDeque::new(),
            turns: VecDeque::new(),
            unflushed: Vec::new(),
            closed: Vec::new(),
        })
    }

    pub(super) fn event_source(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    pub(super) fn accept_stream(&mut self, port: u32, stream: HostStream) -> io::Result<()> {
        if port == PORT_ANY {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.connections.contains_key(&port) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let host_fd = |fd: Option<OwnedFd>, interest| -> io::Result<_> {
            let Some(fd) = fd else { return Ok(None) };
            let token = token(port, serial, interest);
            Ok(Some((HostFd::new(fd, &self.epoll)?, token)))
        };
        let input = host_fd(stream.input, Interest::Input)?;
        let output = host_fd(stream.output, Interest::Output)?;
        let Some(saved) = self.saved.remove(&port) else {
            let connection = Connection::new(port, serial, input, output);
            self.connections.insert(port, connection);
            return Ok(());
        };
        let mut connection = Connection::resume(saved, serial, input, output);
        connection.watch_input()?;
        self.connections.insert(port, connection);
        self.with(port, Connection::flush);
        Ok(())
    }

    pub(super) fn save(&self) -> SavedStreams {
        SavedStreams {
            streams: self.connections.values().map(Connection::save).collect(),
            replies: self.replies.iter().copied().collect(),
        }
    }

    /// Takes over the streams of a snapshot. Each goes on when [`accept_stream`](Self::accept_stream) gives it a host
    /// end. False: they are not those of a snapshot.
    pub(super) fn restore(&mut self, saved: SavedStreams) -> bool {
        let count = saved.streams.len();
        let sound = saved.streams.iter().all(SavedStream::is_sound);
        self.replies = saved.replies.into();
        self.saved = saved
            .streams
            .into_iter()
            .map(|stream| (stream.port, stream))
            .collect();
        sound && self.saved.len() == count && count <= MAX_CONNECTIONS && !self.is_congested()
    }

    /// The guest's ends of streams that got no host end are reset.
    pub(super) fn abandon_unclaimed(&mut self) {
        for saved in std::mem::take(&mut self.saved).into_values() {
            let mut connection = Connection::resume(saved, 0, None, None);
            self.replies.extend(connection.reset_packet(self.guest_cid));
        }
    }

    pub(super) fn close_stream(&mut self, port: u32) {
        let Some(mut connection) = self.connections.remove(&port) else {
            return;
        };
        if let Some(packet) = connection.reset_packet(self.guest_cid) {
            self.replies.push_back(packet);
            self.continue_later();
        }
    }

    /// Forgets `port` if the guest has not connected to it.
    pub(super) fn close_unopened(&mut self, port: u32) -> bool {
        let unopened = self.connections.get(&port);
        let unopened = unopened.is_some_and(Connection::is_announced);
        if unopened {
            self.connections.remove(&port);
        }
        unopened
    }

    pub(super) fn take_closed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.closed)
    }

    /// The guest is back at the beginning: whatever was connected is over, what it has sent is flushed.
    pub(super) fn reset(&mut self) {
        self.replies.clear();
        self.turns.clear();
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for port in ports {
            self.with(port, |connection| {
                connection.queued = false;
                connection.abort();
            });
        }
        if !self.closed.is_empty() {
            // A vCPU does this, and somebody waits for what was closed.
            self.continue_later();
        }
    }

    /// Wakes the event loop once more.
    pub(super) fn continue_later(&self) {
        // Fails only if the counter is at its maximum, and then it is readable.
        let _ = rustix::io::write(&self.again, &1u64.to_ne_bytes());
    }

    /// Takes in what epoll has to say, and flushes what the host takes now.
    pub(super) fn process_events(&mut self) {
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 32];
        // Interrupted or full: the descriptor stays readable.
        let count = epoll::wait(&self.epoll, &mut events[..], Some(&Timespec::default()));
        for event in events.iter().take(count.unwrap_or(0)) {
            let data = event.data.u64();
            if data == AGAIN {
                let _ = rustix::io::read(&self.again, &mut [0; 8]);
                continue;
            }
            // The upper half of a token.
            let port = u32::try_from(data >> 32).unwrap_or(PORT_ANY);
            self.with(port, |connection| {
                if data == token(port, connection.serial(), Interest::Input) {
                    connection.input_ready();
                } else if data == token(port, connection.serial(), Interest::Output) {
                    connection.output_ready();
                }
            });
        }
    }

    /// No more packets are taken from the guest, until it takes some.
    pub(super) fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// A packet of the guest; `payload` has at least the bytes that the header claims.
    pub(super) fn receive(&mut self, header: &Header, payload: &mut Reader<'_>) {
        if header.src_cid != self.guest_cid {
            // Not even an answer could be addressed.
            return;
        }
        let mut answer = Answer::Reset;
        if header.dst_cid == HOST_CID && header.kind == TYPE_STREAM {
            let port = header.dst_port;
            let mut flush_later = false;
            self.with(port, |connection| {
                answer = connection.receive(header, payload);
                flush_later = !std::mem::replace(&mut connection.unflushed, true);
            });
            if flush_later {
                self.unflushed.push(port);
            }
        }
        if answer == Answer::Reset && header.op != op::RST {
            self.replies.push_back(header.reset_reply());
        }
    }

    /// The end of a batch of `receive`.
    pub(super) fn flush(&mut self) {
        for port in std::mem::take(&mut self.unflushed) {
            self.with(port, |connection| {
                connection.unflushed = false;
                connection.flush();
            });
        }
    }

    /// There is something for the guest, as far as is known.
    pub(super) fn has_packet(&self) -> bool {
        !self.replies.is_empty() || !self.turns.is_empty()
    }

    /// The next packet for the guest, whose payload is written to `room`, which is not empty.
    pub(super) fn next_packet(&mut self, room: &Writer<'_>) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        // Each has one turn at most, even if it comes back in the queue.
        for _ in 0..self.turns.len() {
            let port = self.turns.pop_front()?;
            let guest_cid = self.guest_cid;
            let mut packet = None;
            self.with(port, |connection| {
                connection.queued = false;
                packet = connection.produce(guest_cid, room);
            });
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// Lets something happen to a connection and draws the consequences.
    fn with(&mut self, port: u32, action: impl FnOnce(&mut Connection)) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        action(connection);
        if connection.is_over() {
            self.connections.remove(&port);
            self.closed.push(port);
        } else if !connection.queued && connection.wants_turn() {
            connection.queued = true;
            self.turns.push_back(port);
        }
    }
}

/// The event data of one direction of a stream.
fn token(port: u32, serial: u32, interest: Interest) -> u64 {
    let direction = match interest {
        Interest::Input => 0,
        Interest::Output => 1,
    };
    u64::from(port) << 32 | u64::from(serial << 1) | direction
}
