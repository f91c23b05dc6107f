//! One of many clients that do anything at any time. It prints `+NAME` before each create and fails on any answer
//! that no order of events explains.

use std::time::Duration;

use cubby_tests::{builder, random::Random, within};
use cubbyhole::{Error, Sandbox};

/// Creates `count` sandboxes, and does with them, and with those of others, what chance says.
pub async fn run(prefix: &str, seed: u64, count: u64) {
    let mut random = Random(seed);
    for number in 0..count {
        let name = format!("{prefix}-{seed:x}-{number}");
        println!("+{name}");
        let builder = builder(&name).memory(128);
        let sandbox = match random.below(3) {
            0 => within("create", builder.create_detached()).await,
            _ => within("create", builder.create()).await,
        };
        if let Ok(sandbox) = explained(&name, "create", sandbox) {
            for _ in 0..1 + random.below(4) {
                act(&mut random, &sandbox).await;
            }
        }
        if random.below(3) == 0 {
            let others = Sandbox::list().await.unwrap();
            if !others.is_empty() {
                let other = random.one_of(&others).name();
                if let Ok(other) = explained(other, "get", Sandbox::get(other).await) {
                    act(&mut random, &other).await;
                }
            }
        }
        // Few live at once: a machine has only so much memory.
        if random.below(4) > 0
            && let Ok(sandbox) = Sandbox::get(&name).await
        {
            forget(explained(&name, "kill", within("kill", sandbox.kill()).await));
        }
    }
}

/// Either answer will do.
fn forget<T>(_: Result<T, ()>) {}

/// Ends and removes everything.
pub async fn remove_all() {
    for handle in Sandbox::list().await.unwrap() {
        let sandbox = handle.connect().await.unwrap();
        if sandbox.status().await.unwrap().is_live() {
            forget(explained(handle.name(), "kill", within("kill", sandbox.kill()).await));
        }
        Sandbox::remove(handle.name()).await.unwrap();
    }
}

async fn act(random: &mut Random, sandbox: &Sandbox) {
    let name = sandbox.name();
    match random.below(12) {
        0..=2 => {
            let text = format!("{name} {}", random.bits());
            if let Ok(output) = explained(name, "exec", within("exec", sandbox.exec("echo", [&text])).await) {
                assert!(!output.success() || output.stdout().unwrap() == format!("{text}\n"), "{output:?}");
            }
        }
        3 => {
            let started = within("stream", sandbox.exec_stream("sleep", ["86411"])).await;
            if let Ok(mut sleep) = explained(name, "stream", started) {
                let _ = within("its start", sleep.next()).await;
            }
        }
        4 => forget(explained(name, "pause", within("pause", sandbox.pause()).await)),
        5 => forget(explained(name, "resume", within("resume", sandbox.resume()).await)),
        6 => {
            let deadline = Duration::from_millis(random.below(300));
            forget(explained(name, "drain", within("drain", sandbox.drain_with_deadline(deadline)).await));
        }
        7 => forget(explained(name, "stop", within("stop", sandbox.stop()).await)),
        8 => forget(explained(name, "kill", within("kill", sandbox.kill()).await)),
        9 => {
            // Panic or reset.
            let how = random.one_of(&["c", "b"]);
            let script = format!("echo {how} > /proc/sysrq-trigger");
            forget(explained(name, "harm", within("harm", sandbox.shell(script)).await));
        }
        10 => forget(explained(name, "start", within("start", Sandbox::start(name)).await)),
        _ => forget(explained(name, "remove", Sandbox::remove(name).await)),
    }
}

/// What a call gave, if an end, a kill or another client at any moment explains it.
fn explained<T>(name: &str, call: &str, result: Result<T, Error>) -> Result<T, ()> {
    result.map_err(|error| match error {
        Error::InvalidState { .. }
        | Error::Draining { .. }
        | Error::Ended { .. }
        | Error::NotFound { .. }
        | Error::Process { .. }
        | Error::BootFailed { .. } => {}
        error => panic!("{call} of {name}: {error:?}"),
    })
}
