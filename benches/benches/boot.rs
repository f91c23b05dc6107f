//! Create to ready with each of its steps, commands, and every way to an end, as a host that embeds the SDK pays
//! for them.
//!
//! `cargo bench` on the wall clock, `cargo xtask bench --icount` on the instruction clock. Text goes to standard
//! output; `bench/boot-CLOCK.json` and `.svg` to the target directory. On the instruction clock it fails if a promise of
//! SPEC.md was broken.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use cubby_benches::{Report, Samples, boot_picture, broken_promises};
use cubby_state::{ExitReason, ExitReport, Home, SandboxConfig, SandboxName, Store};
use cubbyhole::{Error, ExecEvent, NetworkPolicy, Sandbox};

/// Boots measured, after one that fills the caches.
const BOOTS: usize = 7;
/// Commands measured in each, after a few that fill the guest's caches.
const COMMANDS: usize = 50;
const WARM_UP: usize = 5;
/// Pauses measured in each.
const PAUSES: usize = 10;
/// Sandboxes in the list that is measured.
const LISTED: usize = 1000;

fn main() {
    // `cargo test --benches` runs it with this argument: once is enough to see that it works.
    let boots = if std::env::args().any(|argument| argument == "--test") { 1 } else { BOOTS };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let report = match runtime.block_on(measure(boots)) {
        Ok(samples) => samples.report(&clock()),
        Err(error) => {
            eprintln!("boot: {error}");
            std::process::exit(1);
        }
    };
    print!("{}", report.table());
    write(&report);
    let broken = if report.clock == INSTRUCTIONS { broken_promises(&report) } else { Vec::new() };
    broken.iter().for_each(|promise| eprintln!("boot: broken: {promise}"));
    if !broken.is_empty() {
        std::process::exit(1);
    }
}

/// The name of the clock on which promises are kept.
const INSTRUCTIONS: &str = "instructions";

/// Which clock times are read from: whoever runs this on an instruction clock says so.
fn clock() -> String {
    std::env::var("CUBBY_CLOCK").unwrap_or_else(|_| "wall".into())
}

async fn measure(boots: usize) -> Result<Samples, Error> {
    let image = std::env::var("CUBBY_TEST_IMAGE")
        .expect("CUBBY_TEST_IMAGE is not set: run this with `cargo xtask bench`, which sets it");
    let mut samples = Samples::default();
    boot(&image, &mut Samples::default()).await?;
    for round in 1..=boots {
        boot(&image, &mut samples).await?;
        offline(&image, &mut samples).await?;
        eprintln!("boot {round} of {boots}");
    }
    list(boots, &mut samples).await?;
    Ok(samples)
}

/// What a create takes without a network, and so what a network costs.
async fn offline(image: &str, samples: &mut Samples) -> Result<(), Error> {
    let name = format!("bench-offline-{}", std::process::id());
    let builder = Sandbox::builder(&name).image(image).network(NetworkPolicy::none());
    let (sandbox, time) = timed(builder.create()).await;
    let sandbox = sandbox?;
    samples.add("create, no network", time);
    for phase in sandbox.boot_phases() {
        samples.add(&format!("create, no network: {}", phase.name), phase.duration);
    }
    for _ in 0..PAUSES {
        let (paused, time) = timed(sandbox.pause()).await;
        paused?;
        samples.add("pause, no network", time);
        sandbox.resume().await?;
    }
    sandbox.kill().await?;
    Sandbox::remove(&name).await
}

