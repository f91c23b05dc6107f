//! How a sandbox ends when somebody or something asks for it, and how it comes back.

use std::time::{Duration, Instant};

use cubby_tests::{
    builder, discard, freeze, gone, name, next_output, process, python, refused_as, sandbox, shell, store,
    until, within,
};
use cubbyhole::{Error, ExecEvent, ExecHandle, ExitReason, ExitStatus, Sandbox, Status};

/// A command that writes what becomes of it: on TERM to `/root/term`, and it goes on. It leaves the file to be synced by
/// what ends it: a power that is cut loses it.
const DEAF: &str = "trap 'echo asked > /root/term' TERM; echo ready; while :; do sleep 86409 & wait; done";

async fn reason(sandbox: &Sandbox) -> ExitReason {
    within("the end", sandbox.wait()).await.unwrap().reason
}

/// Starts a script and waits for its first line.
async fn started(sandbox: &Sandbox, script: &str) -> ExecHandle {
    let mut handle = within("start", sandbox.shell_stream(script)).await.unwrap();
    next_output(&mut handle).await;
    handle
}

/// "Stopping gracefully terminates guest processes and shuts down the VM." and "The sandbox moves to Stopped and can be
/// restarted later."
#[tokio::test]
async fn stopping_gracefully_terminates_guest_processes_and_what_was_written_is_there_after_a_restart() {
    let sandbox = sandbox("kept").await;
    let name = sandbox.name().to_owned();
    assert_eq!(sandbox.status().await.unwrap(), Status::Running);
    assert_eq!(sandbox.last_exit().await.unwrap(), None);
    shell(&sandbox, "mkdir -m 751 /srv/own && echo kept > /srv/own/note && ln -s note /srv/own/link").await;
    shell(&sandbox, "chown games:www-data /srv/own/note; rm /etc/motd; echo changed > /etc/issue").await;
    // Terminated, it has its own last words.
    let polite =
        "trap 'echo goodbye > /root/goodbye; exit 5' TERM; echo ready; while :; do sleep 86409 & wait; done";
    let mut polite = started(&sandbox, polite).await;
    // The last thing before the stop, and nobody syncs it.
    python(&sandbox, "open('/root/late', 'wb').write(bytes(range(256)) * 32768)").await;
    let before = process(&name);
    within("stop", sandbox.stop()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(sandbox.last_exit().await.unwrap().unwrap().reason, ExitReason::Requested);
    gone(&before).await;
    assert!(refused_as(&sandbox.exec("true", [""; 0]).await, Status::Stopped));
    assert_eq!(within("end", polite.wait()).await.unwrap(), ExitStatus { code: Some(5), signal: None });

    let again = within("start", Sandbox::start(&name)).await.unwrap();
    assert_ne!(process(&name), before);
    let seen = shell(
        &again,
        "cat /srv/own/link /etc/issue /root/goodbye; stat -c '%U:%G %a' /srv/own/note /srv/own; ls /etc/motd 2>&1 || true",
    )
    .await;
    assert_eq!(
        seen,
        "kept\nchanged\ngoodbye\ngames:www-data 644\nroot:root 751\n\
         ls: cannot access '/etc/motd': No such file or directory\n"
    );
    let same = python(&again, "print(open('/root/late', 'rb').read() == bytes(range(256)) * 32768)").await;
    assert_eq!(same, "True\n");
    // The value from before the stop is about the same sandbox.
    assert_eq!(shell(&sandbox, "echo back").await, "back\n");
    // Each run is remembered with its end, the newest first.
    let history = store().history(&name.parse().unwrap()).unwrap();
    let ends: Vec<_> = history.iter().map(|run| run.exit.as_ref().map(|exit| exit.reason.clone())).collect();
    assert_eq!(ends, [None, Some(ExitReason::Requested)]);
    assert!(
        history[1].ended_at.unwrap() <= history[0].started_at
            && history[1].started_at < history[1].ended_at.unwrap()
    );
    discard(again).await;
}

/// "... with all its configuration preserved."
#[tokio::test]
async fn a_restarted_sandbox_has_all_its_configuration() {
    let name = name("configured");
    let builder =
        builder(&name).cpus(2).memory(160).disk(64).env("COLOUR", "blue").workdir("/srv").user("games");
    let builder =
        builder.hostname("its-own").shell("/bin/bash").label("team", "a").max_clients(3).idle_timeout(600);
    let sandbox = within("create", builder.create()).await.unwrap();
    let record = || store().get(&name.parse().unwrap()).unwrap();
    let config = record().config;
    let look = "echo $COLOUR $BASH_VERSION; pwd; id -un; hostname; nproc; grep MemTotal /proc/meminfo; \
                df --output=size -k / | tail -1";
    let before = shell(&sandbox, look).await;
    assert!(before.starts_with("blue 5") && before.contains("/srv\ngames\nits-own\n2\n"), "{before}");
    within("stop", sandbox.stop()).await.unwrap();
    let again = within("start", Sandbox::start(&name)).await.unwrap();
    assert_eq!(shell(&again, look).await, before);
    assert_eq!(record().config, config);
    assert_eq!(
        (config.labels["team"].as_str(), config.max_clients, config.idle_timeout_s),
        ("a", 3, Some(600))
    );
    discard(again).await;
}

/// What a stop with two seconds makes of a guest in which `script` runs: how it ended, and what it kept: `/root/note`,
/// which was synced before, and `/root/term`, which only a stop that the guest has come to the end of can have saved.
async fn stopped_in_two_seconds(test: &str, script: &str) -> (ExitReason, String) {
    stopped_once(test, script, async |_| ()).await
}

/// The same for a guest that is only ready to be stopped when `ready` says so.
async fn stopped_once(test: &str, script: &str, ready: impl AsyncFn(&Sandbox)) -> (ExitReason, String) {
    let sandbox = sandbox(test).await;
    shell(&sandbox, "echo kept > /root/note; sync").await;
    let busy = started(&sandbox, script).await;
    ready(&sandbox).await;
    let before = process(sandbox.name());
    let begin = Instant::now();
    within("stop", sandbox.stop_with_timeout(Duration::from_secs(2))).await.unwrap();
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(4), "it took {took:?}");
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    let reason = reason(&sandbox).await;
    gone(&before).await;
    drop(busy);
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    let kept = shell(&again, "cat /root/note /root/term 2>/dev/null || true").await;
    discard(again).await;
    (reason, kept)
}

