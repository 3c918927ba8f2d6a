// SPDX-License-Identifier: Apache-2.0
//! The device against a driver in this process, honest and hostile.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUF_ALLOC;
use super::packet::{MAX_PAYLOAD, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::devices::virtio::test_support::{self, DriverQueue, readable, writable};

const CID: u64 = 3;
const PORT: u32 = 1024;
const SRC: u32 = 0x7000_0001;
const DEADLINE: Duration = Duration::from_secs(30);

const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER_LEN: u32 = 4096;
const TX_BUFFERS: u64 = 0x20_0000;
const TX_BUFFER_LEN: u64 = 0x1_1000;

/// A guest with one driver.
#[derive(Debug)]
struct Guest {
    memory: GuestMemory,
    device: Vsock,
    interrupt: Interrupt,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new() -> Guest {
        let mut guest = Guest::without_buffers();
        guest.post_buffers();
        guest
    }

    /// It has not posted any receive buffers.
    fn without_buffers() -> Guest {
        let memory = test_support::guest_memory(0xb0_0000);
        let rx = DriverQueue::new(&memory, 0x1000, 128).with_event_idx();
        let tx = DriverQueue::new(&memory, rx.end(), 128).with_event_idx();
        let event = DriverQueue::new(&memory, tx.end(), 8).with_event_idx();
        assert!(event.end() <= RX_BUFFERS);
        let mut guest = Guest {
            memory,
            device: Vsock::new(CID).unwrap(),
            interrupt: test_support::interrupt(),
            rx,
            tx,
            event,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: 0,
        };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        let queues = [&self.rx, &self.tx, &self.event];
        let activation = test_support::activation(&self.memory, &queues, &self.interrupt);
        self.device.activate(activation).unwrap();
    }

    fn post_buffers(&mut self) {
        while self.rx.free() > 0 {
            // The address follows from the descriptor that the queue will take.
            let index = u64::from(self.rx.next_free());
            let address = RX_BUFFERS + index * u64::from(RX_BUFFER_LEN);
            self.rx.add(&[writable(address, RX_BUFFER_LEN)]);
        }
        self.device.process_queue(RX).unwrap();
    }

    fn accept(&mut self, port: u32, input: Option<OwnedFd>, output: Option<OwnedFd>) {
        let stream = HostStream { input, output };
        self.device.accept_stream(port, stream).unwrap();
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: SRC,
            dst_port: PORT,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Puts a packet on the transmit queue without a kick.
    fn queue_packet(&mut self, header: Header, payload: &[u8]) {
        while self.tx.used().is_some() {}
        let slot = TX_BUFFERS + u64::from(self.tx.next_free()) * TX_BUFFER_LEN / 2;
        let memory = &self.memory;
        memory
            .write_slice(&header.to_bytes(), GuestAddress(slot))
            .unwrap();
        let head = readable(slot, HEADER_LEN as u32);
        if payload.is_empty() {
            self.tx.add(&[head]);
            return;
        }
        let body = slot + HEADER_LEN as u64;
        memory.write_slice(payload, GuestAddress(body)).unwrap();
        self.tx.add(&[head, readable(body, payload.len() as u32)]);
    }

    fn send_packet(&mut self, header: Header, payload: &[u8]) {
        self.queue_packet(header, payload);
        self.device.process_queue(TX).unwrap();
    }

    fn send(&mut self, op: u16) {
        self.send_packet(self.header(op), &[]);
    }

    fn send_data(&mut self, data: &[u8]) {
        let len = data.len() as u32;
        self.send_packet(
            Header {
                len,
                ..self.header(op::RW)
            },
            data,
        );
    }

    fn shutdown(&mut self, flags: u32) {
        self.send_packet(
            Header {
                flags,
                ..self.header(op::SHUTDOWN)
            },
            &[],
        );
    }

    /// The next packet from the device, whose buffer is posted again.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.used()?;
        let address = RX_BUFFERS + u64::from(head) * u64::from(RX_BUFFER_LEN);
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let payload = bytes.split_off(HEADER_LEN);
        let header = Header::parse(bytes[..].try_into().unwrap());
        assert_eq!(header.len as usize, payload.len());
        assert_eq!((header.src_cid, header.dst_cid), (2, CID));
        self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
        self.post_buffers();
        Some((header, payload))
    }

    /// The next packet, which must be there and be `op`.
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, payload) = self.receive().expect("a packet");
        assert_eq!(header.op, op, "{header:?}");
        (header, payload)
    }

    /// The same, after packets that only carry credit.
    #[track_caller]
    fn expect_past_credit(&mut self, op: u16) -> Header {
        loop {
            let (header, _) = self.receive().expect("a packet");
            if header.op != op::CREDIT_UPDATE {
                assert_eq!(header.op, op, "{header:?}");
                return header;
            }
        }
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        assert_eq!(self.receive(), None);
    }

    /// Handles events until there are none.
    fn handle_events(&mut self) {
        while is_readable(self.event_fd(), Duration::ZERO) {
            self.device.process_event().unwrap();
        }
    }

    /// Waits for an event and handles it.
    fn wait(&mut self) {
        assert!(is_readable(self.event_fd(), DEADLINE), "no event");
        self.device.process_event().unwrap();
    }

    /// The device wants no time from the event loop, now and until something happens.
    #[track_caller]
    fn assert_idle(&mut self) {
        self.handle_events();
        assert!(!is_readable(self.event_fd(), Duration::from_millis(20)));
    }

    fn event_fd(&self) -> BorrowedFd<'static> {
        // SAFETY: the device owns the descriptor and lives as long as the test that uses it.
        unsafe { BorrowedFd::borrow_raw(self.device.event_source().unwrap()) }
    }

    fn connect(&mut self) {
        self.send(op::REQUEST);
        let (response, _) = self.expect(op::RESPONSE);
        assert_eq!(response.src_port, PORT);
        assert_eq!(response.dst_port, SRC);
        assert_eq!(response.buf_alloc, BUF_ALLOC);
    }

    /// A guest with a stream over two pipes, connected: what the host writes, what it reads.
    fn with_pipes(flags: PipeFlags) -> (Guest, File, File) {
        let mut guest = Guest::new();
        let (input, host_writes) = pipe_with(flags).unwrap();
        let (host_reads, output) = pipe_with(flags).unwrap();
        guest.accept(PORT, Some(input), Some(output));
        guest.connect();
        (guest, host_writes.into(), host_reads.into())
    }

    /// A guest with an output only, connected; it has heard that nothing will come.
    fn with_output(output: OwnedFd) -> Guest {
        let mut guest = Guest::new();
        guest.accept(PORT, None, Some(output));
        guest.connect();
        let (shutdown, _) = guest.expect(op::SHUTDOWN);
        assert_eq!(shutdown.flags, SHUTDOWN_SEND);
        guest
    }

    /// A guest with an input only, connected; it has heard that nothing is wanted.
    fn with_input(input: OwnedFd) -> Guest {
        let mut guest = Guest::new();
        guest.accept(PORT, Some(input), None);
        guest.connect();
        guest
    }
}

