// SPDX-License-Identifier: Apache-2.0
//! FUSE requests as the guest sends them: bytes in, a checked [`Operation`] out. Nothing is executed here.

use std::ffi::CStr;

use rustix::io::Errno;
use vm_memory::ByteValued;

use super::abi::{self, opcode};
use super::name::{AttributeName, Name};

/// PATH_MAX of Linux, the terminating NUL included.
const LONGEST_TARGET: usize = 4096;
/// XATTR_SIZE_MAX of Linux.
const LARGEST_ATTRIBUTE: usize = 65536;
/// The largest request but for the data of WRITE: SETXATTR.
pub(super) const LARGEST_BODY: usize = size_of::<abi::SetxattrIn>() + 256 + LARGEST_ATTRIBUTE;

/// What the guest asks for. Names are checked; node ids and handles are not known to exist.
#[derive(Debug)]
pub(super) enum Operation<'a> {
    Lookup {
        name: Name<'a>,
    },
    Forget {
        nlookup: u64,
    },
    BatchForget {
        nodes: &'a [u8],
    },
    Getattr(abi::GetattrIn),
    Setattr(abi::SetattrIn),
    Readlink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    Mknod {
        input: abi::MknodIn,
        name: Name<'a>,
    },
    Mkdir {
        input: abi::MkdirIn,
        name: Name<'a>,
    },
    Unlink {
        name: Name<'a>,
    },
    Rmdir {
        name: Name<'a>,
    },
    Rename(Rename<'a>),
    Link {
        oldnodeid: u64,
        name: Name<'a>,
    },
    Open(abi::OpenIn),
    Create {
        input: abi::CreateIn,
        name: Name<'a>,
    },
    Tmpfile(abi::CreateIn),
    Read(abi::ReadIn),
    /// The data follows in the request.
    Write(abi::WriteIn),
    Statfs,
    Release {
        fh: u64,
    },
    Fsync(abi::FsyncIn),
    Setxattr {
        input: abi::SetxattrIn,
        name: AttributeName<'a>,
        value: &'a [u8],
    },
    Getxattr {
        size: u32,
        name: AttributeName<'a>,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: AttributeName<'a>,
    },
    Init(abi::InitIn),
    Opendir,
    Readdir {
        input: abi::ReadIn,
        plus: bool,
    },
    Releasedir {
        fh: u64,
    },
    Fsyncdir(abi::FsyncIn),
    Interrupt,
    Destroy,
    Fallocate(abi::FallocateIn),
    Lseek(abi::LseekIn),
    CopyFileRange(abi::CopyFileRangeIn),
    Syncfs,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Rename<'a> {
    pub(super) name: Name<'a>,
    pub(super) newdir: u64,
    pub(super) newname: Name<'a>,
    pub(super) flags: u32,
}

/// How many bytes between header and data are the fixed part of a request of this kind; `None` when all of the
/// request is to be read.
pub(super) fn fixed_part(opcode: u32) -> Option<usize> {
    (opcode == opcode::WRITE).then_some(size_of::<abi::WriteIn>())
}

/// Whether the guest waits for a reply.
pub(super) fn has_reply(opcode: u32) -> bool {
    !matches!(
        opcode,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
    )
}

/// Whether the host may have to write or copy a lot for it.
pub(super) fn may_take_long(opcode: u32) -> bool {
    matches!(
        opcode,
        opcode::FSYNC
            | opcode::FSYNCDIR
            | opcode::SYNCFS
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
    )
}

