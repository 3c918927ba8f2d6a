// SPDX-License-Identifier: Apache-2.0
//! Length-prefixed postcard: four bytes little-endian length, then the message.

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_FRAME;

const PREFIX: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("frame of {0} bytes is larger than the limit of {MAX_FRAME}")]
    TooLarge(usize),
    #[error("malformed message")]
    Malformed(#[source] postcard::Error),
    #[error("message cannot be encoded")]
    Unencodable(#[source] postcard::Error),
}

/// A message with its length prefix.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame =
        postcard::to_extend(message, vec![0; PREFIX]).map_err(FrameError::Unencodable)?;
    let length = frame.len() - PREFIX;
    let prefix = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_FRAME)
        .ok_or(FrameError::TooLarge(length))?;
    frame[..PREFIX].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

/// The body of a frame, without its prefix. Bytes behind the message are an error.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(FrameError::Malformed(
            postcard::Error::DeserializeBadEncoding,
        )),
        Err(error) => Err(FrameError::Malformed(error)),
    }
}

/// Puts frames together from whatever pieces a stream delivers. Never holds more than one read
/// beyond [`MAX_FRAME`].
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    taken: usize,
}

impl FrameReader {
    /// Adds bytes that came from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The bytes that have not come out as messages yet.
    pub fn pending(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    /// The next whole message, if there is one.
    #[allow(
        clippy::should_implement_trait,
        reason = "the type is the caller's choice"
    )]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let pending = &self.buffer[self.taken..];
        let Some((prefix, rest)) = pending.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLarge(length));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = decode(body)?;
        self.taken += PREFIX + length;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, FromAgent};

    fn exited(status: u8) -> FromAgent {
        FromAgent::Event(Event::Exited {
            container: "c".into(),
            process: 0,
            status,
        })
    }

    #[test]
    fn frames_come_out_of_any_pieces() {
        let mut stream = encode(&exited(3)).unwrap();
        stream.extend(encode(&exited(4)).unwrap());
        for piece in 1..stream.len() {
            let mut reader = FrameReader::default();
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                reader.push(bytes);
                while let Some(message) = reader.next::<FromAgent>().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, [exited(3), exited(4)], "pieces of {piece}");
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_the_bytes_come() {
        let mut reader = FrameReader::default();
        reader.push(&u32::MAX.to_le_bytes());
        assert!(matches!(
            reader.next::<FromAgent>(),
            Err(FrameError::TooLarge(_))
        ));
    }

    #[test]
    fn garbage_and_trailing_bytes_are_refused() {
        let mut frame = encode(&exited(0)).unwrap();
        frame.push(0);
        assert!(decode::<FromAgent>(&frame[4..]).is_err());
        assert!(decode::<FromAgent>(&[0xff; 64]).is_err());
    }

    #[test]
    fn too_large_messages_are_not_sent() {
        let message = FromAgent::Event(Event::OutOfMemory {
            container: "x".repeat(MAX_FRAME),
        });
        assert!(matches!(encode(&message), Err(FrameError::TooLarge(_))));
    }
}
