//! The guest's resolver, with servers of this host behind it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use cubby_network::policy::{By, Rule};
use cubby_network::{Config, DeniedBy, HOST_NAME, NetworkEvent, NetworkPolicy, Resolvers};
use guest::wire::{self, Seen, read};
use guest::{Guest, addresses, config};
use smoltcp::socket::tcp::State;

/// A question for the addresses of a name.
fn question(id: u16, name: &str, kind: u8) -> Vec<u8> {
    let mut message = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message[..2].copy_from_slice(&id.to_be_bytes());
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap());
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, kind, 0, 1]);
    message
}

/// An answer with these IPv4 addresses.
fn answer(asked: &[u8], ttl: u32, addresses: &[Ipv4Addr]) -> Vec<u8> {
    let mut message = asked.to_vec();
    message[2] |= 0x80;
    message[3] |= 0x80;
    message[7] = u8::try_from(addresses.len()).unwrap();
    for address in addresses {
        message.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        message.extend_from_slice(&ttl.to_be_bytes());
        message.extend_from_slice(&[0, 4]);
        message.extend_from_slice(&address.octets());
    }
    message
}

/// The addresses in an answer whose names are all compressed, and how it went.
fn addresses_of(message: &[u8], asked: &[u8]) -> (u8, Vec<Ipv4Addr>) {
    assert_eq!(&message[..2], &asked[..2]);
    assert_eq!(&message[12..asked.len()], &asked[12..]);
    let records = message[asked.len()..].chunks(16);
    (message[3] & 15, records.map(|it| <[u8; 4]>::try_from(&it[12..]).unwrap().into()).collect())
}

/// A server of this host by UDP; tells of each question.
fn server(reply: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> (SocketAddr, Receiver<Vec<u8>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let (tell, told) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((n, client)) = socket.recv_from(&mut buffer) {
            for answer in reply(&buffer[..n]) {
                socket.send_to(&answer, client).unwrap();
            }
            if tell.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    (address, told)
}

fn asking(policy: NetworkPolicy, servers: Vec<SocketAddr>) -> Guest {
    let mut guest = Guest::new(Config { resolvers: Resolvers::Fixed(servers), ..config(policy) });
    guest.keep = true;
    guest
}

fn ask(guest: &mut Guest, asked: &[u8]) -> Vec<u8> {
    let link = addresses();
    let gateway = IpAddr::from(link.gateway_v4);
    let now = std::time::Instant::now();
    guest.stack.transmit(&wire::udp(&link, 3333, (gateway, 53), asked), &Default::default(), now);
    guest.until("an answer comes", |guest| !guest.seen.is_empty());
    match read(&link, &guest.seen.remove(0)) {
        Seen::Udp { from, to: 3333, payload } if from == (gateway, 53) => payload,
        other => panic!("{other:?}"),
    }
}

const PUBLIC: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 2);

#[test]
fn names_are_looked_up_once_and_then_known() {
    let (address, told) = server(|asked| vec![answer(asked, 300, &[PUBLIC])]);
    let mut guest = asking(NetworkPolicy::public(), vec![address]);
    for (id, name) in [(1, "www.example.com"), (2, "WWW.Example.COM")] {
        let asked = question(id, name, 1);
        assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (0, vec![PUBLIC]));
    }
    told.recv().unwrap();
    assert!(told.try_recv().is_err(), "it was asked once");
    let counters = guest.stack.counters();
    assert_eq!((counters.lookups, counters.lookups_cached), (2, 1));
}

#[test]
fn the_number_of_a_question_is_not_the_guests_and_wrong_answers_are_not_taken() {
    let (address, told) = server(|asked| {
        let right = answer(asked, 300, &[PUBLIC]);
        let mut wrong_id = answer(asked, 300, &[OTHER]);
        wrong_id[0] ^= 1;
        let mut wrong_name = answer(asked, 300, &[OTHER]);
        wrong_name[13] ^= 1;
        vec![wrong_id, wrong_name, vec![1, 2, 3], right]
    });
    let mut guest = asking(NetworkPolicy::public(), vec![address]);
    let mut numbers = Vec::new();
    for id in 0..8 {
        let asked = question(0, &format!("a{id}.example.com"), 1);
        assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (0, vec![PUBLIC]));
        numbers.push(told.recv().unwrap()[..2].to_vec());
    }
    numbers.sort();
    numbers.dedup();
    assert!(numbers.len() >= 7, "{numbers:?}");
}

