//! Frames from the guest, checked layer by layer.
//!
//! A frame is taken if it comes from the guest's own addresses, is whole, and its checksums are right or left to us by its
//! [`Offload`]. Fragments are refused: TCP makes none, a datagram that needs some is larger than the link's MTU, and
//! putting them together is memory that a guest fills for nothing. IPv6 extension headers are refused for the same reason.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv4Repr,
    Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, NdiscRepr, TcpControl,
    TcpPacket, TcpRepr, UdpPacket,
};

use crate::config::Addresses;
use crate::frame::Offload;
use crate::tcp::{Segment, Seq};

/// Why a frame goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// It breaks the rules of its layer, or is cut off.
    Malformed,
    /// A checksum is wrong.
    Checksum,
    /// It does not come from the guest's addresses.
    Spoofed,
    /// It is part of a packet.
    Fragment,
    /// It is for somebody else, or nothing that is spoken here.
    Ignored,
}

/// A frame that is fit.
#[derive(Debug)]
pub(crate) enum Packet<'a> {
    Arp(ArpRepr),
    Ip(Datagram<'a>),
}

/// An IP packet.
#[derive(Debug)]
pub(crate) struct Datagram<'a> {
    pub(crate) source: IpAddr,
    pub(crate) target: IpAddr,
    /// The packet from its IP header on, for the errors that quote it.
    pub(crate) bytes: &'a [u8],
    pub(crate) body: Body<'a>,
}

#[derive(Debug)]
pub(crate) enum Body<'a> {
    Tcp { source: u16, target: u16, segment: Segment<'a> },
    Udp { source: u16, target: u16, payload: &'a [u8] },
    Echo { ident: u16, sequence: u16, payload: &'a [u8] },
    Neighbor(NdiscRepr<'a>),
}

/// Looks at a frame.
pub(crate) fn parse<'a>(frame: &'a [u8], offload: &Offload, link: &Addresses) -> Result<Packet<'a>, Unfit> {
    let ethernet = EthernetFrame::new_checked(frame).map_err(|_| Unfit::Malformed)?;
    if ethernet.src_addr() != EthernetAddress(link.guest_mac) {
        return Err(Unfit::Spoofed);
    }
    let to = ethernet.dst_addr();
    if to != EthernetAddress(link.gateway_mac) && !to.is_multicast() && !to.is_broadcast() {
        return Err(Unfit::Ignored);
    }
    match ethernet.ethertype() {
        EthernetProtocol::Arp => arp(ethernet.payload(), link),
        EthernetProtocol::Ipv4 => ipv4(ethernet.payload(), offload, link).map(Packet::Ip),
        EthernetProtocol::Ipv6 => ipv6(ethernet.payload(), offload, link).map(Packet::Ip),
        EthernetProtocol::Unknown(_) => Err(Unfit::Ignored),
    }
}

fn arp<'a>(bytes: &[u8], link: &Addresses) -> Result<Packet<'a>, Unfit> {
    let packet = ArpPacket::new_checked(bytes).map_err(|_| Unfit::Malformed)?;
    let repr = ArpRepr::parse(&packet).map_err(|_| Unfit::Malformed)?;
    let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. } = repr else {
        return Err(Unfit::Ignored);
    };
    // A probe for a free address has none of its own (RFC 5227).
    let own = source_protocol_addr == link.guest_v4 || source_protocol_addr.is_unspecified();
    if source_hardware_addr == EthernetAddress(link.guest_mac) && own {
        Ok(Packet::Arp(repr))
    } else {
        Err(Unfit::Spoofed)
    }
}

fn ipv4<'a>(bytes: &'a [u8], offload: &Offload, link: &Addresses) -> Result<Datagram<'a>, Unfit> {
    let packet = Ipv4Packet::new_checked(bytes).map_err(|_| Unfit::Malformed)?;
    if packet.version() != 4 || packet.header_len() < 20 {
        return Err(Unfit::Malformed);
    }
    if !packet.verify_checksum() {
        return Err(Unfit::Checksum);
    }
    if packet.src_addr() != link.guest_v4 {
        return Err(Unfit::Spoofed);
    }
    if packet.more_frags() || packet.frag_offset() != 0 {
        return Err(Unfit::Fragment);
    }
    let (source, target) = (packet.src_addr().into(), packet.dst_addr().into());
    let header = usize::from(packet.header_len());
    let bytes = bytes.get(..usize::from(packet.total_len())).ok_or(Unfit::Malformed)?;
    let payload = bytes.get(header..).ok_or(Unfit::Malformed)?;
    let left = Left { offload, start: 14 + header };
    let body = match packet.next_header() {
        IpProtocol::Tcp => tcp(payload, source, target, left)?,
        IpProtocol::Udp => udp(payload, source, target, left)?,
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(payload).map_err(|_| Unfit::Malformed)?;
            if !icmp.verify_checksum() {
                return Err(Unfit::Checksum);
            }
            match Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::ignored()) {
                Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) => {
                    Body::Echo { ident, sequence: seq_no, payload: data }
                }
                _ => return Err(Unfit::Ignored),
            }
        }
        _ => return Err(Unfit::Ignored),
    };
    Ok(Datagram { source, target, bytes, body })
}

