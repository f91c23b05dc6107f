//! Frames for the guest: headers in front of payloads, with checksums or what is left of them.

use std::net::IpAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr,
    IpAddress, IpProtocol, IpRepr, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
    RawHardwareAddress, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, checksum,
};

use crate::config::Addresses;
use crate::frame::{Gso, GsoKind, GuestOffloads, Offload, PartialChecksum};
use crate::tcp::{Outgoing, Seq};

const ETHERNET: usize = 14;
const HOPS: u8 = 64;
/// How much of a packet an error quotes: what fits the smallest MTU (RFC 4443 §3.1), and is enough for RFC 1812.
const QUOTE: usize = 512;

/// Why a packet was not delivered, as ICMP says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Network,
    Host,
    Port,
    Prohibited,
}

/// Two ends of a conversation, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ends {
    pub(crate) guest: (IpAddr, u16),
    pub(crate) peer: (IpAddr, u16),
}

/// Writes what comes before an IP payload of `len` bytes from `source` to the guest's `target`.
fn ip_head(
    head: &mut Vec<u8>,
    link: &Addresses,
    (source, target): (IpAddr, IpAddr),
    protocol: IpProtocol,
    hops: u8,
    len: usize,
) {
    let ip = IpRepr::new(source.into(), target.into(), protocol, len, hops);
    let size = ETHERNET + ip.header_len();
    head.clear();
    head.resize(size, 0);
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress(link.gateway_mac),
        dst_addr: EthernetAddress(link.guest_mac),
        ethertype: if source.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 },
    };
    let mut frame = EthernetFrame::new_unchecked(head.as_mut_slice());
    ethernet.emit(&mut frame);
    ip.emit(frame.payload_mut(), &ChecksumCapabilities::default());
}

/// Appends `n` zeros and gives them out.
fn extend(head: &mut Vec<u8>, n: usize) -> &mut [u8] {
    let begin = head.len();
    head.resize(begin + n, 0);
    head.get_mut(begin..).unwrap_or_default()
}

/// The sum of a transport header and its payload, which is in two pieces of any length.
fn sum(pseudo: u16, header: &[u8], (first, second): (&[u8], &[u8])) -> u16 {
    let second_sum = checksum::data(second);
    // A piece that begins at an odd place counts with its bytes swapped (RFC 1071 §2).
    let second_sum = if first.len() % 2 == 1 { second_sum.swap_bytes() } else { second_sum };
    checksum::combine(&[pseudo, checksum::data(header), checksum::data(first), second_sum])
}

fn pseudo((source, target): (IpAddr, IpAddr), protocol: IpProtocol, len: usize) -> u16 {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    checksum::pseudo_header(&IpAddress::from(source), &IpAddress::from(target), protocol, len)
}

