// SPDX-License-Identifier: Apache-2.0
//! What agent and monitor say to each other.

use std::fmt::Debug;

use agent_protocol::{FrameReader, FromAgent, MAX_FRAME, ToAgent, decode, encode};
use runtime_shim::agent_client::{AgentClient, printable};
use serde::{Serialize, de::DeserializeOwned};

/// A stream of frames in pieces: the first byte says how long the pieces are. Whatever is accepted comes back the same
/// from a frame of ours.
fn frames<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8], each: impl Fn(&T)) {
    let Some((piece, stream)) = data.split_first() else {
        return;
    };
    let mut reader = FrameReader::default();
    for bytes in stream.chunks(usize::from(*piece).max(1)) {
        reader.push(bytes);
        loop {
            match reader.next::<T>() {
                Ok(Some(message)) => {
                    let frame = encode(&message).expect("what fits once fits again");
                    assert!(frame.len() <= MAX_FRAME + 4);
                    // Floating point: a NaN is not itself.
                    if let Ok(again) = decode::<T>(&frame[4..]) {
                        assert_eq!(again, message);
                    }
                    each(&message);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// The agent's, as the monitor reads them.
pub fn from_agent(data: &[u8]) {
    frames::<FromAgent>(data, |message| {
        if let FromAgent::Reply {
            result: Err(error), ..
        } = message
        {
            let line = printable(&error.message);
            assert!(line.len() < 2048 && !line.contains(char::is_control));
        }
    });
    client(data);
}

/// A client that has asked for something, given the same bytes.
fn client(data: &[u8]) {
    use std::io::Write;
    let (near, mut far) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    near.set_nonblocking(true).expect("non-blocking");
    let mut client = AgentClient::new(near.into());
    for asked in 0..3 {
        let request = agent_protocol::Request::Shutdown;
        client
            .send(request, asked, None)
            .expect("the socket has room");
    }
    far.set_nonblocking(true).expect("non-blocking");
    let _ = far.write(data.get(1..).unwrap_or_default());
    drop(far);
    // Ends with the stream at the latest.
    while client.receive().is_ok() {}
}

/// The monitor's, as the agent reads them.
pub fn to_agent(data: &[u8]) {
    frames::<ToAgent>(data, |_| {});
}
