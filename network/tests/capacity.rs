//! Ten thousand connections at once, and what they take; and what happens when there is no descriptor left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod guest;

use std::net::TcpListener;
use std::time::Instant;

use cubby_network::{DeniedBy, NetworkEvent, NetworkPolicy, Offload};
use guest::wire::{self, Seen, read};
use guest::{Guest, addresses, config, host};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber};

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn limit_descriptors(current: u64) {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit }).unwrap();
}

/// Opens a connection from this port of the guest; whether it is refused.
fn open(guest: &mut Guest, listener: &TcpListener, from: u16) -> bool {
    let link = addresses();
    let to = host(listener.local_addr().unwrap().port());
    let syn = wire::syn(&link, from, (to.ip(), to.port()), 7);
    guest.stack.transmit(&syn, &Offload::default(), Instant::now());
    guest.until("it is answered", |guest| !guest.seen.is_empty());
    let answer = guest.seen.remove(0);
    match read(&link, &answer) {
        Seen::SynAck { .. } => {}
        Seen::Reset { .. } => return true,
        other => panic!("{other:?}"),
    }
    let ack = i32::from_be_bytes(answer[14 + 24..14 + 28].try_into().unwrap()).wrapping_add(1);
    let repr = TcpRepr {
        src_port: from,
        dst_port: to.port(),
        control: TcpControl::None,
        seq_number: TcpSeqNumber(8),
        ack_number: Some(TcpSeqNumber(ack)),
        window_len: 1000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    guest.stack.transmit(&wire::tcp(&link, to.ip(), &repr), &Offload::default(), Instant::now());
    false
}

/// One test, because both are about this process's descriptors.
#[test]
fn ten_thousand_connections_are_held_and_the_last_descriptor_is_a_refusal() {
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    assert!(hard >= 10_200, "this test needs 10,200 descriptors, and the hard limit is {hard} (ulimit -Hn)");
    limit_descriptors(10_200);
    // Connections wait in the queues of the listeners, where they take no descriptor of ours.
    let listeners = [0, 1, 2].map(|_| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 4000).unwrap();
        listener
    });
    let mut guest = Guest::new(config(NetworkPolicy::all()));
    guest.keep = true;
    let before = resident();
    for from in 1..=10_000u16 {
        assert!(!open(&mut guest, &listeners[usize::from(from) % 3], from), "{from} is refused");
    }
    let counters = guest.stack.counters();
    assert_eq!((counters.tcp_connections, counters.tcp_opened, counters.buffered), (10_000, 10_000, 0));
    let each = (resident() - before) / 10_000;
    assert!(each <= 1024, "an idle connection takes {each} bytes");
    // None of them costs anything while nothing happens.
    while let Some(deadline) = guest.stack.next_deadline() {
        guest.stack.on_time(deadline);
        assert!(guest.stack.receive(deadline).is_none());
    }

    let used = u64::try_from(std::fs::read_dir("/proc/self/fd").unwrap().count()).unwrap();
    limit_descriptors(used + 5);
    let refused = (10_001..=10_040).filter(|from| open(&mut guest, &listeners[0], *from)).count();
    assert!((30..40).contains(&refused), "{refused}");
    assert!(
        guest.events().iter().any(|it| matches!(it, NetworkEvent::Denied { by: DeniedBy::Connections, .. }))
    );
}
