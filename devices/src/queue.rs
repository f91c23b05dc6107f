//! A running split virtqueue (virtio 1.2 §2.7) and the batches in which a device works on it.
//!
//! A [`Queue`] exists only over rings that lie inside guest memory. [`Queue::batch`] borrows it for one round
//! of work: [`Batch::next`] gives validated chains, [`Batch::complete`] returns them, and the end of the batch
//! makes the one decision whether to interrupt the driver (§2.7.10, EVENT_IDX or VRING_AVAIL_F_NO_INTERRUPT).
//! The driver is asked to notify again only when the queue has been found empty, so that a busy queue costs no
//! notifications.
//!
//! A broken ring or chain sets DEVICE_NEEDS_RESET, is kept in [`Queue::failure`], and ends the queue's work.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::{Chain, ChainError, Memory, Progress, Signals, Slice};

/// VRING_AVAIL_F_NO_INTERRUPT: the driver wants no interrupts; only a hint, and only without EVENT_IDX.
const NO_INTERRUPT: u16 = 1;
/// Bytes of the rings' parts (§2.7.6, §2.7.8): flags and index, then the elements.
const AVAILABLE_HEADER: u64 = 4;
const AVAILABLE_ELEMENT: u64 = 2;
const USED_INDEX: u64 = 2;
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// Everything that continues a queue: where its rings are and how far both sides have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table, 16-byte aligned.
    pub descriptors: u64,
    /// Guest-physical address of the available ring, 2-byte aligned.
    pub available: u64,
    /// Guest-physical address of the used ring, 4-byte aligned.
    pub used: u64,
    /// The next available entry to take.
    pub next_available: u16,
    /// The next used entry to write.
    pub next_used: u16,
    /// VIRTIO_F_RING_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// Why a queue cannot be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The size is zero, not a power of two, or more than the device's largest.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// The size asked for.
        size: u16,
        /// The largest size.
        max: u16,
    },
    /// A ring is not aligned as §2.7 wants.
    #[error("a ring of the queue is misaligned")]
    Alignment,
    /// A ring does not lie in guest memory.
    #[error("a ring of the queue is not in guest memory")]
    OutsideMemory,
}

/// Why a queue stopped working until its device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A descriptor chain broke a rule.
    #[error("a descriptor chain broke a rule")]
    Chain(#[from] ChainError),
    /// The available index is further ahead than the queue is large, or a ring could not be accessed.
    #[error("the available ring is inconsistent")]
    Ring,
    /// The device could not make sense of a request's header.
    #[error("a request is malformed")]
    Malformed,
}

/// A running queue.
#[derive(Debug)]
pub struct Queue {
    memory: Memory,
    signals: Arc<Signals>,
    ring: virtio_queue::Queue,
    failure: Option<QueueError>,
    /// Completions since the driver was last asked whether it wants an interrupt; wraps as the indices do.
    unannounced: u16,
}

impl Queue {
    /// Continues a queue from `state`, over rings checked to lie inside `memory`.
    ///
    /// # Errors
    /// [`LayoutError`] if the size, an alignment or a ring's place is wrong.
    pub fn new(
        memory: Memory,
        signals: Arc<Signals>,
        max_size: u16,
        state: &QueueState,
    ) -> Result<Self, LayoutError> {
        let wrong_size = LayoutError::Size { size: state.size, max: max_size };
        let mut ring = virtio_queue::Queue::new(max_size).map_err(|_| wrong_size)?;
        ring.try_set_size(state.size).map_err(|_| wrong_size)?;
        ring.try_set_desc_table_address(GuestAddress(state.descriptors))
            .and_then(|()| ring.try_set_avail_ring_address(GuestAddress(state.available)))
            .and_then(|()| ring.try_set_used_ring_address(GuestAddress(state.used)))
            .map_err(|_| LayoutError::Alignment)?;
        ring.set_next_avail(state.next_available);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(state.event_idx);
        ring.set_ready(true);
        // The crate takes an available ring at zero for a queue that was never set up; so do drivers.
        if state.available == 0 || !ring.is_valid(&memory) {
            return Err(LayoutError::OutsideMemory);
        }
        Ok(Self { memory, signals, ring, failure: None, unannounced: 0 })
    }

    /// Ends the queue; the value starts it again where it was.
    pub fn stop(self) -> QueueState {
        self.state()
    }

    /// How far the queue has come.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.ring.size(),
            descriptors: self.ring.desc_table(),
            available: self.ring.avail_ring(),
            used: self.ring.used_ring(),
            next_available: self.ring.next_avail(),
            next_used: self.ring.next_used(),
            event_idx: self.ring.event_idx_enabled(),
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The rule the driver broke, after which the queue does nothing until the device is reset.
    pub fn failure(&self) -> Option<QueueError> {
        self.failure
    }

