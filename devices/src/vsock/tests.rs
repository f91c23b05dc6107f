//! A guest's vsock driver against the device, over real rings.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use super::packet::{HEADER, Header, SHUT_READ, SHUT_WRITE, STREAM, op};
use super::*;
use crate::testing::{Buffer, Guest, Ring, bring_up, read_register, write_register};
use crate::{Transport, TransportState};

mod random;

const CID: u32 = 7;

/// The guest's driver: what it offers to receive, and what it got.
struct Peer {
    guest: Guest,
    rings: [Ring; 3],
    transport: Transport,
    vsock: Arc<Mutex<Vsock>>,
    /// Receive buffers in the order in which they were offered.
    offered: VecDeque<(u16, u64)>,
    buffer: usize,
    tx_area: u64,
    event_area: u64,
}

impl Peer {
    /// A driver that is up, with `buffers` receive buffers of `size` bytes offered.
    fn new(buffers: usize, size: usize) -> Self {
        let mut peer = Self::down(size);
        peer.up();
        peer.offer(buffers);
        peer
    }

    fn down(size: usize) -> Self {
        let mut guest = Guest::new(64 << 20);
        let rings = [
            Ring::new(&mut guest, 64, true),
            Ring::new(&mut guest, 64, true),
            Ring::new(&mut guest, 8, true),
        ];
        let vsock = Arc::new(Mutex::new(Vsock::new(GuestCid::try_from(CID).unwrap())));
        let transport = Transport::new(vsock.clone(), guest.memory.clone(), guest.line.clone());
        let tx_area = guest.alloc(1 << 20);
        let event_area = guest.alloc(4096);
        Self { guest, rings, transport, vsock, offered: VecDeque::new(), buffer: size, tx_area, event_area }
    }

    fn up(&mut self) {
        let [rx, tx, event] = &self.rings;
        bring_up(&mut self.transport, u64::MAX, &[rx, tx, event]);
        assert!(self.transport.is_active());
        for queue in 0..3 {
            let _ = self.host().kick(queue);
        }
    }

    fn host(&self) -> MutexGuard<'_, Vsock> {
        self.vsock.lock().unwrap()
    }

    /// Offers receive buffers and kicks.
    fn offer(&mut self, buffers: usize) {
        for _ in 0..buffers {
            let address = self.guest.alloc(self.buffer);
            self.offer_at(address);
        }
        let _ = self.host().kick(0);
    }

    fn offer_at(&mut self, address: u64) {
        let head = self.rings[0].submit(&[Buffer::writable(address, self.buffer)]);
        self.offered.push_back((head, address));
    }

    /// Takes the packets that arrived; offers the buffers again.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some((head, written)) = self.rings[0].completion() {
            let (expected, address) = self.offered.pop_front().unwrap();
            assert_eq!(head, expected);
            let raw = self.guest.read(address, written as usize);
            let header = Header::decode(raw[..HEADER].try_into().unwrap());
            assert_eq!(raw.len(), HEADER + header.len as usize);
            assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
            assert_eq!(header.buf_alloc, BUF_ALLOC);
            packets.push((header, raw[HEADER..].to_vec()));
            self.offer_at(address);
        }
        packets
    }

    /// The one packet that arrived.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn silent(&mut self) {
        assert_eq!(self.packets(), []);
    }

    fn submit(&mut self, header: &Header, data: &[u8]) {
        let packet = [&header.encode()[..], data].concat();
        self.guest.write(self.tx_area, &packet);
        self.rings[1].submit(&[
            Buffer::readable(self.tx_area, HEADER),
            Buffer::readable(self.tx_area + HEADER as u64, data.len().max(1)),
        ]);
    }

    /// Sends one packet as it is.
    fn send(&mut self, header: &Header, data: &[u8]) {
        self.submit(header, data);
        assert_eq!(self.host().kick(1), Progress::Idle);
        while self.rings[1].completion().is_some() {}
    }

    fn events(&self) -> Vec<VsockEvent> {
        let mut host = self.host();
        std::iter::from_fn(|| host.poll_event()).collect()
    }

    /// A stream opened by the host to guest port 1025, and the guest's header for it.
    fn connected(&mut self, alloc: u32) -> (StreamId, Header) {
        let id = self.host().connect(Port(1025)).unwrap();
        let (request, _) = self.packet();
        assert_eq!((request.op, request.kind, request.dst_port), (op::REQUEST, STREAM, 1025));
        let header = answer(&request, op::RESPONSE, alloc);
        self.send(&header, &[]);
        assert_eq!(self.events(), [VsockEvent::Connected(id)]);
        (id, header)
    }
}