/// Writes the headers of a TCP segment with this payload.
pub(crate) fn tcp(
    head: &mut Vec<u8>,
    link: &Addresses,
    ends: Ends,
    segment: &Outgoing,
    payload: (&[u8], &[u8]),
    mss: u16,
    offloads: GuestOffloads,
) -> Offload {
    let number = |seq: Seq| TcpSeqNumber(seq.0.cast_signed());
    let control = match segment {
        Outgoing { rst: true, .. } => TcpControl::Rst,
        Outgoing { syn: true, .. } => TcpControl::Syn,
        Outgoing { fin: true, .. } => TcpControl::Fin,
        Outgoing { psh: true, .. } => TcpControl::Psh,
        _ => TcpControl::None,
    };
    let repr = TcpRepr {
        src_port: ends.peer.1,
        dst_port: ends.guest.1,
        control,
        seq_number: number(segment.seq),
        ack_number: segment.ack.map(number),
        window_len: segment.window,
        window_scale: segment.scale,
        max_seg_size: segment.mss,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (header, len) = (repr.header_len(), payload.0.len() + payload.1.len());
    let between = (ends.peer.0, ends.guest.0);
    ip_head(head, link, between, IpProtocol::Tcp, HOPS, header + len);
    let start = head.len();
    let bytes = extend(head, header);
    let (source, target) = (IpAddress::from(between.0), IpAddress::from(between.1));
    repr.emit(&mut TcpPacket::new_unchecked(&mut *bytes), &source, &target, &ChecksumCapabilities::ignored());
    let pseudo = pseudo(between, IpProtocol::Tcp, header + len);
    let field = if offloads.checksum { pseudo } else { !sum(pseudo, bytes, payload) };
    TcpPacket::new_unchecked(bytes).set_checksum(field);
    let narrow = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    Offload {
        checksum: offloads.checksum.then(|| PartialChecksum { start: narrow(start), offset: 16 }),
        gso: (len > usize::from(mss)).then(|| Gso {
            kind: if source.version() == smoltcp::wire::IpVersion::Ipv4 {
                GsoKind::Tcp4
            } else {
                GsoKind::Tcp6
            },
            headers: narrow(start + header),
            segment: mss,
        }),
    }
}

/// Writes the headers of a datagram with this payload.
pub(crate) fn udp(
    head: &mut Vec<u8>,
    link: &Addresses,
    ends: Ends,
    payload: &[u8],
    offloads: GuestOffloads,
) -> Offload {
    let len = 8 + payload.len();
    let between = (ends.peer.0, ends.guest.0);
    ip_head(head, link, between, IpProtocol::Udp, HOPS, len);
    let start = head.len();
    let bytes = extend(head, 8);
    let mut packet = UdpPacket::new_unchecked(&mut *bytes);
    packet.set_src_port(ends.peer.1);
    packet.set_dst_port(ends.guest.1);
    packet.set_len(u16::try_from(len).unwrap_or(u16::MAX));
    let pseudo = pseudo(between, IpProtocol::Udp, len);
    if offloads.checksum {
        UdpPacket::new_unchecked(bytes).set_checksum(pseudo);
        let start = u16::try_from(start).unwrap_or(u16::MAX);
        return Offload { checksum: Some(PartialChecksum { start, offset: 6 }), gso: None };
    }
    // Zero would mean that there is none (RFC 768).
    let field = match !sum(pseudo, bytes, (payload, &[])) {
        0 => 0xffff,
        other => other,
    };
    UdpPacket::new_unchecked(bytes).set_checksum(field);
    Offload::default()
}

/// A whole datagram.
pub(crate) fn udp_frame(link: &Addresses, ends: Ends, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    udp(&mut frame, link, ends, payload, GuestOffloads::default());
    frame.extend_from_slice(payload);
    frame
}

/// The answer to an echo request that the guest sent to `peer`.
pub(crate) fn echo_reply(
    link: &Addresses,
    (guest, peer): (IpAddr, IpAddr),
    ident: u16,
    sequence: u16,
    data: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    match (peer, guest) {
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let repr = Icmpv6Repr::EchoReply { ident, seq_no: sequence, data };
            icmpv6(&mut frame, link, (source, target), &repr, HOPS);
        }
        _ => {
            icmpv4(&mut frame, link, (peer, guest), &Icmpv4Repr::EchoReply { ident, seq_no: sequence, data })
        }
    }
    frame
}

/// The error that says why a packet, given from its IP header on, was not delivered. It comes from the gateway, which has
/// refused it.
pub(crate) fn unreachable(
    link: &Addresses,
    (guest, peer): (IpAddr, IpAddr),
    packet: &[u8],
    why: Unreachable,
) -> Option<Vec<u8>> {
    let mut frame = Vec::new();
    let gateway = if why == Unreachable::Port { peer } else { link.gateway(guest) };
    match (gateway, guest) {
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let quoted = Ipv6Packet::new_checked(packet).ok()?;
            let reason = match why {
                Unreachable::Network => Icmpv6DstUnreachable::NoRoute,
                Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
                Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
            };
            let header = Ipv6Repr::parse(&quoted).ok()?;
            let data = quoted.payload();
            let data = data.get(..QUOTE).unwrap_or(data);
            icmpv6(
                &mut frame,
                link,
                (source, target),
                &Icmpv6Repr::DstUnreachable { reason, header, data },
                HOPS,
            );
        }
        _ => {
            let quoted = Ipv4Packet::new_checked(packet).ok()?;
            let reason = match why {
                Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
                Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
                Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            };
            let header = Ipv4Repr::parse(&quoted, &ChecksumCapabilities::ignored()).ok()?;
            let data = quoted.payload();
            let data = data.get(..QUOTE).unwrap_or(data);
            icmpv4(&mut frame, link, (gateway, guest), &Icmpv4Repr::DstUnreachable { reason, header, data });
        }
    }
    Some(frame)
}

