//! The guest's peer: one end of one TCP connection, without I/O (RFC 9293).
//!
//! The link to the guest is a queue in memory, lossless and in order, and its other end has a kernel that does all
//! that TCP asks for. So this end does what correctness needs and no more. It has windows with scaling and moves segments of
//! up to 64 KiB. It repeats what was not acknowledged, all from the first missing byte on, and probes windows that stay closed. It
//! has no congestion control, no timestamps and no selective acknowledgement; what comes out of order is not kept but
//! acknowledged as missing.
//!
//! Bytes from the guest go to a sink as they come, and only what the sink does not take is kept: what the window
//! has promised, at most. Bytes for the guest are kept until it has acknowledged them.

mod hear;
mod speak;

use std::time::{Duration, Instant};

use super::segment::{Outgoing, Segment};
use super::seq::Seq;
use crate::ring::{Pool, Ring};

/// The most bytes that wait for the host's side.
pub(crate) const RECEIVE: usize = 512 << 10;
/// The most bytes that wait for the guest's acknowledgement.
pub(crate) const SEND: usize = 1 << 20;
/// The most that is waited for to be sent at once.
const BUNDLE: usize = 64 << 10;
/// How our window is scaled: `RECEIVE` needs three.
const SHIFT: u8 = 4;
/// How long an acknowledgement takes at most, before it is taken for lost. The guest may be busy, but the link cannot be.
const FIRST_TIMEOUT: Duration = Duration::from_millis(300);
const LAST_TIMEOUT: Duration = Duration::from_secs(10);
/// Repetitions without an answer after which the guest has forgotten the connection: about a minute.
const REPETITIONS: u8 = 10;
/// Acknowledgements of the same byte after which the next is taken for lost (RFC 5681 §3.2).
const DUPLICATES: u8 = 3;
/// How long the acknowledgement of less than two segments waits for bytes that could take it along, which spares a guest that
/// asks and is answered one of two interrupts. RFC 1122 §4.2.3.2 allows half a second, but a guest with Nagle's
/// algorithm, which sends no second piece before the first is acknowledged, should not feel it.
const LAZY: Duration = Duration::from_millis(1);
/// How long a closed connection answers repeated FINs. Nothing lingers on this link.
const TIME_WAIT: Duration = Duration::from_secs(1);
/// What a peer without the option takes (RFC 9293 §3.7.1).
const DEFAULT_MSS: u16 = 536;
/// Less would be a trap: 64 KiB in segments of some bytes.
const LEAST_MSS: u16 = 88;

/// Where a connection is. Half-closed states are told by [`Endpoint::finished`] and [`Endpoint::heard_all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The guest asks, and has no answer yet.
    Asked,
    /// We ask.
    SynSent,
    /// We have answered, or both have asked.
    SynReceived,
    /// Bytes move.
    Open,
    /// Both have finished, and we did first.
    TimeWait,
    /// It is over.
    Over(Ending),
}

/// How it was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Both have finished.
    Finished,
    /// The guest broke it off.
    Reset,
    /// The guest did not answer.
    TimedOut,
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Endpoint {
    phase: Phase,
    /// The largest payload that the guest takes, and ours.
    peer_mss: u16,
    our_mss: u16,

    iss: Seq,
    /// First byte that is not acknowledged, next to be sent, and behind the last that ever was.
    una: Seq,
    next: Seq,
    highest: Seq,
    window: usize,
    scale: u8,
    /// Segment of the last window update (SND.WL1 and SND.WL2).
    updated: (Seq, Seq),
    sending: Ring,
    finish: bool,
    finish_acked: bool,

    /// Next byte expected, and the end of the window that was promised.
    expected: Seq,
    edge: Seq,
    scaled: bool,
    receiving: Ring,
    heard_all: bool,
    /// Whether our FIN was sent before the guest's had come.
    first_to_finish: bool,

    acknowledge: bool,
    /// Bytes that are not acknowledged yet, and until when that may wait.
    owed: usize,
    owed_until: Option<Instant>,
    /// Acknowledgements for segments behind a missing one: each counts to the guest (RFC 5681 §3.2).
    missing: u8,
    probe: bool,
    duplicates: u8,
    recover: Seq,
    timeout: Duration,
    repetitions: u8,
    deadline: Option<Instant>,
}