#[test]
fn a_denied_name_does_not_exist_and_is_told() {
    let (address, told) = server(|asked| vec![answer(asked, 300, &[PUBLIC])]);
    let rule = Rule::deny().name("*.example.com".parse().unwrap());
    let mut guest = asking(NetworkPolicy::public().rule(rule), vec![address]);
    let asked = question(9, "ads.example.com", 1);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (3, vec![]));
    let denied =
        NetworkEvent::NameDenied { name: "ads.example.com".into(), by: DeniedBy::Policy(By::Rule(0)) };
    assert_eq!(guest.events(), [denied]);
    assert!(told.try_recv().is_err(), "nobody was asked");
}

#[test]
fn answers_with_private_addresses_are_dropped_and_told() {
    let private = Ipv4Addr::new(192, 168, 1, 1);
    let (address, _told) =
        server(move |asked| vec![answer(asked, 300, &[private, PUBLIC, Ipv4Addr::LOCALHOST])]);
    let mut guest = asking(NetworkPolicy::public(), vec![address]);
    let asked = question(9, "rebind.example.com", 1);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (0, vec![PUBLIC]));
    let dropped: Vec<_> = guest
        .events()
        .into_iter()
        .map(|event| match event {
            NetworkEvent::AnswerDropped { address, .. } => address,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(dropped, [IpAddr::from(private), Ipv4Addr::LOCALHOST.into()]);

    let mut guest = asking(NetworkPolicy::all(), vec![address]);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked).1.len(), 3);
}

#[test]
fn a_name_rule_holds_for_addresses_that_the_name_has_led_to() {
    let (led, beside) = (Ipv4Addr::new(127, 0, 9, 1), Ipv4Addr::new(127, 0, 9, 2));
    let listeners = [led, beside].map(|address| TcpListener::bind((address, 0)).unwrap());
    let [port, other] = listeners.each_ref().map(|it| it.local_addr().unwrap().port());
    let (address, _told) = server(move |asked| vec![answer(asked, 300, &[led])]);
    let rule = Rule::allow().name("good.example.com".parse().unwrap()).net("127.0.0.0/8".parse().unwrap());
    let mut guest = asking(NetworkPolicy::none().rule(rule), vec![address]);
    let link = addresses();
    let call = |guest: &mut Guest, from, to: (IpAddr, u16)| {
        guest.stack.transmit(&wire::syn(&link, from, to, 1), &Default::default(), std::time::Instant::now());
        guest.until("an answer comes", |guest| !guest.seen.is_empty());
        read(&link, &guest.seen.remove(0))
    };
    let to = (led.into(), port);
    assert_eq!(call(&mut guest, 1000, to), Seen::Reset { from: to, to: 1000 }, "no name has led there yet");
    let asked = question(9, "good.example.com", 1);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (0, vec![led]));
    assert_eq!(call(&mut guest, 1001, to), Seen::SynAck { from: to, to: 1001 });
    let to = (beside.into(), other);
    assert_eq!(
        call(&mut guest, 1002, to),
        Seen::Reset { from: to, to: 1002 },
        "an address beside it is closed"
    );
}

#[test]
fn the_hosts_own_name_leads_to_the_host() {
    let link = addresses();
    let mut guest = asking(NetworkPolicy::public(), Vec::new());
    let asked = question(9, HOST_NAME, 1);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (0, vec![link.host_v4]));
    let asked = question(9, HOST_NAME, 28);
    let six = ask(&mut guest, &asked);
    assert_eq!(six[six.len() - 16..], link.host_v6.octets());
}

