//! A card on a wire of frames in memory, behind real rings.

mod random;

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex, MutexGuard};

use super::*;
use crate::testing::{Buffer, Guest, Ring, bring_up, read_register};
use crate::{Slice, Transport};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 1500;

/// Frames that went in and wait to come out.
#[derive(Debug, Default)]
struct Wire {
    takes: Offloads,
    gives: Offloads,
    accepted: Option<Offloads>,
    sent: Vec<(Offload, Vec<u8>)>,
    waiting: VecDeque<(Offload, Vec<u8>)>,
    /// How many frames it still has room for.
    space: usize,
    /// What it says too much when it is asked for a length.
    slack: usize,
    settled: usize,
    discarded: usize,
    gone: usize,
}

impl Backend for Wire {
    fn takes(&self) -> Offloads {
        self.takes
    }

    fn gives(&self) -> Offloads {
        self.gives
    }

    fn negotiated(&mut self, accepted: Offloads) {
        self.accepted = Some(accepted);
    }

    fn transmit(&mut self, frame: Frame<'_>) -> Sent {
        let Some(space) = self.space.checked_sub(1) else { return Sent::Full };
        self.space = space;
        let mut bytes = vec![0; frame.len];
        assert_eq!(frame.copy_to(&mut bytes), frame.len);
        self.sent.push((frame.offload, bytes));
        Sent::Taken
    }

    fn settle(&mut self) {
        self.settled += 1;
    }

    fn pending(&mut self) -> Option<usize> {
        self.waiting.front().map(|(_, bytes)| bytes.len() + self.slack)
    }

    fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)> {
        let (offload, bytes) = self.waiting.pop_front().unwrap();
        let mut rest = bytes.as_slice();
        for slice in to {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
        assert!(rest.is_empty(), "{} bytes have no place", rest.len());
        Some((bytes.len(), offload))
    }

    fn discard(&mut self) {
        self.waiting.pop_front().unwrap();
        self.discarded += 1;
    }

    fn driver_gone(&mut self) {
        self.gone += 1;
    }
}

struct Rig {
    guest: Guest,
    rx: Ring,
    tx: Ring,
    transport: Transport,
    net: Arc<Mutex<Net<Wire>>>,
    /// Address and size of the buffers of the receive queue, by the head of their chain.
    buffers: Vec<(u16, u64, usize)>,
}

impl Rig {
    /// A driver that accepts of everything what `features` has.
    fn new(features: u64) -> Self {
        let wire = Wire { takes: Offloads::ALL, gives: Offloads::ALL, space: usize::MAX, ..Wire::default() };
        let net = Net::new(wire, Mac::try_from(MAC).unwrap(), Mtu::try_from(MTU).unwrap());
        let net = Arc::new(Mutex::new(net));
        let mut guest = Guest::new(64 << 20);
        let event_idx = features & RING_EVENT_IDX != 0;
        let rx = Ring::new(&mut guest, QUEUE_SIZE, event_idx);
        let tx = Ring::new(&mut guest, QUEUE_SIZE, event_idx);
        let mut transport = Transport::new(net.clone(), guest.memory.clone(), guest.line.clone());
        bring_up(&mut transport, features | VERSION_1, &[&rx, &tx]);
        assert!(transport.is_active());
        Self { guest, rx, tx, transport, net, buffers: Vec::new() }
    }

