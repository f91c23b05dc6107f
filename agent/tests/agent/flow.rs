//! Windows and throughput: nobody gets more than they take, and nobody waits for somebody else.

use cubby_protocol::message::{Credit, Fatal, Open};
use cubby_protocol::{CHUNK, INITIAL_WINDOW, Kind};

use crate::client::{Agent, command, shell};

#[test]
fn a_hundred_mebibytes_come_through_in_order() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let size = 100usize << 20;
    let outcome = client.run(&shell("seq -w 0 99999999 | head -c 104857600"));
    assert_eq!(outcome.stdout.len(), size);
    for (line, text) in outcome.stdout.chunks_exact(9).enumerate().step_by(9973) {
        assert_eq!(std::str::from_utf8(text).unwrap(), format!("{line:08}\n"));
    }
}

#[test]
fn output_stops_at_the_window_and_both_streams_share_it() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.open(&shell("yes & yes >&2 & wait"));
    let mut taken = 0;
    while taken < INITIAL_WINDOW as usize {
        if let (Kind::Stdout | Kind::Stderr, _, payload) = client.frame().unwrap() {
            taken += payload.len();
        }
    }
    assert_eq!(taken, INITIAL_WINDOW as usize);
    // Frames are in order: were there more output, it would come before the answer.
    client.send_raw(Kind::Ping, cubby_protocol::SessionId(0), b"p");
    assert_eq!(client.frame().unwrap().0, Kind::Pong);
    client.send(Kind::Credit, id, &Credit { bytes: 5 });
    let mut more = 0;
    while more < 5 {
        let (kind, _, payload) = client.frame().unwrap();
        assert!(matches!(kind, Kind::Stdout | Kind::Stderr));
        more += payload.len();
    }
    assert_eq!(more, 5);
}

#[test]
fn a_stalled_reader_delays_nobody() {
    let agent = Agent::start();
    let (mut stalled, mut other) = (agent.connect(), agent.connect());
    let big = stalled.open(&command("yes", &[]));
    stalled.send(Kind::Credit, big, &Credit { bytes: u32::MAX });
    for _ in 0..20 {
        assert_eq!(other.run(&shell("echo hello")).text(), "hello\n");
    }
    // A second session of the same client is not delayed by the first one's exhausted window either.
    let mut both = agent.connect();
    both.open(&command("yes", &[]));
    let mut taken = 0;
    while taken < INITIAL_WINDOW as usize {
        taken +=
            both.frame().map_or(0, |(kind, _, payload)| if kind == Kind::Stdout { payload.len() } else { 0 });
    }
    assert_eq!(both.run(&shell("echo hello")).text(), "hello\n");
}

#[test]
fn standard_input_flows_with_credit_and_ends() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.open(&Open { stdin: true, ..command("wc", &["-c"]) });
    let (chunk, total) = (vec![b'x'; CHUNK], 10usize << 20);
    let mut sent = 0;
    while sent < total {
        let allowed = |credit: u64| u64::from(INITIAL_WINDOW) + credit - sent as u64;
        client.until(id, |outcome| allowed(outcome.stdin_credit) >= CHUNK as u64);
        client.send_raw(Kind::Stdin, id, &chunk);
        sent += CHUNK;
    }
    client.send_raw(Kind::StdinClose, id, b"");
    assert_eq!(client.wait(id).text().trim(), total.to_string());
}

#[test]
fn input_that_a_command_does_not_read_is_dropped_and_credited() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.open(&Open { stdin: true, ..shell("exec <&-; echo closed; sleep 1000") });
    client.until(id, |outcome| outcome.text() == "closed\n");
    for _ in 0..INITIAL_WINDOW as usize / CHUNK {
        client.send_raw(Kind::Stdin, id, &vec![0; CHUNK]);
    }
    client.until(id, |outcome| outcome.stdin_credit >= u64::from(INITIAL_WINDOW));
}

#[test]
fn overrunning_the_input_window_costs_the_client_its_connection_and_nobody_else() {
    let agent = Agent::start();
    let (mut greedy, mut other) = (agent.connect(), agent.connect());
    let id = greedy.open(&Open { stdin: true, ..command("sleep", &["1000"]) });
    let pid = greedy.until(id, |outcome| outcome.pid.is_some()).pid.unwrap();
    for _ in 0..INITIAL_WINDOW as usize / CHUNK {
        greedy.send_raw(Kind::Stdin, id, &vec![0; CHUNK]);
    }
    greedy.send_raw(Kind::Stdin, id, &vec![0; CHUNK]);
    // The pipe took its first 64 KiB, too little for credit: the last frame is over the window.
    assert!(matches!(greedy.fatal(), Fatal::Protocol(why) if why.contains("window")));
    crate::client::wait_gone(pid);
    assert_eq!(other.run(&shell("echo fine")).text(), "fine\n");
}
