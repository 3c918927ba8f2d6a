// SPDX-License-Identifier: Apache-2.0
//! The FUSE protocol, version 7.41, as Linux defines it in `include/uapi/linux/fuse.h`: names and layouts are those
//! of that header (without its `fuse_` prefix), and only what this server understands is here.

use vm_memory::ByteValued;

pub(super) const KERNEL_VERSION: u32 = 7;
pub(super) const KERNEL_MINOR_VERSION: u32 = 41;
/// The oldest driver that is served. It has all layouts below; 7.36 brought FUSE_INIT_EXT.
pub(super) const OLDEST_MINOR_VERSION: u32 = 36;

pub(super) const ROOT_ID: u64 = 1;

pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
}

/// Flags of FUSE_INIT; the upper half travels in `flags2`.
pub(super) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const ALLOW_IDMAP: u64 = 1 << 40;
}

/// `valid` of SETATTR.
pub(super) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// GETATTR: `fh` is valid.
pub(super) const GETATTR_FH: u32 = 1 << 0;
/// OPEN and CREATE.
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub(super) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
pub(super) const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// WRITE: from the page cache, so not at the position of an append.
pub(super) const WRITE_CACHE: u32 = 1 << 0;
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FSYNC and FSYNCDIR: data only.
pub(super) const FSYNC_FDATASYNC: u32 = 1 << 0;
/// SETXATTR of an access ACL by someone without CAP_FSETID.
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

/// Declares structures of the protocol: plain C layout without padding.
macro_rules! wire {
    ($($(#[$meta:meta])* struct $name:ident = $size:literal { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default)]
        pub(super) struct $name { $(pub(super) $field: $type),* }

        // No padding: the sizes of the fields add up to the size of the whole.
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$type>())* == $size);

        // SAFETY: `repr(C)`, every field is an integer, an array of integers or a structure of this macro, and the
        // assertion above rules out padding. So any bytes are a valid value and every byte of a value is initialized.
        unsafe impl ByteValued for $name {}
    )*};
}

wire! {
    struct InHeader = 40 {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }

    struct OutHeader = 16 {
        len: u32,
        error: i32,
        unique: u64,
    }

    struct Attr = 88 {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }

    struct EntryOut = 128 {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }

    struct ForgetIn = 8 {
        nlookup: u64,
    }

    struct ForgetOne = 16 {
        nodeid: u64,
        nlookup: u64,
    }

    struct BatchForgetIn = 8 {
        count: u32,
        dummy: u32,
    }

    struct GetattrIn = 16 {
        getattr_flags: u32,
        dummy: u32,
        fh: u64,
    }

    struct AttrOut = 104 {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }

    struct MknodIn = 16 {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }

    struct MkdirIn = 8 {
        mode: u32,
        umask: u32,
    }

    struct RenameIn = 8 {
        newdir: u64,
    }

    struct Rename2In = 16 {
        newdir: u64,
        flags: u32,
        padding: u32,
    }

    struct LinkIn = 8 {
        oldnodeid: u64,
    }

    struct SetattrIn = 88 {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }

    struct OpenIn = 8 {
        flags: u32,
        open_flags: u32,
    }

    struct CreateIn = 16 {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }

    struct OpenOut = 16 {
        fh: u64,
        open_flags: u32,
        backing_id: i32,
    }

    struct ReleaseIn = 24 {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }

    /// READ, READDIR and READDIRPLUS.
    struct ReadIn = 40 {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    struct WriteIn = 40 {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    /// WRITE and COPY_FILE_RANGE.
    struct WriteOut = 8 {
        size: u32,
        padding: u32,
    }

    struct Kstatfs = 80 {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }

    struct FsyncIn = 16 {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }

    /// With FUSE_SETXATTR_EXT.
    struct SetxattrIn = 16 {
        size: u32,
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }

    /// GETXATTR and LISTXATTR.
    struct GetxattrIn = 8 {
        size: u32,
        padding: u32,
    }

    struct GetxattrOut = 8 {
        size: u32,
        padding: u32,
    }

    /// With FUSE_INIT_EXT.
    struct InitIn = 64 {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }

    struct InitOut = 64 {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        unused: [u32; 6],
    }

    struct FallocateIn = 32 {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }

    struct LseekIn = 24 {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }

    struct LseekOut = 8 {
        offset: u64,
    }

    struct CopyFileRangeIn = 56 {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }

    struct SyncfsIn = 8 {
        padding: u64,
    }

    /// Followed by the name and zeroes up to a multiple of [`DIRENT_ALIGN`].
    struct Dirent = 24 {
        ino: u64,
        off: u64,
        namelen: u32,
        kind: u32,
    }
}

pub(super) const DIRENT_ALIGN: usize = 8;
