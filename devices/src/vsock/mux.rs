//! All streams of a device: who is who by ports, whose turn it is to send, and who has news for the owner.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::packet::{HEADER, HEADER_BYTES, Header, STREAM, op};
use super::stream::{Outgoing, Phase, Ports, Reason, Stream};
use super::{BUF_ALLOC, GuestCid, HOST_CID, How, MAX_RESETS, MAX_STREAMS, Port, StreamId, VsockEvent};
use crate::{Chain, ChainError, QueueError};

/// Where the ports of host-initiated streams begin.
const FIRST_PORT: u32 = 1 << 30;

/// There are [`MAX_STREAMS`] streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {MAX_STREAMS} vsock streams, and no more can be kept")]
pub struct TooManyStreams;

/// What did not get through, since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets with another device's addresses, or shorter than their header says.
    pub malformed: u64,
    /// Packets answered with RST: an unknown stream, port, type or operation, or too many streams.
    pub refused: u64,
    /// Streams that ended in [`Reason::Violation`].
    pub violations: u64,
    /// Resets that were not sent, because [`MAX_RESETS`] were waiting for the guest to take them.
    pub lost_resets: u64,
}

#[derive(Debug)]
pub(super) struct Mux {
    guest: GuestCid,
    listening: BTreeSet<Port>,
    streams: BTreeMap<StreamId, Stream>,
    by_ports: BTreeMap<Ports, StreamId>,
    /// Resets that belong to no stream any more.
    resets: VecDeque<(Ports, u16)>,
    /// Streams with something to send, each once.
    turn: VecDeque<StreamId>,
    /// Streams with something to tell, each once.
    news: VecDeque<StreamId>,
    next_id: u64,
    next_port: u32,
    counters: Counters,
}

impl Mux {
    pub(super) fn new(guest: GuestCid) -> Self {
        Self {
            guest,
            listening: BTreeSet::new(),
            streams: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            resets: VecDeque::new(),
            turn: VecDeque::new(),
            news: VecDeque::new(),
            next_id: 0,
            next_port: FIRST_PORT,
            counters: Counters::default(),
        }
    }

    pub(super) fn guest(&self) -> GuestCid {
        self.guest
    }

    pub(super) fn set_guest(&mut self, guest: GuestCid) {
        self.guest = guest;
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn listen(&mut self, port: Port) {
        self.listening.insert(port);
    }

    fn insert(&mut self, stream: Stream) -> StreamId {
        let id = StreamId(self.next_id);
        self.next_id += 1;
        self.by_ports.insert(stream.ports, id);
        self.streams.insert(id, stream);
        id
    }

    pub(super) fn connect(&mut self, guest: Port) -> Result<StreamId, TooManyStreams> {
        if self.streams.len() >= MAX_STREAMS {
            return Err(TooManyStreams);
        }
        // There are more ports than streams, so that this ends.
        let ports = loop {
            let ports = Ports { host: Port(self.next_port), guest };
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            if !self.by_ports.contains_key(&ports) && !self.listening.contains(&ports.host) {
                break ports;
            }
        };
        let id = self.insert(Stream::connecting(ports));
        self.settle(id);
        Ok(id)
    }

    /// Changes a stream, then gives it a place among those that send or tell, if it has reason to.
    fn with(&mut self, id: StreamId, change: impl FnOnce(&mut Stream)) {
        if let Some(stream) = self.streams.get_mut(&id) {
            change(stream);
            self.settle(id);
        }
    }

    fn settle(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let mut stale = false;
        if stream.has_outgoing() && !stream.in_turn {
            stream.in_turn = true;
            self.turn.push_back(id);
            stale = self.turn.len() > 2 * MAX_STREAMS;
        }
        if stream.has_news() && !stream.in_news {
            stream.in_news = true;
            self.news.push_back(id);
        }
        // Streams that ended while the guest took no packets: forgotten before they are more than the living.
        if stale {
            self.turn.retain(|id| self.streams.contains_key(id));
        }
    }

    /// Ends a stream on the wire: its ports are free, its unread bytes stay.
    fn end(&mut self, id: StreamId, reason: Reason) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if self.by_ports.get(&stream.ports) == Some(&id) {
            self.by_ports.remove(&stream.ports);
        }
        stream.end(reason);
        self.settle(id);
    }