fn ipv6<'a>(bytes: &'a [u8], offload: &Offload, link: &Addresses) -> Result<Datagram<'a>, Unfit> {
    let packet = Ipv6Packet::new_checked(bytes).map_err(|_| Unfit::Malformed)?;
    if packet.version() != 6 {
        return Err(Unfit::Malformed);
    }
    let (from, to) = (packet.src_addr(), packet.dst_addr());
    let local = from.is_unspecified() || from.is_unicast_link_local();
    // Nobody but the gateway is there, and whoever calls somebody is to hear that.
    let calls = !local || (!from.is_unspecified() && to.is_unicast_link_local());
    if from != link.guest_v6 && !local {
        return Err(Unfit::Spoofed);
    }
    let (source, target) = (IpAddr::from(from), IpAddr::from(to));
    let bytes = bytes.get(..packet.total_len()).ok_or(Unfit::Malformed)?;
    let payload = bytes.get(40..).ok_or(Unfit::Malformed)?;
    let left = Left { offload, start: 14 + 40 };
    let body = match packet.next_header() {
        IpProtocol::Icmpv6 => icmpv6(payload, from, to, packet.hop_limit())?,
        IpProtocol::Ipv6Frag => return Err(Unfit::Fragment),
        IpProtocol::Tcp if calls => tcp(payload, source, target, left)?,
        IpProtocol::Udp if calls => udp(payload, source, target, left)?,
        _ => return Err(Unfit::Ignored),
    };
    Ok(Datagram { source, target, bytes, body })
}

fn icmpv6<'a>(bytes: &'a [u8], from: Ipv6Addr, to: Ipv6Addr, hops: u8) -> Result<Body<'a>, Unfit> {
    let packet = Icmpv6Packet::new_checked(bytes).map_err(|_| Unfit::Malformed)?;
    if !packet.verify_checksum(&from, &to) {
        return Err(Unfit::Checksum);
    }
    match Icmpv6Repr::parse(&from, &to, &packet, &ChecksumCapabilities::ignored()) {
        Ok(Icmpv6Repr::EchoRequest { ident, seq_no, data }) => {
            Ok(Body::Echo { ident, sequence: seq_no, payload: data })
        }
        // From this link, says the hop limit (RFC 4861 §7.1).
        Ok(Icmpv6Repr::Ndisc(ndisc)) if hops == 255 => Ok(Body::Neighbor(ndisc)),
        Ok(_) => Err(Unfit::Ignored),
        Err(_) => Err(Unfit::Malformed),
    }
}

/// What the frame leaves to us, and where its transport header begins in it.
#[derive(Clone, Copy)]
struct Left<'a> {
    offload: &'a Offload,
    start: usize,
}

impl Left<'_> {
    /// Whether the checksum at this offset of the transport header is left to us. One that is left elsewhere is a lie.
    fn has(self, offset: u16) -> Result<bool, Unfit> {
        match self.offload.checksum {
            None => Ok(false),
            Some(left) if usize::from(left.start) == self.start && left.offset == offset => Ok(true),
            Some(_) => Err(Unfit::Malformed),
        }
    }
}

fn tcp<'a>(bytes: &'a [u8], source: IpAddr, target: IpAddr, left: Left<'_>) -> Result<Body<'a>, Unfit> {
    let packet = TcpPacket::new_checked(bytes).map_err(|_| Unfit::Malformed)?;
    let (source, target) = (IpAddress::from(source), IpAddress::from(target));
    if !left.has(16)? && !packet.verify_checksum(&source, &target) {
        return Err(Unfit::Checksum);
    }
    let repr = TcpRepr::parse(&packet, &source, &target, &ChecksumCapabilities::ignored())
        .map_err(|_| Unfit::Malformed)?;
    let seq = |number: smoltcp::wire::TcpSeqNumber| Seq(number.0.cast_unsigned());
    let segment = Segment {
        seq: seq(repr.seq_number),
        ack: repr.ack_number.map(seq),
        syn: repr.control == TcpControl::Syn,
        fin: repr.control == TcpControl::Fin,
        rst: repr.control == TcpControl::Rst,
        window: repr.window_len,
        scale: repr.window_scale,
        mss: repr.max_seg_size,
        payload: repr.payload,
    };
    Ok(Body::Tcp { source: repr.src_port, target: repr.dst_port, segment })
}

fn udp<'a>(bytes: &'a [u8], source: IpAddr, target: IpAddr, left: Left<'_>) -> Result<Body<'a>, Unfit> {
    let packet = UdpPacket::new_checked(bytes).map_err(|_| Unfit::Malformed)?;
    let sum = |address| IpAddress::from(address);
    // No checksum at all is for IPv4 (RFC 8200 §8.1).
    let none = packet.checksum() == 0 && source.is_ipv4();
    if !left.has(6)? && !none && !packet.verify_checksum(&sum(source), &sum(target)) {
        return Err(Unfit::Checksum);
    }
    if packet.src_port() == 0 || packet.dst_port() == 0 {
        return Err(Unfit::Malformed);
    }
    Ok(Body::Udp { source: packet.src_port(), target: packet.dst_port(), payload: packet.payload() })
}
