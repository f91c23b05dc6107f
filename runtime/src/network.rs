//! The guest's network: the stack of `cubby-network` behind the VM's card, and the guest told the same addresses.
//!
//! Both work on the card's thread, `net0`: a frame goes from the ring through the stack into a socket of the host, and
//! back, without changing threads. Its bytes are copied once out of guest memory, since the guest may change them under
//! the stack's hands, and once into it.
//!
//! Time stands still for the stack while its guest is paused: nothing expires that the guest could not keep alive.

use std::io;
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use cubby_network::{
    Addresses, Gso, GsoKind, GuestOffloads, Limits, NetworkEvent, PartialChecksum, PublishedPort, Resolvers,
    Stack, StackError,
};
use cubby_protocol::message::{self, Subnet};
use cubby_state::{Port, SandboxConfig, Transport};
use cubby_vmm::devices::Slice;
use cubby_vmm::devices::net::{
    Backend, Checksum, Frame, MAX_FRAME, Mac, Mtu, Offload, Offloads, Segmentation, Segments, Sent,
};
use cubby_vmm::{NetBackend, Watch};
use vmm_sys_util::epoll::EventSet;

use crate::chain;

/// The file that names the host's resolvers.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The token of the stack's one descriptor.
const SOCKETS: u64 = 0;

/// What both sides leave to each other. Datagrams in bundles are nothing that the stack knows.
const OFFLOADS: Offloads = Offloads { checksum: true, tcp4: true, tcp6: true, udp: false };

/// How many refusals are written to the sandbox's log, which has no bound of its own.
const TOLD: u32 = 100;

/// Descriptors of the stack that are no flow's: its epoll instance, a spare one, the file that names resolvers.
const OWN: u64 = 3;

/// A network that could not be made.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) message: String,
    /// The published port that the host does not give, if that is why.
    pub(crate) port: Option<std::net::SocketAddr>,
}

/// The card of the sandbox's VM, and its published ports with what they have got. They are listened on from now on.
pub(crate) fn plug_in(
    config: &SandboxConfig,
    descriptors: u64,
) -> Result<(cubby_vmm::Network, Vec<Port>), Failed> {
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
        },
        Instant::now(),
    );
    let stack = stack.map_err(|error| match error {
        StackError::Listen { address, source } => Failed {
            message: format!("{source}; choose another port, or 0 for a free one"),
            port: Some(address),
        },
        error => Failed { message: chain(&error), port: None },
    })?;
    // They come back in the order in which they went.
    let got = stack.published();
    let ports =
        config.ports.iter().zip(got).map(|(port, got)| Port { host: got.host.port(), ..*port }).collect();
    let backend = Box::new(Plug { stack, frame: vec![0; MAX_FRAME], paused: Duration::ZERO, told: 0 });
    Ok((cubby_vmm::Network { mac, mtu, backend }, ports))
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
}

impl Plug {
    /// The stack's time.
    fn now(&self) -> Instant {
        let now = Instant::now();
        now.checked_sub(self.paused).unwrap_or(now)
    }

    fn tell(&mut self, event: &NetworkEvent) {
        let what = match event {
            NetworkEvent::Connected { .. } => return,
            NetworkEvent::Denied { protocol, direction, peer, name, by } => {
                let name = name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
                let what = format!("{direction:?} {protocol:?}").to_lowercase();
                format!("{what} {peer}{name}: {}", self.by(*by))
            }
            NetworkEvent::NameDenied { name, by } => format!("looking up {name}: {}", self.by(*by)),
            NetworkEvent::AnswerDropped { name, address } => {
                format!("{name} as {address}: the guest may not talk to that address")
            }
        };
        self.told += 1;
        let last = if self.told == TOLD { "; what else is refused is not written here" } else { "" };
        crate::say(format_args!("network: refused {}{last}", what.escape_debug()));
    }

    fn by(&self, by: cubby_network::DeniedBy) -> String {
        match by {
            cubby_network::DeniedBy::Policy(by) => self.stack.policy().explain(by),
            limit => format!("too many ({limit:?})"),
        }
    }
}

impl NetBackend for Plug {
    fn attach(&mut self, watch: Watch) -> io::Result<()> {
        watch.add(&self.stack.as_fd(), SOCKETS, EventSet::IN)
    }

    fn ready(&mut self, _: u64, _: EventSet) {
        let now = self.now();
        // What is left is there in the next round, as is what `epoll_wait` has against this one.
        let _ = self.stack.on_ready(now);
    }

    fn deadline(&self) -> Option<Instant> {
        self.stack.next_deadline().map(|deadline| deadline + self.paused)
    }

    fn elapsed(&mut self) {
        let now = self.now();
        self.stack.on_time(now);
    }

    fn paused_for(&mut self, time: Duration) {
        self.paused += time;
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
        let now = self.now();
        let copied = frame.copy_to(&mut self.frame);
        if let Some(bytes) = self.frame.get(..copied.min(frame.len)) {
            self.stack.transmit(bytes, &from_guest(frame.offload), now);
        }
        Sent::Taken
    }

    fn settle(&mut self) {
        while let Some(event) = self.stack.next_event() {
            if self.told < TOLD {
                self.tell(&event);
            }
        }
    }

    fn pending(&mut self) -> Option<usize> {
        let now = self.now();
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
        let (network, ports) = plug_in(&config, 1000).unwrap();
        assert!(ports.iter().all(|port| port.host != 0));
        config.ports = vec![ports[0]];
        let failed = plug_in(&config, 1000).map(drop).unwrap_err();
        assert_eq!(failed.port, Some(ports[0].listens_on()), "{failed:?}");
        drop(network);
        assert_eq!(plug_in(&config, 1000).unwrap().1, config.ports);
    }
}
