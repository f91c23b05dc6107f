//! Thousands of connections of one guest at once: each of them works, and when they are gone, so is what they took.
//!
//! `CUBBY_CONNECTIONS` is how many there are: 10,000 unless told otherwise, which is the whole promise.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use cubby_tests::{BOUND, Holdings, discard, number, own_kib, process, run_traffic, until};
use cubby_traffic::{Guest, Order};

use crate::network::online_with;

/// What the buffers of a sandbox process may still hold when the connections are gone, in KiB: memory that is kept for the next ring
/// (8 MiB, `network/src/ring.rs`), and tables that have grown with the connections and do not shrink.
const KEPT_KIB: u64 = (8 << 10) + (8 << 10);

/// Memory of the guest, in MiB.
const MEMORY: u32 = 512;

/// What a connection may take of the sandbox process, in bytes.
const EACH: u64 = 1024;

/// How much longer each of them may make it, on the slowest machine that has other work.
const EACH_TAKES: Duration = Duration::from_millis(50);

/// Descriptors of this test beside those of its connections.
const OWN: u64 = 200;

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_connections_are_held_and_leave_nothing() {
    let count = u32::try_from(number("CUBBY_CONNECTIONS", 10_000)).unwrap();
    let most = cubby_traffic::raise_descriptors();
    let needed = u64::from(count) + OWN;
    assert!(most >= needed, "{count} connections need {needed} descriptors, and the hard limit is {most} (ulimit -Hn)");
    let sandbox = online_with("connections", |building| building.memory(MEMORY)).await;
    let pid = process(sandbox.name()).pid;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let traffic = run_traffic(&sandbox, &listener).await;
    let mut guest = Guest::accept(&listener).unwrap();
    let (before, memory) = (Holdings::of(pid), own_kib(pid, MEMORY));
    let begin = Instant::now();
    let (tell, told) = tokio::sync::oneshot::channel();
    // A thread that nobody waits for, should it wait for ever.
    std::thread::spawn(move || {
        guest.order(Order::Hold { count }).unwrap();
        // The guest says what fails, which who accepts would never hear.
        let accepting = std::thread::spawn(move || {
            (0..count).map(|_| listener.accept().map(|(stream, _)| stream)).collect::<Result<Vec<_>, _>>()
        });
        guest.ready().unwrap();
        let mut streams = accepting.join().unwrap().unwrap();
        let held = (Holdings::of(pid), own_kib(pid, MEMORY), begin.elapsed());
        guest.go().unwrap();
        // All of them speak, and all are answered.
        let mut byte = [0];
        for stream in &mut streams {
            stream.set_read_timeout(Some(BOUND)).unwrap();
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&byte).unwrap();
        }
        guest.ready().unwrap();
        let spoken = begin.elapsed();
        guest.go().unwrap();
        guest.done().unwrap();
        for stream in &mut streams {
            assert_eq!(stream.read(&mut byte).unwrap(), 0);
        }
        let _ = tell.send((guest, held, spoken));
    });
    let bound = BOUND + EACH_TAKES * count;
    let told = tokio::time::timeout(bound, told).await;
    let (guest, (held, memory_held, opened), spoken) = told.expect("the connections in time").unwrap();
    assert_eq!(held.descriptors, before.descriptors + usize::try_from(count).unwrap(), "one descriptor each");
    let each = memory_held.saturating_sub(memory) * 1024 / u64::from(count);
    until("the descriptors' end", async || Holdings::of(pid).descriptors == before.descriptors).await;
    let after = own_kib(pid, MEMORY);
    println!(
        "{count} connections, {each} bytes each: {memory} KiB, then {memory_held}, then {after}; \
         open after {opened:?}, all heard after {spoken:?}, gone after {:?}",
        begin.elapsed()
    );
    assert!(each <= EACH, "a connection takes {each} bytes of the sandbox process");
    assert!(after <= memory + KEPT_KIB, "{memory} KiB, and {after} afterwards");
    drop((guest, traffic));
    discard(sandbox).await;
}
