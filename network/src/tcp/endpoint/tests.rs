use super::*;

/// A guest's side that says what a test tells it to.
struct Peer {
    end: Endpoint,
    pool: Pool,
    now: Instant,
    /// What the host's side took, and how much more it takes.
    taken: Vec<u8>,
    takes: usize,
}

const GUEST: Seq = Seq(0xffff_fff0);
const OURS: Seq = Seq(0xffff_fffa);

fn segment(seq: Seq, ack: Option<Seq>, payload: &[u8]) -> Segment<'_> {
    Segment { seq, ack, syn: false, fin: false, rst: false, window: 1000, scale: None, mss: None, payload }
}

fn syn(ack: Option<Seq>) -> Segment<'static> {
    Segment { syn: true, window: 1000, scale: Some(0), mss: Some(100), ..segment(GUEST, ack, &[]) }
}

impl Peer {
    fn new(end: Endpoint) -> Self {
        Peer { end, pool: Pool::new(1 << 20), now: Instant::now(), taken: Vec::new(), takes: usize::MAX }
    }

    /// A connection that is open, the guest's window 1000 bytes.
    fn open() -> Self {
        let mut peer = Self::new(Endpoint::asked(&syn(None), OURS, 1460));
        assert_eq!(peer.next(), None, "there is no answer before the host's");
        peer.end.answer();
        let answer = peer.next().unwrap();
        assert!(answer.syn && answer.seq == OURS && answer.ack == Some(GUEST.plus(1)));
        peer.hear(segment(GUEST.plus(1), Some(OURS.plus(1)), &[]));
        assert_eq!(peer.end.phase(), Phase::Open);
        peer
    }

    fn hear(&mut self, segment: Segment<'_>) {
        let Peer { end, pool, now, taken, takes } = self;
        end.on_segment(&segment, *now, pool, |bytes| {
            let n = bytes.len().min(*takes);
            *takes -= n;
            taken.extend_from_slice(&bytes[..n]);
            n
        });
    }

    fn next(&mut self) -> Option<Outgoing> {
        self.end.next_segment(usize::from(self.end.mss()), self.now, &self.pool)
    }

    fn all(&mut self) -> Vec<Outgoing> {
        std::iter::from_fn(|| self.next()).collect()
    }

    fn say(&mut self, bytes: &[u8]) {
        assert_eq!(self.end.sending().push(bytes, &mut self.pool), bytes.len());
    }

    /// Waits for the clock.
    fn wait(&mut self) {
        self.now = self.end.deadline().unwrap();
        self.end.on_time(self.now);
    }
}

/// The guest's bytes begin here, ours there.
fn guest(n: usize) -> Seq {
    GUEST.plus(1 + n)
}

fn ours(n: usize) -> Seq {
    OURS.plus(1 + n)
}

#[test]
fn what_overlaps_repeats_or_comes_early_is_taken_once_and_in_order() {
    let mut peer = Peer::open();
    peer.hear(segment(guest(0), Some(ours(0)), b"abcd"));
    peer.hear(segment(guest(6), Some(ours(0)), b"gh"));
    peer.hear(segment(guest(2), Some(ours(0)), b"cdef"));
    peer.hear(segment(guest(0), Some(ours(0)), b"abcd"));
    peer.hear(segment(guest(5), Some(ours(0)), b"fgh"));
    assert_eq!(peer.taken, b"abcdefgh");
    assert_eq!(peer.next().unwrap().ack, Some(guest(8)));
}

#[test]
fn three_early_segments_are_answered_three_times() {
    let mut peer = Peer::open();
    for n in [4, 8, 12] {
        peer.hear(segment(guest(n), Some(ours(0)), b"late"));
    }
    let acks: Vec<_> = peer.all().iter().map(|it| it.ack).collect();
    assert!(acks.len() >= 3 && acks.iter().all(|ack| *ack == Some(guest(0))), "{acks:?}");
}

#[test]
fn the_window_is_what_the_host_has_room_for_and_is_not_taken_back() {
    let mut peer = Peer::open();
    peer.takes = 0;
    peer.hear(segment(guest(0), Some(ours(0)), &[1; 60_000]));
    let closing = peer.next().unwrap();
    assert_eq!((usize::from(closing.window) << SHIFT) + 60_000, RECEIVE);
    peer.hear(segment(guest(60_000), Some(ours(0)), &vec![1; RECEIVE]));
    let closed = peer.next().unwrap();
    assert_eq!((closed.window, closed.ack), (0, Some(guest(RECEIVE))), "what does not fit is not taken");
    // A byte beyond the window is answered and dropped.
    peer.hear(segment(guest(RECEIVE), Some(ours(0)), &[2]));
    assert_eq!(peer.next().unwrap().ack, Some(guest(RECEIVE)));
    peer.end.taken(1000, &mut peer.pool);
    assert_eq!(peer.next(), None, "that little is not worth a segment");
    peer.end.taken(RECEIVE / 2, &mut peer.pool);
    assert!(usize::from(peer.next().unwrap().window) << SHIFT >= RECEIVE / 2);
}