fn is_readable(fd: impl AsFd, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec::try_from(timeout).unwrap();
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}

/// Bytes that do not repeat at any power of two.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at % 251) as u8 ^ (at / 251 % 13) as u8)
        .collect()
}

fn read_available(file: &mut File) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let mut len = 0;
    while is_readable(&*file, Duration::ZERO) {
        match file.read(&mut bytes[len..]) {
            Ok(0) | Err(_) => break,
            Ok(count) => len += count,
        }
    }
    bytes.truncate(len);
    bytes
}

fn at_end(file: &mut File) -> bool {
    matches!(file.read(&mut [0; 1]), Ok(0))
}

#[test]
fn configuration_space_is_the_cid() {
    let device = Vsock::new(0x0102_0304_0506_0708).unwrap();
    let mut bytes = [0; 8];
    device.read_config(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), 0x0102_0304_0506_0708);
    let mut tail = [0; 4];
    device.read_config(6, &mut tail);
    assert_eq!(tail, [2, 1, 0, 0]);
    for offset in [8, 1 << 40, u64::MAX] {
        let mut outside = [0; 4];
        device.read_config(offset, &mut outside);
        assert_eq!(outside, [0; 4]);
    }
}

#[test]
fn bytes_go_both_ways_and_the_guest_closes() {
    let mut guest = Guest::new();
    let (mut host, ours) = UnixStream::pair().unwrap();
    guest.accept(
        PORT,
        Some(ours.try_clone().unwrap().into()),
        Some(ours.into()),
    );
    guest.connect();

    host.write_all(b"hello guest").unwrap();
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"hello guest");
    guest.send_data(b"hello host");
    let mut bytes = [0; 10];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello host");

    guest.shutdown(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    guest.expect(op::RST);
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    assert_eq!(guest.device.take_closed(), [PORT]);
    assert!(guest.device.take_closed().is_empty());
    guest.assert_idle();
}

#[test]
fn input_that_waits_at_connect_needs_no_event() {
    let mut guest = Guest::new();
    let (input, host_writes) = pipe_with(PipeFlags::empty()).unwrap();
    File::from(host_writes).write_all(b"early").unwrap();
    guest.accept(PORT, Some(input), None);
    guest.connect();
    assert_eq!(guest.expect(op::RW).1, b"early");
    let (shutdown, _) = guest.expect(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!(guest.device.take_closed(), [PORT]);
    guest.assert_idle();
}

#[test]
fn only_announced_ports_of_the_host_are_there() {
    let mut guest = Guest::new();
    let (output, mut host_reads) = output_pipe();
    guest.accept(PORT, None, Some(output));
    for dst_port in (0..3000).chain([u32::MAX, PORT | 1 << 31, PORT | 1 << 16]) {
        if dst_port == PORT {
            continue;
        }
        let header = Header {
            dst_port,
            ..guest.header(op::REQUEST)
        };
        guest.send_packet(header, &[]);
        let (reset, _) = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (dst_port, SRC));
    }
    // The address is compared whole.
    for src_cid in [0, 1, 2, 4, CID | 1 << 32, u64::MAX] {
        let header = Header {
            src_cid,
            ..guest.header(op::REQUEST)
        };
        guest.send_packet(header, &[]);
        guest.expect_nothing();
    }
    for dst_cid in [0, 1, 3, 2 | 1 << 32, u64::MAX] {
        let header = Header {
            dst_cid,
            ..guest.header(op::REQUEST)
        };
        guest.send_packet(header, &[]);
        let (head, len) = guest.rx.used().expect("a packet");
        assert_eq!(len, HEADER_LEN as u32);
        let mut bytes = [0; HEADER_LEN];
        let address = RX_BUFFERS + u64::from(head) * u64::from(RX_BUFFER_LEN);
        guest
            .memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let reset = Header::parse(&bytes);
        assert_eq!((reset.op, reset.src_cid), (op::RST, dst_cid));
        guest.post_buffers();
    }
    // None of it has used up the port.
    guest.connect();
    guest.send_data(b"x");
    assert_eq!(read_available(&mut host_reads), b"x");
}