    fn net(&self) -> MutexGuard<'_, Net<Wire>> {
        self.net.lock().unwrap()
    }

    fn kick(&self, index: usize) -> Progress {
        self.net().kick(index)
    }

    /// Makes a frame available for transmission, its header and data in buffers of so many bytes.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8], pieces: usize) -> u16 {
        let bytes = [&header[..], frame].concat();
        let at = self.guest.alloc_with(&bytes);
        let buffers: Vec<_> = (0..bytes.len())
            .step_by(pieces)
            .map(|from| Buffer::readable(at + from as u64, pieces.min(bytes.len() - from)))
            .collect();
        let guest = &mut self.guest;
        self.tx.submit_indirect(guest, &buffers)
    }

    /// Gives the receive queue a buffer.
    fn offer(&mut self, size: usize) {
        let at = self.guest.alloc_with(&vec![0xee; size]);
        let head = self.rx.submit(&[Buffer::writable(at, size)]);
        self.buffers.push((head, at, size));
    }

    /// The next received frame: its header, its bytes and those of each of its buffers.
    fn received(&mut self) -> Option<([u8; HEADER], Vec<u8>, Vec<u32>)> {
        let mut bytes = Vec::new();
        let mut used = Vec::new();
        let mut missing = 1;
        while missing > 0 {
            let (head, written) = self.rx.completion()?;
            let at = self.buffers.iter().rposition(|(h, ..)| *h == head).unwrap();
            let (_, address, size) = self.buffers.remove(at);
            assert!(written as usize <= size);
            bytes.extend(self.guest.read(address, written as usize));
            if used.is_empty() {
                missing = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
            }
            used.push(written);
            missing -= 1;
        }
        let frame = bytes.split_off(HEADER);
        Some((bytes.try_into().unwrap(), frame, used))
    }

    fn wait(&self, offload: Offload, frame: &[u8]) {
        self.net().backend_mut().waiting.push_back((offload, frame.to_vec()));
    }

    fn accept(&self) -> Offloads {
        self.net().backend().accepted.unwrap()
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

fn partial(start: u16, offset: u16) -> Offload {
    Offload { checksum: Checksum::Partial { start, offset }, segmentation: None }
}

fn cut(segments: Segments, size: u16) -> Offload {
    let size = NonZeroU16::new(size).unwrap();
    let segmentation = Some(Segmentation { segments, size, headers: 54 });
    Offload { segmentation, ..partial(34, if segments == Segments::Udp { 6 } else { 16 }) }
}

const PLAIN: [u8; HEADER] = [0; HEADER];

#[test]
fn the_card_says_who_it_is() {
    let mut rig = Rig::new(u64::MAX);
    let mut config = [0xff; 16];
    rig.net().read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0xdc, 5, 0, 0, 0, 0]);
    assert_eq!(read_register(&mut rig.transport, 0x08), 1);
    assert_eq!(Mac::try_from([3, 0, 0, 0, 0, 1]), Err(NotAStation([3, 0, 0, 0, 0, 1])));
    assert_eq!(Mac::try_from([0; 6]), Err(NotAStation([0; 6])));
    assert_eq!(Mtu::try_from(1279), Err(SmallMtu(1279)));
}

#[test]
fn features_are_what_the_backend_does() {
    let features = |takes, gives| {
        let wire = Wire { takes, gives, ..Wire::default() };
        Net::new(wire, Mac::try_from(MAC).unwrap(), Mtu::default()).features()
    };
    let none = Offloads::default();
    let base = (1 << 32) | (1 << 29) | (1 << 28) | (1 << 3) | (1 << 5) | (1 << 15) | (1 << 16);
    assert_eq!(features(none, none), base);
    // Frames that are to be cut need checksums.
    assert_eq!(features(Offloads { checksum: false, ..Offloads::ALL }, none), base);
    assert_eq!(features(Offloads::ALL, none), base | 1 | (1 << 11) | (1 << 12) | (1 << 56));
    assert_eq!(features(none, Offloads::ALL), base | 2 | (1 << 7) | (1 << 8) | (3 << 54));
}

#[test]
fn what_depends_on_something_that_was_not_accepted_is_not_accepted() {
    let rig = Rig::new(!feature::GUEST_CSUM);
    assert_eq!(rig.accept(), Offloads::default());
    // UDP is one kind here: a driver takes it over both protocols or not at all.
    let rig = Rig::new(!(1 << 55) & !feature::GUEST_TSO6);
    assert_eq!(rig.accept(), Offloads { tcp6: false, udp: false, ..Offloads::ALL });
}

#[test]
fn a_frame_goes_out_whatever_buffers_it_is_in() {
    let mut rig = Rig::new(u64::MAX);
    for pieces in [1514, 12, 7, 100] {
        let head = rig.send(PLAIN, &frame(600), pieces);
        assert_eq!(rig.kick(TX), Progress::Idle);
        assert_eq!(rig.tx.completion(), Some((head, 0)));
    }
    assert_eq!(rig.net().backend().sent, vec![(Offload::default(), frame(600)); 4]);
    assert_eq!(rig.net().counters().transmitted, Traffic { frames: 4, bytes: 2400 });
    assert_eq!(rig.net().backend().settled, 4);
}

