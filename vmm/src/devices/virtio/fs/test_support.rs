// SPDX-License-Identifier: Apache-2.0
//! A guest's kernel for tests: makes FUSE requests byte by byte and drives the server with them, without a VM.
//!
//! There is a share with a canary beside it: nothing that a request does may change what is outside of the share.

use std::ffi::CStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::abi::{self, init, opcode};
use super::passthrough::Budget;
use super::server::{Server, Task};
use crate::devices::virtio::chain;
use crate::devices::virtio::test_support::{Buffer, DriverQueue, guest_memory, readable, writable};
use crate::memory::GuestMemory;

/// A directory that goes away with the value.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Scratch {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("sandbox-fs-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What a test has mounted, the last first.
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let points = mounts
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(&self.0)) {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

const RINGS: u64 = 0;
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x40_0000;
const MEMORY: usize = 0x80_0000;
const ROOM: u32 = 0x20_0000;

/// The driver's end of a connection, over a virtqueue in guest memory.
#[derive(Debug)]
pub(super) struct Guest {
    scratch: Scratch,
    memory: GuestMemory,
    queue: DriverQueue,
    device: virtio_queue::Queue,
    server: Server,
    task: Task,
    unique: u64,
    pub(super) owner: (u32, u32),
    /// Requests sent since the start.
    pub(super) requests: usize,
}

pub(super) type Answer<T> = Result<T, Errno>;

pub(super) const ROOT: u64 = abi::ROOT_ID;

pub(super) fn generous() -> Budget {
    Budget::new(1 << 14, 1 << 30)
}

/// Everything below `path`: names, types, modes, contents and times of change.
pub(super) fn inventory(path: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut lines = Vec::new();
    let mut todo = vec![path.to_owned()];
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = if metadata.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        lines.push(format!(
            "{} {:o} {} {} {} {:?}",
            path.display(),
            metadata.mode(),
            metadata.uid(),
            metadata.ctime_nsec(),
            metadata.nlink(),
            content
        ));
        if metadata.is_dir() {
            todo.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
    lines.sort();
    lines
}

impl Guest {
    pub(super) fn new() -> Guest {
        Guest::with(generous(), &[])
    }

    /// A guest that has sent INIT.
    pub(super) fn with(budget: Budget, private: &[&CStr]) -> Guest {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("share")).unwrap();
        fs::create_dir(scratch.path().join("canary")).unwrap();
        fs::write(scratch.path().join("canary/secret"), "secret").unwrap();
        let root: OwnedFd = fs::File::open(scratch.path().join("share")).unwrap().into();
        let server = Server::new().unwrap();
        let private = private.iter().map(|name| (*name).to_owned()).collect();
        server.plug(root, private, budget).unwrap();
        let mut guest = Guest::of(server, scratch);
        guest.init().unwrap();
        guest
    }

    pub(super) fn of(server: Server, scratch: Scratch) -> Guest {
        let memory = guest_memory(MEMORY);
        let queue = DriverQueue::new(&memory, RINGS, 1024);
        let device = queue.device_side().queue;
        Guest {
            scratch,
            memory,
            queue,
            device,
            task: server.task().unwrap(),
            server,
            unique: 1,
            owner: (0, 0),
            requests: 0,
        }
    }

    /// A path of the host in the share.
    pub(super) fn host(&self, path: &str) -> PathBuf {
        self.scratch.path().join("share").join(path)
    }

    pub(super) fn outside(&self) -> PathBuf {
        self.scratch.path().join("canary")
    }

    pub(super) fn server(&self) -> &Server {
        &self.server
    }

    /// Sends whatever bytes as a request and returns what was written to a reply buffer of `room` bytes.
    pub(super) fn raw(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.requests += 1;
        self.memory
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        // In pieces, as the guest's kernel does it: header, rest, reply header, pages.
        let length = u32::try_from(request.len()).unwrap();
        let head = length.min(40);
        let mut buffers: Vec<Buffer> = vec![readable(REQUEST, head)];
        if length > head {
            buffers.push(readable(REQUEST + u64::from(head), length - head));
        }
        let mut at = 0;
        for size in std::iter::once(16).chain(std::iter::repeat(0x4_0000)) {
            let size = size.min(room - at);
            if size == 0 {
                break;
            }
            buffers.push(writable(REPLY + u64::from(at), size));
            at += size;
        }
        let head = self.queue.add(&buffers);
        let popped = chain::pop(1, &mut self.device, &self.memory)
            .unwrap()
            .unwrap();
        let (reader, writer) = chain::split(1, popped, &self.memory).unwrap();
        let written = self
            .server
            .handle(&mut self.task, reader, writer, || {})
            .unwrap_or(0);
        virtio_queue::QueueT::add_used(
            &mut self.device,
            &self.memory,
            head,
            u32::try_from(written).unwrap(),
        )
        .unwrap();
        let (_, length) = self.queue.used().unwrap();
        let mut reply = vec![0; length as usize];
        self.memory
            .read_slice(&mut reply, GuestAddress(REPLY))
            .unwrap();
        reply
    }

    pub(super) fn header(&mut self, opcode: u32, node: u64, length: usize) -> abi::InHeader {
        self.unique += 2;
        abi::InHeader {
            len: u32::try_from(size_of::<abi::InHeader>() + length).unwrap(),
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.owner.0,
            gid: self.owner.1,
            pid: 1,
            ..abi::InHeader::default()
        }
    }

    /// Sends a request of `parts` and returns the reply without its header.
    pub(super) fn call(&mut self, opcode: u32, node: u64, parts: &[&[u8]]) -> Answer<Vec<u8>> {
        self.call_with_room(opcode, node, parts, ROOM)
    }

    pub(super) fn call_with_room(
        &mut self,
        opcode: u32,
        node: u64,
        parts: &[&[u8]],
        room: u32,
    ) -> Answer<Vec<u8>> {
        let body = parts.concat();
        let header = self.header(opcode, node, body.len());
        let request = [header.as_slice(), &body].concat();
        let reply = self.raw(&request, room);
        if reply.is_empty() {
            return Ok(reply);
        }
        let (head, rest) = reply.split_at(16);
        let mut out = abi::OutHeader::default();
        out.as_mut_slice().copy_from_slice(head);
        assert_eq!(out.unique, header.unique);
        assert_eq!(out.len as usize, reply.len());
        if out.error == 0 {
            Ok(rest.to_vec())
        } else {
            assert!(rest.is_empty());
            Err(Errno::from_raw_os_error(-out.error))
        }
    }

    pub(super) fn ask<T: ByteValued + Default>(
        &mut self,
        opcode: u32,
        node: u64,
        parts: &[&[u8]],
    ) -> Answer<T> {
        let reply = self.call(opcode, node, parts)?;
        assert_eq!(reply.len(), size_of::<T>());
        Ok(first(&reply))
    }

    pub(super) fn init(&mut self) -> Answer<abi::InitOut> {
        let input = abi::InitIn {
            major: 7,
            minor: 41,
            max_readahead: 1 << 17,
            flags: u32::MAX,
            flags2: u32::MAX,
            ..abi::InitIn::default()
        };
        let output: abi::InitOut = self.ask(opcode::INIT, 0, &[input.as_slice()])?;
        assert_eq!(u64::from(output.flags) & init::INIT_EXT, init::INIT_EXT);
        Ok(output)
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &CStr) -> Answer<abi::EntryOut> {
        self.ask(opcode::LOOKUP, parent, &[name.to_bytes_with_nul()])
    }

    /// Looks up every component of `path` from the root of the share.
    pub(super) fn find(&mut self, path: &str) -> Answer<abi::EntryOut> {
        let mut entry = abi::EntryOut {
            nodeid: ROOT,
            ..abi::EntryOut::default()
        };
        for name in path.split('/') {
            let name = std::ffi::CString::new(name).unwrap();
            entry = self.lookup(entry.nodeid, &name)?;
        }
        Ok(entry)
    }

    pub(super) fn forget(&mut self, node: u64, nlookup: u64) {
        let input = abi::ForgetIn { nlookup };
        let reply = self.call(opcode::FORGET, node, &[input.as_slice()]);
        assert_eq!(reply, Ok(Vec::new()));
    }

    pub(super) fn getattr(&mut self, node: u64) -> Answer<abi::Attr> {
        let input = abi::GetattrIn::default();
        let output: abi::AttrOut = self.ask(opcode::GETATTR, node, &[input.as_slice()])?;
        Ok(output.attr)
    }

    pub(super) fn setattr(&mut self, node: u64, input: &abi::SetattrIn) -> Answer<abi::Attr> {
        let output: abi::AttrOut = self.ask(opcode::SETATTR, node, &[input.as_slice()])?;
        Ok(output.attr)
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Answer<abi::OpenOut> {
        let input = abi::OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        self.ask(opcode::OPEN, node, &[input.as_slice()])
    }

    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &CStr,
        flags: i32,
        mode: u32,
    ) -> Answer<(abi::EntryOut, abi::OpenOut)> {
        let input = abi::CreateIn {
            flags: flags.cast_unsigned(),
            mode,
            umask: 0o022,
            open_flags: 0,
        };
        let parts = [input.as_slice(), name.to_bytes_with_nul()];
        let reply = self.call(opcode::CREATE, parent, &parts)?;
        assert_eq!(reply.len(), 144);
        Ok((first(&reply), first(&reply[128..])))
    }

    pub(super) fn mkdir(&mut self, parent: u64, name: &CStr) -> Answer<abi::EntryOut> {
        let input = abi::MkdirIn {
            mode: 0o755,
            umask: 0o022,
        };
        let parts = [input.as_slice(), name.to_bytes_with_nul()];
        self.ask(opcode::MKDIR, parent, &parts)
    }

    pub(super) fn mknod(
        &mut self,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
    ) -> Answer<abi::EntryOut> {
        let input = abi::MknodIn {
            mode,
            rdev,
            umask: 0o022,
            padding: 0,
        };
        let parts = [input.as_slice(), name.to_bytes_with_nul()];
        self.ask(opcode::MKNOD, parent, &parts)
    }

    pub(super) fn symlink(
        &mut self,
        parent: u64,
        name: &CStr,
        target: &CStr,
    ) -> Answer<abi::EntryOut> {
        let parts = [name.to_bytes_with_nul(), target.to_bytes_with_nul()];
        self.ask(opcode::SYMLINK, parent, &parts)
    }

    pub(super) fn unlink(&mut self, parent: u64, name: &CStr) -> Answer<()> {
        self.call(opcode::UNLINK, parent, &[name.to_bytes_with_nul()])
            .map(drop)
    }

    pub(super) fn rmdir(&mut self, parent: u64, name: &CStr) -> Answer<()> {
        self.call(opcode::RMDIR, parent, &[name.to_bytes_with_nul()])
            .map(drop)
    }

    pub(super) fn rename(
        &mut self,
        (parent, name): (u64, &CStr),
        (newdir, newname): (u64, &CStr),
        flags: u32,
    ) -> Answer<()> {
        let input = abi::Rename2In {
            newdir,
            flags,
            padding: 0,
        };
        let parts = [
            input.as_slice(),
            name.to_bytes_with_nul(),
            newname.to_bytes_with_nul(),
        ];
        self.call(opcode::RENAME2, parent, &parts).map(drop)
    }

    pub(super) fn link(
        &mut self,
        oldnodeid: u64,
        parent: u64,
        name: &CStr,
    ) -> Answer<abi::EntryOut> {
        let input = abi::LinkIn { oldnodeid };
        let parts = [input.as_slice(), name.to_bytes_with_nul()];
        self.ask(opcode::LINK, parent, &parts)
    }

    pub(super) fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let input = abi::ReadIn {
            fh,
            offset,
            size,
            ..abi::ReadIn::default()
        };
        self.call_with_room(opcode::READ, node, &[input.as_slice()], 16 + size.min(ROOM))
    }

    pub(super) fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        self.write_with(
            node,
            &abi::WriteIn {
                fh,
                offset,
                size: u32::try_from(data.len()).unwrap(),
                ..abi::WriteIn::default()
            },
            data,
        )
    }

    pub(super) fn write_with(
        &mut self,
        node: u64,
        input: &abi::WriteIn,
        data: &[u8],
    ) -> Answer<u32> {
        let parts = [input.as_slice(), data];
        let output: abi::WriteOut = self.ask(opcode::WRITE, node, &parts)?;
        Ok(output.size)
    }

    pub(super) fn release(&mut self, node: u64, fh: u64) -> Answer<()> {
        let input = abi::ReleaseIn {
            fh,
            ..abi::ReleaseIn::default()
        };
        self.call(opcode::RELEASE, node, &[input.as_slice()])
            .map(drop)
    }

    pub(super) fn opendir(&mut self, node: u64) -> Answer<u64> {
        let input = abi::OpenIn::default();
        let output: abi::OpenOut = self.ask(opcode::OPENDIR, node, &[input.as_slice()])?;
        Ok(output.fh)
    }

    /// One READDIR: name, offset of the next entry, type, inode number.
    pub(super) fn readdir(
        &mut self,
        (node, fh): (u64, u64),
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Answer<Vec<Listed>> {
        let input = abi::ReadIn {
            fh,
            offset,
            size,
            ..abi::ReadIn::default()
        };
        let opcode = if plus {
            opcode::READDIRPLUS
        } else {
            opcode::READDIR
        };
        let reply = self.call_with_room(opcode, node, &[input.as_slice()], 16 + size)?;
        let mut rest = &reply[..];
        let mut list = Vec::new();
        while !rest.is_empty() {
            let mut entry = abi::EntryOut::default();
            if plus {
                entry = first(rest);
                rest = &rest[128..];
            }
            let head: abi::Dirent = first(rest);
            let end = 24 + head.namelen as usize;
            list.push(Listed {
                name: String::from_utf8(rest[24..end].to_vec()).unwrap(),
                offset: head.off,
                kind: head.kind,
                ino: head.ino,
                entry,
            });
            rest = &rest[end.next_multiple_of(8)..];
        }
        Ok(list)
    }

    pub(super) fn setxattr(&mut self, node: u64, name: &CStr, value: &[u8]) -> Answer<()> {
        let input = abi::SetxattrIn {
            size: u32::try_from(value.len()).unwrap(),
            ..abi::SetxattrIn::default()
        };
        let parts = [input.as_slice(), name.to_bytes_with_nul(), value];
        self.call(opcode::SETXATTR, node, &parts).map(drop)
    }

    pub(super) fn getxattr(&mut self, node: u64, name: &CStr, size: u32) -> Answer<Vec<u8>> {
        let input = abi::GetxattrIn { size, padding: 0 };
        let parts = [input.as_slice(), name.to_bytes_with_nul()];
        self.call(opcode::GETXATTR, node, &parts)
    }

    pub(super) fn listxattr(&mut self, node: u64, size: u32) -> Answer<Vec<u8>> {
        let input = abi::GetxattrIn { size, padding: 0 };
        self.call(opcode::LISTXATTR, node, &[input.as_slice()])
    }
}

#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) offset: u64,
    pub(super) kind: u32,
    pub(super) ino: u64,
    pub(super) entry: abi::EntryOut,
}

/// The structure at the start of `bytes`.
pub(super) fn first<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    value
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    value
}
