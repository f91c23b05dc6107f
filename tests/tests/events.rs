//! Events both ways, with programs in the guest that have nothing but a socket.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cubby_tests::{
    builder, discard, name, next_output, python, refused_as, sandbox, shared, shell, until, within,
};
use cubbyhole::{Error, Event, EventFault, EventStream, ExecEvent, ExitReason, Sandbox, Status};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use super::CUBBY;

/// What a program in the guest needs to take part: a socket. Data is JSON already.
const CONNECT: &str = "import socket\nagent = socket.socket(socket.AF_UNIX)\nagent.connect('/run/agent.sock')\n\
                       lines = agent.makefile('r')\n\
                       def send(event, data='null'): agent.sendall(f'{{\"event\":\"{event}\",\"data\":{data}}}\\n'.encode())\n";

async fn next(events: &mut EventStream) -> Event {
    within("an event", events.next()).await.expect("the subscription is over").unwrap()
}

async fn send(sandbox: &Sandbox, program: &str) {
    python(sandbox, &format!("{CONNECT}{program}")).await;
}

fn event(name: &str, data: Value) -> Event {
    Event { name: name.into(), data }
}

#[tokio::test]
async fn events_go_both_ways() {
    let sandbox = sandbox("events").await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let subscription = sandbox.on_event("pong", {
        let seen = seen.clone();
        move |event| seen.lock().unwrap().push(event)
    });
    let subscription = within("subscribe", subscription).await.unwrap();
    let mut all = within("subscribe", sandbox.events("*")).await.unwrap();
    // A one-liner with nothing but the socket module.
    let line = r#"import socket; s = socket.socket(socket.AF_UNIX); s.connect("/run/agent.sock"); s.sendall(b'{"event":"hello","data":{"a":[1,null,"\xc3\xa9"]}}\n')"#;
    python(&sandbox, line).await;
    assert_eq!(next(&mut all).await, event("hello", json!({"a": [1, null, "é"]})));
    // One program that answers each event of the host's.
    let program = format!(
        "{CONNECT}send('ready')\nfor line in lines:\n    send('pong', line.strip())\n\
         \x20   if '\"enough\"' in line: break"
    );
    let mut guest = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    assert_eq!(next(&mut all).await, event("ready", Value::Null));
    let large = "x".repeat(200_000);
    let sent = [("go", json!({"n": 1})), ("text\n\"", json!(large)), ("enough", Value::Null)];
    for (name, data) in &sent {
        within("emit", sandbox.emit(name, data)).await.unwrap();
        assert_eq!(next(&mut all).await, event("pong", json!({"event": name, "data": data})));
    }
    assert!(within("the end", guest.wait()).await.unwrap().success());
    // Nobody listens now: nothing is kept, and that is no error.
    within("emit", sandbox.emit("late", &1)).await.unwrap();
    until("all of them", async || seen.lock().unwrap().len() == sent.len()).await;
    assert!(seen.lock().unwrap().iter().all(|event| event.name == "pong"));
    assert_eq!((subscription.dropped(), all.dropped()), (0, 0));
    // Dropped is unsubscribed: what comes now is for those who are left.
    drop(subscription);
    send(&sandbox, "send('pong', '\"last\"')").await;
    assert_eq!(next(&mut all).await, event("pong", json!("last")));
    assert_eq!(seen.lock().unwrap().len(), sent.len());
    // And nothing but the other subscription is open any more.
    until("the end of the sessions", async || sandbox.metrics().await.unwrap().sessions == 1).await;
    discard(sandbox).await;
}

#[tokio::test]
async fn eight_processes_keep_their_order_for_all_subscribers() {
    const PROCESSES: usize = 8;
    const EVENTS: u64 = 1000;
    let sandbox = shared().await;
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let mut streams = Vec::new();
    for sandbox in [&sandbox, &sandbox, &other] {
        streams.push(within("subscribe", sandbox.events("order")).await.unwrap());
    }
    let program = format!(
        "import os\nfor p in range({PROCESSES}):\n    if os.fork() == 0: break\nelse:\n\
         \x20   for _ in range({PROCESSES}): os.wait()\n    os._exit(0)\n\
         {CONNECT}for n in range({EVENTS}): send('order', [p, n])\nos._exit(0)"
    );
    let read = async |mut events: EventStream| {
        let mut next_of = BTreeMap::new();
        for _ in 0..PROCESSES as u64 * EVENTS {
            let data = next(&mut events).await.data;
            let expected = next_of.entry(data[0].as_u64().unwrap()).or_insert(0);
            assert_eq!(data[1], *expected, "process {}", data[0]);
            *expected += 1;
        }
        assert_eq!((next_of.len(), events.dropped()), (PROCESSES, 0));
        assert!(next_of.values().all(|count| *count == EVENTS));
    };
    let third = streams.pop().unwrap();
    let second = streams.pop().unwrap();
    let first = streams.pop().unwrap();
    let run = async { python(&sandbox, &program).await };
    tokio::join!(read(first), read(second), read(third), run);
}

