//! What the guest says: its segments, its bytes and its acknowledgements (RFC 9293 §3.10.7).

use std::time::Instant;

use super::{DUPLICATES, Ending, Endpoint, FIRST_TIMEOUT, LAZY, Phase, TIME_WAIT};
use crate::ring::Pool;
use crate::tcp::segment::Segment;
use crate::tcp::seq::Seq;

impl Endpoint {
    /// Takes a segment. `sink` takes bytes in order, and says how many.
    pub(crate) fn on_segment(
        &mut self,
        segment: &Segment<'_>,
        now: Instant,
        pool: &mut Pool,
        sink: impl FnOnce(&[u8]) -> usize,
    ) {
        match self.phase {
            Phase::Over(_) => {}
            Phase::Asked => {
                if segment.rst && segment.seq == self.expected {
                    self.phase = Phase::Over(Ending::Reset);
                }
            }
            Phase::SynSent => self.hear_answer(segment),
            Phase::SynReceived | Phase::Open | Phase::TimeWait => self.hear(segment, now, pool, sink),
        }
        self.arm(now);
    }

    /// The answer to our SYN (RFC 9293 §3.10.7.3).
    fn hear_answer(&mut self, segment: &Segment<'_>) {
        let right = segment.ack.is_none_or(|ack| ack == self.highest && ack != self.iss);
        if segment.rst {
            if right && segment.ack.is_some() {
                self.phase = Phase::Over(Ending::Reset);
            }
        } else if segment.syn && right {
            self.hear_syn(segment);
            match segment.ack {
                Some(ack) => {
                    self.una = ack;
                    self.phase = Phase::Open;
                    self.answered();
                    self.acknowledge = true;
                }
                // Both have asked at once: our SYN goes out again, with an acknowledgement.
                None => {
                    self.phase = Phase::SynReceived;
                    self.next = self.iss;
                }
            }
        }
    }

    fn hear(
        &mut self,
        segment: &Segment<'_>,
        now: Instant,
        pool: &mut Pool,
        sink: impl FnOnce(&[u8]) -> usize,
    ) {
        let len = segment.len();
        let known = self.expected.since(segment.seq);
        let old = segment.seq.is_before(self.expected) && known >= len;
        let beyond = self.edge.latest(self.expected).is_before(segment.seq);
        if old || beyond {
            if segment.syn && self.phase == Phase::SynReceived {
                self.next = self.iss;
            } else if !segment.rst {
                self.acknowledge = true;
            }
            return;
        }
        if segment.rst {
            // One that could be guessed is asked about first (RFC 5961 §3.2).
            if segment.seq == self.expected {
                self.phase = Phase::Over(Ending::Reset);
            } else {
                self.acknowledge = true;
            }
            return;
        }
        if segment.syn {
            self.acknowledge = true;
            return;
        }
        let Some(ack) = segment.ack else { return };
        if !self.hear_ack(segment, ack, pool) {
            return;
        }
        if len > 0 {
            if self.expected.is_before(segment.seq) {
                self.acknowledge = true;
                self.missing = DUPLICATES.min(self.missing + 1);
            } else if self.heard_all {
                self.acknowledge = true;
            } else {
                self.missing = 0;
                self.hear_payload(segment, known, now, pool, sink);
            }
        }
        if self.finish_acked && self.heard_all && self.phase == Phase::Open {
            if self.first_to_finish {
                self.phase = Phase::TimeWait;
                self.deadline = Some(now + TIME_WAIT);
            } else {
                self.phase = Phase::Over(Ending::Finished);
            }
        }
    }

    fn hear_payload(
        &mut self,
        segment: &Segment<'_>,
        known: usize,
        now: Instant,
        pool: &mut Pool,
        sink: impl FnOnce(&[u8]) -> usize,
    ) {
        let fresh = segment.payload.get(known..).unwrap_or_default();
        let promised = fresh.get(..self.edge.since(self.expected)).unwrap_or(fresh);
        let mut taken = 0;
        if self.receiving.is_empty() && !promised.is_empty() {
            taken = sink(promised).min(promised.len());
        }
        taken += self.receiving.push(promised.get(taken..).unwrap_or_default(), pool);
        self.expected = self.expected.plus(taken);
        let whole = taken == fresh.len();
        if segment.fin && whole {
            self.expected = self.expected.plus(1);
            self.heard_all = true;
            self.first_to_finish = self.finish_sent();
        }
        self.owed += taken;
        let few = self.owed < 2 * usize::from(self.mss());
        if few && whole && known == 0 && !segment.fin && self.receiving.is_empty() {
            self.owed_until.get_or_insert(now + LAZY);
        } else {
            self.acknowledge = true;
        }
    }

    /// What the guest says about our bytes. `false`: the rest of the segment is not looked at.
    fn hear_ack(&mut self, segment: &Segment<'_>, ack: Seq, pool: &mut Pool) -> bool {
        if self.highest.is_before(ack) {
            self.acknowledge = true;
            return false;
        }
        if self.phase == Phase::SynReceived {
            if ack.since(self.iss) == 0 {
                return false;
            }
            self.phase = Phase::Open;
        }
        if self.una.is_before(ack) {
            let acked = ack.since(self.una) - usize::from(self.una == self.iss);
            if self.finish && ack == self.highest && self.finish_sent() && acked > self.sending.len() {
                self.finish_acked = true;
            }
            self.sending.consume(acked, pool);
            self.una = ack;
            self.next = self.next.latest(ack);
            self.deadline = None;
            self.answered();
        } else if ack == self.una && segment.len() == 0 && self.una != self.highest {
            let window = usize::from(segment.window) << self.scale;
            if window == self.window && !self.una.is_before(self.recover) {
                self.duplicates = self.duplicates.saturating_add(1);
                if self.duplicates == DUPLICATES {
                    self.next = self.una;
                    self.recover = self.highest;
                }
            }
        }
        let (seq, acked) = self.updated;
        if seq.is_before(segment.seq) || (seq == segment.seq && !ack.is_before(acked)) {
            let window = usize::from(segment.window) << self.scale;
            if window > 0 && self.window == 0 {
                self.deadline = None;
            }
            self.window = window;
            self.updated = (segment.seq, ack);
        }
        if self.una == self.highest {
            // A closed window is an answer as well.
            self.repetitions = 0;
        }
        true
    }

    /// The guest lives.
    fn answered(&mut self) {
        self.duplicates = 0;
        self.timeout = FIRST_TIMEOUT;
        self.repetitions = 0;
    }
}