async fn boot(image: &str, samples: &mut Samples) -> Result<(), Error> {
    let name = format!("bench-{}", std::process::id());
    let (sandbox, time) = timed(Sandbox::builder(&name).image(image).create()).await;
    let sandbox = sandbox?;
    samples.add("create", time);
    let mut inside = Duration::ZERO;
    for phase in sandbox.boot_phases() {
        samples.add(&format!("create: {}", phase.name), phase.duration);
        inside += phase.duration;
    }
    samples.add("create: sdk", time.saturating_sub(inside));

    for round in 0..COMMANDS + WARM_UP {
        let (ping, ping_time) = timed(sandbox.ping()).await;
        ping?;
        let (output, exec_time) = timed(sandbox.exec("true", [""; 0])).await;
        assert!(output?.success());
        let (output, shell_time) = timed(sandbox.shell("echo hello")).await;
        assert_eq!(output?.stdout()?, "hello\n");
        let first_byte_time = first_byte(&sandbox).await?;
        if round >= WARM_UP {
            samples.add("ping", ping_time);
            samples.add("exec true", exec_time);
            samples.add("shell echo", shell_time);
            samples.add("shell first byte", first_byte_time);
        }
    }
    for _ in 0..COMMANDS {
        let (metrics, time) = timed(sandbox.metrics()).await;
        metrics?;
        samples.add("metrics", time);
        let (emitted, time) = timed(sandbox.emit("event", "data")).await;
        emitted?;
        samples.add("emit", time);
    }
    for round in 0..=PAUSES {
        let (pause, resume) =
            if round == 0 { ("pause, first", "resume, first") } else { ("pause", "resume") };
        let (paused, time) = timed(sandbox.pause()).await;
        paused?;
        samples.add(pause, time);
        let (resumed, time) = timed(sandbox.resume()).await;
        resumed?;
        samples.add(resume, time);
    }
    let (stopped, time) = timed(sandbox.stop()).await;
    stopped?;
    samples.add("stop", time);
    let sandbox = Sandbox::start(&name).await?;
    let (killed, time) = timed(sandbox.kill()).await;
    killed?;
    samples.add("kill", time);
    Sandbox::remove(&name).await
}

/// How long until a shell's first output is in the caller's hands.
async fn first_byte(sandbox: &Sandbox) -> Result<Duration, Error> {
    let begin = Instant::now();
    let mut shell = sandbox.shell_stream("echo hello").await?;
    let mut time = None;
    while let Some(event) = shell.next().await {
        if let ExecEvent::Stdout(_) = event? {
            time.get_or_insert(begin.elapsed());
        }
    }
    Ok(time.expect("the shell wrote"))
}

/// The list of a store that many sandboxes are in; none of them runs.
async fn list(times: usize, samples: &mut Samples) -> Result<(), Error> {
    let store = Store::open(&Home::from_env().expect("the home"))?;
    let config: SandboxConfig = serde_json::from_str(r#"{"image": {"reference": "listed"}}"#).unwrap();
    let names = || (0..LISTED).map(|number| format!("listed-{number}").parse::<SandboxName>().unwrap());
    for name in names() {
        let run = store.create(&name, &config)?.run.id;
        store.finish(run, &ExitReport::now(ExitReason::Killed))?;
    }
    for _ in 0..times {
        let (list, time) = timed(Sandbox::list()).await;
        assert_eq!(list?.len(), LISTED);
        samples.add(&format!("list of {LISTED}"), time);
    }
    for name in names() {
        store.remove(&name)?;
    }
    Ok(())
}

async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let begin = Instant::now();
    let value = future.await;
    (value, begin.elapsed())
}

fn write(report: &Report) {
    let directory = directory();
    let base = directory.join(format!("boot-{}", report.clock));
    let json = serde_json::to_string_pretty(report).unwrap();
    let steps: Vec<_> = report.series.iter().filter(|series| series.name.starts_with("create: ")).collect();
    let written = std::fs::create_dir_all(&directory)
        .and_then(|()| std::fs::write(base.with_extension("json"), json))
        .and_then(|()| std::fs::write(base.with_extension("svg"), boot_picture(&report.clock, &steps)));
    match written {
        Ok(()) => println!("wrote {0}.json and {0}.svg", base.display()),
        Err(error) => eprintln!("{}: {error}", base.display()),
    }
}

/// The target directory, which the program may have been copied out of.
fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))).join("bench")
}
