//! Sessions that outlive the connection that opened them, and those that do not.

use cubby_tests::{Client, discard, sandbox, shared, shell, until, within};
use cubbyhole::{Error, ExecEvent, ExecHandle, ExitStatus, Sandbox, SessionEnd, SessionInfo};

use super::CLIENT;

fn exited(code: i32) -> ExitStatus {
    ExitStatus { code: Some(code), signal: None }
}

/// All that a command writes from now on, to each stream, and how it ends.
async fn rest(mut handle: ExecHandle) -> (String, String, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match within("the rest", handle.next()).await.expect("an end").unwrap() {
            ExecEvent::Started { pid } => assert!(pid > 0),
            ExecEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ExecEvent::Exited(status) => {
                let text = |bytes| String::from_utf8(bytes).unwrap();
                return (text(stdout), text(stderr), status);
            }
        }
    }
}

/// Reads until `text` was written to standard output.
async fn see(handle: &mut ExecHandle, text: &str) {
    let mut seen = String::new();
    while !seen.contains(text) {
        match within(text, handle.next()).await.expect("more output").unwrap() {
            ExecEvent::Stdout(bytes) => seen.push_str(std::str::from_utf8(&bytes).unwrap()),
            ExecEvent::Started { .. } => {}
            other => panic!("{other:?} before {text:?}, after {seen:?}"),
        }
    }
}

async fn info(sandbox: &Sandbox, id: u32) -> Option<SessionInfo> {
    within("sessions", sandbox.sessions()).await.unwrap().into_iter().find(|session| session.id == id)
}

#[tokio::test]
async fn a_killed_client_takes_its_commands_with_it_but_for_those_it_has_let_go() {
    let sandbox = shared().await;
    let mut client = Client::start(&[CLIENT, "leave", sandbox.name()]);
    let id: u32 = client.line().await.parse().unwrap();
    let running = shell(&sandbox, "pgrep -fx 'sleep 86420' && pgrep -fx 'yes 86421' && echo both").await;
    assert!(running.ends_with("both\n"), "{running}");
    client.kill().await;
    until("the end of what it had kept", async || {
        shell(&sandbox, "pgrep -fx 'sleep 86420' || pgrep -fx 'yes 86421' || echo none").await == "none\n"
    })
    .await;
    let listed = info(&sandbox, id).await.expect("it is listed");
    assert!(listed.detached && !listed.tty && listed.attached == 0 && listed.end.is_none(), "{listed:?}");
    assert_eq!(listed.command[..2], ["/bin/sh", "-c"]);
    let pid = listed.pid.unwrap();
    assert_eq!(shell(&sandbox, &format!("cat /proc/{pid}/comm")).await, "sh\n");

    // From another client, with what it has said before, with its input, and to its end.
    let mut handle = within("attach", sandbox.attach(id)).await.unwrap();
    assert_eq!(handle.id(), id);
    handle.write_stdin("a word\n").await.unwrap();
    see(&mut handle, "before\ngot a word\n").await;
    assert_eq!(info(&sandbox, id).await.unwrap().attached, 1);
    handle.close_stdin().await.unwrap();
    assert_eq!(rest(handle).await, (String::new(), "over\n".into(), exited(7)));
    // And once more, when all is over.
    let late = within("attach", sandbox.attach(id)).await.unwrap();
    assert_eq!(rest(late).await, ("before\ngot a word\n".into(), "over\n".into(), exited(7)));
    assert_eq!(info(&sandbox, id).await.unwrap().end, Some(SessionEnd::Exited(exited(7))));
}

#[tokio::test]
async fn a_command_that_ends_before_it_is_detached_is_there_nevertheless() {
    let sandbox = shared().await;
    let mut handle = within("start", sandbox.exec_stream("sh", ["-c", "echo brief; exit 3"])).await.unwrap();
    let id = handle.id();
    assert_eq!(within("wait", handle.wait()).await.unwrap(), exited(3));
    // Nobody has let it go yet.
    assert!(info(&sandbox, id).await.is_none());
    let refused = within("attach", sandbox.attach(id)).await;
    assert!(
        matches!(refused, Err(Error::NoSuchSession { session, .. }) if session == id),
        "{:?}",
        refused.err()
    );
    within("detach", handle.detach()).await.unwrap();
    let late = within("attach", sandbox.attach(id)).await.unwrap();
    assert_eq!(rest(late).await, ("brief\n".into(), String::new(), exited(3)));
}

#[tokio::test]
async fn what_belongs_to_somebody_else_or_is_not_there_cannot_be_joined() {
    let (first, second) = (shared().await, shared().await);
    let handle = within("start", first.exec_stream("sleep", ["86422"])).await.unwrap();
    let id = handle.id();
    let refused = within("attach", second.attach(id)).await;
    assert!(
        matches!(refused, Err(Error::NotDetached { session, .. }) if session == id),
        "{:?}",
        refused.err()
    );
    let listed = info(&second, id).await.unwrap();
    assert!(!listed.detached && listed.attached == 1);
    let refused = within("attach", second.attach(7)).await;
    assert!(matches!(refused, Err(Error::NoSuchSession { session: 7, .. })), "{:?}", refused.err());
    // Numbers are one's own: both have begun with their first.
    let other = within("start", second.exec_stream("sleep", ["86422"])).await.unwrap();
    assert_ne!(other.id(), id);
}

