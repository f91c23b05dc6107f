//! A virtio network card (virtio 1.2 §5.1) over any [`Backend`]: one receive queue, one transmit queue, no control
//! queue.
//!
//! Frames carry what is left to do for them as a typed value, an [`Offload`]: checksums that nobody needs are never
//! computed, and one frame of up to 64 KiB stands for many segments in either direction.
//!
//! - **From the guest**: the 12-byte header is copied once and checked; the backend gets the frame as slices of guest
//!   memory, so that the one copy is the backend's own. The guest may change these bytes at any time: whatever the
//!   backend decides by, it copies first.
//! - **To the guest**: the backend is asked only while the guest has buffers, and writes the frame straight into
//!   them. Nothing is kept here in either direction.
//! - A frame that cannot be (see [`Refused`]) is dropped and counted, as a card would. A chain that breaks a rule of
//!   the queue, has no room for a header, or has buffers of the wrong direction, breaks the device.
//!
//! The owner calls [`Device::kick`] for the guest's notifications and [`Net::poll`] whenever the backend may have
//! something new.

mod address;
mod backend;
mod counters;
mod header;
mod room;

use serde::{Deserialize, Serialize};

use crate::device::read_config_bytes;
use crate::mmio::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use crate::{Device, DeviceKind, Progress, Queue, QueueError, QueueState};

pub use address::{Mac, Mtu, NotAStation, SmallMtu};
pub use backend::{Backend, Frame, Sent};
pub use counters::{Counters, Refused, Traffic};
pub use header::{Checksum, MAX_DATAGRAMS, MAX_FRAME, Offload, Offloads, Segmentation, Segments};
use header::{HEADER, Wrong};
use room::{Found, Room};

/// Descriptors of each queue: with the buffers of about 1.5 KiB that Linux begins with, six frames of 64 KiB.
pub const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;

/// Frames, and bytes in a round, of whose end a patient card does not tell: what a guest sends that waits for an answer. Who
/// sends more may wait for the room that it takes.
const MAX_UNTOLD: u32 = 4;
const LITTLE: usize = 2 << 10;

/// Bytes moved in one direction after which a kick lets others have the device: a pause waits for no more than that.
const ROUND: usize = 1 << 20;

/// Feature bits (§5.1.3).
mod feature {
    pub const CSUM: u64 = 1;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const GUEST_USO: u64 = 3 << 54;
    pub const HOST_USO: u64 = 1 << 56;
}

/// The bit of the status field that says that the link is up (§5.1.4).
const LINK_UP: u16 = 1;

/// What continues a device beside its [`TransportState`](crate::TransportState): what its driver knows of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    version: u16,
    mac: Mac,
    mtu: Mtu,
    link_up: bool,
}

/// The version of [`NetState`] that is written.
const STATE_VERSION: u16 = 1;

/// A state from another version of this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the saved network device has version {saved}, and this one takes {STATE_VERSION}: boot the guest anew"
)]
pub struct StateVersion {
    /// The version of what was saved.
    pub saved: u16,
}

/// A virtio network card.
#[derive(Debug)]
pub struct Net<B> {
    backend: B,
    mac: Mac,
    mtu: Mtu,
    link_up: bool,
    features: u64,
    /// What the driver accepted.
    takes: Offloads,
    gives: Offloads,
    merges: bool,
    queues: [Option<Queue>; 2],
    /// The backend had no room for the guest's next frame.
    full: bool,
    /// See [`Net::be_patient`]; and the guest's frames of whose end it has not been told.
    patient: bool,
    untold: u32,
    counters: Counters,
}

impl<B: Backend> Net<B> {
    /// A card with its link up.
    pub fn new(backend: B, mac: Mac, mtu: Mtu) -> Self {
        use feature::{MAC, MRG_RXBUF, MTU, STATUS};
        let mut features = VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | MAC | MTU | MRG_RXBUF | STATUS;
        features |= to_bits(backend.takes(), HOST) | to_bits(backend.gives(), GUEST);
        Self {
            backend,
            mac,
            mtu,
            link_up: true,
            features,
            takes: Offloads::default(),
            gives: Offloads::default(),
            merges: false,
            queues: [None, None],
            full: false,
            patient: false,
            untold: 0,
            counters: Counters::default(),
        }
    }

