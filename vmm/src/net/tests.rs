//! The thread, with real descriptors and real rings, and without KVM.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use cubby_devices::net::{Frame, Offload, Offloads, Sent};
use cubby_devices::testing::{Buffer, Guest, Ring, bring_up};
use cubby_devices::{Slice, Transport};

use super::*;

/// How long something that must happen may take, and how long something that must not is looked for.
const SOON: Duration = Duration::from_secs(20);
const A_WHILE: Duration = Duration::from_millis(50);

const SOCKET: u64 = 7;

/// What the network saw, in its order.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Sent(usize),
    Ready(u64),
    Elapsed,
    Paused,
    Gave,
    Ended,
    Dropped,
}

/// Gives a frame for each event at its descriptor, and for its deadline.
struct Net {
    socket: EventFd,
    watch: Option<Watch>,
    deadline: Option<Instant>,
    frames: usize,
    seen: Sender<Seen>,
}

impl Backend for Net {
    fn negotiated(&mut self, _: Offloads) {}

    fn transmit(&mut self, frame: Frame<'_>) -> Sent {
        let _ = self.seen.send(Seen::Sent(frame.len));
        Sent::Taken
    }

    fn pending(&mut self) -> Option<usize> {
        (self.frames > 0).then_some(60)
    }

    fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)> {
        self.frames -= 1;
        to[0].copy_from(&[0xab; 60]);
        let _ = self.seen.send(Seen::Gave);
        Some((60, Offload::default()))
    }

    fn discard(&mut self) {
        self.frames -= 1;
    }
}

impl NetBackend for Net {
    fn attach(&mut self, watch: Watch) -> io::Result<()> {
        watch.add(&self.socket, SOCKET, EventSet::IN)?;
        let refused = watch.add(&self.socket, Watch::MAX_TOKEN + 1, EventSet::IN).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
        self.watch = Some(watch);
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet) {
        assert_eq!(events, EventSet::IN);
        self.frames += 1;
        // A large number says that there will be no more.
        if self.socket.read().unwrap() > 1 {
            self.watch.as_ref().unwrap().remove(&self.socket).unwrap();
        }
        let _ = self.seen.send(Seen::Ready(token));
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn elapsed(&mut self) {
        self.deadline = None;
        self.frames += 1;
        let _ = self.seen.send(Seen::Elapsed);
    }

    fn paused_for(&mut self, time: Duration) {
        // Before anything else is called.
        if time >= A_WHILE {
            let _ = self.seen.send(Seen::Paused);
        }
    }

    fn ended(&mut self) {
        let _ = self.seen.send(Seen::Ended);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.seen.send(Seen::Dropped);
    }
}

struct Rig {
    guest: Guest,
    rx: Ring,
    tx: Ring,
    kicks: Vec<EventFd>,
    socket: EventFd,
    seen: Receiver<Seen>,
    worker: Option<NetWorker>,
}

impl Rig {
    fn new(deadline: Option<Instant>) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (socket, kicks, (seen, receiver)) = (event(), [event(), event()], channel());
        let clone = |event: &EventFd| event.try_clone().unwrap();
        let net = Net { socket: clone(&socket), watch: None, deadline, frames: 0, seen };
        let mac = Mac::try_from([2, 0, 0, 0, 0, 1]).unwrap();
        let card = Arc::new(Mutex::new(Card::new(Box::new(net), mac, Mtu::default())));
        let mut guest = Guest::new(1 << 20);
        let (mut rx, tx) = (Ring::new(&mut guest, 16, true), Ring::new(&mut guest, 16, true));
        let mut transport = Transport::new(card.clone(), guest.memory.clone(), guest.line.clone());
        bring_up(&mut transport, u64::MAX, &[&rx, &tx]);
        for _ in 0..8 {
            let at = guest.alloc(2000);
            rx.submit(&[Buffer::writable(at, 2000)]);
        }
        let mut threads = Threads::new(None);
        let worker = NetWorker::spawn(card, kicks.iter().map(clone).collect(), &mut threads).unwrap();
        Self { guest, rx, tx, kicks: kicks.into(), socket, seen: receiver, worker: Some(worker) }
    }

