//! What a card asks of the network that it is plugged into.

use super::{Offload, Offloads};
use crate::Slice;

/// A frame of the guest's, in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'m> {
    /// What is left to do for it.
    pub offload: Offload,
    /// Its length in bytes, from the Ethernet header on: 14 to [`MAX_FRAME`](super::MAX_FRAME).
    pub len: usize,
    /// Its bytes, which the guest may change at any time.
    pub data: &'m [Slice<'m>],
}

impl Frame<'_> {
    /// Copies the first bytes of the frame, as many as `to` takes; returns how many there were.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.data {
            let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += slice.copy_to(rest);
        }
        done
    }
}

/// What became of a frame that a backend was given.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The backend has taken it, if only to drop it.
    Taken,
    /// The backend has no room: the frame stays in the guest's queue until [`Net::poll`](super::Net::poll).
    Full,
}

/// The network that the card is plugged into.
///
/// Nothing here may block. The calls come from the one thread that works the device.
pub trait Backend: Send {
    /// What the backend does for the guest: partial checksums and large frames that it takes. Asked once, when the device
    /// is made.
    fn takes(&self) -> Offloads {
        Offloads::default()
    }

    /// What the backend would have the guest do for it: partial checksums and large frames that it may give.
    /// Asked once, when the device is made.
    fn gives(&self) -> Offloads {
        Offloads::default()
    }

    /// A driver has come, and this of [`Backend::gives`] is what it accepts. Called again after a restore.
    fn negotiated(&mut self, accepted: Offloads);

    /// Takes a frame. Its offload is one of [`Backend::takes`].
    fn transmit(&mut self, frame: Frame<'_>) -> Sent;

    /// The guest's frames of this round have all been given: time for what is better done once than for each.
    fn settle(&mut self) {}

    /// How many bytes the next frame for the guest has at most, if there is one: not zero, and at most [`MAX_FRAME`](super::MAX_FRAME).
    fn pending(&mut self) -> Option<usize>;

    /// Writes the next frame to the front of `to`, which has at least the bytes that [`Backend::pending`] said, and
    /// returns its length and what is left to do for it. `None` if it has turned out that there is no frame.
    fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)>;

    /// The next frame does not fit what the guest has for it: forget it.
    fn discard(&mut self);

    /// The driver is gone. What waits for it need not wait any more.
    fn driver_gone(&mut self) {}
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn takes(&self) -> Offloads {
        (**self).takes()
    }

    fn gives(&self) -> Offloads {
        (**self).gives()
    }

    fn negotiated(&mut self, accepted: Offloads) {
        (**self).negotiated(accepted);
    }

    fn transmit(&mut self, frame: Frame<'_>) -> Sent {
        (**self).transmit(frame)
    }

    fn settle(&mut self) {
        (**self).settle();
    }

    fn pending(&mut self) -> Option<usize> {
        (**self).pending()
    }

    fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)> {
        (**self).receive(to)
    }

    fn discard(&mut self) {
        (**self).discard();
    }

    fn driver_gone(&mut self) {
        (**self).driver_gone();
    }
}
