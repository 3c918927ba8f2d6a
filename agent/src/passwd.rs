// SPDX-License-Identifier: Apache-2.0
//! The home directory of a user, from the image's own `/etc/passwd`, which is not to be trusted.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

/// Larger files are read only so far.
const MAX_SIZE: u64 = 1 << 20;

/// To be called with the container's root as root. Whatever is wrong with the file: no home.
pub(crate) fn home(uid: u32) -> Option<String> {
    // A fifo or a terminal there must not hold the container up.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file: OwnedFd = openat(CWD, "/etc/passwd", flags, Mode::empty()).ok()?;
    let found = fstat(&file).ok()?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return None;
    }
    let size = found.st_size.cast_unsigned().min(MAX_SIZE);
    let mut text = Vec::with_capacity(usize::try_from(size).ok()? + 1);
    File::from(file)
        .take(MAX_SIZE)
        .read_to_end(&mut text)
        .ok()?;
    home_in(&String::from_utf8_lossy(&text), uid)
}

/// passwd(5): name, password, uid, gid, comment, directory, shell.
fn home_in(text: &str, uid: u32) -> Option<String> {
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).is_some_and(|field| field.parse() == Ok(uid)))
        .and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
        .filter(|home| !home.is_empty() && !home.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes() {
        let text =
            "root:x:0:0:root:/root:/bin/sh\nbroken\n#c:x:7\nu:x:1000:1000::/home/u\ne:x:5:5:::\n";
        for (uid, expected) in [
            (0, Some("/root")),
            (1000, Some("/home/u")),
            (5, None),
            (7, None),
            (42, None),
        ] {
            assert_eq!(home_in(text, uid).as_deref(), expected, "{uid}");
        }
        assert_eq!(home_in("\u{fffd}:::::", 0), None);
    }
}
