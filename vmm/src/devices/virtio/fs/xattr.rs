// SPDX-License-Identifier: Apache-2.0
//! Extended attributes. The working directory of the thread is `/proc/self/fd` ([`Credentials`] sees to it), which is
//! where the paths of these system calls start.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::path::DecInt;

use super::abi;
use super::credentials::Credentials;
use super::inodes::NodeId;
use super::name::AttributeName;
use super::passthrough::Passthrough;

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
const LARGEST: usize = 65536;

/// XATTR_NAME_MAX of Linux.
const NAME_MAX: usize = 255;
/// Attributes that are ours on the host.
const OURS: &[u8] = b"user.sandbox.";
const TRUSTED: &[u8] = b"trusted.";

/// What the guest gets: the value, or only its size when it asked with size 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Attribute {
    Size(u32),
    Value(Vec<u8>),
}

impl Attribute {
    fn new(value: Vec<u8>, size: u32) -> Result<Attribute, Errno> {
        if size == 0 {
            let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
            Ok(Attribute::Size(size))
        } else if value.len() > size as usize {
            Err(Errno::RANGE)
        } else {
            Ok(Attribute::Value(value))
        }
    }
}

impl Passthrough {
    pub(super) fn getxattr(
        &self,
        _here: &Credentials,
        node: NodeId,
        name: AttributeName<'_>,
        size: u32,
    ) -> Result<Attribute, Errno> {
        let name = name.as_c_str();
        if self.is_hidden(node, name)? {
            return Err(Errno::NODATA);
        }
        let kept = on_host(name)?;
        let path = self.inodes.path(node)?;
        let path = DecInt::from_fd(path.as_fd());
        if size == 0 {
            let size =
                rustix::fs::getxattr_query(path, &*kept).map_err(|error| absent(name, error))?;
            let size = u32::try_from(size).map_err(|_| Errno::TOOBIG)?;
            return Ok(Attribute::Size(size));
        }
        let mut value = vec![0; LARGEST.min(size as usize)];
        let length = rustix::fs::getxattr(path, &*kept, &mut value[..])
            .map_err(|error| absent(name, error))?;
        value.truncate(length);
        Attribute::new(value, size)
    }

    pub(super) fn listxattr(
        &self,
        _here: &Credentials,
        node: NodeId,
        size: u32,
    ) -> Result<Attribute, Errno> {
        let path = self.inodes.path(node)?;
        let mut list = vec![0; LARGEST];
        let length = rustix::fs::listxattr(DecInt::from_fd(path.as_fd()), &mut list[..])?;
        list.truncate(length);
        let inert = self.inodes.nature(node)?.inert.is_some();
        let shown: Vec<u8> = list
            .split_inclusive(|byte| *byte == 0)
            .filter_map(|name| match name.strip_prefix(OURS) {
                Some(own) => own.starts_with(TRUSTED).then_some(own),
                None => (!(inert && name.starts_with(b"user."))).then_some(name),
            })
            .flatten()
            .copied()
            .collect();
        Attribute::new(shown, size)
    }

    pub(super) fn setxattr(
        &self,
        credentials: &mut Credentials,
        node: NodeId,
        input: &abi::SetxattrIn,
        name: AttributeName<'_>,
        value: &[u8],
    ) -> Result<(), Errno> {
        let name = name.as_c_str();
        if self.is_hidden(node, name)? {
            return Err(Errno::PERM);
        }
        let kept = on_host(name)?;
        let flags = XattrFlags::from_bits(input.flags).ok_or(Errno::INVAL)?;
        let path = self.inodes.path(node)?;
        let set = || rustix::fs::setxattr(DecInt::from_fd(path.as_fd()), &*kept, value, flags);
        if input.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0 {
            credentials.drop_privileges_of_file(set)
        } else {
            set()
        }
    }

    pub(super) fn removexattr(
        &self,
        _here: &Credentials,
        node: NodeId,
        name: AttributeName<'_>,
    ) -> Result<(), Errno> {
        let name = name.as_c_str();
        if self.is_hidden(node, name)? {
            return Err(Errno::PERM);
        }
        let kept = on_host(name)?;
        let path = self.inodes.path(node)?;
        rustix::fs::removexattr(DecInt::from_fd(path.as_fd()), &*kept)
    }

    /// Whether the guest must not get at an attribute: our own, and because inert devices are devices to it and not
    /// regular files, their `user.` ones.
    fn is_hidden(&self, node: NodeId, name: &CStr) -> Result<bool, Errno> {
        let inert = self.inodes.nature(node)?.inert.is_some();
        let name = name.to_bytes();
        Ok(name.starts_with(OURS) || inert && name.starts_with(b"user."))
    }
}

/// What a guest's attribute is called on the host. `trusted.` ones, which overlay file systems in the guest live on,
/// would take a privilege that the monitor does not have, and would mean something to the host: they are kept as
/// `user.sandbox.trusted.` ones. The guest's kernel has checked that the asker may see them.
fn on_host(name: &CStr) -> Result<Cow<'_, CStr>, Errno> {
    let bytes = name.to_bytes();
    if !bytes.starts_with(TRUSTED) {
        return Ok(Cow::Borrowed(name));
    }
    if OURS.len() + bytes.len() > NAME_MAX {
        return Err(Errno::RANGE);
    }
    let name = CString::new([OURS, bytes].concat()).map_err(|_| Errno::INVAL)?;
    Ok(Cow::Owned(name))
}

/// The guest's kernel asks for ACLs when it checks permissions, and takes any error but "none" for a failed check. A
/// file system without ACLs has none.
fn absent(name: &CStr, error: Errno) -> Errno {
    let acl = name == c"system.posix_acl_access" || name == c"system.posix_acl_default";
    match error {
        Errno::OPNOTSUPP if acl => Errno::NODATA,
        error => error,
    }
}
