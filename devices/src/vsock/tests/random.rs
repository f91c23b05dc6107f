//! Random exchanges: benign ones that must come through, and hostile ones that must come to nothing.

use proptest::prelude::*;

use super::*;

/// One step of a benign exchange on one of two streams.
#[derive(Clone, Debug)]
enum Step {
    HostSends(usize, usize),
    HostConsumes(usize, usize),
    GuestSends(usize, usize),
    GuestConsumes(usize, usize),
    GuestTakesPackets,
    Polls,
    Restarts,
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0usize..2;
    prop_oneof![
        4 => (which.clone(), 1usize..20_000).prop_map(|(s, n)| Step::HostSends(s, n)),
        4 => (which.clone(), 1usize..100_000).prop_map(|(s, n)| Step::HostConsumes(s, n)),
        4 => (which.clone(), 1usize..60_000).prop_map(|(s, n)| Step::GuestSends(s, n)),
        4 => (which, 1usize..5_000).prop_map(|(s, n)| Step::GuestConsumes(s, n)),
        4 => Just(Step::GuestTakesPackets),
        1 => Just(Step::Polls),
        1 => Just(Step::Restarts),
    ]
}

/// The guest's end of a stream that follows the protocol, and what went through it.
struct Model {
    id: StreamId,
    header: Header,
    alloc: u32,
    /// Bytes that went in at the host, arrived at the guest, and were forwarded by it.
    host_sent: usize,
    arrived: usize,
    forwarded: usize,
    /// The same from guest to host, and the host's last word on its credit.
    guest_sent: usize,
    host_read: usize,
    host_forwarded: u32,
}

/// The byte at a place of a stream: another for every stream and place.
fn pattern(stream: usize, at: usize) -> u8 {
    u8::try_from((at * 7 + at / 251 + stream * 101) % 251).unwrap()
}

struct Exchange {
    peer: Peer,
    models: Vec<Model>,
}

impl Exchange {
    fn new(buffers: usize, buffer: usize, alloc: u32) -> Self {
        let mut peer = Peer::new(buffers, buffer);
        let model = |(id, header)| Model {
            id,
            header,
            alloc,
            host_sent: 0,
            arrived: 0,
            forwarded: 0,
            guest_sent: 0,
            host_read: 0,
            host_forwarded: 0,
        };
        let models = vec![model(peer.connected(alloc)), model(peer.connected(alloc))];
        Self { peer, models }
    }

    fn say(&mut self, s: usize, op: u16, data: &[u8]) {
        let model = &self.models[s];
        let fwd_cnt = u32::try_from(model.forwarded).unwrap();
        let header = Header { fwd_cnt, ..with_data(model.header, op, data) };
        self.peer.send(&header, data);
    }

    fn take_packets(&mut self) -> bool {
        let packets = self.peer.packets();
        for (header, data) in &packets {
            let s = self.models.iter().position(|m| m.header.dst_port == header.src_port).unwrap();
            let model = &mut self.models[s];
            for byte in data {
                assert_eq!(*byte, pattern(s, model.arrived), "stream {s} at {}", model.arrived);
                model.arrived += 1;
            }
            assert!(model.arrived - model.forwarded <= model.alloc as usize, "credit exceeded");
            model.host_forwarded = header.fwd_cnt;
            assert!([op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST].contains(&header.op), "{header:?}");
            if header.op == op::CREDIT_REQUEST {
                self.say(s, op::CREDIT_UPDATE, &[]);
            }
        }
        let _ = self.peer.host().kick(0);
        !packets.is_empty()
    }

    fn guest_sends(&mut self, s: usize, n: usize) -> usize {
        let model = &mut self.models[s];
        let in_flight = model.guest_sent - model.host_forwarded as usize;
        let n = n.min(BUF_ALLOC as usize - in_flight);
        let data: Vec<u8> = (0..n).map(|i| pattern(s, model.guest_sent + i)).collect();
        model.guest_sent += n;
        if n > 0 {
            self.say(s, op::RW, &data);
        }
        n
    }

    fn host_consumes(&mut self, s: usize, n: usize) {
        let mut host = self.peer.vsock.lock().unwrap();
        let model = &mut self.models[s];
        let n = n.min(host.received(model.id).len());
        for byte in &host.received(model.id)[..n] {
            assert_eq!(*byte, pattern(s, model.host_read), "stream {s} at {}", model.host_read);
            model.host_read += 1;
        }
        host.consume(model.id, n);
    }

    fn host_sends(&mut self, s: usize, n: usize) {
        let model = &mut self.models[s];
        let data: Vec<u8> = (0..n).map(|i| pattern(s, model.host_sent + i)).collect();
        let mut host = self.peer.vsock.lock().unwrap();
        let least = host.sendable(model.id).min(n);
        let taken = host.send(model.id, &data);
        assert!(taken >= least);
        model.host_sent += taken;
    }

    fn guest_consumes(&mut self, s: usize, n: usize) {
        let model = &mut self.models[s];
        let n = n.min(model.arrived - model.forwarded);
        model.forwarded += n;
        if n > 0 {
            self.say(s, op::CREDIT_UPDATE, &[]);
        }
    }

    fn polls(&mut self) {
        for event in self.peer.events() {
            assert!(matches!(event, VsockEvent::Readable(_) | VsockEvent::Writable(_)), "{event:?}");
        }
    }