#[test]
fn offloads_go_out_as_the_guest_asks() {
    let mut rig = Rig::new(u64::MAX);
    let offloads = [
        partial(34, 16),
        partial(1500, 12),
        cut(Segments::Tcp4, 1460),
        cut(Segments::Tcp6, 1),
        cut(Segments::Udp, 1400),
    ];
    for offload in offloads {
        let len = if offload.segmentation.is_some() { MAX_FRAME } else { 1514 };
        rig.send(offload.encode(0), &frame(len), 4096);
    }
    assert_eq!(rig.kick(TX), Progress::Idle);
    let sent: Vec<_> = rig.net().backend().sent.iter().map(|(offload, _)| *offload).collect();
    assert_eq!(sent, offloads);
    assert_eq!(rig.net().backend().sent[2].1, frame(MAX_FRAME));
    assert_eq!(rig.net().counters().transmit_refused, Refused::default());
}

#[test]
fn golden_header() {
    let header = [1, 5, 54, 0, 0x78, 5, 34, 0, 6, 0, 0, 0];
    let offload = Offload::decode(header, 5000, Offloads::ALL, Mtu::default()).unwrap();
    assert_eq!(offload, cut(Segments::Udp, 1400));
    assert_eq!(offload.encode(3), [1, 5, 54, 0, 0x78, 5, 34, 0, 6, 0, 3, 0]);
    let verified = Offload { checksum: Checksum::Verified, segmentation: None };
    assert_eq!(verified.encode(1), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn a_frame_that_cannot_be_is_dropped_and_counted() {
    let header = |offload: Offload| offload.encode(0);
    let with = |at: usize, value: u16| {
        let mut raw = header(cut(Segments::Tcp4, 1460));
        raw[at..at + 2].copy_from_slice(&value.to_le_bytes());
        raw
    };
    let kind = |kind: u8| [&[1, kind], &with(2, 54)[2..]].concat().try_into().unwrap();
    let length = |counters: Refused| counters.length;
    let checksum = |counters: Refused| counters.checksum;
    let segmentation = |counters: Refused| counters.segmentation;
    type Case = ([u8; HEADER], usize, fn(Refused) -> u64);
    let cases: [Case; 15] = [
        (PLAIN, 13, length),
        (PLAIN, 1519, length),
        (header(cut(Segments::Tcp4, 1460)), MAX_FRAME + 1, length),
        // The sum's field is beyond the frame, or its start is in the Ethernet header.
        (header(partial(34, 16)), 51, checksum),
        (header(partial(u16::MAX, u16::MAX)), 1514, checksum),
        (header(partial(13, 16)), 1514, checksum),
        // No such kind, among them the fragments of old drivers and the mark for congestion.
        (kind(2), 4000, segmentation),
        (kind(3), 4000, segmentation),
        (kind(0x81), 4000, segmentation),
        // No sum to be completed in each piece.
        ([&[0, 1], &with(2, 54)[2..]].concat().try_into().unwrap(), 4000, segmentation),
        // Pieces of nothing, or larger than a packet.
        (with(4, 0), 4000, segmentation),
        (with(4, 1501), 4000, segmentation),
        // Headers longer than the frame.
        (with(2, 4001), 4000, segmentation),
        // More datagrams than anybody sends at once.
        (header(cut(Segments::Udp, 10)), 34 + 8 + 1281, segmentation),
        (kind(0xff), 4000, segmentation),
    ];
    for (i, (header, len, reason)) in cases.into_iter().enumerate() {
        let mut rig = Rig::new(u64::MAX);
        let head = rig.send(header, &frame(len), 4096);
        assert_eq!(rig.kick(TX), Progress::Idle);
        assert_eq!(rig.tx.completion(), Some((head, 0)), "case {i}");
        let counters = rig.net().counters().transmit_refused;
        assert_eq!(reason(counters), 1, "case {i}: {counters:?}");
        assert_eq!(counters.length + counters.checksum + counters.segmentation, 1, "case {i}");
        assert!(rig.net().backend().sent.is_empty(), "case {i}");
        assert!(!rig.transport.signals().needs_reset(), "case {i}");
        // The next frame passes.
        rig.send(self::header(cut(Segments::Udp, 10)), &frame(34 + 8 + 1280), 4096);
        assert_eq!(rig.kick(TX), Progress::Idle);
        assert_eq!(rig.net().backend().sent.len(), 1, "case {i}");
    }
}

fn header(offload: Offload) -> [u8; HEADER] {
    offload.encode(0)
}

#[test]
fn what_the_driver_did_not_negotiate_it_cannot_send() {
    let mut rig = Rig::new(!feature::HOST_TSO4);
    rig.send(header(cut(Segments::Tcp4, 1460)), &frame(3000), 4096);
    rig.send(header(cut(Segments::Tcp6, 1460)), &frame(3000), 4096);
    assert_eq!(rig.kick(TX), Progress::Idle);
    assert_eq!(rig.net().backend().sent.len(), 1);
    assert_eq!(rig.net().counters().transmit_refused, Refused { segmentation: 1, ..Refused::default() });
    let mut rig = Rig::new(!feature::CSUM);
    rig.send(header(partial(34, 16)), &frame(1000), 4096);
    rig.send(header(cut(Segments::Tcp6, 1460)), &frame(3000), 4096);
    assert_eq!(rig.kick(TX), Progress::Idle);
    assert_eq!(rig.net().counters().transmit_refused, Refused { checksum: 2, ..Refused::default() });
}

#[test]
fn a_chain_that_breaks_a_rule_breaks_the_card() {
    type Case = (usize, fn(&mut Rig));
    let cases: [Case; 5] = [
        // No room for a header, or only for a header.
        (TX, |rig| {
            let at = rig.guest.alloc(64);
            rig.tx.submit(&[Buffer::readable(at, HEADER - 1)]);
        }),
        (TX, |rig| {
            let at = rig.guest.alloc(64);
            rig.tx.submit(&[Buffer::readable(at, 64), Buffer::writable(at, 1)]);
        }),
        (RX, |rig| {
            let at = rig.guest.alloc(64);
            rig.rx.submit(&[Buffer::writable(at, HEADER - 1)]);
        }),
        (RX, |rig| {
            let at = rig.guest.alloc(64);
            rig.rx.submit(&[Buffer::readable(at, 1), Buffer::writable(at, 2000)]);
        }),
        (RX, |rig| rig.rx.offer(QUEUE_SIZE)),
    ];
    for (i, (queue, breaks)) in cases.into_iter().enumerate() {
        let mut rig = Rig::new(u64::MAX);
        rig.wait(Offload::default(), &frame(100));
        breaks(&mut rig);
        assert_eq!(rig.kick(queue), Progress::Idle, "case {i}");
        assert!(rig.transport.signals().needs_reset(), "case {i}");
        assert_eq!(rig.transport.signals().failures(), 1, "case {i}");
        // Nothing more is done for this driver, and the next one finds a card that works.
        rig.offer(2000);
        assert_eq!((rig.kick(queue), rig.net().poll()), (Progress::Idle, Progress::Idle), "case {i}");
        rig.transport.reset();
        // Bringing it up had reset it, too.
        assert_eq!(rig.net().backend().gone, 2);
        let rx = Ring::new(&mut rig.guest, QUEUE_SIZE, true);
        rig.rx = rx;
        bring_up(&mut rig.transport, u64::MAX, &[&rig.rx, &rig.tx]);
        rig.buffers.clear();
        rig.offer(2000);
        rig.wait(Offload::default(), &frame(100));
        let _ = rig.net().poll();
        assert_eq!(rig.received().unwrap().1, frame(100), "case {i}");
    }
}

#[test]
fn a_frame_comes_in_whatever_the_driver_merges() {
    for merges in [0, feature::MRG_RXBUF] {
        let mut rig = Rig::new(!feature::MRG_RXBUF | merges);
        rig.offer(2000);
        rig.offer(2000);
        rig.wait(Offload::default(), &frame(60));
        rig.wait(Offload { checksum: Checksum::Verified, segmentation: None }, &frame(1514));
        assert_eq!(rig.net().poll(), Progress::Idle);
        assert_eq!(rig.received(), Some(([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(60), vec![72])));
        assert_eq!(rig.received(), Some(([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(1514), vec![1526])));
        assert_eq!(rig.received(), None);
        assert_eq!(rig.net().counters().received, Traffic { frames: 2, bytes: 1574 });
    }
}

#[test]
fn a_large_frame_is_spread_over_merged_buffers() {
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..50 {
        rig.offer(1536);
    }
    let offload = cut(Segments::Tcp6, 1440);
    rig.wait(offload, &frame(65550));
    rig.wait(Offload::default(), &frame(60));
    assert_eq!(rig.net().poll(), Progress::Idle);
    let (header, bytes, used) = rig.received().unwrap();
    assert_eq!(header, offload.encode(43));
    assert!(bytes == frame(65550));
    assert_eq!(used, [&[1536; 42][..], &[65550 + 12 - 42 * 1536]].concat());
    assert_eq!(rig.received().unwrap().1, frame(60));
}

#[test]
fn a_large_frame_is_one_chain_for_a_driver_that_does_not_merge() {
    let mut rig = Rig::new(!feature::MRG_RXBUF);
    let at = rig.guest.alloc(70_000);
    let mut buffers = Vec::new();
    let mut end = at;
    for len in [5, 7, 3, 4081].into_iter().chain([4096; 16]) {
        buffers.push(Buffer::writable(end, len));
        end += len as u64;
    }
    let guest = &mut rig.guest;
    let head = rig.rx.submit_indirect(guest, &buffers);
    rig.wait(cut(Segments::Tcp4, 1460), &frame(65550));
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.rx.completion(), Some((head, 65562)));
    assert_eq!(rig.guest.read(at, HEADER), cut(Segments::Tcp4, 1460).encode(1));
    assert!(rig.guest.read(at + 12, 65550) == frame(65550));
}

#[test]
fn a_driver_without_offloads_gets_no_such_frames() {
    let mut rig = Rig::new(feature::GUEST_CSUM | feature::GUEST_TSO6 | feature::MRG_RXBUF);
    assert_eq!(rig.accept(), Offloads { checksum: true, tcp6: true, ..Offloads::default() });
    for _ in 0..8 {
        rig.offer(2000);
    }
    rig.wait(cut(Segments::Tcp4, 1460), &frame(3000));
    rig.wait(cut(Segments::Udp, 1400), &frame(3000));
    rig.wait(Offload::default(), &frame(3000));
    rig.wait(cut(Segments::Tcp6, 1440), &frame(3000));
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.received().unwrap().0, cut(Segments::Tcp6, 1440).encode(2));
    assert_eq!(rig.received(), None);
    let refused = Refused { segmentation: 2, length: 1, ..Refused::default() };
    assert_eq!(rig.net().counters().receive_refused, refused);

    let mut rig = Rig::new(0);
    rig.offer(2000);
    rig.wait(partial(34, 16), &frame(100));
    rig.wait(Offload { checksum: Checksum::Verified, segmentation: None }, &frame(100));
    rig.wait(Offload::default(), &frame(100));
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.received().unwrap().0, Offload::default().encode(1));
    assert_eq!(rig.net().counters().receive_refused, Refused { checksum: 2, ..Refused::default() });
}

#[test]
fn a_frame_waits_for_buffers_and_goes_when_they_come() {
    let mut rig = Rig::new(u64::MAX);
    rig.wait(cut(Segments::Tcp4, 1460), &frame(5000));
    assert_eq!(rig.kick(RX), Progress::Idle);
    for n in 1..=3 {
        assert_eq!(rig.rx.available_event(), n - 1, "the driver is asked to tell of buffer {n}");
        assert_eq!(rig.received(), None);
        rig.offer(2000);
        assert_eq!(rig.kick(RX), Progress::Idle);
    }
    assert_eq!(rig.received().unwrap().2, [2000, 2000, 1012]);
    // While there are buffers, nobody wants to hear of more.
    let asked = rig.rx.available_event();
    rig.offer(2000);
    rig.offer(2000);
    rig.wait(Offload::default(), &frame(100));
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.received().unwrap().1, frame(100));
    assert_eq!(rig.rx.available_event(), asked);
}

