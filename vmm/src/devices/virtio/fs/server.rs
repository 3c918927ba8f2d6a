// SPDX-License-Identifier: Apache-2.0
//! The FUSE server: one request in, at most one reply out.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::AtFlags;
use rustix::io::Errno;
use vm_memory::ByteValued;

use super::abi::{self, init};
use super::credentials::Credentials;
use super::file::LARGEST_TRANSFER;
use super::passthrough::{Budget, Passthrough};
use super::request::{self, Operation};
use super::saved::{SavedFiles, SavedFilesError};
use super::self_fd::SelfFd;
use super::xattr::Attribute;
use crate::devices::virtio::chain::{Reader, TooShort, Writer};

/// The page size of x86-64, in which `max_pages` counts.
const PAGE: u32 = 4096;
/// What is wanted of the guest's kernel, if it can do it.
const FLAGS: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::ALLOW_IDMAP;
/// Without these the guest's requests would not mean what they are taken for.
const REQUIRED: u64 = init::ATOMIC_O_TRUNC
    | init::DONT_MASK
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// What a thread needs to serve requests.
#[derive(Debug)]
pub(super) struct Task {
    credentials: Credentials,
    body: Vec<u8>,
    reply: Vec<u8>,
}

/// Serves one connection, which starts with INIT and ends with DESTROY or the next INIT.
#[derive(Debug)]
pub(super) struct Server {
    self_fd: Arc<SelfFd>,
    share: OnceLock<Passthrough>,
    connected: AtomicBool,
}

/// What a request was answered with.
enum Reply {
    /// What is in `Task::reply`.
    Buffered,
    /// So many bytes that are in guest memory already.
    InPlace(usize),
}

impl Server {
    pub(super) fn leave_disks_to_host(&self) {
        if let Some(share) = self.share.get() {
            share.leave_disks_to_host();
        }
    }

    /// A server without a share; see [`SelfFd::open`].
    pub(super) fn new() -> io::Result<Server> {
        Ok(Server {
            self_fd: Arc::new(SelfFd::open()?),
            share: OnceLock::new(),
            connected: AtomicBool::new(false),
        })
    }

