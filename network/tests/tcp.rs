//! TCP between a guest with a TCP of its own and real sockets of this host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use cubby_network::policy::Rule;
use cubby_network::{Config, DeniedBy, Limits, NetworkEvent, NetworkPolicy};
use guest::{Active, Guest, config, host, host6, pattern};
use smoltcp::socket::tcp::State;

/// A server of this host that serves one connection.
fn serve(work: impl FnOnce(TcpStream) + Send + 'static) -> (u16, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, thread::spawn(move || work(listener.accept().unwrap().0)))
}

fn all() -> Config {
    config(NetworkPolicy::all())
}

fn echo(mut stream: TcpStream) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
}

#[test]
fn what_is_said_comes_back_and_both_ends_end() {
    let (port, server) = serve(echo);
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    let said = pattern(3 << 20);
    assert!(guest.exchange(socket, &said) == said);
    server.join().unwrap();
    let events = guest.events();
    assert!(
        matches!(&events[..], [NetworkEvent::Connected { peer, .. }] if *peer == SocketAddr::from(([127, 0, 0, 1], port))),
        "{events:?}"
    );
    guest.until("the connection is forgotten", |guest| guest.stack.counters().tcp_connections == 0);
    assert_eq!(guest.stack.counters().buffered, 0);
}

#[test]
fn the_same_by_ipv6() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || echo(listener.accept().unwrap().0));
    let mut guest = Guest::new(all());
    let socket = guest.connect(host6(port));
    let said = pattern(100_000);
    assert!(guest.exchange(socket, &said) == said);
    server.join().unwrap();
}

#[test]
fn a_refused_port_refuses() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    guest.until("it is refused", |guest| guest.tcp(socket).state() == State::Closed);
    let counters = guest.stack.counters();
    assert_eq!((counters.tcp_failed, counters.tcp_opened, counters.tcp_connections), (1, 0, 0));
}

#[test]
fn what_the_policy_denies_is_refused_at_once_and_told() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let rule = Rule::deny().net("127.0.0.0/8".parse().unwrap()).ports(port);
    let mut guest = Guest::new(config(NetworkPolicy::all().rule(rule)));
    let socket = guest.connect(host(port));
    guest.until("it is refused", |guest| guest.tcp(socket).state() == State::Closed);
    let events = guest.events();
    let by = DeniedBy::Policy(cubby_network::policy::By::Rule(0));
    assert!(matches!(&events[..], [NetworkEvent::Denied { by: told, .. }] if *told == by), "{events:?}");
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "nobody has called");
}

