//! Clients that break the protocol, many commands, and what is left afterwards.

use std::io::Write;

use cubby_protocol::message::{Fatal, Refused};
use cubby_protocol::{Hello, Kind, SessionId};

use crate::client::{Agent, End, command, shell};

#[test]
fn another_version_is_told_ours() {
    let agent = Agent::start();
    let mut client = agent.connect_raw();
    client.stream.write_all(&Hello { version: 999, ..Hello::OURS }.to_frame()).unwrap();
    assert_eq!(client.fatal(), Fatal::VersionMismatch { ours: Hello::OURS.version });
}

#[test]
fn bad_frames_end_their_sender_alone() {
    let agent = Agent::start();
    let mut witness = agent.connect();
    let header = |length: u32, kind: u8, reserved: u8, session: u32| {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend([kind, reserved, 0, 0]);
        bytes.extend(session.to_le_bytes());
        bytes
    };
    let bad = [
        header(0, 0xee, 0, 1),        // unknown kind
        header(u32::MAX, 0x47, 0, 1), // too long
        header(0, 0x48, 1, 1),        // reserved bits
        header(0, 0x40, 0, 1),        // an Open without a message
        header(0, 0x40, 0, 0),        // a session frame on the connection
        header(0, 0x44, 0, 1),        // the agent's own frame
        header(0, 0x10, 0, 0),        // the control connection's frame
        header(0, 0x4b, 0, 7),        // Credit without a message, for no session
        [header(3, 0x40, 0, 1), vec![0xff; 3]].concat(),
    ];
    for bytes in &bad {
        let mut client = agent.connect();
        client.stream.write_all(bytes).unwrap();
        assert!(matches!(client.fatal(), Fatal::Protocol(_)), "{bytes:02x?}");
    }
    let mut rude = agent.connect_raw();
    rude.send(Kind::Open, SessionId(1), &command("true", &[]));
    assert!(matches!(rude.fatal(), Fatal::Protocol(_)));
    let mut half = agent.connect();
    half.stream.write_all(&header(100, 0x40, 0, 1)).unwrap();
    drop(half);
    assert_eq!(witness.run(&shell("echo alive")).text(), "alive\n");
}

#[test]
fn frames_for_sessions_that_are_over_are_passed_over() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.open(&command("true", &[]));
    client.wait(id);
    client.send_raw(Kind::Stdin, id, b"late");
    client.send_raw(Kind::StdinClose, id, b"");
    client.send(Kind::Signal, id, &cubby_protocol::message::Signal { number: 15 });
    client.send(Kind::Credit, id, &cubby_protocol::message::Credit { bytes: 1 });
    client.send_raw(Kind::Ping, SessionId(0), b"payload");
    let (kind, session, payload) = client.frame().unwrap();
    assert_eq!((kind, session, payload.as_slice()), (Kind::Pong, SessionId(0), &b"payload"[..]));
}

#[test]
fn a_thousand_commands_leave_nothing_behind() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", agent.pid())).unwrap().count();
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    for _ in 0..50 {
        client.run(&shell("echo warm"));
    }
    let before = (count("fd"), count("task"), resident());
    for _ in 0..950 {
        assert_eq!(client.run(&command("true", &[])).code(), 0);
    }
    let after = (count("fd"), count("task"), resident());
    assert_eq!((after.0, after.1), (before.0, before.1));
    assert!(after.2 <= before.2 + 128, "grew from {} to {} KiB", before.2, after.2);
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid())).unwrap();
    assert_eq!(children, "", "children left");
}

#[test]
fn the_sessions_places_are_counted_and_come_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let max = cubby_agent::client::MAX_SESSIONS;
    let (_, hard) = (0, rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum);
    assert!(hard.is_none_or(|hard| hard > 4096), "this test needs open files");
    let ids: Vec<_> = (0..max).map(|_| client.open(&command("sleep", &["1000"]))).collect();
    for id in &ids {
        client.until(*id, |outcome| outcome.pid.is_some());
    }
    let refused = client.run(&command("true", &[]));
    assert_eq!(refused.end, Some(End::Refused(Refused::TooManySessions { max: 1024 })));
    let mut second = agent.connect();
    assert!(matches!(second.run(&command("true", &[])).end, Some(End::Refused(_))));
    drop(client);
    // The places are free as soon as the agent saw the first client go, which no frame announces.
    let deadline = std::time::Instant::now() + crate::client::LIMIT;
    while second.run(&command("true", &[])).end != Some(End::Exited(cubby_protocol::message::Exited::Code(0)))
    {
        assert!(std::time::Instant::now() < deadline, "no place came back");
    }
}
