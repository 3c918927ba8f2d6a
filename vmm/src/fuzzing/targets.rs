// SPDX-License-Identifier: Apache-2.0
//! The targets. Each takes whatever bytes there are.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_clock_data;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{BUFFERS, Buffer};
use super::{Driver, Input};
use crate::bus::BusDevice;
use crate::devices::ioapic::{Ioapic, IoapicState};
use crate::devices::uart::Uart;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::chain;
use crate::devices::virtio::fs::{self, Fs};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{HostStream, TX, Vsock};
use crate::memory::GuestMemory;
use crate::snapshot::{self, MachineState, MemoryId};

const GUEST_CID: u64 = 3;

/// All devices, by their registers and rings alone.
pub fn registers(data: &[u8]) {
    let mut input = Input::new(data);
    let device = device(input.index(4));
    Driver::new(device).run(&mut input, |_, _| {});
}

/// One chain in a queue of 16 that is the first bytes of the input, then what a device does with it.
pub fn descriptor_chains(data: &[u8]) {
    const SIZE: u16 = 16;
    const TABLE: usize = 16 * SIZE as usize;
    let mut input = Input::new(data);
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x1000)])
            .unwrap();
    memory
        .write_slice(input.bytes(TABLE), GuestAddress(0))
        .unwrap();
    // Flags, index, and as many heads.
    memory
        .write_slice(input.bytes(4 + 2 * usize::from(SIZE)), GuestAddress(0x1000))
        .unwrap();
    // An indirect table, or data.
    memory
        .write_slice(input.bytes(256), GuestAddress(0x3000))
        .unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_avail_ring_address(Some(0x1000), None);
    queue.set_used_ring_address(Some(0x2000), None);
    queue.set_ready(true);
    for _ in 0..SIZE {
        let Ok(Some(popped)) = chain::pop(0, &mut queue, &memory) else {
            return;
        };
        let head = popped.head_index();
        let Ok((mut reader, mut writer)) = chain::split(0, popped, &memory) else {
            return;
        };
        while !input.is_empty() {
            let count = usize::from(input.u16());
            let (left, room) = (reader.remaining(), writer.available());
            match input.index(6) {
                0 => {
                    let done = reader.read_exact(&mut vec![0; count]).is_ok();
                    assert_eq!(done, count <= left);
                    assert_eq!(reader.remaining(), left - if done { count } else { 0 });
                }
                1 => assert_eq!(reader.skip(count).is_ok(), count <= left),
                2 => {
                    let vectors = reader.iovecs(count);
                    let total: usize = vectors.iter().map(|vector| vector.iov_len).sum();
                    assert_eq!(total, count.min(left));
                }
                3 => {
                    let done = writer.write_all(&vec![1; count]).is_ok();
                    assert_eq!(done, count <= room);
                }
                4 => {
                    let vectors = writer.iovecs(count);
                    let total: usize = vectors.iter().map(|vector| vector.iov_len).sum();
                    assert_eq!(total, count.min(room));
                }
                _ => {
                    if let Ok(rest) = writer.split_at(count) {
                        assert_eq!(writer.available() + rest.available(), room);
                        writer = rest;
                    } else {
                        assert!(count > room);
                    }
                }
            }
        }
        if queue.add_used(&memory, head, 0).is_err() {
            return;
        }
    }
}

pub fn rng(data: &[u8]) {
    let device = Arc::new(Mutex::new(Rng::new()));
    Driver::new(device).run(&mut Input::new(data), |driver, input| {
        let length = u32::from(input.u16());
        driver.post(0, &[Buffer::writable(BUFFERS, length)]);
        if input.flag() {
            driver.kick(0);
        }
    });
}

pub fn balloon(data: &[u8]) {
    let device = Arc::new(Mutex::new(Balloon::new()));
    let host = device.clone();
    Driver::new(device).run(&mut Input::new(data), |driver, input| {
        match input.index(4) {
            0 => host.lock().unwrap().set_target(input.u32()),
            1 => {
                // Ranges that are free.
                let start = BUFFERS + u64::from(input.u16());
                let length = u32::from(input.u16());
                driver.post(2, &[Buffer::writable(start, length)]);
                driver.kick(2);
            }
            choice => {
                let count = input.index(64);
                let mut pfns = Vec::new();
                for _ in 0..count {
                    let pfn = match input.index(8) {
                        0 => input.u32(),
                        _ => u32::from(input.u8()),
                    };
                    // The rings are kept, or nothing more would come.
                    pfns.extend_from_slice(&pfn.max(0x20).to_le_bytes());
                }
                driver
                    .memory
                    .write_slice(&pfns, GuestAddress(BUFFERS))
                    .unwrap();
                let length = u32::try_from(pfns.len()).unwrap();
                driver.post(choice - 2, &[Buffer::readable(BUFFERS, length)]);
                driver.kick(choice - 2);
            }
        }
    });
}