fn answer(to: &Header, op: u16, alloc: u32) -> Header {
    Header {
        src_cid: to.dst_cid,
        dst_cid: to.src_cid,
        src_port: to.dst_port,
        dst_port: to.src_port,
        kind: STREAM,
        op,
        buf_alloc: alloc,
        ..Header::default()
    }
}

fn from_guest(guest: u32, host: u32, op: u16) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: STREAM,
        op,
        buf_alloc: 65536,
        ..Header::default()
    }
}

fn with_data(header: Header, op: u16, data: &[u8]) -> Header {
    Header { op, len: u32::try_from(data.len()).unwrap(), ..header }
}

#[test]
fn an_exec_takes_three_packets_and_bytes_go_straight_into_a_receive_buffer() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(65536);
    assert_eq!(peer.host().send(id, b"hello"), 5);
    let (packet, data) = peer.packet();
    assert_eq!((packet.op, data.as_slice()), (op::RW, &b"hello"[..]));

    peer.send(&with_data(header, op::RW, b"world"), b"world");
    assert_eq!(peer.events(), [VsockEvent::Readable(id)]);
    assert_eq!(peer.host().received(id), b"world");
    peer.host().consume(id, 2);
    assert_eq!(peer.host().received(id), b"rld");
    // Nothing is said about credit as long as the guest has plenty.
    peer.silent();
}

#[test]
fn the_guest_connects_to_a_listening_port_only() {
    let mut peer = Peer::new(8, 4096);
    peer.host().listen(Port(1024));
    peer.send(&from_guest(50, 1024, op::REQUEST), &[]);
    let events = peer.events();
    let [VsockEvent::Accepted { id, port: Port(1024) }] = events[..] else { panic!("{events:?}") };
    let (response, _) = peer.packet();
    assert_eq!((response.op, response.src_port, response.dst_port), (op::RESPONSE, 1024, 50));
    assert_eq!(peer.host().send(id, b"x"), 1);
    assert_eq!(peer.packet().1, b"x");

    peer.send(&from_guest(51, 1023, op::REQUEST), &[]);
    assert_eq!(peer.packet().0.op, op::RST);
    assert_eq!(peer.events(), []);
    assert_eq!(peer.host().counters().refused, 1);
}

#[test]
fn a_connect_waits_for_the_driver_and_its_data_for_the_answer() {
    let mut peer = Peer::down(4096);
    let id = peer.host().connect(Port(9)).unwrap();
    assert_eq!(peer.host().send(id, b"early"), 5);
    peer.up();
    peer.offer(4);
    let (request, _) = peer.packet();
    assert_eq!(request.op, op::REQUEST);
    peer.send(&answer(&request, op::RESPONSE, 65536), &[]);
    assert_eq!(peer.packet().1, b"early");
    assert_eq!(peer.events(), [VsockEvent::Connected(id)]);
}

#[test]
fn a_refused_connect_closes() {
    let mut peer = Peer::new(8, 4096);
    let id = peer.host().connect(Port(9)).unwrap();
    let (request, _) = peer.packet();
    peer.send(&answer(&request, op::RST, 0), &[]);
    assert_eq!(peer.events(), [VsockEvent::Closed(id, Reason::Refused)]);
    assert_eq!(peer.host().send(id, b"x"), 0);
    peer.silent();
}

