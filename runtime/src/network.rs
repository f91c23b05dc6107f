//! The guest's network: the stack of `cubby-network` behind the VM's card, and the guest told the same addresses.
//!
//! Both work on the card's thread, `net0`: a frame goes from the ring through the stack into a socket of the host, and
//! back, without changing threads. Its bytes are copied once out of guest memory, since the guest may change them under
//! the stack's hands, and once into it.
//!
//! Time stands still for the stack while its guest is paused: nothing expires that the guest could not keep alive.

mod capture;
mod exchange;

use std::io;
use std::num::{NonZeroU16, NonZeroU64};
use std::time::{Duration, Instant};

use cubby_network::policy::{By, Direction, Protocol};
use cubby_network::{
    Addresses, Bandwidth, DeniedBy, Gso, GsoKind, GuestOffloads, Limits, NetworkEvent, PartialChecksum,
    PublishedPort, Resolvers, Stack, StackError,
};
use cubby_protocol::message::{self, DroppedFrames, NetworkEventKind, NetworkFlow, Subnet};
use cubby_state::{Port, SandboxConfig, Transport};
use cubby_vmm::devices::Slice;
use cubby_vmm::devices::net::{
    self, Backend, Checksum, Frame, MAX_FRAME, Mac, Mtu, Offload, Offloads, Segmentation, Segments, Sent,
};
use cubby_vmm::{NetBackend, Watch};
use vmm_sys_util::epoll::EventSet;

use crate::{chain, machine};

pub(crate) use exchange::{Exchange, Ticket};

/// The file that names the host's resolvers.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The token of the descriptor that says that there are other rules: all others are of the stack's sockets.
const ORDER: u64 = Watch::MAX_TOKEN;

/// What both sides leave to each other. Datagrams in bundles are nothing that the stack knows.
const OFFLOADS: Offloads = Offloads { checksum: true, tcp4: true, tcp6: true, udp: false };

/// How many refusals are written to the sandbox's log, which has no bound of its own.
const TOLD: u32 = 100;

/// Descriptors of the stack that are no flow's: its epoll instance until it is plugged in, a spare one, the file that names resolvers.
const OWN: u64 = 3;

/// A network that could not be made.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) message: String,
    /// The published port that the host does not give, if that is why.
    pub(crate) port: Option<std::net::SocketAddr>,
}

/// A network that was made.
pub(crate) struct Plugged {
    /// The card of the sandbox's VM.
    pub(crate) network: cubby_vmm::Network,
    /// The main thread's end.
    pub(crate) exchange: Exchange,
    /// The published ports, with what they have got. They are listened on from now on.
    pub(crate) ports: Vec<Port>,
}

/// Makes the sandbox's network.
pub(crate) fn plug_in(config: &SandboxConfig, descriptors: u64) -> Result<Plugged, Failed> {
    let exchange = Exchange::new().map_err(|error| Failed { message: chain(&error), port: None })?;
    let addresses = Addresses::default();
    let mac =
        Mac::try_from(addresses.guest_mac).map_err(|error| Failed { message: chain(&error), port: None })?;
    let mtu = Mtu::default();
    let resolvers = match config.resolvers.as_slice() {
        [] => Resolvers::File(RESOLV_CONF.into()),
        named => Resolvers::Fixed(named.into()),
    };
    let stack = Stack::new(
        cubby_network::Config {
            addresses,
            mtu: mtu.get(),
            policy: config.network.clone(),
            limits: limits(descriptors.saturating_sub(OWN + count(config.ports.len()))),
            ports: config.ports.iter().map(published).collect(),
            resolvers,
            bandwidth: bandwidth(config.bandwidth),
        },
        Instant::now(),
    );
    let mut stack = stack.map_err(|error| match error {
        StackError::Listen { address, source } => Failed {
            message: format!("{source}; choose another port, or 0 for a free one"),
            port: Some(address),
        },
        error => Failed { message: chain(&error), port: None },
    })?;
    if let Some(path) = &config.capture {
        let pcap = capture::begin(path).map_err(|error| Failed {
            message: format!("the capture {} cannot be written: {error}", path.display()),
            port: None,
        })?;
        stack.record(Some(pcap));
    }
    // They come back in the order in which they went.
    let got = stack.published();
    let ports =
        config.ports.iter().zip(got).map(|(port, got)| Port { host: got.host.port(), ..*port }).collect();
    let backend = Box::new(Plug {
        stack,
        frame: vec![0; MAX_FRAME],
        paused: Duration::ZERO,
        told: 0,
        exchange: exchange.clone(),
        rules: 0,
        events_lost: 0,
    });
    Ok(Plugged { network: cubby_vmm::Network { mac, mtu, backend }, exchange, ports })
}

