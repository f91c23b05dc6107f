//! Frames that are right but for one lie, in a header of any layer, with every checksum right for what is said: so a lie
//! gets as deep as it can. Each kind of lie goes nowhere and is counted once; what may be said in many ways is said in any
//! of them, and survived.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use cubby_network::{Config, Counters, Limits, NetworkPolicy, Offload, PartialChecksum, policy::Rule};
use guest::wire::{self, Seen, read};
use guest::{Guest, addresses, config, host};
use proptest::prelude::*;
use smoltcp::wire::{IpProtocol, Ipv4Packet};

const ETHERNET: usize = 14;
/// Where an IPv4 packet's payload begins without options, and an IPv6 packet's.
const V4: usize = ETHERNET + 20;
const V6: usize = ETHERNET + 40;

fn v4() -> (IpAddr, u16) {
    (addresses().host_v4.into(), 9)
}

fn v6() -> (IpAddr, u16) {
    (addresses().host_v6.into(), 9)
}

/// A checksum that is left to the stack: no lie is found by it.
fn left(start: usize, offset: u16) -> Offload {
    let start = u16::try_from(start).unwrap();
    Offload { checksum: Some(PartialChecksum { start, offset }), gso: None }
}

/// Puts an IPv4 header's checksum right, whatever its length is said to be.
fn sum(frame: &mut [u8]) {
    let header = usize::from(frame[ETHERNET] & 15) * 4;
    if (20..=frame.len() - ETHERNET).contains(&header) {
        Ipv4Packet::new_unchecked(&mut frame[ETHERNET..]).fill_checksum();
    }
}