#[test]
fn the_host_never_exceeds_the_guests_credit() {
    let mut peer = Peer::new(16, 4096);
    let (id, header) = peer.connected(10);
    assert_eq!(peer.host().send(id, &[7; 25]), 25);
    let packets = peer.packets();
    assert_eq!(packets.iter().map(|p| p.1.len()).sum::<usize>(), 10);
    assert_eq!(packets.last().unwrap().0.op, op::CREDIT_REQUEST);
    // The guest forwarded four: four more may come, and nothing is asked twice without an answer.
    peer.send(&Header { op: op::CREDIT_UPDATE, fwd_cnt: 4, ..header }, &[]);
    assert_eq!(peer.packets().iter().map(|p| p.1.len()).sum::<usize>(), 4);
    // A guest that claims to have forwarded more than it got gets nothing.
    peer.send(&Header { op: op::CREDIT_UPDATE, fwd_cnt: 1000, ..header }, &[]);
    assert_eq!(peer.packets().iter().map(|p| p.1.len()).sum::<usize>(), 0);
    peer.send(&Header { op: op::CREDIT_UPDATE, fwd_cnt: 14, buf_alloc: 100, ..header }, &[]);
    assert_eq!(peer.packets().iter().map(|p| p.1.len()).sum::<usize>(), 11);
}

#[test]
fn a_guest_that_exceeds_our_credit_loses_the_stream_and_what_it_sent_stays_readable() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(65536);
    let chunk = vec![1; BUF_ALLOC as usize / 4];
    for _ in 0..4 {
        peer.send(&with_data(header, op::RW, &chunk), &chunk);
    }
    peer.silent();
    peer.send(&with_data(header, op::RW, b"!"), b"!");
    assert_eq!(peer.packet().0.op, op::RST);
    assert_eq!(peer.events(), [VsockEvent::Readable(id), VsockEvent::PeerShutdown(id, How::Both)]);
    assert_eq!(peer.host().received(id).len(), BUF_ALLOC as usize);
    peer.host().consume(id, usize::MAX);
    assert_eq!(peer.events(), [VsockEvent::Closed(id, Reason::Violation)]);
    assert_eq!(peer.host().counters().violations, 1);
}

#[test]
fn credit_is_announced_when_the_guests_view_is_low() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(65536);
    let chunk = vec![1; 65536];
    for _ in 0..3 {
        peer.send(&with_data(header, op::RW, &chunk), &chunk);
    }
    peer.host().consume(id, 100);
    peer.silent();
    peer.host().consume(id, 40_000);
    let (update, _) = peer.packet();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, 40_100));
    peer.send(&Header { op: op::CREDIT_REQUEST, ..header }, &[]);
    assert_eq!(peer.packet().0.op, op::CREDIT_UPDATE);
}

#[test]
fn half_closes_keep_the_other_half() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(65536);
    peer.host().shutdown(id, How::Write);
    let (shutdown, _) = peer.packet();
    assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUT_WRITE));
    assert_eq!(peer.host().send(id, b"x"), 0);
    peer.send(&with_data(header, op::RW, b"rest"), b"rest");
    peer.send(&Header { op: op::SHUTDOWN, flags: SHUT_WRITE, ..header }, &[]);
    assert_eq!(peer.events(), [VsockEvent::Readable(id), VsockEvent::PeerShutdown(id, How::Write)]);
    assert_eq!(peer.host().received(id), b"rest");
    peer.send(&Header { op: op::SHUTDOWN, flags: SHUT_READ | SHUT_WRITE, ..header }, &[]);
    assert_eq!(peer.packet().0.op, op::RST);
    assert_eq!(peer.events(), [VsockEvent::PeerShutdown(id, How::Both)]);
    peer.host().consume(id, 4);
    assert_eq!(peer.events(), [VsockEvent::Closed(id, Reason::Finished)]);
    peer.host().consume(id, 4);
    assert_eq!(peer.events(), []);
}

