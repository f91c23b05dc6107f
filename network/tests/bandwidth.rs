//! What a bandwidth promises: frames wait and are not lost, the rate is kept in both directions, and who shares it gets a
//! fair part.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

use cubby_network::{Bandwidth, Config, NetworkPolicy, Offload, Stack};
use guest::{Guest, addresses, config, host, pattern, wire};

/// Ten Mbit/s.
const RATE: u64 = 1_250_000;
/// What may pass at once.
const BURST: u64 = 128 << 10;

fn limited(from_guest: Option<u64>, to_guest: Option<u64>) -> Config {
    let rate = |rate: Option<u64>| rate.and_then(NonZeroU64::new);
    let bandwidth = Bandwidth { from_guest: rate(from_guest), to_guest: rate(to_guest) };
    Config { bandwidth, ..config(NetworkPolicy::all()) }
}

/// Pings the gateway as often as the stack lets it, for so long on a clock of the test's own, and gives the bytes of the
/// requests and of the answers. No socket is involved.
fn ping(config: Config, time: Duration) -> (u64, u64) {
    let begin = Instant::now();
    let mut stack = Stack::new(config, begin).unwrap();
    let link = addresses();
    let request = wire::echo(&link, link.gateway_v4.into(), 1, 1, &pattern(1400));
    let (mut now, mut sent, mut received) = (begin, 0, 0);
    while now < begin + time {
        let mut moved = false;
        // A guest with room for two answers sends no more requests than that before it has them.
        for _ in 0..2 {
            if stack.takes_frames(now) {
                stack.transmit(&request, &Offload::default(), now);
                sent += request.len() as u64;
                moved = true;
            }
        }
        for _ in 0..2 {
            if let Some(frame) = stack.receive(now) {
                received += frame.len() as u64;
                moved = true;
            }
        }
        assert!(sent + received < 1 << 30, "nothing holds it back");
        if !moved {
            let next = stack.next_deadline().unwrap();
            assert!(next > now, "it says at once, and does nothing");
            now = next;
            stack.on_time(now);
        }
    }
    (sent, received)
}

fn about(bytes: u64, expected: u64) -> bool {
    bytes.abs_diff(expected) <= expected / 100
}

#[test]
fn the_rate_is_kept_in_each_direction_by_itself() {
    let time = Duration::from_secs(60);
    let whole = RATE * 60 + BURST;
    let (sent, received) = ping(limited(Some(RATE), None), time);
    assert!(about(sent, whole) && received.abs_diff(sent) < 3000, "{sent} {received}");
    // Answers that the guest cannot fetch in time are lost by the thousand, as they are without a limit.
    let (_, received) = ping(limited(Some(10 * RATE), Some(RATE)), time);
    assert!(about(received, whole), "{received}");
}

#[test]
fn no_byte_is_lost_for_want_of_bandwidth() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    let mut guest = Guest::new(limited(Some(RATE), Some(RATE)));
    guest.hurry = true;
    let begin = guest.time();
    let socket = guest.connect(host(port));
    let said = pattern(3 << 20);
    assert!(guest.exchange(socket, &said) == said);
    server.join().unwrap();
    let took = (guest.time() - begin).as_secs_f64();
    // Both ways one after the other: 6 MiB less two bursts, and headers.
    let least = ((6 << 20) - 2 * BURST) as f64 / RATE as f64;
    assert!((least..least * 1.3).contains(&took), "{took} s, {least} s");
    assert_eq!(guest.stack.counters().replies_lost, 0);
}

#[test]
fn connections_share_what_there_is() {
    const CONNECTIONS: usize = 4;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let all: Vec<_> = (0..CONNECTIONS).map(|_| listener.accept().unwrap().0).collect();
        let senders: Vec<_> = all
            .into_iter()
            .map(|mut stream| {
                // Until the guest has had enough.
                thread::spawn(move || while stream.write_all(&[7; 1 << 16]).is_ok() {})
            })
            .collect();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
    let mut guest = Guest::new(limited(None, Some(RATE)));
    guest.hurry = true;
    let sockets: Vec<_> = (0..CONNECTIONS).map(|_| guest.connect(host(port))).collect();
    let mut received = [0usize; CONNECTIONS];
    guest.until("four MiB have come", |guest| {
        for (socket, received) in sockets.iter().zip(&mut received) {
            let socket = guest.tcp(*socket);
            if socket.can_recv() {
                *received += socket.recv(|data| (data.len(), data.len())).unwrap();
            }
        }
        received.iter().sum::<usize>() >= 4 << 20
    });
    let fair = received.iter().sum::<usize>() / CONNECTIONS;
    for part in received {
        assert!(part.abs_diff(fair) <= fair / 4, "{received:?}");
    }
    sockets.iter().for_each(|socket| guest.tcp(*socket).abort());
    guest.until("it is over", |guest| guest.stack.counters().tcp_connections == 0);
    server.join().unwrap();
}
