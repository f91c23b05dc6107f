//! A virtio socket (virtio 1.2 §5.10) whose host side is a library: stream sockets without I/O.
//!
//! The owner calls [`Vsock::connect`], [`Vsock::send`], [`Vsock::consume`] and the like, and polls
//! [`Vsock::poll_event`]; the guest's packets come in by [`Device::kick`]. There are no callbacks, threads,
//! descriptors or clocks: a time limit on a connect or a close is the owner's, who ends it by [`Vsock::reset`].
//!
//! - Bytes go from [`Vsock::send`] straight into the guest's receive buffers while the guest grants credit and
//!   has buffers; the rest waits in the stream's own bounded buffer. Streams take turns, packet by packet.
//! - Bytes from the guest wait in the stream's buffer of [`BUF_ALLOC`] bytes, which is what the guest has
//!   credit for, so that a stream nobody reads stops only itself.
//! - Every [`StreamId`] ends in exactly one [`VsockEvent::Closed`], after the last byte was consumed.
//!
//! After any call the owner polls events until there are none:
//!
//! ```
//! use cubby_devices::vsock::{GuestCid, Port, Reason, Vsock, VsockEvent};
//!
//! let mut vsock = Vsock::new(GuestCid::try_from(3)?);
//! vsock.listen(Port(1024));
//! // The driver is not up: the request and its first bytes wait for it.
//! let stream = vsock.connect(Port(1025))?;
//! assert_eq!(vsock.send(stream, b"hello"), 5);
//! vsock.reset(stream);
//! while let Some(event) = vsock.poll_event() {
//!     match event {
//!         VsockEvent::Readable(id) => {
//!             let n = vsock.received(id).len();
//!             vsock.consume(id, n);
//!         }
//!         VsockEvent::Closed(id, reason) => assert_eq!((id, reason), (stream, Reason::Local)),
//!         other => println!("{other:?}"),
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What a guest can make the host keep: [`MAX_STREAMS`] streams of [`BUF_ALLOC`] bytes, and [`MAX_RESETS`]
//! resets to be sent. What does not fit is refused or dropped, and counted ([`Counters`]). A guest that breaks
//! the protocol in a stream loses that stream; one that breaks a ring loses the device.

mod buffer;
mod mux;
mod packet;
mod stream;
#[cfg(test)]
mod tests;

use crate::device::read_config_bytes;
use crate::mmio::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use crate::{Device, DeviceKind, Progress, Queue, QueueError, QueueState};

use mux::Mux;
pub use mux::{Counters, TooManyStreams};
pub use stream::Reason;

/// Bytes from the guest that a stream keeps until they are consumed: the credit each stream has.
pub const BUF_ALLOC: u32 = 260 << 10;
/// Bytes to the guest that a stream keeps until the guest takes them.
pub const SEND_BUFFER: usize = 256 << 10;
/// Streams at a time, in whatever state, until their [`VsockEvent::Closed`] has been polled.
pub const MAX_STREAMS: usize = 1024;
/// Resets waiting for a receive buffer of the guest.
pub const MAX_RESETS: usize = 1024;
/// Descriptors of the receive and transmit queues: with the pages that Linux offers, enough receive buffers for
/// all the credit it grants a stream, and no more, for it fills the queue while it boots.
pub const QUEUE_SIZE: u16 = 128;
/// The host's context identifier.
pub const HOST_CID: u64 = 2;

/// VIRTIO_VSOCK_F_STREAM.
const F_STREAM: u64 = 1;
const TX: usize = 1;
const EVENT: usize = 2;
/// Receive, transmit, event.
const SIZES: [u16; 3] = [QUEUE_SIZE, QUEUE_SIZE, 8];
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// So many of the guest's packets may be taken without telling it: an eighth of its queue is theirs then.
const MAX_UNTOLD: u32 = QUEUE_SIZE as u32 / 8;

/// A guest's context identifier: 3 or more, and 32 bits (§5.10.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestCid(u32);

/// A number that cannot be a guest's context identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is reserved and cannot be a guest's cid")]
pub struct ReservedCid(pub u32);

impl GuestCid {
    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for GuestCid {
    type Error = ReservedCid;

    fn try_from(cid: u32) -> Result<Self, ReservedCid> {
        if (3..u32::MAX).contains(&cid) { Ok(Self(cid)) } else { Err(ReservedCid(cid)) }
    }
}

/// A port of either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port(pub u32);

/// Names one stream for as long as the device lives; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

/// A direction that is being given up, seen from whoever gives it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It will not receive any more.
    Read,
    /// It will not send any more.
    Write,
    /// Neither.
    Both,
}