#[test]
fn unknown_types_and_operations_are_reset() {
    for kind in [0, 2, 3, u16::MAX] {
        let (mut guest, _host_writes, _host_reads) = Guest::with_pipes(PipeFlags::NONBLOCK);
        let header = Header {
            kind,
            ..guest.header(op::RW)
        };
        guest.send_packet(header, &[]);
        let (reset, _) = guest.expect(op::RST);
        assert_eq!(reset.kind, kind);
        // It was meant for another connection.
        guest.send_data(b"x");
        guest.expect_nothing();
    }
    for bad in [0, op::RESPONSE, 8, 0x100, u16::MAX] {
        let (mut guest, _host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::NONBLOCK);
        guest.send_data(b"before");
        guest.send(bad);
        guest.expect(op::RST);
        guest.send_data(b"after");
        guest.expect(op::RST);
        assert_eq!(read_available(&mut host_reads), b"before");
        assert!(at_end(&mut host_reads));
        assert_eq!(guest.device.take_closed(), [PORT]);
    }
    // Not even with a reset.
    for header in [
        Header {
            dst_port: 7,
            ..Guest::new().header(op::RST)
        },
        Header {
            kind: 9,
            ..Guest::new().header(op::RST)
        },
        Header {
            dst_cid: 9,
            ..Guest::new().header(op::RST)
        },
    ] {
        let mut guest = Guest::new();
        guest.send_packet(header, &[]);
        guest.expect_nothing();
    }
}

#[test]
fn packets_for_other_connections_change_nothing() {
    let (mut guest, mut host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::NONBLOCK);
    for op in [
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::REQUEST,
        op::RST,
    ] {
        let header = Header {
            src_port: SRC + 1,
            flags: 3,
            buf_alloc: 0,
            ..guest.header(op)
        };
        guest.send_packet(header, &[]);
        match op {
            op::RST => guest.expect_nothing(),
            _ => assert_eq!(guest.expect(op::RST).0.dst_port, SRC + 1),
        }
    }
    guest.send_data(b"still here");
    assert_eq!(read_available(&mut host_reads), b"still here");
    host_writes.write_all(b"yes").unwrap();
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"yes");
    assert!(guest.device.take_closed().is_empty());
}

#[test]
fn a_port_is_accepted_once() {
    let (mut guest, _host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::NONBLOCK);
    guest.send_data(b"first");
    // The same tuple again: the guest has lost its socket, so the old stream is over.
    guest.send(op::REQUEST);
    guest.expect(op::RST);
    assert_eq!(read_available(&mut host_reads), b"first");
    assert_eq!(guest.device.take_closed(), [PORT]);
    guest.send(op::REQUEST);
    guest.expect(op::RST);
    assert!(guest.device.take_closed().is_empty());

    // Until the host announces it anew.
    let (output, _host_reads) = output_pipe();
    guest.accept(PORT, None, Some(output));
    guest.connect();
}

