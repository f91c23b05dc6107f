//! What is said to the guest: when there is something, and the segment that says it.

use std::time::Instant;

use super::{Endpoint, Phase, RECEIVE, SHIFT, bundle};
use crate::ring::Pool;
use crate::tcp::segment::Outgoing;
use crate::tcp::seq::Seq;

impl Endpoint {
    /// Bytes that may be sent now, and whether the FIN goes with them.
    fn due(&self, most: usize) -> (usize, bool) {
        if self.phase != Phase::Open && self.phase != Phase::TimeWait {
            return (0, false);
        }
        let sent = self.next.since(self.una);
        let unsent = self.sending.len().saturating_sub(sent);
        let usable = self.una.plus(self.window).since(self.next);
        let mut n = unsent.min(usable).min(most);
        // A window that opens by little is waited for while there is something under way: more than two segments, for
        // fewer the guest does not acknowledge at once.
        let little = bundle(self.window).max(usize::from(self.mss())).min(most);
        if n < unsent && n < little && sent > 0 {
            n = 0;
        }
        let fin = self.finish && !self.finish_acked && n == unsent && sent <= self.sending.len();
        (n, fin)
    }

    /// Whether there is something for the guest.
    pub(crate) fn is_due(&self) -> bool {
        match self.phase {
            Phase::Asked | Phase::Over(_) => false,
            Phase::SynSent => self.next == self.iss,
            Phase::SynReceived => self.next == self.iss || self.acknowledge,
            Phase::Open | Phase::TimeWait => {
                self.acknowledge || self.missing > 0 || self.probe || self.due(usize::MAX) != (0, false)
            }
        }
    }

    /// The next segment for the guest, with at most `most` bytes of payload.
    pub(crate) fn next_segment(&mut self, most: usize, now: Instant, pool: &Pool) -> Option<Outgoing> {
        let segment = match self.phase {
            Phase::Asked | Phase::Over(_) => return None,
            Phase::SynSent | Phase::SynReceived if self.next == self.iss => self.next_syn(pool),
            Phase::SynSent => return None,
            _ => {
                let (len, fin) = self.due(most);
                let offset = self.next.since(self.una);
                if len > 0 || fin {
                    let psh = len > 0 && offset + len == self.sending.len();
                    let segment = Outgoing { fin, psh, offset, len, ..self.acknowledgement(self.next, pool) };
                    self.next = self.next.plus(len).plus(usize::from(fin));
                    segment
                } else if std::mem::take(&mut self.probe) {
                    // A number from before the window makes the guest say where it is (RFC 9293 §3.8.6.1).
                    self.acknowledgement(Seq(self.una.0.wrapping_sub(1)), pool)
                } else if self.acknowledge || self.missing > 0 {
                    self.missing = self.missing.saturating_sub(1);
                    self.acknowledgement(self.highest, pool)
                } else {
                    self.arm(now);
                    return None;
                }
            }
        };
        self.highest = self.highest.latest(self.next);
        self.arm(now);
        Some(segment)
    }

    fn next_syn(&mut self, pool: &Pool) -> Outgoing {
        self.next = self.iss.plus(1);
        let answers = self.phase == Phase::SynReceived;
        let scale = self.scaled.then_some(SHIFT);
        // The window of a SYN is never scaled.
        let window = u16::try_from(self.room(pool).min(0xffff)).unwrap_or(u16::MAX);
        self.edge = self.edge.latest(self.expected.plus(usize::from(window)));
        self.acknowledge = false;
        Outgoing {
            syn: true,
            window,
            scale,
            mss: Some(self.our_mss),
            ..Outgoing::bare(self.iss, answers.then_some(self.expected))
        }
    }

    /// How much more may come from the guest.
    fn room(&self, pool: &Pool) -> usize {
        RECEIVE.saturating_sub(self.receiving.len()).min(pool.room())
    }

    /// A segment that acknowledges everything, and promises a window.
    fn acknowledgement(&mut self, seq: Seq, pool: &Pool) -> Outgoing {
        let shift = if self.scaled { SHIFT } else { 0 };
        // What was promised is kept (RFC 9293 §3.8.6), and what cannot be said is not promised.
        let promised = (self.room(pool) >> shift).min(0xffff) << shift;
        self.edge = self.edge.latest(self.expected.plus(promised));
        let window = u16::try_from(self.edge.since(self.expected) >> shift).unwrap_or(u16::MAX);
        self.acknowledge = false;
        (self.owed, self.owed_until) = (0, None);
        Outgoing { window, ..Outgoing::bare(seq, Some(self.expected)) }
    }
}
