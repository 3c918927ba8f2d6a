// SPDX-License-Identifier: Apache-2.0
//! What a verb and the monitor say to each other over the control socket in the state directory.
//!
//! A verb connects, sends one [`Request`] and gets one [`Reply`]. Two kinds of connection live
//! longer: that of an exec, which ends with [`Reply::Exited`] and whose loss kills the process, and
//! that of [`Request::Events`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::{AgentError, CgroupPlan, Mount, Process, Usage, WindowSize};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use serde::{Deserialize, Serialize};

use crate::channel::{self, Channel};
use crate::network::Joined;

/// Name of the socket in the container's state directory.
pub const SOCKET: &str = "control";

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// How long a verb waits for the monitor itself. What the guest needs comes on top.
pub const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Executes the init process, with the cards that have come since its creation. Their taps come with the message.
    Start {
        cards: Vec<Joined>,
    },
    /// Runs a further process. Its descriptors come with the message. Answered by
    /// [`Reply::Done`] when the process runs, and [`Reply::Exited`] later.
    Exec {
        process: Box<Process>,
        stdio: Descriptors,
        ignore_paused: bool,
    },
    /// On the connection of an exec: the signal is for its process. Else for the init process, or
    /// with `all` for each process.
    Signal {
        signal: i32,
        all: bool,
    },
    /// On the connection of an exec: the new size of its terminal.
    Resize(WindowSize),
    /// On the connection of an exec: the host process that stands for it from now on.
    StandIn {
        pid: u32,
    },
    Pause,
    Resume,
    /// Saves the VM to a state and a memory file, which come with the message. It stands still after that, until the
    /// same connection says how it goes on, or ends.
    Checkpoint,
    /// After [`Request::Checkpoint`]: it goes on.
    Thaw,
    /// After [`Request::Checkpoint`]: it ends here. Not answered.
    End,
    Update(CgroupPlan),
    /// What it has of the host's files is in the share already.
    Mount(Box<Mount>),
    Unmount {
        destination: String,
    },
    /// Answered by [`Reply::Usage`].
    Usage,
    /// Answered by [`Reply::Processes`].
    Processes,
    /// Answered by [`Reply::OutOfMemory`] as often as it happens, until either side goes.
    Events,
}

/// The descriptors that come with [`Request::Exec`], in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Descriptors {
    Streams {
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    Terminal,
}