#[test]
fn a_frame_that_fits_no_buffer_is_dropped() {
    let mut rig = Rig::new(!feature::MRG_RXBUF);
    rig.offer(100);
    rig.offer(2000);
    rig.wait(Offload::default(), &frame(89));
    rig.wait(Offload::default(), &frame(88));
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.received().unwrap().1, frame(88));
    assert_eq!(rig.net().backend().discarded, 1);
    assert_eq!(rig.net().counters().receive_refused, Refused { room: 1, ..Refused::default() });

    // All of the queue together is too little.
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..QUEUE_SIZE {
        rig.offer(20);
    }
    rig.wait(cut(Segments::Tcp4, 1460), &frame(usize::from(QUEUE_SIZE) * 20 - HEADER + 1));
    rig.wait(cut(Segments::Tcp4, 1460), &frame(usize::from(QUEUE_SIZE) * 20 - HEADER));
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.received().unwrap().2.len(), usize::from(QUEUE_SIZE));
    assert_eq!(rig.net().backend().discarded, 1);
}

#[test]
fn buffers_that_a_frame_does_not_fill_stay_with_the_driver() {
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..4 {
        rig.offer(1000);
    }
    rig.net().backend_mut().slack = 1400;
    rig.wait(Offload::default(), &frame(100));
    rig.wait(Offload::default(), &frame(1200));
    rig.wait(Offload::default(), &frame(90));
    assert_eq!(rig.net().poll(), Progress::Idle);
    let used: Vec<_> = std::iter::from_fn(|| rig.received()).map(|(_, _, used)| used).collect();
    // The third asks for two buffers and would fill one, but only one is left.
    assert_eq!(used, [vec![112], vec![1000, 212]]);
    rig.offer(1000);
    assert_eq!(rig.kick(RX), Progress::Idle);
    assert_eq!(rig.received().unwrap().2, [102]);
}

