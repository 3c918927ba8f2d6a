// SPDX-License-Identifier: Apache-2.0
//! Terminals on the host: the pair whose slave the monitor bridges to the guest, the socket that
//! its master is sent to, and the copying between it and the caller's own terminal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use agent_protocol::WindowSize;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    OptionalActions, Termios, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

use crate::{channel, stdio};

/// Bytes on their way in one direction.
const BUFFER: usize = 16 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open a pseudo-terminal")]
    Open(#[source] io::Error),
    #[error("connect to console socket {0}")]
    Connect(PathBuf, #[source] io::Error),
    #[error("send the terminal to console socket {0}")]
    Send(PathBuf, #[source] io::Error),
    #[error("terminal settings")]
    Settings(#[source] io::Error),
    #[error("copy to and from the terminal")]
    Copy(#[source] io::Error),
}

/// A pseudo-terminal on the host. It only carries bytes: the line discipline that matters is that
/// of the guest's terminal, so the slave is raw. It is non-blocking for the monitor's loop.
#[derive(Debug)]
pub struct Pty {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

impl Pty {
    pub fn open(size: WindowSize) -> Result<Pty, Error> {
        Self::open_raw(size).map_err(|error| Error::Open(error.into()))
    }

    fn open_raw(size: WindowSize) -> rustix::io::Result<Pty> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut settings = tcgetattr(&slave)?;
        settings.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &settings)?;
        if size != WindowSize::default() {
            set_size(master.as_fd(), size)?;
        }
        set_nonblocking(slave.as_fd())?;
        Ok(Pty { master, slave })
    }

    /// Sends the master to whoever listens on a console socket, in one message as runc does.
    pub fn send_master(&self, socket: &Path) -> Result<(), Error> {
        let stream = UnixStream::connect(socket)
            .map_err(|error| Error::Connect(socket.to_owned(), error))?;
        channel::send_once(stream.as_fd(), b"/dev/ptmx", &[self.master.as_fd()])
            .map_err(|error| Error::Send(socket.to_owned(), error.into()))?;
        Ok(())
    }
}

pub fn size(terminal: BorrowedFd<'_>) -> rustix::io::Result<WindowSize> {
    let size = tcgetwinsize(terminal)?;
    Ok(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

fn set_size(terminal: BorrowedFd<'_>, size: WindowSize) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size)
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
    fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)
}

/// The size of the caller's own terminal, if it has one.
pub fn own_size() -> Option<WindowSize> {
    let stdin = rustix::stdio::stdin();
    let stdout = rustix::stdio::stdout();
    [stdin, stdout].into_iter().find_map(|fd| size(fd).ok())
}

/// The caller's terminal in raw mode, until dropped.
#[derive(Debug)]
struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// None: the descriptor is not a terminal.
    fn enter(fd: BorrowedFd<'_>) -> Result<Option<RawMode>, Error> {
        if !isatty(fd) {
            return Ok(None);
        }
        let settings = |error: Errno| Error::Settings(error.into());
        let terminal = stdio::duplicate(fd).map_err(Error::Settings)?;
        let before = tcgetattr(&terminal).map_err(settings)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw).map_err(settings)?;
        Ok(Some(RawMode { terminal, before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that has gone.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// Bytes read and not yet written.
#[derive(Debug)]
struct Pipeline {
    bytes: Box<[u8; BUFFER]>,
    start: usize,
    end: usize,
    /// Nothing more comes in.
    ended: bool,
}

impl Pipeline {
    fn new() -> Self {
        Pipeline {
            bytes: Box::new([0; BUFFER]),
            start: 0,
            end: 0,
            ended: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn read(&mut self, from: BorrowedFd<'_>) -> io::Result<()> {
        match rustix::io::read(from, &mut self.bytes[..]) {
            // A master whose slaves are all closed says EIO.
            Ok(0) | Err(Errno::IO) => self.ended = true,
            Ok(count) => (self.start, self.end) = (0, count),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn write(&mut self, to: BorrowedFd<'_>) -> io::Result<()> {
        match rustix::io::write(to, &self.bytes[self.start..self.end]) {
            Ok(count) => self.start += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Nobody reads any more: the rest of the output has no place to go.
            Err(Errno::PIPE | Errno::IO) => self.start = self.end,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// Copies between the caller's terminal and the master of a container's.
#[derive(Debug)]
pub struct Relay {
    master: OwnedFd,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    inward: Pipeline,
    outward: Pipeline,
    _raw: Option<RawMode>,
}

impl Relay {
    /// Takes the caller's stdin and stdout into use.
    pub fn start(master: OwnedFd) -> Result<Relay, Error> {
        set_nonblocking(master.as_fd()).map_err(|error| Error::Settings(error.into()))?;
        let input = stdio::stream(rustix::stdio::stdin()).map_err(Error::Settings)?;
        let output = stdio::stream(rustix::stdio::stdout()).map_err(Error::Settings)?;
        let relay = Relay {
            master,
            input,
            output,
            inward: Pipeline::new(),
            outward: Pipeline::new(),
            _raw: RawMode::enter(rustix::stdio::stdin())?,
        };
        relay.resize();
        Ok(relay)
    }

    /// Gives the container's terminal the size of the caller's.
    pub fn resize(&self) {
        if let Some(size) = own_size() {
            // A master that is gone shows when it is read.
            let _ = set_size(self.master.as_fd(), size);
        }
    }

    /// Whether the container's side has closed the terminal and all its output is written.
    pub fn finished(&self) -> bool {
        self.outward.ended && self.outward.is_empty()
    }

    /// What to wait for: up to three descriptors, to be given back to [`advance`](Self::advance).
    pub fn interest(&self) -> Vec<PollFd<'_>> {
        let mut interest = Vec::with_capacity(3);
        let mut master = PollFlags::empty();
        if self.outward.is_empty() && !self.outward.ended {
            master |= PollFlags::IN;
        }
        if !self.inward.is_empty() {
            master |= PollFlags::OUT;
        }
        // A hung-up master would wake the loop again and again without anything to do.
        if !master.is_empty() {
            interest.push(PollFd::new(&self.master, master));
        }
        if let Some(input) = &self.input
            && self.inward.is_empty()
            && !self.inward.ended
        {
            interest.push(PollFd::new(input, PollFlags::IN));
        }
        if let Some(output) = &self.output
            && !self.outward.is_empty()
        {
            interest.push(PollFd::new(output, PollFlags::OUT));
        }
        interest
    }

    /// Moves what can be moved now. `ready` tells for a descriptor whether waiting for it ended.
    pub fn advance(&mut self, ready: &Ready) -> Result<(), Error> {
        self.copy(ready).map_err(Error::Copy)
    }

    fn copy(&mut self, ready: &Ready) -> io::Result<()> {
        let master = self.master.as_fd();
        if self.outward.is_empty() && !self.outward.ended && ready.has(master) {
            self.outward.read(master)?;
        }
        if !self.outward.is_empty() {
            match &self.output {
                None => self.outward.start = self.outward.end,
                Some(output) if ready.has(output.as_fd()) => self.outward.write(output.as_fd())?,
                Some(_) => {}
            }
        }
        if let Some(input) = &self.input
            && self.inward.is_empty()
            && !self.inward.ended
            && ready.has(input.as_fd())
        {
            self.inward.read(input.as_fd())?;
        }
        if !self.inward.is_empty() && ready.has(master) {
            self.inward.write(master)?;
        }
        Ok(())
    }
}

/// The descriptors that a poll found ready.
#[derive(Debug, Default)]
pub struct Ready(Vec<i32>);

impl Ready {
    pub fn of(polled: &[PollFd<'_>]) -> Ready {
        use std::os::fd::AsRawFd;
        let ready = polled.iter().filter(|fd| !fd.revents().is_empty());
        Ready(ready.map(|fd| fd.as_fd().as_raw_fd()).collect())
    }

    pub fn has(&self, fd: BorrowedFd<'_>) -> bool {
        use std::os::fd::AsRawFd;
        self.0.contains(&fd.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::event::poll;

    use super::*;
    use crate::channel::Channel;

    const SIZE: WindowSize = WindowSize {
        rows: 33,
        columns: 77,
    };

    #[test]
    fn a_pty_is_raw_and_has_its_size() {
        let pty = Pty::open(SIZE).unwrap();
        assert_eq!(size(pty.slave.as_fd()).unwrap(), SIZE);
        rustix::io::write(&pty.master, b"a\x03\n").unwrap();
        let mut buffer = [0; 16];
        let count = rustix::io::read(&pty.slave, &mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"a\x03\n");
        rustix::io::write(&pty.slave, b"b\n").unwrap();
        let count = rustix::io::read(&pty.master, &mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"b\n", "no echo, no carriage return");
    }

    #[test]
    fn the_master_goes_to_the_console_socket() {
        let path = std::env::temp_dir().join(format!("sandbox-console-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let pty = Pty::open(SIZE).unwrap();
        let result = pty.send_master(&path);
        std::fs::remove_file(&path).unwrap();
        result.unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut channel = Channel::new(stream.into());
        assert!(channel.fill().unwrap());
        let master = channel.take_fds(1).unwrap();
        assert_eq!(size(master[0].as_fd()).unwrap(), SIZE);
    }

    #[test]
    fn a_missing_console_socket_is_named() {
        let pty = Pty::open(SIZE).unwrap();
        let error = pty
            .send_master(Path::new("/nonexistent/socket"))
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/socket"));
    }

    /// A relay between pipes instead of the test's own terminal.
    fn relay(master: OwnedFd) -> (Relay, io::PipeWriter, io::PipeReader) {
        let (input, typed) = io::pipe().unwrap();
        let (shown, output) = io::pipe().unwrap();
        set_nonblocking(master.as_fd()).unwrap();
        let relay = Relay {
            master,
            input: Some(input.into()),
            output: Some(output.into()),
            inward: Pipeline::new(),
            outward: Pipeline::new(),
            _raw: None,
        };
        (relay, typed, shown)
    }

    fn turn(relay: &mut Relay) {
        let mut interest = relay.interest();
        poll(
            &mut interest,
            channel::remaining(Some(std::time::Instant::now())).as_ref(),
        )
        .unwrap();
        let ready = Ready::of(&interest);
        relay.advance(&ready).unwrap();
    }

    #[test]
    fn a_relay_copies_both_ways_and_ends_with_the_slave() {
        use std::io::{Read, Write};
        let Pty { master, slave } = Pty::open(SIZE).unwrap();
        let (mut relay, mut typed, mut shown) = relay(master);
        typed.write_all(b"in").unwrap();
        rustix::io::write(&slave, b"out").unwrap();
        for _ in 0..4 {
            turn(&mut relay);
        }
        let mut buffer = [0; 8];
        assert_eq!(rustix::io::read(&slave, &mut buffer), Ok(2));
        assert_eq!(shown.read(&mut buffer).unwrap(), 3);
        assert!(!relay.finished());
        drop(slave);
        turn(&mut relay);
        assert!(relay.finished());
        assert!(
            relay
                .interest()
                .iter()
                .all(|fd| fd.as_fd().as_raw_fd() != relay.master.as_fd().as_raw_fd()),
            "a finished master is not waited for"
        );
    }

    use std::os::fd::AsRawFd;
}