#[test]
fn ports_are_free_once_a_stream_is_over_though_its_bytes_are_unread() {
    let mut peer = Peer::new(8, 4096);
    peer.host().listen(Port(1024));
    peer.send(&from_guest(50, 1024, op::REQUEST), &[]);
    peer.send(&with_data(from_guest(50, 1024, 0), op::RW, b"old"), b"old");
    peer.send(&Header { flags: 3, ..from_guest(50, 1024, op::SHUTDOWN) }, &[]);
    peer.send(&from_guest(50, 1024, op::REQUEST), &[]);
    peer.send(&with_data(from_guest(50, 1024, 0), op::RW, b"new"), b"new");
    let ops: Vec<_> = peer.packets().iter().map(|p| p.0.op).collect();
    assert_eq!(ops, [op::RESPONSE, op::RST, op::RESPONSE]);
    let mut accepted: Vec<_> = peer.events();
    accepted.retain(|event| matches!(event, VsockEvent::Accepted { .. }));
    let [VsockEvent::Accepted { id: a, .. }, VsockEvent::Accepted { id: b, .. }] = accepted[..] else {
        panic!("{accepted:?}")
    };
    let host = peer.host();
    assert_eq!((host.received(a), host.received(b)), (&b"old"[..], &b"new"[..]));
}

#[test]
fn an_end_of_file_overtakes_no_data() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(2);
    assert_eq!(peer.host().send(id, b"abcd"), 4);
    peer.host().shutdown(id, How::Both);
    let ops: Vec<_> = peer.packets().iter().map(|p| p.0.op).collect();
    assert_eq!(ops, [op::RW, op::CREDIT_REQUEST]);
    peer.send(&Header { op: op::CREDIT_UPDATE, fwd_cnt: 2, ..header }, &[]);
    let packets = peer.packets();
    assert_eq!((packets[0].1.as_slice(), packets[1].0.op, packets[1].0.flags), (&b"cd"[..], op::SHUTDOWN, 3));
    peer.send(&Header { op: op::RST, ..header }, &[]);
    assert_eq!(peer.events(), [VsockEvent::Closed(id, Reason::Finished)]);
}

#[test]
fn bytes_after_an_end_of_file_break_the_protocol() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(100);
    peer.send(&Header { op: op::SHUTDOWN, flags: SHUT_WRITE, ..header }, &[]);
    peer.send(&with_data(header, op::RW, b"x"), b"x");
    assert_eq!(
        peer.events(),
        [VsockEvent::PeerShutdown(id, How::Write), VsockEvent::Closed(id, Reason::Violation)]
    );
    assert_eq!(peer.packet().0.op, op::RST);
}

#[test]
fn a_host_that_does_not_read_keeps_nothing() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(100);
    peer.host().shutdown(id, How::Read);
    assert_eq!(peer.packet().0.flags, SHUT_READ);
    let chunk = vec![0; 65536];
    for _ in 0..16 {
        peer.send(&with_data(header, op::RW, &chunk), &chunk);
    }
    assert_eq!(peer.host().received(id), b"");
    assert_eq!(peer.events(), []);
    assert_eq!(peer.host().counters(), Counters::default());
}