impl Descriptors {
    pub fn count(self) -> usize {
        match self {
            Descriptors::Terminal => 1,
            Descriptors::Streams {
                stdin,
                stdout,
                stderr,
            } => [stdin, stdout, stderr].into_iter().filter(|&is| is).count(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// The process of this exec connection has ended.
    Exited(u8),
    Usage(Box<Usage>),
    /// Host processes: those that stand for execs.
    Processes(Vec<u32>),
    OutOfMemory,
    Failed(AgentError),
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("connect to the container's monitor")]
    Connect(#[source] io::Error),
    #[error("create the control socket")]
    Listen(#[source] io::Error),
    #[error("connection to the container's monitor")]
    Channel(#[from] channel::Error),
    #[error("the monitor gave an answer that does not belong to the question")]
    OutOfTurn,
    #[error(transparent)]
    Refused(AgentError),
}

/// A verb's end of a connection.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// `directory` is the container's state directory.
    pub fn connect(directory: BorrowedFd<'_>) -> Result<Client, Error> {
        let socket = new_socket(SocketFlags::CLOEXEC).map_err(Error::Connect)?;
        let address = address(directory).map_err(Error::Connect)?;
        connect(&socket, &address).map_err(|error| Error::Connect(error.into()))?;
        Ok(Client {
            channel: Channel::new(socket),
        })
    }

    pub fn send(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let deadline = Some(Instant::now() + PATIENCE);
        Ok(self.channel.send_all(request, fds, deadline)?)
    }

    /// Waits for a reply; without a deadline for ever.
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<Reply, Error> {
        match self.channel.receive(deadline)? {
            Reply::Failed(error) => Err(Error::Refused(error)),
            reply => Ok(reply),
        }
    }

    /// One question, one answer.
    pub fn ask(&mut self, request: &Request, deadline: Option<Instant>) -> Result<Reply, Error> {
        self.send(request, &[])?;
        self.receive(deadline)
    }

    /// For requests whose only good answer is [`Reply::Done`].
    pub fn command(&mut self, request: &Request, deadline: Option<Instant>) -> Result<(), Error> {
        self.send(request, &[])?;
        self.expect_done(deadline)
    }

    /// Waits for [`Reply::Done`].
    pub fn expect_done(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        match self.receive(deadline)? {
            Reply::Done => Ok(()),
            _ => Err(Error::OutOfTurn),
        }
    }

    /// The pid of the monitor, or of the creating verb as long as that holds the socket alone. The kernel vouches for it.
    pub fn monitor(&self) -> Option<i32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.channel).ok()?;
        Some(peer.pid.as_raw_nonzero().get())
    }

    /// Starts the container, with cards whose taps go along. Waits for the answer without a deadline.
    pub fn start(&mut self, cards: Vec<Joined>, taps: Vec<OwnedFd>) -> Result<(), Error> {
        let taps: Vec<BorrowedFd<'_>> = taps.iter().map(AsFd::as_fd).collect();
        self.send(&Request::Start { cards }, &taps)?;
        match self.receive(None)? {
            Reply::Done => Ok(()),
            _ => Err(Error::OutOfTurn),
        }
    }

    /// A reply that has arrived already, for callers with a loop of their own. Call it when the
    /// connection is readable.
    pub fn poll(&mut self) -> Result<Option<Reply>, Error> {
        if let Some(reply) = self.channel.next()? {
            return Ok(Some(reply));
        }
        self.channel.fill()?;
        Ok(self.channel.next()?)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// Makes the listening socket in the container's state directory, for its owner only.
pub fn listener(directory: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    let make = || -> io::Result<OwnedFd> {
        let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        // The socket file gets the mode of the socket.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::RWXU)?;
        bind(&socket, &address(directory)?)?;
        listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    make().map_err(Error::Listen)
}

/// Makes this process the one that connections are to, as [`Client::monitor`] tells it: the kernel takes that from the
/// last listen(2), and the first was the creating verb's.
pub fn take_over(listener: BorrowedFd<'_>) -> io::Result<()> {
    Ok(listen(listener, BACKLOG)?)
}

/// The next connection that waits, if its other side may be here: root or `owner`.
pub fn accept(listener: BorrowedFd<'_>, owner: u32) -> io::Result<Option<Channel>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match accept_with(listener, flags) {
        Ok(socket) => socket,
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let peer = peer_user(socket.as_fd())?;
    Ok((peer == 0 || peer == owner).then(|| Channel::new(socket)))
}

/// SO_PEERCRED, without rustix: that takes the pid for one that is never 0, as it is in the monitor's pid namespace for
/// whoever is outside.
fn peer_user(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the structure, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(credentials.uid),
        _ => Err(io::Error::last_os_error()),
    }
}

fn new_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// By way of the open directory: the path of a state directory can be longer than a socket address.
fn address(directory: BorrowedFd<'_>) -> io::Result<SocketAddrUnix> {
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()));
    Ok(SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt;

    use agent_protocol::ErrorKind;

    use super::*;

    /// A directory of its own that goes with the test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let unique = format!("sandbox-control-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(unique);
            std::fs::create_dir(&path).unwrap();
            Directory(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(5))
    }

    #[test]
    fn a_verb_and_the_monitor_talk() {
        let directory = Directory::new(&"long".repeat(30));
        let handle = File::open(&directory.0).unwrap();
        let listener = listener(handle.as_fd()).unwrap();
        let mode = std::fs::metadata(directory.0.join(SOCKET))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o077, 0, "only the owner may connect");

        let mut client = Client::connect(handle.as_fd()).unwrap();
        let stdio = Descriptors::Streams {
            stdin: true,
            stdout: false,
            stderr: true,
        };
        assert_eq!(stdio.count(), 2);
        client
            .send(
                &Request::Signal {
                    signal: 9,
                    all: true,
                },
                &[],
            )
            .unwrap();
        let owner = rustix::process::geteuid().as_raw();
        let mut server = accept(listener.as_fd(), owner).unwrap().unwrap();
        let request = server.receive::<Request>(soon()).unwrap();
        assert!(matches!(
            request,
            Request::Signal {
                signal: 9,
                all: true
            }
        ));
        server.send(&Reply::Exited(137)).unwrap();
        assert!(matches!(client.receive(soon()), Ok(Reply::Exited(137))));
        let refusal = AgentError {
            kind: ErrorKind::State,
            message: "no".into(),
        };
        server.send(&Reply::Failed(refusal)).unwrap();
        assert!(matches!(client.receive(soon()), Err(Error::Refused(_))));
    }

    #[test]
    fn strangers_are_not_accepted() {
        let directory = Directory::new("stranger");
        let handle = File::open(&directory.0).unwrap();
        let listener = listener(handle.as_fd()).unwrap();
        assert!(accept(listener.as_fd(), 0).unwrap().is_none());
        let _client = Client::connect(handle.as_fd()).unwrap();
        let me = rustix::process::geteuid().as_raw();
        let channel = accept(listener.as_fd(), me + 1).unwrap();
        assert_eq!(channel.is_some(), me == 0);
    }

    #[test]
    fn without_a_monitor_the_error_says_so() {
        let directory = Directory::new("nobody");
        let handle = File::open(&directory.0).unwrap();
        assert!(matches!(
            Client::connect(handle.as_fd()),
            Err(Error::Connect(_))
        ));
    }
}
