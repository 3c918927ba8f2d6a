// SPDX-License-Identifier: Apache-2.0
//! The network device: virtio 1.2, 5.1, on a tap of the host. One pair of queues, no control queue.
//!
//! The tap is registered edge-triggered with the event loop. Whatever stops a direction (no buffers of the guest's, a
//! tap that takes no more) ends with an event: a kick, or the tap's next edge. Nothing is looked at in vain.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use super::chain::{self, Iovecs, Writer};
use super::{ActivateError, Activation, ActiveQueue, GuestFault, Interrupt, VirtioDevice};
use crate::logging::warn_limited;
use crate::memory::GuestMemory;

/// virtio 1.2, 5.1.1. An unplugged slot shows 0, a placeholder that drivers leave alone (virtio 1.2, 4.2.2.1).
const DEVICE_TYPE: u32 = 1;
const UNPLUGGED: u32 = 0;

/// virtio 1.2, 5.1.2: receiveq1, transmitq1.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.2, 5.1.6), in front of each frame on both sides.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// `flags`: the checksum is to be filled in.
const F_NEEDS_CSUM: u8 = 1;
/// `gso_type`, without the bit that says ECN.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

const ETHERNET_HEADER: usize = 14;
/// Destination and source address (IEEE 802.3).
const SOURCE: std::ops::Range<usize> = HEADER + 6..HEADER + 12;
/// What is copied of a frame before it is judged.
const HEAD: usize = HEADER + ETHERNET_HEADER;

/// The largest packet with its Ethernet header, a VLAN tag and the header above.
const MAX_FRAME: usize = HEADER + ETHERNET_HEADER + 4 + 65535;

/// Frames from here on are received straight into the guest's buffers, smaller ones by way of a copy: so that a buffer
/// is looked at only when it is used.
const LARGE_FRAME: usize = 8192;

/// Frames of one direction in one turn of the event loop.
const MAX_BATCH: usize = 64;

/// A network card to plug: a tap with `IFF_VNET_HDR`, headers of 12 bytes, non-blocking.
#[derive(Debug)]
pub struct NetworkCard {
    pub tap: OwnedFd,
    /// The guest's address. Frames with another source do not reach the tap.
    pub mac: [u8; 6],
    pub mtu: u16,
}

#[derive(Debug, Default)]
pub(crate) struct Net {
    card: Option<Card>,
    /// The guest has been booted: what it finds in the slot from now on is for its agent.
    shown: bool,
    active: Option<Active>,
}

/// What the host gave.
#[derive(Debug)]
struct Card {
    tap: File,
    mac: [u8; 6],
    mtu: u16,
}

/// What the driver gave.
#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    interrupt: Interrupt,
    features: u64,
    /// The tap knows which offloads the driver takes.
    prepared: bool,
    /// A frame that has been read and waits for buffers of the guest's.
    buffer: Vec<u8>,
    pending: usize,
    /// The last frame was a large one: the next may be as well.
    large: bool,
    /// The tap took no more.
    blocked: bool,
}

/// How a direction came to its end.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Done,
    /// There may be more.
    More,
}

impl Net {
    pub(crate) fn new() -> Net {
        Net::default()
    }

    pub(crate) fn is_plugged(&self) -> bool {
        self.card.is_some()
    }

    /// Gives the slot its card. Returns what to watch: readable and writable, edge-triggered.
    pub(crate) fn plug(&mut self, card: NetworkCard) -> RawFd {
        let tap = card.tap.as_raw_fd();
        self.card = Some(Card {
            tap: card.tap.into(),
            mac: card.mac,
            mtu: card.mtu,
        });
        tap
    }

    /// Shows a card that is or will be plugged. Before that the slot looks empty, so that all guests boot alike.
    pub(crate) fn show(&mut self) {
        self.shown = true;
    }

    fn process(&mut self, queue: usize) -> Result<(), GuestFault> {
        let (Some(card), Some(active)) = (&mut self.card, &mut self.active) else {
            return Ok(());
        };
        active.prepare(card);
        match queue {
            RECEIVE => active.receive(card),
            TRANSMIT => active.transmit(card),
            _ => Ok(()),
        }
    }
}