impl<'a> Operation<'a> {
    /// Parses what follows the header.
    pub(super) fn parse(opcode: u32, body: &'a [u8]) -> Result<Operation<'a>, Errno> {
        let mut body = Body(body);
        let operation = match opcode {
            opcode::LOOKUP => Operation::Lookup { name: body.name()? },
            opcode::FORGET => Operation::Forget {
                nlookup: body.structure::<abi::ForgetIn>()?.nlookup,
            },
            opcode::BATCH_FORGET => {
                let count = body.structure::<abi::BatchForgetIn>()?.count as usize;
                let length = count.checked_mul(size_of::<abi::ForgetOne>());
                Operation::BatchForget {
                    nodes: body.bytes(length.ok_or(Errno::INVAL)?)?,
                }
            }
            opcode::GETATTR => Operation::Getattr(body.structure()?),
            opcode::SETATTR => Operation::Setattr(body.structure()?),
            opcode::READLINK => Operation::Readlink,
            opcode::SYMLINK => Operation::Symlink {
                name: body.name()?,
                target: body.target()?,
            },
            opcode::MKNOD => Operation::Mknod {
                input: body.structure()?,
                name: body.name()?,
            },
            opcode::MKDIR => Operation::Mkdir {
                input: body.structure()?,
                name: body.name()?,
            },
            opcode::UNLINK => Operation::Unlink { name: body.name()? },
            opcode::RMDIR => Operation::Rmdir { name: body.name()? },
            opcode::RENAME => {
                let input: abi::RenameIn = body.structure()?;
                Operation::Rename(body.rename(input.newdir, 0)?)
            }
            opcode::RENAME2 => {
                let input: abi::Rename2In = body.structure()?;
                Operation::Rename(body.rename(input.newdir, input.flags)?)
            }
            opcode::LINK => Operation::Link {
                oldnodeid: body.structure::<abi::LinkIn>()?.oldnodeid,
                name: body.name()?,
            },
            opcode::OPEN => Operation::Open(body.structure()?),
            opcode::CREATE => Operation::Create {
                input: body.structure()?,
                name: body.name()?,
            },
            opcode::TMPFILE => {
                let input = body.structure()?;
                // Linux sends `/` as the name of what has none.
                body.c_str()?;
                Operation::Tmpfile(input)
            }
            opcode::READ => Operation::Read(body.structure()?),
            opcode::WRITE => Operation::Write(body.structure()?),
            opcode::STATFS => Operation::Statfs,
            opcode::RELEASE => Operation::Release {
                fh: body.structure::<abi::ReleaseIn>()?.fh,
            },
            opcode::FSYNC => Operation::Fsync(body.structure()?),
            opcode::SETXATTR => {
                let input: abi::SetxattrIn = body.structure()?;
                let name = body.attribute_name()?;
                let size = input.size as usize;
                if size > LARGEST_ATTRIBUTE {
                    return Err(Errno::TOOBIG);
                }
                let value = body.bytes(size)?;
                Operation::Setxattr { input, name, value }
            }
            opcode::GETXATTR => Operation::Getxattr {
                size: body.structure::<abi::GetxattrIn>()?.size,
                name: body.attribute_name()?,
            },
            opcode::LISTXATTR => Operation::Listxattr {
                size: body.structure::<abi::GetxattrIn>()?.size,
            },
            opcode::REMOVEXATTR => Operation::Removexattr {
                name: body.attribute_name()?,
            },
            opcode::INIT => Operation::Init(body.structure()?),
            opcode::OPENDIR => {
                body.structure::<abi::OpenIn>()?;
                Operation::Opendir
            }
            opcode::READDIR | opcode::READDIRPLUS => Operation::Readdir {
                input: body.structure()?,
                plus: opcode == opcode::READDIRPLUS,
            },
            opcode::RELEASEDIR => Operation::Releasedir {
                fh: body.structure::<abi::ReleaseIn>()?.fh,
            },
            opcode::FSYNCDIR => Operation::Fsyncdir(body.structure()?),
            opcode::INTERRUPT => {
                body.bytes(size_of::<u64>())?;
                Operation::Interrupt
            }
            opcode::DESTROY => Operation::Destroy,
            opcode::FALLOCATE => Operation::Fallocate(body.structure()?),
            opcode::LSEEK => Operation::Lseek(body.structure()?),
            opcode::COPY_FILE_RANGE => Operation::CopyFileRange(body.structure()?),
            opcode::SYNCFS => {
                body.structure::<abi::SyncfsIn>()?;
                Operation::Syncfs
            }
            // Linux does not ask again for what gets this answer. FLUSH: nothing is to be done when a descriptor is
            // closed. STATX: it is asked whenever a program might want the time of birth, as Node and Rust programs do
            // with each file; without it they are content with what is cached.
            _ => return Err(Errno::NOSYS),
        };
        if body.0.is_empty() {
            Ok(operation)
        } else {
            Err(Errno::INVAL)
        }
    }

    /// How large the reply is where its size is fixed. An operation is not started when its reply has no room.
    pub(super) fn reply_size(&self) -> usize {
        match self {
            Operation::Lookup { .. }
            | Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Link { .. } => size_of::<abi::EntryOut>(),
            Operation::Create { .. } | Operation::Tmpfile(_) => {
                size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>()
            }
            Operation::Getattr(_) | Operation::Setattr(_) => size_of::<abi::AttrOut>(),
            Operation::Open(_) | Operation::Opendir => size_of::<abi::OpenOut>(),
            Operation::Write(_) | Operation::CopyFileRange(_) => size_of::<abi::WriteOut>(),
            Operation::Statfs => size_of::<abi::Kstatfs>(),
            Operation::Getxattr { size: 0, .. } | Operation::Listxattr { size: 0 } => {
                size_of::<abi::GetxattrOut>()
            }
            Operation::Init(_) => size_of::<abi::InitOut>(),
            Operation::Lseek(_) => size_of::<abi::LseekOut>(),
            _ => 0,
        }
    }
}

/// The nodes of a BATCH_FORGET.
pub(super) fn forgotten(nodes: &[u8]) -> impl Iterator<Item = abi::ForgetOne> {
    nodes.chunks_exact(size_of::<abi::ForgetOne>()).map(|node| {
        let mut one = abi::ForgetOne::default();
        one.as_mut_slice().copy_from_slice(node);
        one
    })
}

/// What is left of a request.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn structure<T: ByteValued + Default>(&mut self) -> Result<T, Errno> {
        let mut value = T::default();
        let bytes = self.bytes(size_of::<T>())?;
        value.as_mut_slice().copy_from_slice(bytes);
        Ok(value)
    }

    fn c_str(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.bytes(text.count_bytes() + 1)?;
        Ok(text)
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.c_str()?)
    }

    fn attribute_name(&mut self) -> Result<AttributeName<'a>, Errno> {
        AttributeName::new(self.c_str()?)
    }

    fn target(&mut self) -> Result<&'a CStr, Errno> {
        let target = self.c_str()?;
        match target.count_bytes() {
            0 => Err(Errno::NOENT),
            length if length >= LONGEST_TARGET => Err(Errno::NAMETOOLONG),
            _ => Ok(target),
        }
    }

    fn rename(&mut self, newdir: u64, flags: u32) -> Result<Rename<'a>, Errno> {
        Ok(Rename {
            name: self.name()?,
            newdir,
            newname: self.name()?,
            flags,
        })
    }
}
