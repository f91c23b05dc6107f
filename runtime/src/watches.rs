//! A client's views of what happens in the guest's network. They are no sessions in the guest, hold neither the idle
//! time-out nor a drain, and each has a queue of its own, whose length is bounded: a slow reader loses the oldest
//! events, is told how many and where, and delays nobody.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use cubby_protocol::message::NetworkEvent;
use cubby_protocol::{INITIAL_WINDOW, Kind, SessionId, encode};

/// Events that wait for one of them.
const WAITING: usize = 1024;

/// How many a client may have.
pub(crate) const MAX_WATCHES: usize = 16;

struct Watch {
    /// Events, each with the number of those that were lost before it.
    waiting: VecDeque<(u64, Arc<NetworkEvent>)>,
    /// Bytes of payload that may still be sent. It is below zero by less than one event.
    credit: i64,
}

/// Those of one client.
#[derive(Default)]
pub(crate) struct Watches(HashMap<SessionId, Watch>);

impl Watches {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn has(&self, session: SessionId) -> bool {
        self.0.contains_key(&session)
    }

    pub(crate) fn begin(&mut self, session: SessionId) {
        let watch = Watch { waiting: VecDeque::new(), credit: INITIAL_WINDOW.into() };
        self.0.insert(session, watch);
    }

    pub(crate) fn end(&mut self, session: SessionId) {
        self.0.remove(&session);
    }

    pub(crate) fn credit(&mut self, session: SessionId, bytes: u32) {
        if let Some(watch) = self.0.get_mut(&session) {
            watch.credit = (watch.credit + i64::from(bytes)).min(INITIAL_WINDOW.into());
        }
    }

    pub(crate) fn push(&mut self, event: &Arc<NetworkEvent>) {
        for Watch { waiting, .. } in self.0.values_mut() {
            waiting.push_back((event.lost, event.clone()));
            if waiting.len() > WAITING
                && let Some((before, _)) = waiting.pop_front()
                && let Some((lost, _)) = waiting.front_mut()
            {
                *lost = lost.saturating_add(before).saturating_add(1);
            }
        }
    }

    /// Whether some event waits for nothing but its turn.
    pub(crate) fn is_due(&self) -> bool {
        self.0.values().any(|watch| watch.credit > 0 && !watch.waiting.is_empty())
    }

    /// Writes events to `out` until that holds `most` bytes.
    pub(crate) fn write(&mut self, out: &mut Vec<u8>, most: usize) {
        for (session, watch) in &mut self.0 {
            while watch.credit > 0
                && out.len() < most
                && let Some((lost, event)) = watch.waiting.pop_front()
            {
                let before = out.len();
                // An event is small: it always fits.
                let _ = encode(
                    Kind::NetworkEvent,
                    *session,
                    &NetworkEvent { lost, ..NetworkEvent::clone(&event) },
                    out,
                );
                watch.credit -= i64::try_from(out.len() - before).unwrap_or(i64::MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubby_protocol::message::NetworkEventKind;
    use cubby_protocol::{Decoder, decode};

    fn event(at_ns: u64, lost: u64) -> Arc<NetworkEvent> {
        let what = NetworkEventKind::AnswerDropped("x".repeat(200), [127, 0, 0, 1].into());
        Arc::new(NetworkEvent { lost, at_ns, what })
    }

    /// What has been written, by time and number of those lost before.
    fn read(bytes: &[u8]) -> Vec<(u64, u64)> {
        let (mut decoder, mut events) = (Decoder::default(), Vec::new());
        decoder.push(bytes);
        while let Some(frame) = decoder.next_frame().unwrap() {
            assert_eq!(frame.header.kind, Kind::NetworkEvent);
            let event: NetworkEvent = decode(frame.payload()).unwrap();
            events.push((event.at_ns, event.lost));
        }
        events
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_is_told_where() {
        let mut watches = Watches::default();
        watches.begin(SessionId(1));
        let most = u64::try_from(WAITING).unwrap();
        for n in 0..most + 3 {
            watches.push(&event(n, u64::from(n == 2 || n == 5)));
        }
        let mut out = Vec::new();
        watches.write(&mut out, usize::MAX);
        let told = read(&out);
        assert_eq!((told.len(), &told[..4]), (WAITING, &[(3, 4), (4, 0), (5, 1), (6, 0)][..]));
        assert_eq!(told.last(), Some(&(most + 2, 0)));
        assert!(!watches.is_due());
    }

    #[test]
    fn nothing_is_sent_beyond_the_window_and_a_full_buffer_waits() {
        let mut watches = Watches::default();
        watches.begin(SessionId(1));
        let (mut sent, mut out) = (0, Vec::new());
        let mut n = 0;
        loop {
            watches.push(&event(n, 0));
            n += 1;
            out.clear();
            watches.write(&mut out, usize::MAX);
            if out.is_empty() {
                break;
            }
            sent += out.len();
            assert!(n < 100_000, "nothing holds it back");
        }
        let window = usize::try_from(INITIAL_WINDOW).unwrap();
        assert!(sent >= window && sent < window + 300, "{sent}");
        assert!(!watches.is_due());
        watches.credit(SessionId(1), 1000);
        assert!(watches.is_due());
        watches.write(&mut out, 1);
        assert_eq!(read(&out), [(n - 1, 0)]);
        watches.write(&mut out, 1);
        assert_eq!(read(&out).len(), 1, "what is full is not written to");
        watches.end(SessionId(1));
        assert!(!watches.is_due() && watches.is_empty());
    }
}
