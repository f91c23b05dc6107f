//! One stream: its phase, its two buffers, the credit of both directions, and what it has to tell each side.
//!
//! What is to be sent is a set of bits and the send buffer, never a queue of packets, so that no sequence of
//! packets from the guest makes a stream larger.

use super::buffer::Buffer;
use super::packet::{SHUT_READ, SHUT_WRITE, op};
use super::{BUF_ALLOC, How, Port, SEND_BUFFER, StreamId, VsockEvent};

/// Why a stream is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Both sides had finished.
    Finished,
    /// The guest refused the connection.
    Refused,
    /// The guest reset the stream.
    Reset,
    /// The guest broke the protocol, its credit included.
    Violation,
    /// The host called [`Vsock::reset`](super::Vsock::reset).
    Local,
    /// The driver, or the owner, reset the whole device.
    Transport,
}

/// Both ports of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub host: Port,
    pub guest: Port,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A request is to be sent, or waits for its answer.
    Connecting,
    Open,
    /// The guest knows it no more; received bytes may wait to be consumed.
    Over(Reason),
}

/// A packet to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub op: u16,
    pub flags: u32,
    /// Bytes from the front of the send buffer.
    pub len: u32,
}

/// Packets that are due.
mod due {
    pub const REQUEST: u8 = 1;
    pub const RESPONSE: u8 = 2;
    pub const SHUTDOWN: u8 = 4;
    pub const CREDIT_UPDATE: u8 = 8;
    pub const CREDIT_REQUEST: u8 = 16;
}

/// Events that are due, the first to be told in the lowest bit.
mod news {
    pub const CONNECTED: u8 = 1;
    pub const ACCEPTED: u8 = 2;
    pub const READABLE: u8 = 4;
    pub const WRITABLE: u8 = 8;
    pub const PEER_SHUTDOWN: u8 = 16;
    pub const CLOSED: u8 = 32;
}

#[derive(Debug)]
pub(super) struct Stream {
    pub ports: Ports,
    phase: Phase,
    due: u8,
    news: u8,
    /// Whether the stream is in its table's turn of senders, or of those with news.
    pub in_turn: bool,
    pub in_news: bool,
    /// To the guest: what waits, how much was ever sent, and the guest's last word on its buffer.
    outgoing: Buffer,
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    /// A send took less than it was given.
    wants_room: bool,
    /// Credit was asked for since it ran out.
    asked: bool,
    /// From the guest: what waits, how much was ever consumed, and how much of that the guest knows.
    incoming: Buffer,
    forwarded: u32,
    told: u32,
    /// Shutdown flags of the host, and those of the guest.
    shut: u32,
    peer_shut: u32,
}

impl Stream {
    fn new(ports: Ports, phase: Phase, due: u8, news: u8) -> Self {
        Self {
            ports,
            phase,
            due,
            news,
            in_turn: false,
            in_news: false,
            outgoing: Buffer::new(SEND_BUFFER),
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            wants_room: false,
            asked: false,
            incoming: Buffer::new(BUF_ALLOC as usize),
            forwarded: 0,
            told: 0,
            shut: 0,
            peer_shut: 0,
        }
    }

    pub(super) fn connecting(ports: Ports) -> Self {
        Self::new(ports, Phase::Connecting, due::REQUEST, 0)
    }

