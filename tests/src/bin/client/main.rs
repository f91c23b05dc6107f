//! Another program that uses sandboxes, for promises about what happens between processes. It prints what it
//! sees, a line at a time, and ends when its standard input does.
//!
//! `cubby-test-client attached|detached|detaching|hold|flood|leave NAME | run NAME SCRIPT | list |
//! endurance NAME WARM_UP TOTAL | create NAME IMAGE | chaos PREFIX SEED COUNT | remove-all |
//! full-disk NAME`
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod chaos;
mod full_disk;

use std::time::Instant;

use cubby_tests::{Holdings, builder};
use cubbyhole::{Error, ExecEvent, Sandbox};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["attached", name] => hold(builder(name).create().await.unwrap()).await,
        ["detached", name] => hold(builder(name).create_detached().await.unwrap()).await,
        ["detaching", name] => {
            let sandbox = builder(name).create().await.unwrap();
            sandbox.clone().detach().await.unwrap();
            hold(sandbox).await;
        }
        ["hold", name] => {
            let sandbox = Sandbox::get(name).await.unwrap();
            sandbox.ping().await.unwrap();
            hold(sandbox).await;
        }
        ["flood", name] => flood(name).await,
        ["leave", name] => leave(name).await,
        ["run", name, script] => {
            let output = Sandbox::get(name).await.unwrap().shell(script).await.unwrap();
            print!("{}", output.stdout().unwrap());
        }
        ["list"] => {
            for handle in Sandbox::list().await.unwrap() {
                println!("{}: {:?}", handle.name(), handle.status());
            }
        }
        ["endurance", name, warm_up, total] => {
            endure(name, warm_up.parse().unwrap(), total.parse().unwrap()).await;
        }
        ["chaos", prefix, seed, count] => {
            chaos::run(prefix, seed.parse().unwrap(), count.parse().unwrap()).await;
        }
        ["full-disk", name] => full_disk::run(name).await,
        ["remove-all"] => chaos::remove_all().await,
        ["create", name, image] => try_to_create(name, image).await,
        _ => panic!("not a call of this program: {arguments:?}"),
    }
}

/// Keeps a sandbox until the input ends, and then leaves it to its fate.
async fn hold(sandbox: Sandbox) {
    println!("{}", sandbox.name());
    tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin())).await.unwrap().unwrap();
}

/// Takes output without end, as fast as it comes, and has a silent command beside it.
async fn flood(name: &str) {
    let sandbox = Sandbox::get(name).await.unwrap();
    let mut sleep = sandbox.exec_stream("sleep", ["86412"]).await.unwrap();
    sleep.next().await.unwrap().unwrap();
    let mut yes = sandbox.exec_stream("yes", ["flood"]).await.unwrap();
    let mut told = false;
    while let Some(event) = yes.next().await {
        if let (ExecEvent::Stdout(_), false) = (event.unwrap(), told) {
            println!("flooded");
            told = true;
        }
    }
}

/// Has three commands, lets one of them go, prints its number, and takes nothing of what the others write.
async fn leave(name: &str) {
    let sandbox = Sandbox::get(name).await.unwrap();
    let silent = sandbox.exec_stream("sleep", ["86420"]).await.unwrap();
    let _loud = sandbox.exec_stream("yes", ["86421"]).await.unwrap();
    let script = "echo before; while read line; do echo \"got $line\"; done; echo over >&2; exit 7";
    let mut kept = sandbox.shell_stream(script).await.unwrap();
    let id = kept.id();
    while !matches!(kept.next().await.unwrap().unwrap(), ExecEvent::Stdout(_)) {}
    kept.detach().await.unwrap();
    println!("{id}");
    hold(sandbox).await;
    drop(silent);
}

/// Runs commands one after another and tells what this process, the sandbox process and the agent hold.
async fn endure(name: &str, warm_up: u32, total: u32) {
    let sandbox = Sandbox::get(name).await.unwrap();
    let process = cubby_tests::process(name).pid;
    for count in 1..=total {
        let output = sandbox.exec("echo", [count.to_string()]).await.unwrap();
        assert_eq!(output.stdout().unwrap(), format!("{count}\n"));
        if count == warm_up || count == total {
            let agent = Holdings::of_agent(&sandbox).await;
            println!("{}", Holdings::of(std::process::id()));
            println!("{}", Holdings::of(process));
            println!("{agent}");
        }
    }
}

/// Tries to create a sandbox; prints how many microseconds that took, and what came of it.
async fn try_to_create(name: &str, image: &str) {
    let begin = Instant::now();
    let created = Sandbox::builder(name).image(image).create().await;
    println!("{}", begin.elapsed().as_micros());
    match created {
        Ok(sandbox) => {
            println!("created");
            sandbox.stop().await.unwrap();
        }
        Err(Error::HostUnsupported { why, remedy }) => println!("unsupported\n{why}\n{remedy}"),
        Err(error) => println!("{error:?}"),
    }
}