/// The descriptors that a network with these ports takes at most.
pub(crate) fn descriptors(config: &SandboxConfig) -> u64 {
    let Limits { tcp_connections, udp_flows, lookups, .. } = Limits::default();
    count(tcp_connections + udp_flows + lookups + config.ports.len()) + OWN
}

/// What may be held with so many descriptors: a guest must not be able to take those that clients need.
fn limits(descriptors: u64) -> Limits {
    let all = Limits::default();
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let lookups = all.lookups.min(descriptors / 8);
    let udp_flows = all.udp_flows.min(descriptors / 4);
    let tcp_connections = all.tcp_connections.min(descriptors - lookups - udp_flows);
    Limits { lookups, udp_flows, tcp_connections, half_open: all.half_open.min(tcp_connections), ..all }
}

/// The network counts in bytes.
fn bandwidth(bandwidth: cubby_state::Bandwidth) -> Bandwidth {
    let bytes = |bits: Option<u64>| bits.and_then(|bits| NonZeroU64::new(bits / 8));
    Bandwidth { from_guest: bytes(bandwidth.upload), to_guest: bytes(bandwidth.download) }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn published(port: &Port) -> PublishedPort {
    PublishedPort {
        transport: match port.transport {
            Transport::Tcp => cubby_network::Transport::Tcp,
            Transport::Udp => cubby_network::Transport::Udp,
        },
        host: port.listens_on(),
        guest: port.guest,
    }
}

/// What the guest is told of its card.
pub(crate) fn addresses() -> message::Network {
    let Addresses { guest_v4, gateway_v4, prefix_v4, guest_v6, gateway_v6, prefix_v6, .. } =
        Addresses::default();
    message::Network {
        // The card says.
        mtu: None,
        ipv4: Some(Subnet { address: guest_v4, prefix: prefix_v4, gateway: Some(gateway_v4) }),
        ipv6: Some(Subnet { address: guest_v6, prefix: prefix_v6, gateway: Some(gateway_v6) }),
    }
}

/// Who answers the guest's questions for names.
pub(crate) fn resolver() -> String {
    Addresses::default().gateway_v4.to_string()
}

/// The stack, as the card has it.
struct Plug {
    stack: Stack,
    /// A frame of the guest's, out of its reach.
    frame: Vec<u8>,
    /// For how long the guest was paused in all.
    paused: Duration,
    /// Refusals that were written to the log.
    told: u32,
    /// The main thread.
    exchange: Exchange,
    /// The newest rules that were taken.
    rules: Ticket,
    /// Events that the stack has lost, as far as they were told of.
    events_lost: u64,
}

impl Plug {
    /// The stack's time.
    fn now(&self) -> Instant {
        let now = Instant::now();
        now.checked_sub(self.paused).unwrap_or(now)
    }

    /// Before anything is done: puts other rules in force, if there are some. Returns the stack's time.
    fn obey(&mut self) -> Instant {
        let now = self.now();
        if let Some(policy) = self.exchange.rules(&mut self.rules) {
            // What was refused before is explained by the rules that have refused it.
            self.tell_all();
            self.stack.set_policy(policy, now);
        }
        now
    }

    /// Tells of all that has happened.
    fn tell_all(&mut self) {
        let all = self.stack.counters().events_lost;
        let mut lost = all - std::mem::replace(&mut self.events_lost, all);
        while let Some(event) = self.stack.next_event() {
            let listening = self.exchange.is_listening();
            if !listening && self.told >= TOLD {
                continue;
            }
            let event = self.tellable(event);
            if self.told < TOLD {
                self.log(&event);
            }
            if listening {
                self.exchange.tell(event, machine::realtime_ns(), std::mem::take(&mut lost));
            }
        }
    }

    /// Writes to the sandbox's log what was refused.
    fn log(&mut self, event: &NetworkEventKind) {
        let what = match event {
            NetworkEventKind::Connected(_) => return,
            NetworkEventKind::Denied(NetworkFlow { protocol, inbound, peer, name }, by) => {
                let name = name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
                let direction = if *inbound { "inbound" } else { "outbound" };
                format!("{direction} {} {peer}{name}: {}", format!("{protocol:?}").to_lowercase(), by.why)
            }
            NetworkEventKind::NameDenied(name, by) => format!("looking up {name}: {}", by.why),
            NetworkEventKind::AnswerDropped(name, address) => {
                format!("{name} as {address}: the guest may not talk to that address")
            }
        };
        self.told += 1;
        let last = if self.told == TOLD { "; what else is refused is not written here" } else { "" };
        crate::say(format_args!("network: refused {}{last}", what.escape_debug()));
    }

    /// An event as others are told of it.
    fn tellable(&self, event: NetworkEvent) -> NetworkEventKind {
        match event {
            NetworkEvent::Connected { protocol, direction, peer, name } => {
                NetworkEventKind::Connected(flow(protocol, direction, peer, name))
            }
            NetworkEvent::Denied { protocol, direction, peer, name, by } => {
                NetworkEventKind::Denied(flow(protocol, direction, peer, name), self.by(by))
            }
            NetworkEvent::NameDenied { name, by } => NetworkEventKind::NameDenied(name, self.by(by)),
            NetworkEvent::AnswerDropped { name, address } => NetworkEventKind::AnswerDropped(name, address),
        }
    }

    fn by(&self, by: DeniedBy) -> message::DeniedBy {
        let limit = |what: &str| format!("too many {what}");
        let rule = match by {
            DeniedBy::Policy(By::Rule(index)) => u32::try_from(index).ok(),
            _ => None,
        };
        let why = match by {
            DeniedBy::Policy(by) => self.stack.policy().explain(by),
            DeniedBy::Connections => limit("connections"),
            DeniedBy::HalfOpen => limit("connections that nobody has answered yet"),
            DeniedBy::Rate => limit("new connections in a second"),
            DeniedBy::Lookups => limit("names that are being looked up"),
        };
        message::DeniedBy { rule, why }
    }
}

fn flow(
    protocol: Protocol,
    direction: Direction,
    peer: std::net::SocketAddr,
    name: Option<String>,
) -> NetworkFlow {
    let protocol = match protocol {
        Protocol::Tcp => message::FlowProtocol::Tcp,
        Protocol::Udp => message::FlowProtocol::Udp,
        Protocol::Icmp => message::FlowProtocol::Icmp,
    };
    NetworkFlow { protocol, inbound: direction == Direction::Inbound, peer, name }
}

/// What went through a network, by the counts of its stack and of its card.
pub(crate) fn counters(exchange: &Exchange, card: &net::Counters) -> message::NetworkCounters {
    let stack = exchange.counters();
    let net::Refused { length, checksum, segmentation, room, link_down } = card.transmit_refused;
    message::NetworkCounters {
        sent_frames: card.transmitted.frames,
        sent_bytes: card.transmitted.bytes,
        received_frames: card.received.frames,
        received_bytes: card.received.bytes,
        dropped: DroppedFrames {
            refused: length + checksum + segmentation + room + link_down,
            malformed: stack.malformed,
            checksum: stack.bad_checksum,
            spoofed: stack.spoofed,
            fragments: stack.fragments,
            ignored: stack.ignored,
        },
        tcp_opened: stack.tcp_opened,
        tcp_open: stack.tcp_connections,
        tcp_failed: stack.tcp_failed,
        udp_opened: stack.udp_opened,
        udp_open: stack.udp_flows,
        udp_dropped: stack.udp_dropped,
        lookups: stack.lookups,
        denied: stack.denied,
        limited: stack.limited,
        replies_lost: stack.replies_lost,
    }
}

impl NetBackend for Plug {
    fn attach(&mut self, watch: Watch) -> io::Result<()> {
        watch.add(self.exchange.order(), ORDER, EventSet::IN)?;
        let events = EventSet::from_bits_truncate(Stack::EVENTS);
        self.stack.watch_by(move |socket, token| watch.add(&socket, token, events))
    }

    fn ready(&mut self, token: u64, events: EventSet) {
        let now = self.obey();
        if token == ORDER {
            self.exchange.heard();
            return;
        }
        self.stack.on_event(token, events.bits(), now);
    }

    fn deadline(&self) -> Option<Instant> {
        self.stack.next_deadline().map(|deadline| deadline + self.paused)
    }

    fn elapsed(&mut self) {
        let now = self.obey();
        self.stack.on_time(now);
    }

    fn paused_for(&mut self, time: Duration) {
        self.paused += time;
    }

    fn ended(&mut self) {
        self.stack.end();
    }
}

impl Backend for Plug {
    fn takes(&self) -> Offloads {
        OFFLOADS
    }

    fn gives(&self) -> Offloads {
        OFFLOADS
    }

    fn negotiated(&mut self, accepted: Offloads) {
        let Offloads { checksum, tcp4: tso4, tcp6: tso6, .. } = accepted;
        self.stack.set_offloads(GuestOffloads { checksum, tso4, tso6 });
    }

    fn transmit(&mut self, frame: Frame<'_>) -> Sent {
        let now = self.obey();
        if !self.stack.takes_frames(now) {
            return Sent::Full;
        }
        let copied = frame.copy_to(&mut self.frame);
        if let Some(bytes) = self.frame.get(..copied.min(frame.len)) {
            self.stack.transmit(bytes, &from_guest(frame.offload), now);
        }
        Sent::Taken
    }

    fn settle(&mut self) {
        self.tell_all();
        self.exchange.count(self.stack.counters());
        self.exchange.now_in_force(self.rules);
    }

    fn pending(&mut self) -> Option<usize> {
        let now = self.obey();
        self.stack.next_len(now)
    }

    fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)> {
        let now = self.now();
        let frame = self.stack.receive(now)?;
        scatter(frame.pieces(), to);
        Some((frame.len(), to_guest(&frame.offload)))
    }

    fn discard(&mut self) {
        let now = self.now();
        let _ = self.stack.receive(now);
    }
}