impl Endpoint {
    fn new(phase: Phase, iss: Seq, our_mss: u16) -> Self {
        Endpoint {
            phase,
            peer_mss: DEFAULT_MSS,
            our_mss,
            iss,
            una: iss,
            next: iss,
            highest: iss,
            window: 0,
            scale: 0,
            updated: (Seq(0), Seq(0)),
            sending: Ring::default(),
            finish: false,
            finish_acked: false,
            expected: Seq(0),
            edge: Seq(0),
            scaled: true,
            receiving: Ring::default(),
            heard_all: false,
            first_to_finish: false,
            acknowledge: false,
            owed: 0,
            owed_until: None,
            missing: 0,
            probe: false,
            duplicates: 0,
            recover: iss,
            timeout: FIRST_TIMEOUT,
            repetitions: 0,
            deadline: None,
        }
    }

    /// The end that the guest's SYN asks for. It is silent until [`Endpoint::answer`].
    pub(crate) fn asked(syn: &Segment<'_>, iss: Seq, our_mss: u16) -> Self {
        let mut endpoint = Self::new(Phase::Asked, iss, our_mss);
        endpoint.hear_syn(syn);
        endpoint
    }

    /// The end that asks the guest.
    pub(crate) fn asking(iss: Seq, our_mss: u16) -> Self {
        Self::new(Phase::SynSent, iss, our_mss)
    }

    /// Answers the guest's SYN.
    pub(crate) fn answer(&mut self) {
        if self.phase == Phase::Asked {
            self.phase = Phase::SynReceived;
        }
    }

    fn hear_syn(&mut self, syn: &Segment<'_>) {
        self.expected = syn.seq.plus(1);
        self.edge = self.expected;
        self.peer_mss = syn.mss.unwrap_or(DEFAULT_MSS).max(LEAST_MSS);
        // Scaling holds both ways or not at all (RFC 7323 §2.2).
        self.scaled = syn.scale.is_some();
        self.scale = syn.scale.unwrap_or(0).min(14);
        self.window = usize::from(syn.window);
        self.updated = (syn.seq, self.una);
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// The number of the guest's SYN.
    pub(crate) fn syn_heard(&self) -> Seq {
        Seq(self.expected.0.wrapping_sub(1))
    }

    /// Whether bytes have begun to move.
    pub(crate) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// The largest payload of one packet to the guest.
    pub(crate) fn mss(&self) -> u16 {
        self.peer_mss.min(self.our_mss)
    }

    /// Bytes from the guest that wait for the host's side.
    pub(crate) fn waiting(&self) -> (&[u8], &[u8]) {
        self.receiving.slices(0, self.receiving.len())
    }

    /// The host's side has taken `n` of them.
    pub(crate) fn taken(&mut self, n: usize, pool: &mut Pool) {
        self.receiving.consume(n, pool);
        // A window that opens again is told once it is worth a segment (RFC 9293 §3.8.6.2.2).
        let open = RECEIVE.saturating_sub(self.receiving.len());
        if open.saturating_sub(self.edge.since(self.expected)) >= RECEIVE / 4 {
            self.acknowledge = true;
        }
    }

    /// Whether the guest has finished and all it said has been taken.
    pub(crate) fn heard_all(&self) -> bool {
        self.heard_all && self.receiving.is_empty()
    }

    /// How many more bytes for the guest are worth having, if `share` may be kept in all: its window, as far as it is not
    /// filled. For a closed window it is one, to probe it for. While some are under way, few more are not worth asking for:
    /// an acknowledgement will come.
    pub(crate) fn appetite(&self, share: usize) -> usize {
        if self.phase != Phase::Open || self.finish {
            return 0;
        }
        let most = self.window.clamp(1, SEND.min(share));
        let room = most.saturating_sub(self.sending.len());
        if self.sending.is_empty() || room >= bundle(most) { room } else { 0 }
    }

    /// Where bytes for the guest go.
    pub(crate) fn sending(&mut self) -> &mut Ring {
        &mut self.sending
    }

    /// There will be no more bytes for the guest.
    pub(crate) fn finish(&mut self) {
        self.finish = true;
    }

    /// The payload of a segment.
    pub(crate) fn payload(&self, segment: &Outgoing) -> (&[u8], &[u8]) {
        self.sending.slices(segment.offset, segment.len)
    }

    /// The same at a later time; `None` if the guest has acknowledged some of it.
    pub(crate) fn still_payload(&self, segment: &Outgoing) -> Option<(&[u8], &[u8])> {
        if segment.len == 0 {
            return Some((&[], &[]));
        }
        let gone = segment.seq.is_before(self.una);
        (!gone).then(|| self.sending.slices(segment.seq.since(self.una), segment.len))
    }

    /// When [`Endpoint::on_time`] is to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        [self.deadline, self.owed_until].into_iter().flatten().min()
    }

