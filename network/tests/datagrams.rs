//! ARP, NDP, ICMP and UDP, frame by frame.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use cubby_network::policy::{Protocol, Rule};
use cubby_network::{Addresses, Config, DeniedBy, Limits, NetworkEvent, NetworkPolicy};
use guest::wire::{self, Seen, read};
use guest::{Guest, addresses, config, host, host6};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscRepr,
};

fn all() -> Config {
    config(NetworkPolicy::all())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Sends a frame; what comes back, read.
fn answers(guest: &mut Guest, frame: &[u8]) -> Vec<Seen> {
    guest.send(frame).iter().map(|frame| read(&addresses(), frame)).collect()
}

/// Waits for the next frame.
fn next(guest: &mut Guest) -> Seen {
    guest.keep = true;
    guest.until("a frame comes", |guest| !guest.seen.is_empty());
    read(&addresses(), &guest.seen.remove(0))
}

#[test]
fn arp_is_answered_for_everybody_but_the_guest() {
    let link = addresses();
    let mut guest = Guest::new(all());
    for (target, answered) in [
        (link.gateway_v4, true),
        (link.host_v4, true),
        ([198, 18, 0, 77].into(), true),
        (link.guest_v4, false),
    ] {
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress(link.guest_mac),
            source_protocol_addr: link.guest_v4,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut frame = vec![0; 14 + request.buffer_len()];
        let mut ethernet = EthernetFrame::new_unchecked(&mut frame[..]);
        EthernetRepr {
            src_addr: EthernetAddress(link.guest_mac),
            dst_addr: EthernetAddress::BROADCAST,
            ethertype: EthernetProtocol::Arp,
        }
        .emit(&mut ethernet);
        request.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
        let expected = answered.then(|| Seen::Arp { whose: target.into(), mac: link.gateway_mac });
        assert_eq!(answers(&mut guest, &frame), Vec::from_iter(expected));
    }
}

#[test]
fn neighbours_are_found_and_the_guests_own_address_is_free() {
    let link = addresses();
    let mut guest = Guest::new(all());
    let neighbor = "fe80::1".parse().unwrap();
    let nobody = std::net::Ipv6Addr::UNSPECIFIED;
    for (source, target, answered) in [
        (link.guest_v6, link.gateway_v6, true),
        (link.guest_v6, link.host_v6, true),
        (link.guest_v6, link.guest_v6, false),
        // Whoever is nobody's is the gateway's, so that what is sent there is refused.
        (link.guest_v6, neighbor, true),
        // Who has no address yet asks whether this one is free.
        (nobody, neighbor, false),
        (nobody, link.gateway_v6, true),
    ] {
        let from = Addresses { guest_v6: source, ..link.clone() };
        let repr = Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit {
            target_addr: target,
            lladdr: Some(EthernetAddress(link.guest_mac).into()),
        });
        let mut bytes = vec![0; repr.buffer_len()];
        let caps = smoltcp::phy::ChecksumCapabilities::default();
        repr.emit(&source, &target, &mut Icmpv6Packet::new_unchecked(&mut bytes[..]), &caps);
        let mut frame = wire::ip(&from, target.into(), IpProtocol::Icmpv6, &bytes);
        assert_eq!(answers(&mut guest, &frame), [], "it has passed a router");
        frame[14 + 7] = 255;
        let expected = answered.then(|| Seen::Neighbor { whose: target.into(), mac: link.gateway_mac });
        assert_eq!(answers(&mut guest, &frame), Vec::from_iter(expected));
    }
}

#[test]
fn the_gateway_answers_pings() {
    let link = addresses();
    let mut guest = Guest::new(config(NetworkPolicy::none()));
    for gateway in [IpAddr::from(link.gateway_v4), link.gateway_v6.into()] {
        let frame = wire::echo(&link, gateway, 7, 9, b"hello");
        let expected = Seen::Echo { from: gateway, ident: 7, sequence: 9, data: b"hello".to_vec() };
        assert_eq!(answers(&mut guest, &frame), [expected]);
    }
}