/// Writes pieces of bytes one after another to the front of slices.
fn scatter(pieces: [&[u8]; 3], to: &[Slice<'_>]) {
    let mut slices = to.iter().copied();
    let mut slice = slices.next();
    for mut piece in pieces {
        while let (false, Some(room)) = (piece.is_empty(), slice) {
            let (now, later) = piece.split_at(piece.len().min(room.len()));
            room.copy_from(now);
            piece = later;
            slice = room.offset(now.len()).ok().filter(|rest| !rest.is_empty()).or_else(|| slices.next());
        }
    }
}

fn from_guest(offload: Offload) -> cubby_network::Offload {
    let gso = offload.segmentation.and_then(|cut| {
        let kind = match cut.segments {
            Segments::Tcp4 => GsoKind::Tcp4,
            Segments::Tcp6 => GsoKind::Tcp6,
            Segments::Udp => return None,
        };
        Some(Gso { kind, headers: cut.headers, segment: cut.size.get() })
    });
    let checksum = match offload.checksum {
        Checksum::Partial { start, offset } => Some(PartialChecksum { start, offset }),
        Checksum::Complete | Checksum::Verified => None,
    };
    cubby_network::Offload { checksum, gso }
}

fn to_guest(offload: &cubby_network::Offload) -> Offload {
    let segmentation = offload.gso.and_then(|gso| {
        let segments = match gso.kind {
            GsoKind::Tcp4 => Segments::Tcp4,
            GsoKind::Tcp6 => Segments::Tcp6,
        };
        Some(Segmentation { segments, size: NonZeroU16::new(gso.segment)?, headers: gso.headers })
    });
    let checksum = match offload.checksum {
        Some(PartialChecksum { start, offset }) => Checksum::Partial { start, offset },
        None => Checksum::Complete,
    };
    Offload { checksum, segmentation }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_scattered_over_slices_whatever_their_sizes() {
        let pieces: [&[u8]; 3] = [b"head", b"", b"payload"];
        for sizes in [vec![11], vec![20], vec![1; 11], vec![4, 7], vec![3, 0, 5, 9], vec![0, 11]] {
            let mut memory: Vec<Vec<u8>> = sizes.iter().map(|size| vec![b'.'; *size]).collect();
            let slices: Vec<_> = memory.iter_mut().map(|bytes| Slice::from(bytes.as_mut_slice())).collect();
            scatter(pieces, &slices);
            let whole = memory.concat();
            assert_eq!(&whole[..11], b"headpayload", "{sizes:?}");
            assert!(whole[11..].iter().all(|byte| *byte == b'.'), "{sizes:?}");
        }
    }

    #[test]
    fn offloads_are_the_same_on_both_sides() {
        let size = NonZeroU16::new(1448).unwrap();
        for segments in [Segments::Tcp4, Segments::Tcp6] {
            let offload = Offload {
                checksum: Checksum::Partial { start: 34, offset: 16 },
                segmentation: Some(Segmentation { segments, size, headers: 66 }),
            };
            assert_eq!(to_guest(&from_guest(offload)), offload);
        }
        assert_eq!(to_guest(&from_guest(Offload::default())), Offload::default());
    }

    #[test]
    fn a_network_never_takes_more_descriptors_than_it_may() {
        let config = SandboxConfig::new("x");
        assert_eq!(limits(descriptors(&config) - OWN), Limits::default());
        for descriptors in [0, 1, 7, 8, 100, 1000, 20_000, u64::MAX] {
            let limits = limits(descriptors);
            let all = limits.tcp_connections + limits.udp_flows + limits.lookups;
            assert!(count(all) <= descriptors, "{limits:?}");
            assert!(limits.half_open <= limits.tcp_connections);
        }
        assert!(limits(100).tcp_connections > 50);
    }

    #[test]
    fn a_port_that_is_taken_is_named_and_a_free_one_is_found() {
        let mut config = SandboxConfig::new("x");
        config.ports = vec![Port::new(0, 80), Port::new(0, 53).udp()];
        let Plugged { network, ports, .. } = plug_in(&config, 1000).unwrap();
        assert!(ports.iter().all(|port| port.host != 0));
        config.ports = vec![ports[0]];
        let failed = plug_in(&config, 1000).map(drop).unwrap_err();
        assert_eq!(failed.port, Some(ports[0].listens_on()), "{failed:?}");
        drop(network);
        assert_eq!(plug_in(&config, 1000).unwrap().ports, config.ports);
    }
}