#[test]
fn a_full_backend_keeps_frames_in_the_guest() {
    let mut rig = Rig::new(u64::MAX);
    rig.net().backend_mut().space = 1;
    for len in [100, 200, 300] {
        rig.send(PLAIN, &frame(len), 4096);
    }
    assert_eq!(rig.kick(TX), Progress::Idle);
    assert!(rig.tx.completion().is_some());
    assert_eq!(rig.tx.completion(), None);
    // It is not asked again before somebody says that it has changed.
    rig.net().backend_mut().space = 5;
    assert_eq!(rig.net().poll(), Progress::Idle);
    let lengths: Vec<_> = rig.net().backend().sent.iter().map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(lengths, [100, 200, 300]);
    assert!(rig.tx.completion().is_some() && rig.tx.completion().is_some());
}

#[test]
fn a_backend_that_is_full_until_the_guest_receives_is_asked_again() {
    let mut rig = Rig::new(u64::MAX);
    rig.net().backend_mut().space = 0;
    rig.offer(2000);
    rig.send(PLAIN, &frame(100), 4096);
    rig.wait(Offload::default(), &frame(60));
    assert_eq!(rig.kick(TX), Progress::More);
    rig.net().backend_mut().space = 1;
    assert_eq!(rig.kick(TX), Progress::Idle);
    assert_eq!(rig.net().backend().sent.len(), 1);
}