/// Whether this user may ping is the host's to say; the guest hears of it either way.
#[test]
fn a_ping_of_the_host_is_answered_or_refused_as_the_host_permits() {
    let link = addresses();
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap();
    let range: Vec<u64> = range.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let group = u64::from(rustix::process::getegid().as_raw());
    let permitted = (range[0]..=range[1]).contains(&group);
    for to in [IpAddr::from(link.host_v4), link.host_v6.into()] {
        let mut guest = Guest::new(all());
        guest.keep = true;
        let frame = wire::echo(&link, to, 7, 9, b"hello");
        guest.stack.transmit(&frame, &Default::default(), Instant::now());
        let seen = next(&mut guest);
        if permitted {
            assert_eq!(seen, Seen::Echo { from: to, ident: 7, sequence: 9, data: b"hello".to_vec() });
        } else {
            assert!(matches!(seen, Seen::Unreachable { code: 13 | 1, .. }), "{seen:?}");
        }
    }
}

#[test]
fn a_ping_that_is_denied_is_told_so() {
    let link = addresses();
    let mut guest = Guest::new(config(NetworkPolicy::public()));
    let seen = answers(&mut guest, &wire::echo(&link, ip("10.1.1.1"), 7, 9, b""));
    assert!(matches!(seen[..], [Seen::Unreachable { code: 13, .. }]), "{seen:?}");
    let seen = answers(&mut guest, &wire::echo(&link, ip("fd00::1"), 7, 9, b""));
    assert!(matches!(seen[..], [Seen::Unreachable { code: 1, .. }]), "{seen:?}");
    assert_eq!(guest.events().len(), 2);
}

#[test]
fn datagrams_go_both_ways_and_are_told_once() {
    let link = addresses();
    for (bind, host) in [("127.0.0.1:0", host as fn(u16) -> SocketAddr), ("[::1]:0", host6)] {
        let server = UdpSocket::bind(bind).unwrap();
        let to = host(server.local_addr().unwrap().port());
        let mut guest = Guest::new(all());
        for text in [b"one".as_slice(), b"two", b""] {
            assert_eq!(answers(&mut guest, &wire::udp(&link, 5555, (to.ip(), to.port()), text)), []);
            let mut buffer = [0; 16];
            let (n, client) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], text);
            server.send_to(&[text, b"!"].concat(), client).unwrap();
            let expected = Seen::Udp { from: (to.ip(), to.port()), to: 5555, payload: [text, b"!"].concat() };
            assert_eq!(next(&mut guest), expected);
        }
        assert_eq!(guest.events().len(), 1);
        assert_eq!(guest.stack.counters().udp_flows, 1);
    }
}

#[test]
fn a_refused_port_is_an_error_to_the_guest() {
    let link = addresses();
    for (bind, host, code) in [("127.0.0.1:0", host as fn(u16) -> SocketAddr, 3), ("[::1]:0", host6, 4)] {
        let to = host(UdpSocket::bind(bind).unwrap().local_addr().unwrap().port());
        let mut guest = Guest::new(all());
        guest.keep = true;
        let now = Instant::now();
        let frame = wire::udp(&link, 5555, (to.ip(), to.port()), b"anybody?");
        guest.stack.transmit(&frame, &Default::default(), now);
        assert_eq!(next(&mut guest), Seen::Unreachable { from: to.ip(), code, ports: (5555, to.port()) });
    }
}

#[test]
fn what_the_policy_denies_is_answered_at_once_and_told() {
    let link = addresses();
    let rule = Rule::deny().protocol(Protocol::Udp).ports(99);
    let mut guest = Guest::new(config(NetworkPolicy::all().rule(rule)));
    let to = host(99);
    let seen = answers(&mut guest, &wire::udp(&link, 5555, (to.ip(), 99), b"x"));
    assert_eq!(seen, [Seen::Unreachable { from: link.gateway_v4.into(), code: 13, ports: (5555, 99) }]);
    let peer = SocketAddr::from(([127, 0, 0, 1], 99));
    let events = guest.events();
    let by = DeniedBy::Policy(cubby_network::policy::By::Rule(0));
    assert!(
        matches!(&events[..], [NetworkEvent::Denied { peer: told, by: why, .. }] if *told == peer && *why == by)
    );
}

