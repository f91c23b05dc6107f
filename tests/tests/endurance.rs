//! A thousand commands leave nothing behind: not in the application, not in the sandbox process, not in the guest.

use cubby_tests::{Client, Holdings, discard, sandbox, shell};

use crate::CLIENT;

/// What an allocator may keep by chance, in KiB. One that leaks 300 bytes for each command is over it.
const CHANCE_KIB: u64 = 256;

#[tokio::test]
async fn a_thousand_commands_take_no_memory_descriptors_or_threads() {
    let sandbox = sandbox("endurance").await;
    // Another process does it, so that no other test is in its figures.
    let mut client = Client::start(&[CLIENT, "endurance", sandbox.name(), "100", "1000"]);
    let mut holdings = Vec::new();
    while holdings.len() < 6 {
        holdings.push(client.line().await.parse::<Holdings>().unwrap());
    }
    client.finish().await;
    let (early, late) = holdings.split_at(3);
    for ((who, early), late) in
        ["the application", "the sandbox process", "the agent"].iter().zip(early).zip(late)
    {
        println!("{who}: {early:?}, later {late:?}");
        assert_eq!(early.descriptors, late.descriptors, "{who}'s descriptors");
        assert_eq!(early.threads, late.threads, "{who}'s threads");
        let growth = late.anonymous_kib.saturating_sub(early.anonymous_kib);
        assert!(growth <= CHANCE_KIB, "{who} took {growth} KiB");
    }
    // No process is left either: PID 1's children are the one that asks and no zombie.
    let children = "for p in /proc/[0-9]*; do read pid name state parent rest < $p/stat; \
                    [ \"$parent\" != 1 ] || echo $name; done 2>/dev/null";
    assert_eq!(shell(&sandbox, children).await, "(sh)\n");
    discard(sandbox).await;
}
