//! All connections: who is who, whose turn it is, and whose time has come.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use cubby_network_policy::{Direction, Protocol, Verdict};
use rustix::net::sockopt;

use super::connection::{Connection, Far, Inbox};
use super::endpoint::{Ending, Endpoint, Phase};
use super::segment::{Outgoing, Segment};
use super::seq::Seq;
use crate::emit::{self, Ends, Unreachable};
use crate::events::DeniedBy;
use crate::frame::Offload;
use crate::shared::{Shared, Token};
use crate::slab::Slab;
use crate::socket::{self, Failure};

/// The most payload of a segment: an IP packet of 65,535 bytes less the largest headers it has here.
const MOST_PAYLOAD: usize = 65_535 - 60;
/// Where the ports begin from which the gateway calls the guest.
const FIRST_PORT: u16 = 32_768;
/// Memory that must be free before those who found none try again.
const ENOUGH: usize = 256 << 10;

/// A segment for the guest: its headers are in the buffer that was given, its payload is [`Table::payload`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Due {
    id: usize,
    serial: u64,
    segment: Outgoing,
    pub(crate) offload: Offload,
}

/// A message for the resolver, and which connection it came by.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) id: usize,
    pub(crate) serial: u64,
    pub(crate) message: Vec<u8>,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Table {
    connections: Slab<Connection>,
    by_ends: HashMap<Ends, usize>,
    turn: VecDeque<usize>,
    starved: Vec<usize>,
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    half_open: usize,
    serial: u64,
    next_port: u16,
    asked: Vec<Asked>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Table {
            connections: Slab::new(),
            by_ends: HashMap::new(),
            turn: VecDeque::new(),
            starved: Vec::new(),
            timers: BinaryHeap::new(),
            half_open: 0,
            serial: 0,
            next_port: FIRST_PORT,
            asked: Vec::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Takes a segment of the guest; `packet` is what an error would quote.
    pub(crate) fn on_segment(
        &mut self,
        ends: Ends,
        segment: &Segment<'_>,
        packet: &[u8],
        shared: &mut Shared,
        now: Instant,
    ) {
        if let Some(&id) = self.by_ends.get(&ends) {
            // A new connection may take the place of one that only lingers (RFC 9293 §3.6.1).
            let lingers = |connection: &Connection| connection.near.phase() == Phase::TimeWait;
            if !(segment.syn && segment.ack.is_none() && self.connections.get(id).is_some_and(lingers)) {
                if let Some(connection) = self.connections.get_mut(id) {
                    connection.on_segment(segment, now, &mut shared.pool);
                }
                self.settle(id, shared);
                return;
            }
            self.remove(id, shared);
        }
        if segment.syn && segment.ack.is_none() && !segment.fin {
            self.open(ends, segment, packet, shared, now);
        } else if !segment.rst {
            self.refuse(ends, segment, shared);
        }
    }

    fn refuse(&mut self, ends: Ends, segment: &Segment<'_>, shared: &mut Shared) {
        send(&Outgoing::reset_for(segment), ends, shared);
    }

    /// The guest calls somebody.
    fn open(&mut self, ends: Ends, syn: &Segment<'_>, packet: &[u8], shared: &mut Shared, now: Instant) {
        let (address, port) = ends.peer;
        let peer = SocketAddr::new(shared.link.on_host(address), port);
        let call = (Direction::Outbound, peer, port);
        if shared.link.is_gateway(address) {
            if port == 53 && self.has_room(call, shared) {
                self.insert(ends, syn, Far::Resolver(Inbox::default()), call, shared);
            } else {
                self.refuse(ends, syn, shared);
            }
            return;
        }
        if !shared.admit(Direction::Outbound, Protocol::Tcp, peer, port, now) || !self.has_room(call, shared)
        {
            self.refuse(ends, syn, shared);
            return;
        }
        let connecting = socket::connect_tcp(peer).and_then(|stream| {
            shared.watch(&stream, Token::Tcp(self.connections.next()))?;
            Ok(stream)
        });
        match connecting {
            Ok(stream) => self.insert(ends, syn, Far::Connecting(stream), call, shared),
            Err(errno) => {
                shared.counters.tcp_failed += 1;
                match Failure::from(errno) {
                    Failure::Unreachable(why) => unreachable(ends, packet, why, shared),
                    Failure::Exhausted => {
                        shared.deny(Direction::Outbound, Protocol::Tcp, peer, DeniedBy::Connections);
                        self.refuse(ends, syn, shared);
                    }
                    Failure::Refused | Failure::Silence => self.refuse(ends, syn, shared),
                }
            }
        }
    }

    /// Whether one more may be held. A refusal is counted and told.
    fn has_room(&self, (direction, peer, _): (Direction, SocketAddr, u16), shared: &mut Shared) -> bool {
        let by = if self.connections.len() >= shared.limits.tcp_connections {
            DeniedBy::Connections
        } else if self.half_open >= shared.limits.half_open {
            DeniedBy::HalfOpen
        } else {
            return true;
        };
        shared.deny(direction, Protocol::Tcp, peer, by);
        false
    }

    fn insert(
        &mut self,
        ends: Ends,
        syn: &Segment<'_>,
        far: Far,
        call: (Direction, SocketAddr, u16),
        shared: &mut Shared,
    ) {
        let mut near = Endpoint::asked(syn, Seq(shared.draw_u32()), our_mss(ends, shared));
        if matches!(far, Far::Resolver(_)) {
            near.answer();
        }
        self.add(ends, near, far, call, shared);
    }

    fn add(
        &mut self,
        ends: Ends,
        near: Endpoint,
        far: Far,
        call: (Direction, SocketAddr, u16),
        shared: &mut Shared,
    ) {
        self.serial += 1;
        let id = self.connections.insert(Connection::new(ends, self.serial, near, far, call));
        self.by_ends.insert(ends, id);
        self.half_open += 1;
        self.settle(id, shared);
    }

    /// Somebody calls the guest's port: a connection that the host has accepted.
    pub(crate) fn call_guest(
        &mut self,
        stream: TcpStream,
        peer: SocketAddr,
        port: u16,
        shared: &mut Shared,
        now: Instant,
    ) {
        let call = (Direction::Inbound, peer, port);
        let admitted =
            shared.admit(Direction::Inbound, Protocol::Tcp, peer, port, now) && self.has_room(call, shared);
        // The guest hears the gateway's address, of the family in which it was called.
        let (guest, gateway) = (shared.link.guest(peer.ip()), shared.link.gateway(peer.ip()));
        let free = admitted.then(|| self.free_port((guest, port), gateway)).flatten();
        let watched = shared.watch(&stream, Token::Tcp(self.connections.next()));
        let (Some(from), Ok(())) = (free, watched) else {
            socket::end_with_reset(&stream);
            return;
        };
        socket::tune(&stream);
        let ends = Ends { guest: (guest, port), peer: (gateway, from) };
        let near = Endpoint::asking(Seq(shared.draw_u32()), our_mss(ends, shared));
        self.add(ends, near, Far::Open(stream), call, shared);
    }

    fn free_port(&mut self, guest: (std::net::IpAddr, u16), gateway: std::net::IpAddr) -> Option<u16> {
        for _ in FIRST_PORT..=u16::MAX {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.by_ends.contains_key(&Ends { guest, peer: (gateway, port) }) {
                return Some(port);
            }
        }
        None
    }

    /// Something has happened to a connection's socket.
    pub(crate) fn on_ready(&mut self, id: usize, ready: Ready, shared: &mut Shared) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.readable |= ready.readable;
        connection.hung_up |= ready.hung_up;
        connection.writable |= ready.writable;
        match &connection.far {
            Far::Connecting(stream) if ready.writable || ready.failed => {
                match sockopt::socket_error(stream).unwrap_or_else(Err) {
                    Ok(()) if ready.failed || !ready.writable => {}
                    Ok(()) => {
                        if let Far::Connecting(stream) = std::mem::replace(&mut connection.far, Far::Closed) {
                            connection.far = Far::Open(stream);
                        }
                        connection.near.answer();
                    }
                    Err(errno) => {
                        self.fail(id, errno.into(), shared);
                        return;
                    }
                }
            }
            Far::Open(stream) if ready.failed => {
                // Only an error breaks it off; a hang-up is an end in both directions.
                connection.broken |= !matches!(sockopt::socket_error(stream), Ok(Ok(())));
            }
            _ => {}
        }
        self.settle(id, shared);
    }

    /// The host could not connect.
    fn fail(&mut self, id: usize, failure: Failure, shared: &mut Shared) {
        let Some(connection) = self.connections.get(id) else { return };
        shared.counters.tcp_failed += 1;
        let ends = connection.ends;
        match failure {
            Failure::Refused | Failure::Exhausted => {
                if let Some(reset) = connection.near.reset() {
                    send(&reset, ends, shared);
                }
            }
            Failure::Unreachable(why) => {
                let syn = connection.near.syn_heard();
                unreachable(ends, &emit::quote_tcp(ends, syn), why, shared);
            }
            Failure::Silence => {}
        }
        self.remove(id, shared);
    }

    /// Does what a change makes possible, and takes leave of what is over.
    fn settle(&mut self, id: usize, shared: &mut Shared) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.flush(&mut shared.pool);
        while let Far::Resolver(inbox) = &mut connection.far {
            let Some(message) = inbox.take() else { break };
            self.asked.push(Asked { id, serial: connection.serial, message });
            connection.flush(&mut shared.pool);
        }
        if connection.broken {
            let (ends, reset) = (connection.ends, connection.near.reset());
            if let Some(reset) = reset {
                send(&reset, ends, shared);
            }
            self.remove(id, shared);
            return;
        }
        if !connection.opened && !connection.is_half_open() {
            connection.opened = true;
            self.half_open -= 1;
            if connection.near.is_open() && !matches!(connection.far, Far::Resolver(_)) {
                shared.counters.tcp_opened += 1;
                let (direction, peer) = (connection.direction, connection.peer);
                shared.connected(direction, Protocol::Tcp, peer);
            }
        }
        match connection.near.phase() {
            Phase::Over(Ending::Finished) => {
                // Another connection may have its ends now, while a slow peer still gets what the guest has said.
                let ends = connection.ends;
                if self.by_ends.get(&ends) == Some(&id) {
                    self.by_ends.remove(&ends);
                }
                if connection.is_flushed() {
                    connection.close(false);
                    self.remove(id, shared);
                    return;
                }
            }
            Phase::Over(Ending::Reset | Ending::TimedOut) => {
                self.remove(id, shared);
                return;
            }
            Phase::TimeWait if connection.is_flushed() => connection.close(false),
            _ => {}
        }
        if !connection.queued && (connection.near.is_due() || connection.is_hungry(&shared.pool)) {
            connection.queued = true;
            self.turn.push_back(id);
        }
        // The clock runs for the earliest; who has moved is looked at then.
        if let Some(deadline) = connection.near.deadline()
            && connection.scheduled.is_none_or(|scheduled| deadline < scheduled)
        {
            connection.scheduled = Some(deadline);
            self.timers.push(Reverse((deadline, id)));
        }
    }

    /// Forgets a connection; what is left of the host's end is reset.
    fn remove(&mut self, id: usize, shared: &mut Shared) {
        let Some(mut connection) = self.connections.remove(id) else { return };
        connection.near.release(&mut shared.pool);
        connection.close(true);
        if !connection.opened {
            self.half_open -= 1;
        }
        if self.by_ends.get(&connection.ends) == Some(&id) {
            self.by_ends.remove(&connection.ends);
        }
    }

    /// Whether somebody waits to send to the guest.
    pub(crate) fn is_due(&self) -> bool {
        !self.turn.is_empty()
    }

    /// The next segment for the guest, its headers written to `head`: everybody in turn.
    pub(crate) fn next_segment(
        &mut self,
        head: &mut Vec<u8>,
        shared: &mut Shared,
        now: Instant,
    ) -> Option<Due> {
        if !self.starved.is_empty() && shared.pool.room() >= ENOUGH {
            for id in std::mem::take(&mut self.starved) {
                if let Some(connection) = self.connections.get_mut(id) {
                    connection.starved = false;
                }
                self.settle(id, shared);
            }
        }
        while let Some(id) = self.turn.pop_front() {
            let Some(connection) = self.connections.get_mut(id) else { continue };
            connection.queued = false;
            if connection.is_hungry(&shared.pool) && !connection.fill(&mut shared.pool) {
                connection.starved = true;
                self.starved.push(id);
            }
            let (ends, mss) = (connection.ends, connection.near.mss());
            let bundles = if ends.peer.0.is_ipv4() { shared.offloads.tso4 } else { shared.offloads.tso6 };
            let most = if bundles && shared.offloads.checksum { MOST_PAYLOAD } else { usize::from(mss) };
            let segment = connection.near.next_segment(most, now, &shared.pool);
            let due = segment.map(|segment| {
                let payload = connection.near.payload(&segment);
                let offload = emit::tcp(head, &shared.link, ends, &segment, payload, mss, shared.offloads);
                Due { id, serial: connection.serial, segment, offload }
            });
            self.settle(id, shared);
            // Settling may have ended it, with what the segment was to carry.
            if due.is_some() && self.connections.get(id).is_some() {
                return due;
            }
        }
        None
    }

    /// What the segment carries; `None` if its connection is over, or the guest has acknowledged it by now.
    pub(crate) fn payload(&self, due: &Due) -> Option<(&[u8], &[u8])> {
        let connection = self.connections.get(due.id).filter(|connection| connection.serial == due.serial)?;
        connection.near.still_payload(&due.segment)
    }

    /// When [`Table::on_time`] is to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    pub(crate) fn on_time(&mut self, shared: &mut Shared, now: Instant) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied()
            && at <= now
        {
            self.timers.pop();
            let Some(connection) = self.connections.get_mut(id) else { continue };
            if connection.scheduled != Some(at) {
                continue;
            }
            connection.scheduled = None;
            connection.near.on_time(now);
            self.settle(id, shared);
        }
    }

    /// Messages for the resolver.
    pub(crate) fn asked(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.asked)
    }

    /// The resolver's answer to one of them, if who asked is still there.
    pub(crate) fn answer(&mut self, id: usize, serial: u64, message: &[u8], shared: &mut Shared) {
        let Some(connection) = self.connections.get_mut(id).filter(|it| it.serial == serial) else { return };
        let Ok(len) = u16::try_from(message.len()) else { return };
        if let Far::Resolver(inbox) = &mut connection.far {
            inbox.answered();
        }
        let whole = [&len.to_be_bytes(), message].concat();
        if connection.near.sending().push(&whole, &mut shared.pool) < whole.len() {
            connection.broken = true;
        }
        self.settle(id, shared);
    }

    /// The guest is gone. What it has not said to its end must not look whole to the peer.
    pub(crate) fn end(&mut self) {
        for id in self.connections.indices() {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.close(!connection.shut);
            }
        }
    }

    /// Breaks off what the policy no longer allows, and tells of it.
    pub(crate) fn apply_policy(&mut self, shared: &mut Shared) {
        for id in self.connections.indices() {
            let Some(connection) = self.connections.get_mut(id) else { continue };
            if matches!(connection.far, Far::Resolver(_)) {
                continue;
            }
            let (direction, peer) = (connection.direction, connection.peer);
            if let Verdict::Denied(by) = shared.verdict(direction, Protocol::Tcp, peer, connection.called) {
                connection.broken = true;
                // What only lingers has said all that it had to say.
                if !matches!(connection.near.phase(), Phase::TimeWait | Phase::Over(_)) {
                    shared.deny(direction, Protocol::Tcp, peer, DeniedBy::Policy(by));
                }
                self.settle(id, shared);
            }
        }
    }
}

/// What an epoll has told of a socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) hung_up: bool,
    pub(crate) failed: bool,
}

/// The payload of one packet on this link.
fn our_mss(ends: Ends, shared: &Shared) -> u16 {
    let headers = if ends.peer.0.is_ipv4() { 40 } else { 60 };
    u16::try_from(shared.mtu.saturating_sub(headers)).unwrap_or(u16::MAX)
}

fn send(segment: &Outgoing, ends: Ends, shared: &mut Shared) {
    let mut frame = Vec::new();
    emit::tcp(&mut frame, &shared.link, ends, segment, (&[], &[]), u16::MAX, Default::default());
    shared.reply(frame);
}

fn unreachable(ends: Ends, packet: &[u8], why: Unreachable, shared: &mut Shared) {
    if let Some(frame) = emit::unreachable(&shared.link, (ends.guest.0, ends.peer.0), packet, why) {
        shared.reply(frame);
    }
}