    /// Lets the guest hear that a small frame of its own is done with the answer to it, which spares a guest that asks and
    /// is answered one of two interrupts. The owner promises to call [`Net::tell`] about a millisecond after
    /// [`Net::has_untold`], for the guest frees what it sent only then, and may not send more before.
    pub fn be_patient(&mut self) {
        self.patient = true;
    }

    /// Whether frames of the guest are done of which it has not been told.
    pub fn has_untold(&self) -> bool {
        self.untold > 0
    }

    /// Tells the guest of them.
    pub fn tell(&mut self) {
        if std::mem::take(&mut self.untold) > 0
            && let [_, Some(queue)] = &mut self.queues
        {
            queue.interrupt();
        }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, for its owner to tell it of the host's events. [`Net::poll`] follows.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The address that the guest is told.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Plugs the cable in or out. The guest is told; while it is out, what it sends is dropped and the backend is
    /// not asked for anything. [`Net::poll`] follows.
    pub fn set_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.link_up, up) != up
            && let Some(queue) = self.queues.iter().flatten().next()
        {
            queue.signals().config_change();
        }
    }

    /// What the driver knows of this device, to be given to [`Net::restore`].
    pub fn state(&self) -> NetState {
        NetState { version: STATE_VERSION, mac: self.mac, mtu: self.mtu, link_up: self.link_up }
    }

    /// Makes this device, whose queues are stopped, the one that a driver knows already.
    ///
    /// # Errors
    /// [`StateVersion`] if the state is of another version; then nothing has changed.
    pub fn restore(&mut self, state: &NetState) -> Result<(), StateVersion> {
        if state.version != STATE_VERSION {
            return Err(StateVersion { saved: state.version });
        }
        (self.mac, self.mtu, self.link_up) = (state.mac, state.mtu, state.link_up);
        Ok(())
    }

    /// Goes on with what waited for the backend: frames for the guest, and the guest's own if the backend was full.
    pub fn poll(&mut self) -> Progress {
        let transmitted = if self.full { self.transmit() } else { Progress::Idle };
        self.exchange(transmitted)
    }

    /// The second half of every round: the backend works, and what it has goes to the guest.
    fn exchange(&mut self, transmitted: Progress) -> Progress {
        self.backend.settle();
        let before = self.counters.received.frames;
        let received = self.receive();
        // What the guest has received may have made room for what it sends, and nobody else would look.
        let has_room = self.full && self.counters.received.frames != before;
        if received == Progress::More || has_room { Progress::More } else { transmitted }
    }

    /// Takes the guest's frames, one round at most.
    fn transmit(&mut self) -> Progress {
        self.full = false;
        let [_, Some(queue)] = &mut self.queues else { return Progress::Idle };
        let mut batch = queue.batch();
        let mut moved = 0;
        while let Some(mut chain) = batch.next() {
            let header = match chain.read_array::<HEADER>() {
                Ok(header) if chain.writable_len() == 0 => header,
                Ok(_) => {
                    batch.fail(QueueError::Malformed);
                    break;
                }
                Err(error) => {
                    batch.fail(error.into());
                    break;
                }
            };
            let len = chain.readable_len();
            match Offload::decode(header, len, self.takes, self.mtu) {
                Err(wrong) => self.counters.transmit_refused.count(wrong),
                Ok(_) if !self.link_up => self.counters.transmit_refused.link_down += 1,
                Ok(offload) => match self.backend.transmit(Frame { offload, len, data: chain.readable() }) {
                    Sent::Taken => self.counters.transmitted.count(len),
                    Sent::Full => {
                        self.full = true;
                        self.untold = 0;
                        batch.put_back(chain);
                        return Progress::Idle;
                    }
                },
            }
            batch.complete(chain, 0);
            moved += len;
            if moved >= ROUND {
                batch.rest();
            }
        }
        let progress = batch.progress();
        if self.patient && moved <= LITTLE && self.untold < MAX_UNTOLD {
            self.untold += batch.end_quietly();
        } else {
            self.untold = 0;
        }
        progress
    }

    /// Gives the guest the backend's frames, one round at most.
    fn receive(&mut self) -> Progress {
        let [Some(queue), _] = &mut self.queues else { return Progress::Idle };
        if !self.link_up || queue.failure().is_some() {
            return Progress::Idle;
        }
        if self.backend.pending().is_none() {
            return Progress::Idle;
        }
        let chains = if self.merges { usize::from(queue.size()) } else { 1 };
        let mut batch = queue.batch();
        let mut room = Room::default();
        let mut moved = 0;
        while let Some(most) = self.backend.pending() {
            let most = most.min(MAX_FRAME);
            match room.gather(&mut batch, most, chains) {
                Err(error) => batch.fail(error),
                Ok(Found::NotYet) => break,
                Ok(Found::TooLittle) => {
                    self.backend.discard();
                    self.counters.receive_refused.room += 1;
                }
                Ok(Found::Enough) => {
                    if let Some((len, offload)) = self.backend.receive(room.data()) {
                        match offload.check(len, self.gives, self.mtu) {
                            Ok(()) if len <= most => {
                                batch.complete_aside(&room.close(len, |buffers| offload.encode(buffers)));
                                self.counters.received.count(len);
                                moved += len;
                            }
                            Ok(()) => self.counters.receive_refused.count(Wrong::Length),
                            Err(wrong) => self.counters.receive_refused.count(wrong),
                        }
                    }
                }
            }
            // What the frame has not filled is there for the next one.
            batch.complete_aside(&[]);
            if moved >= ROUND {
                batch.rest();
            }
        }
        let progress = batch.progress();
        if batch.flush() {
            // The driver looks at both queues.
            self.untold = 0;
        }
        progress
    }
}

