//! A pool of workers: each takes jobs from one queue and runs them in a sandbox of its own. After some jobs the sandbox
//! is drained, so that what it still runs may finish, while a fresh one takes its place.
//!
//! `cargo run --example pool [IMAGE]`
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use cubbyhole::{Error, Sandbox};
use tokio::task::JoinSet;

const WORKERS: usize = 2;
const JOBS: u32 = 8;
/// How many jobs one sandbox gets.
const PER_SANDBOX: usize = 3;

type Queue = Arc<Mutex<VecDeque<u32>>>;

/// Takes the next jobs for one sandbox.
fn take(queue: &Queue) -> Vec<u32> {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    let count = queue.len().min(PER_SANDBOX);
    queue.drain(..count).collect()
}

async fn worker(worker: usize, image: String, queue: Queue) -> Result<Vec<String>, Error> {
    let (mut running, mut retiring) = (JoinSet::new(), JoinSet::new());
    for generation in 0.. {
        let jobs = take(&queue);
        if jobs.is_empty() {
            break;
        }
        let name = format!("pool-{}-{worker}-{generation}", std::process::id());
        let sandbox = Sandbox::builder(name).image(&image).memory(192).ephemeral(true).create().await?;
        for job in jobs {
            let script = format!("sleep 1; echo job {job}: $(({job} * {job}))");
            let mut command = sandbox.shell_stream(script).await?;
            running.spawn(async move {
                let mut output = Vec::new();
                while let Some(event) = command.next().await {
                    if let cubbyhole::ExecEvent::Stdout(bytes) = event? {
                        output.extend_from_slice(&bytes);
                    }
                }
                Ok::<_, Error>(String::from_utf8_lossy(&output).into_owned())
            });
        }
        // The jobs are under way; the next sandbox boots while they finish.
        retiring.spawn(async move { sandbox.drain().await });
    }
    let results = running.join_all().await.into_iter().collect();
    retiring.join_all().await.into_iter().collect::<Result<(), Error>>()?;
    results
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let queue: Queue = Arc::new(Mutex::new((1..=JOBS).collect()));
    let workers: JoinSet<_> = (0..WORKERS).map(|n| worker(n, image.clone(), queue.clone())).collect();
    let mut lines = Vec::new();
    for results in workers.join_all().await {
        lines.extend(results?);
    }
    lines.sort();
    print!("{}", lines.concat());
    Ok(())
}
