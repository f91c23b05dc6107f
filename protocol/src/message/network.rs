//! What a guest is told of its network.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// What the guest's card, `eth0`, is to be: part of [`super::GuestConfig`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Bytes of the largest packet; what the card says without one.
    pub mtu: Option<u16>,
    /// Its address in IPv4.
    pub ipv4: Option<Subnet<Ipv4Addr>>,
    /// Its address in IPv6; the interface speaks no IPv6 without one.
    pub ipv6: Option<Subnet<Ipv6Addr>>,
}

/// An address, its network, and the way out of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet<A> {
    /// The guest's own.
    pub address: A,
    /// Bits that the addresses of this network have in common.
    pub prefix: u8,
    /// Where everything else goes; nowhere without one. It is in this network.
    pub gateway: Option<A>,
}
