//! Runs programs that nobody has read: each has its time and no way out, and whatever it does has a name.
//!
//! `cargo run --example run_code [IMAGE]`
use std::time::Duration;

use cubbyhole::{Error, ExecErrorKind, Sandbox};

/// Programs, and how many seconds each may take.
const PROGRAMS: [(&str, u64); 5] = [
    ("print(sum(n * n for n in range(1000)))", 60),
    ("print(1 / 0)", 60),
    ("while True: pass", 1),
    ("import os; os.kill(os.getpid(), 9)", 60),
    ("hoard = [bytearray(1 << 20) for _ in range(1 << 20)]", 240),
];

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("run-code-{}", std::process::id());
    let sandbox = Sandbox::builder(name).image(image).memory(64).ephemeral(true).create().await?;
    for (program, seconds) in PROGRAMS {
        println!("{program}\n    {}", run(&sandbox, program, seconds).await?);
    }
    sandbox.stop().await
}

/// What became of it, in words. An error is one of the sandbox, not of the program.
async fn run(sandbox: &Sandbox, program: &str, seconds: u64) -> Result<String, Error> {
    let most = Duration::from_secs(seconds);
    let run = sandbox.exec_with("python3", |options| options.args(["-c", program]).timeout(most)).await;
    match run {
        Ok(output) => match (output.status().code, output.status().signal) {
            (Some(0), _) => Ok(output.stdout()?.trim_end().to_owned()),
            (Some(code), _) => {
                let errors = output.stderr()?;
                Ok(format!("exit code {code}: {}", errors.lines().last().unwrap_or_default()))
            }
            (None, signal) => Ok(format!("killed by signal {}", signal.unwrap_or_default())),
        },
        Err(Error::Timeout { .. }) => Ok("too slow: it was ended".into()),
        Err(Error::ExecFailed { kind: ExecErrorKind::KilledForMemory, .. }) => {
            Ok("too greedy: the guest had no more memory".into())
        }
        Err(error) => Err(error),
    }
}
