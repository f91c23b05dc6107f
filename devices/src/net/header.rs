//! The header before each frame (virtio 1.2 §5.1.6), and what it means once it has been checked.
//!
//! A header from the guest becomes an [`Offload`] only if every place it names lies in its frame, if the driver
//! negotiated what it asks for, and if what it makes a backend do is bounded.

use std::num::NonZeroU16;

use super::Mtu;

/// Bytes of a header, `num_buffers` included, which a driver of virtio 1 always has.
pub(super) const HEADER: usize = 12;
/// Bytes of an Ethernet header, and of the tag that a frame of a virtual network has in it.
pub(super) const ETHERNET: usize = 14;
pub(super) const TAG: usize = 4;
/// Bytes of the largest frame: 64 KiB of packet behind a tagged Ethernet header.
pub const MAX_FRAME: usize = (64 << 10) + ETHERNET + TAG;
/// Datagrams in one frame, which is what Linux puts into one at most.
pub const MAX_DATAGRAMS: usize = 128;
/// Bytes of a UDP header.
const UDP: usize = 8;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

/// Values of `gso_type`.
mod gso {
    pub const NONE: u8 = 0;
    pub const TCP4: u8 = 1;
    pub const TCP6: u8 = 4;
    pub const UDP: u8 = 5;
}

/// What one side does for the other: sums left to be completed, frames left to be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// [`Checksum::Partial`] and [`Checksum::Verified`]. Without it there is none of the others.
    pub checksum: bool,
    /// [`Segments::Tcp4`].
    pub tcp4: bool,
    /// [`Segments::Tcp6`].
    pub tcp6: bool,
    /// [`Segments::Udp`].
    pub udp: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { checksum: true, tcp4: true, tcp6: true, udp: true };

    fn segments(self, segments: Segments) -> bool {
        match segments {
            Segments::Tcp4 => self.tcp4,
            Segments::Tcp6 => self.tcp6,
            Segments::Udp => self.udp,
        }
    }
}

/// How far the transport checksum of a frame is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// It is in the frame, for the receiver to check.
    #[default]
    Complete,
    /// The field has the pseudo-header's sum. The Internet checksum (RFC 1071) of the bytes from `start` to the end
    /// is to be put there, or may be left out by whoever consumes the frame.
    Partial {
        /// Where the sum begins, in bytes from the frame's start: the transport header.
        start: u16,
        /// Where its field is, in bytes from `start`.
        offset: u16,
    },
    /// The sender vouches for it. Only towards the guest.
    Verified,
}

/// What a frame's payload is to be cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segments {
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams over either.
    Udp,
}

/// A frame that stands for many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// What it is cut into.
    pub segments: Segments,
    /// Bytes of payload in each but the last.
    pub size: NonZeroU16,
    /// Bytes of all headers together, as the sender says: a hint, not to be relied on (§5.1.6.2).
    pub headers: u16,
}

/// What is left to do for a frame. The bytes themselves are not looked at: that the frame is what its offload says
/// (TCP over IPv4, say) is for the backend to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The transport checksum.
    pub checksum: Checksum,
    /// Whether the frame is to be cut; its checksum is [`Checksum::Partial`] then.
    pub segmentation: Option<Segmentation>,
}

/// What is wrong with a frame, or with its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Shorter than an Ethernet header, or longer than the MTU allows.
    Length,
    /// The sum's place is not in the frame, or nobody negotiated this.
    Checksum,
    /// Nobody negotiated this, or the numbers cannot be.
    Segmentation,
}

impl Offload {
    /// Decodes the header of a frame of `len` bytes between sides of which one does `offloads` for the other.
    pub(super) fn decode(
        header: [u8; HEADER],
        len: usize,
        offloads: Offloads,
        mtu: Mtu,
    ) -> Result<Self, Wrong> {
        // `num_buffers` means nothing in this direction.
        let [flags, kind, h0, h1, s0, s1, start0, start1, offset0, offset1, _, _] = header;
        let checksum = match flags & NEEDS_CSUM {
            0 => Checksum::Complete,
            _ => Checksum::Partial {
                start: u16::from_le_bytes([start0, start1]),
                offset: u16::from_le_bytes([offset0, offset1]),
            },
        };
        let segments = match kind {
            gso::NONE => None,
            gso::TCP4 => Some(Segments::Tcp4),
            gso::TCP6 => Some(Segments::Tcp6),
            gso::UDP => Some(Segments::Udp),
            _ => return Err(Wrong::Segmentation),
        };
        let segmentation = match segments {
            None => None,
            Some(segments) => {
                let size = NonZeroU16::new(u16::from_le_bytes([s0, s1])).ok_or(Wrong::Segmentation)?;
                Some(Segmentation { segments, size, headers: u16::from_le_bytes([h0, h1]) })
            }
        };
        let offload = Self { checksum, segmentation };
        offload.check(len, offloads, mtu)?;
        Ok(offload)
    }

    /// Whether a frame of `len` bytes may pass with this.
    pub(super) fn check(&self, len: usize, offloads: Offloads, mtu: Mtu) -> Result<(), Wrong> {
        let longest = match self.segmentation {
            None => ETHERNET + TAG + usize::from(mtu.get()),
            Some(_) => MAX_FRAME,
        };
        if !(ETHERNET..=longest).contains(&len) {
            return Err(Wrong::Length);
        }
        let transport = match self.checksum {
            Checksum::Complete => None,
            Checksum::Verified => offloads.checksum.then_some(None).ok_or(Wrong::Checksum)?,
            Checksum::Partial { start, offset } => {
                let (start, offset) = (usize::from(start), usize::from(offset));
                if !offloads.checksum || start < ETHERNET || start + offset + 2 > len {
                    return Err(Wrong::Checksum);
                }
                Some(start)
            }
        };
        let Some(Segmentation { segments, size, headers }) = self.segmentation else { return Ok(()) };
        // A frame that is cut needs a sum for each piece (§5.1.6.2.1).
        let transport = transport.ok_or(Wrong::Segmentation)?;
        let payload = len.saturating_sub(transport + UDP);
        let too_many = segments == Segments::Udp && payload.div_ceil(usize::from(size.get())) > MAX_DATAGRAMS;
        if !offloads.segments(segments) || size.get() > mtu.get() || usize::from(headers) > len || too_many {
            return Err(Wrong::Segmentation);
        }
        Ok(())
    }

    /// The header of a frame for the guest that fills so many buffers.
    pub(super) fn encode(&self, buffers: u16) -> [u8; HEADER] {
        let (flags, start, offset) = match self.checksum {
            Checksum::Complete => (0, 0, 0),
            Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
            Checksum::Verified => (DATA_VALID, 0, 0),
        };
        let (kind, headers, size) = self.segmentation.map_or((gso::NONE, 0, 0), |cut| {
            let kind = match cut.segments {
                Segments::Tcp4 => gso::TCP4,
                Segments::Tcp6 => gso::TCP6,
                Segments::Udp => gso::UDP,
            };
            (kind, cut.headers, cut.size.get())
        });
        let ([h0, h1], [s0, s1]) = (headers.to_le_bytes(), size.to_le_bytes());
        let ([start0, start1], [offset0, offset1]) = (start.to_le_bytes(), offset.to_le_bytes());
        let [n0, n1] = buffers.to_le_bytes();
        [flags, kind, h0, h1, s0, s1, start0, start1, offset0, offset1, n0, n1]
    }
}