/// A side's offloads by their feature bits: checksum, TCP over IPv4 and IPv6, UDP.
const HOST: [u64; 4] = [feature::CSUM, feature::HOST_TSO4, feature::HOST_TSO6, feature::HOST_USO];
const GUEST: [u64; 4] = [feature::GUEST_CSUM, feature::GUEST_TSO4, feature::GUEST_TSO6, feature::GUEST_USO];

fn to_bits(offloads: Offloads, [checksum, tcp4, tcp6, udp]: [u64; 4]) -> u64 {
    let pick = |offered: bool, bits: u64| if offered { bits } else { 0 };
    let cut = pick(offloads.tcp4, tcp4) | pick(offloads.tcp6, tcp6) | pick(offloads.udp, udp);
    pick(offloads.checksum, checksum | cut)
}

/// What a driver took without what it depends on (§5.1.3.1) counts as not taken.
fn from_bits(features: u64, [checksum, tcp4, tcp6, udp]: [u64; 4]) -> Offloads {
    let has = |bits: u64| features & (checksum | bits) == checksum | bits;
    Offloads { checksum: has(0), tcp4: has(tcp4), tcp6: has(tcp6), udp: has(udp) }
}

impl<B: Backend> Device for Net<B> {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [m0, m1, m2, m3, m4, m5] = self.mac.octets();
        let [s0, s1] = if self.link_up { LINK_UP } else { 0 }.to_le_bytes();
        let [mtu0, mtu1] = self.mtu.get().to_le_bytes();
        // Between them is the number of queue pairs, for drivers that have negotiated more than one.
        read_config_bytes(&[m0, m1, m2, m3, m4, m5, s0, s1, 0, 0, mtu0, mtu1], offset, data);
    }

    fn acknowledge(&mut self, features: u64) {
        self.takes = from_bits(features, HOST);
        self.gives = from_bits(features, GUEST);
        self.merges = features & feature::MRG_RXBUF != 0;
        self.backend.negotiated(self.gives);
    }

    fn start_queue(&mut self, index: usize, queue: Queue) {
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        if index == TX {
            // Who continues the queue does not know of them.
            self.tell();
        }
        self.queues.get_mut(index)?.take().map(Queue::stop)
    }

    fn kick(&mut self, index: usize) -> Progress {
        match index {
            RX => self.receive(),
            TX => {
                let transmitted = self.transmit();
                self.exchange(transmitted)
            }
            _ => Progress::Idle,
        }
    }

    fn driver_gone(&mut self) {
        self.full = false;
        self.untold = 0;
        self.backend.driver_gone();
    }
}

#[cfg(test)]
mod tests;
