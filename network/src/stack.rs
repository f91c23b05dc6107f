//! The stack as its owner sees it: frames in, frames out, one descriptor to watch, one deadline.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Instant, SystemTime};

use cubby_network_policy::NetworkPolicy;
use rustix::event::epoll::{self, CreateFlags, EventFlags};
use rustix::io::Errno;

use crate::bandwidth::Bucket;
use crate::config::{Config, PublishedPort};
use crate::dns::{Asker, Resolver};
use crate::emit::{self, Ends};
use crate::events::{Counters, NetworkEvent};
use crate::flows::Flows;
use crate::frame::{Frame, GuestOffloads, Offload};
use crate::parse::{Body, Datagram, Packet, Unfit, parse};
use crate::pcap::Pcap;
use crate::ports::Ports;
use crate::shared::{EVENTS, Shared, Token, Waits};
use crate::tcp::{Due, Ready, Table};

/// What one turn takes from the epoll.
const BATCH: usize = 256;

/// A stack could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The host gives no epoll.
    #[error("cannot make an epoll instance for the guest's network")]
    Epoll(#[source] io::Error),
    /// The host does not let us listen on a published port.
    #[error("cannot listen on {address}, which is to be published; choose another port, or 0 for a free one")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The MTU is outside of its limits.
    #[error("an MTU of {given} bytes is not possible, it is 1280 to 65520")]
    Mtu {
        /// What was given.
        given: u16,
    },
}

/// What a frame for the guest is made of, until it is given out.
enum Next {
    Head,
    Tcp(Due),
    Datagram,
}

/// One guest's network.
pub struct Stack {
    shared: Shared,
    tcp: Table,
    flows: Flows,
    ports: Ports,
    dns: Resolver,
    pcap: Option<Pcap>,
    from_guest: Bucket,
    to_guest: Bucket,
    /// Headers of the frame that was given out last.
    head: Vec<u8>,
    /// A frame that has been looked at and not yet given out.
    staged: Option<(Next, Offload)>,
    /// Whose turn it is among those that have frames for the guest.
    flows_first: bool,
}