    /// Gives all memory back.
    pub(crate) fn release(&mut self, pool: &mut Pool) {
        self.sending.release(pool);
        self.receiving.release(pool);
    }

    /// A reset of this connection, if the guest knows it.
    pub(crate) fn reset(&self) -> Option<Outgoing> {
        match self.phase {
            Phase::Over(_) | Phase::TimeWait | Phase::SynSent => None,
            // As for a port where nobody listens.
            Phase::Asked => Some(Outgoing { rst: true, ..Outgoing::bare(Seq(0), Some(self.expected)) }),
            Phase::SynReceived | Phase::Open => {
                Some(Outgoing { rst: true, ..Outgoing::bare(self.next, Some(self.expected)) })
            }
        }
    }

    /// Whether our FIN has been sent at least once.
    fn finish_sent(&self) -> bool {
        let data = self.una.plus(usize::from(self.una == self.iss)).plus(self.sending.len());
        self.finish_acked || (self.finish && data.is_before(self.highest))
    }

    /// Sets the clock if something has to happen at some time and it runs for nothing yet.
    fn arm(&mut self, now: Instant) {
        match self.phase {
            Phase::TimeWait => {}
            Phase::Asked | Phase::Over(_) => self.deadline = None,
            _ if self.una != self.highest || (self.window == 0 && !self.sending.is_empty()) => {
                self.deadline.get_or_insert(now + self.timeout);
            }
            _ => self.deadline = None,
        }
    }

    /// What the clock asks for: to acknowledge, to repeat, to probe, or to end.
    pub(crate) fn on_time(&mut self, now: Instant) {
        if self.owed_until.take_if(|until| *until <= now).is_some() {
            self.acknowledge = true;
        }
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        if self.phase == Phase::TimeWait {
            self.phase = Phase::Over(Ending::Finished);
            return;
        }
        if self.repetitions >= REPETITIONS {
            self.phase = Phase::Over(Ending::TimedOut);
            return;
        }
        self.timeout = (self.timeout * 2).min(LAST_TIMEOUT);
        if self.una == self.highest || self.window == 0 {
            self.probe = true;
        }
        if self.una != self.highest {
            self.next = self.una;
            self.recover = self.highest;
            self.duplicates = 0;
        }
        // A guest that is paused takes no frames: it is repetitions that count, not time.
        self.repetitions += 1;
    }
}

/// What is worth a segment of its own in a window of this size.
fn bundle(window: usize) -> usize {
    (window / 2).min(BUNDLE)
}

#[cfg(test)]
mod tests;
