//! Real rings, driven well and badly.

use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, Guest, INDIRECT, NEXT, Ring, WRITE};

const SIZE: u16 = 8;

struct Rig {
    guest: Guest,
    ring: Ring,
    queue: Queue,
}

impl Rig {
    fn new(event_idx: bool) -> Self {
        let mut guest = Guest::new(1 << 20);
        let ring = Ring::new(&mut guest, SIZE, event_idx);
        let queue = Queue::new(guest.memory.clone(), guest.signals(), SIZE, &ring.state()).unwrap();
        Self { guest, ring, queue }
    }

    /// Offers descriptor 0 and returns how the queue failed.
    fn failure(&mut self) -> QueueError {
        self.ring.offer(0);
        let mut batch = self.queue.batch();
        assert!(batch.next().is_none());
        assert_eq!(batch.progress(), Progress::Idle);
        drop(batch);
        assert!(self.queue.signals().needs_reset());
        assert_eq!(self.queue.signals().failures(), 1);
        assert_eq!(self.guest.line.count(), 1);
        self.queue.failure().unwrap()
    }
}

#[test]
fn a_chain_is_read_and_written_across_its_buffers() {
    let mut rig = Rig::new(true);
    let at = rig.guest.alloc_with(b"abcdef");
    let to = rig.guest.alloc(64);
    let head = rig.ring.submit(&[
        Buffer::readable(at, 2),
        Buffer::readable(at + 2, 4),
        Buffer::writable(to, 3),
        Buffer::writable(to + 10, 4),
    ]);
    let mut batch = rig.queue.batch();
    let mut chain = batch.next().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (6, 7));
    assert_eq!(chain.read_array::<3>(), Ok(*b"abc"));
    assert_eq!(chain.readable().iter().map(|slice| slice.len()).collect::<Vec<_>>(), [3]);
    assert_eq!(chain.read(&mut [0; 4]), Err(ChainError::Short { missing: 1 }));
    assert_eq!(chain.read_array::<3>(), Ok(*b"def"));
    assert!(chain.readable().is_empty());
    let last = chain.take_last_writable().unwrap();
    assert_eq!(chain.write(b"123456789"), 6);
    last.copy_from(b"!");
    assert_eq!((chain.writable_len(), chain.writable().len()), (0, 0));
    assert!(chain.take_last_writable().is_none());
    batch.complete(chain, 7);
    drop(batch);
    assert_eq!(rig.ring.completion(), Some((head, 7)));
    assert_eq!(rig.guest.read(to, 14), b"123\0\0\0\0\0\0\x00456!");
}