#[tokio::test]
async fn a_flood_loses_its_own_events_and_delays_nothing() {
    let sandbox = sandbox("flood").await;
    let mut stalled = within("subscribe", sandbox.events("*")).await.unwrap();
    let program = format!(
        "{CONNECT}line = b'{{\"event\":\"flood\",\"data\":1}}\\n' * 1000\nprint(1, flush=True)\nwhile True: agent.sendall(line)"
    );
    let mut flood = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    next_output(&mut flood).await;
    // On this connection and on another, while nobody takes the flood's events and one waits for another.
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let mut quiet = within("subscribe", other.events("quiet")).await.unwrap();
    for _ in 0..10 {
        within("ping", sandbox.ping()).await.unwrap();
        within("ping", other.ping()).await.unwrap();
        assert_eq!(shell(&sandbox, "echo prompt").await, "prompt\n");
    }
    send(&sandbox, "send('quiet', 1)").await;
    assert_eq!(next(&mut quiet).await, event("quiet", json!(1)));
    assert_eq!(quiet.dropped(), 0);
    // A subscriber that reads again learns how many it has lost.
    let losses = async {
        while stalled.dropped() == 0 {
            assert_eq!(stalled.next().await.unwrap().unwrap().name, "flood");
        }
    };
    within("losses", losses).await;
    within("kill", flood.signal(9)).await.unwrap();
    assert_eq!(within("the end", flood.wait()).await.unwrap().signal, Some(9));
    discard(sandbox).await;
}

#[tokio::test]
async fn what_is_no_event_is_an_error_on_both_sides() {
    let sandbox = shared().await;
    let mut events = within("subscribe", sandbox.events("whole")).await.unwrap();
    let program = format!(
        "{CONNECT}\ndef tell(line):\n    agent.sendall(line + b'\\n')\n    return lines.readline()\n\
         assert 'not JSON' in tell(b'{{\"event\": whole}}')\nassert 'no object' in tell(b'[1]')\n\
         assert 'UTF-8' in tell(b'\\xff')\nassert 'deeper than 64' in tell(b'[' * 100)\n\
         assert 'longer than 262144' in tell(b'{{\"event\":\"whole\",\"data\":\"' + b'x' * 262144 + b'\"}}')\n\
         send('whole', '\"' + 'x' * 262000 + '\"')"
    );
    python(&sandbox, &program).await;
    assert_eq!(next(&mut events).await, event("whole", json!("x".repeat(262_000))));
    let too_long = within("emit", sandbox.emit("e", &"x".repeat(262_144))).await;
    let Err(Error::BadEvent { event, why: EventFault::TooLong { size, max: 262_144 } }) = too_long else {
        panic!("{too_long:?}");
    };
    assert_eq!((event.as_str(), size), ("e", 262_144 + 23));
    assert!(matches!(
        within("emit", sandbox.emit("", &1)).await,
        Err(Error::BadEvent { why: EventFault::Name { .. }, .. })
    ));
    // The connection is as good as before.
    within("emit", sandbox.emit("e", &"x".repeat(262_000))).await.unwrap();
}

#[tokio::test]
async fn any_user_may_take_part() {
    let sandbox = shared().await;
    let mut events = within("subscribe", sandbox.events("user")).await.unwrap();
    let program = format!("{CONNECT}import os\nsend('user', os.getuid())");
    let run = sandbox.exec_with("python3", |options| options.args(["-c", &program]).user("nobody"));
    assert!(within("exec", run).await.unwrap().success());
    assert_eq!(next(&mut events).await, event("user", json!(65534)));
}

