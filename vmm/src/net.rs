//! A guest's network card: who works it, and how the network behind it waits for the host.
//!
//! One thread, `net0`, works the card's queues and the network behind it, so that a frame goes from the ring through
//! the network to a socket of the host without changing threads. It waits on one epoll instance for the guest's
//! kicks and for whatever descriptors the network has put there ([`Watch`]), and until the network's next deadline.
//!
//! A pause parks the thread between two rounds: while a guest is paused nobody writes to its memory, whatever arrives
//! at the host's sockets, and nobody runs.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cubby_devices::net::{Backend, Counters, Mac, Mtu, Net};
use cubby_devices::{Device, Progress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::lock;
use crate::config::Error;
use crate::thread::{ThreadKind, Threads};

/// A network card, and what it is plugged into.
pub struct Network {
    /// The card's address.
    pub mac: Mac,
    /// The largest packet, which the guest is told.
    pub mtu: Mtu,
    /// The network.
    pub backend: Box<dyn NetBackend>,
}

/// A network on the host: frames as [`Backend`] has them, and the descriptors behind them.
///
/// All calls but [`NetBackend::attach`] come on the thread `net0`, one after another; none may block. After each round
/// of calls the guest gets what [`Backend::pending`] then has.
pub trait NetBackend: Backend {
    /// Called once, in [`crate::Vm::boot`] and on its thread. `watch` may be kept, to change later what is waited for.
    ///
    /// # Errors
    /// Fails the boot.
    fn attach(&mut self, watch: Watch) -> io::Result<()> {
        let _ = watch;
        Ok(())
    }

    /// Something happened at the descriptor that was added with this token. It may be one that was removed in the same
    /// round.
    fn ready(&mut self, token: u64, events: EventSet) {
        let _ = (token, events);
    }

    /// Until when to wait at most.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The deadline has passed.
    fn elapsed(&mut self) {}

    /// The VM was paused for so long, and nothing here was called. For the guest no time has passed.
    fn paused_for(&mut self, time: Duration) {
        let _ = time;
    }

    /// The VM has ended, and all its frames have been given: the last call.
    fn ended(&mut self) {}
}

/// The card of a VM.
pub(crate) type Card = Net<Box<dyn NetBackend>>;

/// What the thread `net0` waits for. A clone is the same.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Epoll>);

impl Watch {
    /// The largest token that a descriptor may be added with.
    pub const MAX_TOKEN: u64 = u64::MAX >> 1;

    /// Waits for `events` at `descriptor`, too, level-triggered unless they say otherwise.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says; `EINVAL` for a token above [`Watch::MAX_TOKEN`].
    pub fn add(&self, descriptor: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, descriptor, token, events)
    }

    /// Changes what is waited for at a descriptor.
    ///
    /// # Errors
    /// As [`Watch::add`].
    pub fn modify(&self, descriptor: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, descriptor, token, events)
    }

    /// Forgets a descriptor. Closing its last copy does the same.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    pub fn remove(&self, descriptor: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, descriptor, 0, EventSet::empty())
    }

    fn control(
        &self,
        operation: ControlOperation,
        descriptor: &impl AsRawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        if token > Self::MAX_TOKEN {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.0.ctl(operation, descriptor.as_raw_fd(), EpollEvent::new(events, token))
    }

    /// Waits for each write to an event, which nobody reads: its count would have to be 2^64.
    fn own(&self, event: &EventFd, token: u64) -> io::Result<()> {
        let each = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.0.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(each, token))
    }
}

/// Tokens of the thread's own descriptors: an order, and kicks of the queues.
const ORDER: u64 = Watch::MAX_TOKEN + 1;
const KICK: u64 = ORDER + 1;
const RX: usize = 0;
const TX: usize = 1;

/// Events taken in one round.
const EVENTS: usize = 256;

/// How long the guest may wait to hear that a frame of its own is done ([`Net::be_patient`]).
const PATIENCE: Duration = Duration::from_millis(1);

/// What the thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Work,
    Park,
    End,
}

/// What the thread goes by. It looks at the order when it has the card and before it does anything with it: whoever gets
/// the card after an order needs no answer, and a thread that waits anyway is not woken for a pause.
#[derive(Debug)]
struct Orders {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable to end the thread's wait.
    event: EventFd,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// Since when the order is to park.
    since: Option<Instant>,
    /// For how long it was, as far as the backend has not been told.
    untold: Duration,
}

impl Orders {
    fn give(&self, order: Order) {
        let mut state = lock(&self.state);
        state.order = order;
        match order {
            Order::Park => drop(state.since.get_or_insert_with(Instant::now)),
            Order::Work | Order::End => {
                let time = state.since.take().map(|since| since.elapsed());
                state.untold += time.unwrap_or_default();
            }
        }
        self.changed.notify_all();
    }
}

