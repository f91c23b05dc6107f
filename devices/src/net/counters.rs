//! What went through a card, and what did not.

use super::header::Wrong;

/// Frames that came through in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many; one that is to be cut counts as one.
    pub frames: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
}

impl Traffic {
    pub(super) fn count(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes = self.bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

/// Frames that were dropped in one direction, by what was wrong with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Shorter than an Ethernet header, or longer than the MTU, or [`MAX_FRAME`](super::MAX_FRAME), allows.
    pub length: u64,
    /// A partial checksum whose place is not in the frame, or that the receiver does not do.
    pub checksum: u64,
    /// A segmentation that the receiver does not do, without a partial checksum, into pieces of no bytes or of more
    /// than the MTU, or into more than [`MAX_DATAGRAMS`](super::MAX_DATAGRAMS).
    pub segmentation: u64,
    /// The guest's buffers are too small, all together, for the frame.
    pub room: u64,
    /// The link was down.
    pub link_down: u64,
}

impl Refused {
    pub(super) fn count(&mut self, wrong: Wrong) {
        match wrong {
            Wrong::Length => self.length += 1,
            Wrong::Checksum => self.checksum += 1,
            Wrong::Segmentation => self.segmentation += 1,
        }
    }
}

/// What went through the device since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// From the guest to the backend.
    pub transmitted: Traffic,
    /// From the backend to the guest.
    pub received: Traffic,
    /// The guest's frames that the backend has not seen.
    pub transmit_refused: Refused,
    /// The backend's frames that the guest has not seen.
    pub receive_refused: Refused,
}