#[tokio::test]
async fn a_stop_kills_what_ignores_being_asked() {
    let (reason, kept) = stopped_in_two_seconds("deaf", DEAF).await;
    assert_eq!((reason, kept.as_str()), (ExitReason::Requested, "kept\nasked\n"));
}

#[tokio::test]
async fn a_stop_ends_a_guest_that_enters_its_kernel_without_end() {
    let program = "import os, signal, threading\nopen('/root/term', 'w').write('late\\n')\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n\
                   def enter():\n    while True: os.close(os.open('/dev/null', os.O_RDONLY))\n\
                   [threading.Thread(target=enter).start() for _ in range(4)]\nprint(flush=True)";
    let (reason, kept) = stopped_in_two_seconds("entering", &format!("exec python3 -c \"{program}\"")).await;
    assert_eq!((reason, kept.as_str()), (ExitReason::Requested, "kept\nlate\n"));
}

/// PID 1 takes no SIGSTOP from its own guest, but the freezer of its cgroup asks nobody.
const FROZEN_AGENT: &str = "cd /sys/fs/cgroup && mkdir ice && echo 1 > ice/cgroup.procs && echo now && \
                            exec sh -c 'echo 1 > ice/cgroup.freeze; sleep 86410'";

#[tokio::test]
async fn a_stop_ends_a_guest_whose_agent_does_not_answer() {
    // What it says last is said before it is frozen.
    let silent = async |sandbox: &Sandbox| {
        let answer = async || tokio::time::timeout(Duration::from_secs(1), sandbox.ping()).await;
        until("silence", async || answer().await.is_err()).await;
    };
    let (reason, kept) = stopped_once("silent", FROZEN_AGENT, silent).await;
    assert_eq!((reason, kept.as_str()), (ExitReason::Requested, "kept\n"));
}