#[test]
fn interrupts_come_when_the_driver_waits_for_them() {
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..20 {
        rig.offer(1000);
    }
    // The driver wants to hear of the third completion: the second of a frame over two buffers is not enough.
    rig.rx.set_used_event(2);
    rig.wait(Offload::default(), &frame(1500));
    let _ = rig.net().poll();
    assert_eq!(rig.guest.line.count(), 0);
    rig.wait(Offload::default(), &frame(1500));
    rig.wait(Offload::default(), &frame(1500));
    let _ = rig.net().poll();
    assert_eq!(rig.guest.line.count(), 1, "one for the round");
    rig.wait(Offload::default(), &frame(1500));
    let _ = rig.net().poll();
    assert_eq!(rig.guest.line.count(), 1, "not wanted any more");

    rig.tx.set_used_event(100);
    rig.send(PLAIN, &frame(100), 4096);
    let _ = rig.kick(TX);
    assert_eq!(rig.guest.line.count(), 1);

    let mut rig = Rig::new(!RING_EVENT_IDX);
    rig.offer(1000);
    rig.offer(1000);
    rig.rx.set_available_flags(1);
    rig.wait(Offload::default(), &frame(100));
    let _ = rig.net().poll();
    assert_eq!(rig.guest.line.count(), 0);
    rig.rx.set_available_flags(0);
    rig.wait(Offload::default(), &frame(100));
    let _ = rig.net().poll();
    assert_eq!(rig.guest.line.count(), 1);
}

