// SPDX-License-Identifier: Apache-2.0
//! As whom a thread of the file server acts.
//!
//! The guest's kernel has checked permissions (virtio-fs always mounts with `default_permissions`), supplementary
//! groups included, so the host must not check them again with less knowledge: a thread acts with file system uid and
//! gid 0 and whatever capabilities the process has. Only what creates something borrows the uid and gid of the request,
//! for the ownership of the new file, and keeps the capabilities meanwhile.

use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

/// The credentials of the calling thread, and its umask and working directory, which it shares with no other.
#[derive(Debug)]
pub(super) struct Credentials {
    capabilities: CapabilitySets,
    /// Without CAP_SETUID and CAP_SETGID (a user's own sandbox) everything belongs to who runs it.
    can_switch: bool,
    umask: u32,
    /// They belong to one thread.
    not_send: PhantomData<*const ()>,
}

impl Credentials {
    /// Takes over the calling thread: its umask becomes 0, its working directory `working_directory`.
    pub(super) fn of_this_thread(working_directory: BorrowedFd<'_>) -> io::Result<Credentials> {
        // SAFETY: CLONE_FS only makes umask, root and working directory the thread's own. No code of this process
        // relies on changing those of another thread.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::process::fchdir(working_directory)?;
        rustix::process::umask(Mode::empty());
        let before = rustix::thread::capabilities(None)?;
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
        let can_switch = before.effective.contains(needed) && set_filesystem_ids(0, 0);
        if can_switch {
            // Leaving a root uid drops capabilities, entering one raises them: put back what there was.
            rustix::thread::set_capabilities(None, before)?;
        }
        Ok(Credentials {
            capabilities: before,
            can_switch,
            umask: 0,
            not_send: PhantomData,
        })
    }

    /// Runs `create` as `uid` and `gid` with `umask`.
    pub(super) fn create_as<T>(
        &mut self,
        owner: (u32, u32),
        umask: u32,
        create: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (uid, gid) = owner;
        // (uid_t) -1: the guest's kernel could not express the id in the mount. It would also mean "no change" below.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::OVERFLOW);
        }
        if umask & 0o777 != self.umask {
            self.umask = umask & 0o777;
            rustix::process::umask(Mode::from_raw_mode(self.umask));
        }
        if !self.can_switch || owner == (0, 0) {
            return create();
        }
        if !set_filesystem_ids(uid, gid) {
            // Not mapped in the user namespace of this process: a user's own sandbox has one id, which is 0 there.
            set_filesystem_ids(0, 0);
        }
        let result =
            rustix::thread::set_capabilities(None, self.capabilities).and_then(|()| create());
        set_filesystem_ids(0, 0);
        // Cannot fail: nothing is raised that is not permitted.
        let _ = rustix::thread::set_capabilities(None, self.capabilities);
        result
    }

    /// Runs `write` without CAP_FSETID, so that the host's kernel drops set-user-ID, set-group-ID and file capabilities
    /// as it does for a writer who is not root.
    pub(super) fn drop_privileges_of_file<T>(
        &mut self,
        write: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut without = self.capabilities;
        without.effective.remove(CapabilitySet::FSETID);
        if without == self.capabilities {
            return write();
        }
        rustix::thread::set_capabilities(None, without)?;
        let result = write();
        // Cannot fail: FSETID is permitted.
        let _ = rustix::thread::set_capabilities(None, self.capabilities);
        result
    }
}

/// Sets the file system uid and gid of the calling thread; says whether both took.
fn set_filesystem_ids(uid: u32, gid: u32) -> bool {
    // SAFETY: these calls take and return integers and change nothing but credentials of the calling thread (glibc does
    // not pass them on to other threads). An id of -1 changes nothing: the call then returns the current id.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        libc::setfsgid(u32::MAX).cast_unsigned() == gid
            && libc::setfsuid(u32::MAX).cast_unsigned() == uid
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn ownership_follows_the_request_and_capabilities_stay() {
        let directory = super::super::test_support::Scratch::new();
        let path = directory.path().to_owned();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).expect("chmod");
        let root = std::fs::File::open(&path).expect("open");
        let mut credentials = Credentials::of_this_thread(root.as_fd()).expect("credentials");
        if !credentials.can_switch {
            return;
        }
        let before = rustix::thread::capabilities(None).expect("capabilities");
        let create = |name: &str| {
            let file = path.join(name);
            move || std::fs::write(&file, b"x").map_err(|_| Errno::IO)
        };
        // In a directory of root that nobody else may enter.
        credentials
            .create_as((1234, 5678), 0o027, create("theirs"))
            .expect("create");
        credentials
            .create_as((0, 0), 0o077, create("roots"))
            .expect("create");
        let metadata = |name: &str| std::fs::metadata(path.join(name)).expect("metadata");
        let theirs = metadata("theirs");
        assert_eq!((theirs.uid(), theirs.gid()), (1234, 5678));
        assert_eq!(theirs.mode() & 0o777, 0o640);
        let roots = metadata("roots");
        assert_eq!((roots.uid(), roots.gid()), (0, 0));
        assert_eq!(roots.mode() & 0o777, 0o600);
        assert_eq!(
            credentials.create_as((u32::MAX, 0), 0, || Ok(())),
            Err(Errno::OVERFLOW)
        );
        let after = rustix::thread::capabilities(None).expect("capabilities");
        assert_eq!(before, after);
    }
}