/// The host's ends of streams.
#[derive(Debug, Default)]
struct Far {
    ends: Vec<OwnedFd>,
}

impl Far {
    /// What the device gets: a socket, a pair of pipes, or less.
    fn stream(&mut self, kind: usize) -> HostStream {
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        match kind {
            0 => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let (near, far) =
                    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                        .unwrap();
                self.ends.push(far);
                HostStream {
                    input: Some(near.as_fd().try_clone_to_owned().unwrap()),
                    output: Some(near),
                }
            }
            1 => {
                let (input, write) = pipe();
                let (read, output) = pipe();
                self.ends.extend([write, read]);
                HostStream {
                    input: Some(input),
                    output: Some(output),
                }
            }
            2 => {
                let (read, output) = pipe();
                self.ends.push(read);
                HostStream {
                    input: None,
                    output: Some(output),
                }
            }
            _ => HostStream::default(),
        }
    }

    fn act(&mut self, input: &mut Input<'_>) {
        if self.ends.is_empty() {
            return;
        }
        let which = input.index(self.ends.len());
        match input.index(3) {
            0 => {
                let data = vec![b'h'; usize::from(input.u16())];
                let _: Result<usize, Errno> = rustix::io::write(&self.ends[which], &data);
            }
            1 => {
                let mut buffer = vec![0; usize::from(input.u16())];
                let _: Result<usize, Errno> = rustix::io::read(&self.ends[which], &mut buffer);
            }
            _ => drop(self.ends.swap_remove(which)),
        }
    }
}

pub fn vsock(data: &[u8]) {
    let device = Arc::new(Mutex::new(Vsock::new(GUEST_CID).unwrap()));
    let host = device.clone();
    let mut far = Far::default();
    Driver::new(device).run(&mut Input::new(data), |driver, input| {
        match input.index(8) {
            0 => {
                let port = u32::from(input.u8() % 8);
                let stream = far.stream(input.index(4));
                let _ = host.lock().unwrap().accept_stream(port, stream);
            }
            1 => far.act(input),
            2 => host.lock().unwrap().close_stream(u32::from(input.u8() % 8)),
            3 => drop(host.lock().unwrap().take_closed()),
            4 => {
                // Room for packets.
                for _ in 0..=input.index(4) {
                    let room = 44 + u32::from(input.u16() % 0x2000);
                    driver.post(0, &[Buffer::writable(BUFFERS + 0x1_0000, room)]);
                }
                driver.kick(0);
            }
            _ => send_packet(driver, input),
        }
    });
    // Nothing of the guest keeps a stream that the host has given up.
    for port in 0..8 {
        host.lock().unwrap().close_stream(port);
    }
}

/// A packet that is mostly right: virtio 1.2, 5.10.6.
fn send_packet(driver: &mut Driver, input: &mut Input<'_>) {
    let odd = input.u8();
    let src_cid = if odd & 1 == 0 { GUEST_CID } else { input.u64() };
    let dst_cid = if odd & 2 == 0 { 2 } else { input.u64() };
    let src_port = u32::from(input.u8() % 8);
    let dst_port = if odd & 4 == 0 {
        u32::from(input.u8() % 8)
    } else {
        input.u32()
    };
    let payload = if odd & 8 == 0 {
        0
    } else {
        u32::from(input.u16())
    };
    let claimed = if odd & 16 == 0 { payload } else { input.u32() };
    let kind = if odd & 32 == 0 { 1 } else { input.u16() };
    let op = u16::from(input.u8() % 9);
    let flags = u32::from(input.u8() % 5);
    let buf_alloc = if odd & 64 == 0 { 0x4_0000 } else { input.u32() };
    let fwd_cnt = if odd & 128 == 0 { 0 } else { input.u32() };
    let mut packet = Vec::new();
    packet.extend_from_slice(&src_cid.to_le_bytes());
    packet.extend_from_slice(&dst_cid.to_le_bytes());
    for word in [src_port, dst_port, claimed] {
        packet.extend_from_slice(&word.to_le_bytes());
    }
    packet.extend_from_slice(&kind.to_le_bytes());
    packet.extend_from_slice(&op.to_le_bytes());
    for word in [flags, buf_alloc, fwd_cnt] {
        packet.extend_from_slice(&word.to_le_bytes());
    }
    driver
        .memory
        .write_slice(&packet, GuestAddress(BUFFERS))
        .unwrap();
    let mut buffers = vec![Buffer::readable(BUFFERS, 44)];
    if payload > 0 {
        buffers.push(Buffer::readable(BUFFERS + 44, payload));
    }
    driver.post(TX, &buffers);
    driver.kick(TX);
}