#[test]
fn every_broken_chain_is_an_error_of_its_own() {
    type Case<'a> = (&'a str, &'a dyn Fn(&Ring, u64), ChainError);
    let cases: [Case<'_>; 16] = [
        (
            "next outside the table",
            &|ring, at| ring.set_descriptor(0, at, 1, NEXT, SIZE),
            ChainError::Index { index: SIZE, entries: SIZE },
        ),
        (
            "a loop of one",
            &|ring, at| ring.set_descriptor(0, at, 1, NEXT, 0),
            ChainError::TooLong { size: SIZE },
        ),
        (
            "a loop of two",
            &|ring, at| {
                ring.set_descriptor(0, at, 1, NEXT, 1);
                ring.set_descriptor(1, at, 1, NEXT, 0);
            },
            ChainError::TooLong { size: SIZE },
        ),
        ("empty", &|ring, at| ring.set_descriptor(0, at, 0, 0, 0), ChainError::Empty { address: 0x8000 }),
        (
            "outside memory",
            &|ring, _| ring.set_descriptor(0, 1 << 20, 1, 0, 0),
            ChainError::OutsideMemory { address: 1 << 20, len: 1 },
        ),
        (
            "across the end of memory",
            &|ring, _| ring.set_descriptor(0, (1 << 20) - 1, 2, 0, 0),
            ChainError::OutsideMemory { address: (1 << 20) - 1, len: 2 },
        ),
        (
            "around the end of addresses",
            &|ring, _| ring.set_descriptor(0, u64::MAX, u32::MAX, WRITE, 0),
            ChainError::OutsideMemory { address: u64::MAX, len: u32::MAX.into() },
        ),
        (
            "readable after writable",
            &|ring, at| {
                ring.set_descriptor(0, at, 1, WRITE | NEXT, 1);
                ring.set_descriptor(1, at, 1, 0, 0);
            },
            ChainError::ReadableAfterWritable,
        ),
        (
            "indirect in indirect",
            &|ring, at| {
                ring.set_descriptor(0, at, 16, INDIRECT, 0);
                ring.write_descriptor(at, 0, at, 16, INDIRECT, 0);
            },
            ChainError::NestedIndirect,
        ),
        (
            "indirect with next",
            &|ring, at| ring.set_descriptor(0, at, 16, INDIRECT | NEXT, 1),
            ChainError::IndirectNext,
        ),
        (
            "an empty table",
            &|ring, at| ring.set_descriptor(0, at, 0, INDIRECT, 0),
            ChainError::IndirectLength { len: 0, size: SIZE },
        ),
        (
            "a table of one and a half",
            &|ring, at| ring.set_descriptor(0, at, 24, INDIRECT, 0),
            ChainError::IndirectLength { len: 24, size: SIZE },
        ),
        (
            "a table larger than the queue",
            &|ring, at| ring.set_descriptor(0, at, 16 * 9, INDIRECT, 0),
            ChainError::IndirectLength { len: 144, size: SIZE },
        ),
        (
            "a table as large as can be",
            &|ring, at| ring.set_descriptor(0, at, u32::MAX - 15, INDIRECT, 0),
            ChainError::IndirectLength { len: u32::MAX - 15, size: SIZE },
        ),
        (
            "a table outside memory",
            &|ring, _| ring.set_descriptor(0, u64::MAX - 15, 32, INDIRECT, 0),
            ChainError::OutsideMemory { address: u64::MAX - 15, len: 16 },
        ),
        (
            "a loop in a table",
            &|ring, at| {
                ring.set_descriptor(0, at, 32, INDIRECT, 0);
                ring.write_descriptor(at, 0, at, 1, NEXT, 1);
                ring.write_descriptor(at, 1, at, 1, NEXT, 0);
            },
            ChainError::TooLong { size: SIZE },
        ),
    ];
    for (name, build, error) in cases {
        let mut rig = Rig::new(true);
        build(&rig.ring, 0x8000);
        assert_eq!(rig.failure(), QueueError::Chain(error), "{name}");
    }
}

#[test]
fn more_than_the_queue_in_direct_and_indirect_together_is_too_long() {
    let mut rig = Rig::new(true);
    let at = 0x8000;
    rig.ring.set_descriptor(0, at, 1, NEXT, 1);
    rig.ring.set_descriptor(1, 0x9000, 16 * 8, INDIRECT, 0);
    for i in 0..8 {
        rig.ring.write_descriptor(0x9000, i, at, 1, if i < 7 { NEXT } else { 0 }, i + 1);
    }
    assert_eq!(rig.failure(), QueueError::Chain(ChainError::TooLong { size: SIZE }));
}

#[test]
fn four_gibibytes_in_total_are_too_large() {
    // Memory that nothing touches costs nothing.
    let mut guest = Guest::new(5 << 30);
    let mut ring = Ring::new(&mut guest, SIZE, true);
    let mut queue = Queue::new(guest.memory.clone(), guest.signals(), SIZE, &ring.state()).unwrap();
    ring.submit(&[Buffer::writable(0x10_0000, u32::MAX as usize), Buffer::writable(0x8000, 1)]);
    assert!(queue.batch().next().is_none());
    assert_eq!(queue.failure(), Some(QueueError::Chain(ChainError::TooLarge)));
}

#[test]
fn heads_and_indices_outside_the_ring_are_errors() {
    let mut rig = Rig::new(true);
    rig.ring.offer(SIZE);
    assert!(rig.queue.batch().next().is_none());
    let index = ChainError::Index { index: SIZE, entries: SIZE };
    assert_eq!(rig.queue.failure(), Some(QueueError::Chain(index)));

    let mut rig = Rig::new(true);
    rig.ring.set_available_index(SIZE + 1);
    assert!(rig.queue.batch().next().is_none());
    assert_eq!(rig.queue.failure(), Some(QueueError::Ring));
    // A queue that broke stays broken, quietly.
    assert!(rig.queue.batch().next().is_none());
    assert_eq!(rig.queue.signals().failures(), 1);
}

