//! Thousands of connections of one guest at once: each of them works, and when they are gone, so is what they took.
//!
//! `CUBBY_CONNECTIONS` is how many there are (10,000 for the whole promise, 2,000 unless told otherwise).

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use cubby_tests::{BOUND, Holdings, discard, number, own_kib, process, run_traffic, until};
use cubby_traffic::{Guest, Order};

use crate::network::online_with;

/// What the buffers of a sandbox process may still hold when the connections are gone, in KiB: memory that is kept for the next ring
/// (8 MiB, `network/src/ring.rs`), and tables that have grown with the connections and do not shrink.
const KEPT_KIB: u64 = (8 << 10) + (8 << 10);

/// Memory of the guest, in MiB.
const MEMORY: u32 = 512;

/// What a connection may take of the sandbox process, in bytes.
const EACH: u64 = 2048;

/// How much longer each of them may make it, on the slowest machine.
const EACH_TAKES: Duration = Duration::from_millis(50);

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_connections_are_held_and_leave_nothing() {
    let count = u32::try_from(number("CUBBY_CONNECTIONS", 2000)).unwrap();
    cubby_traffic::raise_descriptors();
    let sandbox = online_with("connections", |building| building.memory(MEMORY)).await;
    let pid = process(sandbox.name()).pid;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let traffic = run_traffic(&sandbox, &listener).await;
    let mut guest = Guest::accept(&listener).unwrap();
    let (before, memory) = (Holdings::of(pid), own_kib(pid, MEMORY));
    let (tell, told) = tokio::sync::oneshot::channel();
    // A thread that nobody waits for, should it wait for ever.
    std::thread::spawn(move || {
        guest.order(Order::Hold { count }).unwrap();
        let mut streams = Vec::new();
        for _ in 0..count {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
            streams.push(stream);
        }
        guest.ready().unwrap();
        let held = (Holdings::of(pid), own_kib(pid, MEMORY));
        guest.go().unwrap();
        // All of them speak, and all are answered.
        let mut byte = [0];
        for stream in &mut streams {
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&byte).unwrap();
        }
        guest.ready().unwrap();
        guest.go().unwrap();
        guest.done().unwrap();
        for stream in &mut streams {
            assert_eq!(stream.read(&mut byte).unwrap(), 0);
        }
        let _ = tell.send((guest, held));
    });
    let bound = BOUND + EACH_TAKES * count;
    let told = tokio::time::timeout(bound, told).await;
    let (guest, (held, memory_held)) = told.expect("the connections in time").unwrap();
    assert_eq!(held.descriptors, before.descriptors + usize::try_from(count).unwrap(), "one descriptor each");
    let each = memory_held.saturating_sub(memory) * 1024 / u64::from(count);
    until("the descriptors' end", async || Holdings::of(pid).descriptors == before.descriptors).await;
    let after = own_kib(pid, MEMORY);
    println!("{count} connections, {each} bytes each: {memory} KiB, then {memory_held}, then {after}");
    assert!(each <= EACH, "a connection takes {each} bytes of the sandbox process");
    assert!(after <= memory + KEPT_KIB, "{memory} KiB, and {after} afterwards");
    drop((guest, traffic));
    discard(sandbox).await;
}