impl Active {
    /// What the driver does not take, the host kernel does before it hands a packet over. Not done on activation, which
    /// happens on a vCPU's thread.
    fn prepare(&mut self, card: &Card) {
        if std::mem::replace(&mut self.prepared, true) {
            return;
        }
        let mut offloads = 0;
        for (feature, flag) in [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
            (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        ] {
            if has(self.features, feature) {
                offloads |= flag;
            }
        }
        // SAFETY: the argument of TUNSETOFFLOAD is a number.
        let result = unsafe {
            libc::ioctl(
                card.tap.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        };
        if result != 0 {
            warn_limited!(
                "network: offloads of the tap: {}",
                io::Error::last_os_error()
            );
        }
    }

    /// From the tap to the guest, until the tap is empty or the guest has no buffers.
    fn receive(&mut self, card: &mut Card) -> Result<(), GuestFault> {
        if !self.receive.queue.ready() {
            return Ok(());
        }
        let before = self.receive.queue.next_used();
        let turn = self.receive_batch(card)?;
        if chain::wants_interrupt(RECEIVE, &self.receive.queue, &self.memory, before)? {
            self.interrupt.used_buffer();
        }
        if turn == Turn::More {
            come_back(&self.receive);
        }
        Ok(())
    }

    fn receive_batch(&mut self, card: &mut Card) -> Result<Turn, GuestFault> {
        for _ in 0..MAX_BATCH {
            if self.large && self.pending == 0 {
                match self.receive_straight(card)? {
                    Straight::Received => continue,
                    Straight::Empty => return Ok(Turn::Done),
                    Straight::NoRoom => self.large = false,
                }
            }
            if self.pending == 0 {
                self.buffer.resize(MAX_FRAME, 0);
                self.pending = match read(&mut card.tap, &mut self.buffer) {
                    Some(length) => length,
                    None => return Ok(Turn::Done),
                };
                self.large =
                    self.pending >= LARGE_FRAME && has(self.features, VIRTIO_NET_F_MRG_RXBUF);
            }
            if !self.deliver()? {
                return Ok(Turn::Done);
            }
        }
        Ok(Turn::More)
    }

    /// Reads one frame into the guest's own buffers, as many as the largest frame needs.
    fn receive_straight(&mut self, card: &Card) -> Result<Straight, GuestFault> {
        let queue = &mut self.receive.queue;
        let mut chains = Chains::default();
        while chains.room < MAX_FRAME && chains.take_one(queue, &self.memory)? {}
        let vectors = chains.vectors();
        if chains.room < MAX_FRAME || vectors.len() > chain::SEGMENTS {
            chains.give_back(queue, 0);
            return Ok(Straight::NoRoom);
        }
        // SAFETY: the vectors lie in guest memory, which is mapped as long as `self.memory`, and are only ever accessed
        // as raw bytes. Their number is at most IOV_MAX.
        let read = retry(|| unsafe {
            libc::readv(
                card.tap.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as libc::c_int,
            )
        });
        let Ok(length @ 1..) = read else {
            chains.give_back(queue, 0);
            return Ok(Straight::Empty);
        };
        self.large = length >= LARGE_FRAME;
        let used = chains.distribute(length);
        chains.give_back(queue, used.len());
        chains.write_count(used.len())?;
        chain::publish(RECEIVE, queue, &self.memory, &used)?;
        Ok(Straight::Received)
    }

    /// Copies the frame that waits to the guest. False: there are too few buffers, and a kick will tell of more.
    fn deliver(&mut self) -> Result<bool, GuestFault> {
        let queue = &mut self.receive.queue;
        let mut chains = Chains::default();
        let mergeable = has(self.features, VIRTIO_NET_F_MRG_RXBUF);
        while chains.room < self.pending {
            if !mergeable && !chains.list.is_empty() {
                // It does not fit the one buffer that it may have.
                chains.give_back(queue, 0);
                self.pending = 0;
                return Ok(true);
            }
            if !chains.take_one(queue, &self.memory)? {
                match queue
                    .enable_notification(&self.memory)
                    .map_err(fault(RECEIVE))?
                {
                    true => continue,
                    false => {
                        chains.give_back(queue, 0);
                        return Ok(false);
                    }
                }
            }
        }
        let used = chains.distribute(self.pending);
        let count = used.len() as u16;
        self.buffer[NUM_BUFFERS..HEADER].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.buffer[..self.pending];
        for (_, writer) in &mut chains.list {
            let (part, after) = rest.split_at(rest.len().min(writer.available()));
            writer
                .write_all(part)
                .map_err(|_| GuestFault::Chain { queue: RECEIVE })?;
            rest = after;
        }
        chain::publish(RECEIVE, queue, &self.memory, &used)?;
        self.pending = 0;
        Ok(true)
    }

    /// From the guest to the tap, until the guest has no more or the tap takes no more.
    fn transmit(&mut self, card: &Card) -> Result<(), GuestFault> {
        if !self.transmit.queue.ready() {
            return Ok(());
        }
        let before = self.transmit.queue.next_used();
        let turn = self.transmit_batch(card)?;
        if chain::wants_interrupt(TRANSMIT, &self.transmit.queue, &self.memory, before)? {
            self.interrupt.used_buffer();
        }
        if turn == Turn::More {
            come_back(&self.transmit);
        }
        Ok(())
    }

    fn transmit_batch(&mut self, card: &Card) -> Result<Turn, GuestFault> {
        let queue = &mut self.transmit.queue;
        self.blocked = false;
        for _ in 0..MAX_BATCH {
            let Some(chain) = chain::pop(TRANSMIT, queue, &self.memory)? else {
                match queue
                    .enable_notification(&self.memory)
                    .map_err(fault(TRANSMIT))?
                {
                    true => continue,
                    false => return Ok(Turn::Done),
                }
            };
            let head = chain.head_index();
            let (mut reader, _) = chain::split(TRANSMIT, chain, &self.memory)?;
            let mut start = [0; HEAD];
            // Copied, so that what is judged is what is sent.
            reader
                .read_exact(&mut start)
                .map_err(|_| GuestFault::Chain { queue: TRANSMIT })?;
            if may_pass(&start, card)
                && send(card, &start, &reader.iovecs(MAX_FRAME)) == Sent::Later
            {
                queue.go_to_previous_position();
                self.blocked = true;
                return Ok(Turn::Done);
            }
            queue
                .add_used(&self.memory, head, 0)
                .map_err(fault(TRANSMIT))?;
        }
        Ok(Turn::More)
    }
}

/// Buffers of the guest's for one frame.
#[derive(Debug, Default)]
struct Chains<'m> {
    list: Vec<(u16, Writer<'m>)>,
    room: usize,
}

impl<'m> Chains<'m> {
    fn take_one(&mut self, queue: &mut Queue, memory: &'m GuestMemory) -> Result<bool, GuestFault> {
        let Some(chain) = chain::pop(RECEIVE, queue, memory)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let (_, writer) = chain::split(RECEIVE, chain, memory)?;
        if writer.available() < HEADER {
            return Err(GuestFault::Chain { queue: RECEIVE });
        }
        self.room += writer.available();
        self.list.push((head, writer));
        Ok(true)
    }

    /// Leaves all but the first `keep` to the next frame.
    fn give_back(&mut self, queue: &mut Queue, keep: usize) {
        for _ in self.list.drain(keep..) {
            queue.go_to_previous_position();
        }
    }

    fn vectors(&self) -> Vec<libc::iovec> {
        let mut vectors = Vec::new();
        for (_, writer) in &self.list {
            vectors.extend_from_slice(&writer.iovecs(usize::MAX));
        }
        vectors
    }

    /// How `length` bytes fill the buffers.
    fn distribute(&self, length: usize) -> Vec<(u16, u32)> {
        let mut left = length;
        let mut used = Vec::new();
        for (head, writer) in &self.list {
            let part = left.min(writer.available());
            if part == 0 {
                break;
            }
            // At most MAX_FRAME.
            used.push((*head, part as u32));
            left -= part;
        }
        used
    }

    /// `num_buffers` of the header, which the tap leaves alone.
    fn write_count(&mut self, count: usize) -> Result<(), GuestFault> {
        let first = self.list.first_mut().map(|(_, writer)| writer);
        first
            .and_then(|first| first.split_at(NUM_BUFFERS).ok())
            .and_then(|mut field| field.write_all(&(count as u16).to_le_bytes()).ok())
            .ok_or(GuestFault::Chain { queue: RECEIVE })
    }
}

/// What became of a frame that is received without a copy.
#[derive(Debug)]
enum Straight {
    Received,
    Empty,
    NoRoom,
}

#[derive(Debug, PartialEq, Eq)]
enum Sent {
    /// Or lost, as frames may be.
    Done,
    Later,
}

fn has(features: u64, feature: u32) -> bool {
    features & (1 << feature) != 0
}

fn fault(queue: usize) -> impl Fn(virtio_queue::Error) -> GuestFault {
    move |source| GuestFault::Queue { queue, source }
}

/// The driver may not kick again for what it has queued already, so the device does it.
fn come_back(queue: &ActiveQueue) {
    // Fails when the counter is at its maximum only: then the kick is there.
    let _ = queue.kick.write(1);
}

/// A frame goes out if it comes from the guest's own address and its header asks for nothing that was not offered.
fn may_pass(start: &[u8; HEAD], card: &Card) -> bool {
    let (flags, segmentation) = (start[0], start[1]);
    let known = matches!(segmentation & !GSO_ECN, GSO_NONE | GSO_TCPV4 | GSO_TCPV6);
    if start[SOURCE] != card.mac {
        warn_limited!("network: a frame with a foreign source address is dropped");
        return false;
    }
    flags & !F_NEEDS_CSUM == 0 && known
}

/// The bytes up to the Ethernet header from here, the others from the guest's memory.
fn send(card: &Card, start: &[u8; HEAD], rest: &Iovecs<'_>) -> Sent {
    let mut vectors = Vec::with_capacity(rest.len() + 1);
    vectors.push(libc::iovec {
        iov_base: start.as_ptr().cast_mut().cast(),
        iov_len: start.len(),
    });
    vectors.extend_from_slice(rest);
    // SAFETY: the first vector is `start`, which is only read; the others lie in guest memory, mapped as long as `rest`
    // borrows it.
    let written = retry(|| unsafe {
        libc::writev(
            card.tap.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len() as libc::c_int,
        )
    });
    match written {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Later,
        Err(error) => {
            log::debug!("network: a frame is dropped: {error}");
            Sent::Done
        }
        Ok(_) => Sent::Done,
    }
}

/// None: the tap has nothing, or is gone.
fn read(tap: &mut File, buffer: &mut [u8]) -> Option<usize> {
    loop {
        match tap.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.ok().filter(|length| *length > HEADER),
        }
    }
}

/// The length that a system call returns.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(length) => return Ok(length),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        match self.card {
            Some(_) if self.shown => DEVICE_TYPE,
            _ => UNPLUGGED,
        }
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .into_iter()
        .fold(0, |features, feature| features | 1 << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_net_config` (virtio 1.2, 5.1.4): mac, status, max_virtqueue_pairs, mtu.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Some(card) = &self.card else {
            return;
        };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&card.mac);
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&card.mtu.to_le_bytes());
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        if let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) {
            self.active = Some(Active {
                memory: activation.memory,
                receive,
                transmit,
                interrupt: activation.interrupt,
                features: activation.features,
                prepared: false,
                buffer: Vec::new(),
                pending: 0,
                large: false,
                blocked: false,
            });
        }
        Ok(())
    }

    fn process_queue(&mut self, index: usize) -> Result<(), GuestFault> {
        self.process(index)
    }

    /// An edge of the tap.
    fn process_event(&mut self) -> Result<(), GuestFault> {
        if self.active.as_ref().is_some_and(|active| active.blocked) {
            self.process(TRANSMIT)?;
        }
        self.process(RECEIVE)
    }

    fn queues(&self) -> Option<Vec<QueueState>> {
        let active = self.active.as_ref()?;
        let queues = [&active.receive, &active.transmit];
        Some(queues.map(|queue| queue.queue.state()).into())
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

#[cfg(test)]
mod tests;
