//! Frames made by hand, as a guest's kernel would not.

use std::net::IpAddr;

use cubby_network::Addresses;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;

/// A frame of the guest with this IP payload.
pub fn ip(link: &Addresses, to: IpAddr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let from: IpAddr = if to.is_ipv4() { link.guest_v4.into() } else { link.guest_v6.into() };
    let ip = IpRepr::new(from.into(), to.into(), protocol, payload.len(), 64);
    let mut frame = vec![0; 14 + ip.header_len()];
    EthernetRepr {
        src_addr: EthernetAddress(link.guest_mac),
        dst_addr: EthernetAddress(link.gateway_mac),
        ethertype: if to.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 },
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    ip.emit(&mut frame[14..], &ChecksumCapabilities::default());
    frame.extend_from_slice(payload);
    frame
}

pub fn udp(link: &Addresses, from: u16, to: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let source: IpAddr = if to.0.is_ipv4() { link.guest_v4.into() } else { link.guest_v6.into() };
    let repr = UdpRepr { src_port: from, dst_port: to.1 };
    let mut bytes = vec![0; 8 + payload.len()];
    repr.emit(
        &mut UdpPacket::new_unchecked(&mut bytes[..]),
        &source.into(),
        &to.0.into(),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    ip(link, to.0, IpProtocol::Udp, &bytes)
}

pub fn syn(link: &Addresses, from: u16, to: (IpAddr, u16), seq: i32) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: from,
        dst_port: to.1,
        control: TcpControl::Syn,
        seq_number: TcpSeqNumber(seq),
        ack_number: None,
        window_len: 64_000,
        window_scale: Some(7),
        max_seg_size: Some(1460),
        sack_permitted: true,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    tcp(link, to.0, &repr)
}

pub fn tcp(link: &Addresses, to: IpAddr, repr: &TcpRepr<'_>) -> Vec<u8> {
    let source: IpAddr = if to.is_ipv4() { link.guest_v4.into() } else { link.guest_v6.into() };
    let mut bytes = vec![0; repr.buffer_len()];
    let caps = ChecksumCapabilities::default();
    repr.emit(&mut TcpPacket::new_unchecked(&mut bytes[..]), &source.into(), &to.into(), &caps);
    ip(link, to, IpProtocol::Tcp, &bytes)
}

pub fn echo(link: &Addresses, to: IpAddr, ident: u16, seq_no: u16, data: &[u8]) -> Vec<u8> {
    let caps = ChecksumCapabilities::default();
    match to {
        IpAddr::V4(_) => {
            let repr = Icmpv4Repr::EchoRequest { ident, seq_no, data };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &caps);
            ip(link, to, IpProtocol::Icmp, &bytes)
        }
        IpAddr::V6(v6) => {
            let repr = Icmpv6Repr::EchoRequest { ident, seq_no, data };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&link.guest_v6, &v6, &mut Icmpv6Packet::new_unchecked(&mut bytes[..]), &caps);
            ip(link, to, IpProtocol::Icmpv6, &bytes)
        }
    }
}

/// A frame for the guest, with all its checksums verified.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    Udp {
        from: (IpAddr, u16),
        to: u16,
        payload: Vec<u8>,
    },
    Echo {
        from: IpAddr,
        ident: u16,
        sequence: u16,
        data: Vec<u8>,
    },
    /// Code of "destination unreachable", and source and target port of the packet that it quotes.
    Unreachable {
        from: IpAddr,
        code: u8,
        ports: (u16, u16),
    },
    Reset {
        from: (IpAddr, u16),
        to: u16,
    },
    SynAck {
        from: (IpAddr, u16),
        to: u16,
    },
    Syn {
        from: (IpAddr, u16),
        to: u16,
    },
    OtherTcp {
        to: u16,
    },
    Arp {
        whose: IpAddr,
        mac: [u8; 6],
    },
    Neighbor {
        whose: IpAddr,
        mac: [u8; 6],
    },
}

