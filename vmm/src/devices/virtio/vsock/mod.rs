// SPDX-License-Identifier: Apache-2.0
//! The socket device: virtio 1.2, 5.10. Only stream sockets, and only the guest connects: to the host's CID and a port
//! that the host has announced for a pair of its file descriptors, once. Everything else is reset.

mod connection;
mod host;
mod muxer;
mod packet;
mod stream;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small constants")]
mod tests;

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use virtio_queue::{QueueOwnedT, QueueState, QueueT};

use super::chain::{self, Reader};
use super::{ActivateError, Activation, ActiveQueue, GuestFault, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;
use muxer::Muxer;
pub(crate) use muxer::SavedStreams;
use packet::{HEADER_LEN, Header};

/// virtio 1.2, 5.10.1.
const DEVICE_TYPE: u32 = 19;

/// VIRTIO_VSOCK_F_STREAM.
const FEATURE_STREAM: u64 = 1;

/// Virtqueues: virtio 1.2, 5.10.2.
const RX: usize = 0;
pub(crate) const TX: usize = 1;
/// Linux fills its receive queue with 4 KiB buffers: 128 of them are more than the credit of a connection. The
/// event queue holds 8 buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// How much one turn of the event loop does at most, so that other devices get theirs.
const TURN_PACKETS: usize = 512;
const TURN_BYTES: usize = 4 * 1024 * 1024;

/// The host end of a stream. `input` is read and goes to the guest, `output` gets what the guest sends. Either may be
/// absent, and both may be the same file. At the end of `input` the guest sees the end of the stream; when the guest
/// has ended its side, `output` is closed after the last byte; when `output` breaks, the guest's writes fail.
///
/// Any kind of file will do. Blocking ones are used with care: a terminal or FIFO may still block the caller if
/// another process fills it at the same moment.
#[derive(Debug, Default)]
pub struct HostStream {
    pub input: Option<OwnedFd>,
    pub output: Option<OwnedFd>,
}

#[derive(Debug)]
pub(crate) struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    rx: ActiveQueue,
    tx: ActiveQueue,
    /// For a guest that was moved; nothing is ever sent there.
    events: Option<ActiveQueue>,
    interrupt: Interrupt,
}

/// What is left of a turn.
#[derive(Debug)]
struct Budget {
    packets: usize,
    bytes: usize,
}

impl Vsock {
    pub(crate) fn new(guest_cid: u64) -> io::Result<Vsock> {
        Ok(Vsock {
            guest_cid,
            muxer: Muxer::new(guest_cid)?,
            active: None,
        })
    }

    /// The guest may connect to `port`, once.
    pub(crate) fn accept_stream(&mut self, port: u32, stream: HostStream) -> io::Result<()> {
        self.muxer.accept_stream(port, stream)
    }

    /// Forgets `port`; a connection is reset, and what it has not brought to the host is lost. `take_closed` will
    /// not report it.
    pub(crate) fn close_stream(&mut self, port: u32) {
        self.muxer.close_stream(port);
    }

    /// Forgets `port` if the guest has not connected to it; says whether.
    pub(crate) fn close_unopened(&mut self, port: u32) -> bool {
        self.muxer.close_unopened(port)
    }

    /// Ports of streams that are over since the last call: the host has all bytes and its descriptors are closed.
    pub(crate) fn take_closed(&mut self) -> Vec<u32> {
        self.muxer.take_closed()
    }

    pub(crate) fn save_streams(&self) -> SavedStreams {
        self.muxer.save()
    }

    /// The streams of a snapshot wait for `accept_stream`. False: they cannot be those of one.
    pub(crate) fn restore_streams(&mut self, saved: SavedStreams) -> bool {
        self.muxer.restore(saved)
    }

    /// No more streams of a snapshot are going to be accepted.
    pub(crate) fn abandon_unclaimed(&mut self) {
        self.muxer.abandon_unclaimed();
    }

    /// Moves packets both ways until neither side has any, or the turn is over.
    fn service(&mut self) -> Result<(), GuestFault> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mut budget = Budget {
            packets: TURN_PACKETS,
            bytes: TURN_BYTES,
        };
        loop {
            let received = active.receive(&mut self.muxer, &mut budget);
            self.muxer.flush();
            let congested = self.muxer.is_congested();
            received?;
            active.send(&mut self.muxer, &mut budget)?;
            if budget.is_spent() {
                self.muxer.continue_later();
                return Ok(());
            }
            if !congested || self.muxer.is_congested() {
                return Ok(());
            }
        }
    }
}

