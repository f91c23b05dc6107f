//! The network of a sandbox while it runs: rules that change, what happens there as events, and what is counted.

use std::time::Duration;

use cubby_tests::{builder, discard, name, next_output, python, shell, within};
use cubbyhole::network::{Direction, NetworkPolicy, Protocol, Rule};
use cubbyhole::{
    Bandwidth, Error, ExecHandle, ExitReason, NetworkEvent, NetworkEventKind, NetworkEventStream, Sandbox,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::network::PRELUDE;

/// A policy that lets guests talk to this host's loopback.
fn loopback() -> NetworkPolicy {
    NetworkPolicy::none().rule(Rule::allow().net("127.0.0.0/8".parse().unwrap()))
}

/// The same without one port, which the first rule denies.
fn without(port: u16) -> NetworkPolicy {
    let allowed = loopback().rules()[0].clone();
    NetworkPolicy::none().rule(Rule::deny().ports(port)).rule(allowed)
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

async fn accept(listener: &TcpListener) -> TcpStream {
    within("accept", listener.accept()).await.unwrap().0
}

async fn start(sandbox: &Sandbox, program: &str) -> ExecHandle {
    let program = format!("{PRELUDE}V4 = socket.gethostbyname(HOST)\n{program}");
    within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap()
}

async fn next(events: &mut NetworkEventStream) -> NetworkEvent {
    within("event", events.next()).await.unwrap().unwrap()
}

/// The next refusal.
async fn denial(events: &mut NetworkEventStream) -> NetworkEvent {
    loop {
        let event = next(events).await;
        if !matches!(event.kind, NetworkEventKind::Connected(_)) {
            return event;
        }
    }
}

#[tokio::test]
async fn new_rules_end_what_they_deny_and_nothing_else_now_and_after_a_start() {
    let name = name("rules");
    let creating = builder(&name).network(loopback()).create_detached();
    let sandbox = within("create", creating).await.unwrap();
    let ((kept, kept_at), (ended, ended_at)) = (listen().await, listen().await);
    let mut events = within("watch", sandbox.network_events()).await.unwrap();
    let program = format!(
        "a = socket.create_connection((V4, {kept_at}), 60)\n\
         b = socket.create_connection((V4, {ended_at}), 60)\n\
         try: print(b.recv(1))\n\
         except OSError as error: print(errno.errorcode[error.errno], flush=True)\n\
         a.sendall(b'still')\n\
         print(a.recv(100).decode(), flush=True)\n\
         print(refused(socket.SOCK_STREAM, V4, {ended_at}), refused(socket.SOCK_STREAM, V4, {kept_at}))\n"
    );
    let mut guest = start(&sandbox, &program).await;
    let (mut a, mut b) = (accept(&kept).await, accept(&ended).await);

    within("set", sandbox.set_network_policy(without(ended_at))).await.unwrap();
    // It was in force when the call returned, on both sides.
    let mut byte = [0; 5];
    let reset = within("reset", b.read(&mut byte)).await.unwrap_err();
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(next_output(&mut guest).await, "ECONNRESET\n");
    within("bytes", a.read_exact(&mut byte)).await.unwrap();
    assert_eq!(&byte, b"still");
    a.write_all(b"here").await.unwrap();
    assert_eq!(next_output(&mut guest).await, "here\n");
    drop(accept(&kept).await);
    assert_eq!(next_output(&mut guest).await, "ECONNREFUSED answered\n");
    for _ in 0..2 {
        let event = denial(&mut events).await;
        let NetworkEventKind::Denied { flow, by } = event.kind else { panic!("{event:?}") };
        assert_eq!(flow.peer, ended.local_addr().unwrap());
        assert_eq!((by.rule, by.why), (Some(0), format!("rule 0: deny port {ended_at}")));
    }

    // A guest that is paused finds the rules when it goes on: nothing passes in between.
    within("pause", sandbox.pause()).await.unwrap();
    within("set", sandbox.set_network_policy(NetworkPolicy::none())).await.unwrap();
    let silence = tokio::time::timeout(Duration::from_millis(500), a.read(&mut byte)).await;
    assert!(silence.is_err(), "{silence:?}");
    within("resume", sandbox.resume()).await.unwrap();
    let gone = within("end", a.read(&mut byte)).await;
    assert!(gone.is_err() || matches!(gone, Ok(0)), "{gone:?}");
    assert_eq!(sandbox.inspect().await.unwrap().config.network, NetworkPolicy::none());

    // With nobody to talk to it has no card after a start, and gets none while it runs.
    within("stop", sandbox.stop()).await.unwrap();
    let sandbox = within("start", Sandbox::start_detached(&name)).await.unwrap();
    assert_eq!(shell(&sandbox, "ls /sys/class/net").await, "lo\n");
    let refused = within("set", sandbox.set_network_policy(loopback())).await;
    assert!(matches!(refused, Err(Error::NoNetwork { .. })), "{refused:?}");
    let refused = within("watch", sandbox.network_events()).await.map(drop);
    assert!(matches!(refused, Err(Error::NoNetwork { .. })), "{refused:?}");
    assert_eq!(sandbox.metrics().await.unwrap().host_network, None);

    // One that has stopped gets its rules at its next start.
    within("stop", sandbox.stop()).await.unwrap();
    within("set", sandbox.set_network_policy(without(ended_at))).await.unwrap();
    let sandbox = within("start", Sandbox::start(&name)).await.unwrap();
    let program = format!(
        "host = socket.gethostbyname(HOST)\n\
         print(refused(socket.SOCK_STREAM, host, {ended_at}))\n\
         socket.create_connection((host, {kept_at}), 60)"
    );
    assert_eq!(python(&sandbox, &[PRELUDE, &program].concat()).await, "ECONNREFUSED\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn who_watches_the_network_sees_what_passes_and_what_does_not() {
    let policy = loopback().rule(Rule::deny().name("forbidden.test".parse().unwrap()));
    let creating = builder(&name("watched")).network(policy).idle_timeout(3).create();
    let sandbox = within("create", creating).await.unwrap();
    let mut both = Vec::new();
    for _ in 0..2 {
        both.push(within("watch", sandbox.network_events()).await.unwrap());
    }
    let (listener, at) = listen().await;
    let program = format!(
        "with socket.create_connection((V4, {at}), 60) as s: s.recv(1)\n\
         refused(socket.SOCK_DGRAM, '192.0.2.7', 7)\n\
         try: socket.gethostbyname('forbidden.test')\n\
         except OSError: pass\n"
    );
    let mut guest = start(&sandbox, &program).await;
    drop(accept(&listener).await);
    within("end", guest.wait()).await.unwrap();
    for events in &mut both {
        let event = next(events).await;
        let NetworkEventKind::Connected(flow) = event.kind else { panic!("{event:?}") };
        assert_eq!((flow.protocol, flow.direction), (Protocol::Tcp, Direction::Outbound));
        assert_eq!(flow.peer, listener.local_addr().unwrap());
        assert_eq!(flow.name, None, "no resolver has led to it");
        let event = denial(events).await;
        let NetworkEventKind::Denied { flow, by } = &event.kind else { panic!("{event:?}") };
        assert_eq!((flow.protocol, flow.peer), (Protocol::Udp, "192.0.2.7:7".parse().unwrap()));
        assert_eq!((by.rule, &*by.why), (None, "no rule, and the policy is none"));
        let event = denial(events).await;
        let NetworkEventKind::NameDenied { name, by } = &event.kind else { panic!("{event:?}") };
        assert_eq!((&**name, by.rule), ("forbidden.test", Some(1)));
        assert_eq!(events.dropped(), 0);
    }
    // Both still listen, and the sandbox is idle nevertheless.
    let report = within("idle", sandbox.wait()).await.unwrap();
    assert_eq!(report.reason, ExitReason::IdleTimeout);
    for mut events in both {
        let end = within("end", events.next()).await;
        assert!(matches!(end, Some(Err(Error::Ended { .. }))), "{end:?}");
        assert!(events.next().await.is_none());
    }
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_watcher_that_does_not_read_loses_events_and_holds_nobody() {
    const FLOWS: u64 = 12_000;
    let sandbox = within("create", builder(&name("slow-watcher")).create()).await.unwrap();
    let mut slow = within("watch", sandbox.network_events()).await.unwrap();
    // Each datagram is a flow of its own, and is refused. The guest's error queue is of no interest.
    let program = format!(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         for n in range({FLOWS}):\n    \
             try: s.sendto(b'x', ('10.%d.%d.1' % divmod(n, 250), 9))\n    \
             except OSError: pass\n\
         print(n + 1)"
    );
    let told = python(&sandbox, &[PRELUDE, &program].concat()).await;
    assert_eq!(told, format!("{FLOWS}\n"));
    let denied = within("metrics", sandbox.metrics()).await.unwrap().host_network.unwrap().denied;
    // A watcher in its own words: what it got and what it lost is all that there was.
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let mut fresh = within("watch", other.network_events()).await.unwrap();
    let program = "print(refused(socket.SOCK_STREAM, '10.0.0.1', 9))";
    assert_eq!(python(&sandbox, &[PRELUDE, program].concat()).await, "ECONNREFUSED\n");
    let last = next(&mut fresh).await;
    let mut got = 0;
    loop {
        let event = next(&mut slow).await;
        got += 1;
        if event == last {
            break;
        }
    }
    assert_eq!(got + slow.dropped(), denied + 1, "{got} came");
    assert!(slow.dropped() > 0 && got >= 1024, "{got} came");
    discard(sandbox).await;
}

#[tokio::test]
async fn what_a_guest_sends_is_counted_by_the_host_and_by_cause() {
    let sandbox = within("create", builder(&name("counted")).network(loopback()).create()).await.unwrap();
    let (listener, at) = listen().await;
    let before = sandbox.metrics().await.unwrap().host_network.unwrap();
    // 19 is IP_TRANSPARENT: a source address that is not the guest's.
    let program = format!(
        "open = socket.create_connection((V4, {at}), 60)\n\
         open.sendall(bytes(100000))\n\
         for n in range(3):\n    \
             with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:\n        \
                 s.setsockopt(socket.IPPROTO_IP, 19, 1)\n        \
                 s.bind(('198.18.0.77', 0))\n        \
                 s.sendto(b'x', ('198.18.0.254', 9))\n\
         print(refused(socket.SOCK_STREAM, '192.0.2.1', 9), flush=True)\n\
         sys.stdin.read()\n"
    );
    let mut guest = start(&sandbox, &program).await;
    let mut stream = accept(&listener).await;
    let mut bytes = vec![0; 100_000];
    within("bytes", stream.read_exact(&mut bytes)).await.unwrap();
    assert_eq!(next_output(&mut guest).await, "ECONNREFUSED\n");
    let metrics = sandbox.metrics().await.unwrap();
    let network = metrics.host_network.unwrap();
    assert_eq!(network.dropped.spoofed - before.dropped.spoofed, 3, "{network:?}");
    assert_eq!((network.tcp_opened, network.tcp_open, network.denied), (1, 1, 1), "{network:?}");
    assert!(network.sent_bytes > 100_000 && network.sent_frames > 3, "{network:?}");
    assert!(network.received_frames > 0 && network.received_bytes > network.received_frames * 14);
    let text = metrics.to_openmetrics();
    let name = sandbox.name();
    for line in [
        format!(
            "cubby_host_network_dropped_frames_total{{sandbox=\"{name}\",cause=\"spoofed\"}} {}",
            network.dropped.spoofed
        ),
        format!("cubby_host_network_open_connections{{sandbox=\"{name}\",transport=\"tcp\"}} 1"),
        format!("cubby_host_network_denied_total{{sandbox=\"{name}\",by=\"policy\"}} 1"),
    ] {
        assert!(text.lines().any(|other| other == line), "{line}\n{text}");
    }
    discard(sandbox).await;
}

#[tokio::test]
async fn a_bandwidth_is_kept_by_waiting_and_shared() {
    /// A million bytes in a second, each way.
    const BITS: u64 = 8_000_000;
    const LEN: usize = 2_000_000;
    let creating = builder(&name("bandwidth")).network(loopback()).bandwidth(Bandwidth::both(BITS)).create();
    let sandbox = within("create", creating).await.unwrap();
    let (listener, at) = listen().await;
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&vec![7; LEN]).await.unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.unwrap();
        back.len()
    });
    let program = format!(
        "import json\n\
         times = []\n\
         def timed(call):\n    \
             begin = time.monotonic()\n    \
             call()\n    \
             times.append(time.monotonic() - begin)\n\
         with socket.create_connection((V4, {at}), 60) as s:\n    \
             timed(lambda: s.makefile('rb').read({LEN}))\n    \
             timed(lambda: (s.sendall(bytes({LEN})), s.shutdown(1), s.recv(1)))\n\
         print(json.dumps(times))"
    );
    let program = format!("{PRELUDE}V4 = socket.gethostbyname(HOST)\n{program}");
    let times: Vec<f64> = serde_json::from_str(&python(&sandbox, &program).await).unwrap();
    assert_eq!(within("server", serving).await.unwrap(), LEN);
    // What may pass at once is 128 KiB; the rest takes its time, and a slow machine takes more.
    for seconds in times {
        assert!((1.8..6.0).contains(&seconds), "{seconds} s");
    }
    let (inside, outside) = (sandbox.metrics().await.unwrap().host_network.unwrap(), 2 * LEN as u64);
    assert!(inside.sent_bytes + inside.received_bytes > outside, "{inside:?}");
    discard(sandbox).await;
}

#[tokio::test]
async fn a_capture_has_the_frames_of_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("guest.pcap");
    let creating = builder(&name("capture")).network(loopback()).capture(&file).create();
    let sandbox = within("create", creating).await.unwrap();
    let (listener, at) = listen().await;
    let program = format!(
        "with socket.create_connection((V4, {at}), 60) as s:\n    \
             s.sendall(b'a word of the guest')\n    \
             s.recv(100)\n"
    );
    let mut guest = start(&sandbox, &program).await;
    let mut stream = accept(&listener).await;
    let mut word = [0; 19];
    within("word", stream.read_exact(&mut word)).await.unwrap();
    stream.write_all(b"a word of the host").await.unwrap();
    within("end", guest.wait()).await.unwrap();
    within("stop", sandbox.stop()).await.unwrap();

    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(bytes[..4], 0xa1b2_3c4d_u32.to_le_bytes(), "nanoseconds");
    let mut rest = &bytes[24..];
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let field = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap()) as usize;
        assert_eq!(field(8), field(12), "whole");
        frames.push(&rest[16..16 + field(8)]);
        rest = &rest[16 + field(8)..];
    }
    let guests_mac = [0x02, 0x63, 0x75, 0x62, 0x00, 0x02];
    for (word, mac) in [("a word of the guest", 6), ("a word of the host", 0)] {
        let with = |frame: &&&[u8]| frame.windows(word.len()).any(|part| part == word.as_bytes());
        let frame = frames.iter().find(with).unwrap_or_else(|| panic!("{word} is in none"));
        assert_eq!(frame[mac..mac + 6], guests_mac);
    }
    // What cannot be written is said before anything boots.
    Sandbox::remove(sandbox.name()).await.unwrap();
    let nowhere = dir.path().join("no/such/file");
    let refused = within("create", builder(sandbox.name()).capture(&nowhere).create()).await.map(drop);
    let Err(Error::BootFailed { stage, message, .. }) = &refused else { panic!("{refused:?}") };
    assert!(stage == "network" && message.contains(&nowhere.display().to_string()), "{refused:?}");
    Sandbox::remove(sandbox.name()).await.unwrap();
}