#[test]
fn a_server_that_is_not_there_is_passed_over_and_none_is_a_failure() {
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (address, _told) = server(|asked| vec![answer(asked, 300, &[PUBLIC])]);
    let mut guest = asking(NetworkPolicy::public(), vec![nobody, address]);
    let asked = question(9, "a.example.com", 1);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (0, vec![PUBLIC]));
    let mut guest = asking(NetworkPolicy::public(), vec![nobody]);
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (2, vec![]));
    let mut guest = asking(NetworkPolicy::public(), Vec::new());
    assert_eq!(addresses_of(&ask(&mut guest, &asked), &asked), (2, vec![]));
}

#[test]
fn a_long_answer_is_cut_short_by_udp_and_whole_by_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let many: Vec<Ipv4Addr> = (0..200).map(|n| Ipv4Addr::new(93, 184, 2, n)).collect();
    // Beside it on the same port, by UDP, an answer that is as long.
    let udp = UdpSocket::bind(address).unwrap();
    let long = many.clone();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        let (n, client) = udp.recv_from(&mut buffer).unwrap();
        udp.send_to(&answer(&buffer[..n], 0, &long), client).unwrap();
    });
    let long = many.clone();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut asked = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut asked).unwrap();
        let message = answer(&asked, 300, &long);
        stream.write_all(&u16::try_from(message.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&message).unwrap();
    });
    let mut guest = asking(NetworkPolicy::public(), vec![address]);
    let asked = question(9, "many.example.com", 1);
    let short = ask(&mut guest, &asked);
    assert_eq!((short[2] & 2, short.len()), (2, asked.len()));

    guest.keep = false;
    let socket = guest.connect(SocketAddr::new(addresses().gateway_v4.into(), 53));
    let message = [&u16::try_from(asked.len()).unwrap().to_be_bytes(), asked.as_slice()].concat();
    let heard = guest.exchange(socket, &message);
    assert_eq!(addresses_of(&heard[2..], &asked), (0, many));
    guest.until("it is over", |guest| guest.tcp(socket).state() != State::Established);
}

#[test]
fn who_asks_by_tcp_and_ends_at_once_still_gets_the_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (go, wait) = channel::<()>();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut asked = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut asked).unwrap();
        wait.recv().unwrap();
        let message = answer(&asked, 300, &[PUBLIC]);
        stream.write_all(&u16::try_from(message.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&message).unwrap();
    });
    let mut guest = asking(NetworkPolicy::public(), vec![address]);
    guest.keep = false;
    let socket = guest.connect(SocketAddr::new(addresses().gateway_v4.into(), 53));
    guest.until("it is open", |guest| guest.tcp(socket).may_send());
    // The question and the end are one segment.
    let asked = question(9, "www.example.com", 1);
    let whole = [&u16::try_from(asked.len()).unwrap().to_be_bytes(), asked.as_slice()].concat();
    guest.tcp(socket).send_slice(&whole).unwrap();
    guest.tcp(socket).close();
    guest.until("the end is taken", |guest| guest.tcp(socket).state() != State::FinWait1);
    assert_eq!(guest.tcp(socket).state(), State::FinWait2, "the other side has not ended");
    go.send(()).unwrap();
    let mut heard = Vec::new();
    guest.until("the answer and the end come", |guest| {
        let tcp = guest.tcp(socket);
        if tcp.can_recv() {
            tcp.recv(|data| (data.len(), heard.extend_from_slice(data))).unwrap();
        }
        !tcp.may_recv()
    });
    assert_eq!(addresses_of(&heard[2..], &asked), (0, vec![PUBLIC]));
}

#[test]
fn questions_that_are_none_are_answered_so_or_not_at_all() {
    let link = addresses();
    let mut guest = asking(NetworkPolicy::public(), Vec::new());
    let mut update = question(9, "a.b", 1);
    update[2] = 5 << 3;
    assert_eq!(ask(&mut guest, &update)[3] & 15, 4);
    let mut two = question(9, "a.b", 1);
    two[5] = 2;
    assert_eq!(ask(&mut guest, &two)[3] & 15, 1);
    let mut reply = question(9, "a.b", 1);
    reply[2] |= 0x80;
    for nothing in [&reply[..], &[], &[1, 2, 3]] {
        assert_eq!(
            guest.send(&wire::udp(&link, 1, (link.gateway_v4.into(), 53), nothing)),
            Vec::<Vec<u8>>::new()
        );
    }
}
