//! Random exchanges: benign ones that must come through, and hostile ones that must come to nothing.

use proptest::prelude::*;

use super::*;
use crate::testing::{NEXT, WRITE};

#[derive(Clone, Debug)]
enum Step {
    GuestSends(usize, usize),
    HostSends(usize),
    Offers(usize),
    Reads,
    Fills(usize),
    Restarts,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (14usize..9000, 1usize..4096).prop_map(|(len, pieces)| Step::GuestSends(len, pieces)),
        4 => (14usize..9000).prop_map(Step::HostSends),
        6 => (1usize..20).prop_map(Step::Offers),
        4 => Just(Step::Reads),
        1 => (0usize..4).prop_map(Step::Fills),
        1 => Just(Step::Restarts),
    ]
}

/// What a frame of this length needs so that it may pass.
fn offload(len: usize) -> Offload {
    if len > 1518 { cut(Segments::Tcp4, 1460) } else { Offload::default() }
}

/// A frame whose every byte says which frame it is of.
fn numbered(n: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((n * 31 + i) % 251).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Frames arrive whole, unchanged and in order in both directions, whatever the buffers are.
    #[test]
    fn frames_are_whole_and_in_order(
        buffer in prop_oneof![Just(1536usize), 12..200usize, Just(4096usize)],
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut rig = Rig::new(u64::MAX);
        let (mut sent, mut given, mut got, mut free) = (0, 0, 0, usize::from(QUEUE_SIZE));
        // A frame that all buffers together cannot hold is dropped, which is not what this is about.
        let most = buffer * usize::from(QUEUE_SIZE) - HEADER;
        let mut lengths = Vec::new();
        let mut check = |rig: &mut Rig, lengths: &[(usize, usize)], free: &mut usize| {
            while let Some((header, bytes, used)) = rig.received() {
                let (n, len) = lengths[got];
                assert_eq!(bytes, numbered(n, len));
                assert_eq!(header, offload(len).encode(u16::try_from(used.len()).unwrap()));
                got += 1;
                *free += used.len();
            }
            got
        };
        for step in steps {
            match step {
                Step::GuestSends(len, pieces) => {
                    let pieces = pieces.max(len / 200);
                    rig.send(offload(len).encode(0), &numbered(sent, len), pieces);
                    sent += 1;
                    let _ = rig.kick(TX);
                    while rig.tx.completion().is_some() {}
                }
                Step::HostSends(len) => {
                    let len = len.min(most);
                    lengths.push((given, len));
                    rig.wait(offload(len), &numbered(given, len));
                    given += 1;
                    let _ = rig.net().poll();
                }
                Step::Offers(n) => {
                    for _ in 0..n.min(free) {
                        rig.offer(buffer);
                        free -= 1;
                    }
                    let _ = rig.kick(RX);
                }
                Step::Reads => {
                    check(&mut rig, &lengths, &mut free);
                }
                Step::Fills(space) => rig.net().backend_mut().space = space,
                Step::Restarts => {
                    let state = rig.transport.stop();
                    rig.transport.start(&state).unwrap();
                    let _ = (rig.kick(RX), rig.kick(TX));
                }
            }
            prop_assert!(!rig.transport.signals().needs_reset());
            // What is in flight stays within the rings.
            if rig.net().backend().space < 4 && sent % 64 == 63 {
                rig.net().backend_mut().space = usize::MAX;
                let _ = rig.net().poll();
            }
        }
        rig.net().backend_mut().space = usize::MAX;
        let _ = rig.net().poll();
        loop {
            let before = check(&mut rig, &lengths, &mut free);
            if before == given {
                break;
            }
            for _ in 0..free {
                rig.offer(buffer);
            }
            free = 0;
            let _ = rig.kick(RX);
            prop_assert!(check(&mut rig, &lengths, &mut free) > before, "{} of {} came", before, given);
        }
        let out: Vec<_> = rig.net().backend().sent.iter().map(|(_, bytes)| bytes.clone()).collect();
        prop_assert_eq!(out.len(), sent);
        for (n, bytes) in out.iter().enumerate() {
            prop_assert_eq!(bytes, &numbered(n, bytes.len()));
        }
        let counters = rig.net().counters();
        prop_assert_eq!((counters.transmit_refused, counters.receive_refused), Default::default());
    }

    /// Whatever header a guest writes before whatever frame, what reaches the backend keeps the rules.
    #[test]
    fn random_headers_never_reach_the_backend_broken(
        frames in prop::collection::vec(
            (
                (0u8..4, prop_oneof![4 => 0u8..6, 1 => any::<u8>()]),
                (any::<u16>(), prop_oneof![0u16..2000, any::<u16>()]),
                (prop_oneof![0u16..100, any::<u16>()], prop_oneof![0u16..20, any::<u16>()]),
                1usize..70_000,
            ),
            1..40,
        ),
        features in any::<u64>(),
    ) {
        let mut rig = Rig::new(features & !RING_EVENT_IDX);
        let count = frames.len();
        for ((flags, kind), (headers, size), (start, offset), len) in frames {
            let mut header = [0; HEADER];
            header[..2].copy_from_slice(&[flags, kind]);
            for (at, value) in [(2, headers), (4, size), (6, start), (8, offset)] {
                header[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            rig.send(header, &vec![7; len], 4096);
            let _ = rig.kick(TX);
        }
        prop_assert_eq!(std::iter::from_fn(|| rig.tx.completion()).count(), count);
        prop_assert!(!rig.transport.signals().needs_reset());
        let net = rig.net();
        let refused = net.counters().transmit_refused;
        let dropped = refused.length + refused.checksum + refused.segmentation;
        prop_assert_eq!(usize::try_from(dropped).unwrap() + net.backend().sent.len(), count);
        for (offload, bytes) in &net.backend().sent {
            prop_assert!(bytes.len() >= 14 && bytes.len() <= MAX_FRAME);
            if let Checksum::Partial { start, offset } = offload.checksum {
                prop_assert!(usize::from(start) + usize::from(offset) + 2 <= bytes.len());
            }
            match offload.segmentation {
                None => prop_assert!(bytes.len() <= 1518),
                Some(cut) => {
                    let partial = matches!(offload.checksum, Checksum::Partial { .. });
                    prop_assert!(partial);
                    prop_assert!(cut.size.get() <= 1500);
                }
            }
        }
    }

    /// Whatever is in the rings, nothing panics and nothing loops.
    #[test]
    fn random_rings_never_break_the_card(
        descriptors in prop::collection::vec(
            (0u64..70_000, prop_oneof![0u32..3000, any::<u32>()], 0u16..8, 0u16..12),
            1..12,
        ),
        heads in prop::collection::vec((0usize..2, 0u16..12), 1..30),
        indices in prop::collection::vec((0usize..2, any::<u16>()), 0..4),
        waiting in prop::collection::vec(14usize..1519, 0..10),
        features in any::<u64>(),
    ) {
        let mut rig = Rig::new(features);
        for (i, (address, len, flags, next)) in (0..).zip(descriptors) {
            let at = rig.guest.alloc(1) + address;
            rig.rx.set_descriptor(i, at, len, (flags & NEXT) | WRITE | (flags & 4), next);
            rig.tx.set_descriptor(i, at, len, flags, next);
        }
        for len in waiting {
            rig.wait(Offload::default(), &frame(len));
        }
        for (queue, head) in heads {
            if queue == RX { rig.rx.offer(head) } else { rig.tx.offer(head) }
            let _ = (rig.kick(queue), rig.net().poll());
        }
        for (queue, index) in indices {
            if queue == RX { rig.rx.set_available_index(index) } else { rig.tx.set_available_index(index) }
            let _ = (rig.kick(queue), rig.net().poll());
        }
        let state = rig.transport.stop();
        prop_assert!(rig.transport.start(&state).is_ok());
    }
}
