//! How an end that nobody asked for is told.

use cubby_tests::{discard, gone, kill, process, sandbox, shell, within};
use cubbyhole::{Error, ExitReason, Sandbox, Status};

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
