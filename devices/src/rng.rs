//! A virtio source of entropy (virtio 1.2 §5.4).
//!
//! A request gets at most [`MAX_REQUEST`] bytes, which the specification allows a device to decide: a driver
//! that wants more asks again. When the host's source fails, the request comes back without bytes.

use std::io;

use crate::mmio::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use crate::{Device, DeviceKind, Progress, Queue, QueueState};

/// Bytes that one request gets at most.
pub const MAX_REQUEST: usize = 1024;
/// Descriptors of the request queue: drivers have one request under way.
pub const QUEUE_SIZE: u16 = 8;

/// Where random bytes come from.
pub trait EntropySource: Send {
    /// Fills `bytes`, fit for keys.
    ///
    /// # Errors
    /// If the source has failed; the bytes are not used then.
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// A virtio source of entropy.
#[derive(Debug)]
pub struct Rng<S> {
    source: S,
    queue: Option<Queue>,
    failures: u64,
}

impl<S: EntropySource> Rng<S> {
    /// A device over `source`.
    pub fn new(source: S) -> Self {
        Self { source, queue: None, failures: 0 }
    }

    /// How often the source failed.
    pub fn failures(&self) -> u64 {
        self.failures
    }
}

impl<S: EntropySource> Device for Rng<S> {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn acknowledge(&mut self, _features: u64) {}

    fn start_queue(&mut self, index: usize, queue: Queue) {
        if index == 0 {
            self.queue = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        if index == 0 { self.queue.take().map(Queue::stop) } else { None }
    }

    fn kick(&mut self, index: usize) -> Progress {
        let Some(queue) = self.queue.as_mut().filter(|_| index == 0) else { return Progress::Idle };
        let mut room = [0; MAX_REQUEST];
        let mut batch = queue.batch();
        while let Some(mut chain) = batch.next() {
            let len = chain.writable_len().min(MAX_REQUEST);
            let bytes = room.get_mut(..len).unwrap_or(&mut []);
            let written = match self.source.fill(bytes) {
                Ok(()) => chain.write(bytes),
                Err(_) => {
                    self.failures += 1;
                    0
                }
            };
            batch.complete(chain, u32::try_from(written).unwrap_or(0));
        }
        batch.progress()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, Guest, Ring};

    /// Counts up; fails when told to.
    struct Counting(u8, bool);

    impl EntropySource for Counting {
        fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
            for byte in bytes {
                self.0 = self.0.wrapping_add(1);
                *byte = self.0;
            }
            if self.1 { Err(io::Error::other("dry")) } else { Ok(()) }
        }
    }

    fn rig(fails: bool) -> (Guest, Ring, Rng<Counting>) {
        let mut guest = Guest::new(1 << 20);
        let ring = Ring::new(&mut guest, 8, true);
        let mut rng = Rng::new(Counting(0, fails));
        let queue = Queue::new(guest.memory.clone(), guest.signals(), 8, &ring.state()).unwrap();
        rng.start_queue(0, queue);
        (guest, ring, rng)
    }

    #[test]
    fn a_request_gets_bytes_up_to_the_limit() {
        let (mut guest, mut ring, mut rng) = rig(false);
        let at = guest.alloc(8192);
        ring.submit(&[Buffer::writable(at, 3), Buffer::writable(at + 5, 2)]);
        ring.submit(&[Buffer::writable(at + 16, 8000)]);
        assert_eq!(rng.kick(0), Progress::Idle);
        assert_eq!(ring.completion().unwrap().1, 5);
        assert_eq!(ring.completion().unwrap().1, 1024);
        assert_eq!(guest.read(at, 8), [1, 2, 3, 0, 0, 4, 5, 0]);
        assert_eq!(guest.read(at + 16 + 1023, 2), [5, 0]);
    }

    #[test]
    fn a_source_that_fails_gives_nothing() {
        let (mut guest, mut ring, mut rng) = rig(true);
        let at = guest.alloc(16);
        ring.submit(&[Buffer::writable(at, 16)]);
        assert_eq!(rng.kick(0), Progress::Idle);
        assert_eq!(ring.completion().unwrap().1, 0);
        assert_eq!(guest.read(at, 16), [0; 16]);
        assert_eq!(rng.failures(), 1);
    }
}