#[test]
fn what_no_stream_expects_is_answered_with_rst() {
    let mut peer = Peer::new(64, 4096);
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, u16::MAX] {
        peer.send(&from_guest(1, 2, op), &[]);
        assert_eq!(peer.packet().0.op, op::RST, "{op}");
    }
    peer.send(&from_guest(1, 2, op::RST), &[]);
    peer.silent();
    peer.send(&Header { kind: 2, ..from_guest(1, 2, op::REQUEST) }, &[]);
    let (reset, _) = peer.packet();
    assert_eq!((reset.op, reset.kind), (op::RST, 2));
    // Another's addresses get no answer at all.
    peer.send(&Header { src_cid: 8, ..from_guest(1, 2, op::RW) }, &[]);
    peer.send(&Header { dst_cid: 1, ..from_guest(1, 2, op::RW) }, &[]);
    peer.send(&Header { len: 2, ..from_guest(1, 2, op::RW) }, &[]);
    peer.send(&Header { len: u32::MAX, ..from_guest(1, 2, op::RW) }, &[]);
    peer.silent();
    assert_eq!(peer.host().counters(), Counters { malformed: 4, refused: 9, ..Counters::default() });
    assert!(!peer.transport.signals().needs_reset());
}

#[test]
fn an_operation_out_of_place_ends_the_stream() {
    for op in [op::REQUEST, op::RESPONSE, 0, 8] {
        let mut peer = Peer::new(8, 4096);
        let (id, header) = peer.connected(100);
        peer.send(&Header { op, ..header }, &[]);
        assert_eq!(peer.packet().0.op, op::RST);
        assert_eq!(peer.events(), [VsockEvent::Closed(id, Reason::Violation)]);
    }
}

#[test]
fn streams_survive_a_lack_of_receive_buffers_and_take_turns() {
    let mut peer = Peer::new(2, 4096);
    let (a, _) = peer.connected(1 << 20);
    let (b, _) = peer.connected(1 << 20);
    // Two buffers: the third packet waits.
    assert_eq!(peer.host().send(a, &[1; 40_000]), 40_000);
    assert_eq!(peer.host().send(b, &[2; 40_000]), 40_000);
    let mut order = Vec::new();
    loop {
        let packets = peer.packets();
        if packets.is_empty() {
            break;
        }
        order.extend(packets.iter().map(|p| p.1[0]));
        let _ = peer.host().kick(0);
    }
    assert_eq!(order.iter().filter(|s| **s == 1).count(), 10);
    assert_eq!(order.iter().filter(|s| **s == 2).count(), 10);
    // From where both wait until one has nothing left.
    assert!(order[2..18].windows(2).all(|pair| pair[0] != pair[1]), "{order:?}");
}

#[test]
fn writable_comes_after_a_send_that_was_cut_short() {
    let mut peer = Peer::new(4, 4096);
    let (id, header) = peer.connected(0);
    let all = vec![5; SEND_BUFFER + 1];
    assert_eq!(peer.host().sendable(id), SEND_BUFFER);
    assert_eq!(peer.host().send(id, &all), SEND_BUFFER);
    assert_eq!(peer.host().sendable(id), 0);
    assert_eq!(peer.events(), []);
    peer.send(&Header { op: op::CREDIT_UPDATE, buf_alloc: 1 << 20, ..header }, &[]);
    let mut got = 0;
    while got < SEND_BUFFER {
        let packets = peer.packets();
        assert!(!packets.is_empty());
        got += packets.iter().map(|p| p.1.len()).sum::<usize>();
        let _ = peer.host().kick(0);
    }
    assert_eq!(peer.events(), [VsockEvent::Writable(id)]);
}

#[test]
fn a_flood_of_packets_makes_nothing_grow() {
    let mut peer = Peer::new(0, 4096);
    peer.host().listen(Port(1));
    for port in 0..3000 {
        peer.send(&from_guest(port, 1, op::REQUEST), &[]);
        peer.send(&from_guest(port, 2, op::REQUEST), &[]);
    }
    assert_eq!(peer.host().mux.sizes(), (MAX_STREAMS, MAX_RESETS, MAX_STREAMS));
    let lost = 3000 + 3000 - MAX_STREAMS - MAX_RESETS;
    assert_eq!(peer.host().counters().lost_resets, lost as u64);
    assert_eq!(peer.host().connect(Port(1)), Err(TooManyStreams));
    // Open and closed, again and again, while no packet can be sent.
    for _ in 0..20 {
        for port in 0..1000 {
            peer.send(&from_guest(port, 1, op::RST), &[]);
        }
        while peer.host().poll_event().is_some() {}
        for port in 0..1000 {
            peer.send(&from_guest(port, 1, op::REQUEST), &[]);
        }
    }
    let (streams, resets, turn) = peer.host().mux.sizes();
    assert!(streams <= MAX_STREAMS && resets <= MAX_RESETS && turn <= 2 * MAX_STREAMS + 1);
}