#[test]
fn who_calls_on_the_link_itself_is_refused_at_once() {
    let here = Addresses { guest_v6: "fe80::2".parse().unwrap(), ..addresses() };
    let neighbor: IpAddr = "fe80::1".parse().unwrap();
    for policy in [NetworkPolicy::public(), NetworkPolicy::all()] {
        let mut guest = Guest::new(config(policy));
        let seen = answers(&mut guest, &wire::syn(&here, 5555, (neighbor, 80), 1));
        assert_eq!(seen, [Seen::Reset { from: (neighbor, 80), to: 5555 }]);
        let seen = answers(&mut guest, &wire::udp(&here, 5555, (neighbor, 99), b"x"));
        assert!(matches!(seen[..], [Seen::Unreachable { ports: (5555, 99), .. }]), "{seen:?}");
        assert_eq!(guest.send(&wire::echo(&here, neighbor, 7, 1, b"anybody?")).len(), 1);
        // Beyond the link nobody would find the way back.
        let far = wire::syn(&here, 5555, (addresses().host_v6.into(), 80), 1);
        assert!(answers(&mut guest, &far).is_empty());
        assert_eq!(guest.stack.counters().ignored, 1);
    }
}

#[test]
fn the_gateway_has_no_other_ports() {
    let link = addresses();
    let mut guest = Guest::new(all());
    let gateway = IpAddr::from(link.gateway_v4);
    let seen = answers(&mut guest, &wire::udp(&link, 5555, (gateway, 99), b"x"));
    assert_eq!(seen, [Seen::Unreachable { from: gateway, code: 3, ports: (5555, 99) }]);
    let seen = answers(&mut guest, &wire::syn(&link, 5555, (gateway, 99), 1));
    assert_eq!(seen, [Seen::Reset { from: (gateway, 99), to: 5555 }]);
}

#[test]
fn flows_end_when_idle_and_are_bounded() {
    let link = addresses();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = host(server.local_addr().unwrap().port());
    let limits = Limits { udp_flows: 4, udp_idle: Duration::from_secs(30), ..Limits::default() };
    let mut guest = Guest::new(Config { limits, ..all() });
    let start = Instant::now();
    for port in 1..=9u16 {
        let frame = wire::udp(&link, port, (to.ip(), to.port()), &port.to_be_bytes());
        guest.stack.transmit(&frame, &Default::default(), start + Duration::from_secs(port.into()));
        assert!(guest.stack.counters().udp_flows <= 4);
    }
    assert_eq!(guest.stack.counters().udp_opened, 9);
    // The last four were used at 6, 7, 8 and 9 s.
    guest.stack.on_time(start + Duration::from_secs(37));
    assert_eq!(guest.stack.counters().udp_flows, 2);
    let last = guest.stack.next_deadline().unwrap() + Duration::from_secs(10);
    guest.stack.on_time(last);
    assert_eq!(guest.stack.counters().udp_flows, 0);
    assert_eq!(guest.stack.next_deadline(), None);
}

#[test]
fn datagrams_larger_than_the_link_are_dropped_and_counted() {
    let link = addresses();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = host(server.local_addr().unwrap().port());
    let mut guest = Guest::new(all());
    guest.send(&wire::udp(&link, 5555, (to.ip(), to.port()), b"x"));
    let (_, client) = server.recv_from(&mut [0; 4]).unwrap();
    server.send_to(&[0; 1473], client).unwrap();
    server.send_to(&[1; 1472], client).unwrap();
    let Seen::Udp { payload, .. } = next(&mut guest) else { panic!() };
    assert_eq!((payload.len(), guest.stack.counters().udp_dropped), (1472, 1));
}