impl Stack {
    /// Makes a stack and listens on its published ports.
    ///
    /// # Errors
    /// [`StackError`] says what the host refused.
    pub fn new(config: Config, now: Instant) -> Result<Self, StackError> {
        if !(1280..=65_520).contains(&config.mtu) {
            return Err(StackError::Mtu { given: config.mtu });
        }
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|errno| StackError::Epoll(errno.into()))?;
        let shared = Shared::new(config.addresses, config.limits, config.mtu, config.policy, epoll);
        let ports = Ports::listen(&config.ports, &shared)
            .map_err(|(address, source)| StackError::Listen { address, source })?;
        Ok(Stack {
            dns: Resolver::new(config.resolvers, now),
            shared,
            tcp: Table::new(),
            flows: Flows::new(),
            ports,
            pcap: None,
            from_guest: Bucket::new(config.bandwidth.from_guest, now),
            to_guest: Bucket::new(config.bandwidth.to_guest, now),
            head: Vec::new(),
            staged: None,
            flows_first: false,
        })
    }

    /// What the guest's driver can do; until this is called, nothing.
    pub fn set_offloads(&mut self, offloads: GuestOffloads) {
        self.shared.offloads = offloads;
    }

    /// Writes all frames from now on into a record, or ends that.
    pub fn record(&mut self, pcap: Option<Pcap>) {
        self.pcap = pcap;
    }

    /// The published ports, with the addresses that they have got.
    #[must_use]
    pub fn published(&self) -> Vec<PublishedPort> {
        self.ports.published().collect()
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> &NetworkPolicy {
        &self.shared.policy
    }

    /// Puts another policy in force. Connections that it does not allow are reset on both sides, and flows ended, each with an
    /// event that names the rule.
    pub fn set_policy(&mut self, policy: NetworkPolicy, now: Instant) {
        self.shared.policy = policy;
        self.tcp.apply_policy(&mut self.shared);
        self.flows.apply_policy(&mut self.shared);
        self.answer_names(now);
    }

    /// What has been counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        Counters {
            tcp_connections: wide(self.tcp.len()),
            udp_flows: wide(self.flows.len()),
            buffered: wide(self.shared.pool.used()),
            ..self.shared.counters
        }
    }

    /// The oldest event that was not fetched.
    pub fn next_event(&mut self) -> Option<NetworkEvent> {
        self.shared.events.pop()
    }

    /// Whether the guest's [`Bandwidth`](crate::Bandwidth) allows it another frame. If not, [`Stack::next_deadline`] says
    /// when to ask again; what is given all the same is taken, and makes the wait longer.
    pub fn takes_frames(&mut self, now: Instant) -> bool {
        self.from_guest.is_open(now)
    }

    /// Takes a frame from the guest.
    pub fn transmit(&mut self, frame: &[u8], offload: &Offload, now: Instant) {
        if let Some(pcap) = &mut self.pcap {
            pcap.write(&[frame], SystemTime::now());
        }
        self.from_guest.take(frame.len());
        let counters = &mut self.shared.counters;
        counters.frames_in += 1;
        counters.bytes_in += u64::try_from(frame.len()).unwrap_or(u64::MAX);
        match parse(frame, offload, &self.shared.link) {
            Ok(Packet::Arp(request)) => {
                if let Some(reply) = emit::arp_reply(&self.shared.link, &request) {
                    self.shared.reply(reply);
                }
            }
            Ok(Packet::Ip(datagram)) => self.deliver(&datagram, now),
            Err(unfit) => {
                *match unfit {
                    Unfit::Malformed => &mut counters.malformed,
                    Unfit::Checksum => &mut counters.bad_checksum,
                    Unfit::Spoofed => &mut counters.spoofed,
                    Unfit::Fragment => &mut counters.fragments,
                    Unfit::Ignored => &mut counters.ignored,
                } += 1;
            }
        }
    }

    fn deliver(&mut self, datagram: &Datagram<'_>, now: Instant) {
        let (guest, peer, shared) = (datagram.source, datagram.target, &mut self.shared);
        let neighbor = matches!(datagram.body, Body::Neighbor(_));
        if !neighbor && is_for_many(peer, shared) {
            shared.counters.ignored += 1;
            return;
        }
        match &datagram.body {
            Body::Neighbor(asked) => match emit::neighbor_advert(&shared.link, guest, asked) {
                Some(advert) => shared.reply(advert),
                None => shared.counters.ignored += 1,
            },
            Body::Echo { ident, sequence, payload } => {
                if shared.link.is_gateway(peer) {
                    let reply = emit::echo_reply(&shared.link, (guest, peer), *ident, *sequence, payload);
                    shared.reply(reply);
                } else if guest == shared.link.guest(guest) || is_on_link(peer) {
                    let which = (*ident, *sequence);
                    self.flows.echo((guest, peer), which, payload, datagram.bytes, shared, now);
                } else {
                    shared.counters.ignored += 1;
                }
            }
            Body::Udp { source, target: 53, payload } if shared.link.is_gateway(peer) => {
                let ends = Ends { guest: (guest, *source), peer: (peer, 53) };
                self.dns.ask(Asker::Udp(ends), payload, shared, now);
                self.answer_names(now);
            }
            Body::Udp { source, target, payload } => {
                let ends = Ends { guest: (guest, *source), peer: (peer, *target) };
                self.flows.send(ends, payload, datagram.bytes, shared, now);
            }
            Body::Tcp { source, target, segment } => {
                let ends = Ends { guest: (guest, *source), peer: (peer, *target) };
                self.tcp.on_segment(ends, segment, datagram.bytes, shared, now);
                self.answer_names(now);
            }
        }
    }

    /// Moves messages between the resolver and those who ask by TCP, and gives out its answers.
    fn answer_names(&mut self, now: Instant) {
        loop {
            for asked in self.tcp.asked() {
                let asker = Asker::Tcp { id: asked.id, serial: asked.serial };
                self.dns.ask(asker, &asked.message, &mut self.shared, now);
            }
            let answers = self.dns.answers();
            if answers.is_empty() {
                break;
            }
            for (asker, message) in answers {
                match asker {
                    Asker::Udp(ends) => {
                        let frame = emit::udp_frame(&self.shared.link, ends, &message);
                        self.shared.reply(frame);
                    }
                    Asker::Tcp { id, serial } => {
                        self.tcp.answer(id, serial, &message, &mut self.shared);
                    }
                }
            }
        }
    }

    /// Whether [`Stack::receive`] may have a frame.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        self.staged.is_some() || self.shared.has_replies() || self.tcp.is_due() || self.flows.is_due()
    }

    /// How long the next frame for the guest is, in bytes, if there is one. Until [`Stack::receive`] it stays the next, whatever
    /// else is called; only that connections and flows may end, and their frames with them.
    pub fn next_len(&mut self, now: Instant) -> Option<usize> {
        loop {
            let next = match self.staged.take() {
                Some(next) => next,
                None if !self.to_guest.is_open(now) => return None,
                None => self.next_frame(now)?,
            };
            let payload = self.payload(&next.0).map(|(first, second)| first.len() + second.len());
            if let Some(payload) = payload {
                self.staged = Some(next);
                return Some(self.head.len() + payload);
            }
        }
    }

    /// The next frame for the guest. It is to be called when the guest has a buffer for it: what is given out is gone, and what is
    /// not asked for stays in the host's sockets.
    pub fn receive(&mut self, now: Instant) -> Option<Frame<'_>> {
        let len = self.next_len(now)?;
        self.to_guest.take(len);
        self.shared.counters.frames_out += 1;
        self.shared.counters.bytes_out += u64::try_from(len).unwrap_or(u64::MAX);
        let (next, offload) = self.staged.take()?;
        if let Some(mut pcap) = self.pcap.take() {
            if let Some((first, second)) = self.payload(&next) {
                pcap.write(&[&self.head, first, second], SystemTime::now());
            }
            self.pcap = Some(pcap);
        }
        Some(Frame::new(&self.head, self.payload(&next)?, offload))
    }

    /// What comes behind the headers; `None` if it is gone.
    fn payload(&self, next: &Next) -> Option<(&[u8], &[u8])> {
        match next {
            Next::Head => Some((&[], &[])),
            Next::Tcp(due) => self.tcp.payload(due),
            Next::Datagram => Some((self.flows.payload(), &[])),
        }
    }

    fn next_frame(&mut self, now: Instant) -> Option<(Next, Offload)> {
        loop {
            if let Some(reply) = self.shared.next_reply() {
                self.head = reply;
                return Some((Next::Head, Offload::default()));
            }
            self.flows_first = !self.flows_first;
            for flows in [self.flows_first, !self.flows_first] {
                if flows {
                    if let Some(offload) = self.flows.next_datagram(&mut self.head, &mut self.shared, now) {
                        return Some((Next::Datagram, offload));
                    }
                } else if let Some(due) = self.tcp.next_segment(&mut self.head, &mut self.shared, now) {
                    let offload = due.offload;
                    return Some((Next::Tcp(due), offload));
                }
            }
            // Who had no segment or datagram may have left a reply: a reset, or an error.
            if !self.shared.has_replies() {
                return None;
            }
        }
    }

    /// What [`Stack::watch_by`] is to wait for, as `epoll_ctl(2)` takes it: everything, and each thing once.
    pub const EVENTS: u32 = EVENTS.bits();

    /// Has somebody else wait for the stack's sockets from now on, which saves its owner to look twice for each event: `add` gets
    /// each socket with a token below 2^62, and adds both for [`Stack::EVENTS`] to the epoll instance that it has.
    /// Whatever that tells goes to [`Stack::on_event`]; a socket that is closed is forgotten by itself. To be called before
    /// there are connections.
    ///
    /// # Errors
    /// What `add` says of the published ports' sockets.
    pub fn watch_by(
        &mut self,
        add: impl Fn(BorrowedFd<'_>, u64) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        // The stack's own instance is closed, and forgets them.
        self.shared.waits = Waits::Owner(Box::new(add));
        self.ports.watch(&self.shared)
    }

    /// Takes what has happened to one of the stack's sockets: the token that it was added with, and what `epoll_wait(2)` says.
    pub fn on_event(&mut self, token: u64, events: u32, now: Instant) {
        match self.happened(token, EventFlags::from_bits_retain(events), now) {
            Token::Port(_) => self.ports.take(&mut self.tcp, &mut self.flows, &mut self.shared, now),
            Token::Lookup(_) => self.answer_names(now),
            Token::Tcp(_) | Token::Flow(_) => {}
        }
    }

    fn happened(&mut self, token: u64, flags: EventFlags, now: Instant) -> Token {
        let hung_up = flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
        let ready = Ready {
            readable: flags.contains(EventFlags::IN) || hung_up,
            writable: flags.contains(EventFlags::OUT),
            hung_up,
            failed: flags.intersects(EventFlags::ERR | EventFlags::HUP),
        };
        let token = Token::decode(token);
        match token {
            Token::Tcp(id) => self.tcp.on_ready(id, ready, &mut self.shared),
            Token::Flow(id) => self.flows.on_ready(id, ready.failed, &mut self.shared),
            Token::Port(index) => self.ports.on_ready(index, now),
            Token::Lookup(id) => self.dns.on_ready(id, &mut self.shared, now),
        }
        token
    }

    /// Takes what has happened to the stack's sockets, if it waits for them itself: to be called when its descriptor is
    /// readable. A turn is bounded; the descriptor stays readable if there is more.
    ///
    /// # Errors
    /// Those of `epoll_wait`, which a working host does not give.
    pub fn on_ready(&mut self, now: Instant) -> io::Result<()> {
        let Waits::Own(epoll) = &self.shared.waits else { return Ok(()) };
        let mut room = [const { MaybeUninit::uninit() }; BATCH];
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let events = match epoll::wait(epoll, &mut room, Some(&zero)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => &mut [],
            Err(errno) => return Err(errno.into()),
        };
        for event in events {
            self.happened(event.data.u64(), event.flags, now);
        }
        self.ports.take(&mut self.tcp, &mut self.flows, &mut self.shared, now);
        self.answer_names(now);
        Ok(())
    }

    /// The guest is gone, and nothing else is called any more: connections whose end it has said are closed, and all others
    /// reset. A stack that is only dropped closes all of them, as if all had been said.
    pub fn end(&mut self) {
        self.tcp.end();
    }

    /// The descriptor to watch for reading (level-triggered): an epoll instance with all sockets of the stack in it. `None`
    /// after [`Stack::watch_by`].
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.shared.waits {
            Waits::Own(epoll) => Some(epoll.as_fd()),
            Waits::Owner(_) => None,
        }
    }

    /// When [`Stack::on_time`] is to be called; it changes with every other call. A time that has passed means at
    /// once.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let (up, down) = (self.from_guest.awaited(), self.to_guest.awaited());
        [self.tcp.deadline(), self.flows.deadline(), self.dns.deadline(), self.ports.deadline(), up, down]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what its time has come for. Calling it early does no harm.
    pub fn on_time(&mut self, now: Instant) {
        self.from_guest.on_time(now);
        self.to_guest.on_time(now);
        self.tcp.on_time(&mut self.shared, now);
        self.flows.on_time(&self.shared, now);
        self.dns.on_time(&mut self.shared, now);
        if self.ports.deadline().is_some() {
            self.ports.take(&mut self.tcp, &mut self.flows, &mut self.shared, now);
        }
        self.answer_names(now);
    }
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

// Whoever drives it may run on a thread of its own.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Stack>();
};

/// Whether an address is of a link alone, which no packet leaves.
fn is_on_link(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Whether an address stands for many: there is nobody else on this link, and no way out of it for these.
fn is_for_many(address: IpAddr, shared: &Shared) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let host = u32::MAX.checked_shr(u32::from(shared.link.prefix_v4)).unwrap_or(0);
            let broadcast = shared.link.guest_v4.to_bits() | host;
            v4.is_multicast() || v4.is_broadcast() || v4.is_unspecified() || v4.to_bits() == broadcast
        }
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unspecified(),
    }
}