#[test]
fn a_driver_reset_closes_every_stream_once() {
    let mut peer = Peer::new(8, 4096);
    let (a, header) = peer.connected(100);
    let (b, _) = peer.connected(100);
    peer.send(&with_data(header, op::RW, b"last"), b"last");
    assert_eq!(peer.events(), [VsockEvent::Readable(a)]);
    write_register(&mut peer.transport, 0x70, 0);
    let mut events = peer.events();
    events.sort_by_key(|event| matches!(event, VsockEvent::Closed(..)));
    assert_eq!(events, [VsockEvent::PeerShutdown(a, How::Both), VsockEvent::Closed(b, Reason::Transport)]);
    peer.host().reset(a);
    assert_eq!(peer.events(), [VsockEvent::Closed(a, Reason::Transport)]);
    assert_eq!(peer.host().mux.sizes(), (0, 0, 0));
}

#[test]
fn reset_all_tells_the_guest_by_its_event_queue() {
    let mut peer = Peer::new(8, 4096);
    let (id, _) = peer.connected(100);
    peer.host().reset_all(GuestCid::try_from(99).unwrap());
    assert_eq!(peer.events(), [VsockEvent::Closed(id, Reason::Transport)]);
    let at = peer.event_area;
    peer.guest.write(at, &[0xff; 4]);
    peer.rings[2].submit(&[Buffer::writable(at, 4)]);
    let _ = peer.host().kick(2);
    assert_eq!(peer.rings[2].completion().unwrap().1, 4);
    assert_eq!(peer.guest.read(at, 4), [0; 4]);
    let mut cid = [0; 8];
    peer.transport.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 99);
    peer.silent();
}