pub fn read(link: &Addresses, frame: &[u8]) -> Seen {
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(ethernet.src_addr(), EthernetAddress(link.gateway_mac));
    assert_eq!(ethernet.dst_addr(), EthernetAddress(link.guest_mac));
    let caps = ChecksumCapabilities::default();
    match ethernet.ethertype() {
        EthernetProtocol::Arp => {
            let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, .. } =
                ArpRepr::parse(&ArpPacket::new_checked(ethernet.payload()).unwrap()).unwrap()
            else {
                panic!()
            };
            assert_eq!(operation, ArpOperation::Reply);
            Seen::Arp { whose: source_protocol_addr.into(), mac: source_hardware_addr.0 }
        }
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
            assert!(ip.verify_checksum());
            assert_eq!(ip.dst_addr(), link.guest_v4);
            let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
            match ip.next_header() {
                IpProtocol::Icmp => {
                    match Icmpv4Repr::parse(&Icmpv4Packet::new_checked(ip.payload()).unwrap(), &caps).unwrap()
                    {
                        Icmpv4Repr::EchoReply { ident, seq_no, data } => {
                            Seen::Echo { from, ident, sequence: seq_no, data: data.to_vec() }
                        }
                        Icmpv4Repr::DstUnreachable { reason, header, data } => {
                            assert_eq!(header.src_addr, link.guest_v4);
                            Seen::Unreachable { from, code: reason.into(), ports: ports(data) }
                        }
                        other => panic!("{other:?}"),
                    }
                }
                other => transport(other, from, to, ip.payload()),
            }
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
            let (source, target) = (ip.src_addr(), ip.dst_addr());
            let from = source.into();
            match ip.next_header() {
                IpProtocol::Icmpv6 => {
                    let packet = Icmpv6Packet::new_checked(ip.payload()).unwrap();
                    match Icmpv6Repr::parse(&source, &target, &packet, &caps).unwrap() {
                        Icmpv6Repr::EchoReply { ident, seq_no, data } => {
                            Seen::Echo { from, ident, sequence: seq_no, data: data.to_vec() }
                        }
                        Icmpv6Repr::DstUnreachable { reason, header, data } => {
                            assert!(header.src_addr == link.guest_v6 || target.is_unicast_link_local());
                            assert_eq!(header.src_addr, target);
                            Seen::Unreachable { from, code: reason.into(), ports: ports(data) }
                        }
                        Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { target_addr, lladdr, .. }) => {
                            assert_eq!(ip.hop_limit(), 255);
                            let mac = lladdr.unwrap().parse(Medium::Ethernet).unwrap();
                            let HardwareAddress::Ethernet(mac) = mac;
                            Seen::Neighbor { whose: target_addr.into(), mac: mac.0 }
                        }
                        other => panic!("{other:?}"),
                    }
                }
                other => transport(other, from, target.into(), ip.payload()),
            }
        }
        other => panic!("{other}"),
    }
}

use smoltcp::phy::Medium;

fn ports(data: &[u8]) -> (u16, u16) {
    let port = |at: usize| u16::from_be_bytes([data[at], data[at + 1]]);
    (port(0), port(2))
}

fn transport(protocol: IpProtocol, from: IpAddr, to: IpAddr, bytes: &[u8]) -> Seen {
    let caps = ChecksumCapabilities::default();
    match protocol {
        IpProtocol::Udp => {
            let packet = UdpPacket::new_checked(bytes).unwrap();
            let repr = UdpRepr::parse(&packet, &from.into(), &to.into(), &caps).unwrap();
            Seen::Udp { from: (from, repr.src_port), to: repr.dst_port, payload: packet.payload().to_vec() }
        }
        IpProtocol::Tcp => {
            let packet = TcpPacket::new_checked(bytes).unwrap();
            let repr = TcpRepr::parse(&packet, &from.into(), &to.into(), &caps).unwrap();
            let (from, to) = ((from, repr.src_port), repr.dst_port);
            match (repr.control, repr.ack_number) {
                (TcpControl::Rst, _) => Seen::Reset { from, to },
                (TcpControl::Syn, Some(_)) => Seen::SynAck { from, to },
                (TcpControl::Syn, None) => Seen::Syn { from, to },
                _ => Seen::OtherTcp { to },
            }
        }
        other => panic!("{other}"),
    }
}