/// The file system device with its threads: rings, not files.
pub fn file_system_device(data: &[u8]) {
    let device = Arc::new(Mutex::new(file_system()));
    Driver::new(device).run(&mut Input::new(data), |driver, input| {
        let queue = input.index(2);
        // A request header of its own length, and a body.
        let body = input.index(64);
        let mut request = Vec::new();
        request.extend_from_slice(&u32::try_from(40 + body).unwrap().to_le_bytes());
        request.extend_from_slice(&u32::from(input.u8() % 56).to_le_bytes());
        request.resize(40, 0);
        request.extend_from_slice(input.bytes(body));
        driver
            .memory
            .write_slice(&request, GuestAddress(BUFFERS))
            .unwrap();
        let length = u32::try_from(request.len()).unwrap();
        let room = u32::from(input.u16());
        let reply = Buffer::writable(BUFFERS + 0x1000, room);
        driver.post(queue, &[Buffer::readable(BUFFERS, length), reply]);
        driver.kick(queue);
    });
}

/// FUSE requests to a share on the host. The directory for it is made in the directory for temporary files.
pub fn file_system_requests(data: &[u8]) {
    fs::fuzzing::requests(data);
}

pub fn uart(data: &[u8]) {
    let mut input = Input::new(data);
    let uart = Uart::default();
    while !input.is_empty() {
        let register = u16::from(input.u8());
        if input.flag() {
            uart.write(register, input.u8());
        } else {
            uart.read(register);
        }
    }
    let tail = uart.tail();
    assert!(tail.len() <= 4096);
    assert!(tail.chars().all(|c| c == '\n' || (' '..='~').contains(&c)));
}

pub fn ioapic(data: &[u8]) {
    let mut input = Input::new(data);
    let ioapic = Ioapic::new(Box::new(|_| {}));
    while !input.is_empty() {
        let offset = match input.index(4) {
            0 => u64::from(input.u16()),
            1 => 0,
            _ => 0x10,
        };
        let width = 1 + input.index(8);
        if input.flag() {
            ioapic.write(offset, input.bytes(width));
        } else {
            let mut value = [0xff; 8];
            ioapic.read(offset, &mut value[..width]);
        }
    }
    let saved = ioapic.save();
    let other = Ioapic::new(Box::new(|_| {}));
    other.restore(&saved);
    assert_eq!(other.save(), saved);
}

/// A state file: any bytes, any body in a right envelope, or what a device has saved with bytes changed. What is accepted
/// is given to devices.
pub fn snapshot(data: &[u8]) {
    let mut input = Input::new(data);
    let state = match input.index(4) {
        0 => MachineState::decode(input.rest()),
        1 => MachineState::decode(&snapshot::envelope(input.rest())),
        _ => MachineState::decode(&snapshot::envelope(&changed_state(&mut input))),
    };
    let Ok(state) = state else { return };
    let ioapic = Ioapic::new(Box::new(|_| {}));
    ioapic.restore(&state.ioapic);
    for kind in 0..3 {
        for saved in &state.transports {
            let mut driver = Driver::new(device(kind));
            if driver.restore(saved) {
                for queue in 0..3 {
                    driver.kick(queue);
                }
            }
            driver.must_start_again();
        }
    }
}

fn changed_state(input: &mut Input<'_>) -> Vec<u8> {
    let changes: Vec<(u16, u8)> = (0..input.index(8))
        .map(|_| (input.u16(), input.u8()))
        .collect();
    let mut driver = Driver::new(device(input.index(3)));
    driver.steps(input, |_, _| {});
    let state = MachineState {
        plan: String::new(),
        memory_id: MemoryId::default(),
        vcpus: Vec::new(),
        clock: kvm_clock_data::default(),
        ioapic: IoapicState::default(),
        transports: driver.save().into_iter().collect(),
        running: None,
    };
    let mut body = postcard::to_stdvec(&state).unwrap();
    let length = body.len();
    for (at, value) in changes {
        body[usize::from(at) % length] = value;
    }
    body
}

/// A device without a host's side.
fn device(kind: usize) -> Arc<Mutex<dyn VirtioDevice>> {
    match kind {
        0 => Arc::new(Mutex::new(Rng::new())),
        1 => Arc::new(Mutex::new(Balloon::new())),
        2 => Arc::new(Mutex::new(Vsock::new(GUEST_CID).unwrap())),
        _ => Arc::new(Mutex::new(file_system())),
    }
}

/// With its threads.
fn file_system() -> Fs {
    let mut device = Fs::new("share", 1 << 20).unwrap();
    device.start().unwrap();
    device
}
