//! Events both ways: who gets them, in which order, and what becomes of those who are too fast, too slow or wrong.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cubby_protocol::message::{Credit, Event, Fatal, GuestMetrics, MAX_EVENT, Refused, Subscribe};
use cubby_protocol::{INITIAL_WINDOW, Kind, SessionId, decode};

use crate::client::{Agent, Client, LIMIT, shell};

fn subscribe(client: &mut Client, id: u32, name: Option<&str>) -> SessionId {
    let id = SessionId(id);
    client.send(Kind::Subscribe, id, &Subscribe { name: name.map(Into::into) });
    assert_eq!(client.frame().unwrap(), (Kind::Subscribed, id, Vec::new()));
    id
}

/// The next event of a session, which is credited: its line, and how many were lost before it.
fn event(client: &mut Client, id: SessionId) -> (String, u64) {
    let (kind, session, payload) = client.frame().unwrap();
    assert_eq!((kind, session), (Kind::Event, id));
    client.send(Kind::Credit, id, &Credit { bytes: payload.len().try_into().unwrap() });
    let event: Event<'_> = decode(&payload).unwrap();
    (event.line.into_owned(), event.dropped)
}

fn emit(client: &mut Client, id: u32, line: &str) {
    client.send_raw(Kind::Emit, SessionId(id), line.as_bytes());
    assert_eq!(client.frame().unwrap(), (Kind::Emitted, SessionId(id), Vec::new()));
}

/// A process that listens: it is known to the agent once this is back, because it has been told of a bad line.
fn listener(agent: &Agent) -> BufReader<UnixStream> {
    let mut stream = agent.guest();
    stream.write_all(b"?\n").unwrap();
    let mut lines = BufReader::new(stream);
    assert_eq!(line(&mut lines), "{\"error\":\"the line is not JSON at byte 1\"}");
    lines
}

fn line(lines: &mut BufReader<UnixStream>) -> String {
    let mut text = String::new();
    lines.read_line(&mut text).unwrap();
    assert_eq!(text.pop(), Some('\n'), "the connection ended");
    text
}

#[test]
fn events_go_both_ways_to_all_who_listen() {
    let agent = Agent::start();
    let (mut one, mut other) = (agent.connect(), agent.connect());
    let (all, only) = (subscribe(&mut one, 1, None), subscribe(&mut other, 1, Some("b")));
    let (mut first, mut second) = (listener(&agent), listener(&agent));
    first.get_mut().write_all(b"{\"event\":\"a\",\"data\":1}\n\n {\"event\":\"b\"}\r\n").unwrap();
    assert_eq!(event(&mut one, all), ("{\"event\":\"a\",\"data\":1}".into(), 0));
    assert_eq!(event(&mut one, all), ("{\"event\":\"b\"}".into(), 0));
    assert_eq!(event(&mut other, only), ("{\"event\":\"b\"}".into(), 0));
    emit(&mut one, 9, "{\"event\":\"go\",\"data\":[]}");
    for lines in [&mut first, &mut second] {
        assert_eq!(line(lines), "{\"event\":\"go\",\"data\":[]}");
    }
    // One that has said all it has to say may listen on, and its last line needs no newline.
    second.get_mut().write_all(b"{\"event\":\"last\"}").unwrap();
    second.get_mut().shutdown(Shutdown::Write).unwrap();
    assert_eq!(event(&mut one, all).0, "{\"event\":\"last\"}");
    emit(&mut other, 9, "{\"event\":\"on\"}");
    assert_eq!(line(&mut second), "{\"event\":\"on\"}");
}

#[test]
fn what_a_process_writes_before_it_is_gone_arrives_and_in_order() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = subscribe(&mut client, 1, None);
    emit(&mut client, 2, "{\"event\":\"unread\"}");
    for process in 0..8 {
        let mut stream = agent.guest();
        let lines: String =
            (0..100).map(|n| format!("{{\"event\":\"p{process}\",\"data\":{n}}}\n")).collect();
        stream.write_all(lines.as_bytes()).unwrap();
    }
    let mut next = [0; 8];
    for _ in 0..800 {
        let (line, dropped) = event(&mut client, id);
        assert_eq!(dropped, 0);
        let process = usize::from(line.as_bytes()[11] - b'0');
        assert_eq!(line, format!("{{\"event\":\"p{process}\",\"data\":{}}}", next[process]));
        next[process] += 1;
    }
    assert_eq!(next, [100; 8]);
}