/// The thread `net0`, until it is dropped.
pub(crate) struct NetWorker {
    card: Arc<Mutex<Card>>,
    kick: EventFd,
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

impl NetWorker {
    /// Starts the thread for a card whose queues are kicked by `kicks`.
    pub(crate) fn spawn(
        card: Arc<Mutex<Card>>,
        kicks: Vec<EventFd>,
        threads: &mut Threads,
    ) -> Result<Self, Error> {
        let failed = Error::resource("the network's thread");
        let watch = Watch(Arc::new(Epoll::new().map_err(&failed)?));
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(&failed)?;
        watch.own(&event, ORDER).map_err(&failed)?;
        for (kick, token) in kicks.iter().zip(KICK..) {
            watch.own(kick, token).map_err(&failed)?;
        }
        {
            let mut card = lock(&card);
            card.be_patient();
            card.backend_mut().attach(watch.clone()).map_err(Error::resource("the network"))?;
        }
        let kick = kicks.get(RX).ok_or_else(|| io::Error::other("the card has no queues"));
        let kick = kick.and_then(EventFd::try_clone).map_err(&failed)?;
        let state = Mutex::new(State { order: Order::Work, since: None, untold: Duration::ZERO });
        let orders = Arc::new(Orders { state, changed: Condvar::new(), event });
        let round = Rounds { card: card.clone(), _kicks: kicks, watch, orders: orders.clone() };
        let thread =
            threads.spawn(ThreadKind::Network, "net0".into(), move || round.run()).map_err(&failed)?;
        Ok(Self { card, kick, orders, thread: Some(thread) })
    }

    /// Waits for the end of a round; there is no other until [`NetWorker::unpark`].
    pub(crate) fn park(&self) {
        self.orders.give(Order::Park);
        drop(lock(&self.card));
    }

    pub(crate) fn unpark(&self) {
        self.orders.give(Order::Work);
    }

    pub(crate) fn counters(&self) -> Counters {
        lock(&self.card).counters()
    }

    pub(crate) fn set_link(&self, up: bool) {
        lock(&self.card).set_link(up);
        let _ = self.kick.write(1);
    }
}

impl Drop for NetWorker {
    fn drop(&mut self) {
        self.orders.give(Order::End);
        let _ = self.orders.event.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Rounds {
    card: Arc<Mutex<Card>>,
    /// Open as long as they are waited for.
    _kicks: Vec<EventFd>,
    watch: Watch,
    orders: Arc<Orders>,
}

impl Rounds {
    fn run(&self) {
        let mut events = [EpollEvent::default(); EVENTS];
        // Whether the round before this one left something undone.
        let mut more = false;
        // Until when the guest may wait for news of its frames.
        let mut untold: Option<Instant> = None;
        loop {
            let deadline = {
                let card = lock(&self.card);
                untold = card.has_untold().then(|| untold.unwrap_or_else(|| Instant::now() + PATIENCE));
                [card.backend().deadline(), untold].into_iter().flatten().min()
            };
            let wait = if more { 0 } else { timeout(deadline) };
            let count = match self.watch.0.wait(wait, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(_) => return,
            };
            let events = events.get(..count).unwrap_or(&[]);
            let Some(mut card) = self.card_to_work() else { return self.end() };
            more = self.round(&mut card, events, more) == Progress::More;
            if untold.is_some_and(|until| until <= Instant::now()) {
                card.tell();
            }
        }
    }

    /// What the guest has said last may still be in its queue.
    fn end(&self) {
        let mut card = lock(&self.card);
        let _ = card.kick(TX);
        card.backend_mut().ended();
    }

    /// The card, as soon as the order is to work; `None` if it is to end.
    fn card_to_work(&self) -> Option<MutexGuard<'_, Card>> {
        loop {
            let mut card = lock(&self.card);
            let mut state = lock(&self.orders.state);
            match state.order {
                Order::End => return None,
                Order::Work => {
                    let paused = std::mem::take(&mut state.untold);
                    if paused > Duration::ZERO {
                        card.backend_mut().paused_for(paused);
                    }
                    drop(state);
                    return Some(card);
                }
                Order::Park => {
                    drop(card);
                    let parked = |state: &mut State| state.order == Order::Park;
                    drop(
                        self.orders.changed.wait_while(state, parked).unwrap_or_else(PoisonError::into_inner),
                    );
                }
            }
        }
    }

    fn round(&self, card: &mut Card, events: &[EpollEvent], more: bool) -> Progress {
        let mut transmits = more;
        for event in events {
            match event.data().checked_sub(KICK) {
                None if event.data() == ORDER => {}
                None => {
                    card.backend_mut().ready(event.data(), EventSet::from_bits_truncate(event.events()));
                }
                Some(queue) => {
                    transmits |= usize::try_from(queue) == Ok(TX);
                }
            }
        }
        if card.backend().deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            card.backend_mut().elapsed();
        }
        if transmits { card.kick(TX) } else { card.poll() }
    }
}

/// Milliseconds until a deadline, rounded up, as `epoll_wait(2)` takes them.
fn timeout(deadline: Option<Instant>) -> i32 {
    deadline.map_or(-1, |deadline| milliseconds(deadline, Instant::now()))
}

fn milliseconds(deadline: Instant, now: Instant) -> i32 {
    let left = deadline.saturating_duration_since(now);
    i32::try_from(left.saturating_add(Duration::from_nanos(999_999)).as_millis()).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
