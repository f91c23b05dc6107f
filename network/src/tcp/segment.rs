//! Segments as an endpoint sees them: numbers, flags and a payload, without ports and checksums.

use super::seq::Seq;

/// A segment from the guest, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) seq: Seq,
    pub(crate) ack: Option<Seq>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) window: u16,
    pub(crate) scale: Option<u8>,
    pub(crate) mss: Option<u16>,
    pub(crate) payload: &'a [u8],
}

impl Segment<'_> {
    /// Sequence numbers that it takes up.
    pub(crate) fn len(&self) -> usize {
        self.payload.len() + usize::from(self.syn) + usize::from(self.fin)
    }
}

/// A segment for the guest. Its payload is [`Endpoint::payload`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) seq: Seq,
    pub(crate) ack: Option<Seq>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) psh: bool,
    pub(crate) window: u16,
    pub(crate) scale: Option<u8>,
    pub(crate) mss: Option<u16>,
    /// Where the payload begins in what is kept for the guest, and how long it is.
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl Outgoing {
    /// A reset, as it answers a segment that belongs to no connection (RFC 9293 §3.10.7.1).
    pub(crate) fn reset_for(segment: &Segment<'_>) -> Self {
        let (seq, ack) = match segment.ack {
            Some(ack) => (ack, None),
            None => (Seq(0), Some(segment.seq.plus(segment.len()))),
        };
        Outgoing { rst: true, ..Self::bare(seq, ack) }
    }

    /// A segment with nothing but its numbers.
    pub(super) fn bare(seq: Seq, ack: Option<Seq>) -> Self {
        Outgoing {
            seq,
            ack,
            syn: false,
            fin: false,
            rst: false,
            psh: false,
            window: 0,
            scale: None,
            mss: None,
            offset: 0,
            len: 0,
        }
    }
}
