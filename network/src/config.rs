//! What a stack is made of: addresses, limits, published ports.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use cubby_network_policy::NetworkPolicy;

use crate::bandwidth::Bandwidth;

/// Who is who on the guest's link. The guest is configured with the same.
///
/// The defaults are out of a block for measurements between networks (RFC 2544), which no network uses, so that nothing
/// a guest may want to reach lies behind its own link; and a unique local prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The guest's, from which alone frames are taken.
    pub guest_mac: [u8; 6],
    /// The stack's.
    pub gateway_mac: [u8; 6],
    /// The guest's IPv4 address.
    pub guest_v4: Ipv4Addr,
    /// The stack's, where the resolver listens too.
    pub gateway_v4: Ipv4Addr,
    /// What leads to the host's `127.0.0.1`.
    pub host_v4: Ipv4Addr,
    /// The length of the link's IPv4 prefix.
    pub prefix_v4: u8,
    /// The guest's IPv6 address, beside its link-local one.
    pub guest_v6: Ipv6Addr,
    /// The stack's, where the resolver listens too.
    pub gateway_v6: Ipv6Addr,
    /// What leads to the host's `::1`.
    pub host_v6: Ipv6Addr,
    /// The length of the link's IPv6 prefix.
    pub prefix_v6: u8,
}

impl Default for Addresses {
    fn default() -> Self {
        let v6 = |host| Ipv6Addr::new(0xfd63, 0x7562, 0x6279, 0, 0, 0, 0, host);
        Addresses {
            guest_mac: [0x02, 0x63, 0x75, 0x62, 0x00, 0x02],
            gateway_mac: [0x02, 0x63, 0x75, 0x62, 0x00, 0x01],
            guest_v4: Ipv4Addr::new(198, 18, 0, 2),
            gateway_v4: Ipv4Addr::new(198, 18, 0, 1),
            host_v4: Ipv4Addr::new(198, 18, 0, 254),
            prefix_v4: 24,
            guest_v6: v6(2),
            gateway_v6: v6(1),
            host_v6: v6(0xfe),
            prefix_v6: 64,
        }
    }
}

impl Addresses {
    /// The guest's address of the same family.
    pub(crate) fn guest(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self.guest_v4.into(),
            IpAddr::V6(_) => self.guest_v6.into(),
        }
    }

    /// The stack's address of the same family.
    pub(crate) fn gateway(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self.gateway_v4.into(),
            IpAddr::V6(_) => self.gateway_v6.into(),
        }
    }

    /// Whether the address is the stack's own.
    pub(crate) fn is_gateway(&self, address: IpAddr) -> bool {
        address == self.gateway(address)
    }

    /// Where a packet to this address goes on the host.
    pub(crate) fn on_host(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(v4) if v4 == self.host_v4 => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(v6) if v6 == self.host_v6 => Ipv6Addr::LOCALHOST.into(),
            other => other.to_canonical(),
        }
    }
}

/// What is carried to a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedPort {
    /// What is carried.
    pub transport: Transport,
    /// Where the host listens; port 0 takes a free one, which [`Stack::published`](crate::Stack::published) tells.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
}

/// What one guest may take of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// TCP connections, each with a descriptor; more are refused.
    pub tcp_connections: usize,
    /// Of these, such as have not been answered yet, by the host or by the guest; more are refused.
    pub half_open: usize,
    /// UDP flows and echo flows, each with a descriptor; the one that was idle for the longest makes room for a new one.
    pub udp_flows: usize,
    /// How long a UDP flow lives without a datagram.
    pub udp_idle: Duration,
    /// New flows of all kinds in a second; more are refused. `None`: as many as come.
    pub new_flows_per_second: Option<u32>,
    /// Bytes of buffers of all connections together. Who would need more waits, or is told to by TCP.
    pub buffers: usize,
    /// Names that are being looked up at once; more are refused.
    pub lookups: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            tcp_connections: 16_384,
            half_open: 1024,
            udp_flows: 1024,
            udp_idle: Duration::from_secs(60),
            new_flows_per_second: None,
            buffers: 64 << 20,
            lookups: 256,
        }
    }
}

/// Where names are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolvers {
    /// Those that this file names (resolv.conf(5)), which is read again when it has changed.
    File(PathBuf),
    /// These.
    Fixed(Vec<SocketAddr>),
}

/// All that a [`Stack`](crate::Stack) is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Who is who on the guest's link.
    pub addresses: Addresses,
    /// The largest IP packet on the link, 1280 to 65,520 bytes: what the guest's interface has. TCP to a guest that takes
    /// segmentation offload goes in 64 KiB whatever this is.
    pub mtu: u16,
    /// Whom the guest may talk to.
    pub policy: NetworkPolicy,
    /// What the guest may take.
    pub limits: Limits,
    /// Ports of the host that lead into the guest.
    pub ports: Vec<PublishedPort>,
    /// Where names are looked up.
    pub resolvers: Resolvers,
    /// How much may pass in a second. After a silence a tenth of a second's worth may pass at once, or 128 KiB if that
    /// is more.
    pub bandwidth: Bandwidth,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            addresses: Addresses::default(),
            mtu: 1500,
            policy: NetworkPolicy::default(),
            limits: Limits::default(),
            ports: Vec::new(),
            resolvers: Resolvers::File("/etc/resolv.conf".into()),
            bandwidth: Bandwidth::default(),
        }
    }
}
