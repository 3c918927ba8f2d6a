// SPDX-License-Identifier: Apache-2.0
//! The monitor's end of the connection to the agent. Nothing here blocks, and nothing the agent
//! sends is trusted: frames are capped by the protocol, replies must belong to a request, texts are
//! made printable before anybody sees them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use agent_protocol::{
    AgentError, Event, FrameError, FrameReader, FromAgent, MAX_FRAME, Reply, Request, ToAgent,
    encode,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Bytes taken from the agent in one turn of the loop, so that a flood cannot starve the others.
const READ: usize = 64 << 10;

/// An agent that lets this much pile up does not read any more.
const BACKLOG: usize = 2 * MAX_FRAME;

/// Longest error text taken from the agent.
const TEXT: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the agent closed its connection")]
    Closed,
    #[error("receive from the agent")]
    Receive(#[source] io::Error),
    #[error("send to the agent")]
    Send(#[source] io::Error),
    #[error("the agent sent nonsense")]
    Frame(#[source] FrameError),
    #[error("request to the agent")]
    Request(#[source] FrameError),
    #[error("the agent answered request {0}, which was not asked")]
    Unsolicited(u64),
    #[error("the agent does not read its requests")]
    Backlog,
}

/// What came from the agent. `T` is what the asker attached to its request.
#[derive(Debug, PartialEq)]
pub enum Incoming<T> {
    Answer {
        asked: T,
        result: Result<Reply, AgentError>,
    },
    Event(Event),
}

#[derive(Debug)]
struct Pending<T> {
    /// Taken when the deadline passes: the late answer is then dropped.
    asked: Option<T>,
    deadline: Option<Instant>,
}

#[derive(Debug)]
pub struct AgentClient<T> {
    socket: OwnedFd,
    reader: FrameReader,
    outgoing: Vec<u8>,
    next: u64,
    pending: BTreeMap<u64, Pending<T>>,
}

/// Where a connection was, for a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedClient {
    next: u64,
    /// Requests whose answers nobody waits for any more.
    abandoned: Vec<u64>,
    /// The beginning of a message.
    received: Vec<u8>,
}

impl<T> AgentClient<T> {
    /// Goes on where a saved connection was.
    pub fn resume(socket: OwnedFd, saved: SavedClient) -> Self {
        let mut client = AgentClient::new(socket);
        client.next = saved.next;
        client.reader.push(&saved.received);
        let abandoned = saved.abandoned.into_iter();
        client.pending = abandoned
            .map(|number| {
                let (asked, deadline) = (None, None);
                (number, Pending { asked, deadline })
            })
            .collect();
        client
    }

    /// None: somebody waits for an answer, or a request is still on its way.
    pub fn save(&self) -> Option<SavedClient> {
        let waits = self.pending.values().any(|pending| pending.asked.is_some());
        (!waits && self.outgoing.is_empty()).then(|| SavedClient {
            next: self.next,
            abandoned: self.pending.keys().copied().collect(),
            received: self.reader.pending().to_vec(),
        })
    }
    /// `socket` is a non-blocking stream.
    pub fn new(socket: OwnedFd) -> Self {
        AgentClient {
            socket,
            reader: FrameReader::default(),
            outgoing: Vec::new(),
            next: 1,
            pending: BTreeMap::new(),
        }
    }

    /// Sends a request, or as much of it as the socket takes now.
    pub fn send(
        &mut self,
        request: Request,
        asked: T,
        deadline: Option<Instant>,
    ) -> Result<(), Error> {
        let number = self.next;
        let frame = encode(&ToAgent { number, request }).map_err(Error::Request)?;
        if self.outgoing.len() + frame.len() > BACKLOG {
            return Err(Error::Backlog);
        }
        self.next += 1;
        self.outgoing.extend_from_slice(&frame);
        let asked = Some(asked);
        self.pending.insert(number, Pending { asked, deadline });
        self.flush()
    }

    /// Goes on with what did not fit into the socket.
    pub fn flush(&mut self) -> Result<(), Error> {
        let mut sent = 0;
        let result = loop {
            if sent == self.outgoing.len() {
                break Ok(());
            }
            match rustix::io::write(&self.socket, &self.outgoing[sent..]) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(()),
                Err(error) => break Err(Error::Send(error.into())),
            }
        };
        self.outgoing.drain(..sent);
        result
    }

    /// Whether the loop has to call [`flush`](Self::flush) when the socket is writable.
    pub fn wants_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Takes what the agent has sent, at most [`READ`] bytes of it.
    pub fn receive(&mut self) -> Result<Vec<Incoming<T>>, Error> {
        let mut buffer = [0; READ];
        let count = match rustix::io::read(&self.socket, &mut buffer) {
            Ok(0) => return Err(Error::Closed),
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(Error::Receive(error.into())),
        };
        self.reader.push(&buffer[..count]);
        let mut incoming = Vec::new();
        while let Some(message) = self.reader.next().map_err(Error::Frame)? {
            incoming.extend(self.take(message)?);
        }
        Ok(incoming)
    }

    fn take(&mut self, message: FromAgent) -> Result<Option<Incoming<T>>, Error> {
        let (number, result) = match message {
            FromAgent::Event(event) => return Ok(Some(Incoming::Event(event))),
            FromAgent::Reply { number, result } => (number, result),
        };
        let pending = self
            .pending
            .remove(&number)
            .ok_or(Error::Unsolicited(number))?;
        let result = result.map_err(|error| AgentError {
            message: printable(&error.message),
            ..error
        });
        Ok(pending
            .asked
            .map(|asked| Incoming::Answer { asked, result }))
    }

    /// When [`overdue`](Self::overdue) has to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.pending
            .values()
            .filter(|pending| pending.asked.is_some())
            .filter_map(|pending| pending.deadline)
            .min()
    }

    /// The requests whose time is over. Their answers will be ignored.
    pub fn overdue(&mut self, now: Instant) -> Vec<T> {
        self.pending
            .values_mut()
            .filter(|pending| pending.deadline.is_some_and(|deadline| deadline <= now))
            .filter_map(|pending| pending.asked.take())
            .collect()
    }
}