impl Active {
    /// Takes the guest's packets from the transmit queue.
    fn receive(&mut self, muxer: &mut Muxer, budget: &mut Budget) -> Result<(), GuestFault> {
        let queue = &mut self.tx.queue;
        if !queue.ready() {
            return Ok(());
        }
        let mut used = false;
        loop {
            if muxer.is_congested() || budget.is_spent() {
                break;
            }
            let Some(chain) = chain::pop(TX, queue, &self.memory)? else {
                match queue.enable_notification(&self.memory).map_err(fault(TX))? {
                    true => continue,
                    false => break,
                }
            };
            let head = chain.head_index();
            let (mut reader, _) = chain::split(TX, chain, &self.memory)?;
            let header = parse(&mut reader)?;
            budget.spend(header.len as usize);
            muxer.receive(&header, &mut reader);
            queue.add_used(&self.memory, head, 0).map_err(fault(TX))?;
            used = true;
        }
        if used && queue.needs_notification(&self.memory).map_err(fault(TX))? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Fills buffers of the receive queue with packets for the guest.
    fn send(&mut self, muxer: &mut Muxer, budget: &mut Budget) -> Result<(), GuestFault> {
        let queue = &mut self.rx.queue;
        if !queue.ready() {
            return Ok(());
        }
        let mut used = false;
        while muxer.has_packet() && !budget.is_spent() {
            // Kicks are of interest only while there are no buffers.
            let Some(chain) = chain::pop(RX, queue, &self.memory)? else {
                match queue.enable_notification(&self.memory).map_err(fault(RX))? {
                    true => continue,
                    false => break,
                }
            };
            let head = chain.head_index();
            let (_, mut writer) = chain::split(RX, chain, &self.memory)?;
            let room = writer
                .split_at(HEADER_LEN)
                .ok()
                .filter(|room| room.available() > 0)
                .ok_or(GuestFault::Chain { queue: RX })?;
            let Some(header) = muxer.next_packet(&room) else {
                queue.go_to_previous_position();
                break;
            };
            writer
                .write_all(&header.to_bytes())
                .map_err(|_| GuestFault::Chain { queue: RX })?;
            budget.spend(header.len as usize);
            // Cannot be truncated: a header and MAX_PAYLOAD.
            let len = u32::try_from(HEADER_LEN + header.len as usize).unwrap_or(u32::MAX);
            queue.add_used(&self.memory, head, len).map_err(fault(RX))?;
            used = true;
        }
        if used && queue.needs_notification(&self.memory).map_err(fault(RX))? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }
}

impl Budget {
    fn spend(&mut self, bytes: usize) {
        self.packets = self.packets.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn is_spent(&self) -> bool {
        self.packets == 0 || self.bytes == 0
    }
}

/// The header, copied once, of a packet that has the payload it claims.
fn parse(reader: &mut Reader<'_>) -> Result<Header, GuestFault> {
    let mut bytes = [0; HEADER_LEN];
    let complete = reader.read_exact(&mut bytes).is_ok();
    let header = Header::parse(&bytes);
    match complete && header.len as usize <= reader.remaining() {
        true => Ok(header),
        false => Err(GuestFault::Chain { queue: TX }),
    }
}

fn fault(queue: usize) -> impl FnOnce(virtio_queue::Error) -> GuestFault {
    move |source| GuestFault::Queue { queue, source }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        if let (Some(rx), Some(tx)) = (queues.next(), queues.next()) {
            self.active = Some(Active {
                memory: activation.memory,
                rx,
                tx,
                events: queues.next(),
                interrupt: activation.interrupt,
            });
        }
        Ok(())
    }

    fn process_queue(&mut self, index: usize) -> Result<(), GuestFault> {
        match index {
            RX | TX => self.service(),
            _ => Ok(()),
        }
    }

    fn event_source(&self) -> Option<RawFd> {
        Some(self.muxer.event_source())
    }

    fn process_event(&mut self) -> Result<(), GuestFault> {
        self.muxer.process_events();
        self.service()
    }

    fn queues(&self) -> Option<Vec<QueueState>> {
        let active = self.active.as_ref()?;
        let all = [&active.rx, &active.tx].into_iter().chain(&active.events);
        Some(all.map(|queue| queue.queue.state()).collect())
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.reset();
    }
}