/// What happened to the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VsockEvent {
    /// The guest accepted a [`Vsock::connect`].
    Connected(StreamId),
    /// The guest connected to a port that the host listens on.
    Accepted {
        /// The new stream.
        id: StreamId,
        /// The host's port.
        port: Port,
    },
    /// Bytes arrived since the last such event; [`Vsock::received`] has them.
    Readable(StreamId),
    /// After a [`Vsock::send`] that took less than it was given: there is room again.
    Writable(StreamId),
    /// The guest gives up one direction, or both. `Write` is its end of file, after what is still unread.
    PeerShutdown(StreamId, How),
    /// The stream is over and its id is forgotten. The last event of every stream.
    Closed(StreamId, Reason),
    /// One round of sending or taking was not enough: poll again, after whatever else is to do.
    Again,
}

/// A virtio socket device and the host's end of all its streams.
#[derive(Debug)]
pub struct Vsock {
    queues: [Option<Queue>; 3],
    mux: Mux,
    /// The guest is to be told that all its streams are gone.
    transport_reset: bool,
    /// A round of sending ended before there was nothing left to send.
    unfinished: bool,
    /// The owner calls [`Vsock::tell`].
    patient: bool,
    /// Packets taken of which the guest was not told.
    untold: u32,
    /// The guest does not announce its next packet.
    silent: bool,
    /// A round of [`Vsock::look`] ended before there was nothing left to take.
    unread: bool,
}

impl Vsock {
    /// A device without streams.
    pub fn new(guest: GuestCid) -> Self {
        Self {
            queues: [None, None, None],
            mux: Mux::new(guest),
            transport_reset: false,
            unfinished: false,
            patient: false,
            untold: 0,
            silent: false,
            unread: false,
        }
    }

    /// Lets the guest wait for the news that its packets were taken until there is something for it to receive,
    /// or many of them: of a question and its answer, the guest then takes one interrupt instead of two, each of
    /// which costs two exits. And lets the guest not announce the first packet after a question: Linux sends its credit
    /// when it has read the last byte there is, and then the answer, which announces both. The owner promises to call
    /// [`Vsock::tell`] some milliseconds after [`Vsock::has_untold`], for the guest frees what it sent only then, and a
    /// packet that no other follows is seen only then.
    pub fn be_patient(&mut self) {
        self.patient = true;
    }

    /// Whether the guest waits for the news that its packets were taken, or need not have announced one.
    pub fn has_untold(&self) -> bool {
        self.untold > 0 || self.silent
    }

    /// Takes what the guest has not announced, and tells it which packets were taken.
    pub fn tell(&mut self) {
        if self.silent {
            self.look();
        }
        if std::mem::take(&mut self.untold) > 0
            && let [_, Some(tx), _] = &mut self.queues
        {
            tx.interrupt();
        }
    }

    /// The guest's context identifier.
    pub fn guest_cid(&self) -> GuestCid {
        self.mux.guest()
    }

    /// Lets the guest connect to a port of the host. Any other port answers with RST.
    pub fn listen(&mut self, port: Port) {
        self.mux.listen(port);
    }

    /// Connects to a port of the guest from a fresh port of the host. Before the driver is up, the request
    /// waits for it. [`VsockEvent::Connected`] or [`VsockEvent::Closed`] follows; bytes may be sent at once.
    ///
    /// # Errors
    /// [`TooManyStreams`] when there are [`MAX_STREAMS`].
    pub fn connect(&mut self, port: Port) -> Result<StreamId, TooManyStreams> {
        let id = self.mux.connect(port)?;
        self.pump();
        Ok(id)
    }

    /// Sends bytes; returns how many were taken. Less than all means that the stream's buffer is full, and
    /// that [`VsockEvent::Writable`] follows; zero also that the stream is shut down or unknown.
    pub fn send(&mut self, id: StreamId, data: &[u8]) -> usize {
        // Whoever waits goes first.
        self.pump();
        let mut sent = 0;
        if let [Some(rx), ..] = &mut self.queues
            && self.mux.may_bypass(id)
        {
            let mut batch = rx.batch();
            while let Some(rest) = data.get(sent..).filter(|rest| !rest.is_empty()) {
                if !self.mux.may_bypass(id) {
                    break;
                }
                let Some(mut chain) = batch.next() else { break };
                match self.mux.send_now(id, rest, &mut chain) {
                    Ok((bytes, written)) => {
                        sent += bytes;
                        batch.complete(chain, written);
                    }
                    Err(error) => batch.fail(error),
                }
            }
            if batch.flush() {
                self.untold = 0;
            }
        }
        let taken = sent + self.mux.buffer(id, data.get(sent..).unwrap_or(&[]));
        // What waits for credit may have to ask for it; what waits for buffers has none now.
        self.pump();
        if self.patient {
            self.await_answer(id, sent > 0 && taken == data.len());
        }
        taken
    }

    /// After bytes went to the guest: its next packet is its credit for them, and worth nothing alone, unless the credit
    /// is needed.
    fn await_answer(&mut self, id: StreamId, sent: bool) {
        let [_, Some(tx), _] = &mut self.queues else { return };
        if sent && self.mux.has_credit_to_spare(id) {
            self.silent = tx.await_second();
            if self.silent {
                return;
            }
        } else if !self.silent {
            return;
        }
        self.look();
    }

