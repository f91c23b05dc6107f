//! The sandbox process between its clients and its guest.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use cubby_tests::{Client, builder, discard, freeze, name, process, sandbox, shared, shell, until, within};
use cubbyhole::{Error, Sandbox};
use tokio::task::JoinSet;

use crate::CLIENT;

/// "The sandbox process does not execute guest commands itself. It only relays traffic between your application and the
/// guest agent."
#[tokio::test]
async fn the_sandbox_process_does_not_execute_guest_commands_itself() {
    let sandbox = shared().await;
    let mut sleep = within("start", sandbox.exec_stream("sleep", ["86409.5"])).await.unwrap();
    within("start", sleep.next()).await.unwrap().unwrap();
    let pid = process(sandbox.name()).pid;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let children = std::fs::read_to_string(thread.unwrap().path().join("children")).unwrap();
        assert_eq!(children, "", "the sandbox process has children");
    }
    let commands = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|process| std::fs::read_to_string(process.ok()?.path().join("cmdline")).ok());
    assert!(!commands.into_iter().any(|line| line.contains("86409.5")), "the host runs the guest's command");
    assert_eq!(shell(&sandbox, "grep -al '86409[.]5' /proc/[0-9]*/cmdline | wc -l").await, "1\n");
}

/// "Up to 16 clients can connect to the same sandbox simultaneously."
#[tokio::test]
async fn sixteen_clients_work_at_once_and_fairly_and_the_seventeenth_is_told() {
    let owner = sandbox("crowded").await;
    let name = owner.name().to_owned();
    let mut clients = vec![owner.clone()];
    // The last place but one is another process's, which will die; the last one's, which will only stall.
    let mut stalled = Client::start(&[CLIENT, "flood", &name]);
    assert_eq!(stalled.line().await, "flooded");
    freeze(stalled.pid());
    let mut dying = Client::start(&[CLIENT, "hold", &name]);
    assert_eq!(dying.line().await, name);
    while clients.len() < 14 {
        let client = Sandbox::get(&name).await.unwrap();
        within("ping", client.ping()).await.unwrap();
        clients.push(client);
    }
    let seventeenth = Sandbox::get(&name).await.unwrap();
    let refused = within("exec", seventeenth.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::TooManyClients { max: 16, .. })), "{refused:?}");

    // All that are left work at once until one has done enough, one of the sixteen stalled all the time.
    const ENOUGH: u32 = 10;
    let enough = Arc::new(AtomicBool::new(false));
    let mut working = JoinSet::new();
    for (number, client) in clients.iter().cloned().enumerate() {
        let enough = enough.clone();
        working.spawn(async move {
            let mut done = 0;
            while !enough.load(Relaxed) {
                let text = format!("{number} {done}");
                let output = within("exec", client.exec("echo", [&text])).await.unwrap();
                assert_eq!(output.stdout().unwrap(), format!("{text}\n"));
                done += 1;
                enough.fetch_or(done >= ENOUGH, Relaxed);
            }
            done
        });
    }
    let done = working.join_all().await;
    println!("commands of each client: {done:?}");
    assert!(*done.iter().min().unwrap() >= ENOUGH / 2, "{done:?}");

    // The seventeenth is still refused, and a client that dies frees its place.
    let refused = within("exec", seventeenth.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::TooManyClients { .. })), "{refused:?}");
    dying.kill().await;
    until("a free place", async || seventeenth.exec("true", [""; 0]).await.is_ok()).await;
    stalled.kill().await;
    discard(owner).await;
}

#[tokio::test]
async fn max_clients_says_how_many_there_may_be() {
    let name = name("private");
    let owner = within("create", builder(&name).max_clients(1).create()).await.unwrap();
    let second = Sandbox::get(&name).await.unwrap();
    let refused = within("exec", second.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::TooManyClients { max: 1, .. })), "{refused:?}");
    // Killing it needs no place.
    within("kill", second.kill()).await.unwrap();
    drop(owner);
    Sandbox::remove(&name).await.unwrap();
}

#[tokio::test]
async fn what_a_client_leaves_behind_ends_with_it() {
    let sandbox = sandbox("deserted").await;
    let mut client = Client::start(&[CLIENT, "flood", sandbox.name()]);
    assert_eq!(client.line().await, "flooded");
    // One that would die of its closed output, and one that would not.
    assert_eq!(shell(&sandbox, "pidof yes sleep | wc -w").await, "2\n");
    client.kill().await;
    until("the end of the commands", async || shell(&sandbox, "pidof yes sleep | wc -w").await == "0\n")
        .await;
    discard(sandbox).await;
}
