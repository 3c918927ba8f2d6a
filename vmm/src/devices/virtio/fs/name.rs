// SPDX-License-Identifier: Apache-2.0
//! Names that the guest gives.

use std::ffi::CStr;

use rustix::io::Errno;

/// NAME_MAX of Linux.
const LONGEST: usize = 255;
/// XATTR_NAME_MAX of Linux.
const LONGEST_ATTRIBUTE: usize = 255;

/// One component of a path: not empty, not `.` or `..`, no `/`, no NUL, at most 255 bytes. Whatever takes a name from
/// a request takes this type, so that no request can step out of the directory it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    pub(super) fn new(name: &'a CStr) -> Result<Name<'a>, Errno> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > LONGEST => Err(Errno::NAMETOOLONG),
            _ => Ok(Name(name)),
        }
    }

    pub(super) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// The name of an extended attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AttributeName<'a>(&'a CStr);

impl<'a> AttributeName<'a> {
    pub(super) fn new(name: &'a CStr) -> Result<AttributeName<'a>, Errno> {
        match name.to_bytes().len() {
            0 => Err(Errno::RANGE),
            length if length > LONGEST_ATTRIBUTE => Err(Errno::RANGE),
            _ => Ok(AttributeName(name)),
        }
    }

    pub(super) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_components_are_names() {
        for good in [c"a", c"...", c".x", c"a b", c"\xff\xfe", c"-"] {
            assert_eq!(Name::new(good).map(Name::as_c_str), Ok(good));
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"/abs", c"a/", c"../x"] {
            assert_eq!(Name::new(bad), Err(Errno::INVAL), "{bad:?}");
        }
        let mut long = vec![b'x'; 256];
        long.push(0);
        let long = CStr::from_bytes_with_nul(&long).expect("one NUL at the end");
        assert_eq!(Name::new(long), Err(Errno::NAMETOOLONG));
        assert_eq!(AttributeName::new(long), Err(Errno::RANGE));
        assert_eq!(AttributeName::new(c""), Err(Errno::RANGE));
    }
}