    /// The device's signals, for a device that has a configuration change to announce.
    pub fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    /// Asks the driver of an empty queue to notify not of the next chain but of the one after it, for a device that has
    /// no use for the next alone. Whether it was asked: not without EVENT_IDX. If it was not, the device has to look,
    /// for chains may have come meanwhile that the driver has not announced. A batch that finds the queue empty asks
    /// for the next chain again.
    pub fn await_second(&mut self) -> bool {
        if self.failure.is_some() || !self.ring.event_idx_enabled() || !self.is_empty() {
            return false;
        }
        // avail_event lies behind the used ring's elements (§2.7.8).
        let offset = 4 + 8 * u64::from(self.ring.size());
        let event = self.ring.next_avail().wrapping_add(1).to_le();
        let Some(address) = self.ring.used_ring().checked_add(offset).map(GuestAddress) else { return false };
        let asked = self.memory.store(event, address, Ordering::Relaxed).is_ok();
        // The driver reads avail_event after it has written its index.
        fence(Ordering::SeqCst);
        asked && self.is_empty()
    }

    fn is_empty(&self) -> bool {
        let available = self.ring.avail_idx(&self.memory, Ordering::Acquire);
        available.is_ok_and(|index| index.0 == self.ring.next_avail())
    }

    /// Interrupts the driver, if it asked for that, for what [`Batch::end_quietly`] has ended.
    pub fn interrupt(&mut self) {
        self.borrow().interrupt();
    }

    fn borrow(&mut self) -> Batch<'_> {
        let budget = u32::from(self.ring.size()) * 4;
        let Self { memory, signals, ring, failure, unannounced } = self;
        Batch {
            memory,
            signals,
            ring,
            failure,
            unannounced,
            spare: Vec::new(),
            open: None,
            aside: Vec::new(),
            completed: 0,
            budget,
        }
    }

    /// Borrows the queue for one round of work, of at most four times as many chains as it has descriptors.
    pub fn batch(&mut self) -> Batch<'_> {
        let mut batch = self.borrow();
        if batch.failure.is_none() && batch.ring.disable_notification(batch.memory).is_err() {
            batch.fail(QueueError::Ring);
        }
        batch
    }
}

/// One round of work on a queue. Dropping it interrupts the driver if the driver asked for that.
#[derive(Debug)]
pub struct Batch<'q> {
    memory: &'q Memory,
    signals: &'q Signals,
    ring: &'q mut virtio_queue::Queue,
    failure: &'q mut Option<QueueError>,
    unannounced: &'q mut u16,
    /// The capacity of completed chains, so that a batch allocates once.
    spare: Vec<Slice<'q>>,
    /// The chain that was given out and has not come back.
    open: Option<u16>,
    /// Chains that were set aside, the newest last.
    aside: Vec<u16>,
    completed: u32,
    budget: u32,
}

impl<'q> Batch<'q> {
    /// The next available chain. `None` when the queue is empty (the driver will notify), broken, or when this
    /// round has done enough: [`Batch::progress`] tells.
    ///
    /// One chain is out at a time: one that was dropped is given back first, with nothing written.
    #[expect(clippy::should_implement_trait, reason = "an iterator could not be completed into")]
    pub fn next(&mut self) -> Option<Chain<'q>> {
        self.close(0);
        if self.failure.is_some() || self.budget == 0 {
            return None;
        }
        match self.take() {
            Ok(chain) => chain,
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    fn take(&mut self) -> Result<Option<Chain<'q>>, QueueError> {
        let head = loop {
            // Every look costs, or a driver that moves its index back and forth could keep us here.
            let Some(budget) = self.budget.checked_sub(1) else { return Ok(None) };
            self.budget = budget;
            let mut heads = self.ring.iter(self.memory).map_err(|_| QueueError::Ring)?;
            if let Some(chain) = heads.next() {
                break chain.head_index();
            }
            // Empty: ask for a notification, and look again, for the driver may have been quicker.
            if !self.ring.enable_notification(self.memory).map_err(|_| QueueError::Ring)? {
                return Ok(None);
            }
        };
        let table = GuestAddress(self.ring.desc_table());
        let spare = std::mem::take(&mut self.spare);
        let chain = Chain::walk(self.memory, table, self.ring.size(), head, spare)?;
        self.open = Some(head);
        Ok(Some(chain))
    }

    /// Gives a chain back to the driver, `written` bytes of its writable part having been written.
    pub fn complete(&mut self, chain: Chain<'q>, written: u32) {
        debug_assert_eq!(self.open, Some(chain.head()), "the chain is from another batch");
        self.close(written);
        self.spare = chain.into_segments();
    }

    /// Puts a chain back unused, to be given out again by a later batch. The driver is not told.
    pub fn put_back(&mut self, chain: Chain<'q>) {
        debug_assert_eq!(self.open, Some(chain.head()), "the chain is from another batch");
        if self.open.take().is_some() {
            self.ring.go_to_previous_position();
        }
        self.spare = chain.into_segments();
    }

