//! What a client has subscribed to. Events wait in the subscription's own queue for its window and for room in the
//! client's output, so that one that nobody reads delays nothing else. What does not fit into the queue is counted,
//! and the count goes out before the next event, or by itself when none follows.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use cubby_protocol::message::{Event, Subscribe};
use cubby_protocol::{CHUNK, Header, INITIAL_WINDOW, Kind, SessionId};

use crate::output::{Output, SOFT_LIMIT};

/// How many bytes wait in a subscription's queue.
const QUEUE: usize = 1 << 20;

/// What an event costs of it beyond its line.
const OVERHEAD: usize = 64;

#[derive(Debug)]
struct Waiting {
    /// How many were lost before it.
    dropped: u64,
    /// Shared by all who wait for it.
    line: Rc<str>,
}

#[derive(Debug)]
struct Subscription {
    name: Option<String>,
    window: u64,
    queue: VecDeque<Waiting>,
    /// Bytes in `queue`.
    held: usize,
    /// How many were lost since the newest in `queue`.
    dropped: u64,
}

impl Subscription {
    fn offer(&mut self, name: &str, line: &Rc<str>) {
        if self.name.as_deref().is_some_and(|wanted| wanted != name) {
            return;
        }
        let size = line.len() + OVERHEAD;
        if self.held + size > QUEUE {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        self.held += size;
        self.queue.push_back(Waiting { dropped: std::mem::take(&mut self.dropped), line: line.clone() });
    }

    /// The next to go out: an event, or the news of losses that no event follows.
    fn next(&self) -> Option<Event<'_>> {
        let losses = (self.dropped > 0).then_some(Event { dropped: self.dropped, line: Cow::Borrowed("") });
        let event =
            self.queue.front().map(|next| Event { dropped: next.dropped, line: Cow::Borrowed(&next.line) });
        event.or(losses).filter(|event| Event::size_of(&event.line) as u64 <= self.window)
    }

    fn pump(&mut self, id: SessionId, output: &mut Output) {
        let mut moved = 0;
        // A chunk, then others have their turn.
        while moved < CHUNK && output.len() < SOFT_LIMIT {
            let Some(event) = self.next() else { return };
            let before = output.len();
            output.message(Kind::Event, id, &event);
            let payload = (output.len() - before).saturating_sub(Header::SIZE);
            self.window = self.window.saturating_sub(payload as u64);
            moved += payload;
            match self.queue.pop_front() {
                Some(gone) => self.held -= gone.line.len() + OVERHEAD,
                None => self.dropped = 0,
            }
        }
    }
}

/// The subscriptions of one client.
#[derive(Debug, Default)]
pub struct Subscriptions {
    open: BTreeMap<SessionId, Subscription>,
    /// Whether one may have something to send.
    news: bool,
}

