//! The guest's interfaces: loopback, and the card as the host says. Nothing here waits: addresses are known, IPv6 does
//! not look for others that have them (RFC 4862 §5.4), and no router is asked for (the host is the router).

use std::net::{IpAddr, Ipv6Addr};

use cubby_protocol::message::{Network, Subnet};
use rustix::fs::{Mode, OFlags};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::rtnetlink::Orders;
use super::{SetupError, at};

/// The card's name, the first that the kernel gives.
const CARD: &str = "eth0";
/// The index of a network namespace's loopback interface, always.
const LOOPBACK: u32 = 1;

/// Types of orders, and attributes (linux/rtnetlink.h, if_link.h, if_addr.h).
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const LINK_MTU: u16 = 4;
const LINK_FAMILIES: u16 = 26;
const INET6_ADDRESSES: u16 = 8;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const ROUTE_DEVICE: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

const UP: u32 = 1;
/// `IFA_F_NODAD`, `IFA_F_PERMANENT`.
const SETTLED: u8 = 0x82;
const SCOPE_GLOBAL: u8 = 0;
const SCOPE_LINK: u8 = 253;

/// Brings loopback up, and the card if there is one.
pub fn set_up(network: Option<&Network>) -> Result<(), SetupError> {
    let mut orders = Orders::default();
    up(&mut orders, "lo", LOOPBACK);
    if let Some(network) = network {
        let index = card()?;
        card_orders(&mut orders, index, network);
        if network.ipv6.is_some() {
            no_routers()?;
        }
    }
    orders.carry_out()
}

fn card() -> Result<u32, SetupError> {
    socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .and_then(|socket| name_to_index(socket, CARD))
        .map_err(at(CARD))
}

/// The kernel would ask for a router three times, seconds after it has got its address.
fn no_routers() -> Result<(), SetupError> {
    let path = c"/proc/sys/net/ipv6/conf/eth0/accept_ra";
    rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::write(file, b"0"))
        .map(drop)
        .map_err(at(path))
}

fn card_orders(orders: &mut Orders, index: u32, network: &Network) {
    let link = orders.change("eth0", NEW_LINK, &link(index, 0));
    // The kernel makes no addresses of its own (`IN6_ADDR_GEN_MODE_NONE`): it would look for others that have them.
    let mode = nested(INET6_ADDRESSES, &[1]);
    let link = link.with(LINK_FAMILIES, &nested(family(&Ipv6Addr::UNSPECIFIED.into()).into(), &mode));
    if let Some(mtu) = network.mtu {
        link.with(LINK_MTU, &u32::from(mtu).to_ne_bytes());
    }
    up(orders, "eth0 up", index);
    if let Some(subnet) = network.ipv4 {
        address(orders, "the IPv4 address", index, subnet.address.into(), subnet.prefix, SCOPE_GLOBAL);
        route(orders, "the IPv4 gateway", index, subnet);
    }
    if let Some(subnet) = network.ipv6 {
        let local = link_local(subnet.address).into();
        address(orders, "the IPv6 link-local address", index, local, 64, SCOPE_LINK);
        address(orders, "the IPv6 address", index, subnet.address.into(), subnet.prefix, SCOPE_GLOBAL);
        route(orders, "the IPv6 gateway", index, subnet);
    }
}

fn up(orders: &mut Orders, step: &'static str, index: u32) {
    orders.change(step, NEW_LINK, &link(index, UP));
}

/// A `struct ifinfomsg` that sets flags.
fn link(index: u32, flags: u32) -> [u8; 16] {
    let ([i0, i1, i2, i3], [f0, f1, f2, f3]) = (index.to_ne_bytes(), flags.to_ne_bytes());
    [0, 0, 0, 0, i0, i1, i2, i3, f0, f1, f2, f3, f0, f1, f2, f3]
}

/// An attribute as the value of another.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn address(orders: &mut Orders, step: &'static str, index: u32, address: IpAddr, prefix: u8, scope: u8) {
    let [i0, i1, i2, i3] = index.to_ne_bytes();
    let fixed = [family(&address), prefix, SETTLED, scope, i0, i1, i2, i3];
    let order = orders.create(step, NEW_ADDRESS, &fixed);
    let octets = octets(address);
    order.with(ADDRESS, &octets).with(LOCAL, &octets);
}

fn route<A: Into<IpAddr> + Copy>(orders: &mut Orders, step: &'static str, index: u32, subnet: Subnet<A>) {
    let Some(gateway) = subnet.gateway.map(Into::into) else { return };
    // A `struct rtmsg`: to everywhere, in the main table, made at boot, unicast.
    let fixed = [family(&gateway), 0, 0, 0, 254, 3, SCOPE_GLOBAL, 1, 0, 0, 0, 0];
    let order = orders.create(step, NEW_ROUTE, &fixed);
    order.with(ROUTE_GATEWAY, &octets(gateway)).with(ROUTE_DEVICE, &index.to_ne_bytes());
}

fn family(address: &IpAddr) -> u8 {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    u8::try_from(family.as_raw()).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// `fe80::` with the interface identifier of an address (RFC 4291 §2.5.6).
fn link_local(address: Ipv6Addr) -> Ipv6Addr {
    let [_, _, _, _, identifier @ ..] = address.segments();
    let [a, b, c, d] = identifier;
    Ipv6Addr::new(0xfe80, 0, 0, 0, a, b, c, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_these_orders() {
        let network = Network {
            mtu: Some(9000),
            ipv4: Some(Subnet {
                address: [10, 0, 0, 2].into(),
                prefix: 24,
                gateway: Some([10, 0, 0, 1].into()),
            }),
            ipv6: Some(Subnet {
                address: [0xfd00, 0, 0, 0, 0, 0, 0, 2].into(),
                prefix: 120,
                gateway: Some([0xfd00, 0, 0, 0, 0, 0, 0, 1].into()),
            }),
        };
        let mut orders = Orders::default();
        card_orders(&mut orders, 2, &network);
        let text = format!("{orders:?}");
        let steps = [
            "eth0",
            "eth0 up",
            "the IPv4 address",
            "the IPv4 gateway",
            "the IPv6 link-local address",
            "the IPv6 address",
            "the IPv6 gateway",
        ];
        let mut rest = text.as_str();
        for step in steps {
            rest = rest.split_once(&format!("\"{step}\"")).unwrap_or_else(|| panic!("{step} in {text}")).1;
        }
        let mut few = Orders::default();
        card_orders(&mut few, 2, &Network::default());
        assert!(!format!("{few:?}").contains("IP"), "{few:?}");
    }

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(link(2, UP), [0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(nested(10, &nested(8, &[1])), [12, 0, 10, 0, 5, 0, 8, 0, 1, 0, 0, 0]);
        assert_eq!((family(&[0; 4].into()), family(&[0; 16].into())), (2, 10));
        let address = "fd12:3456:789a::c0:ffee".parse().unwrap();
        assert_eq!(link_local(address), "fe80::c0:ffee".parse::<Ipv6Addr>().unwrap());
    }
}
