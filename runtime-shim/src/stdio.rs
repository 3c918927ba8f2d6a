// SPDX-License-Identifier: Apache-2.0
//! The file descriptors that a verb was started with, made fit for the monitor's event loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, major, minor, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

/// One of the streams of a process. None: `/dev/null`, nothing to copy.
pub type Stream = Option<OwnedFd>;

/// What a descriptor is, as far as copying from and to it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Closed, or `/dev/null`: the guest has one of its own.
    Nothing,
    /// A pipe or terminal: others hold the same open file description, so it must not be made
    /// non-blocking; opening it again gives a description of our own.
    Reopen,
    /// A socket, a regular file, or something stranger: passed as it is.
    Keep,
}

/// Takes a copy of a stream that can be used without disturbing those who share it.
pub fn stream(fd: BorrowedFd<'_>) -> io::Result<Stream> {
    match classify(fd)? {
        Kind::Nothing => Ok(None),
        Kind::Reopen => reopen(fd).map(Some),
        Kind::Keep => duplicate(fd).map(Some),
    }
}

pub fn classify(fd: BorrowedFd<'_>) -> io::Result<Kind> {
    let stat = match fstat(fd) {
        Ok(stat) => stat,
        Err(Errno::BADF) => return Ok(Kind::Nothing),
        Err(error) => return Err(error.into()),
    };
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice if is_null(stat.st_rdev) => Kind::Nothing,
        FileType::CharacterDevice | FileType::Fifo => Kind::Reopen,
        _ => Kind::Keep,
    })
}

fn is_null(device: u64) -> bool {
    (major(device), minor(device)) == (1, 3)
}

/// Opens a pipe or terminal again, non-blocking, with the same access. Where that is not possible (a
/// FIFO without a reader, a terminal of another user) the descriptor itself has to do.
pub fn reopen(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let access = fcntl_getfl(fd)? & OFlags::ACCMODE;
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match open(self_fd(fd), flags, Mode::empty()) {
        Ok(own) => Ok(own),
        Err(_) => duplicate(fd),
    }
}

pub fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // Above the standard streams, which are replaced later.
    Ok(fcntl_dupfd_cloexec(fd, 3)?)
}

/// Lets go of the caller's streams, so that nobody waits for them to be closed on our account.
pub fn detach() -> io::Result<()> {
    let null = null()?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

pub fn null() -> io::Result<OwnedFd> {
    Ok(open(
        "/dev/null",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// The path by which this process reaches one of its own descriptors.
pub fn self_fd(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_are_classified() {
        let (reader, writer) = io::pipe().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let zero = File::open("/dev/zero").unwrap();
        let file = File::open("/proc/self/status").unwrap();
        let kind = |fd: BorrowedFd<'_>| classify(fd).unwrap();
        assert_eq!(kind(reader.as_fd()), Kind::Reopen);
        assert_eq!(kind(writer.as_fd()), Kind::Reopen);
        assert_eq!(kind(zero.as_fd()), Kind::Reopen);
        assert_eq!(kind(null.as_fd()), Kind::Nothing);
        assert_eq!(kind(socket.as_fd()), Kind::Keep);
        assert_eq!(kind(file.as_fd()), Kind::Keep);
    }

    #[test]
    fn a_pipe_is_opened_again_and_its_sharers_stay_blocking() {
        let (reader, mut writer) = io::pipe().unwrap();
        let own = stream(reader.as_fd()).unwrap().unwrap();
        let flags = |fd: BorrowedFd<'_>| fcntl_getfl(fd).unwrap();
        assert!(flags(own.as_fd()).contains(OFlags::NONBLOCK));
        assert!(!flags(reader.as_fd()).contains(OFlags::NONBLOCK));
        let mut buffer = [0; 8];
        assert_eq!(rustix::io::read(&own, &mut buffer), Err(Errno::AGAIN));
        writer.write_all(b"x").unwrap();
        assert_eq!(rustix::io::read(&own, &mut buffer), Ok(1));
    }

    #[test]
    fn a_fifo_without_a_reader_is_passed_on_as_it_is() {
        use rustix::fs::{CWD, mknodat};
        let path = std::env::temp_dir().join(format!("sandbox-fifo-{}", std::process::id()));
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let reader = open(&path, OFlags::RDWR, Mode::empty()).unwrap();
        let writer = open(&path, OFlags::WRONLY, Mode::empty()).unwrap();
        drop(reader);
        std::fs::remove_file(&path).unwrap();
        let own = stream(writer.as_fd()).unwrap().unwrap();
        assert!(!fcntl_getfl(&own).unwrap().contains(OFlags::NONBLOCK));
    }
}