    pub(super) fn accepted(ports: Ports) -> Self {
        Self::new(ports, Phase::Open, due::RESPONSE, news::ACCEPTED)
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// A connect that no driver has seen.
    pub(super) fn is_unsent(&self) -> bool {
        self.phase == Phase::Connecting && self.due & due::REQUEST != 0
    }

    pub(super) fn forwarded(&self) -> u32 {
        self.forwarded
    }

    // From the guest.

    /// Every packet carries the guest's word on its buffer (§5.10.6.3).
    pub(super) fn credit(&mut self, alloc: u32, forwarded: u32) {
        if (alloc, forwarded) != (self.peer_alloc, self.peer_forwarded) {
            self.asked = false;
        }
        (self.peer_alloc, self.peer_forwarded) = (alloc, forwarded);
    }

    pub(super) fn connected(&mut self) {
        self.phase = Phase::Open;
        self.news |= news::CONNECTED;
    }

    pub(super) fn credit_requested(&mut self) {
        self.due |= due::CREDIT_UPDATE;
    }

    /// Where to put `n` bytes of the guest's; `None` if it has neither credit nor leave to send them.
    pub(super) fn accept(&mut self, n: usize) -> Option<&mut [u8]> {
        if self.peer_shut & SHUT_WRITE != 0 {
            return None;
        }
        let room = self.incoming.grow(n)?;
        if n > 0 && self.shut & SHUT_READ == 0 {
            self.news |= news::READABLE;
        }
        Some(room)
    }

    /// After bytes were put there: a host that does not read drops them, and the guest gets its credit back.
    pub(super) fn accepted_bytes(&mut self) {
        if self.shut & SHUT_READ != 0 {
            self.consume(usize::MAX);
        }
    }

    /// The guest gave up directions. Returns whether it gave up both, so that the stream is over.
    pub(super) fn peer_shutdown(&mut self, flags: u32) -> bool {
        let flags = flags & (SHUT_READ | SHUT_WRITE);
        if self.peer_shut | flags != self.peer_shut {
            self.peer_shut |= flags;
            self.news |= news::PEER_SHUTDOWN;
        }
        if self.peer_shut & SHUT_READ != 0 {
            self.outgoing.release();
        }
        self.peer_shut == SHUT_READ | SHUT_WRITE
    }

    /// Ends the stream. What the guest had sent before stays readable, unless the host ended it.
    pub(super) fn end(&mut self, reason: Reason) {
        if matches!(self.phase, Phase::Over(_)) {
            return;
        }
        self.phase = Phase::Over(reason);
        self.due = 0;
        self.outgoing.release();
        self.news &= !news::WRITABLE;
        if reason == Reason::Local {
            self.discard();
        }
        if !self.incoming.is_empty() && self.peer_shut != SHUT_READ | SHUT_WRITE {
            self.peer_shut = SHUT_READ | SHUT_WRITE;
            self.news |= news::PEER_SHUTDOWN;
        }
        self.close_if_read();
    }

    /// Drops what is unread, of a stream that is over.
    pub(super) fn discard(&mut self) {
        self.incoming.release();
        self.news &= !news::READABLE;
        self.close_if_read();
    }

    fn close_if_read(&mut self) {
        if matches!(self.phase, Phase::Over(_)) && self.incoming.is_empty() {
            self.news |= news::CLOSED;
        }
    }

    // From the host.

    fn may_send(&self) -> bool {
        !matches!(self.phase, Phase::Over(_))
            && self.shut & SHUT_WRITE == 0
            && self.peer_shut & SHUT_READ == 0
    }

    pub(super) fn sendable(&self) -> usize {
        if self.may_send() { self.outgoing.room() } else { 0 }
    }

    /// Whether bytes may go past the send buffer into a packet.
    pub(super) fn may_bypass(&self) -> bool {
        self.phase == Phase::Open
            && self.may_send()
            && self.outgoing.is_empty()
            && self.due & due::RESPONSE == 0
            && self.free_at_peer() > 0
    }

    pub(super) fn buffer(&mut self, data: &[u8]) -> usize {
        if !self.may_send() {
            return 0;
        }
        let n = self.outgoing.push(data);
        self.wants_room |= n < data.len();
        self.ask_if_stuck();
        n
    }

    pub(super) fn received(&self) -> &[u8] {
        self.incoming.bytes()
    }

    pub(super) fn outgoing(&self) -> &[u8] {
        self.outgoing.bytes()
    }

    pub(super) fn consume(&mut self, n: usize) {
        let n = self.incoming.consume(n);
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(n).unwrap_or(0));
        // The guest's view of our free space; tell it when that is low and there is something worth telling.
        let untold = self.forwarded.wrapping_sub(self.told);
        let held = u32::try_from(self.incoming.len()).unwrap_or(BUF_ALLOC);
        let view = BUF_ALLOC.saturating_sub(held.saturating_add(untold));
        let worth = untold >= BUF_ALLOC / 8 || (untold > 0 && self.incoming.is_empty());
        if self.phase == Phase::Open && view < BUF_ALLOC / 2 && worth {
            self.due |= due::CREDIT_UPDATE;
        }
        self.close_if_read();
    }

    pub(super) fn shutdown(&mut self, how: How) {
        let flags = match how {
            How::Read => SHUT_READ,
            How::Write => SHUT_WRITE,
            How::Both => SHUT_READ | SHUT_WRITE,
        };
        if flags & SHUT_READ != 0 {
            self.news &= !news::READABLE;
            self.consume(usize::MAX);
        }
        if self.shut | flags != self.shut && !matches!(self.phase, Phase::Over(_)) {
            self.shut |= flags;
            self.due |= due::SHUTDOWN;
        }
    }

