//! What the main thread and the network's have for each other: rules one way, events and counters the other.
//!
//! Neither waits for the other. The newest rules replace those that were not taken yet; they are in force before the
//! network's thread looks at another frame. Events cross only while somebody listens, in a queue of bounded length: the
//! oldest make room, and whichever comes after them says how many.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubby_network::{Counters, NetworkPolicy};
use cubby_protocol::message::{NetworkEvent, NetworkEventKind};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Events that wait for the main thread.
const WAITING: usize = 1024;

/// Both threads' end of it.
#[derive(Clone)]
pub(crate) struct Exchange(Arc<Shared>);

struct Shared {
    /// The newest rules that were not taken yet.
    rules: Mutex<Option<NetworkPolicy>>,
    /// How often there were new rules, and how often they had come into force.
    given: AtomicU64,
    in_force: AtomicU64,
    /// Readable if there are rules.
    order: EventFd,
    listening: AtomicBool,
    told: Mutex<Told>,
    /// Readable if there are events, or rules have come into force.
    news: EventFd,
}

#[derive(Default)]
struct Told {
    events: VecDeque<NetworkEvent>,
    counters: Counters,
}

/// A change of rules, to be compared with [`Exchange::in_force`].
pub(crate) type Ticket = u64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exchange {
    pub(crate) fn new() -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self(Arc::new(Shared {
            rules: Mutex::default(),
            given: AtomicU64::new(0),
            in_force: AtomicU64::new(0),
            order: event()?,
            listening: AtomicBool::new(false),
            told: Mutex::default(),
            news: event()?,
        })))
    }

    /// The main thread: puts other rules in force.
    pub(crate) fn set_rules(&self, policy: NetworkPolicy) -> Ticket {
        *lock(&self.0.rules) = Some(policy);
        let ticket = self.0.given.fetch_add(1, Ordering::AcqRel) + 1;
        let _ = self.0.order.write(1);
        ticket
    }

    /// The main thread: the newest rules that flows have been judged by.
    pub(crate) fn in_force(&self) -> Ticket {
        self.0.in_force.load(Ordering::Acquire)
    }

    /// The main thread: whether events are wanted.
    pub(crate) fn listen(&self, wanted: bool) {
        if self.0.listening.swap(wanted, Ordering::AcqRel) && !wanted {
            lock(&self.0.told).events.clear();
        }
    }

    /// The main thread: all events that wait.
    pub(crate) fn take(&self) -> VecDeque<NetworkEvent> {
        let _ = self.0.news.read();
        std::mem::take(&mut lock(&self.0.told).events)
    }

    /// The main thread: what the stack has counted, as of its last round.
    pub(crate) fn counters(&self) -> Counters {
        lock(&self.0.told).counters
    }

    /// What the main thread waits for.
    pub(crate) fn news(&self) -> &EventFd {
        &self.0.news
    }

    /// What the network's thread waits for.
    pub(super) fn order(&self) -> &EventFd {
        &self.0.order
    }

    /// The network's thread: rules that are newer than those of `seen`, which is set to them.
    pub(super) fn rules(&self, seen: &mut Ticket) -> Option<NetworkPolicy> {
        if self.0.given.load(Ordering::Acquire) == *seen {
            return None;
        }
        let mut rules = lock(&self.0.rules);
        *seen = self.0.given.load(Ordering::Acquire);
        rules.take()
    }

    /// The network's thread: has been woken for rules, and has a round before it.
    pub(super) fn heard(&self) {
        let _ = self.0.order.read();
    }

    /// The network's thread: the rules of this ticket are in force, and what they end has ended.
    pub(super) fn now_in_force(&self, ticket: Ticket) {
        if self.0.in_force.swap(ticket, Ordering::AcqRel) != ticket {
            let _ = self.0.news.write(1);
        }
    }

    /// The network's thread: whether events are wanted.
    pub(super) fn is_listening(&self) -> bool {
        self.0.listening.load(Ordering::Acquire)
    }

    /// The network's thread: something happened, and before it `lost` other things that nobody is told of.
    pub(super) fn tell(&self, what: NetworkEventKind, at_ns: u64, lost: u64) {
        let events = &mut lock(&self.0.told).events;
        events.push_back(NetworkEvent { lost, at_ns, what });
        if events.len() > WAITING
            && let Some(oldest) = events.pop_front()
            && let Some(next) = events.front_mut()
        {
            next.lost = next.lost.saturating_add(oldest.lost).saturating_add(1);
        }
        if events.len() == 1 {
            let _ = self.0.news.write(1);
        }
    }

    /// The network's thread: what the stack has counted.
    pub(super) fn count(&self, counters: Counters) {
        lock(&self.0.told).counters = counters;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: u64) -> NetworkEventKind {
        NetworkEventKind::AnswerDropped(n.to_string(), [127, 0, 0, 1].into())
    }

    #[test]
    fn the_oldest_make_room_and_the_next_one_says_how_many() {
        let exchange = Exchange::new().unwrap();
        let most = u64::try_from(WAITING).unwrap();
        for n in 0..most + 5 {
            exchange.tell(event(n), n, u64::from(n == 2 || n == 9));
        }
        let taken = exchange.take();
        let told: Vec<_> = taken.iter().map(|event| (event.at_ns, event.lost)).collect();
        assert_eq!(
            (told.len(), &told[..6]),
            (WAITING, &[(5, 6), (6, 0), (7, 0), (8, 0), (9, 1), (10, 0)][..])
        );
        assert_eq!(told.last(), Some(&(most + 4, 0)));
        // Whoever begins to listen has lost nothing.
        exchange.listen(true);
        exchange.tell(event(0), 0, 9);
        exchange.listen(false);
        exchange.listen(true);
        exchange.tell(event(0), 0, 0);
        let taken = exchange.take();
        assert_eq!((taken.len(), taken[0].lost), (1, 0));
    }

    #[test]
    fn the_newest_rules_are_taken_once() {
        let exchange = Exchange::new().unwrap();
        let mut seen = 0;
        assert!(exchange.rules(&mut seen).is_none());
        exchange.set_rules(NetworkPolicy::none());
        let ticket = exchange.set_rules(NetworkPolicy::all());
        assert_eq!(exchange.order().read().unwrap(), 2);
        assert_eq!(exchange.rules(&mut seen), Some(NetworkPolicy::all()));
        assert_eq!(seen, ticket);
        assert!(exchange.rules(&mut seen).is_none());
        assert!(exchange.in_force() < ticket);
        exchange.now_in_force(ticket);
        assert_eq!(exchange.in_force(), ticket);
        assert_eq!(exchange.news().read().unwrap(), 1);
        // It is news once.
        exchange.now_in_force(ticket);
        assert!(exchange.news().read().is_err());
    }
}