#[test]
fn a_line_that_is_no_event_gets_an_answer_and_harms_nobody() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = subscribe(&mut client, 1, None);
    let mut lines = listener(&agent);
    for (bad, why) in [
        (&b"{\"event\":\"a\""[..], "the line is not JSON at byte 12"),
        (b"[\"a\",1]", "the line is no object whose event is a string"),
        (b"{\"event\":\"\"}", "an event's name has 1 to 256 bytes"),
        (b"\xff", "the line is not UTF-8"),
    ] {
        lines.get_mut().write_all(&[bad, b"\n"].concat()).unwrap();
        assert_eq!(line(&mut lines), format!("{{\"error\":\"{why}\"}}"));
    }
    // Longer than a line may be, by much; then exactly as long as it may be.
    let fits = format!("{{\"event\":\"{}\"}}", "x".repeat(200));
    let fits = format!("{fits}{}", " ".repeat(MAX_EVENT - fits.len()));
    for long in [format!("{fits} "), "x".repeat(3 * MAX_EVENT)] {
        lines.get_mut().write_all(format!("{long}\n").as_bytes()).unwrap();
        assert_eq!(line(&mut lines), "{\"error\":\"the line is longer than 262144 bytes\"}");
    }
    lines.get_mut().write_all(format!("{fits}\n").as_bytes()).unwrap();
    assert_eq!(event(&mut client, id), (fits.trim_end().into(), 0));
}

#[test]
fn a_subscriber_that_reads_nothing_loses_events_and_nobody_else_does() {
    let agent = Agent::start();
    let (mut stalled, mut live) = (agent.connect(), agent.connect());
    let dead = subscribe(&mut stalled, 1, None);
    let id = subscribe(&mut live, 1, None);
    // More than window and queue hold. The writer waits for the live one, so that it loses nothing.
    let text = "x".repeat(10_000);
    let (mut stream, count) = (agent.guest(), 400);
    for n in 0..count {
        stream.write_all(format!("{{\"event\":\"e\",\"data\":[{n},\"{text}\"]}}\n").as_bytes()).unwrap();
        let (line, dropped) = event(&mut live, id);
        assert!(line.starts_with(&format!("{{\"event\":\"e\",\"data\":[{n},")) && dropped == 0);
    }
    // The stalled one's own commands run as well, and then it learns how much it has missed.
    let outcome = stalled.frames_until_pong();
    let bytes: usize = outcome.iter().map(|(_, _, payload)| payload.len()).sum();
    assert!(bytes <= INITIAL_WINDOW as usize && !outcome.is_empty());
    let (mut got, mut lost) = (outcome.len(), 0);
    stalled.send(Kind::Credit, dead, &Credit { bytes: 1 << 30 });
    while got + lost < count {
        let (line, dropped) = event(&mut stalled, dead);
        lost += usize::try_from(dropped).unwrap();
        got += usize::from(!line.is_empty());
    }
    assert_eq!(got + lost, count);
    assert!(lost > 100 && got > 100, "{got} came and {lost} were lost");
}

#[test]
fn a_process_that_floods_delays_neither_commands_nor_pings() {
    let agent = Agent::start();
    let (mut subscriber, mut other) = (agent.connect(), agent.connect());
    subscribe(&mut subscriber, 1, None);
    let floods: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = agent.guest();
            std::thread::spawn(move || {
                let lines = "{\"event\":\"flood\",\"data\":null}\n".repeat(1000);
                let mut written = 0;
                while stream.write_all(lines.as_bytes()).is_ok() {
                    written += lines.len();
                }
                written
            })
        })
        .collect();
    for _ in 0..20 {
        other.send_raw(Kind::Ping, SessionId(77), b"p");
        assert_eq!(other.frame().unwrap().0, Kind::Pong);
        assert_eq!(other.run(&shell("echo hello")).text(), "hello\n");
    }
    drop(agent);
    assert!(floods.into_iter().map(|flood| flood.join().unwrap()).sum::<usize>() > 1 << 20);
}