#[test]
fn ports_are_bounded() {
    let mut guest = Guest::new();
    let stream = || HostStream {
        input: None,
        output: Some(File::open("/dev/null").unwrap().into()),
    };
    for port in 0..64 {
        guest.device.accept_stream(port, stream()).unwrap();
    }
    let error = guest.device.accept_stream(64, stream()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
    guest.device.close_stream(5);
    guest.expect_nothing();
    guest.device.accept_stream(64, stream()).unwrap();
    let error = guest.device.accept_stream(7, stream()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let error = guest.device.accept_stream(u32::MAX, stream()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(guest.device.take_closed().is_empty());
}

#[test]
fn end_of_input_half_closes_towards_the_guest() {
    let (mut guest, mut host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    host_writes.write_all(b"last words").unwrap();
    drop(host_writes);
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"last words");
    let (shutdown, _) = guest.expect(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    guest.expect_nothing();
    guest.assert_idle();

    guest.send_data(b"I go on");
    assert_eq!(read_available(&mut host_reads), b"I go on");
    assert!(guest.device.take_closed().is_empty());
    guest.shutdown(SHUTDOWN_SEND);
    guest.expect(op::RST);
    assert!(at_end(&mut host_reads));
    assert_eq!(guest.device.take_closed(), [PORT]);
}

#[test]
fn the_guest_half_closes_towards_the_output() {
    let (mut guest, mut host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    guest.send_data(b"done");
    guest.shutdown(SHUTDOWN_SEND);
    guest.expect_nothing();
    assert_eq!(read_available(&mut host_reads), b"done");
    assert!(at_end(&mut host_reads));
    assert!(guest.device.take_closed().is_empty());

    host_writes.write_all(b"I go on").unwrap();
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"I go on");
    drop(host_writes);
    guest.wait();
    let (shutdown, _) = guest.expect(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    assert_eq!(guest.device.take_closed(), [PORT]);
    // The guest's close comes after that.
    guest.shutdown(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    guest.expect(op::RST);
    guest.assert_idle();
}

#[test]
fn data_after_the_guest_has_shut_down_is_reset() {
    let (mut guest, _host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    guest.shutdown(SHUTDOWN_SEND);
    guest.send_data(b"more");
    guest.expect(op::RST);
    assert!(at_end(&mut host_reads));
    assert_eq!(guest.device.take_closed(), [PORT]);
}

#[test]
fn a_guest_that_does_not_receive_gets_nothing() {
    let (mut guest, host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    guest.shutdown(SHUTDOWN_RECEIVE);
    guest.expect_nothing();
    let error = rustix::io::write(&host_writes, b"x").unwrap_err();
    assert_eq!(error, rustix::io::Errno::PIPE);
    guest.send_data(b"bye");
    assert_eq!(read_available(&mut host_reads), b"bye");
    guest.shutdown(SHUTDOWN_SEND);
    guest.expect(op::RST);
    assert_eq!(guest.device.take_closed(), [PORT]);
}

#[test]
fn broken_output_shuts_the_guest_down() {
    let (mut guest, mut host_writes, host_reads) = Guest::with_pipes(PipeFlags::empty());
    drop(host_reads);
    guest.send_data(&[1; 10]);
    let (shutdown, _) = guest.expect(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_RECEIVE);
    assert_eq!(shutdown.fwd_cnt, 10);
    // What was on its way is discarded, and never counts against the credit.
    for _ in 0..20 {
        guest.send_data(&vec![1; MAX_PAYLOAD]);
    }
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    host_writes.write_all(b"input works").unwrap();
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"input works");
    drop(host_writes);
    guest.wait();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    assert_eq!(guest.device.take_closed(), [PORT]);
}

#[test]
fn output_that_breaks_in_the_middle() {
    let (output, host_reads) = output_pipe();
    let mut guest = Guest::with_output(output);
    for _ in 0..3 {
        guest.send_data(&vec![7; MAX_PAYLOAD]);
    }
    guest.assert_idle();
    drop(host_reads);
    guest.wait();
    assert_eq!(
        guest.expect_past_credit(op::SHUTDOWN).flags,
        SHUTDOWN_RECEIVE
    );
    assert_eq!(guest.device.take_closed(), [PORT]);
    guest.assert_idle();
}

#[test]
fn guest_output_waits_for_a_slow_reader() {
    let (output, mut host_reads) = output_pipe();
    let mut guest = Guest::with_output(output);
    let data = pattern(300 * 1024);
    // 64 KiB in the pipe, the rest in the buffer.
    for part in data.chunks(MAX_PAYLOAD) {
        guest.send_data(part);
    }
    guest.assert_idle();
    guest.shutdown(SHUTDOWN_SEND);
    guest.expect_past_credit(op::RST);
    assert!(guest.device.take_closed().is_empty());

    let mut read: Vec<u8> = Vec::new();
    while guest.device.take_closed().is_empty() {
        let mut part = [0; 10_000];
        let count = host_reads.read(&mut part).unwrap();
        read.extend(&part[..count]);
        guest.handle_events();
    }
    host_reads.read_to_end(&mut read).unwrap();
    assert!(read == data);
}

#[test]
fn credit_is_given_as_the_host_reads() {
    let (output, mut host_reads) = output_pipe();
    let mut guest = Guest::with_output(output);
    for _ in 0..4 {
        guest.send_data(&vec![7; MAX_PAYLOAD]);
    }
    // 256 KiB are out, 64 KiB of them with the host. Half of the credit is used up: it hears of it.
    let (update, _) = guest.expect(op::CREDIT_UPDATE);
    assert!(update.fwd_cnt <= 64 * 1024);
    guest.expect_nothing();
    read_available(&mut host_reads);
    guest.handle_events();
    let mut fwd_cnt = update.fwd_cnt;
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
        fwd_cnt = header.fwd_cnt;
    }
    assert_eq!(fwd_cnt, 128 * 1024);
    guest.send(op::CREDIT_REQUEST);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).0.fwd_cnt, 128 * 1024);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let (output, mut host_reads) = output_pipe();
    let mut guest = Guest::with_output(output);
    let data = vec![7; MAX_PAYLOAD];
    for _ in 0..5 {
        guest.send_data(&data);
    }
    // The pipe's 64 KiB and the buffer's 256 KiB are full.
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    guest.send_data(b"x");
    guest.expect(op::RST);
    let mut read = 0;
    while guest.device.take_closed().is_empty() {
        read += host_reads.read(&mut [0; 4096]).unwrap();
        guest.handle_events();
    }
    read += read_available(&mut host_reads).len();
    assert_eq!(read, 5 * MAX_PAYLOAD);
}

#[test]
fn one_byte_packets_are_coalesced() {
    let (output, mut host_reads) = output_pipe();
    let mut guest = Guest::with_output(output);
    let total = 1_000_000;
    let mut sent = 0usize;
    let mut read: Vec<u8> = Vec::new();
    while sent < total {
        for _ in 0..64 {
            guest.queue_packet(
                Header {
                    len: 1,
                    ..guest.header(op::RW)
                },
                &[sent as u8],
            );
            sent += 1;
        }
        guest.device.process_queue(TX).unwrap();
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
        }
        // Until then more is buffered than the pipe holds.
        while sent.is_multiple_of(200_000) && is_readable(&host_reads, Duration::ZERO) {
            read.extend(read_available(&mut host_reads));
            guest.handle_events();
        }
    }
    guest.shutdown(SHUTDOWN_SEND);
    while guest.device.take_closed().is_empty() {
        read.extend(read_available(&mut host_reads));
        guest.handle_events();
    }
    read.extend(read_available(&mut host_reads));
    assert_eq!(read.len(), total);
    assert!(read.iter().enumerate().all(|(at, &byte)| byte == at as u8));
}

#[test]
fn a_guest_without_credit_costs_nothing() {
    for buf_alloc in [0, 5] {
        let mut guest = Guest::new();
        let (input, host_writes) = pipe_with(PipeFlags::empty()).unwrap();
        let mut host_writes = File::from(host_writes);
        guest.buf_alloc = buf_alloc;
        guest.accept(PORT, Some(input), None);
        guest.connect();
        guest.expect(op::SHUTDOWN);
        host_writes.write_all(b"0123456789").unwrap();
        guest.handle_events();
        let fits = &b"0123456789"[..buf_alloc as usize];
        if buf_alloc > 0 {
            assert_eq!(guest.expect(op::RW).1, fits);
        }
        guest.expect_nothing();
        // The hang-up is no reason to spin either.
        drop(host_writes);
        guest.assert_idle();
        // What the guest has read makes room, then more room comes.
        guest.send(op::CREDIT_UPDATE);
        if buf_alloc > 0 {
            assert_eq!(guest.expect(op::RW).1, b"56789");
        }
        guest.buf_alloc = 1 << 20;
        guest.send(op::CREDIT_UPDATE);
        if buf_alloc == 0 {
            assert_eq!(guest.expect(op::RW).1, b"0123456789");
        }
        assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
        assert_eq!(guest.device.take_closed(), [PORT]);
    }
}

#[test]
fn lies_about_credit_stop_the_stream_at_most() {
    let mut guest = Guest::new();
    let (input, host_writes) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    let mut host_writes = File::from(host_writes);
    guest.buf_alloc = 100;
    guest.accept(
        PORT,
        Some(input),
        Some(File::open("/dev/null").unwrap().into()),
    );
    guest.connect();
    host_writes.write_all(&pattern(1000)).unwrap();
    guest.handle_events();
    assert_eq!(guest.expect(op::RW).1.len(), 100);
    guest.expect_nothing();
    // More than was sent, and backwards from there.
    for fwd_cnt in [101, 1 << 31, u32::MAX] {
        guest.send_packet(
            Header {
                fwd_cnt,
                ..guest.header(op::CREDIT_UPDATE)
            },
            &[],
        );
        guest.expect_nothing();
    }
    guest.fwd_cnt = 60;
    guest.send(op::CREDIT_UPDATE);
    assert_eq!(guest.expect(op::RW).1.len(), 60);
    // Backwards: known better.
    guest.send_packet(
        Header {
            fwd_cnt: 10,
            ..guest.header(op::CREDIT_UPDATE)
        },
        &[],
    );
    guest.expect_nothing();
    // The buffer shrinks below what is in it.
    guest.fwd_cnt = 160;
    guest.send_packet(
        Header {
            buf_alloc: 0,
            ..guest.header(op::CREDIT_UPDATE)
        },
        &[],
    );
    guest.expect_nothing();
    guest.buf_alloc = u32::MAX;
    guest.send(op::CREDIT_UPDATE);
    assert_eq!(guest.expect(op::RW).1.len(), 840);
    guest.assert_idle();
}

#[test]
fn without_receive_buffers_nothing_spins() {
    let mut guest = Guest::without_buffers();
    let (input, host_writes) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    let mut host_writes = File::from(host_writes);
    guest.accept(PORT, Some(input), None);
    guest.send(op::REQUEST);
    host_writes.write_all(b"waiting").unwrap();
    guest.assert_idle();
    drop(host_writes);
    guest.assert_idle();
    assert!(guest.device.take_closed().is_empty());
    // The device asks for the kick.
    assert_eq!(guest.rx.avail_event(), 0);
    guest.post_buffers();
    guest.expect(op::RESPONSE);
    assert_eq!(guest.expect(op::RW).1, b"waiting");
    assert_eq!(
        guest.expect(op::SHUTDOWN).0.flags,
        SHUTDOWN_SEND | SHUTDOWN_RECEIVE
    );
    assert_eq!(guest.device.take_closed(), [PORT]);
}

#[test]
fn a_guest_that_takes_no_resets_is_not_served() {
    let mut guest = Guest::without_buffers();
    let mut sent = 0;
    while guest.tx.free() > 1 {
        guest.queue_packet(
            Header {
                src_port: sent,
                ..guest.header(op::REQUEST)
            },
            &[],
        );
        sent += 1;
        if sent.is_multiple_of(64) {
            guest.device.process_queue(TX).unwrap();
        }
        assert!(sent < 1000);
    }
    guest.device.process_queue(TX).unwrap();
    guest.assert_idle();
    assert!(sent > 128);
    // All are answered once there is room, in order.
    guest.post_buffers();
    for src_port in 0..sent {
        assert_eq!(guest.expect(op::RST).0.dst_port, src_port);
    }
    guest.expect_nothing();
}

#[test]
fn ten_megabytes_each_way_through_pipes() {
    for flags in [PipeFlags::NONBLOCK, PipeFlags::empty()] {
        through_host_threads(|_| {
            let (input, host_writes) = pipe_with(flags).unwrap();
            let (host_reads, output) = pipe_with(flags).unwrap();
            (input, output, host_writes.into(), host_reads.into())
        });
    }
}

#[test]
fn ten_megabytes_each_way_through_a_socket() {
    through_host_threads(|_| {
        let (host, ours) = UnixStream::pair().unwrap();
        let (input, output) = (ours.try_clone().unwrap(), ours);
        let host_writes = OwnedFd::from(host.try_clone().unwrap());
        (
            input.into(),
            output.into(),
            host_writes.into(),
            OwnedFd::from(host).into(),
        )
    });
}

#[test]
fn ten_megabytes_each_way_through_fifos() {
    for flags in [OFlags::NONBLOCK, OFlags::empty()] {
        through_host_threads(|directory| {
            let mut ends = ["to-guest", "to-host"].map(|name| {
                let path = directory.path.join(name);
                rustix::fs::mknodat(
                    rustix::fs::CWD,
                    &path,
                    rustix::fs::FileType::Fifo,
                    Mode::RUSR | Mode::WUSR,
                    0,
                )
                .unwrap();
                let open = |flags| rustix::fs::open(&path, flags, Mode::empty()).unwrap();
                let read = open(OFlags::RDONLY | OFlags::NONBLOCK);
                let write = open(OFlags::WRONLY | flags);
                rustix::fs::fcntl_setfl(&read, flags).unwrap();
                Some((read, write))
            });
            let (input, host_writes) = ends[0].take().unwrap();
            let (host_reads, output) = ends[1].take().unwrap();
            (input, output, host_writes.into(), host_reads.into())
        });
    }
}

/// Sends 10 MB each way at once, with threads for the host's programs.
fn through_host_threads(open: impl Fn(&TempDir) -> (OwnedFd, OwnedFd, File, File)) {
    let directory = TempDir::new();
    let (input, output, host_writes, host_reads) = open(&directory);
    let total = 10_000_000;
    let data = pattern(total);
    let (written, expected) = (data.clone(), data.clone());
    let writer = thread::spawn(move || write_all(host_writes, &written));
    let reader = thread::spawn(move || read_exactly(host_reads, &expected));

    let mut guest = Guest::new();
    guest.accept(PORT, Some(input), Some(output));
    guest.connect();
    transfer(&mut guest, &data, total);
    guest.shutdown(SHUTDOWN_SEND);
    while guest.device.take_closed().is_empty() {
        guest.wait();
    }
    writer.join().unwrap();
    reader.join().unwrap();
    guest.assert_idle();
}

/// The guest sends `data` and receives as much as `expected`, the same bytes, up to the end.
fn transfer(guest: &mut Guest, data: &[u8], expected: usize) {
    let started = Instant::now();
    let (mut sent, mut acknowledged, mut received) = (0usize, 0u32, 0usize);
    let mut ended = false;
    let mut told = 0;
    while sent < data.len() || !ended {
        assert!(
            started.elapsed() < DEADLINE,
            "sent {sent}, received {received}"
        );
        let mut progress = false;
        let room = (BUF_ALLOC - (sent as u32).wrapping_sub(acknowledged)) as usize;
        let len = room.min(MAX_PAYLOAD / 2).min(data.len() - sent);
        if len > 0 {
            guest.send_data(&data[sent..sent + len]);
            told = guest.fwd_cnt;
            sent += len;
            progress = true;
        }
        while let Some((header, payload)) = guest.receive() {
            progress = true;
            acknowledged = header.fwd_cnt;
            match header.op {
                op::RW => {
                    assert!(payload == data[received..received + payload.len()]);
                    received += payload.len();
                }
                op::SHUTDOWN => {
                    assert_eq!(header.flags, SHUTDOWN_SEND);
                    ended = true;
                }
                op => assert_eq!(op, op::CREDIT_UPDATE),
            }
        }
        if guest.fwd_cnt.wrapping_sub(told) > BUF_ALLOC / 4 {
            told = guest.fwd_cnt;
            guest.send(op::CREDIT_UPDATE);
            progress = true;
        }
        if progress {
            guest.handle_events();
        } else {
            guest.wait();
        }
    }
    assert_eq!(received, expected);
}

/// Writes to a descriptor that may be non-blocking.
fn write_all(file: File, mut data: &[u8]) {
    while !data.is_empty() {
        match (&file).write(data) {
            Ok(count) => data = &data[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(&file, PollFlags::OUT)];
                poll(&mut fds, None).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    if rustix::net::sockopt::socket_type(&file).is_ok() {
        rustix::net::shutdown(&file, rustix::net::Shutdown::Write).unwrap();
    }
}

fn read_exactly(mut file: File, expected: &[u8]) {
    let mut data: Vec<u8> = Vec::new();
    while data.len() < expected.len() {
        assert!(is_readable(&file, DEADLINE));
        let mut part = vec![0; 100_000];
        let count = file.read(&mut part).unwrap();
        assert_ne!(count, 0, "ended after {} bytes", data.len());
        data.extend(&part[..count]);
    }
    assert!(data == expected);
}

#[test]
fn regular_files_are_read_and_written_whole() {
    let directory = TempDir::new();
    let data = pattern(10_000_000);
    let (input, output) = (directory.path.join("input"), directory.path.join("output"));
    std::fs::write(&input, &data).unwrap();
    let mut guest = Guest::new();
    guest.accept(
        PORT,
        Some(File::open(&input).unwrap().into()),
        Some(File::create(&output).unwrap().into()),
    );
    guest.connect();
    transfer(&mut guest, &data, data.len());
    guest.shutdown(SHUTDOWN_SEND);
    guest.expect(op::RST);
    assert_eq!(guest.device.take_closed(), [PORT]);
    assert!(std::fs::read(&output).unwrap() == data);
    guest.assert_idle();
}

#[test]
fn an_endless_input_leaves_the_loop_to_others() {
    let mut guest = Guest::with_input(File::open("/dev/zero").unwrap().into());
    let mut received = 0;
    while received < 3 * BUF_ALLOC {
        match guest.receive() {
            Some((header, _)) => received += header.len,
            None => guest.send(op::CREDIT_UPDATE),
        }
    }
    // It stops at the end of the credit.
    while guest.receive().is_some() {}
    guest.assert_idle();
    guest.device.close_stream(PORT);
    guest.handle_events();
    guest.expect(op::RST);
    guest.expect_nothing();
    assert!(guest.device.take_closed().is_empty());
}

#[test]
fn a_blocking_terminal_is_never_waited_for() {
    for raw in [true, false] {
        with_blocking_terminal(raw);
    }
}

fn with_blocking_terminal(raw: bool) {
    let controller =
        rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY)
            .unwrap();
    rustix::pty::grantpt(&controller).unwrap();
    rustix::pty::unlockpt(&controller).unwrap();
    let name = rustix::pty::ptsname(&controller, Vec::new()).unwrap();
    let terminal = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    let mut modes = rustix::termios::tcgetattr(&terminal).unwrap();
    modes.make_raw();
    if !raw {
        modes.output_modes |= rustix::termios::OutputModes::OPOST;
        modes.output_modes |= rustix::termios::OutputModes::ONLCR;
    }
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &modes).unwrap();
    let mut controller = File::from(controller);

    let mut guest = Guest::new();
    guest.accept(PORT, Some(terminal.try_clone().unwrap()), Some(terminal));
    guest.connect();
    controller.write_all(b"typed").unwrap();
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"typed");

    // Nobody reads: the buffers fill, nothing blocks.
    let mut data = pattern(200_000);
    // Lines of lines: the worst that output processing can do.
    data[..100_000].fill(b'\n');
    let mut expected: Vec<u8> = Vec::new();
    for &byte in &data {
        if byte == b'\n' && !raw {
            expected.push(b'\r');
        }
        expected.push(byte);
    }
    for part in data.chunks(MAX_PAYLOAD / 2) {
        guest.send_data(part);
    }
    guest.shutdown(SHUTDOWN_SEND);
    guest.assert_idle();
    let mut read: Vec<u8> = Vec::new();
    while read.len() < expected.len() {
        let mut part = [0; 10_000];
        let count = controller.read(&mut part).unwrap();
        read.extend(&part[..count]);
        guest.handle_events();
    }
    assert!(read == expected);

    // The terminal goes away.
    drop(controller);
    // The kernel hangs a terminal up in its own time.
    let mut closed = guest.device.take_closed();
    while closed.is_empty() {
        guest.wait();
        while let Some((header, _)) = guest.receive() {
            assert!([op::SHUTDOWN, op::CREDIT_UPDATE].contains(&header.op));
        }
        closed = guest.device.take_closed();
    }
    assert_eq!(closed, [PORT]);
    guest.assert_idle();
}

#[test]
fn reset_flushes_what_the_guest_has_sent() {
    let (output, mut host_reads) = output_pipe();
    let mut guest = Guest::with_output(output);
    let (second_output, mut second_reads) = output_pipe();
    guest.accept(PORT + 1, None, Some(second_output));
    let data = pattern(150_000);
    for part in data.chunks(50_000) {
        guest.send_data(part);
    }
    guest.device.reset();
    assert!(guest.device.take_closed().is_empty());
    assert!(guest.device.process_queue(TX).is_ok());
    let mut read: Vec<u8> = Vec::new();
    while guest.device.take_closed().is_empty() {
        read.extend(read_available(&mut host_reads));
        guest.handle_events();
    }
    read.extend(read_available(&mut host_reads));
    assert!(read == data);

    // What was only announced is still there for the next driver.
    guest.rx.reset();
    guest.tx.reset();
    guest.activate();
    guest.post_buffers();
    guest.send(op::REQUEST);
    guest.expect(op::RST);
    let request = Header {
        dst_port: PORT + 1,
        ..guest.header(op::REQUEST)
    };
    guest.send_packet(request, &[]);
    guest.expect(op::RESPONSE);
    let data = Header {
        op: op::RW,
        len: 5,
        ..request
    };
    guest.send_packet(data, b"again");
    assert_eq!(read_available(&mut second_reads), b"again");
    guest.device.reset();
    // A vCPU has done it: the event loop hears of it.
    assert!(is_readable(guest.event_fd(), Duration::ZERO));
    assert_eq!(guest.device.take_closed(), [PORT + 1]);
    guest.device.reset();
    assert!(guest.device.take_closed().is_empty());
    guest.assert_idle();
}

#[test]
fn many_resets() {
    let mut guest = Guest::new();
    for _ in 0..1000 {
        let (output, host_reads) = output_pipe();
        guest.accept(PORT, None, Some(output));
        guest.connect();
        guest.send_data(b"x");
        guest.device.reset();
        assert_eq!(guest.device.take_closed(), [PORT]);
        assert_eq!(read_available(&mut { host_reads }), b"x");
        guest.rx.reset();
        guest.tx.reset();
        guest.activate();
        guest.post_buffers();
    }
    guest.assert_idle();
}

#[test]
fn a_reset_by_the_guest_closes_after_the_flush() {
    let (mut guest, _host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    for _ in 0..3 {
        guest.send_data(&vec![7; MAX_PAYLOAD]);
    }
    guest.send(op::RST);
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    assert!(guest.device.take_closed().is_empty());
    let mut read = 0;
    while guest.device.take_closed().is_empty() {
        read += read_available(&mut host_reads).len();
        guest.handle_events();
    }
    read += read_available(&mut host_reads).len();
    assert_eq!(read, 3 * MAX_PAYLOAD);
    assert!(at_end(&mut host_reads));
}

#[test]
fn closing_a_stream_resets_the_guest_at_once() {
    let (mut guest, host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    for _ in 0..3 {
        guest.send_data(&vec![7; MAX_PAYLOAD]);
    }
    guest.device.close_stream(PORT);
    guest.handle_events();
    while let Some((header, _)) = guest.receive() {
        assert!([op::RST, op::CREDIT_UPDATE].contains(&header.op));
    }
    assert_eq!(read_available(&mut host_reads).len(), 64 * 1024);
    assert!(at_end(&mut host_reads));
    assert_eq!(
        rustix::io::write(&host_writes, b"x"),
        Err(rustix::io::Errno::PIPE)
    );
    assert!(guest.device.take_closed().is_empty());
    guest.device.close_stream(PORT);
    guest.assert_idle();
}

#[test]
fn late_events_do_not_reach_the_next_stream_of_a_port() {
    let (mut guest, mut host_writes, _host_reads) = Guest::with_pipes(PipeFlags::empty());
    host_writes.write_all(b"old").unwrap();
    guest.device.close_stream(PORT);
    let (input, mut new_writes) = pipe_with(PipeFlags::empty()).unwrap();
    guest.accept(PORT, Some(input), None);
    guest.handle_events();
    guest.expect(op::RST);
    guest.connect();
    guest.expect(op::SHUTDOWN);
    rustix::io::write(&mut new_writes, b"new").unwrap();
    guest.wait();
    assert_eq!(guest.expect(op::RW).1, b"new");
}

#[test]
fn streams_take_turns() {
    let mut guest = Guest::with_input(File::open("/dev/zero").unwrap().into());
    while guest.receive().is_some() {}
    let (input, host_writes) = pipe_with(PipeFlags::empty()).unwrap();
    File::from(host_writes).write_all(b"me too").unwrap();
    guest.accept(PORT + 1, Some(input), None);
    guest.send_packet(
        Header {
            dst_port: PORT + 1,
            fwd_cnt: 0,
            ..guest.header(op::REQUEST)
        },
        &[],
    );
    guest.send(op::CREDIT_UPDATE);
    let mut before = 0;
    loop {
        let (header, payload) = guest.receive().expect("a packet");
        if header.src_port == PORT + 1 && header.op == op::RW {
            assert_eq!(payload, b"me too");
            break;
        }
        before += 1;
    }
    assert!(before < 8, "{before} packets before its own");
}

#[test]
fn notifications_follow_the_event_index() {
    let (mut guest, mut host_writes, _host_reads) = Guest::with_pipes(PipeFlags::empty());
    test_support::interrupts(&guest.interrupt);
    // The driver looks at the queues by itself.
    guest
        .rx
        .set_used_event(guest.rx.used_index().wrapping_add(100));
    guest
        .tx
        .set_used_event(guest.tx.used_index().wrapping_add(100));
    guest.send_data(b"x");
    host_writes.write_all(b"x").unwrap();
    guest.wait();
    assert_eq!(test_support::interrupts(&guest.interrupt), 0);
    guest.rx.set_used_event(guest.rx.used_index());
    host_writes.write_all(b"x").unwrap();
    guest.wait();
    assert_eq!(test_support::interrupts(&guest.interrupt), 1);
    // It is told where the device waits for a kick.
    assert_eq!(guest.tx.avail_event(), guest.tx.used_index());
}

#[test]
fn malformed_transmit_chains_are_faults() {
    let end = 0xb0_0000;
    let claims = |len| {
        move |guest: &mut Guest| {
            let header = Header {
                len,
                ..guest.header(op::RW)
            };
            guest.queue_packet(header, b"four");
        }
    };
    let chain = |buffers: &'static [test_support::Buffer]| {
        move |guest: &mut Guest| {
            guest.tx.add(buffers);
        }
    };
    let header_at_end: &'static [_] = Box::leak(Box::new([readable(end - 20, HEADER_LEN as u32)]));
    let outside: &'static [_] = Box::leak(Box::new([readable(end, HEADER_LEN as u32)]));
    let short: &'static [_] = Box::leak(Box::new([readable(TX_BUFFERS, 43)]));
    let empty: &'static [_] = Box::leak(Box::new([readable(TX_BUFFERS, 0)]));
    let write_only: &'static [_] = Box::leak(Box::new([writable(TX_BUFFERS, 4096)]));
    type Break = Box<dyn Fn(&mut Guest)>;
    let cases: [(&str, Break); 9] = [
        ("one byte more than there is", Box::new(claims(5))),
        ("4 GiB", Box::new(claims(u32::MAX))),
        ("straddles the end", Box::new(chain(header_at_end))),
        ("outside", Box::new(chain(outside))),
        ("short", Box::new(chain(short))),
        ("empty", Box::new(chain(empty))),
        ("write-only", Box::new(chain(write_only))),
        (
            "no such descriptor",
            Box::new(|guest| guest.tx.publish(128)),
        ),
        (
            "index jumps",
            Box::new(|guest| guest.tx.set_avail_index(0x4000)),
        ),
    ];
    for (what, break_rule) in cases {
        let (mut guest, _host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::NONBLOCK);
        let good = Header {
            len: 4,
            ..guest.header(op::RW)
        };
        guest.queue_packet(good, b"good");
        break_rule(&mut guest);
        assert!(guest.device.process_queue(TX).is_err(), "{what}");
        if what != "index jumps" {
            assert_eq!(read_available(&mut host_reads), b"good", "{what}");
        }
        guest.device.reset();
        assert_eq!(guest.device.take_closed(), [PORT], "{what}");
    }
}

#[test]
fn malformed_receive_chains_are_faults() {
    for (what, buffer) in [
        ("outside", writable(0xb0_0000, 4096)),
        ("straddles the end", writable(0xb0_0000 - 8, 4096)),
        ("no room for a header", writable(RX_BUFFERS, 43)),
        ("no room for data", writable(RX_BUFFERS, 44)),
        ("read-only", readable(RX_BUFFERS, 4096)),
    ] {
        let mut guest = Guest::without_buffers();
        guest.rx.add(&[buffer]);
        guest.queue_packet(guest.header(op::REQUEST), &[]);
        assert!(guest.device.process_queue(TX).is_err(), "{what}");
    }
    let mut guest = Guest::without_buffers();
    guest.rx.set_avail_index(200);
    guest.queue_packet(guest.header(op::REQUEST), &[]);
    assert!(guest.device.process_queue(TX).is_err());
}

#[test]
fn a_header_in_pieces_is_put_together() {
    let (mut guest, _host_writes, mut host_reads) = Guest::with_pipes(PipeFlags::empty());
    let header = Header {
        len: 6,
        ..guest.header(op::RW)
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(b"pieces");
    guest
        .memory
        .write_slice(&bytes, GuestAddress(TX_BUFFERS))
        .unwrap();
    let pieces: Vec<_> = (0..10).map(|at| readable(TX_BUFFERS + at * 5, 5)).collect();
    guest.tx.add(&pieces);
    guest.device.process_queue(TX).unwrap();
    assert_eq!(read_available(&mut host_reads), b"pieces");

    // Receive buffers of a byte each, then one.
    guest.device.reset();
    guest.rx.reset();
    guest.tx.reset();
    guest.activate();
    let pieces: Vec<_> = (0..47).map(|at| writable(RX_BUFFERS + at, 1)).collect();
    guest.rx.add(&pieces);
    guest.rx.add(&[writable(RX_BUFFERS + 100, 100)]);
    let (input, new_writes) = pipe_with(PipeFlags::empty()).unwrap();
    File::from(new_writes).write_all(b"abcdef").unwrap();
    guest.accept(
        PORT,
        Some(input),
        Some(File::open("/dev/null").unwrap().into()),
    );
    guest.send(op::REQUEST);
    assert_eq!(guest.rx.used().unwrap().1, 44);
    assert_eq!(guest.rx.used().unwrap().1, 50);
}

#[test]
fn an_unready_queue_is_left_alone() {
    let mut guest = Guest::new();
    guest.device.reset();
    let queues = [&guest.rx, &guest.tx, &guest.event];
    let mut activation = test_support::activation(&guest.memory, &queues, &guest.interrupt);
    for queue in &mut activation.queues {
        queue.queue.set_ready(false);
    }
    guest.device.activate(activation).unwrap();
    for index in 0..4 {
        guest.device.process_queue(index).unwrap();
    }
    guest.assert_idle();
}

/// A pipe: the output of a stream, and what the host reads.
fn output_pipe() -> (OwnedFd, File) {
    let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    (write, read.into())
}

#[derive(Debug)]
struct TempDir {
    path: std::path::PathBuf,
}

impl TempDir {
    fn new() -> TempDir {
        let id = format!("{:?}", thread::current().id());
        let name = format!(
            "vsock-test-{}-{id}-{:?}",
            std::process::id(),
            Instant::now()
        );
        let name: String = name
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .collect();
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        TempDir { path }
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