fn set(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// What a frame did, which must not be an answer or a flow.
fn goes_nowhere(frame: &[u8], offload: &Offload) -> Result<Counters, TestCaseError> {
    let mut guest = Guest::new(config(NetworkPolicy::all()));
    guest.stack.transmit(frame, offload, Instant::now());
    let answers = guest.frames();
    prop_assert!(answers.is_empty(), "answered: {:?}", answers.iter().map(Vec::len).collect::<Vec<_>>());
    let counters = guest.stack.counters();
    prop_assert_eq!((counters.tcp_connections, counters.udp_flows, counters.tcp_opened), (0, 0, 0));
    let Counters { malformed, bad_checksum, spoofed, fragments, ignored, .. } = counters;
    prop_assert_eq!(malformed + bad_checksum + spoofed + fragments + ignored, 1, "it is counted once");
    Ok(counters)
}

/// TCP and UDP over IPv4 and IPv6: the frame, where its transport header begins, and its offload.
fn transports(payload: &[u8]) -> [(Vec<u8>, usize, Offload); 4] {
    [
        (wire::udp(&addresses(), 5, v4(), payload), V4, left(V4, 6)),
        (wire::udp(&addresses(), 5, v6(), payload), V6, left(V6, 6)),
        (wire::syn(&addresses(), 5, v4(), 1), V4, left(V4, 16)),
        (wire::syn(&addresses(), 5, v6(), 1), V6, left(V6, 16)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 64 } else { 2000 }))]

    /// IPv4's version, header length and total length.
    #[test]
    fn lengths_of_ipv4_that_are_not_there_go_nowhere(version in 0u8..16, words in 0u8..16, total: u16, which in 0usize..3) {
        let (mut frame, _, offload) = transports(b"payload")[0].clone();
        let len = u16::try_from(frame.len() - ETHERNET).unwrap();
        match which {
            0 if version != 4 => frame[ETHERNET] = version << 4 | 5,
            1 if words < 5 || usize::from(words) * 4 > usize::from(len) => frame[ETHERNET] = 0x40 | words,
            _ if total < 20 || total > len => set(&mut frame, ETHERNET + 2, total),
            _ => return Ok(()),
        }
        sum(&mut frame);
        goes_nowhere(&frame, &offload)?;
    }

    /// Any fragment, whatever else is right.
    #[test]
    fn fragments_go_nowhere(bits in prop_oneof![Just(0x2000u16), 1u16..0x2000, 0x2001u16..0x4000], six: bool, body in prop::collection::vec(any::<u8>(), 8..64)) {
        let (frame, offload) = if six {
            (wire::ip(&addresses(), v6().0, IpProtocol::Ipv6Frag, &body), Offload::default())
        } else {
            let (mut frame, _, offload) = transports(b"payload")[0].clone();
            set(&mut frame, ETHERNET + 6, bits);
            sum(&mut frame);
            (frame, offload)
        };
        prop_assert_eq!(goes_nowhere(&frame, &offload)?.fragments, 1);
    }

    /// IPv6's lengths, and chains of extension headers in front of a datagram that would be delivered.
    #[test]
    fn extension_headers_and_lengths_of_ipv6_go_nowhere(
        chain in prop::collection::vec((prop::sample::select(vec![0u8, 43, 44, 50, 51, 59, 60, 135, 139, 140, 253]), 0u8..3), 1..5),
        longer in 1u16..,
    ) {
        let (frame, _, offload) = transports(b"payload")[1].clone();
        let mut lying = frame.clone();
        let len = u16::try_from(frame.len() - V6).unwrap();
        if let Some(len) = len.checked_add(longer) {
            set(&mut lying, ETHERNET + 4, len);
            prop_assert_eq!(goes_nowhere(&lying, &offload)?.malformed, 1);
        }
        let mut headers = Vec::new();
        let mut nexts = chain.iter().skip(1).map(|(kind, _)| *kind).chain([17]);
        for (_, eights) in &chain {
            headers.extend([nexts.next().unwrap(), *eights]);
            headers.resize(headers.len() + 6 + 8 * usize::from(*eights), 0);
        }
        let mut chained = frame[..V6].to_vec();
        chained[ETHERNET + 6] = chain[0].0;
        set(&mut chained, ETHERNET + 4, len + u16::try_from(headers.len()).unwrap());
        let start = V6 + headers.len();
        chained.extend(headers);
        chained.extend(&frame[V6..]);
        goes_nowhere(&chained, &left(start, 6))?;
        goes_nowhere(&chained, &Offload::default())?;
    }

    /// UDP's length and TCP's data offset.
    #[test]
    fn lengths_of_transports_that_are_not_there_go_nowhere(which in 0usize..4, lie: u16) {
        let (mut frame, start, offload) = transports(b"payload")[which].clone();
        let len = u16::try_from(frame.len() - start).unwrap();
        if which < 2 {
            if (8..=len).contains(&lie) {
                return Ok(());
            }
            set(&mut frame, start + 4, lie);
        } else {
            let words = u8::try_from(lie % 16).unwrap();
            if (5..=len / 4).contains(&u16::from(words)) {
                return Ok(());
            }
            frame[start + 12] = words << 4;
        }
        prop_assert_eq!(goes_nowhere(&frame, &offload)?.malformed, 1);
    }

    /// TCP's options are any bytes; control bits are any, too.
    #[test]
    fn any_options_and_bits_of_tcp_are_survived(options in prop::collection::vec(any::<u8>(), 40), words in 5u8..16, bits: u8, payload in 0usize..100) {
        let mut guest = Guest::new(bounded());
        for six in [false, true] {
            let to = if six { v6() } else { v4() };
            let mut tcp = wire::syn(&addresses(), 5, to, 1)[if six { V6 } else { V4 }..][..20].to_vec();
            tcp[12] = words << 4;
            tcp[13] = bits;
            tcp.extend(&options[..usize::from(words - 5) * 4]);
            tcp.resize(tcp.len() + payload, 7);
            let frame = wire::ip(&addresses(), to.0, IpProtocol::Tcp, &tcp);
            guest.stack.transmit(&frame, &left(if six { V6 } else { V4 }, 16), Instant::now());
            // SYN alone asks for a connection; SYN with FIN or an acknowledgement does not, whatever the options are.
            let asks = bits & 0x17 == 2;
            prop_assert!(asks || guest.stack.counters().tcp_connections == 0);
            guest.stack.set_policy(NetworkPolicy::none(), Instant::now());
            guest.frames();
            guest.stack.set_policy(bounded().policy, Instant::now());
        }
    }

    /// ARP of any kind: an answer goes to the guest's own question only, and never claims the guest's address.
    #[test]
    fn arp_answers_the_guests_own_questions_alone(
        body in prop::collection::vec(any::<u8>(), 0..28),
        right in 0usize..28,
        change in (0usize..28, any::<u8>()),
        cut in prop_oneof![4 => Just(28), 1 => 0usize..28],
    ) {
        let link = addresses();
        let mut whole = vec![0, 1, 8, 0, 6, 4, 0, 1];
        whole.extend(link.guest_mac);
        whole.extend(link.guest_v4.octets());
        whole.extend([0; 6]);
        whole.extend(link.gateway_v4.octets());
        // One byte is another, some are any, or it is cut off.
        whole[change.0] = change.1;
        for (there, byte) in whole.iter_mut().zip(&body).skip(right) {
            *there = *byte;
        }
        whole.truncate(cut);
        let mut frame = [link.gateway_mac, link.guest_mac].concat();
        frame.extend([8, 6]);
        frame.extend(&whole);
        let mut guest = Guest::new(config(NetworkPolicy::all()));
        let answers = guest.send(&frame);
        let sender = |arp: &[u8]| arp.len() == 28 && arp[8..14] == link.guest_mac;
        prop_assert!(answers.len() <= 1);
        if let Some(answer) = answers.first() {
            prop_assert!(sender(&whole) && whole[..8] == [0, 1, 8, 0, 6, 4, 0, 1]);
            prop_assert!(answer[ETHERNET + 14..ETHERNET + 18] == whole[24..28]);
            prop_assert!(answer[ETHERNET + 14..ETHERNET + 18] != link.guest_v4.octets());
        }
    }

    /// ICMP of any kind, with its checksum right: only an echo request is answered, by one echo.
    #[test]
    fn icmp_answers_echo_requests_alone(six: bool, kind: u8, code: u8, body in prop::collection::vec(any::<u8>(), 0..64)) {
        let link = addresses();
        let to: IpAddr = if six { link.gateway_v6.into() } else { link.gateway_v4.into() };
        let mut icmp = vec![kind, code, 0, 0];
        icmp.extend(&body);
        let protocol = if six { IpProtocol::Icmpv6 } else { IpProtocol::Icmp };
        let pseudo = if six {
            let len = u32::try_from(icmp.len()).unwrap();
            smoltcp::wire::checksum::pseudo_header(&link.guest_v6.into(), &to.into(), protocol, len)
        } else {
            0
        };
        let data = smoltcp::wire::checksum::data(&icmp);
        set(&mut icmp, 2, !smoltcp::wire::checksum::combine(&[pseudo, data]));
        let mut guest = Guest::new(bounded());
        let answers = guest.send(&wire::ip(&link, to, protocol, &icmp));
        let asked = kind == if six { 128 } else { 8 } && code == 0;
        prop_assert!(answers.len() <= usize::from(asked), "{kind} {code}: {} answers", answers.len());
        for answer in answers {
            let echo = matches!(read(&link, &answer), Seen::Echo { .. });
            prop_assert!(echo);
        }
    }

    /// Questions that are none: counts that lie, labels that are too long, pointers that run in circles.
    #[test]
    fn questions_that_are_none_take_no_lookup(
        flags: u16,
        counts in prop::array::uniform4(prop_oneof![Just(0u16), Just(1), any::<u16>()]),
        name in prop::collection::vec(prop_oneof![Just(0u8), Just(63), Just(64), Just(0xc0), Just(12), any::<u8>()], 0..300),
    ) {
        let mut message = vec![0, 7];
        message.extend(flags.to_be_bytes());
        message.extend(counts.into_iter().flat_map(u16::to_be_bytes));
        message.extend(name);
        let link = addresses();
        let mut guest = Guest::new(bounded());
        let answers = guest.send(&wire::udp(&link, 5353, (link.gateway_v4.into(), 53), &message));
        // One answer at most, to who asked; an answer is never answered, or two resolvers would talk for ever.
        prop_assert!(answers.len() <= 1);
        prop_assert!(flags & 0x8000 == 0 || answers.is_empty());
        for answer in answers {
            let Seen::Udp { to, payload, .. } = read(&link, &answer) else { panic!("{answer:?}") };
            prop_assert_eq!(to, 5353);
            prop_assert!(payload[..2] == [0, 7] && payload[2] & 0x80 != 0);
            prop_assert!(payload.len() <= message.len().max(12), "no more than was asked for");
        }
    }
}

/// A stack that reaches nobody but this host.
fn bounded() -> Config {
    let policy = NetworkPolicy::none().rule(Rule::allow().net("127.0.0.0/8".parse().unwrap()));
    let limits = Limits { tcp_connections: 8, half_open: 4, udp_flows: 4, ..Limits::default() };
    Config { limits, ..config(policy) }
}

/// The frames without a lie are delivered: it is the lies that go nowhere.
#[test]
fn the_same_frames_without_a_lie_are_delivered() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new(config(NetworkPolicy::all()));
    let to = host(server.local_addr().unwrap().port());
    let frame = wire::udp(&addresses(), 5, (to.ip(), to.port()), b"payload");
    guest.stack.transmit(&frame, &left(V4, 6), Instant::now());
    let mut came = [0; 16];
    assert_eq!(server.recv(&mut came).unwrap(), 7);
    let to = host(listener.local_addr().unwrap().port());
    let frame = wire::syn(&addresses(), 5, (to.ip(), to.port()), 1);
    guest.stack.transmit(&frame, &left(V4, 16), Instant::now());
    assert_eq!(guest.stack.counters().tcp_connections, 1);
}