    fn worker(&self) -> &NetWorker {
        self.worker.as_ref().unwrap()
    }

    fn send(&mut self, len: usize) {
        let at = self.guest.alloc(12 + len);
        self.tx.submit(&[Buffer::readable(at, 12 + len)]);
        self.kicks[TX].write(1).unwrap();
    }

    fn sees(&self, what: &[Seen]) {
        for what in what {
            assert_eq!(self.seen.recv_timeout(SOON).as_ref(), Ok(what));
        }
    }

    fn sees_nothing(&self) {
        assert_eq!(self.seen.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout));
    }
}

#[test]
fn kicks_and_the_hosts_descriptors_are_served_by_one_thread() {
    let mut rig = Rig::new(None);
    rig.send(100);
    rig.sees(&[Seen::Sent(100)]);
    rig.socket.write(1).unwrap();
    rig.sees(&[Seen::Ready(SOCKET), Seen::Gave]);
    // Parked, it has ended its round.
    rig.worker().park();
    assert_eq!(rig.rx.completion(), Some((0, 72)));
    assert!(rig.guest.line.count() > 0);
    let counters = rig.worker().counters();
    assert_eq!((counters.transmitted.bytes, counters.received.bytes), (100, 60));
}

#[test]
fn the_guest_hears_soon_that_its_frame_is_done_though_nobody_answers() {
    let mut rig = Rig::new(None);
    rig.send(100);
    rig.sees(&[Seen::Sent(100)]);
    let until = Instant::now() + SOON;
    while rig.guest.line.count() == 0 {
        assert!(Instant::now() < until, "it waits in vain");
        std::thread::yield_now();
    }
}

#[test]
fn a_deadline_is_kept_without_any_event() {
    let rig = Rig::new(Some(Instant::now() + Duration::from_millis(5)));
    rig.sees(&[Seen::Elapsed, Seen::Gave]);
    let now = Instant::now();
    assert_eq!(timeout(None), -1);
    assert_eq!(milliseconds(now, now + SOON), 0);
    assert_eq!(milliseconds(now + Duration::from_micros(1), now), 1, "it does not spin until then");
    assert_eq!(milliseconds(now + Duration::from_secs(1 << 40), now), i32::MAX);
}

#[test]
fn a_parked_thread_does_nothing_until_it_goes_on() {
    let mut rig = Rig::new(None);
    for _ in 0..3 {
        rig.worker().park();
        rig.send(200);
        rig.socket.write(1).unwrap();
        rig.sees_nothing();
        rig.worker().unpark();
        rig.sees(&[Seen::Paused]);
        // The kernel says which it tells of first.
        let mut seen = [(); 3].map(|()| rig.seen.recv_timeout(SOON).unwrap());
        seen.sort();
        assert_eq!(seen, [Seen::Sent(200), Seen::Ready(SOCKET), Seen::Gave]);
    }
    // Twice parked is parked, and so is a thread that has not noticed that it may go on.
    rig.worker().park();
    rig.worker().park();
    rig.worker().unpark();
    rig.worker().park();
    rig.send(1);
    rig.sees_nothing();
}

#[test]
fn a_descriptor_that_is_removed_is_not_waited_for() {
    let rig = Rig::new(None);
    rig.socket.write(2).unwrap();
    rig.sees(&[Seen::Ready(SOCKET), Seen::Gave]);
    rig.socket.write(1).unwrap();
    rig.sees_nothing();
}

#[test]
fn a_link_that_comes_back_brings_what_waited() {
    let rig = Rig::new(None);
    rig.worker().set_link(false);
    rig.socket.write(1).unwrap();
    rig.sees(&[Seen::Ready(SOCKET)]);
    rig.sees_nothing();
    rig.worker().set_link(true);
    rig.sees(&[Seen::Gave]);
}

#[test]
fn dropping_the_worker_ends_its_thread_parked_or_not_and_after_the_last_frame() {
    for park in [false, true] {
        let mut rig = Rig::new(None);
        if park {
            rig.worker().park();
        }
        rig.send(300);
        rig.worker = None;
        rig.sees(&[Seen::Sent(300), Seen::Ended, Seen::Dropped]);
    }
}
