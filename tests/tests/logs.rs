//! What a sandbox has written can be read: while it runs, when it has stopped, after a crash.

use std::time::Duration;

use cubby_tests::{
    builder, discard, gone, host_time, kill, name, process, sandbox, shared, shell, store, until, within,
};
use cubbyhole::{LogLine, LogOptions, LogSource, Sandbox};
use tokio_stream::StreamExt;

async fn logs(sandbox: &Sandbox, options: LogOptions) -> Vec<LogLine> {
    let lines = within("logs", sandbox.logs(options)).await.unwrap();
    within("the lines", lines.collect()).await
}

/// What is in the log of one session, once so many lines are there.
async fn lines_of(sandbox: &Sandbox, session: u32, count: usize) -> Vec<LogLine> {
    let mut found = Vec::new();
    until("the lines", async || {
        found = logs(sandbox, LogOptions { session: Some(session), ..LogOptions::default() }).await;
        found.len() >= count
    })
    .await;
    found
}

fn texts(lines: &[LogLine]) -> Vec<(LogSource, String)> {
    lines.iter().map(|line| (line.source, line.text().into_owned())).collect()
}

async fn run(sandbox: &Sandbox, script: &str) -> u32 {
    let mut handle = within("start", sandbox.shell_stream(script)).await.unwrap();
    let id = handle.id();
    within("wait", handle.wait()).await.unwrap();
    id
}

#[tokio::test]
async fn each_line_is_there_with_its_session_its_source_and_its_time() {
    let sandbox = shared().await;
    let before = host_time();
    let id = run(&sandbox, "echo one; echo two >&2; printf 'no end'").await;
    let other = run(&sandbox, "echo another").await;
    let lines = lines_of(&sandbox, id, 3).await;
    let mut found = texts(&lines);
    found.sort_by_key(|(_, text)| text.clone());
    use LogSource::{Stderr, Stdout};
    assert_eq!(found, [(Stdout, "no end".into()), (Stdout, "one".into()), (Stderr, "two".into())]);
    for line in &lines {
        let at = line.at.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert!((before..=host_time()).contains(&at), "{line:?}");
        assert_eq!((line.session, line.ended), (Some(id), line.text() != "no end"));
    }
    assert_eq!(texts(&lines_of(&sandbox, other, 1).await), [(Stdout, "another".into())]);
    let terminal = within("exec", sandbox.exec_stream_with("echo", |o| o.args(["tty"]).tty(24, 80))).await;
    let mut terminal = terminal.unwrap();
    let id = terminal.id();
    within("wait", terminal.wait()).await.unwrap();
    assert_eq!(texts(&lines_of(&sandbox, id, 1).await), [(LogSource::Terminal, "tty\r".into())]);
}

#[tokio::test]
async fn a_log_is_followed_to_the_end_of_the_sandbox_and_goes_on_with_the_next_run() {
    let sandbox = sandbox("logs").await;
    let first = run(&sandbox, "echo first; echo second; echo third").await;
    lines_of(&sandbox, first, 3).await;
    let options = LogOptions { sources: vec![LogSource::Stdout], ..LogOptions::default() };
    let followed = LogOptions { follow: true, tail: Some(1), ..options.clone() };
    let mut following = within("logs", sandbox.logs(followed)).await.unwrap();
    let next = async |following: &mut (dyn tokio_stream::Stream<Item = LogLine> + Unpin + Send)| {
        within("a line", following.next()).await.map(|line| line.text().into_owned())
    };
    assert_eq!(next(&mut following).await.as_deref(), Some("third"));
    run(&sandbox, "echo fourth").await;
    assert_eq!(next(&mut following).await.as_deref(), Some("fourth"));
    // What comes last of all is there as well, and then it is over.
    let mut last =
        within("start", sandbox.shell_stream("trap 'echo last; exit' TERM; echo ready; sleep 86430 & wait"))
            .await
            .unwrap();
    cubby_tests::next_output(&mut last).await;
    assert_eq!(next(&mut following).await.as_deref(), Some("ready"));
    within("stop", sandbox.stop()).await.unwrap();
    assert_eq!(next(&mut following).await.as_deref(), Some("last"));
    assert_eq!(next(&mut following).await, None);

    // Stopped, and running again.
    let all = ["first", "second", "third", "fourth", "ready", "last"];
    let read = async |sandbox: &Sandbox| -> Vec<String> {
        logs(sandbox, options.clone()).await.iter().map(|line| line.text().into_owned()).collect()
    };
    assert_eq!(read(&sandbox).await, all);
    let sandbox = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    run(&sandbox, "echo fifth").await;
    until("the next run's line", async || read(&sandbox).await.last().is_some_and(|line| line == "fifth"))
        .await;
    assert_eq!(read(&sandbox).await[..6], all);

    // Killed with its keeper, so that nobody was there to write any more.
    let (sandbox_process, keeper) = (process(sandbox.name()), cubby_tests::keeper(sandbox.name()));
    kill(keeper.pid);
    kill(sandbox_process.pid);
    gone(&sandbox_process).await;
    assert_eq!(read(&sandbox).await[6..], ["fifth"]);
    let since = Some(logs(&sandbox, options.clone()).await[6].at);
    assert_eq!(logs(&sandbox, LogOptions { since, ..options.clone() }).await.len(), 1);

    // It goes with the sandbox.
    let files = store().home().logs(&sandbox.name().parse().unwrap());
    assert!(files.iter().all(|file| file.exists()));
    Sandbox::remove(sandbox.name()).await.unwrap();
    assert!(!files.iter().any(|file| file.exists()));
}

