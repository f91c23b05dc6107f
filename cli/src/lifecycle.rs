//! What is done to sandboxes that are there: to several at once, each with its own success or failure.

use std::collections::BTreeMap;
use std::time::Duration;

use cubbyhole::{Error, Sandbox, Status};
use tokio::task::JoinSet;

use crate::failure::{Failure, complain, explain};
use crate::output;

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// Boot it; nobody stays behind.
    Start,
    /// End its processes, then it.
    Stop {
        /// How long that may take.
        timeout: Duration,
    },
    /// End it at once.
    Kill,
    /// Freeze it.
    Pause,
    /// Let it go on.
    Resume,
    /// Let what runs finish, then end it.
    Drain {
        /// When that has to be over.
        deadline: Option<Duration>,
    },
    /// Forget it, disk and all.
    Remove {
        /// Kill it if it runs.
        force: bool,
    },
}

/// Does it to each of `names`, side by side. Prints the names of those that it was done to, in their order.
pub async fn each(names: Vec<String>, operation: Operation) -> Result<u8, Failure> {
    let mut tasks = JoinSet::new();
    let mut seen = Vec::new();
    for name in names {
        // Who is named twice is meant once.
        if !seen.contains(&name) {
            let number = seen.len();
            seen.push(name.clone());
            tasks.spawn(async move { (number, perform(operation, &name).await, name) });
        }
    }
    let mut code = 0;
    let mut waiting = BTreeMap::new();
    let mut next = 0;
    while let Some(done) = tasks.join_next().await {
        let (number, result, name) = done.map_err(|error| Failure::new(error.to_string()))?;
        waiting.insert(number, (result, name));
        while let Some((result, name)) = waiting.remove(&next) {
            next += 1;
            match result {
                Ok(()) => drop(output::print(format!("{name}\n").as_bytes())?),
                Err(error) => {
                    complain(&explain(&error));
                    code = 1;
                }
            }
        }
    }
    Ok(code)
}

async fn perform(operation: Operation, name: &str) -> Result<(), Error> {
    match operation {
        Operation::Start => Sandbox::start_detached(name).await.map(drop),
        Operation::Stop { timeout } => Sandbox::get(name).await?.stop_with_timeout(timeout).await,
        Operation::Kill => Sandbox::get(name).await?.kill().await,
        Operation::Pause => Sandbox::get(name).await?.pause().await,
        Operation::Resume => Sandbox::get(name).await?.resume().await,
        Operation::Drain { deadline: None } => Sandbox::get(name).await?.drain().await,
        Operation::Drain { deadline: Some(deadline) } => {
            Sandbox::get(name).await?.drain_with_deadline(deadline).await
        }
        Operation::Remove { force: false } => Sandbox::remove(name).await,
        Operation::Remove { force: true } => remove(name).await,
    }
}

/// Removes what runs, too. One that ends or removes itself meanwhile is as good.
async fn remove(name: &str) -> Result<(), Error> {
    let sandbox = Sandbox::get(name).await?;
    let live = |status: Status| status.is_live();
    if sandbox.status().await.is_ok_and(live) {
        match sandbox.kill().await {
            Ok(()) | Err(Error::InvalidState { .. } | Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    match Sandbox::remove(name).await {
        Err(Error::NotFound { .. }) => Ok(()),
        result => result,
    }
}
