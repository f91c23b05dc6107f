//! Guest memory for one frame: one chain, or with VIRTIO_NET_F_MRG_RXBUF as many as the frame fills (virtio 1.2
//! §5.1.6.3.2).

use super::header::HEADER;
use crate::{Batch, QueueError, Slice};

/// The buffers for a frame and its header.
#[derive(Debug, Default)]
pub(super) struct Room<'q> {
    header: Vec<Slice<'q>>,
    data: Vec<Slice<'q>>,
    /// Bytes of each chain that was set aside.
    chains: Vec<usize>,
}

/// Whether there is room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// For the whole frame.
    Enough,
    /// Not yet: the driver has to give more, or the round is over.
    NotYet,
    /// Not in the chain that the driver has for it, or in its whole queue.
    TooLittle,
}

impl<'q> Room<'q> {
    /// Sets chains aside until a header and `bytes` fit: one, or up to `chains` of them.
    pub(super) fn gather(
        &mut self,
        batch: &mut Batch<'q>,
        bytes: usize,
        chains: usize,
    ) -> Result<Found, QueueError> {
        self.header.clear();
        self.data.clear();
        self.chains.clear();
        let mut missing = HEADER + bytes;
        while missing > 0 {
            if self.chains.len() == chains {
                return Ok(Found::TooLittle);
            }
            let Some(chain) = batch.next() else { return Ok(Found::NotYet) };
            let size = chain.writable_len();
            // The header is in one chain, and nothing here is for reading (§5.1.6.3.1).
            if chain.readable_len() > 0 || (self.chains.is_empty() && size < HEADER) {
                return Err(QueueError::Malformed);
            }
            self.data.extend_from_slice(chain.writable());
            self.chains.push(size);
            missing = missing.saturating_sub(size);
            batch.set_aside(chain);
        }
        self.split_header();
        Ok(Found::Enough)
    }

    /// Moves the first bytes of the data to the header.
    fn split_header(&mut self) {
        let mut rest = HEADER;
        let mut whole = 0;
        for slice in &mut self.data {
            let Ok((front, back)) = slice.split_at(rest.min(slice.len())) else { break };
            rest -= front.len();
            self.header.push(front);
            if !back.is_empty() {
                *slice = back;
                break;
            }
            whole += 1;
            if rest == 0 {
                break;
            }
        }
        self.data.drain(..whole.min(self.data.len()));
    }

    /// Where the frame goes: at least the bytes that were asked for.
    pub(super) fn data(&self) -> &[Slice<'q>] {
        &self.data
    }

    /// How many bytes each chain gets of a header and `len` bytes of frame, and writes the header that `header` makes of
    /// their number.
    pub(super) fn close(&self, len: usize, header: impl FnOnce(u16) -> [u8; HEADER]) -> Vec<u32> {
        let mut rest = HEADER + len;
        let mut written = Vec::with_capacity(self.chains.len());
        for size in &self.chains {
            let here = rest.min(*size);
            if here == 0 {
                break;
            }
            // No more than a header and MAX_FRAME.
            written.push(u32::try_from(here).unwrap_or(u32::MAX));
            rest -= here;
        }
        let bytes = header(u16::try_from(written.len()).unwrap_or(u16::MAX));
        let mut from = bytes.as_slice();
        for slice in &self.header {
            let (now, later) = from.split_at(from.len().min(slice.len()));
            slice.copy_from(now);
            from = later;
        }
        written
    }
}
