//! A sandbox's life, as one application lives it: what each call does, what it refuses, what it keeps.

use std::time::Duration;

use cubby_tests::{
    builder, discard, gone, name, process, python, refused_as, sandbox, shell, store, until, within,
};
use cubbyhole::{Error, ExecEvent, ExitReason, ExitStatus, Sandbox, Status};

async fn reason(sandbox: &Sandbox) -> ExitReason {
    within("the end", sandbox.wait()).await.unwrap().reason
}

#[tokio::test]
async fn what_was_written_is_there_after_stop_and_start() {
    let sandbox = sandbox("kept").await;
    let name = sandbox.name().to_owned();
    assert_eq!(sandbox.status().await.unwrap(), Status::Running);
    assert_eq!(sandbox.last_exit().await.unwrap(), None);
    shell(&sandbox, "mkdir -m 751 /srv/own && echo kept > /srv/own/note && ln -s note /srv/own/link").await;
    shell(&sandbox, "chown games:www-data /srv/own/note; rm /etc/motd; echo changed > /etc/issue").await;
    // The last thing before the stop, and nobody syncs it.
    python(&sandbox, "open('/root/late', 'wb').write(bytes(range(256)) * 32768)").await;
    let before = process(&name);
    within("stop", sandbox.stop()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(sandbox.last_exit().await.unwrap().unwrap().reason, ExitReason::Requested);
    gone(&before).await;
    assert!(refused_as(&sandbox.exec("true", [""; 0]).await, Status::Stopped));

    let again = within("start", Sandbox::start(&name)).await.unwrap();
    assert_ne!(process(&name), before);
    let seen = shell(
        &again,
        "cat /srv/own/link /etc/issue; stat -c '%U:%G %a' /srv/own/note /srv/own; ls /etc/motd 2>&1 || true",
    )
    .await;
    assert_eq!(
        seen,
        "kept\nchanged\ngames:www-data 644\nroot:root 751\nls: cannot access '/etc/motd': No such file or directory\n"
    );
    let same = python(&again, "print(open('/root/late', 'rb').read() == bytes(range(256)) * 32768)").await;
    assert_eq!(same, "True\n");
    // The value from before the stop is about the same sandbox.
    assert_eq!(shell(&sandbox, "echo back").await, "back\n");
    discard(again).await;
}

#[tokio::test]
async fn a_kill_is_at_once_and_loses_nothing_that_was_synced() {
    let sandbox = sandbox("killed").await;
    let write = "import os\nf = open('/root/synced', 'wb')\nf.write(b'synced' * 100000); f.flush(); os.fsync(f.fileno())\n\
                 d = os.open('/root', os.O_RDONLY); os.fsync(d)";
    python(&sandbox, write).await;
    let before = process(sandbox.name());
    within("kill", sandbox.kill()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(reason(&sandbox).await, ExitReason::Killed);
    gone(&before).await;
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    let same = python(&again, "print(open('/root/synced', 'rb').read() == b'synced' * 100000)").await;
    assert_eq!(same, "True\n");
    discard(again).await;
}

#[tokio::test]
async fn names_are_taken_found_listed_and_free_again() {
    let name = name("named");
    for missing in [
        Sandbox::get(&name).await.map(drop),
        Sandbox::start(&name).await.map(drop),
        Sandbox::remove(&name).await,
        Sandbox::get("no name, this").await.map(drop),
    ] {
        assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    }
    let sandbox = within("create", builder(&name).create()).await.unwrap();
    let home = store().home().clone();
    let id = name.parse().unwrap();
    assert!(home.sandbox(&id).exists() && home.socket(&id).exists());

    let second = within("create", builder(&name).create()).await;
    assert!(matches!(second, Err(Error::AlreadyExists { .. })), "{second:?}");
    let start = within("start", Sandbox::start(&name)).await;
    assert!(refused_as(&start, Status::Running), "{start:?}");
    let removed = Sandbox::remove(&name).await;
    assert!(refused_as(&removed, Status::Running), "{removed:?}");
    // None of the three harmed it.
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");

    let listed = Sandbox::list().await.unwrap().into_iter().find(|one| one.name() == name).unwrap();
    assert_eq!(listed.status(), Status::Running);
    let other = listed.connect().await.unwrap();
    assert_eq!(shell(&other, "hostname").await, format!("{name}\n"));
    within("ping", other.ping()).await.unwrap();
    within("touch", other.touch()).await.unwrap();

    // The end is everybody's to ask for and to see.
    within("stop", other.stop()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    let taken = within("create", builder(&name).create()).await;
    assert!(matches!(taken, Err(Error::AlreadyExists { .. })), "{taken:?}");
    Sandbox::remove(&name).await.unwrap();
    assert!(!home.sandbox(&id).exists(), "its directory stayed");
    assert!(!home.socket(&id).exists(), "its socket stayed");
    assert!(matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. })));
    assert!(Sandbox::list().await.unwrap().iter().all(|one| one.name() != name));
    assert!(matches!(sandbox.status().await, Err(Error::NotFound { .. })));
    // And the name can be used again, for a disk without a past.
    let fresh = within("create", builder(&name).create()).await.unwrap();
    discard(fresh).await;
}

