//! What a sandbox's log costs its commands: the same work in a sandbox that keeps one and in one that does not, in turns.
//!
//! `CUBBY_KVM_MODE=icount CUBBY_CLOCK=instructions cargo bench -p cubby-benches --bench logs` for the instruction clock, on
//! which it fails if a log costs more than SPEC.md says. A log is written a while after the command: so what counts is
//! what many commands take together, and not the median of one.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use cubby_benches::Samples;
use cubbyhole::{Error, ExecEvent, Sandbox};

/// Measurements of each.
const ROUNDS: usize = 5;
/// Commands of one measurement.
const COMMANDS: usize = 100;
/// Bytes of output of one measurement.
const BULK: usize = 100 << 20;

/// What is measured, and what a log may add to it, in percent.
const WORK: [(&str, f64); 2] = [("commands", 2.0), ("100 MiB of output", 10.0)];

/// The two sandboxes.
const KINDS: [(&str, bool); 2] = [("log", true), ("no log", false)];

fn main() {
    let rounds = if std::env::args().any(|argument| argument == "--test") { 1 } else { ROUNDS };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let samples = runtime.block_on(measure(rounds)).unwrap_or_else(|error| {
        eprintln!("logs: {error}");
        std::process::exit(1)
    });
    let clock = std::env::var("CUBBY_CLOCK").unwrap_or_else(|_| "wall".into());
    let report = samples.report(&clock);
    print!("{}", report.table());
    let mut dear = false;
    for (work, most) in WORK {
        let median = |kind| report.get(&format!("{work}, {kind}")).expect("it was measured").p50_ms;
        let more = (median("log") / median("no log") - 1.0) * 100.0;
        println!("{work}: a log costs {more:.1} %, promised are {most} %");
        dear |= more > most;
    }
    if dear && clock == "instructions" {
        std::process::exit(1);
    }
}

async fn measure(rounds: usize) -> Result<Samples, Error> {
    let image = std::env::var("CUBBY_TEST_IMAGE").expect("the runner sets it");
    let mut sandboxes = Vec::new();
    for (kind, logs) in KINDS {
        let name = format!("bench-logs-{logs}-{}", std::process::id());
        sandboxes
            .push((kind, Sandbox::builder(&name).image(&image).logs(logs).ephemeral(true).create().await?));
    }
    let mut samples = Samples::default();
    // The first round fills the caches.
    for round in 0..=rounds {
        for (kind, sandbox) in &sandboxes {
            let times = [commands(sandbox).await?, output(sandbox).await?];
            for ((work, _), time) in WORK.iter().zip(times).filter(|_| round > 0) {
                samples.add(&format!("{work}, {kind}"), time);
            }
        }
    }
    for (_, sandbox) in sandboxes {
        sandbox.kill().await?;
    }
    Ok(samples)
}

/// Commands that write a line each.
async fn commands(sandbox: &Sandbox) -> Result<Duration, Error> {
    let begin = Instant::now();
    for _ in 0..COMMANDS {
        assert_eq!(sandbox.exec("echo", ["hello"]).await?.stdout()?, "hello\n");
    }
    Ok(begin.elapsed())
}

/// One command that writes as fast as it is read.
async fn output(sandbox: &Sandbox) -> Result<Duration, Error> {
    let (begin, mut came) = (Instant::now(), 0);
    let mut handle = sandbox.exec_stream("head", ["-c", &BULK.to_string(), "/dev/zero"]).await?;
    while let Some(event) = handle.next().await {
        if let ExecEvent::Stdout(bytes) = event? {
            came += bytes.len();
        }
    }
    assert_eq!(came, BULK);
    Ok(begin.elapsed())
}
