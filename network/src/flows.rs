//! UDP and echo: a socket of the host for each flow, as long as something passes.
//!
//! A flow of the guest's own has a connected socket, so that it hears from its peer alone and of refused ports. One from a
//! published port shares the port's socket. Nothing is kept: what the guest does not fetch waits in the host's
//! socket, as long as that has room.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

use cubby_network_policy::{Direction, Protocol, Verdict};
use rustix::net::sockopt;

use crate::emit::{self, Ends, Unreachable};
use crate::events::DeniedBy;
use crate::frame::Offload;
use crate::shared::{Shared, Token};
use crate::slab::Slab;
use crate::socket::{self, Failure};

/// What a flow is told apart by. Echo has the identifier for the guest's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    protocol: Protocol,
    ends: Ends,
}

#[derive(Debug)]
enum Via {
    /// Its own, connected.
    Own(UdpSocket),
    /// A published port's, and who sends to it.
    Published(Arc<UdpSocket>, SocketAddr),
}

#[derive(Debug)]
struct Flow {
    key: Key,
    via: Via,
    direction: Direction,
    peer: SocketAddr,
    called: u16,
    used: Instant,
    queued: bool,
    /// The length of the last datagram from the guest, which an error is about.
    last_len: usize,
}

/// All flows.
#[derive(Debug)]
pub(crate) struct Flows {
    flows: Slab<Flow>,
    by_key: HashMap<Key, usize>,
    turn: VecDeque<usize>,
    sweep: Option<Instant>,
    next_port: u16,
    scratch: Vec<u8>,
    filled: usize,
}

const FIRST_PORT: u16 = 32_768;