#[tokio::test]
async fn the_console_is_in_the_log_and_a_panic_with_it() {
    let sandbox = sandbox("logs-console").await;
    shell(&sandbox, "echo '<1>a word from the kernel' > /dev/kmsg").await;
    let console = LogOptions { sources: vec![LogSource::Console], ..LogOptions::default() };
    let said = async |text: &str| {
        logs(&sandbox, console.clone()).await.iter().any(|line| line.text().contains(text))
    };
    until("the console's line", async || said("a word from the kernel").await).await;
    let panic = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger";
    drop(within("a panic", sandbox.shell(panic)).await);
    until("the crash", async || sandbox.status().await.unwrap() == cubbyhole::Status::Crashed).await;
    assert!(said("Kernel panic").await, "{:?}", texts(&logs(&sandbox, console.clone()).await));
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_log_is_bounded_and_says_what_is_missing() {
    let sandbox = sandbox("logs-flood").await;
    let files = store().home().logs(&sandbox.name().parse().unwrap());
    let flood = async |bytes: u64| {
        let script = format!("echo begin; head -c {bytes} /dev/zero | tr '\\0' 'x'; echo; echo end");
        let id = run(&sandbox, &script).await;
        let mut found = Vec::new();
        until("the last line", async || {
            found = logs(&sandbox, LogOptions::default()).await;
            found.iter().any(|line| line.session == Some(id) && line.text() == "end")
        })
        .await;
        (id, found)
    };
    // It fits into the files: each byte is there, or is said to be missing, as many as the host was too slow for.
    let total = 6 << 20;
    let (id, found) = flood(total).await;
    let of_it = || found.iter().filter(|line| line.session == Some(id));
    assert_eq!(of_it().next().unwrap().text(), "begin");
    let mut kept = 0;
    for line in of_it().filter(|line| !["begin", "end"].contains(&&*line.text())) {
        assert!(line.bytes.iter().all(|byte| *byte == b'x'), "{:?}", line.text());
        kept += line.bytes.len() as u64;
    }
    let gaps = found.iter().filter(|line| line.source == LogSource::Gap);
    let missing: u64 = gaps.map(|line| line.text().split(' ').next().unwrap().parse::<u64>().unwrap()).sum();
    // The end of the long line may be among them.
    assert!(
        (total..=total + 1).contains(&(kept + missing)),
        "{kept} bytes kept, {missing} said to be missing"
    );
    // It does not fit: the newest is kept, and the files are what they may be.
    let (id, found) = flood(32 << 20).await;
    let sizes = files.map(|file| std::fs::metadata(file).unwrap().len());
    assert!(sizes.iter().all(|size| *size <= 4 << 20), "{sizes:?}");
    assert!(found.last().is_some_and(|line| line.session == Some(id) && line.text() == "end"));
    let kept: usize = found.iter().filter(|line| line.session == Some(id)).map(|line| line.bytes.len()).sum();
    assert!(kept >= 200 << 10, "{kept} bytes were kept");
    discard(sandbox).await;
}

#[tokio::test]
async fn who_wants_no_log_has_none() {
    let sandbox = within("create", builder(&name("logs-none")).logs(false).create()).await.unwrap();
    let id = run(&sandbox, "echo unheard").await;
    // Long enough for a line to have been written.
    let other = shared().await;
    let heard = run(&other, "echo heard").await;
    lines_of(&other, heard, 1).await;
    assert!(logs(&sandbox, LogOptions { session: Some(id), ..LogOptions::default() }).await.is_empty());
    let files = store().home().logs(&sandbox.name().parse().unwrap());
    assert!(!files.iter().any(|file| file.exists()));
    within("stop", sandbox.stop_with_timeout(Duration::from_secs(5))).await.unwrap();
    Sandbox::remove(sandbox.name()).await.unwrap();
}