/// "If a sandbox is unresponsive (e.g., stuck in a tight loop or a panic), force-kill it. The sandbox is terminated
/// immediately with no graceful shutdown."
#[tokio::test]
async fn an_unresponsive_sandbox_is_killed_immediately_with_no_graceful_shutdown() {
    let sandbox = sandbox("killed").await;
    let write = "import os\nf = open('/root/synced', 'wb')\nf.write(b'synced' * 100000); f.flush(); os.fsync(f.fileno())\n\
                 d = os.open('/root', os.O_RDONLY); os.fsync(d)";
    python(&sandbox, write).await;
    let asked = started(&sandbox, DEAF).await;
    let loops = started(&sandbox, "echo begun; trap '' TERM; while :; do :; done").await;
    let before = process(sandbox.name());
    let begin = Instant::now();
    within("kill", sandbox.kill()).await.unwrap();
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(1), "it took {took:?}");
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(reason(&sandbox).await, ExitReason::Killed);
    gone(&before).await;
    drop((asked, loops));
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    let same = python(&again, "print(open('/root/synced', 'rb').read() == b'synced' * 100000)").await;
    assert_eq!(same, "True\n");
    assert_eq!(shell(&again, "test -e /root/term || echo nobody asked").await, "nobody asked\n");
    discard(again).await;
}