    /// Gives the server its share, once.
    pub(super) fn plug(
        &self,
        root: OwnedFd,
        private: Vec<CString>,
        budget: Budget,
    ) -> io::Result<()> {
        self.self_fd.check(root.as_fd())?;
        let share = Passthrough::new(self.self_fd.clone(), root, private, budget)?;
        self.share
            .set(share)
            .map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))
    }

    /// Prepares the calling thread.
    pub(super) fn task(&self) -> io::Result<Task> {
        Ok(Task {
            credentials: Credentials::of_this_thread(self.self_fd.as_fd())?,
            body: Vec::new(),
            reply: Vec::new(),
        })
    }

    /// The device was reset: the guest's kernel knows nothing any more.
    pub(super) fn disconnect(&self) {
        self.connected.store(false, Ordering::Release);
        if let Some(share) = self.share.get() {
            // On failure the old state stays until INIT, which fails in the same way.
            let _ = share.reset();
        }
    }

    pub(super) fn save(&self) -> Result<SavedFiles, SavedFilesError> {
        match self.share.get() {
            Some(share) => share.save(self.connected.load(Ordering::Acquire)),
            None => Ok(SavedFiles::default()),
        }
    }

    /// In a thread of its own, prepared as those that serve requests.
    pub(super) fn restore(&self, saved: &SavedFiles) -> Result<(), SavedFilesError> {
        let Some(share) = self.share.get() else {
            return Err(SavedFilesError::Damaged);
        };
        let restore = || -> Result<(), SavedFilesError> {
            self.task().map_err(SavedFilesError::Thread)?;
            share.restore(saved)
        };
        std::thread::scope(|scope| match scope.spawn(restore).join() {
            Ok(result) => result,
            Err(_) => Err(SavedFilesError::Damaged),
        })?;
        self.connected.store(saved.connected, Ordering::Release);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn usage(&self) -> Option<(usize, usize)> {
        self.share.get().map(|share| share.inodes.usage())
    }

    /// Serves the request in `reader` and returns how many bytes of `writer` hold the reply. An error means that the
    /// buffers are too small for header and reply header. Calls `before_long` before it does what may take long.
    pub(super) fn handle(
        &self,
        task: &mut Task,
        mut reader: Reader<'_>,
        mut writer: Writer<'_>,
        before_long: impl FnOnce(),
    ) -> Result<usize, TooShort> {
        let length = reader.remaining();
        let header: abi::InHeader = reader.read_obj()?;
        if !request::has_reply(header.opcode) {
            task.reply.clear();
            // There is nobody to tell of an error.
            let _ = self.serve(task, &header, length, &mut reader, None);
            return Ok(0);
        }
        let body = writer.split_at(size_of::<abi::OutHeader>())?;
        task.reply.clear();
        if request::may_take_long(header.opcode) {
            before_long();
        }
        let result = self.serve(task, &header, length, &mut reader, Some(&body));
        finish(&task.reply, header.unique, result, writer, body)
    }

    fn serve(
        &self,
        task: &mut Task,
        header: &abi::InHeader,
        length: usize,
        reader: &mut Reader<'_>,
        data: Option<&Writer<'_>>,
    ) -> Result<Reply, Errno> {
        if header.len as usize != length {
            return Err(Errno::INVAL);
        }
        let Task {
            credentials,
            body,
            reply,
        } = task;
        let size = request::fixed_part(header.opcode).unwrap_or(reader.remaining());
        if size > request::LARGEST_BODY {
            return Err(Errno::TOOBIG);
        }
        body.resize(size, 0);
        reader.read_exact(body).map_err(|TooShort| Errno::INVAL)?;
        let operation = Operation::parse(header.opcode, body)?;
        let room = data.map_or(0, Writer::available);
        if operation.reply_size() > room {
            return Err(Errno::INVAL);
        }
        let share = self.share.get().ok_or(Errno::NODEV)?;
        if let Operation::Init(input) = &operation {
            self.connected.store(false, Ordering::Release);
            let output = init(share, input)?;
            self.connected.store(output.flags != 0, Ordering::Release);
            reply.extend_from_slice(output.as_slice());
            return Ok(Reply::Buffered);
        }
        if !self.connected.load(Ordering::Acquire) {
            return Err(Errno::NOTCONN);
        }
        match (&operation, data) {
            (Operation::Read(input), Some(data)) => {
                let count = share.read(header.nodeid, input, data)?;
                return Ok(Reply::InPlace(count));
            }
            (Operation::Write(input), _) => {
                let output = share.write(credentials, header.nodeid, input, reader)?;
                reply.extend_from_slice(output.as_slice());
            }
            (Operation::Destroy, _) => self.disconnect(),
            (operation, _) => execute(share, credentials, header, operation, room, reply)?,
        }
        Ok(Reply::Buffered)
    }
}

fn init(share: &Passthrough, input: &abi::InitIn) -> Result<abi::InitOut, Errno> {
    let mut output = abi::InitOut {
        major: abi::KERNEL_VERSION,
        minor: abi::KERNEL_MINOR_VERSION,
        ..abi::InitOut::default()
    };
    if input.major > abi::KERNEL_VERSION {
        // The guest tries again with our version.
        return Ok(output);
    }
    let offered = u64::from(input.flags) | u64::from(input.flags2) << 32;
    let is_old = input.minor < abi::OLDEST_MINOR_VERSION || input.major < abi::KERNEL_VERSION;
    if is_old || offered & REQUIRED != REQUIRED {
        return Err(Errno::PROTO);
    }
    share.reset()?;
    let flags = offered & FLAGS;
    output.max_readahead = input.max_readahead;
    (output.flags, output.flags2) = halves(flags);
    // Requests that the guest's kernel starts of itself (read-ahead), and how many make it hold back.
    output.max_background = 64;
    output.congestion_threshold = 48;
    output.max_write = LARGEST_TRANSFER;
    output.time_gran = 1;
    output.max_pages = u16::try_from(LARGEST_TRANSFER / PAGE).unwrap_or(u16::MAX);
    Ok(output)
}

