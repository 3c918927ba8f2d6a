// SPDX-License-Identifier: Apache-2.0
//! The header of a vsock packet: virtio 1.2, 5.10.6.

use serde::{Deserialize, Serialize};

/// Well-known CID of the host (virtio 1.2, 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// The size of `struct virtio_vsock_hdr`.
pub(super) const HEADER_LEN: usize = 44;

/// The longest payload in one packet. The specification leaves it open; Linux, on either side, sends no more.
pub(super) const MAX_PAYLOAD: usize = 64 * 1024;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender of the packet will not receive any more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender of the packet will not send any more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Values of the `op` field that the device understands.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`, in the byte order of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Header {
        let mut rest = &bytes[..];
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = &mut bytes[..];
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The answer "there is no such connection" to this packet.
    pub(super) fn reset_reply(self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            // A socket of another type finds its connection by the type, too.
            kind: self.kind,
            op: op::RST,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// Splits `N` bytes off the front; the callers add up to [`HEADER_LEN`].
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let (front, back) = rest.split_at(N);
    field.copy_from_slice(front);
    *rest = back;
    field
}

fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    let (front, back) = std::mem::take(rest).split_at_mut(N);
    front.copy_from_slice(&field);
    *rest = back;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_at_the_offsets_of_the_specification() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1122_3344,
            dst_port: 52,
            len: 7,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 3,
            buf_alloc: 0x8000_0000,
            fwd_cnt: u32::MAX,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..20], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[20..24], [52, 0, 0, 0]);
        assert_eq!(bytes[24..28], [7, 0, 0, 0]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[32..36], [3, 0, 0, 0]);
        assert_eq!(bytes[36..40], [0, 0, 0, 0x80]);
        assert_eq!(bytes[40..], [0xff; 4]);
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn reset_reply_swaps_the_ends() {
        let request = Header::parse(&[0x11; HEADER_LEN]);
        let reply = request.reset_reply();
        assert_eq!(reply.op, op::RST);
        assert_eq!(reply.kind, request.kind);
        assert_eq!(
            (reply.src_cid, reply.src_port),
            (request.dst_cid, request.dst_port)
        );
        assert_eq!(
            (reply.dst_cid, reply.dst_port),
            (request.src_cid, request.src_port)
        );
        assert_eq!(reply.len, 0);
    }
}