#[test]
fn little_is_acknowledged_with_the_answer_or_soon_and_much_at_once() {
    let mut peer = Peer::open();
    peer.hear(segment(guest(0), Some(ours(0)), b"question"));
    assert_eq!(peer.next(), None, "the answer may take it along");
    peer.say(b"answer");
    let answer = peer.next().unwrap();
    assert_eq!((answer.ack, answer.len), (Some(guest(8)), 6));
    peer.hear(segment(guest(8), Some(ours(6)), b"more"));
    assert_eq!(peer.next(), None);
    let begin = peer.now;
    peer.wait();
    assert_eq!(peer.now - begin, LAZY);
    assert_eq!(peer.next().unwrap().ack, Some(guest(12)));
    assert_eq!((peer.next(), peer.end.deadline()), (None, None));
    // Two segments' worth, in any pieces, does not wait; nor does an end.
    peer.hear(segment(guest(12), Some(ours(6)), &[1; 150]));
    assert_eq!(peer.next(), None);
    peer.hear(segment(guest(162), Some(ours(6)), &[1; 50]));
    assert_eq!(peer.next().unwrap().ack, Some(guest(212)));
    peer.hear(Segment { fin: true, ..segment(guest(212), Some(ours(6)), b"x") });
    assert_eq!(peer.next().unwrap().ack, Some(guest(214)));
}

#[test]
fn a_closed_window_is_probed_until_it_opens() {
    let mut peer = Peer::open();
    peer.hear(Segment { window: 0, ..segment(guest(0), Some(ours(0)), &[1; 200]) });
    assert_eq!(peer.next().unwrap().ack, Some(guest(200)));
    peer.say(b"hello");
    assert_eq!(peer.next(), None);
    for _ in 0..50 {
        peer.wait();
        let probe = peer.next().unwrap();
        assert_eq!((probe.seq, probe.len), (OURS, 0), "it is from before the window");
        peer.hear(Segment { window: 0, ..segment(guest(200), Some(ours(0)), &[]) });
        assert_eq!(peer.end.phase(), Phase::Open, "who answers lives");
    }
    peer.hear(segment(guest(200), Some(ours(0)), &[]));
    let data = peer.next().unwrap();
    assert_eq!((data.seq, data.len, data.psh), (ours(0), 5, true));
}

#[test]
fn few_bytes_are_neither_asked_for_nor_sent_while_others_are_under_way() {
    let mut peer = Peer::open();
    assert_eq!(peer.end.appetite(usize::MAX), 1000);
    assert_eq!(peer.end.appetite(300), 300, "no more than its share");
    peer.say(&[7; 600]);
    assert_eq!(peer.end.appetite(usize::MAX), 0);
    peer.say(&[7; 1400]);
    // In bundles: all that the window takes.
    let bundle = |peer: &mut Peer| peer.end.next_segment(60_000, peer.now, &peer.pool).map(|it| it.len);
    assert_eq!((bundle(&mut peer), bundle(&mut peer)), (Some(1000), None));
    peer.hear(segment(guest(0), Some(ours(400)), &[]));
    assert_eq!(bundle(&mut peer), None, "400 bytes are worth no bundle, and 600 are on their way");
    peer.hear(segment(guest(0), Some(ours(500)), &[]));
    assert_eq!(bundle(&mut peer), Some(500));
    peer.hear(segment(guest(0), Some(ours(1000)), &[]));
    assert_eq!(bundle(&mut peer), Some(500));
    peer.hear(segment(guest(0), Some(ours(1500)), &[]));
    assert_eq!(peer.end.appetite(usize::MAX), 500);
    peer.say(&[7; 30]);
    assert_eq!(bundle(&mut peer), Some(30), "nobody waits for the last to become more");
    peer.hear(Segment { window: 300, ..segment(guest(0), Some(ours(2030)), &[]) });
    assert_eq!(peer.end.appetite(usize::MAX), 300, "nothing is under way that would bring more");
}