#[tokio::test]
async fn a_kill_needs_no_answer_of_the_sandbox_process() {
    let sandbox = sandbox("stuck").await;
    let before = process(sandbox.name());
    freeze(before.pid);
    within("kill", sandbox.kill()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(reason(&sandbox).await, ExitReason::Killed);
    gone(&before).await;
    Sandbox::remove(sandbox.name()).await.unwrap();
}

/// "Existing commands run to completion, but new exec calls are rejected. Transitions to Stopped when all commands finish."
#[tokio::test]
async fn a_drain_lets_existing_commands_finish_rejects_new_ones_and_ends_in_stopped() {
    let sandbox = sandbox("drained").await;
    let mut cat = within("start", sandbox.exec_stream("cat", [""; 0])).await.unwrap();
    within("start", cat.next()).await.unwrap().unwrap();
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let mut second = within("start", other.exec_stream("cat", [""; 0])).await.unwrap();
    within("start", second.next()).await.unwrap().unwrap();
    let drain = tokio::spawn(async move { (other.drain().await, other) });
    until("draining", async || sandbox.status().await.unwrap() == Status::Draining).await;
    let refused = within("exec", sandbox.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::Draining { .. })), "{refused:?}");
    let late = Sandbox::get(sandbox.name()).await.unwrap();
    let refused = within("exec", late.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::Draining { .. })), "{refused:?}");
    let paused = within("pause", late.pause()).await;
    assert!(refused_as(&paused, Status::Draining), "{paused:?}");
    // More than all buffers on the way hold, and nobody reads it before all of it is written.
    let words = b"last words ".repeat(1 << 14);
    for handle in [&mut cat, &mut second] {
        let (mut text, mut sent) = (Vec::new(), 0);
        while sent < words.len() {
            match within("a write", handle.write_stdin(&words[sent..])).await {
                Ok(()) => sent = words.len(),
                Err(Error::OutputFull { written }) => {
                    sent += written;
                    if let ExecEvent::Stdout(bytes) = within("output", handle.next()).await.unwrap().unwrap()
                    {
                        text.extend_from_slice(&bytes);
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
        // One command is left, and it holds the sandbox.
        assert_eq!(sandbox.status().await.unwrap(), Status::Draining);
        handle.close_stdin().await.unwrap();
        while let Some(event) = within("output", handle.next()).await {
            match event.unwrap() {
                ExecEvent::Stdout(bytes) => text.extend_from_slice(&bytes),
                ExecEvent::Exited(status) => assert_eq!(status, ExitStatus { code: Some(0), signal: None }),
                other => panic!("{other:?}"),
            }
        }
        assert!(text == words, "{} of {} bytes came", text.len(), words.len());
    }
    let (drained, _other) = within("drain", drain).await.unwrap();
    drained.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    assert_eq!(reason(&sandbox).await, ExitReason::Drained);
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_drain_asks_what_is_left_at_its_deadline_and_then_kills_it() {
    let sandbox = sandbox("deadline").await;
    let mut deaf = started(&sandbox, DEAF).await;
    within("drain", sandbox.drain_with_deadline(Duration::from_millis(100))).await.unwrap();
    assert_eq!(reason(&sandbox).await, ExitReason::Drained);
    let end = within("end", deaf.wait()).await;
    assert!(!matches!(end, Ok(ExitStatus { code: Some(0), .. })), "{end:?}");
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    assert_eq!(shell(&again, "cat /root/term").await, "asked\n");
    discard(again).await;
}

/// "Idle detection (auto-drain after a configurable timeout)"
#[tokio::test]
async fn an_idle_sandbox_drains_itself_and_a_busy_or_touched_one_does_not() {
    let name = name("idle");
    let sandbox = within("create", builder(&name).idle_timeout(2).create()).await.unwrap();
    let before = process(&name);
    // Longer than the time-out, and silent.
    assert_eq!(shell(&sandbox, "sleep 3; echo done").await, "done\n");
    let begin = Instant::now();
    for _ in 0..6 {
        // A quarter of the time-out each; what is tried is that time passes.
        tokio::time::sleep(Duration::from_millis(500)).await;
        within("touch", sandbox.touch()).await.unwrap();
    }
    assert!(begin.elapsed() > Duration::from_secs(2));
    assert_eq!(sandbox.status().await.unwrap(), Status::Running);
    let touched = Instant::now();
    assert_eq!(reason(&sandbox).await, ExitReason::IdleTimeout);
    assert!(touched.elapsed() >= Duration::from_millis(1900), "after {:?}", touched.elapsed());
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    gone(&before).await;
    Sandbox::remove(&name).await.unwrap();
}

/// "Maximum sandbox lifetime enforcement"
#[tokio::test]
async fn a_sandbox_ends_when_its_lifetime_is_over_and_keeps_what_was_written() {
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

/// "Cleanup when the sandbox exits"
#[tokio::test]
async fn a_sandbox_process_holds_nothing_once_it_has_ended() {
    let open_files = |pid: u32| {
        let directory = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        directory.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).collect::<Vec<_>>()
    };
    let sandbox = sandbox("tidy").await;
    let before = process(sandbox.name());
    let id = sandbox.name().parse().unwrap();
    let home = store().home().clone();
    let disk = home.disk(&id);
    assert!(open_files(before.pid).contains(&disk), "the test looks for the wrong file");
    within("stop", sandbox.stop()).await.unwrap();
    // Neither a zombie nor a child of it that took over.
    gone(&before).await;
    until("the disk to be nobody's", async || {
        let everybody = std::fs::read_dir("/proc").unwrap();
        let pids = everybody.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        !pids.into_iter().any(|pid: u32| open_files(pid).contains(&disk))
    })
    .await;
    assert!(!home.socket(&id).exists(), "its socket stayed");
    assert!(!cubby_state::liveness::is_held(&home.lock(&id)).unwrap(), "its lock stayed");
    Sandbox::remove(sandbox.name()).await.unwrap();
}