    /// Keeps a chain for [`Batch::complete_aside`], so that the next one can be had beside it.
    pub fn set_aside(&mut self, chain: Chain<'q>) {
        debug_assert_eq!(self.open, Some(chain.head()), "the chain is from another batch");
        self.aside.extend(self.open.take());
        self.spare = chain.into_segments();
    }

    /// Gives the chains that were set aside back to the driver, in their order and so that it sees all of them or
    /// none; `written` has the bytes written to each. Those for which `written` has nothing are put back.
    pub fn complete_aside(&mut self, written: &[u32]) {
        if self.aside.is_empty() {
            return;
        }
        let unused = self.aside.split_off(written.len().min(self.aside.len()));
        unused.iter().for_each(|_| self.ring.go_to_previous_position());
        for (head, written) in std::mem::take(&mut self.aside).into_iter().zip(written) {
            self.put_used(head, *written);
        }
        self.publish();
    }

    fn close(&mut self, written: u32) {
        if let Some(head) = self.open.take() {
            self.put_used(head, written);
            self.publish();
        }
    }

    /// Writes a used element, which the driver may look at from the next [`Batch::publish`] on.
    fn put_used(&mut self, head: u16, written: u32) {
        let next = self.ring.next_used();
        let slot = u64::from(next.checked_rem(self.ring.size()).unwrap_or(0));
        let element = u64::from(head) | u64::from(written) << 32;
        // The ring lies in guest memory (`Queue::new`), so that no sum overflows.
        let at = GuestAddress(self.ring.used_ring().wrapping_add(USED_HEADER + USED_ELEMENT * slot));
        if self.memory.write_slice(&element.to_le_bytes(), at).is_err() {
            return self.fail(QueueError::Ring);
        }
        self.ring.set_next_used(next.wrapping_add(1));
        *self.unannounced = self.unannounced.wrapping_add(1);
        self.completed += 1;
    }

    /// Moves the used index past every element that is written (virtio 1.2 §2.7.8.2).
    fn publish(&mut self) {
        let at = GuestAddress(self.ring.used_ring().wrapping_add(USED_INDEX));
        if self.memory.store(self.ring.next_used().to_le(), at, Ordering::Release).is_err() {
            self.fail(QueueError::Ring);
        }
    }

    /// Ends the queue's work until the device is reset: the driver broke a rule.
    pub fn fail(&mut self, error: QueueError) {
        self.budget = 0;
        if self.failure.is_none() {
            *self.failure = Some(error);
            self.signals.fail();
        }
    }

    /// Ends this round here: the chains were costly enough. [`Batch::progress`] is [`Progress::More`] then.
    pub fn rest(&mut self) {
        self.budget = 0;
    }

    /// Whether the queue may hold more that this round will not give out.
    pub fn progress(&self) -> Progress {
        if self.budget == 0 && self.failure.is_none() { Progress::More } else { Progress::Idle }
    }

    /// Interrupts the driver now, if it asked for that, rather than at the batch's end. Whether it was.
    pub fn flush(&mut self) -> bool {
        self.close(0);
        if std::mem::take(&mut self.completed) == 0 || self.failure.is_some() {
            return false;
        }
        self.interrupt()
    }

    /// Ends the round without an interrupt, for a device whose driver is not waiting for these chains; returns how
    /// many there were. The next interrupt of the device tells the driver of them too, for it looks at every queue;
    /// [`Queue::interrupt`] brings one about.
    pub fn end_quietly(mut self) -> u32 {
        self.close(0);
        std::mem::take(&mut self.completed)
    }

    fn interrupt(&mut self) -> bool {
        let wanted = match self.wants_interrupt() {
            Ok(wanted) => wanted,
            Err(error) => {
                self.fail(error);
                false
            }
        };
        if wanted {
            self.signals.used_buffer();
        }
        wanted
    }

    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        let unannounced = std::mem::take(self.unannounced);
        // The driver stores what it wants and then looks at the index; this side does it the other way round.
        fence(Ordering::SeqCst);
        let event_idx = self.ring.event_idx_enabled();
        let used_event = AVAILABLE_HEADER + AVAILABLE_ELEMENT * u64::from(self.ring.size());
        let at = self.ring.avail_ring().wrapping_add(if event_idx { used_event } else { 0 });
        let word: u16 =
            self.memory.load(GuestAddress(at), Ordering::Acquire).map_err(|_| QueueError::Ring)?;
        let word = u16::from_le(word);
        if event_idx {
            // Whether one of the completions that the driver has not heard of is the one it waits for (§2.7.10).
            let ahead = self.ring.next_used().wrapping_sub(word).wrapping_sub(1);
            return Ok(ahead < unannounced);
        }
        Ok(word & NO_INTERRUPT == 0)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.complete_aside(&[]);
        self.flush();
    }
}

#[cfg(test)]
mod tests;
