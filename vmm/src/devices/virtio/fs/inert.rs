// SPDX-License-Identifier: Apache-2.0
//! Device nodes that the guest makes. On the host each is an empty regular file that nothing can be opened through,
//! with type and number in an extended attribute; the guest is shown the device, and its own kernel opens that.
//!
//! The sticky bit marks such files, so that only empty regular files with it (there are hardly any others) cost a
//! look at their attributes. The guest cannot see or set the attribute, or it could turn a file of any user into a
//! device.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, XattrFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::self_fd;

pub(super) const ATTRIBUTE: &CStr = c"user.sandbox.node";

/// A character or block device, kept as a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inert {
    pub(super) file_type: FileType,
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Inert {
    /// The device that `name` in `directory`, whose attributes are `stat`, stands for.
    pub(super) fn look(
        directory: impl AsFd,
        name: &CStr,
        stat: &Statx,
    ) -> Result<Option<Inert>, Errno> {
        let sticky = u32::from(stat.stx_mode) & Mode::SVTX.as_raw_mode() != 0;
        if !sticky || stat.stx_size != 0 || self_fd::file_type(stat) != FileType::RegularFile {
            return Ok(None);
        }
        Inert::read(self_fd::pin(directory, name)?.as_fd())
    }

    /// The working directory is `/proc/self/fd`: that is where the path of the extended attribute calls starts.
    fn read(file: BorrowedFd<'_>) -> Result<Option<Inert>, Errno> {
        let mut value = [0; 32];
        match rustix::fs::getxattr(DecInt::from_fd(file), ATTRIBUTE, &mut value[..]) {
            Ok(length) => Ok(value.get(..length).and_then(Inert::parse)),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes `name` in `directory` such a file.
    pub(super) fn create(
        self,
        directory: impl AsFd + Copy,
        name: &CStr,
        mode: Mode,
    ) -> Result<(), Errno> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file: OwnedFd = rustix::fs::openat(directory, name, flags, mode)?;
        let finish = || {
            let value = self.format();
            rustix::fs::fsetxattr(&file, ATTRIBUTE, value.as_bytes(), XattrFlags::CREATE)?;
            // What umask or a default ACL has left of the mode.
            let mode = Mode::from_raw_mode(self_fd::stat(&file)?.stx_mode.into());
            rustix::fs::fchmod(&file, mode | Mode::SVTX)
        };
        finish().map_err(|error| {
            // Left behind it would be an ordinary empty file.
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
            match error {
                // The file system does not keep such attributes: then it cannot hold devices.
                Errno::OPNOTSUPP => Errno::PERM,
                error => error,
            }
        })
    }

    fn format(self) -> String {
        let letter = match self.file_type {
            FileType::BlockDevice => 'b',
            _ => 'c',
        };
        format!("{letter} {}:{}", self.major, self.minor)
    }

    fn parse(value: &[u8]) -> Option<Inert> {
        let value = std::str::from_utf8(value).ok()?;
        let (letter, number) = value.split_once(' ')?;
        let (major, minor) = number.split_once(':')?;
        Some(Inert {
            file_type: match letter {
                "b" => FileType::BlockDevice,
                "c" => FileType::CharacterDevice,
                _ => return None,
            },
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

/// How the kernel puts a device number into 32 bits (`new_encode_dev`).
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

pub(super) fn decode_device(device: u32) -> (u32, u32) {
    (
        (device & 0xf_ff00) >> 8,
        (device & 0xff) | ((device >> 12) & 0xf_ff00),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 300), (4095, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
            for file_type in [FileType::CharacterDevice, FileType::BlockDevice] {
                let device = Inert {
                    file_type,
                    major,
                    minor,
                };
                assert_eq!(Inert::parse(device.format().as_bytes()), Some(device));
            }
        }
        for bad in [
            &b""[..],
            b"c",
            b"c 1",
            b"d 1:3",
            b"c 1:x",
            b"c 1:99999999999",
            b"\xff",
        ] {
            assert_eq!(Inert::parse(bad), None);
        }
    }
}