impl Subscriptions {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.open.len()
    }

    /// Whether there is this one.
    pub fn contains(&self, id: SessionId) -> bool {
        self.open.contains_key(&id)
    }

    /// Begins one.
    pub fn open(&mut self, id: SessionId, subscribe: Subscribe) {
        let (window, queue) = (u64::from(INITIAL_WINDOW), VecDeque::new());
        let subscription = Subscription { name: subscribe.name, window, queue, held: 0, dropped: 0 };
        self.open.insert(id, subscription);
    }

    /// Ends one. Whether it was there.
    pub fn close(&mut self, id: SessionId) -> bool {
        self.open.remove(&id).is_some()
    }

    /// The client takes so many more bytes.
    pub fn on_credit(&mut self, id: SessionId, bytes: u32) {
        if let Some(subscription) = self.open.get_mut(&id) {
            subscription.window = subscription.window.saturating_add(u64::from(bytes));
            self.news = true;
        }
    }

    /// A guest process has an event for whoever wants it.
    pub fn offer(&mut self, name: &str, line: &Rc<str>) {
        for subscription in self.open.values_mut() {
            subscription.offer(name, line);
            self.news = true;
        }
    }

    /// Moves what may go out.
    pub fn pump(&mut self, output: &mut Output) {
        if self.news {
            self.open.iter_mut().for_each(|(id, subscription)| subscription.pump(*id, output));
            self.news = self.open.values().any(|subscription| subscription.next().is_some());
        }
    }

    /// Whether [`Self::pump`] has more to do as soon as the output has room.
    pub fn has_news(&self) -> bool {
        self.news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubby_protocol::{Decoder, decode};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    const ID: SessionId = SessionId(3);

    /// What the client gets when its connection takes all there is.
    fn received(subscriptions: &mut Subscriptions) -> Vec<(u64, String)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        let (mut output, mut decoder, mut events) = (Output::default(), Decoder::default(), Vec::new());
        let mut buffer = vec![0; 1 << 16];
        loop {
            subscriptions.pump(&mut output);
            output.flush(&ours).unwrap();
            let Ok(count) = rustix::io::read(&theirs, &mut buffer[..]) else { break };
            decoder.push(&buffer[..count]);
            while let Some(frame) = decoder.next_frame().unwrap() {
                assert_eq!((frame.header.kind, frame.header.session), (Kind::Event, ID));
                let event: Event<'_> = decode(frame.payload()).unwrap();
                events.push((event.dropped, event.line.into_owned()));
            }
        }
        assert!(output.is_empty());
        events
    }

    fn subscribed(name: Option<&str>) -> Subscriptions {
        let mut subscriptions = Subscriptions::default();
        subscriptions.open(ID, Subscribe { name: name.map(Into::into) });
        subscriptions
    }

    #[test]
    fn a_subscription_gets_the_events_of_its_name_in_order() {
        let mut subscriptions = subscribed(Some("a"));
        for (name, line) in [("a", "1"), ("b", "2"), ("a", "3"), ("ab", "4")] {
            subscriptions.offer(name, &Rc::from(line));
        }
        assert_eq!(received(&mut subscriptions), [(0, "1".into()), (0, "3".into())]);
        assert!(!subscriptions.has_news());
        assert!(subscriptions.close(ID) && !subscriptions.close(ID));
    }

    #[test]
    fn what_does_not_fit_is_counted_before_what_follows() {
        let mut subscriptions = subscribed(None);
        let line: Rc<str> = "x".repeat(1000).into();
        let mut offered = 0;
        let mut offer = |subscriptions: &mut Subscriptions| {
            subscriptions.offer("x", &line);
            offered += 1;
        };
        let mut events = Vec::new();
        // Until the window is used up: then they wait, as many as the queue holds, and three are too many.
        while events.len() * 1004 + Event::size_of(&line) <= INITIAL_WINDOW as usize {
            offer(&mut subscriptions);
            events.extend(received(&mut subscriptions));
        }
        for _ in 0..QUEUE / (line.len() + OVERHEAD) + 3 {
            offer(&mut subscriptions);
        }
        assert!(received(&mut subscriptions).is_empty() && !subscriptions.has_news());
        subscriptions.on_credit(ID, 4096);
        events.extend(received(&mut subscriptions));
        assert!(events.iter().all(|(dropped, _)| *dropped == 0));
        // One that fits again tells what was lost before it.
        subscriptions.offer("x", &Rc::from("again"));
        subscriptions.on_credit(ID, u32::MAX);
        events.extend(received(&mut subscriptions));
        assert_eq!(events.last().unwrap(), &(3, "again".to_owned()));
        assert_eq!(events.len() + 3, offered + 1);
        assert_eq!(subscriptions.open[&ID].held, 0);
    }

    #[test]
    fn losses_that_no_event_follows_are_told_as_well() {
        let mut subscriptions = subscribed(None);
        let line: Rc<str> = "x".repeat(QUEUE / 2).into();
        for _ in 0..3 {
            subscriptions.offer("x", &line);
        }
        subscriptions.on_credit(ID, u32::MAX);
        let events = received(&mut subscriptions);
        assert_eq!(
            events.iter().map(|(dropped, line)| (*dropped, line.len())).collect::<Vec<_>>(),
            [(0, QUEUE / 2), (2, 0)]
        );
        assert!(!subscriptions.has_news());
    }
}