    fn push_reset(&mut self, ports: Ports, kind: u16) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back((ports, kind));
        } else {
            self.counters.lost_resets += 1;
        }
    }

    /// Ends every stream that a driver knows of, without telling it.
    pub(super) fn end_all(&mut self) {
        self.resets.clear();
        let known: Vec<_> = self.streams.iter().filter(|(_, s)| !s.is_unsent()).map(|(id, _)| *id).collect();
        for id in known {
            self.end(id, Reason::Transport);
        }
    }

    /// Streams, resets and senders that are kept.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> (usize, usize, usize) {
        (self.streams.len(), self.resets.len(), self.turn.len())
    }

    // The owner's side.

    pub(super) fn sendable(&self, id: StreamId) -> usize {
        self.streams.get(&id).map_or(0, Stream::sendable)
    }

    pub(super) fn received(&self, id: StreamId) -> &[u8] {
        self.streams.get(&id).map_or(&[], Stream::received)
    }

    pub(super) fn buffer(&mut self, id: StreamId, data: &[u8]) -> usize {
        let mut taken = 0;
        if !data.is_empty() {
            self.with(id, |stream| taken = stream.buffer(data));
        }
        taken
    }

    pub(super) fn consume(&mut self, id: StreamId, n: usize) {
        self.with(id, |stream| stream.consume(n));
    }

    pub(super) fn shutdown(&mut self, id: StreamId, how: How) {
        self.with(id, |stream| stream.shutdown(how));
    }

    pub(super) fn reset(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if matches!(stream.phase(), Phase::Over(_)) {
            stream.discard();
            return self.settle(id);
        }
        let (ports, unsent) = (stream.ports, stream.is_unsent());
        self.end(id, Reason::Local);
        if !unsent {
            self.push_reset(ports, STREAM);
        }
    }

    pub(super) fn poll_event(&mut self) -> Option<VsockEvent> {
        while let Some(id) = self.news.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.in_news = false;
            let event = stream.take_news(id);
            if let Some(VsockEvent::Closed(..)) = event {
                self.streams.remove(&id);
            } else {
                self.settle(id);
            }
            if event.is_some() {
                return event;
            }
        }
        None
    }

    // The guest's side, in.

    /// Takes one packet.
    ///
    /// # Errors
    /// If the chain does not even hold a header.
    pub(super) fn receive(&mut self, chain: &mut Chain<'_>) -> Result<(), ChainError> {
        let header = Header::decode(&chain.read_array::<HEADER>()?);
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let ours = header.src_cid == u64::from(self.guest.get()) && header.dst_cid == HOST_CID;
        if !ours || len > chain.readable_len() {
            self.counters.malformed += 1;
            return Ok(());
        }
        let ports = Ports { host: Port(header.dst_port), guest: Port(header.src_port) };
        if header.kind != STREAM {
            // A stream of another type may use the same ports; it does not exist here (§5.10.6.4).
            if header.op != op::RST {
                self.refuse(ports, header.kind);
            }
            return Ok(());
        }
        match self.by_ports.get(&ports) {
            Some(id) => self.receive_in(*id, &header, len, chain),
            None if header.op == op::REQUEST => self.accept(ports, &header),
            None if header.op == op::RST => {}
            None => self.refuse(ports, STREAM),
        }
        Ok(())
    }

    fn refuse(&mut self, ports: Ports, kind: u16) {
        self.counters.refused += 1;
        self.push_reset(ports, kind);
    }

    fn accept(&mut self, ports: Ports, header: &Header) {
        if !self.listening.contains(&ports.host) || self.streams.len() >= MAX_STREAMS {
            return self.refuse(ports, STREAM);
        }
        let mut stream = Stream::accepted(ports);
        stream.credit(header.buf_alloc, header.fwd_cnt);
        let id = self.insert(stream);
        self.settle(id);
    }

    fn receive_in(&mut self, id: StreamId, header: &Header, len: usize, chain: &mut Chain<'_>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.credit(header.buf_alloc, header.fwd_cnt);
        match (header.op, stream.phase()) {
            (op::RST, Phase::Connecting) => return self.end(id, Reason::Refused),
            (op::RST, _) => {
                let reason = if stream.is_shut() { Reason::Finished } else { Reason::Reset };
                return self.end(id, reason);
            }
            // An answer to a request that has not been sent is no answer.
            (op::RESPONSE, Phase::Connecting) if !stream.is_unsent() => stream.connected(),
            (op::RW, Phase::Open) => {
                let Some(to) = stream.accept(len) else { return self.violation(id) };
                // The chain has `len` bytes: that was checked above.
                let _ = chain.read(to);
                stream.accepted_bytes();
            }
            (op::SHUTDOWN, Phase::Open) => {
                if stream.peer_shutdown(header.flags) {
                    // The guest waits for this before it forgets the stream (§5.10.6.5).
                    let ports = stream.ports;
                    self.push_reset(ports, STREAM);
                    return self.end(id, Reason::Finished);
                }
            }
            (op::CREDIT_UPDATE, Phase::Open) => {}
            (op::CREDIT_REQUEST, Phase::Open) => stream.credit_requested(),
            _ => return self.violation(id),
        }
        self.settle(id);
    }

    fn violation(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(&id) else { return };
        let ports = stream.ports;
        self.counters.violations += 1;
        self.push_reset(ports, STREAM);
        self.end(id, Reason::Violation);
    }

    // The guest's side, out.

    pub(super) fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.turn.is_empty()
    }

    /// Writes the next packet into a receive buffer; returns its bytes. `None` if there is none after all.
    ///
    /// # Errors
    /// If the buffer cannot hold a header and a byte.
    pub(super) fn send_next(&mut self, chain: &mut Chain<'_>) -> Result<Option<u32>, QueueError> {
        let room = room(chain)?;
        if let Some((ports, kind)) = self.resets.pop_front() {
            let header = Header { kind, op: op::RST, ..self.header(ports) };
            chain.write(&header.encode());
            return Ok(Some(packet_len(0)));
        }
        while let Some(id) = self.turn.pop_front() {
            let ports = match self.streams.get_mut(&id) {
                None => continue,
                Some(stream) => {
                    stream.in_turn = false;
                    stream.ports
                }
            };
            let header = self.header(ports);
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let Some(Outgoing { op, flags, len }) = stream.next_packet(room) else { continue };
            let header = Header { op, flags, len, fwd_cnt: stream.forwarded(), ..header };
            chain.write(&header.encode());
            let bytes = usize::try_from(len).unwrap_or(0);
            chain.write(stream.outgoing().get(..bytes).unwrap_or(&[]));
            stream.packet_sent(len, bytes);
            self.settle(id);
            return Ok(Some(packet_len(len)));
        }
        Ok(None)
    }

    /// Whether a stream may send without waiting for its turn: nobody waits, and it has nothing buffered.
    pub(super) fn may_bypass(&self, id: StreamId) -> bool {
        !self.has_outgoing() && self.streams.get(&id).is_some_and(Stream::may_bypass)
    }

    /// Whether nobody waits for credit, and a stream has so much that its next may come late.
    pub(super) fn has_credit_to_spare(&self, id: StreamId) -> bool {
        !self.has_outgoing() && self.streams.get(&id).is_some_and(Stream::has_credit_to_spare)
    }

    /// Writes the front of `data` into a receive buffer, past the send buffer. Returns how much of it, and the
    /// packet's bytes. Only after [`Mux::may_bypass`].
    pub(super) fn send_now(
        &mut self,
        id: StreamId,
        data: &[u8],
        chain: &mut Chain<'_>,
    ) -> Result<(usize, u32), QueueError> {
        let room = room(chain)?;
        let stream = self.streams.get_mut(&id).ok_or(QueueError::Malformed)?;
        let len = stream.credit_for(data.len().min(room));
        let (ports, fwd_cnt) = (stream.ports, stream.forwarded());
        let header = Header { op: op::RW, len, fwd_cnt, ..self.header(ports) };
        chain.write(&header.encode());
        let bytes = usize::try_from(len).unwrap_or(0);
        chain.write(data.get(..bytes).unwrap_or(&[]));
        self.with(id, |stream| stream.packet_sent(len, 0));
        Ok((bytes, packet_len(len)))
    }

    fn header(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest.get().into(),
            src_port: ports.host.0,
            dst_port: ports.guest.0,
            kind: STREAM,
            buf_alloc: BUF_ALLOC,
            ..Header::default()
        }
    }
}

/// Bytes of data that a receive buffer holds after the header. One that holds none is no receive buffer.
fn room(chain: &Chain<'_>) -> Result<usize, QueueError> {
    chain.writable_len().checked_sub(HEADER).filter(|room| *room > 0).ok_or(QueueError::Malformed)
}

/// Bytes of a packet with `len` bytes of data, which fitted a chain of less than 2³² with its header.
fn packet_len(len: u32) -> u32 {
    len.saturating_add(HEADER_BYTES)
}