impl<T> AsFd for AgentClient<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One bounded line without control characters: the text goes to terminals and logs.
pub fn printable(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars() {
        if line.len() >= TEXT {
            line.push('…');
            break;
        }
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use agent_protocol::{ErrorKind, decode};

    use super::*;

    /// A client that remembers texts, and the agent's end.
    fn pair() -> (AgentClient<&'static str>, UnixStream) {
        let (host, guest) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        (AgentClient::new(host.into()), guest)
    }

    fn reply(number: u64, result: Result<Reply, AgentError>) -> Vec<u8> {
        encode(&FromAgent::Reply { number, result }).unwrap()
    }

    fn read_request(guest: &mut UnixStream) -> ToAgent {
        let mut prefix = [0; 4];
        guest.read_exact(&mut prefix).unwrap();
        let mut body = vec![0; u32::from_le_bytes(prefix) as usize];
        guest.read_exact(&mut body).unwrap();
        decode(&body).unwrap()
    }

    #[test]
    fn answers_find_their_askers_in_any_order() {
        let (mut client, mut guest) = pair();
        client.send(Request::Shutdown, "first", None).unwrap();
        client.send(Request::Shutdown, "second", None).unwrap();
        let numbers = [read_request(&mut guest), read_request(&mut guest)].map(|r| r.number);
        guest
            .write_all(&reply(numbers[1], Ok(Reply::Done)))
            .unwrap();
        guest
            .write_all(&reply(numbers[0], Ok(Reply::Created { pid: 7 })))
            .unwrap();
        let answers = client.receive().unwrap();
        let asked: Vec<_> = answers
            .iter()
            .map(|incoming| match incoming {
                Incoming::Answer { asked, .. } => *asked,
                Incoming::Event(_) => "event",
            })
            .collect();
        assert_eq!(asked, ["second", "first"]);
    }

    #[test]
    fn unsolicited_and_repeated_answers_end_the_connection() {
        let (mut client, mut guest) = pair();
        guest.write_all(&reply(1, Ok(Reply::Done))).unwrap();
        assert!(matches!(client.receive(), Err(Error::Unsolicited(1))));

        let (mut client, mut guest) = pair();
        client.send(Request::Shutdown, "once", None).unwrap();
        guest.write_all(&reply(1, Ok(Reply::Done))).unwrap();
        guest.write_all(&reply(1, Ok(Reply::Done))).unwrap();
        assert!(matches!(client.receive(), Err(Error::Unsolicited(1))));
    }

    #[test]
    fn nonsense_and_huge_lengths_end_the_connection() {
        for bytes in [&[3, 0, 0, 0, 0xff, 0xff, 0xff][..], &[0xff; 4]] {
            let (mut client, mut guest) = pair();
            guest.write_all(bytes).unwrap();
            assert!(matches!(client.receive(), Err(Error::Frame(_))));
        }
    }

    #[test]
    fn a_closed_connection_is_told_from_silence() {
        let (mut client, guest) = pair();
        assert_eq!(client.receive().unwrap(), []);
        drop(guest);
        assert!(matches!(client.receive(), Err(Error::Closed)));
    }

    #[test]
    fn a_piecemeal_frame_is_waited_for() {
        let (mut client, mut guest) = pair();
        let frame = encode(&FromAgent::Event(Event::Ready {
            version: 1,
            age_ns: 0,
        }))
        .unwrap();
        for byte in &frame[..frame.len() - 1] {
            guest.write_all(&[*byte]).unwrap();
            assert_eq!(client.receive().unwrap(), []);
        }
        guest.write_all(&frame[frame.len() - 1..]).unwrap();
        let event = Incoming::Event(Event::Ready {
            version: 1,
            age_ns: 0,
        });
        assert_eq!(client.receive().unwrap(), [event]);
    }

    #[test]
    fn an_overdue_request_is_given_back_once_and_its_answer_dropped() {
        let (mut client, mut guest) = pair();
        let deadline = Instant::now();
        client
            .send(Request::Shutdown, "late", Some(deadline))
            .unwrap();
        assert_eq!(client.deadline(), Some(deadline));
        assert_eq!(client.overdue(deadline), ["late"]);
        assert_eq!(client.overdue(deadline + Duration::from_secs(9)), [""; 0]);
        assert_eq!(client.deadline(), None);
        guest.write_all(&reply(1, Ok(Reply::Done))).unwrap();
        assert_eq!(client.receive().unwrap(), []);
    }

    #[test]
    fn a_saved_connection_goes_on_in_the_middle_of_a_message() {
        let (mut client, mut guest) = pair();
        let late = Some(Instant::now());
        client.send(Request::Shutdown, "late", late).unwrap();
        assert!(client.save().is_none(), "an answer is missing");
        client.overdue(Instant::now());
        let event = encode(&FromAgent::Event(Event::Ready {
            version: 1,
            age_ns: 0,
        }))
        .unwrap();
        guest.write_all(&event[..3]).unwrap();
        assert_eq!(client.receive().unwrap(), []);
        let saved = client.save().unwrap();

        let (host, mut guest) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let mut client = AgentClient::resume(host.into(), saved);
        guest.write_all(&event[3..]).unwrap();
        guest.write_all(&reply(1, Ok(Reply::Done))).unwrap();
        let event = Incoming::Event(Event::Ready {
            version: 1,
            age_ns: 0,
        });
        assert_eq!(client.receive().unwrap(), [event]);
        client.send(Request::Shutdown, "next", None).unwrap();
        assert_eq!(read_request(&mut guest).number, 2);
    }

    #[test]
    fn an_agent_that_does_not_read_is_found_out() {
        let (mut client, _guest) = pair();
        let request = || Request::Prepare {
            clock: agent_protocol::Clock {
                seconds: 0,
                nanoseconds: 0,
            },
            entropy: vec![0; 3 << 20],
        };
        let sends = (0..9).map(|_| client.send(request(), "big", None));
        let results: Vec<_> = sends.collect();
        assert!(results[0].is_ok());
        assert!(matches!(results[8], Err(Error::Backlog)));
    }

    #[test]
    fn texts_of_the_agent_are_made_harmless() {
        let (mut client, mut guest) = pair();
        client.send(Request::Shutdown, "x", None).unwrap();
        let error = AgentError {
            kind: ErrorKind::System,
            message: format!("\x1b[2J\nfake line {}", "y".repeat(1 << 20)),
        };
        let answer = reply(1, Err(error));
        let writer = std::thread::spawn(move || guest.write_all(&answer).unwrap());
        let incoming = loop {
            let mut incoming = client.receive().unwrap();
            if let Some(first) = incoming.pop() {
                break first;
            }
        };
        writer.join().unwrap();
        let Incoming::Answer {
            result: Err(error), ..
        } = incoming
        else {
            panic!("not an error: {incoming:?}");
        };
        assert!(error.message.starts_with("\\u{1b}[2J\\nfake line"));
        assert!(error.message.len() < 2 * TEXT);
    }
}