#[test]
fn another_policy_breaks_off_what_it_denies() {
    let (port, server) = serve(|mut stream| {
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    guest.until("it is open", |guest| guest.tcp(socket).may_send());
    guest.events();
    guest.stack.set_policy(NetworkPolicy::public(), std::time::Instant::now());
    let events = guest.events();
    let [NetworkEvent::Denied { by: DeniedBy::Policy(by), .. }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(guest.stack.policy().explain(*by), "no rule, and the policy is public");
    guest.until("the guest is told", |guest| guest.tcp(socket).state() == State::Closed);
    server.join().unwrap();
}

#[test]
fn half_closed_works_both_ways() {
    // The server ends first and still hears everything.
    let (port, server) = serve(|mut stream| {
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        assert!(heard == pattern(300_000));
    });
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    guest.until("the server has ended", |guest| guest.tcp(socket).state() == State::CloseWait);
    assert_eq!(guest.exchange(socket, &pattern(300_000)), b"bye");
    server.join().unwrap();
}

#[test]
fn a_stack_that_ends_ends_those_in_order_who_have_heard_all() {
    for (finished, expected) in [(false, Err(ErrorKind::ConnectionReset)), (true, Ok(0))] {
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let (port, server) = serve(move |mut stream| {
            gone.recv().unwrap();
            assert_eq!(stream.read(&mut [0]).map_err(|error| error.kind()), expected);
        });
        let mut guest = Guest::new(all());
        let socket = guest.connect(host(port));
        guest.until("it is open", |guest| guest.tcp(socket).may_send());
        if finished {
            guest.tcp(socket).close();
            guest.until("the end is heard", |guest| guest.tcp(socket).state() == State::FinWait2);
        }
        guest.stack.end();
        go.send(()).unwrap();
        server.join().unwrap();
    }
}

#[test]
fn a_reset_of_the_host_reaches_the_guest_and_the_other_way_round() {
    let (go, opened) = std::sync::mpsc::channel::<()>();
    let (port, server) = serve(move |stream| {
        opened.recv().unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    });
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    guest.until("it is open", |guest| guest.tcp(socket).may_send());
    go.send(()).unwrap();
    guest.until("it was open and is reset", |guest| guest.tcp(socket).state() == State::Closed);
    server.join().unwrap();
    assert_eq!(guest.stack.counters().tcp_opened, 1);

    let (port, server) = serve(|mut stream| {
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
    let socket = guest.connect(host(port));
    guest.until("it is open", |guest| guest.tcp(socket).may_send());
    guest.tcp(socket).abort();
    guest.until("it is forgotten", |guest| guest.stack.counters().tcp_connections == 0);
    server.join().unwrap();
}

#[test]
fn who_does_not_read_stops_who_writes() {
    // The host's side does not read: the guest may fill the host's socket and our window, and no more.
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (port, server) = serve(move |mut stream| {
        wait.recv().unwrap();
        let mut heard = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                n => heard += n,
            }
        }
        assert_eq!(heard, 24 << 20);
    });
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    let chunk = pattern(32 << 10);
    let mut sent = 0;
    let mut still = 0;
    guest.until("the window closes", |guest| {
        let before = sent;
        let tcp = guest.tcp(socket);
        if tcp.can_send() {
            sent += tcp.send_slice(&chunk).unwrap();
        }
        still = if sent == before { still + 1 } else { 0 };
        still > 200
    });
    assert!(sent < 20 << 20, "{sent} bytes were taken for somebody who reads none");
    assert!(guest.stack.counters().buffered <= 1 << 20);
    go.send(()).unwrap();
    guest.until("the rest goes", |guest| {
        let tcp = guest.tcp(socket);
        if tcp.can_send() && sent < 24 << 20 {
            let n = chunk.len().min((24 << 20) - sent);
            sent += tcp.send_slice(&chunk[..n]).unwrap();
        }
        if sent == 24 << 20 && tcp.may_send() {
            tcp.close();
        }
        !guest.tcp(socket).is_active_state() || guest.stack.counters().tcp_connections == 0
    });
    server.join().unwrap();
}

#[test]
fn a_guest_that_does_not_read_stops_the_host() {
    let (port, server) = serve(|mut stream| {
        stream.set_nonblocking(true).unwrap();
        let chunk = pattern(1 << 16);
        let (mut sent, mut still) = (0usize, 0);
        while still < 200 {
            match stream.write(&chunk) {
                Ok(n) => (sent, still) = (sent + n, 0),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    still += 1;
                    let mut fds = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::OUT)];
                    let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
                    rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
                }
            }
        }
        assert!(sent < 20 << 20, "{sent} bytes were taken for somebody who reads none");
    });
    let mut guest = Guest::new(all());
    let socket = guest.connect(host(port));
    guest.until("the server has given up", |_| server.is_finished());
    server.join().unwrap();
    assert!(guest.stack.counters().buffered <= 1 << 20);
    let mut heard = 0;
    guest.until("the rest comes", |guest| {
        let tcp = guest.tcp(socket);
        if tcp.can_recv() {
            heard += tcp.recv(|data| (data.len(), data.len())).unwrap();
        }
        !guest.tcp(socket).may_recv()
    });
    assert!(heard > 64 << 10);
}

#[test]
fn limits_refuse_and_do_not_hang() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let limits = Limits { tcp_connections: 3, ..Limits::default() };
    let mut guest = Guest::new(Config { limits, ..all() });
    let open: Vec<_> = (0..3).map(|_| guest.connect(host(port))).collect();
    guest.until("three are open", |guest| open.iter().all(|socket| guest.tcp(*socket).may_send()));
    let fourth = guest.connect(host(port));
    guest.until("the fourth is refused", |guest| guest.tcp(fourth).state() == State::Closed);
    assert!(
        guest
            .events()
            .iter()
            .any(|event| matches!(event, NetworkEvent::Denied { by: DeniedBy::Connections, .. }))
    );

    let limits = Limits { new_flows_per_second: Some(2), ..Limits::default() };
    let mut guest = Guest::new(Config { limits, ..all() });
    let many: Vec<_> = (0..5).map(|_| guest.connect(host(port))).collect();
    guest.until("each has an answer", |guest| {
        many.iter().all(|socket| guest.tcp(*socket).may_send() || guest.tcp(*socket).state() == State::Closed)
    });
    let refused = guest
        .events()
        .iter()
        .filter(|it| matches!(it, NetworkEvent::Denied { by: DeniedBy::Rate, .. }))
        .count();
    assert!((1..=3).contains(&refused), "{refused}");
}