    fn restarts(&mut self) {
        let state = self.peer.transport.stop();
        self.peer.transport.start(&state).unwrap();
        for queue in 0..3 {
            let _ = self.peer.host().kick(queue);
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::HostSends(s, n) => self.host_sends(s, n),
            Step::HostConsumes(s, n) => self.host_consumes(s, n),
            Step::GuestSends(s, n) => {
                self.guest_sends(s, n);
            }
            Step::GuestConsumes(s, n) => self.guest_consumes(s, n),
            Step::GuestTakesPackets => {
                self.take_packets();
            }
            Step::Polls => self.polls(),
            Step::Restarts => self.restarts(),
        }
    }

    /// Both sides read all there is; everything must have come through, without anybody's prompting.
    fn finish(&mut self) {
        loop {
            let mut moved = self.take_packets();
            for s in 0..2 {
                let before = self.models[s].forwarded;
                self.guest_consumes(s, usize::MAX);
                moved |= before != self.models[s].forwarded;
                let before = self.models[s].host_read;
                self.host_consumes(s, usize::MAX);
                moved |= before != self.models[s].host_read;
            }
            if !moved {
                break;
            }
        }
        for model in &self.models {
            assert_eq!((model.arrived, model.host_read), (model.host_sent, model.guest_sent));
        }
        // And the guest can always go on.
        for s in 0..2 {
            assert!(self.guest_sends(s, 1) > 0);
        }
        assert_eq!(self.peer.host().counters(), Counters::default());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Bytes arrive complete and in order in both directions, whatever the windows, with few buffers or many.
    #[test]
    fn streams_are_complete_and_in_order(
        buffers in 1usize..8,
        buffer in prop_oneof![Just(HEADER + 1), HEADER + 1..600usize, Just(4096usize)],
        alloc in prop_oneof![1u32..100, Just(65536u32), Just(BUF_ALLOC)],
        steps in prop::collection::vec(step(), 1..80),
    ) {
        // One byte at a time takes long over much.
        let scale = if buffer < 300 || alloc < 100 { 100 } else { 1 };
        let mut exchange = Exchange::new(buffers, buffer, alloc);
        for step in &steps {
            match *step {
                Step::HostSends(s, n) => exchange.step(&Step::HostSends(s, n / scale)),
                _ => exchange.step(step),
            }
        }
        exchange.finish();
    }

    /// Whatever packets a guest sends and whatever the host does, nothing panics, what is kept stays in
    /// bounds, and every stream is closed exactly once.
    #[test]
    fn random_packets_never_break_the_host(
        packets in prop::collection::vec(
            (
                0u32..4,
                prop_oneof![3 => 1024u32..1026, 2 => (1u32 << 30)..(1u32 << 30) + 4],
                0u16..9,
                0u16..3,
                (0u32..4, prop_oneof![Just(0u32), 1u32..4000, any::<u32>()], any::<u32>()),
                (0usize..9, 0usize..4000),
            ),
            0..120,
        ),
    ) {
        let mut peer = Peer::new(3, 512);
        peer.host().listen(Port(1024));
        let mut ids = Vec::new();
        let mut closed = std::collections::HashSet::new();
        let mut known = std::collections::HashSet::new();
        let mut watch = |events: Vec<VsockEvent>, ids: &mut Vec<StreamId>| {
            for event in events {
                let id = match event {
                    VsockEvent::Accepted { id, port } => {
                        assert_eq!(port, Port(1024));
                        ids.push(id);
                        assert!(known.insert(id));
                        id
                    }
                    VsockEvent::Closed(id, _) => {
                        assert!(closed.insert(id));
                        continue;
                    }
                    VsockEvent::Connected(id)
                    | VsockEvent::Readable(id)
                    | VsockEvent::Writable(id)
                    | VsockEvent::PeerShutdown(id, _) => id,
                    VsockEvent::Again => continue,
                };
                assert!(!closed.contains(&id), "{event:?} after closed");
            }
            closed.len()
        };
        for (guest, host, op, kind, (flags, fwd, alloc), (action, n)) in packets {
            let len = n % 2000;
            let header = Header {
                kind: if kind == 2 { 2 } else { STREAM },
                flags,
                fwd_cnt: fwd,
                buf_alloc: alloc,
                len: u32::try_from(len).unwrap(),
                ..from_guest(guest, host, op)
            };
            peer.send(&header, &vec![1; len]);
            let id = ids.get(n % ids.len().max(1)).copied();
            match (action, id) {
                (0, _) => ids.extend(peer.host().connect(Port(guest))),
                (1, Some(id)) => {
                    let _ = peer.host().send(id, &vec![2; n]);
                }
                (2, Some(id)) => peer.host().consume(id, n),
                (3, Some(id)) => peer.host().shutdown(id, How::Write),
                (4, Some(id)) => peer.host().shutdown(id, How::Both),
                (5, Some(id)) => peer.host().reset(id),
                (6, _) => {
                    peer.packets();
                    let _ = peer.host().kick(0);
                }
                (7, _) => {
                    let events = peer.events();
                    watch(events, &mut ids);
                }
                _ => {}
            }
            let (streams, resets, turn) = peer.host().mux.sizes();
            prop_assert!(streams <= MAX_STREAMS && resets <= MAX_RESETS && turn <= 2 * MAX_STREAMS + 1);
        }
        prop_assert!(!peer.transport.signals().needs_reset());
        // In the end the owner resets what is left, and every stream has been closed.
        for id in 0..1000 {
            peer.host().reset(StreamId(id));
        }
        let events = peer.events();
        watch(events, &mut ids);
        for id in &ids {
            prop_assert!(closed.contains(id), "{id:?}");
        }
        prop_assert_eq!(peer.host().mux.sizes().0, 0);
    }
}