#[test]
fn a_layout_outside_the_rules_is_refused() {
    let mut guest = Guest::new(1 << 20);
    let good = Ring::new(&mut guest, SIZE, true).state();
    let size = |size| LayoutError::Size { size, max: SIZE };
    let cases = [
        (QueueState { size: 0, ..good }, size(0)),
        (QueueState { size: 3, ..good }, size(3)),
        (QueueState { size: 16, ..good }, size(16)),
        (QueueState { descriptors: good.descriptors + 8, ..good }, LayoutError::Alignment),
        (QueueState { available: good.available + 1, ..good }, LayoutError::Alignment),
        (QueueState { used: good.used + 2, ..good }, LayoutError::Alignment),
        (QueueState { descriptors: (1 << 20) - 64, ..good }, LayoutError::OutsideMemory),
        (QueueState { available: (1 << 20) - 2, ..good }, LayoutError::OutsideMemory),
        (QueueState { available: 0, ..good }, LayoutError::OutsideMemory),
        (QueueState { used: u64::MAX - 3, ..good }, LayoutError::OutsideMemory),
        (QueueState { descriptors: u64::MAX - 15, ..good }, LayoutError::OutsideMemory),
    ];
    for (state, error) in cases {
        let made = Queue::new(guest.memory.clone(), guest.signals(), SIZE, &state);
        assert_eq!(made.unwrap_err(), error, "{state:?}");
    }
}

#[test]
fn a_dropped_chain_goes_back_with_nothing_written_and_one_put_back_comes_again() {
    let mut rig = Rig::new(true);
    let first = rig.ring.submit(&[Buffer::writable(0x8000, 8)]);
    let second = rig.ring.submit(&[Buffer::writable(0x9000, 8)]);
    let mut batch = rig.queue.batch();
    drop(batch.next().unwrap());
    let chain = batch.next().unwrap();
    batch.put_back(chain);
    drop(batch);
    assert_eq!(rig.ring.completion(), Some((first, 0)));
    assert_eq!(rig.ring.completion(), None);
    let mut batch = rig.queue.batch();
    let mut chain = batch.next().unwrap();
    assert_eq!(chain.write(b"x"), 1);
    batch.complete(chain, 1);
    drop(batch);
    assert_eq!(rig.ring.completion(), Some((second, 1)));
}

#[test]
fn chains_set_aside_come_back_all_at_once_and_those_unused_come_again() {
    let mut rig = Rig::new(true);
    let at = rig.guest.alloc(64);
    let heads: Vec<u16> = (0..4).map(|i| rig.ring.submit(&[Buffer::writable(at + 8 * i, 8)])).collect();
    rig.ring.set_used_event(1);
    let mut batch = rig.queue.batch();
    for _ in 0..3 {
        let chain = batch.next().unwrap();
        batch.set_aside(chain);
    }
    assert_eq!(rig.ring.completion(), None);
    batch.complete_aside(&[8, 3]);
    assert_eq!(rig.ring.completion(), Some((heads[0], 8)));
    assert_eq!(rig.ring.completion(), Some((heads[1], 3)));
    assert_eq!(rig.ring.completion(), None);
    // What is dropped without a word is put back, too.
    for _ in 0..2 {
        let chain = batch.next().unwrap();
        batch.set_aside(chain);
    }
    drop(batch);
    assert_eq!(rig.guest.line.count(), 1, "the second completion is the one that was waited for");
    assert_eq!(rig.ring.completion(), None);
    let mut batch = rig.queue.batch();
    for head in [heads[2], heads[3]] {
        let chain = batch.next().unwrap();
        assert_eq!(chain.head(), head);
        batch.complete(chain, 1);
    }
    assert!(batch.next().is_none());
}

#[test]
fn a_queue_stops_and_continues_where_it_was() {
    let mut rig = Rig::new(true);
    for _ in 0..3 {
        rig.ring.submit(&[Buffer::writable(0x8000, 8)]);
    }
    let mut batch = rig.queue.batch();
    let chain = batch.next().unwrap();
    batch.complete(chain, 1);
    drop(batch);
    let signals = rig.queue.signals().clone();
    let state = rig.queue.stop();
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<QueueState>(&json).unwrap(), state);
    let mut queue = Queue::new(rig.guest.memory.clone(), signals, SIZE, &state).unwrap();
    assert_eq!(queue.state(), state);
    let mut batch = queue.batch();
    for _ in 0..2 {
        let chain = batch.next().unwrap();
        batch.complete(chain, 2);
    }
    assert!(batch.next().is_none());
    drop(batch);
    let lens: Vec<_> = std::iter::from_fn(|| rig.ring.completion()).map(|(_, len)| len).collect();
    assert_eq!(lens, [1, 2, 2]);
}