#[test]
fn streams_go_on_over_stop_and_start() {
    let mut peer = Peer::new(8, 4096);
    let (id, header) = peer.connected(100);
    let state = peer.transport.stop();
    assert_eq!(peer.host().send(id, b"while stopped"), 13);
    peer.silent();
    let state: TransportState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    peer.transport.start(&state).unwrap();
    for queue in peer.transport.started_queues().collect::<Vec<_>>() {
        let _ = peer.host().kick(queue);
    }
    assert_eq!(peer.packet().1, b"while stopped");
    peer.send(&with_data(header, op::RW, b"on"), b"on");
    assert_eq!(peer.host().received(id), b"on");
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device() {
    let mut peer = Peer::new(0, HEADER);
    let _ = peer.host().connect(Port(1)).unwrap();
    peer.offer(1);
    assert_eq!(read_register(&mut peer.transport, 0x70) & 0x40, 0x40);
}

#[test]
fn a_transmit_buffer_without_a_header_breaks_the_device() {
    let mut peer = Peer::new(1, 4096);
    let at = peer.tx_area;
    peer.rings[1].submit(&[Buffer::readable(at, HEADER - 1)]);
    assert_eq!(peer.host().kick(1), Progress::Idle);
    assert!(peer.transport.signals().needs_reset());
}

#[test]
fn many_packets_in_one_send_interrupt_once() {
    let mut peer = Peer::new(32, 4096);
    let (id, _) = peer.connected(1 << 20);
    peer.rings[0].arm_interrupt();
    let before = peer.guest.line.count();
    assert_eq!(peer.host().send(id, &[0; 100_000]), 100_000);
    assert_eq!(peer.packets().len(), 25);
    assert_eq!(peer.guest.line.count(), before + 1);
}

#[test]
fn a_patient_guest_hears_of_what_it_sent_with_what_it_receives() {
    let mut peer = Peer::new(32, 4096);
    let (id, header) = peer.connected(1 << 20);
    peer.host().be_patient();
    let question = with_data(header, op::RW, b"question");
    let interrupts = |peer: &mut Peer, act: &mut dyn FnMut(&mut Peer)| {
        peer.rings[0].arm_interrupt();
        peer.rings[1].arm_interrupt();
        let before = peer.guest.line.count();
        act(peer);
        peer.guest.line.count() - before
    };
    assert_eq!(interrupts(&mut peer, &mut |peer| peer.send(&question, b"question")), 0);
    assert!(peer.host().has_untold());
    assert_eq!(interrupts(&mut peer, &mut |peer| assert_eq!(peer.host().send(id, b"answer"), 6)), 1);
    // Nothing to receive: the owner's time-out.
    let told = interrupts(&mut peer, &mut |peer| {
        peer.send(&question, b"question");
        peer.host().tell();
        peer.host().tell();
    });
    assert_eq!(told, 1);
    // And never so many that its queue would run full.
    let many = u32::from(QUEUE_SIZE);
    let all = interrupts(&mut peer, &mut |peer| (0..many).for_each(|_| peer.send(&question, b"question")));
    assert_eq!(all, 1, "the ring is armed once");
}

#[test]
fn after_a_question_the_guest_announces_its_answer_and_not_its_credit() {
    let mut peer = Peer::new(32, 4096);
    let (id, header) = peer.connected(1 << 20);
    peer.host().be_patient();
    let credit = Header { op: op::CREDIT_UPDATE, ..header };
    let answer = with_data(header, op::RW, b"answer");
    // The place in the ring of the packet that the driver is to announce.
    let announced = |peer: &Peer| peer.rings[1].available_event();
    let next = announced(&peer);
    assert!(!peer.host().has_untold());
    assert_eq!(peer.host().send(id, b"question"), 8);
    assert_eq!(announced(&peer), next + 1);
    assert!(peer.host().has_untold());
    peer.submit(&credit, &[]);
    assert_eq!(peer.events(), []);
    peer.send(&answer, b"answer");
    assert_eq!(peer.events(), [VsockEvent::Readable(id)]);
    assert_eq!(peer.host().received(id), b"answer");
    assert_eq!(announced(&peer), next + 2);
    // One that no other follows is seen in the owner's time.
    peer.host().send(id, b"question");
    peer.submit(&answer, b"answer");
    assert_eq!(peer.events(), []);
    peer.host().tell();
    assert_eq!(peer.events(), [VsockEvent::Readable(id)]);
    assert!(!peer.host().has_untold());
    assert_eq!(announced(&peer), next + 3);
    // One that was there before the question is seen at once.
    peer.submit(&answer, b"answer");
    peer.host().send(id, b"question");
    assert_eq!(peer.events(), [VsockEvent::Readable(id)]);
    assert_eq!(announced(&peer), next + 4);
}

#[test]
fn credit_that_may_be_needed_is_announced() {
    let mut peer = Peer::new(32, 4096);
    peer.host().be_patient();
    let (id, _) = peer.connected(10);
    let next = peer.rings[1].available_event();
    peer.host().send(id, b"12345");
    assert_eq!(peer.rings[1].available_event(), next + 1);
    peer.host().send(id, b"6");
    assert_eq!(peer.rings[1].available_event(), next);
    // And a device whose owner has not promised to look asks for every packet.
    let mut peer = Peer::new(32, 4096);
    let (id, _) = peer.connected(1 << 20);
    let next = peer.rings[1].available_event();
    peer.host().send(id, b"question");
    assert_eq!(peer.rings[1].available_event(), next);
}