impl Flows {
    pub(crate) fn new() -> Self {
        Flows {
            flows: Slab::new(),
            by_key: HashMap::new(),
            turn: VecDeque::new(),
            sweep: None,
            next_port: FIRST_PORT,
            scratch: vec![0; 65_536],
            filled: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A datagram from the guest; `packet` is what an error would quote.
    pub(crate) fn send(
        &mut self,
        ends: Ends,
        payload: &[u8],
        packet: &[u8],
        shared: &mut Shared,
        now: Instant,
    ) {
        let key = Key { protocol: Protocol::Udp, ends };
        if shared.link.is_gateway(ends.peer.0) && !self.by_key.contains_key(&key) {
            refuse(ends, packet, Unreachable::Port, shared);
            return;
        }
        self.pass(key, payload, packet, shared, now);
    }

    /// An echo request from the guest.
    pub(crate) fn echo(
        &mut self,
        (guest, peer): (IpAddr, IpAddr),
        (ident, sequence): (u16, u16),
        data: &[u8],
        packet: &[u8],
        shared: &mut Shared,
        now: Instant,
    ) {
        let key = Key { protocol: Protocol::Icmp, ends: Ends { guest: (guest, ident), peer: (peer, 0) } };
        // The host's kernel fills in the identifier and the checksum.
        let kind = if peer.is_ipv4() { 8 } else { 128 };
        let [high, low] = sequence.to_be_bytes();
        let message = [&[kind, 0, 0, 0, 0, 0, high, low], data].concat();
        self.pass(key, &message, packet, shared, now);
    }

    fn pass(&mut self, key: Key, payload: &[u8], packet: &[u8], shared: &mut Shared, now: Instant) {
        let id = match self.by_key.get(&key) {
            Some(id) => *id,
            None => match self.open(key, shared, now) {
                Ok(id) => id,
                Err(why) => {
                    refuse(key.ends, packet, why, shared);
                    return;
                }
            },
        };
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.used = now;
        flow.last_len = payload.len();
        let sent = match &flow.via {
            Via::Own(socket) => match socket.send(payload) {
                // It is about an earlier one, of which the guest hears now. This one has not been sent.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    refuse(key.ends, packet, Unreachable::Port, shared);
                    socket.send(payload)
                }
                other => other,
            },
            Via::Published(socket, client) => socket.send_to(payload, *client),
        };
        match sent {
            Ok(_) => {}
            Err(error) => match (error.kind(), Failure::from(socket::errno(&error))) {
                (ErrorKind::WouldBlock | ErrorKind::ConnectionRefused, _) => shared.counters.udp_dropped += 1,
                (_, Failure::Unreachable(why)) => refuse(key.ends, packet, why, shared),
                _ => shared.counters.udp_dropped += 1,
            },
        }
    }

    fn open(&mut self, key: Key, shared: &mut Shared, now: Instant) -> Result<usize, Unreachable> {
        let (address, port) = key.ends.peer;
        let peer = SocketAddr::new(shared.link.on_host(address), port);
        if !shared.admit(Direction::Outbound, key.protocol, peer, port, now) {
            return Err(Unreachable::Prohibited);
        }
        self.make_room(shared);
        let opened = match key.protocol {
            Protocol::Icmp => socket::connect_ping(peer.ip()),
            _ => socket::connect_udp(peer),
        };
        let watched = opened.and_then(|socket| {
            shared.watch(&socket, Token::Flow(self.flows.next()))?;
            Ok(socket)
        });
        let socket = watched.map_err(|errno| match errno.into() {
            Failure::Unreachable(why) => why,
            Failure::Exhausted => {
                shared.deny(Direction::Outbound, key.protocol, peer, DeniedBy::Connections);
                Unreachable::Prohibited
            }
            Failure::Refused | Failure::Silence => Unreachable::Host,
        })?;
        shared.connected(Direction::Outbound, key.protocol, peer);
        Ok(self.add(key, Via::Own(socket), (Direction::Outbound, peer, port), shared, now))
    }

    fn add(
        &mut self,
        key: Key,
        via: Via,
        (direction, peer, called): (Direction, SocketAddr, u16),
        shared: &mut Shared,
        now: Instant,
    ) -> usize {
        shared.counters.udp_opened += 1;
        let flow = Flow { key, via, direction, peer, called, used: now, queued: false, last_len: 0 };
        let id = self.flows.insert(flow);
        self.by_key.insert(key, id);
        self.sweep.get_or_insert(now + shared.limits.udp_idle);
        id
    }

    /// A datagram from somebody who uses a published port.
    pub(crate) fn receive_for_port(
        &mut self,
        socket: &Arc<UdpSocket>,
        client: SocketAddr,
        port: u16,
        payload: &[u8],
        shared: &mut Shared,
        now: Instant,
    ) {
        let like = client.ip().to_canonical();
        let (guest, gateway) = (shared.link.guest(like), shared.link.gateway(like));
        let same = |flow: &Flow| matches!(&flow.via, Via::Published(other, from) if Arc::ptr_eq(other, socket) && *from == client);
        // Flows are few and a client's next datagram is likely about the last flow: a walk is enough.
        let known = self.flows.iter_mut().find_map(|(id, flow)| same(flow).then_some(id));
        let id = match known {
            Some(id) => id,
            None => {
                if !shared.admit(Direction::Inbound, Protocol::Udp, client, port, now) {
                    return;
                }
                self.make_room(shared);
                let from = self.next_port;
                self.next_port = from.checked_add(1).unwrap_or(FIRST_PORT);
                let key = Key {
                    protocol: Protocol::Udp,
                    ends: Ends { guest: (guest, port), peer: (gateway, from) },
                };
                if self.by_key.contains_key(&key) {
                    shared.counters.udp_dropped += 1;
                    return;
                }
                shared.connected(Direction::Inbound, Protocol::Udp, client);
                let via = Via::Published(socket.clone(), client);
                self.add(key, via, (Direction::Inbound, client, port), shared, now)
            }
        };
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.used = now;
        if fits(flow.key.ends, payload.len(), shared.mtu) {
            shared.reply(emit::udp_frame(&shared.link, flow.key.ends, payload));
        } else {
            shared.counters.udp_dropped += 1;
        }
    }

    /// Ends the flow that was idle for the longest, if there is no room for one more.
    fn make_room(&mut self, shared: &Shared) {
        if self.flows.len() >= shared.limits.udp_flows.max(1)
            && let Some((id, _)) = self.flows.iter_mut().min_by_key(|(_, flow)| flow.used)
        {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: usize) {
        if let Some(flow) = self.flows.remove(id) {
            self.by_key.remove(&flow.key);
        }
    }

    /// There is something to read from a flow's socket.
    pub(crate) fn on_ready(&mut self, id: usize, failed: bool, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if failed && let Via::Own(socket) = &flow.via {
            let why = match sockopt::socket_error(socket) {
                Ok(Err(errno)) => Some(errno.into()),
                _ => None,
            };
            let why = match why {
                Some(Failure::Unreachable(why)) => Some(why),
                Some(Failure::Refused) => Some(Unreachable::Port),
                _ => None,
            };
            if let Some(why) = why.filter(|_| flow.key.protocol == Protocol::Udp) {
                let ends = flow.key.ends;
                refuse(ends, &emit::quote_udp(ends, flow.last_len), why, shared);
            }
        }
        if !flow.queued {
            flow.queued = true;
            self.turn.push_back(id);
        }
    }

    pub(crate) fn is_due(&self) -> bool {
        !self.turn.is_empty()
    }

    /// The next datagram for the guest, its headers written to `head`; its payload is [`Flows::payload`]. An echo is whole in
    /// `head`.
    pub(crate) fn next_datagram(
        &mut self,
        head: &mut Vec<u8>,
        shared: &mut Shared,
        now: Instant,
    ) -> Option<Offload> {
        // A socket is asked until it has nothing more, so that a turn is never lost; what is dropped costs one too.
        for _ in 0..64 {
            let id = self.turn.pop_front()?;
            let Some(flow) = self.flows.get_mut(id) else { continue };
            flow.queued = false;
            let Via::Own(socket) = &flow.via else { continue };
            let read = socket.recv(&mut self.scratch);
            match read {
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                other => {
                    // There may be more, or an error to be told of.
                    flow.queued = true;
                    self.turn.push_back(id);
                    let Ok(n) = other else {
                        if flow.key.protocol == Protocol::Udp
                            && other.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
                        {
                            let ends = flow.key.ends;
                            refuse(ends, &emit::quote_udp(ends, flow.last_len), Unreachable::Port, shared);
                        }
                        continue;
                    };
                    flow.used = now;
                    self.filled = n;
                    let ends = flow.key.ends;
                    if !fits(ends, n, shared.mtu) {
                        shared.counters.udp_dropped += 1;
                        continue;
                    }
                    let payload = self.scratch.get(..n).unwrap_or_default();
                    if flow.key.protocol == Protocol::Udp {
                        return Some(emit::udp(head, &shared.link, ends, payload, shared.offloads));
                    }
                    self.filled = 0;
                    if let Some(([0 | 129, _, _, _, _, _, high, low], data)) = payload.split_first_chunk() {
                        let sequence = u16::from_be_bytes([*high, *low]);
                        let between = (ends.guest.0, ends.peer.0);
                        *head = emit::echo_reply(&shared.link, between, ends.guest.1, sequence, data);
                        return Some(Offload::default());
                    }
                }
            }
        }
        None
    }

    /// The payload of what [`Flows::next_datagram`] gave last.
    pub(crate) fn payload(&self) -> &[u8] {
        self.scratch.get(..self.filled).unwrap_or_default()
    }

    /// When [`Flows::on_time`] is to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.sweep
    }

    /// Ends flows that nobody uses.
    pub(crate) fn on_time(&mut self, shared: &Shared, now: Instant) {
        if self.sweep.is_none_or(|sweep| now < sweep) {
            return;
        }
        let idle = shared.limits.udp_idle;
        for id in self.flows.indices() {
            if self.flows.get(id).is_some_and(|flow| now >= flow.used + idle) {
                self.remove(id);
            }
        }
        // Not for each flow in its moment: somewhat late does no harm.
        self.sweep =
            self.flows.iter_mut().map(|(_, flow)| flow.used + idle).min().map(|at| at.max(now + idle / 8));
    }

    /// Ends what the policy no longer allows, and tells of it.
    pub(crate) fn apply_policy(&mut self, shared: &mut Shared) {
        for id in self.flows.indices() {
            let Some(flow) = self.flows.get(id) else { continue };
            let (direction, protocol, peer) = (flow.direction, flow.key.protocol, flow.peer);
            if let Verdict::Denied(by) = shared.verdict(direction, protocol, peer, flow.called) {
                shared.deny(direction, protocol, peer, DeniedBy::Policy(by));
                self.remove(id);
            }
        }
    }
}

fn fits(ends: Ends, payload: usize, mtu: usize) -> bool {
    payload + if ends.guest.0.is_ipv4() { 28 } else { 48 } <= mtu
}

fn refuse(ends: Ends, packet: &[u8], why: Unreachable, shared: &mut Shared) {
    if let Some(frame) = emit::unreachable(&shared.link, (ends.guest.0, ends.peer.0), packet, why) {
        shared.reply(frame);
    }
}
