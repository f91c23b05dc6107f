//! Frames as they cross the border: bytes, and what is left for the other side to do with them. It is what virtio-net says in
//! its header (virtio 1.2 §5.1.6), without being that header.

/// A checksum that is to be completed: the field holds the pseudo header's sum, and the sum over everything
/// from `start` on goes to `start + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where the sum begins, in bytes from the frame's beginning.
    pub start: u16,
    /// Where it goes, from there.
    pub offset: u16,
}

/// What a frame is a bundle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// A frame that stands for several segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// What they are.
    pub kind: GsoKind,
    /// Bytes of all headers.
    pub headers: u16,
    /// Bytes of payload of each segment but the last.
    pub segment: u16,
}

/// What is left to do with a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Complete this checksum. `None`: it is right.
    pub checksum: Option<PartialChecksum>,
    /// Cut it. `None`: it is one segment.
    pub gso: Option<Gso>,
}

/// What the guest's driver can do with frames for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestOffloads {
    /// It takes partial checksums (VIRTIO_NET_F_GUEST_CSUM). Without it the others do not count.
    pub checksum: bool,
    /// It takes segments of 64 KiB of TCP over IPv4 (VIRTIO_NET_F_GUEST_TSO4).
    pub tso4: bool,
    /// The same over IPv6 (VIRTIO_NET_F_GUEST_TSO6).
    pub tso6: bool,
}

/// A frame for the guest, in up to three pieces.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    pieces: [&'a [u8]; 3],
    /// What is left to do with it.
    pub offload: Offload,
}

impl<'a> Frame<'a> {
    pub(crate) fn new(head: &'a [u8], (first, second): (&'a [u8], &'a [u8]), offload: Offload) -> Self {
        Frame { pieces: [head, first, second], offload }
    }

    /// The pieces in their order; some may be empty.
    #[must_use]
    pub fn pieces(&self) -> [&'a [u8]; 3] {
        self.pieces
    }

    /// Bytes of all pieces: at most 65,553, or the MTU and 14 if the guest takes no segmentation offload.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len()).sum()
    }

    /// Whether it has no bytes, which never happens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it in one piece.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.pieces.concat()
    }
}