#[tokio::test]
async fn a_program_that_could_not_run_is_remembered_as_that() {
    let sandbox = shared().await;
    let handle = within("start", sandbox.exec_stream("no-such-program", [""; 0])).await.unwrap();
    let id = handle.id();
    within("detach", handle.detach()).await.unwrap();
    let mut handle = within("attach", sandbox.attach(id)).await.unwrap();
    let end = within("the end", handle.wait()).await;
    assert!(
        matches!(end, Err(Error::ExecFailed { kind: cubbyhole::ExecErrorKind::NotFound, .. })),
        "{end:?}"
    );
    let listed = info(&sandbox, id).await.unwrap().end;
    assert_eq!(listed, Some(SessionEnd::NotRun(cubbyhole::ExecErrorKind::NotFound)));
}

#[tokio::test]
async fn a_terminal_is_joined_with_its_keys_its_sizes_and_its_signals() {
    let sandbox = shared().await;
    let handle = within("start", sandbox.exec_stream_with("sh", |o| o.tty(24, 80).env("PS1", "prompt> ")));
    let handle = handle.await.unwrap();
    let id = handle.id();
    within("detach", handle.detach()).await.unwrap();
    assert!(info(&sandbox, id).await.unwrap().tty);
    let mut first = within("attach", shared().await.attach(id)).await.unwrap();
    see(&mut first, "prompt> ").await;
    first.resize(33, 101).await.unwrap();
    first.write_stdin("stty size\n").await.unwrap();
    see(&mut first, "33 101\r\n").await;
    // Two see the same, and either may type.
    let mut second = within("attach", sandbox.attach(id)).await.unwrap();
    second.write_stdin("echo sec''ond\n").await.unwrap();
    see(&mut first, "second\r\n").await;
    see(&mut second, "second\r\n").await;
    // One that leaves takes nothing with it.
    drop(first);
    until("its leaving", async || info(&sandbox, id).await.unwrap().attached == 1).await;
    // A shell at its prompt ends with a hang-up, and with nothing less.
    second.signal(1).await.unwrap();
    let (.., status) = rest(second).await;
    assert_eq!(status, ExitStatus { code: None, signal: Some(1) });
}

#[tokio::test]
async fn the_newest_output_is_kept_and_a_command_without_readers_runs_free() {
    let sandbox = shared().await;
    // Much more than all windows and pipes hold; nobody reads a byte of it.
    let script = "seq 1 1000000; echo last; touch /tmp/free; sleep 86423";
    let handle = within("start", sandbox.shell_stream(script)).await.unwrap();
    let id = handle.id();
    within("detach", handle.detach()).await.unwrap();
    until("its last line", async || shell(&sandbox, "ls /tmp").await.contains("free")).await;
    let mut handle = within("attach", sandbox.attach(id)).await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"last\n") {
        if let ExecEvent::Stdout(bytes) = within("output", handle.next()).await.unwrap().unwrap() {
            seen.extend_from_slice(&bytes);
        }
    }
    let all: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    let all = format!("{all}last\n").into_bytes();
    assert!(seen.len() > 250_000 && seen.len() < 300_000, "{} bytes were kept", seen.len());
    assert!(all.ends_with(&seen), "they are not the newest");
    handle.signal(9).await.unwrap();
    within("the end", handle.wait()).await.unwrap();
    shell(&sandbox, "rm /tmp/free").await;
}

#[tokio::test]
async fn who_joins_gets_every_byte_in_its_order_and_holds_up_nobody_but_that_command() {
    let sandbox = shared().await;
    let script = "read line; seq 1 1000000; exit 4";
    let handle = within("start", sandbox.shell_stream(script)).await.unwrap();
    let id = handle.id();
    within("detach", handle.detach()).await.unwrap();
    let other = shared().await;
    let mut quick = within("attach", other.attach(id)).await.unwrap();
    let slow = within("attach", sandbox.attach(id)).await.unwrap();
    quick.write_stdin("go\n").await.unwrap();
    // The slow one reads nothing yet, so the quick one cannot go on for ever; others can, on both connections.
    see(&mut quick, "1000\n").await;
    for sandbox in [&sandbox, &other] {
        assert_eq!(shell(sandbox, "seq 1 100000 | tail -n 1").await, "100000\n");
    }
    let (quick, slow) = tokio::join!(rest(quick), rest(slow));
    let all: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    assert!(slow.0 == all && all.ends_with(&quick.0), "{} and {} bytes came", slow.0.len(), quick.0.len());
    assert_eq!((slow.2, quick.2), (exited(4), exited(4)));
}

#[tokio::test]
async fn a_drain_waits_for_what_was_let_go_and_a_stop_does_not() {
    let sandbox = sandbox("detached-drain").await;
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let handle =
        within("start", other.shell_stream("read line; echo kept > /root/kept; sync")).await.unwrap();
    let id = handle.id();
    within("detach", handle.detach()).await.unwrap();
    drop(other);
    let drain = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.drain().await }
    });
    until("the drain", async || sandbox.status().await.unwrap() == cubbyhole::Status::Draining).await;
    // It can be joined, and goes on to its end.
    let mut handle = within("attach", sandbox.attach(id)).await.unwrap();
    assert!(!drain.is_finished());
    handle.write_stdin("\n").await.unwrap();
    within("the drain", drain).await.unwrap().unwrap();
    let sandbox = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    assert_eq!(shell(&sandbox, "cat /root/kept").await, "kept\n");
    // Nothing is remembered of another run.
    let refused = within("attach", sandbox.attach(id)).await;
    assert!(matches!(refused, Err(Error::NoSuchSession { .. })), "{:?}", refused.err());
    let handle = within("start", sandbox.exec_stream("sleep", ["86424"])).await.unwrap();
    within("detach", handle.detach()).await.unwrap();
    discard(sandbox).await;
}