fn halves(flags: u64) -> (u32, u32) {
    let bytes = flags.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// Everything that neither moves data nor is about the connection.
fn execute(
    share: &Passthrough,
    credentials: &mut Credentials,
    header: &abi::InHeader,
    operation: &Operation<'_>,
    room: usize,
    reply: &mut Vec<u8>,
) -> Result<(), Errno> {
    let node = header.nodeid;
    let owner = (header.uid, header.gid);
    match operation {
        Operation::Lookup { name } => put(reply, &share.lookup(node, *name)?),
        Operation::Forget { nlookup } => share.inodes.forget(node, *nlookup),
        Operation::BatchForget { nodes } => {
            for one in request::forgotten(nodes) {
                share.inodes.forget(one.nodeid, one.nlookup);
            }
        }
        Operation::Getattr(input) => put(reply, &share.getattr(node, input)?),
        Operation::Setattr(input) => put(reply, &share.setattr(credentials, node, input)?),
        Operation::Readlink => put_bytes(reply, share.readlink(node)?.as_bytes(), room)?,
        Operation::Symlink { name, target } => {
            put(
                reply,
                &share.symlink(credentials, owner, node, *name, target)?,
            );
        }
        Operation::Mknod { input, name } => {
            put(reply, &share.mknod(credentials, owner, node, input, *name)?);
        }
        Operation::Mkdir { input, name } => {
            put(reply, &share.mkdir(credentials, owner, node, input, *name)?);
        }
        Operation::Unlink { name } => share.unlink(node, *name, AtFlags::empty())?,
        Operation::Rmdir { name } => share.unlink(node, *name, AtFlags::REMOVEDIR)?,
        Operation::Rename(rename) => share.rename(node, rename)?,
        Operation::Link { oldnodeid, name } => put(reply, &share.link(*oldnodeid, node, *name)?),
        Operation::Open(input) => put(reply, &share.open(credentials, node, input)?),
        Operation::Create { input, name } => {
            let (entry, open) = share.create(credentials, owner, node, input, *name)?;
            put(reply, &entry);
            put(reply, &open);
        }
        Operation::Tmpfile(input) => {
            let (entry, open) = share.tmpfile(credentials, owner, node, input)?;
            put(reply, &entry);
            put(reply, &open);
        }
        Operation::Statfs => put(reply, &share.statfs(node)?),
        Operation::Release { fh } => share.release(node, *fh)?,
        Operation::Fsync(input) => share.fsync(node, input)?,
        Operation::Setxattr { input, name, value } => {
            share.setxattr(credentials, node, input, *name, value)?;
        }
        Operation::Getxattr { size, name } => {
            put_attribute(
                reply,
                share.getxattr(credentials, node, *name, *size)?,
                room,
            )?;
        }
        Operation::Listxattr { size } => {
            put_attribute(reply, share.listxattr(credentials, node, *size)?, room)?;
        }
        Operation::Removexattr { name } => share.removexattr(credentials, node, *name)?,
        Operation::Opendir => put(reply, &share.opendir(node)?),
        Operation::Readdir { input, plus } => share.readdir(node, input, *plus, room, reply)?,
        Operation::Releasedir { fh } => share.releasedir(node, *fh)?,
        Operation::Fsyncdir(input) => share.fsyncdir(node, input)?,
        Operation::Fallocate(input) => share.fallocate(node, input)?,
        Operation::Lseek(input) => put(reply, &share.lseek(node, input)?),
        Operation::CopyFileRange(input) => put(reply, &share.copy_file_range(node, input)?),
        Operation::Syncfs => share.syncfs()?,
        // Nothing here takes so long that stopping it would pay.
        Operation::Interrupt => {}
        Operation::Init(_) | Operation::Destroy | Operation::Read(_) | Operation::Write(_) => {
            return Err(Errno::NOSYS);
        }
    }
    Ok(())
}

fn put<T: ByteValued>(reply: &mut Vec<u8>, value: &T) {
    reply.extend_from_slice(value.as_slice());
}

fn put_bytes(reply: &mut Vec<u8>, bytes: &[u8], room: usize) -> Result<(), Errno> {
    if bytes.len() > room {
        return Err(Errno::RANGE);
    }
    reply.extend_from_slice(bytes);
    Ok(())
}

fn put_attribute(reply: &mut Vec<u8>, attribute: Attribute, room: usize) -> Result<(), Errno> {
    match attribute {
        Attribute::Size(size) => {
            put(reply, &abi::GetxattrOut { size, padding: 0 });
            Ok(())
        }
        Attribute::Value(value) => put_bytes(reply, &value, room),
    }
}

/// Writes reply and header.
fn finish(
    buffered: &[u8],
    unique: u64,
    result: Result<Reply, Errno>,
    mut head: Writer<'_>,
    mut body: Writer<'_>,
) -> Result<usize, TooShort> {
    let (error, size) = match result {
        Ok(Reply::Buffered) => {
            body.write_all(buffered)?;
            (0, buffered.len())
        }
        Ok(Reply::InPlace(size)) => (0, size),
        Err(error) => (-error.raw_os_error(), 0),
    };
    let length = size_of::<abi::OutHeader>() + size;
    head.write_obj(&abi::OutHeader {
        len: u32::try_from(length).map_err(|_| TooShort)?,
        error,
        unique,
    })?;
    Ok(length)
}