#[test]
fn a_patient_card_tells_of_little_frames_with_the_answer_or_when_it_is_asked() {
    let mut rig = Rig::new(u64::MAX);
    rig.net().be_patient();
    rig.offer(1000);
    let little = |rig: &mut Rig, so_far: u16| {
        rig.tx.set_used_event(so_far);
        rig.send(PLAIN, &frame(100), 4096);
        let _ = rig.kick(TX);
        assert!(rig.tx.completion().is_some(), "whoever looks sees that it is done");
    };
    little(&mut rig, 0);
    assert_eq!((rig.guest.line.count(), rig.net().has_untold()), (0, true));
    rig.rx.set_used_event(0);
    rig.wait(Offload::default(), &frame(60));
    let _ = rig.net().poll();
    assert_eq!((rig.guest.line.count(), rig.net().has_untold()), (1, false), "one for both");

    little(&mut rig, 1);
    rig.net().tell();
    assert_eq!((rig.guest.line.count(), rig.net().has_untold()), (2, false));
    rig.net().tell();
    assert_eq!(rig.guest.line.count(), 2, "it was told");

    // Who sends much, or many, is not kept waiting.
    rig.tx.set_used_event(2);
    rig.send(PLAIN, &frame(1500), 4096);
    rig.send(PLAIN, &frame(1500), 4096);
    let _ = rig.kick(TX);
    assert_eq!((rig.guest.line.count(), rig.net().has_untold()), (3, false));
    for so_far in 4..4 + u16::try_from(MAX_UNTOLD).unwrap() {
        assert_eq!(rig.tx.completion().is_some(), so_far < 6);
        little(&mut rig, so_far);
        assert_eq!(rig.guest.line.count(), 3);
    }
    while rig.tx.completion().is_some() {}
    rig.send(PLAIN, &frame(100), 4096);
    let _ = rig.kick(TX);
    assert_eq!((rig.guest.line.count(), rig.net().has_untold()), (4, false));

    // Whoever continues the queue knows nothing of this.
    rig.tx.set_used_event(9);
    rig.send(PLAIN, &frame(100), 4096);
    let _ = rig.kick(TX);
    assert_eq!(rig.guest.line.count(), 4);
    let _ = rig.net().stop_queue(TX);
    assert_eq!(rig.guest.line.count(), 5);
}

#[test]
fn a_kick_moves_a_bounded_amount_and_says_when_there_is_more() {
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..20 {
        rig.send(header(cut(Segments::Tcp4, 1460)), &frame(65_000), 65_536);
    }
    assert_eq!(rig.kick(TX), Progress::More);
    assert_eq!(rig.net().backend().sent.len(), 17);
    assert_eq!(rig.kick(TX), Progress::Idle);
    assert_eq!(rig.net().backend().sent.len(), 20);

    for _ in 0..20 {
        rig.offer(65_536);
        rig.wait(cut(Segments::Tcp4, 1460), &frame(65_000));
    }
    assert_eq!(rig.net().poll(), Progress::More);
    assert_eq!(std::iter::from_fn(|| rig.received()).count(), 17);
    assert_eq!(rig.kick(RX), Progress::Idle);
    assert_eq!(std::iter::from_fn(|| rig.received()).count(), 3);
}

#[test]
fn what_a_frame_brings_about_follows_in_the_same_round() {
    struct Echo(Vec<u8>);
    impl Backend for Echo {
        fn negotiated(&mut self, _: Offloads) {}
        fn transmit(&mut self, frame: Frame<'_>) -> Sent {
            self.0 = vec![0; frame.len];
            frame.copy_to(&mut self.0);
            Sent::Taken
        }
        fn pending(&mut self) -> Option<usize> {
            Some(self.0.len()).filter(|len| *len > 0)
        }
        fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)> {
            to[0].copy_from(&self.0);
            Some((std::mem::take(&mut self.0).len(), Offload::default()))
        }
        fn discard(&mut self) {}
    }
    let mut guest = Guest::new(1 << 20);
    let net =
        Net::new(Box::new(Echo(Vec::new())) as Box<dyn Backend>, Mac::try_from(MAC).unwrap(), Mtu::default());
    let net = Arc::new(Mutex::new(net));
    let (mut rx, mut tx) = (Ring::new(&mut guest, 8, true), Ring::new(&mut guest, 8, true));
    let mut transport = Transport::new(net.clone(), guest.memory.clone(), guest.line.clone());
    bring_up(&mut transport, u64::MAX, &[&rx, &tx]);
    let at = guest.alloc(2000);
    let out = guest.alloc_with(&[&PLAIN[..], &frame(64)].concat());
    rx.submit(&[Buffer::writable(at, 2000)]);
    tx.submit(&[Buffer::readable(out, 76)]);
    assert_eq!(net.lock().unwrap().kick(TX), Progress::Idle);
    assert_eq!(rx.completion(), Some((0, 76)));
    assert_eq!(guest.read(at + 12, 64), frame(64));
}

