//! What holds between processes: who ends with whom, who sees what, and how an end that nobody asked for is told.

use cubby_tests::{Client, discard, freeze, gone, kill, name, process, sandbox, shell, until, within};
use cubbyhole::{Error, ExitReason, Sandbox, Status};

use crate::CLIENT;

#[tokio::test]
async fn an_attached_sandbox_ends_with_its_application_however_that_ends() {
    let name = name("attached");
    let mut application = Client::start(&[CLIENT, "attached", &name]);
    assert_eq!(application.line().await, name);
    let sandbox = Sandbox::get(&name).await.unwrap();
    assert_eq!(shell(&sandbox, "echo kept > /root/note; echo well").await, "well\n");
    let before = process(&name);
    application.kill().await;
    let report = within("the end", sandbox.wait()).await.unwrap();
    assert_eq!(report.reason, ExitReason::Requested);
    gone(&before).await;
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    // It ended as a stop ends it: nothing was lost.
    let again = within("start", Sandbox::start(&name)).await.unwrap();
    assert_eq!(shell(&again, "cat /root/note").await, "kept\n");
    discard(again).await;
}

#[tokio::test]
async fn a_detached_sandbox_outlives_its_application() {
    for how in ["detached", "detaching"] {
        let name = name(how);
        let mut application = Client::start(&[CLIENT, how, &name]);
        assert_eq!(application.line().await, name);
        let before = process(&name);
        application.kill().await;
        let sandbox = Sandbox::get(&name).await.unwrap();
        // The sandbox process had every chance to see the end of its application.
        for _ in 0..10 {
            assert_eq!(shell(&sandbox, "echo well").await, "well\n");
        }
        assert_eq!(process(&name), before);
        discard(sandbox).await;
        gone(&before).await;
    }
}

#[tokio::test]
async fn a_killed_sandbox_process_is_a_crash_with_its_reason_and_starts_again() {
    let sandbox = sandbox("murdered").await;
    let mut sleep = within("start", sandbox.exec_stream("sleep", ["86408"])).await.unwrap();
    within("start", sleep.next()).await.unwrap().unwrap();
    let before = process(sandbox.name());
    kill(before.pid);
    assert!(within("end", sleep.wait()).await.is_err());
    gone(&before).await;
    assert_eq!(sandbox.status().await.unwrap(), Status::Crashed);
    let report = within("the end", sandbox.wait()).await.unwrap();
    assert!(matches!(report.reason, ExitReason::ProcessKilled { .. }), "{report:?}");
    let refused = within("exec", sandbox.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::InvalidState { .. })), "{refused:?}");
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    assert_eq!(shell(&again, "echo well").await, "well\n");
    discard(again).await;
}

#[tokio::test]
async fn a_kill_needs_no_answer_of_the_sandbox_process() {
    let sandbox = sandbox("stuck").await;
    let before = process(sandbox.name());
    freeze(before.pid);
    within("kill", sandbox.kill()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    let report = within("the end", sandbox.wait()).await.unwrap();
    assert_eq!(report.reason, ExitReason::Killed);
    gone(&before).await;
    Sandbox::remove(sandbox.name()).await.unwrap();
}

/// Lets the guest do itself harm, and gives how that was told.
async fn harm(test: &str, script: &str) -> (ExitReason, String) {
    let sandbox = sandbox(test).await;
    let before = process(sandbox.name());
    // Whether the command's own end is still told is a race that nobody can win.
    let _ = within(script, sandbox.shell(script)).await;
    let report = within("the end", sandbox.wait()).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Crashed);
    gone(&before).await;
    Sandbox::remove(sandbox.name()).await.unwrap();
    (report.reason, report.console_tail.unwrap_or_default())
}

#[tokio::test]
async fn a_guest_that_panics_says_so_with_its_last_words() {
    let (reason, console) = harm("panicked", "echo c > /proc/sysrq-trigger").await;
    assert_eq!(reason, ExitReason::GuestPanic, "{console}");
    assert!(console.contains("Kernel panic"), "{console:?}");
}

#[tokio::test]
async fn a_guest_that_resets_itself_says_so() {
    let (reason, console) = harm("reset", "echo b > /proc/sysrq-trigger").await;
    assert_eq!(reason, ExitReason::GuestReset, "{console}");
}

#[tokio::test]
async fn a_sandbox_process_holds_nothing_once_it_has_ended() {
    let ours = |pid: u32| {
        let directory = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        directory.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok()).collect::<Vec<_>>()
    };
    let sandbox = sandbox("tidy").await;
    let before = process(sandbox.name());
    let disk = cubby_tests::store().home().disk(&sandbox.name().parse().unwrap());
    assert!(ours(before.pid).contains(&disk), "the test looks for the wrong file");
    within("stop", sandbox.stop()).await.unwrap();
    // Neither a zombie nor a child of it that took over.
    gone(&before).await;
    until("the disk to be nobody's", async || {
        let everybody = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            std::fs::read_dir(format!("/proc/{pid}/fd")).ok()
        });
        !everybody.flatten().flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path == disk))
    })
    .await;
    Sandbox::remove(sandbox.name()).await.unwrap();
}