#[tokio::test]
async fn a_client_that_is_gone_leaves_the_others_their_events() {
    let sandbox = sandbox("gone").await;
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let mut stays = within("subscribe", sandbox.events("*")).await.unwrap();
    let gone = within("subscribe", other.events("*")).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let function = within(
        "subscribe",
        other.on_event("*", {
            let count = count.clone();
            move |_| {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }),
    );
    let function = function.await.unwrap();
    send(&sandbox, "send('one')").await;
    assert_eq!(next(&mut stays).await, event("one", Value::Null));
    until("the event", async || count.load(Ordering::Relaxed) == 1).await;
    drop((gone, function, other));
    until("the end of the client", async || sandbox.metrics().await.unwrap().clients == 1).await;
    send(&sandbox, "send('two')").await;
    assert_eq!(next(&mut stays).await, event("two", Value::Null));
    assert_eq!(count.load(Ordering::Relaxed), 1);
    // The end of the sandbox is the end of its subscriptions.
    within("stop", sandbox.stop()).await.unwrap();
    assert!(matches!(within("the end", stays.next()).await, Some(Err(Error::Ended { .. }))));
    assert!(within("the end", stays.next()).await.is_none());
    assert!(refused_as(&within("emit", sandbox.emit("late", &1)).await, Status::Stopped));
    assert!(refused_as(&within("subscribe", sandbox.events("*")).await.map(drop), Status::Stopped));
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_subscription_goes_over_a_pause_and_a_restart_wants_a_new_one() {
    let sandbox = sandbox("events-pause").await;
    let mut events = within("subscribe", sandbox.events("*")).await.unwrap();
    within("pause", sandbox.pause()).await.unwrap();
    assert!(refused_as(&within("emit", sandbox.emit("paused", &1)).await, Status::Paused));
    assert!(refused_as(&within("metrics", sandbox.metrics()).await, Status::Paused));
    within("resume", sandbox.resume()).await.unwrap();
    send(&sandbox, "send('resumed')").await;
    assert_eq!(next(&mut events).await, event("resumed", Value::Null));
    within("stop", sandbox.stop()).await.unwrap();
    // Its disk has the socket's name from before.
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    let mut events = within("subscribe", again.events("*")).await.unwrap();
    send(&again, "send('again')").await;
    assert_eq!(next(&mut events).await, event("again", Value::Null));
    discard(again).await;
}

#[tokio::test]
async fn a_subscription_holds_the_idle_timeout_and_no_drain() {
    let name = name("listens");
    let sandbox = within("create", builder(&name).idle_timeout(1).create()).await.unwrap();
    let mut events = within("subscribe", sandbox.events("*")).await.unwrap();
    // The store is asked, which is no use of the sandbox.
    let begin = Instant::now();
    until("four idle times", async || {
        assert_eq!(sandbox.status().await.unwrap(), Status::Running);
        begin.elapsed() > Duration::from_secs(4)
    })
    .await;
    // A command is work to finish; its last event still comes.
    let program = format!("{CONNECT}print(1, flush=True)\ninput()\nsend('done')");
    let mut work = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    next_output(&mut work).await;
    let drain = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.drain().await }
    });
    until("the drain", async || sandbox.status().await.unwrap() == Status::Draining).await;
    assert!(matches!(within("emit", sandbox.emit("new", &1)).await, Err(Error::Draining { .. })));
    assert!(matches!(within("subscribe", sandbox.events("*")).await, Err(Error::Draining { .. })));
    within("input", work.write_stdin("\n")).await.unwrap();
    assert_eq!(next(&mut events).await, event("done", Value::Null));
    while let Some(last) = within("the end", work.next()).await {
        if let ExecEvent::Exited(status) = last.unwrap() {
            assert!(status.success());
        }
    }
    within("the drain", drain).await.unwrap().unwrap();
    assert_eq!(within("the end", sandbox.wait()).await.unwrap().reason, ExitReason::Drained);
    assert!(matches!(within("the end", events.next()).await, Some(Err(Error::Ended { .. }))));
    Sandbox::remove(&name).await.unwrap();
    // Without a subscription the same sandbox is idle.
    let idle = within("create", builder(&name).idle_timeout(1).create()).await.unwrap();
    drop(within("subscribe", idle.events("*")).await.unwrap());
    assert_eq!(within("the end", idle.wait()).await.unwrap().reason, ExitReason::IdleTimeout);
    Sandbox::remove(&name).await.unwrap();
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(CUBBY);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

#[tokio::test]
async fn the_command_prints_events_and_emits_them() {
    let sandbox = sandbox("cli-events").await;
    let mut printer = command(&["events", sandbox.name(), "said"]).spawn().unwrap();
    let mut printed = BufReader::new(printer.stdout.take().unwrap()).lines();
    until("the subscription", async || sandbox.metrics().await.unwrap().sessions == 1).await;
    let program = format!(
        "{CONNECT}print(1, flush=True)\nevent = lines.readline().strip()\n\
         send('unsaid')\nsend('said', f'[{{event}}, \"\\\\u001b[2J\"]')"
    );
    let mut guest = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    next_output(&mut guest).await;
    let emit = async |data: &str| {
        within("cubby emit", command(&["emit", sandbox.name(), "go", data]).output()).await.unwrap()
    };
    let wrong = emit("{no").await;
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).starts_with("error: the data is no JSON"), "{wrong:?}");
    assert_eq!(emit(r#"{"n":1}"#).await.status.code(), Some(0));
    let line = within("a line", printed.next_line()).await.unwrap().unwrap();
    assert_eq!(line, r#"{"event":"said","data":[{"data":{"n":1},"event":"go"},"\u001b[2J"]}"#);
    // A sandbox that ends is the end, and no failure.
    within("stop", sandbox.stop()).await.unwrap();
    assert_eq!(within("the end", printer.wait()).await.unwrap().code(), Some(0));
    assert_eq!(emit("1").await.status.code(), Some(1));
    Sandbox::remove(sandbox.name()).await.unwrap();
}