#[tokio::test]
async fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    let sandbox = sandbox("paused").await;
    let program =
        "import time\nn = 0\nwhile True:\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.01)";
    let mut counter = within("start", sandbox.exec_stream("python3", ["-c", program])).await.unwrap();
    let mut text = String::new();
    let mut read = async |text: &mut String| match within("a number", counter.next()).await.unwrap().unwrap()
    {
        ExecEvent::Stdout(bytes) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
        ExecEvent::Started { .. } => {}
        other => panic!("{other:?}"),
    };
    while text.lines().count() < 5 {
        read(&mut text).await;
    }
    within("pause", sandbox.pause()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Paused);
    let refused = within("exec", sandbox.exec("true", [""; 0])).await;
    assert!(refused_as(&refused, Status::Paused), "{refused:?}");
    let twice = within("pause", sandbox.pause()).await;
    assert!(refused_as(&twice, Status::Paused), "{twice:?}");
    within("resume", sandbox.resume()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Running);
    let counted = text.lines().count();
    while text.lines().count() < counted + 20 {
        read(&mut text).await;
    }
    let complete = &text[..text.rfind('\n').unwrap()];
    for (line, number) in complete.lines().zip(1..) {
        assert_eq!(line, number.to_string());
    }
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");
    // The wall clock is the host's again.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let guest: u64 = shell(&sandbox, "date +%s").await.trim().parse().unwrap();
    assert!(guest.abs_diff(now) <= 10, "the guest's clock says {guest}, ours {now}");
    // A paused one can be stopped as well.
    within("pause", sandbox.pause()).await.unwrap();
    discard(sandbox).await;
}

#[tokio::test]
async fn a_drain_lets_the_running_command_finish_and_takes_no_other() {
    let sandbox = sandbox("drained").await;
    let mut cat = within("start", sandbox.exec_stream("cat", [""; 0])).await.unwrap();
    within("start", cat.next()).await.unwrap().unwrap();
    let drain = tokio::spawn({
        let other = Sandbox::get(sandbox.name()).await.unwrap();
        async move { other.drain().await }
    });
    until("draining", async || sandbox.status().await.unwrap() == Status::Draining).await;
    let refused = within("exec", sandbox.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::Draining { .. })), "{refused:?}");
    let late = Sandbox::get(sandbox.name()).await.unwrap();
    let refused = within("exec", late.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::Draining { .. })), "{refused:?}");
    cat.write_stdin("last words").await.unwrap();
    cat.close_stdin().await.unwrap();
    let mut text = Vec::new();
    while let Some(event) = within("output", cat.next()).await {
        match event.unwrap() {
            ExecEvent::Stdout(bytes) => text.extend_from_slice(&bytes),
            ExecEvent::Exited(status) => assert_eq!(status, ExitStatus { code: Some(0), signal: None }),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(text, b"last words");
    within("drain", drain).await.unwrap().unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(reason(&sandbox).await, ExitReason::Drained);
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let sandbox = sandbox("deadline").await;
    let mut sleep = within("start", sandbox.exec_stream("sleep", ["86406"])).await.unwrap();
    within("start", sleep.next()).await.unwrap().unwrap();
    within("drain", sandbox.drain_with_deadline(Duration::from_millis(100))).await.unwrap();
    assert_eq!(reason(&sandbox).await, ExitReason::Drained);
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn an_idle_sandbox_ends_and_a_busy_one_does_not() {
    let name = name("idle");
    let sandbox = within("create", builder(&name).idle_timeout(1).create()).await.unwrap();
    let before = process(&name);
    // Longer than the time-out, and silent.
    assert_eq!(shell(&sandbox, "sleep 2; echo done").await, "done\n");
    assert_eq!(reason(&sandbox).await, ExitReason::IdleTimeout);
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    gone(&before).await;
    Sandbox::remove(&name).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_ends_when_its_time_is_up_and_keeps_what_was_written() {
    let name = name("aged");
    let sandbox = within("create", builder(&name).max_duration(3).create()).await.unwrap();
    let mut busy =
        within("start", sandbox.shell_stream("echo kept > /root/note; sleep 86407")).await.unwrap();
    assert_eq!(reason(&sandbox).await, ExitReason::MaxDuration);
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    // It was ended by a signal, or by the sandbox's end; it did not go on.
    let end = within("end", busy.wait()).await;
    assert!(!matches!(end, Ok(ExitStatus { code: Some(0), .. })), "{end:?}");
    let again = within("start", Sandbox::start(&name)).await.unwrap();
    assert_eq!(shell(&again, "cat /root/note").await, "kept\n");
    let _ = within("the end", again.wait()).await;
    Sandbox::remove(&name).await.unwrap();
}