    /// Takes the guest's packets without having been told of any.
    fn look(&mut self) {
        self.unread = self.receive() == Progress::More;
        self.pump();
    }

    /// How many bytes [`Vsock::send`] takes at least.
    pub fn sendable(&self, id: StreamId) -> usize {
        self.mux.sendable(id)
    }

    /// The bytes that came from the guest and have not been consumed.
    pub fn received(&self, id: StreamId) -> &[u8] {
        self.mux.received(id)
    }

    /// Forgets the first `n` received bytes, which gives the guest credit for as many.
    pub fn consume(&mut self, id: StreamId, n: usize) {
        self.mux.consume(id, n);
        self.pump();
    }

    /// Gives up a direction: `Write` after what was sent before, `Read` at once, unread bytes included. The
    /// guest answers `Both` with a reset, which closes the stream.
    pub fn shutdown(&mut self, id: StreamId, how: How) {
        self.mux.shutdown(id, how);
        self.pump();
    }

    /// Ends a stream at once, dropping what is unread and unsent.
    pub fn reset(&mut self, id: StreamId) {
        self.mux.reset(id);
        self.pump();
    }

    /// Ends every stream, and tells the guest that they are gone: after a restore, the guest still believes
    /// in streams that no longer have a host side (§5.10.6.7). The guest also reads its identifier anew.
    pub fn reset_all(&mut self, guest: GuestCid) {
        self.mux.set_guest(guest);
        self.mux.end_all();
        self.transport_reset = true;
        self.announce_reset();
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<VsockEvent> {
        if self.unfinished {
            self.pump();
        }
        let event = self.mux.poll_event();
        if event.is_none() && self.unread {
            self.look();
            return Some(VsockEvent::Again);
        }
        event.or_else(|| self.unfinished.then_some(VsockEvent::Again))
    }

    /// What was dropped or refused so far.
    pub fn counters(&self) -> Counters {
        self.mux.counters()
    }

    /// Puts what waits into the guest's receive buffers, one round at most.
    fn pump(&mut self) {
        self.unfinished = false;
        let [Some(rx), ..] = &mut self.queues else { return };
        if !self.mux.has_outgoing() {
            return;
        }
        let mut batch = rx.batch();
        while self.mux.has_outgoing() {
            let Some(mut chain) = batch.next() else { break };
            match self.mux.send_next(&mut chain) {
                Ok(Some(written)) => batch.complete(chain, written),
                Ok(None) => batch.put_back(chain),
                Err(error) => batch.fail(error),
            }
        }
        self.unfinished = self.mux.has_outgoing() && batch.progress() == Progress::More;
        if batch.flush() {
            self.untold = 0;
        }
    }

    /// Takes the guest's packets, one round at most.
    fn receive(&mut self) -> Progress {
        self.silent = false;
        let [_, Some(tx), _] = &mut self.queues else { return Progress::Idle };
        let mut batch = tx.batch();
        while let Some(mut chain) = batch.next() {
            match self.mux.receive(&mut chain) {
                Ok(()) => batch.complete(chain, 0),
                Err(error) => batch.fail(error.into()),
            }
        }
        let progress = batch.progress();
        if self.patient && self.untold < MAX_UNTOLD {
            self.untold += batch.end_quietly();
        } else {
            self.untold = 0;
        }
        progress
    }

    fn announce_reset(&mut self) {
        let [_, _, Some(events)] = &mut self.queues else { return };
        if !self.transport_reset {
            return;
        }
        let mut batch = events.batch();
        let Some(mut chain) = batch.next() else { return };
        if chain.writable_len() < 4 {
            return batch.fail(QueueError::Malformed);
        }
        chain.write(&TRANSPORT_RESET.to_le_bytes());
        batch.complete(chain, 4);
        self.transport_reset = false;
    }
}

impl Device for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.guest_cid().get()).to_le_bytes(), offset, data);
    }

    fn acknowledge(&mut self, _features: u64) {}

    fn start_queue(&mut self, index: usize, queue: Queue) {
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        self.queues.get_mut(index)?.take().map(Queue::stop)
    }

    fn kick(&mut self, index: usize) -> Progress {
        let progress = match index {
            TX => self.receive(),
            EVENT => {
                self.announce_reset();
                return Progress::Idle;
            }
            _ => Progress::Idle,
        };
        self.pump();
        if self.unfinished { Progress::More } else { progress }
    }

    /// The driver is gone, and every stream it knew with it. A connect that it has not seen waits for the next.
    fn driver_gone(&mut self) {
        self.transport_reset = false;
        self.untold = 0;
        (self.silent, self.unread) = (false, false);
        self.mux.end_all();
    }
}