#[test]
fn a_process_that_does_not_read_is_told_what_it_has_lost() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut lines = listener(&agent);
    let text = "x".repeat(MAX_EVENT / 2);
    for n in 0..20 {
        emit(&mut client, n + 1, &format!("{{\"event\":\"e\",\"data\":[{n},\"{text}\"]}}"));
    }
    let (mut next, mut lost) = (0, 0);
    while next + lost < 20 {
        let line = line(&mut lines);
        if let Some(count) = line.strip_prefix("{\"dropped\":") {
            lost += count.trim_end_matches('}').parse::<usize>().unwrap();
        } else {
            assert!(line.starts_with(&format!("{{\"event\":\"e\",\"data\":[{next},")), "{}", &line[..40]);
            next += 1;
        }
    }
    assert!(next >= 3 && lost >= 10, "{next} came, {lost} were lost");
    emit(&mut client, 99, "{\"event\":\"after\"}");
    assert_eq!(line(&mut lines), "{\"event\":\"after\"}");
}

#[test]
fn a_subscription_ends_when_asked_to_and_with_its_client() {
    let agent = Agent::start();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    let (a, b) = (subscribe(&mut client, 1, None), subscribe(&mut client, 2, None));
    client.send(Kind::Subscribe, a, &Subscribe { name: None });
    let (kind, _, payload) = client.frame().unwrap();
    assert_eq!((kind, decode(&payload)), (Kind::Refused, Ok(Refused::SessionInUse)));
    client.send_raw(Kind::Unsubscribe, a, b"");
    assert_eq!(client.frame().unwrap(), (Kind::Unsubscribed, a, Vec::new()));
    // Twice is once.
    client.send_raw(Kind::Unsubscribe, a, b"");
    agent.guest().write_all(b"{\"event\":\"x\"}\n").unwrap();
    assert_eq!(event(&mut client, b).0, "{\"event\":\"x\"}");
    drop(client);
    // Those of a client that is gone are gone: a thousand clients' would be more than there may be sessions.
    for _ in 0..1030 {
        subscribe(&mut agent.connect(), 1, None);
    }
    let id = subscribe(&mut other, 1, None);
    agent.guest().write_all(b"{\"event\":\"y\"}\n").unwrap();
    assert_eq!(event(&mut other, id).0, "{\"event\":\"y\"}");
}

#[test]
fn an_emit_that_is_no_line_ends_its_client() {
    let agent = Agent::start();
    for bad in ["{\"event\":\n\"a\"}".to_owned(), "x".repeat(MAX_EVENT + 1)] {
        let mut client = agent.connect();
        client.send_raw(Kind::Emit, SessionId(1), bad.as_bytes());
        assert!(matches!(client.fatal(), Fatal::Protocol(why) if why.contains("no line")));
    }
    emit(&mut agent.connect(), 1, &"x".repeat(MAX_EVENT));
}

#[test]
fn more_processes_than_there_is_room_for_are_told() {
    let agent = Agent::start();
    drop(agent.connect());
    let mut held: Vec<_> = (0..128).map(|_| listener(&agent)).collect();
    let mut one_more = BufReader::new(agent.guest());
    assert_eq!(
        line(&mut one_more),
        "{\"error\":\"128 processes are connected, which is all the agent takes\"}"
    );
    let mut end = String::new();
    assert_eq!(one_more.read_line(&mut end).unwrap(), 0);
    held.pop();
    let deadline = std::time::Instant::now() + LIMIT;
    // Its place is free once the agent has seen it go.
    loop {
        let mut stream = agent.guest();
        let written = stream.write_all(b"?\n");
        let mut text = String::new();
        match BufReader::new(stream).read_line(&mut text) {
            Ok(_) if text.contains("not JSON") => break,
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{written:?}"),
        }
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_user_may_connect() {
    use std::os::unix::fs::PermissionsExt;
    let agent = Agent::start();
    drop(agent.connect());
    let socket = agent.socket.with_extension("sock.events");
    assert_eq!(std::fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn the_agent_measures_what_is_around_it() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send_raw(Kind::Measure, SessionId(5), b"");
    let (kind, id, payload) = client.frame().unwrap();
    assert_eq!((kind, id), (Kind::Measured, SessionId(5)));
    let metrics: GuestMetrics = decode(&payload).unwrap();
    assert!(metrics.uptime_ns > 0 && metrics.cpus > 0 && metrics.processes > 0, "{metrics:?}");
    assert!(metrics.cpu.user_ns > 0 && metrics.cpu.idle_ns > 0, "{metrics:?}");
    assert!(metrics.memory.available > 0 && metrics.memory.available < metrics.memory.total, "{metrics:?}");
    assert!(metrics.root.used > 0 && metrics.root.used <= metrics.root.total, "{metrics:?}");
    assert!(metrics.interfaces.iter().any(|interface| interface.name == "lo"), "{metrics:?}");
}
