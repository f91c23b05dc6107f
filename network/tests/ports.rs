//! Published ports: clients of this host, servers in the guest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;

use cubby_network::policy::Rule;
use cubby_network::{Config, NetworkEvent, NetworkPolicy, PublishedPort, Stack, StackError, Transport};
use guest::wire::{self, Seen, read};
use guest::{Guest, addresses, config, pattern};

fn publish(transport: Transport, host: &str, policy: NetworkPolicy) -> (Guest, SocketAddr) {
    let ports = vec![PublishedPort { transport, host: host.parse().unwrap(), guest: 80 }];
    let guest = Guest::new(Config { ports, ..config(policy) });
    let host = guest.stack.published()[0].host;
    assert_ne!(host.port(), 0);
    (guest, host)
}

#[test]
fn a_client_of_the_host_talks_to_a_server_in_the_guest() {
    for host in ["127.0.0.1:0", "[::1]:0"] {
        let (mut guest, host) = publish(Transport::Tcp, host, NetworkPolicy::public());
        let server = guest.listen(80);
        let client = thread::spawn(move || {
            let mut stream = TcpStream::connect(host).unwrap();
            let mut other = stream.try_clone().unwrap();
            let writer = thread::spawn(move || {
                other.write_all(&pattern(500_000)).unwrap();
                other.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).unwrap();
            writer.join().unwrap();
            assert!(heard == pattern(400_000));
        });
        guest.until("the client is there", |guest| guest.tcp(server).may_send());
        assert!(guest.exchange(server, &pattern(400_000)) == pattern(500_000));
        client.join().unwrap();
        assert!(matches!(&guest.events()[..], [NetworkEvent::Connected { .. }]));
    }
}

#[test]
fn a_port_where_the_guest_does_not_listen_resets_its_client() {
    let (mut guest, host) = publish(Transport::Tcp, "127.0.0.1:0", NetworkPolicy::public());
    let client = thread::spawn(move || TcpStream::connect(host).unwrap().read(&mut [0]).unwrap_err().kind());
    guest.until("the client is told", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), ErrorKind::ConnectionReset);
    assert_eq!(guest.stack.counters().tcp_connections, 0);
}

#[test]
fn a_rule_closes_a_published_port() {
    let policy = NetworkPolicy::public().rule(Rule::deny().inbound().ports(80));
    let (mut guest, host) = publish(Transport::Tcp, "127.0.0.1:0", policy);
    guest.listen(80);
    let client = thread::spawn(move || TcpStream::connect(host).unwrap().read(&mut [0]).unwrap_err().kind());
    guest.until("the client is told", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), ErrorKind::ConnectionReset);
    assert!(matches!(&guest.events()[..], [NetworkEvent::Denied { .. }]));
}

#[test]
fn datagrams_of_several_clients_are_kept_apart() {
    let link = addresses();
    let (mut guest, host) = publish(Transport::Udp, "127.0.0.1:0", NetworkPolicy::public());
    guest.keep = true;
    let clients = [0, 1, 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut froms = Vec::new();
    for round in 0..2u8 {
        for (n, client) in clients.iter().enumerate() {
            let text = [round, u8::try_from(n).unwrap()];
            client.send_to(&text, host).unwrap();
            guest.until("it comes", |guest| !guest.seen.is_empty());
            let Seen::Udp { from, to: 80, payload } = read(&link, &guest.seen.remove(0)) else { panic!() };
            assert_eq!(payload, text);
            froms.push(from);
            guest.send(&wire::udp(&link, 80, from, &[text[0], text[1], 7]));
            let mut buffer = [0; 8];
            let (n, server) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..n], server), ([text[0], text[1], 7].as_slice(), host));
        }
    }
    assert_eq!(froms[..3], froms[3..], "a client is the same each time");
    assert!(froms[0] != froms[1] && froms[1] != froms[2]);
}

#[test]
fn a_port_that_is_taken_is_an_error_that_names_it() {
    let (guest, host) = publish(Transport::Tcp, "127.0.0.1:0", NetworkPolicy::public());
    let ports = vec![PublishedPort { transport: Transport::Tcp, host, guest: 80 }];
    let error = Stack::new(Config { ports, ..Config::default() }, std::time::Instant::now()).unwrap_err();
    assert!(matches!(&error, StackError::Listen { address, .. } if *address == host), "{error}");
    drop(guest);
}