/// Completes `n` chains in one batch.
fn complete(rig: &mut Rig, n: usize) {
    for _ in 0..n {
        rig.ring.submit(&[Buffer::writable(0x8000, 8)]);
    }
    let mut batch = rig.queue.batch();
    for _ in 0..n {
        let chain = batch.next().unwrap();
        batch.complete(chain, 0);
    }
    assert!(batch.next().is_none());
}

#[test]
fn event_idx_decides_the_interrupt_across_the_wrap() {
    let mut rig = Rig::new(true);
    let mut used = 0u16;
    for round in 0..20_000u16 {
        // The driver wants to know about the completion `ahead` from now.
        let ahead = round % 5;
        rig.ring.set_used_event(used.wrapping_add(ahead));
        let before = rig.guest.line.count();
        complete(&mut rig, 4);
        while rig.ring.completion().is_some() {}
        used = used.wrapping_add(4);
        assert_eq!(rig.guest.line.count() - before, u64::from(ahead < 4), "round {round}");
        assert_eq!(rig.ring.available_event(), used);
    }
}

#[test]
fn without_event_idx_the_flags_decide() {
    let mut rig = Rig::new(false);
    complete(&mut rig, 2);
    assert_eq!(rig.guest.line.count(), 1);
    assert_eq!(rig.ring.used_flags(), 0);
    rig.ring.set_available_flags(1);
    complete(&mut rig, 2);
    assert_eq!(rig.guest.line.count(), 1);
    // While it works, the device wants no notifications.
    let batch = rig.queue.batch();
    assert_eq!(rig.ring.used_flags(), 1);
    drop(batch);
    // A batch that completes nothing says nothing.
    rig.ring.set_available_flags(0);
    drop(rig.queue.batch());
    assert_eq!(rig.guest.line.count(), 1);
}

#[test]
fn a_driver_that_never_stops_is_told_to_wait() {
    let mut rig = Rig::new(true);
    let Rig { queue, ring, .. } = &mut rig;
    let mut batch = queue.batch();
    let mut served = 0;
    ring.submit(&[Buffer::writable(0x8000, 8)]);
    while let Some(chain) = batch.next() {
        batch.complete(chain, 0);
        ring.submit(&[Buffer::writable(0x8000, 8)]);
        served += 1;
    }
    assert_eq!((served, batch.progress()), (u32::from(SIZE) * 4, Progress::More));
}

proptest! {
    /// Whatever lies in the rings, every chain that is given out obeys the rules, and the work ends.
    #[test]
    fn random_rings_never_break_the_device(
        table in prop::collection::vec((0u64..0x1_2000, any::<u32>(), any::<u16>(), 0u16..10), 8),
        small in any::<bool>(),
        heads in prop::collection::vec(0u16..10, 1..9),
        index in prop::option::of(any::<u16>()),
    ) {
        let mut guest = Guest::new(0x1_0000);
        let mut ring = Ring::new(&mut guest, SIZE, true);
        let indirect = guest.alloc(4096);
        for (i, (address, len, flags, next)) in (0..).zip(&table) {
            let len = if small { len % 64 } else { *len };
            let address = if flags & INDIRECT != 0 { indirect } else { *address };
            ring.set_descriptor(i, address, len, *flags, *next);
            ring.write_descriptor(indirect, i, address, len % 0x4000, flags >> 3, *next);
        }
        for head in heads {
            ring.offer(head);
        }
        if let Some(index) = index {
            ring.set_available_index(index);
        }
        let mut queue = Queue::new(guest.memory.clone(), guest.signals(), SIZE, &ring.state()).unwrap();
        let mut served = 0;
        let mut batch = queue.batch();
        while let Some(mut chain) = batch.next() {
            served += 1;
            prop_assert!(chain.readable().len() + chain.writable().len() <= usize::from(SIZE));
            let lens = |slices: &[Slice<'_>]| slices.iter().map(|slice| slice.len()).sum::<usize>();
            prop_assert_eq!(lens(chain.readable()), chain.readable_len());
            prop_assert_eq!(lens(chain.writable()), chain.writable_len());
            let mut bytes = vec![0; chain.readable_len() / 2];
            chain.read(&mut bytes).unwrap();
            prop_assert_eq!(lens(chain.readable()), chain.readable_len());
            // The rings themselves may be among the buffers.
            let n = chain.write(&[0x5a; 100]);
            prop_assert_eq!(lens(chain.writable()), chain.writable_len());
            batch.complete(chain, u32::try_from(n).unwrap());
        }
        prop_assert!(served <= 4 * u32::from(SIZE));
    }
}