/// The beginning of a datagram that the guest has sent, made again for the errors that quote it.
pub(crate) fn quote_udp(ends: Ends, len: usize) -> Vec<u8> {
    let ip = IpRepr::new(ends.guest.0.into(), ends.peer.0.into(), IpProtocol::Udp, 8 + len, HOPS);
    let mut bytes = vec![0; ip.header_len() + 8];
    ip.emit(&mut bytes, &ChecksumCapabilities::default());
    if let Some(udp) = bytes.get_mut(ip.header_len()..) {
        let mut packet = UdpPacket::new_unchecked(udp);
        packet.set_src_port(ends.guest.1);
        packet.set_dst_port(ends.peer.1);
        packet.set_len(u16::try_from(8 + len).unwrap_or(u16::MAX));
    }
    // A quotation is cut off: what it quotes is longer.
    bytes.resize(ip.header_len() + 8 + len.min(QUOTE), 0);
    bytes
}

/// The beginning of the guest's SYN, made again for the error that quotes it.
pub(crate) fn quote_tcp(ends: Ends, syn: Seq) -> Vec<u8> {
    let ip = IpRepr::new(ends.guest.0.into(), ends.peer.0.into(), IpProtocol::Tcp, 20, HOPS);
    let mut bytes = vec![0; ip.header_len() + 20];
    ip.emit(&mut bytes, &ChecksumCapabilities::default());
    if let Some(tcp) = bytes.get_mut(ip.header_len()..) {
        let mut packet = TcpPacket::new_unchecked(tcp);
        packet.set_src_port(ends.guest.1);
        packet.set_dst_port(ends.peer.1);
        packet.set_seq_number(TcpSeqNumber(syn.0.cast_signed()));
        packet.set_header_len(20);
        packet.set_syn(true);
    }
    bytes
}

fn icmpv4(frame: &mut Vec<u8>, link: &Addresses, between: (IpAddr, IpAddr), repr: &Icmpv4Repr<'_>) {
    ip_head(frame, link, between, IpProtocol::Icmp, HOPS, repr.buffer_len());
    let bytes = extend(frame, repr.buffer_len());
    repr.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
}

fn icmpv6(
    frame: &mut Vec<u8>,
    link: &Addresses,
    (source, target): (std::net::Ipv6Addr, std::net::Ipv6Addr),
    repr: &Icmpv6Repr<'_>,
    hops: u8,
) {
    ip_head(frame, link, (source.into(), target.into()), IpProtocol::Icmpv6, hops, repr.buffer_len());
    let bytes = extend(frame, repr.buffer_len());
    repr.emit(&source, &target, &mut Icmpv6Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
}

/// The answer to an ARP request, if it asks for an address that is not the guest's own: all others are behind the gateway.
pub(crate) fn arp_reply(link: &Addresses, request: &ArpRepr) -> Option<Vec<u8>> {
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = *request
    else {
        return None;
    };
    if target_protocol_addr == link.guest_v4 {
        return None;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(link.gateway_mac),
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: EthernetAddress(link.guest_mac),
        target_protocol_addr: source_protocol_addr,
    };
    let mut frame = vec![0; ETHERNET];
    EthernetRepr {
        src_addr: EthernetAddress(link.gateway_mac),
        dst_addr: EthernetAddress(link.guest_mac),
        ethertype: EthernetProtocol::Arp,
    }
    .emit(&mut EthernetFrame::new_unchecked(frame.as_mut_slice()));
    reply.emit(&mut ArpPacket::new_unchecked(extend(&mut frame, reply.buffer_len())));
    Some(frame)
}

/// The answer to a neighbour solicitation, unless it is about an address that the guest has, or may have.
pub(crate) fn neighbor_advert(link: &Addresses, source: IpAddr, asked: &NdiscRepr<'_>) -> Option<Vec<u8>> {
    let (NdiscRepr::NeighborSolicit { target_addr, .. }, IpAddr::V6(guest)) = (asked, source) else {
        return None;
    };
    // Somebody without an address asks whether one is free: the guest is welcome to any but these. Whoever looks for
    // a neighbour finds the gateway, as by ARP: what is sent to it is refused at once and not waited for.
    let ours = *target_addr == link.gateway_v6 || *target_addr == link.host_v6;
    if *target_addr == link.guest_v6 || (guest.is_unspecified() && !ours) {
        return None;
    }
    let to =
        if guest.is_unspecified() { std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1) } else { guest };
    let mut flags = NdiscNeighborFlags::OVERRIDE | NdiscNeighborFlags::ROUTER;
    if !guest.is_unspecified() {
        flags |= NdiscNeighborFlags::SOLICITED;
    }
    let repr = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags,
        target_addr: *target_addr,
        lladdr: Some(RawHardwareAddress::from(EthernetAddress(link.gateway_mac))),
    });
    let mut frame = Vec::new();
    icmpv6(&mut frame, link, (*target_addr, to), &repr, 255);
    Some(frame)
}
