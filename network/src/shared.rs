//! What all parts of a stack work with: the configuration in force, replies that wait for the guest, and who may do what.

use std::collections::VecDeque;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use cubby_network_policy::{By, Direction, Flow, NetworkPolicy, Protocol, Verdict};
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::config::{Addresses, Limits};
use crate::events::{Counters, DeniedBy, Events, NetworkEvent};
use crate::frame::GuestOffloads;
use crate::names::Names;
use crate::ring::Pool;

/// The most replies that wait for the guest to fetch them, and the bytes of them: ARP, ICMP, resets, names.
const REPLIES: usize = 1024;
const REPLY_BYTES: usize = 4 << 20;

/// What is waited for at a socket.
pub(crate) const EVENTS: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);

/// What a descriptor of the stack belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Tcp(usize),
    Flow(usize),
    Port(usize),
    Lookup(usize),
}

impl Token {
    fn encode(self) -> u64 {
        let (kind, index) = match self {
            Token::Tcp(index) => (0, index),
            Token::Flow(index) => (1, index),
            Token::Port(index) => (2, index),
            Token::Lookup(index) => (3, index),
        };
        (u64::try_from(index).unwrap_or(u64::MAX >> 2) << 2) | kind
    }

    pub(crate) fn decode(raw: u64) -> Self {
        let index = usize::try_from(raw >> 2).unwrap_or(usize::MAX);
        match raw & 3 {
            0 => Token::Tcp(index),
            1 => Token::Flow(index),
            2 => Token::Port(index),
            _ => Token::Lookup(index),
        }
    }
}

/// Adds a socket to what its caller waits for.
type Add = dyn Fn(BorrowedFd<'_>, u64) -> io::Result<()> + Send;

/// Who waits for the stack's sockets.
pub(crate) enum Waits {
    /// An epoll instance of the stack's own.
    Own(OwnedFd),
    /// The stack's owner.
    Owner(Box<Add>),
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Waits::Own(_) => "Own",
            Waits::Owner(_) => "Owner",
        })
    }
}

/// How many flows may begin: a bucket that fills at the given rate and holds one second's.
#[derive(Debug)]
struct Rate {
    per_second: Option<u32>,
    left: f64,
    at: Option<Instant>,
}

impl Rate {
    fn take(&mut self, now: Instant) -> bool {
        let Some(rate) = self.per_second.map(f64::from) else { return true };
        let passed = self.at.map_or(1.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.at = Some(now);
        self.left = (self.left + passed * rate).min(rate.max(1.0));
        let enough = self.left >= 1.0;
        if enough {
            self.left -= 1.0;
        }
        enough
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) link: Addresses,
    pub(crate) limits: Limits,
    pub(crate) mtu: usize,
    pub(crate) policy: NetworkPolicy,
    pub(crate) offloads: GuestOffloads,
    pub(crate) pool: Pool,
    pub(crate) names: Names,
    pub(crate) counters: Counters,
    pub(crate) events: Events,
    rate: Rate,
    replies: VecDeque<Vec<u8>>,
    reply_bytes: usize,
    pub(crate) waits: Waits,
    random: RandomState,
    drawn: u64,
}

impl Shared {
    pub(crate) fn new(
        link: Addresses,
        limits: Limits,
        mtu: u16,
        policy: NetworkPolicy,
        epoll: OwnedFd,
    ) -> Self {
        Shared {
            link,
            mtu: usize::from(mtu),
            policy,
            offloads: GuestOffloads::default(),
            pool: Pool::new(limits.buffers),
            names: Names::default(),
            counters: Counters::default(),
            events: Events::default(),
            rate: Rate { per_second: limits.new_flows_per_second, left: 0.0, at: None },
            limits,
            replies: VecDeque::new(),
            reply_bytes: 0,
            waits: Waits::Own(epoll),
            random: RandomState::new(),
            drawn: 0,
        }
    }

    /// Watches a socket for all that may happen to it, telling each thing once.
    pub(crate) fn watch(&self, socket: impl AsFd, token: Token) -> rustix::io::Result<()> {
        match &self.waits {
            Waits::Own(epoll) => epoll::add(epoll, socket, EventData::new_u64(token.encode()), EVENTS),
            Waits::Owner(add) => {
                add(socket.as_fd(), token.encode()).map_err(|error| crate::socket::errno(&error))
            }
        }
    }

    /// A number that nobody can guess: a keyed hash of a counter. It asks the host for nothing.
    pub(crate) fn draw(&mut self) -> u64 {
        self.drawn += 1;
        self.random.hash_one(self.drawn)
    }

    /// The same in 32 bits.
    pub(crate) fn draw_u32(&mut self) -> u32 {
        u32::try_from(self.draw() >> 32).unwrap_or(0)
    }

    /// A frame for the guest, behind those that wait.
    pub(crate) fn reply(&mut self, frame: Vec<u8>) {
        if self.replies.len() >= REPLIES || self.reply_bytes + frame.len() > REPLY_BYTES {
            self.counters.replies_lost += 1;
            return;
        }
        self.reply_bytes += frame.len();
        self.replies.push_back(frame);
    }

    pub(crate) fn next_reply(&mut self) -> Option<Vec<u8>> {
        let frame = self.replies.pop_front()?;
        self.reply_bytes -= frame.len();
        Some(frame)
    }

    pub(crate) fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    pub(crate) fn event(&mut self, event: NetworkEvent) {
        self.events.push(event, &mut self.counters);
    }

    /// Whether the policy lets this be, without a trace.
    pub(crate) fn verdict(
        &self,
        direction: Direction,
        protocol: Protocol,
        peer: SocketAddr,
        port: u16,
    ) -> Verdict {
        let names = self.names.of(peer.ip());
        self.policy.decide(&Flow { direction, protocol, address: peer.ip(), port, names: &names })
    }

    /// Whether a flow may begin. `port` is the one that is called. A refusal is counted and told.
    pub(crate) fn admit(
        &mut self,
        direction: Direction,
        protocol: Protocol,
        peer: SocketAddr,
        port: u16,
        now: Instant,
    ) -> bool {
        let by = match self.verdict(direction, protocol, peer, port) {
            Verdict::Denied(by) => DeniedBy::Policy(by),
            Verdict::Allowed(_) if self.rate.take(now) => return true,
            Verdict::Allowed(_) => DeniedBy::Rate,
        };
        self.deny(direction, protocol, peer, by);
        false
    }

    /// Counts and tells that a flow was refused.
    pub(crate) fn deny(&mut self, direction: Direction, protocol: Protocol, peer: SocketAddr, by: DeniedBy) {
        self.count_denied(by);
        let name = self.name_of(peer.ip());
        self.event(NetworkEvent::Denied { protocol, direction, peer, name, by });
    }

    pub(crate) fn deny_name(&mut self, name: String, by: DeniedBy) {
        self.count_denied(by);
        self.event(NetworkEvent::NameDenied { name, by });
    }

    fn count_denied(&mut self, by: DeniedBy) {
        match by {
            DeniedBy::Policy(By::Rule(_) | By::Base(_)) => self.counters.denied += 1,
            _ => self.counters.limited += 1,
        }
    }

    /// Tells that a flow has begun.
    pub(crate) fn connected(&mut self, direction: Direction, protocol: Protocol, peer: SocketAddr) {
        let name = self.name_of(peer.ip());
        self.event(NetworkEvent::Connected { protocol, direction, peer, name });
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        self.names.of(address).first().map(|name| (*name).to_owned())
    }
}
