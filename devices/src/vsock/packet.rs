//! The header of a vsock packet (virtio 1.2 §5.10.6).

/// Bytes of a header.
pub(super) const HEADER_BYTES: u32 = 44;
pub(super) const HEADER: usize = HEADER_BYTES as usize;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: whoever sends it will not receive.
pub(super) const SHUT_READ: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: whoever sends it will not send.
pub(super) const SHUT_WRITE: u32 = 2;

/// Operations, by their numbers.
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A header, copied out of guest memory or about to be written there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// Takes the next `N` bytes off `raw`, which has them.
fn take<const N: usize>(raw: &mut &[u8]) -> [u8; N] {
    let Some((first, rest)) = raw.split_first_chunk::<N>() else { return [0; N] };
    *raw = rest;
    *first
}

impl Header {
    pub(super) fn decode(raw: &[u8; HEADER]) -> Self {
        let raw = &mut raw.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(raw)),
            dst_cid: u64::from_le_bytes(take(raw)),
            src_port: u32::from_le_bytes(take(raw)),
            dst_port: u32::from_le_bytes(take(raw)),
            len: u32::from_le_bytes(take(raw)),
            kind: u16::from_le_bytes(take(raw)),
            op: u16::from_le_bytes(take(raw)),
            flags: u32::from_le_bytes(take(raw)),
            buf_alloc: u32::from_le_bytes(take(raw)),
            fwd_cnt: u32::from_le_bytes(take(raw)),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut raw = [0; HEADER];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, byte) in raw.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *byte;
        }
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let header = Header {
            src_cid: 2,
            dst_cid: 3,
            src_port: 0x0102_0304,
            dst_port: 1025,
            len: 5,
            kind: STREAM,
            op: op::RW,
            flags: 0,
            buf_alloc: 262_144,
            fwd_cnt: 7,
        };
        let golden = [
            2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 1, 4, 0, 0, 5, 0, 0, 0, 1, 0, 5, 0,
            0, 0, 0, 0, 0, 0, 4, 0, 7, 0, 0, 0,
        ];
        assert_eq!(header.encode(), golden);
        assert_eq!(Header::decode(&golden), header);
    }
}