#[test]
fn what_is_not_acknowledged_is_sent_again_from_the_first_missing_byte_on() {
    let mut peer = Peer::open();
    peer.say(&[7; 350]);
    let lens = |sent: &[Outgoing]| sent.iter().map(|it| (it.seq, it.len)).collect::<Vec<_>>();
    let whole = [(ours(0), 100), (ours(100), 100), (ours(200), 100), (ours(300), 50)];
    assert_eq!(lens(&peer.all()), whole);
    peer.hear(segment(guest(0), Some(ours(100)), &[]));
    assert_eq!(peer.all(), []);
    peer.wait();
    assert_eq!(lens(&peer.all()), whole[1..]);
    // Three that say the same are quicker than the clock, but only once for one loss.
    let mut peer = Peer::open();
    peer.say(&[7; 350]);
    peer.all();
    for _ in 0..3 {
        peer.hear(segment(guest(0), Some(ours(0)), &[]));
    }
    assert_eq!(lens(&peer.all()), whole);
    for _ in 0..6 {
        peer.hear(segment(guest(0), Some(ours(0)), &[]));
    }
    assert_eq!(peer.all(), []);
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut peer = Peer::open();
    peer.say(b"hello");
    let mut times = 0;
    while peer.end.phase() == Phase::Open {
        times += peer.all().len();
        peer.wait();
    }
    assert_eq!(peer.end.phase(), Phase::Over(Ending::TimedOut));
    assert_eq!(times, 1 + usize::from(REPETITIONS));
}

#[test]
fn a_reset_counts_if_it_is_exact_and_is_asked_about_if_it_is_near() {
    let mut peer = Peer::open();
    let reset = |seq| Segment { rst: true, ..segment(seq, None, &[]) };
    for (n, answered) in [(1, true), (RECEIVE * 2, false)] {
        peer.hear(reset(guest(n)));
        assert_eq!((peer.end.phase(), peer.next().is_some()), (Phase::Open, answered), "{n}");
    }
    peer.hear(Segment { syn: true, ..segment(guest(0), Some(ours(0)), &[]) });
    assert_eq!((peer.end.phase(), peer.next().is_some()), (Phase::Open, true));
    peer.hear(reset(guest(0)));
    assert_eq!(peer.end.phase(), Phase::Over(Ending::Reset));
}

#[test]
fn a_keep_alive_is_answered_and_lying_acknowledgements_are_not_believed() {
    let mut peer = Peer::open();
    peer.hear(segment(GUEST, Some(ours(0)), &[]));
    assert_eq!(peer.next().unwrap().ack, Some(guest(0)));
    peer.say(b"hello");
    peer.all();
    peer.hear(segment(guest(0), Some(ours(6)), b"x"));
    assert_eq!(peer.taken, b"", "it acknowledges what was never sent");
    assert_eq!(peer.end.sending().len(), 5);
}

#[test]
fn the_guest_may_end_first() {
    let mut peer = Peer::open();
    peer.hear(Segment { fin: true, ..segment(guest(0), Some(ours(0)), b"bye") });
    assert!(peer.end.heard_all() && peer.taken == b"bye");
    assert_eq!(peer.next().unwrap().ack, Some(guest(4)));
    peer.say(b"still here");
    peer.end.finish();
    let last = peer.next().unwrap();
    assert!(last.fin && last.len == 10);
    peer.hear(segment(guest(4), Some(ours(11)), &[]));
    assert_eq!(peer.end.phase(), Phase::Over(Ending::Finished));
    assert_eq!(peer.pool.used(), 0);
}

#[test]
fn both_may_end_at_once_and_who_was_first_lingers() {
    let mut peer = Peer::open();
    peer.end.finish();
    assert!(peer.next().unwrap().fin);
    // The guest's FIN does not know of ours yet.
    peer.hear(Segment { fin: true, ..segment(guest(0), Some(ours(0)), &[]) });
    assert_eq!(peer.next().unwrap().ack, Some(guest(1)));
    peer.hear(segment(guest(1), Some(ours(1)), &[]));
    assert_eq!(peer.end.phase(), Phase::TimeWait);
    // Its FIN again: our acknowledgement was lost.
    peer.hear(Segment { fin: true, ..segment(guest(0), Some(ours(1)), &[]) });
    assert_eq!(peer.next().unwrap().ack, Some(guest(1)));
    peer.wait();
    assert_eq!(peer.end.phase(), Phase::Over(Ending::Finished));
}

#[test]
fn both_may_ask_at_once() {
    let mut peer = Peer::new(Endpoint::asking(OURS, 1460));
    let asking = peer.next().unwrap();
    assert!(asking.syn && asking.ack.is_none());
    peer.hear(syn(None));
    let answer = peer.next().unwrap();
    assert!(answer.syn && answer.ack == Some(guest(0)));
    peer.hear(segment(guest(0), Some(ours(0)), &[]));
    assert_eq!(peer.end.phase(), Phase::Open);
}

#[test]
fn a_call_that_is_refused_is_over_and_a_stray_reset_is_not_believed() {
    let mut peer = Peer::new(Endpoint::asking(OURS, 1460));
    peer.next();
    peer.hear(Segment { rst: true, ..segment(Seq(0), Some(ours(7)), &[]) });
    assert_eq!(peer.end.phase(), Phase::SynSent);
    peer.hear(Segment { rst: true, ..segment(Seq(0), Some(ours(0)), &[]) });
    assert_eq!(peer.end.phase(), Phase::Over(Ending::Reset));
}
