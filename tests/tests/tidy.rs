//! Who clears up: the reaper after crashes that nobody reads, ephemeral sandboxes after themselves, and everybody
//! so that nothing is left.

use std::collections::BTreeSet;
use std::fs;

use cubby_state::ProcessIdentity;
use cubby_tests::{
    Client, builder, discard, freeze, gone, keeper, kill, name, process, sandbox, shell, store, until, within,
};
use cubbyhole::{Error, ExitReason, Sandbox, Status};

use crate::CLIENT;

/// The reason in the row of the newest run, which no reader has settled.
fn raw_reason(name: &str) -> Option<ExitReason> {
    store().history(&name.parse().unwrap()).unwrap().remove(0).exit.map(|report| report.reason)
}

#[tokio::test]
async fn the_reaper_finds_a_crash_that_nobody_saw_and_nobody_reads() {
    // This program uses the library, so that it has a reaper; it makes no further call about this sandbox.
    let sandbox = sandbox("unseen").await;
    let name = sandbox.name().to_owned();
    let socket = store().home().socket(&name.parse().unwrap());
    let (process, keeper) = (process(&name), keeper(&name));
    // Of one that was removed while its process was still about to bind it.
    let stale = store().home().socket(&"never-there".parse().unwrap());
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    freeze(keeper.pid);
    kill(process.pid);
    kill(keeper.pid);
    until("the reaper", async || raw_reason(&name).is_some()).await;
    assert_eq!(raw_reason(&name).unwrap(), ExitReason::ProcessKilled { signal: 0 });
    until("the sockets to go", async || !socket.exists() && !stale.exists()).await;
    let again = within("start", Sandbox::start(&name)).await.unwrap();
    discard(again).await;
}

/// Whether nothing of a sandbox is left.
fn is_gone(name: &str) -> bool {
    let (home, id) = (store().home().clone(), name.parse().unwrap());
    !home.sandbox(&id).exists() && !home.socket(&id).exists() && store().history(&id).is_err()
}

#[tokio::test]
async fn an_ephemeral_sandbox_is_gone_with_its_end_and_its_waiters_learn_how() {
    type End = fn(&Sandbox, &ProcessIdentity) -> ExitReason;
    let ends: [(&str, End); 2] = [
        ("ephemeral-stopped", |_, _| ExitReason::Requested),
        ("ephemeral-killed", |_, process| {
            kill(process.pid);
            ExitReason::ProcessKilled { signal: 9 }
        }),
    ];
    for (test, end) in ends {
        let name = name(test);
        let sandbox = within("create", builder(&name).ephemeral(true).create()).await.unwrap();
        shell(&sandbox, "echo well > /root/note").await;
        let (process, keeper) = (process(&name), keeper(&name));
        let other = Sandbox::get(&name).await.unwrap();
        let waiting = tokio::spawn(async move { other.wait().await });
        let reason = end(&sandbox, &process);
        if reason == ExitReason::Requested {
            within("stop", sandbox.stop()).await.unwrap();
        }
        assert_eq!(within("the end", waiting).await.unwrap().unwrap().reason, reason);
        gone(&process).await;
        gone(&keeper).await;
        assert!(is_gone(&name), "something is left of {name}");
        let missing = Sandbox::get(&name).await;
        assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
        assert!(matches!(sandbox.status().await, Err(Error::NotFound { .. })));
        // Who still has the value from before can ask later, too.
        assert_eq!(within("the end", sandbox.wait()).await.unwrap().reason, reason);
        assert_eq!(sandbox.last_exit().await.unwrap().unwrap().reason, reason);
        // And the name is free at once.
        let fresh = within("create", builder(&name).ephemeral(true).create()).await.unwrap();
        assert_eq!(
            shell(&fresh, "cat /root/note 2>&1 || true").await.trim(),
            "cat: /root/note: No such file or directory"
        );
        within("kill", fresh.kill()).await.unwrap();
        until("its end", async || is_gone(&name)).await;
    }
}

#[tokio::test]
async fn an_ephemeral_sandbox_that_cannot_boot_leaves_nothing() {
    let name = name("ephemeral-stillborn");
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("cubby-sandbox");
    fs::write(&script, "#!/bin/sh\necho the reason of its death >&2\nexit 3\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let created = within("create", builder(&name).ephemeral(true).runtime(&script).create()).await;
    let Err(Error::Process { why, .. }) = created else { panic!("{created:?}") };
    assert!(why.contains("the reason of its death"), "{why}");
    assert!(is_gone(&name), "something is left of {name}");
}

/// What there is of one sandbox; other tests have theirs at the same time.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    /// Zombies are among them.
    processes: BTreeSet<String>,
    files: BTreeSet<String>,
    /// Of this program, into the sandbox's directory.
    descriptors: usize,
}

impl Traces {
    fn of(name: &str, ours: &BTreeSet<u32>) -> Self {
        let home = store().home().clone();
        let id = name.parse().unwrap();
        let mut files = BTreeSet::new();
        for path in [home.sandbox(&id), home.socket(&id)] {
            if path.exists() {
                files.insert(path.display().to_string());
            }
        }
        let processes = ours.iter().filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        let descriptors =
            fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        let descriptors = descriptors.filter(|target| target.starts_with(home.sandbox(&id))).count();
        Self { processes: processes.collect(), files, descriptors }
    }
}

#[tokio::test]
async fn nothing_is_left_after_any_kind_of_life() {
    let nothing = Traces { processes: BTreeSet::new(), files: BTreeSet::new(), descriptors: 0 };
    for how in ["attached", "detached", "detaching"] {
        for end in ["stopped", "killed", "crashed", "orphaned", "drained"] {
            if end == "orphaned" && how != "attached" {
                continue;
            }
            let name = name(&format!("{how}-{end}"));
            let mut application = Client::start(&[CLIENT, how, &name]);
            assert_eq!(application.line().await, name);
            let (process, keeper) = (process(&name), keeper(&name));
            let ours: BTreeSet<u32> = [process.pid, keeper.pid].into();
            let sandbox = Sandbox::get(&name).await.unwrap();
            assert_eq!(shell(&sandbox, "echo well").await, "well\n");
            assert_eq!(Traces::of(&name, &ours).processes.len(), 2);
            match end {
                "stopped" => within(end, sandbox.stop()).await.unwrap(),
                "killed" => within(end, sandbox.kill()).await.unwrap(),
                "drained" => within(end, sandbox.drain()).await.unwrap(),
                "crashed" => kill(process.pid),
                _ => application.kill().await,
            }
            within("the end", sandbox.wait()).await.unwrap();
            // The application still lives, and has waited for what it started.
            gone(&process).await;
            gone(&keeper).await;
            let expected = if end == "crashed" { Status::Crashed } else { Status::Stopped };
            assert_eq!(sandbox.status().await.unwrap(), expected, "{name}");
            let socket = store().home().socket(&name.parse().unwrap());
            assert!(!socket.exists(), "{name}: its socket stayed");
            Sandbox::remove(&name).await.unwrap();
            assert_eq!(Traces::of(&name, &ours), nothing, "{name}");
            if end != "orphaned" {
                application.finish().await;
            }
        }
    }
    // Nor what a removal puts aside; another test may be at it.
    let left = || fs::read_dir(store().home().sandboxes()).unwrap().map(|entry| entry.unwrap().file_name());
    until("its directory to go", async || {
        left().all(|name| {
            let name = name.to_string_lossy();
            !["attached-", "detach", ".removed-"].iter().any(|part| name.contains(part))
        })
    })
    .await;
}