    /// Whether the host, too, has given up both directions.
    pub(super) fn is_shut(&self) -> bool {
        self.shut == SHUT_READ | SHUT_WRITE
    }

    // To the guest.

    /// Bytes the guest has room for. A guest that claims to have forwarded more than it was sent has none.
    fn free_at_peer(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Whether the guest has room for as much again as it has not made room for yet.
    pub(super) fn has_credit_to_spare(&self) -> bool {
        self.outgoing.is_empty() && self.free_at_peer() >= self.peer_alloc / 2
    }

    fn ask_if_stuck(&mut self) {
        let stuck = self.phase == Phase::Open && !self.outgoing.is_empty() && self.free_at_peer() == 0;
        if stuck && !self.asked {
            self.asked = true;
            self.due |= due::CREDIT_REQUEST;
        }
    }

    /// Whether a packet could be sent, given a buffer of the guest.
    pub(super) fn has_outgoing(&self) -> bool {
        self.due_now() != 0 || self.data_due(usize::MAX) > 0
    }

    /// The packets that may be sent now: nothing overtakes the handshake, and an end of file no data.
    fn due_now(&self) -> u8 {
        match self.phase {
            Phase::Over(_) => 0,
            Phase::Connecting => self.due & due::REQUEST,
            Phase::Open if self.outgoing.is_empty() => self.due,
            Phase::Open => self.due & !due::SHUTDOWN,
        }
    }

    /// How many of `n` bytes the guest has room for.
    pub(super) fn credit_for(&self, n: usize) -> u32 {
        u32::try_from(n).unwrap_or(u32::MAX).min(self.free_at_peer())
    }

    /// Bytes of data in a packet that has `room` for them.
    fn data_due(&self, room: usize) -> u32 {
        if self.phase == Phase::Open { self.credit_for(self.outgoing.len().min(room)) } else { 0 }
    }

    /// The next packet for a buffer that has `room` for data.
    pub(super) fn next_packet(&mut self, room: usize) -> Option<Outgoing> {
        let due = self.due_now();
        let control = |op| Some(Outgoing { op, flags: 0, len: 0 });
        if due & due::REQUEST != 0 {
            self.due &= !due::REQUEST;
            return control(op::REQUEST);
        }
        if due & due::RESPONSE != 0 {
            self.due &= !due::RESPONSE;
            return control(op::RESPONSE);
        }
        let len = self.data_due(room);
        if len > 0 {
            return Some(Outgoing { op: op::RW, flags: 0, len });
        }
        if due & due::SHUTDOWN != 0 {
            self.due &= !due::SHUTDOWN;
            return Some(Outgoing { op: op::SHUTDOWN, flags: self.shut, len: 0 });
        }
        if due & due::CREDIT_UPDATE != 0 {
            return control(op::CREDIT_UPDATE);
        }
        if due & due::CREDIT_REQUEST != 0 {
            self.due &= !due::CREDIT_REQUEST;
            return control(op::CREDIT_REQUEST);
        }
        None
    }

    /// A packet went out: it carried our credit, and `len` bytes, `buffered` of them from the send buffer.
    pub(super) fn packet_sent(&mut self, len: u32, buffered: usize) {
        self.due &= !due::CREDIT_UPDATE;
        self.told = self.forwarded;
        self.sent = self.sent.wrapping_add(len);
        self.outgoing.consume(buffered);
        self.ask_if_stuck();
        if self.wants_room && self.outgoing.len() <= SEND_BUFFER / 2 {
            self.wants_room = false;
            self.news |= news::WRITABLE;
        }
    }

    // To the owner.

    pub(super) fn has_news(&self) -> bool {
        self.news != 0
    }

    pub(super) fn take_news(&mut self, id: StreamId) -> Option<VsockEvent> {
        let first = self.news & self.news.wrapping_neg();
        self.news &= !first;
        let how = match self.peer_shut {
            SHUT_READ => How::Read,
            SHUT_WRITE => How::Write,
            _ => How::Both,
        };
        match (first, self.phase) {
            (news::CONNECTED, _) => Some(VsockEvent::Connected(id)),
            (news::ACCEPTED, _) => Some(VsockEvent::Accepted { id, port: self.ports.host }),
            (news::READABLE, _) => Some(VsockEvent::Readable(id)),
            (news::WRITABLE, _) => Some(VsockEvent::Writable(id)),
            (news::PEER_SHUTDOWN, _) => Some(VsockEvent::PeerShutdown(id, how)),
            (news::CLOSED, Phase::Over(reason)) => Some(VsockEvent::Closed(id, reason)),
            _ => None,
        }
    }
}