#[test]
fn a_link_that_is_down_carries_nothing_and_the_guest_knows() {
    let mut rig = Rig::new(u64::MAX);
    rig.offer(2000);
    let generation = read_register(&mut rig.transport, 0xfc);
    rig.net().set_link(false);
    assert_eq!(rig.guest.line.count(), 1);
    assert_ne!(read_register(&mut rig.transport, 0xfc), generation);
    assert_eq!(rig.transport.signals().interrupt_status(), 2);
    let mut status = [0xff; 2];
    rig.net().read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    rig.wait(Offload::default(), &frame(100));
    rig.send(PLAIN, &frame(100), 4096);
    assert_eq!((rig.kick(TX), rig.net().poll()), (Progress::Idle, Progress::Idle));
    assert!(rig.tx.completion().is_some());
    assert!(rig.net().backend().sent.is_empty());
    assert_eq!(rig.net().counters().transmit_refused, Refused { link_down: 1, ..Refused::default() });
    assert_eq!(rig.received(), None);
    rig.net().set_link(true);
    rig.net().set_link(true);
    assert_eq!(rig.guest.line.count(), 2 + 1, "the link twice, the dropped frame once");
    assert_eq!(rig.net().poll(), Progress::Idle);
    assert_eq!(rig.received().unwrap().1, frame(100));
}

#[test]
fn a_card_stops_and_another_continues_where_it_was() {
    let mut rig = Rig::new(!feature::GUEST_TSO4);
    for _ in 0..4 {
        rig.offer(2000);
    }
    rig.wait(Offload::default(), &frame(100));
    let _ = rig.net().poll();
    assert_eq!(rig.received().unwrap().1, frame(100));
    rig.net().set_link(false);
    rig.send(PLAIN, &frame(200), 4096);
    let transport = serde_json::to_string(&rig.transport.stop()).unwrap();
    let state = serde_json::to_string(&rig.net().state()).unwrap();
    assert_eq!(state, r#"{"version":1,"mac":[2,0,0,0,0,1],"mtu":1500,"link_up":false}"#);

    let wire = Wire { takes: Offloads::ALL, gives: Offloads::ALL, space: 9, ..Wire::default() };
    let other = Mac::try_from([2, 0, 0, 0, 0, 2]).unwrap();
    let net = Arc::new(Mutex::new(Net::new(wire, other, Mtu::try_from(9000).unwrap())));
    net.lock().unwrap().restore(&serde_json::from_str(&state).unwrap()).unwrap();
    rig.transport = Transport::new(net.clone(), rig.guest.memory.clone(), rig.guest.line.clone());
    rig.net = net;
    rig.transport.start(&serde_json::from_str(&transport).unwrap()).unwrap();
    assert_eq!(rig.net().mac().octets(), MAC);
    assert!(!rig.accept().tcp4 && rig.accept().tcp6);
    let mut status = [0xff; 2];
    rig.net().read_config(6, &mut status);
    assert_eq!(status, [0, 0], "the cable is still out");
    rig.net().set_link(true);
    rig.wait(Offload::default(), &frame(300));
    let _ = (rig.kick(RX), rig.kick(TX));
    assert_eq!(rig.received().unwrap().1, frame(300));
    assert_eq!(rig.net().backend().sent, [(Offload::default(), frame(200))]);

    let strange = state.replace("\"version\":1", "\"version\":2");
    let before = rig.net().state();
    let refused = rig.net().restore(&serde_json::from_str(&strange).unwrap());
    assert_eq!(refused, Err(StateVersion { saved: 2 }));
    assert_eq!(rig.net().state(), before);
    assert!(serde_json::from_str::<NetState>(&state.replace("1500", "100")).is_err());
}
