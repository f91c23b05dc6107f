//! Bytes in motion: much of them, any of them, and nobody waits for somebody else's reader.

use std::time::Duration;

use cubby_tests::{BOUND, Holdings, discard, process, sandbox, shared, shell, until, within};
use cubbyhole::{Error, ExecEvent, ExecHandle, Sandbox};

const MIB: usize = 1 << 20;

/// What the guest's program writes: each MiB begins with its number and goes on with every byte value.
fn expected(index: u32) -> Vec<u8> {
    let mut block: Vec<u8> = (0..MIB).map(|n| n.to_le_bytes()[0]).collect();
    block[..4].copy_from_slice(&index.to_be_bytes());
    block
}

fn program(mib: u32, to: u8) -> String {
    format!(
        "import os\nblock = bytes(range(256)) * 4096\nfor i in range({mib}):\n\
         \x20   data = memoryview(i.to_bytes(4, 'big') + block[4:])\n\
         \x20   while data: data = data[os.write({to}, data):]"
    )
}

/// Reads a stream of [`program`]'s to its end and compares every byte.
async fn compare(handle: &mut ExecHandle, mib: u32) {
    let (mut index, mut block, mut at) = (0, expected(0), 0);
    loop {
        match within("output", handle.next()).await.expect("an exit").unwrap() {
            ExecEvent::Stdout(bytes) => {
                let mut bytes = &bytes[..];
                while !bytes.is_empty() {
                    let (now, later) = bytes.split_at(bytes.len().min(MIB - at));
                    assert!(*now == block[at..at + now.len()], "MiB {index} differs after byte {at}");
                    at += now.len();
                    bytes = later;
                    if at == MIB {
                        index += 1;
                        at = 0;
                        block[..4].copy_from_slice(&expected(index)[..4]);
                    }
                }
            }
            ExecEvent::Exited(status) => {
                assert!(status.success(), "{status:?}");
                assert_eq!((index, at), (mib, 0), "the stream's length");
                return;
            }
            ExecEvent::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_hundred_mebibytes_come_through_unchanged() {
    let sandbox = shared().await;
    let mut handle = within("start", sandbox.exec_stream("python3", ["-c", &program(100, 1)])).await.unwrap();
    compare(&mut handle, 100).await;
}

#[tokio::test]
async fn both_streams_carry_any_byte_at_once() {
    let sandbox = shared().await;
    let both = format!(
        "import threading\ndef run(code): exec(code, {{}})\n\
         threads = [threading.Thread(target=run, args=(code,)) for code in ({:?}, {:?})]\n\
         [t.start() for t in threads]; [t.join() for t in threads]",
        program(3, 1),
        program(2, 2)
    );
    let output = within("exec", sandbox.exec("python3", ["-c", &both])).await.unwrap();
    assert!(output.success(), "{}", String::from_utf8_lossy(output.stderr_bytes()));
    assert!(output.stdout_bytes() == [expected(0), expected(1), expected(2)].concat());
    assert!(output.stderr_bytes() == [expected(0), expected(1)].concat());
    assert!(matches!(output.stdout(), Err(Error::NotUtf8 { valid_up_to: 128, .. })));
}

#[tokio::test]
async fn a_stalled_reader_holds_up_nobody_else() {
    let sandbox = shared().await;
    // More than all windows and pipes on the way hold: the program cannot get to its last line.
    let script = format!("{}\nopen('/tmp/unstalled', 'w').close()", program(8, 1));
    let mut stalled = within("start", sandbox.exec_stream("python3", ["-c", &script])).await.unwrap();
    assert!(matches!(within("start", stalled.next()).await, Some(Ok(ExecEvent::Started { .. }))));
    let Some(Ok(ExecEvent::Stdout(first))) = within("first bytes", stalled.next()).await else {
        panic!("no output");
    };
    // On the same connection, and much more than a window.
    for _ in 0..10 {
        assert_eq!(shell(&sandbox, "echo prompt").await, "prompt\n");
    }
    let mut other = within("start", sandbox.exec_stream("python3", ["-c", &program(8, 1)])).await.unwrap();
    compare(&mut other, 8).await;
    assert_eq!(shell(&sandbox, "test -e /tmp/unstalled || echo stalled").await, "stalled\n");
    // Nothing was lost meanwhile.
    let mut bytes = first.to_vec();
    while let Some(event) = within("the rest", stalled.next()).await {
        match event.unwrap() {
            ExecEvent::Stdout(more) => bytes.extend_from_slice(&more),
            ExecEvent::Exited(status) => assert!(status.success()),
            other => panic!("{other:?}"),
        }
    }
    assert!(bytes == (0..8).flat_map(expected).collect::<Vec<u8>>());
    shell(&sandbox, "rm /tmp/unstalled").await;
}

#[tokio::test]
async fn a_stalled_writer_is_told_and_loses_nothing() {
    let sandbox = shared().await;
    let mut cat = within("start", sandbox.exec_stream("cat", [""; 0])).await.unwrap();
    let input: Vec<u8> = (0..8).flat_map(expected).collect();
    let (mut sent, mut received) = (0, Vec::new());
    // Nobody takes what `cat` writes, so it has to stop reading some time.
    while sent < input.len() {
        match within("a write", cat.write_stdin(&input[sent..])).await {
            Ok(()) => sent = input.len(),
            Err(Error::OutputFull { written }) => {
                sent += written;
                let Some(Ok(event)) = within("output", cat.next()).await else { panic!("no output") };
                if let ExecEvent::Stdout(bytes) = event {
                    received.extend_from_slice(&bytes);
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    cat.close_stdin().await.unwrap();
    while let Some(event) = within("output", cat.next()).await {
        if let ExecEvent::Stdout(bytes) = event.unwrap() {
            received.extend_from_slice(&bytes);
        }
    }
    assert!(received == input, "cat changed its input");
}

#[tokio::test]
async fn two_clients_and_their_sessions_are_never_mixed_up() {
    let first = shared().await;
    let second = Sandbox::get(first.name()).await.unwrap();
    let run = async |sandbox: &Sandbox, who: &str| {
        for number in 0..10 {
            let expected = format!("{who} {number}\n");
            let output = within("exec", sandbox.exec("echo", [who, &number.to_string()])).await.unwrap();
            assert_eq!(output.stdout().unwrap(), expected);
        }
        let mut handle =
            within("start", sandbox.exec_stream("python3", ["-c", &program(4, 1)])).await.unwrap();
        compare(&mut handle, 4).await;
    };
    tokio::join!(run(&first, "first"), run(&second, "second"), run(&first, "third"), run(&second, "fourth"));
}

/// Memory of a sandbox process's and its guest's agent's own, in KiB.
async fn held(sandbox: &Sandbox) -> [u64; 2] {
    let agent = Holdings::of_agent(sandbox).await.anonymous_kib;
    [Holdings::of(process(sandbox.name()).pid).anonymous_kib, agent]
}

/// The shortest of some pings: what a ping takes when nothing else has the processor just then.
async fn ping(sandbox: &Sandbox) -> Duration {
    let mut shortest = BOUND;
    for _ in 0..10 {
        shortest = shortest.min(within("ping", sandbox.ping()).await.unwrap());
    }
    shortest
}

#[tokio::test]
async fn input_that_nobody_reads_delays_neither_a_ping_nor_the_stop() {
    let sandbox = sandbox("unread-input").await;
    let idle = ping(&sandbox).await;
    let mut sleep = within("start", sandbox.exec_stream("sleep", ["86431"])).await.unwrap();
    assert!(matches!(within("start", sleep.next()).await, Some(Ok(ExecEvent::Started { .. }))));
    let input = sleep.input();
    let writing = tokio::spawn(async move { input.write(vec![7; 100 << 20]).await });
    // Somebody has to hear how much the command takes.
    let hearing = tokio::spawn(async move { while sleep.next().await.is_some() {} });
    // It has been written as far as it goes when the guest's pipe is full and the window is used up.
    let before = held(&sandbox).await;
    let loaded = ping(&sandbox).await;
    assert!(!writing.is_finished());
    // Natively well under a millisecond; on the slowest machine of these tests an idle ping takes some of them.
    let bound = Duration::from_millis(5).max(idle * 3);
    assert!(loaded < bound, "a ping takes {loaded:?}, and {idle:?} when idle");
    for _ in 0..20 {
        assert_eq!(shell(&sandbox, "echo prompt").await, "prompt\n");
    }
    let after = held(&sandbox).await;
    assert!(after[0] < before[0] + 4096 && after[1] < before[1] + 4096, "{before:?} became {after:?} KiB");
    let begin = std::time::Instant::now();
    within("stop", sandbox.stop_with_timeout(Duration::from_secs(60))).await.unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(40),
        "the stop waited for the reader: {:?}",
        begin.elapsed()
    );
    assert!(within("the writer", writing).await.unwrap().is_err());
    within("the reader", hearing).await.unwrap();
    assert_eq!(sandbox.last_exit().await.unwrap().unwrap().reason, cubbyhole::ExitReason::Requested);
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_reader_that_stops_leaves_memory_flat_on_both_sides() {
    let sandbox = sandbox("stopped-reader").await;
    let mut yes = within("start", sandbox.exec_stream("yes", [""; 0])).await.unwrap();
    let mut taken = 0;
    while taken < 4 * MIB {
        if let ExecEvent::Stdout(bytes) = within("output", yes.next()).await.unwrap().unwrap() {
            taken += bytes.len();
        }
    }
    // It stands still when its process sleeps in its write, the window used up.
    let state =
        "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = yes ] && cut -d' ' -f3,14 $p/stat; done; true";
    let mut last = String::new();
    until("its standing still", async || {
        let now = shell(&sandbox, state).await;
        let same = now.starts_with('S') && now == last;
        last = now;
        same
    })
    .await;
    let (before, ours) = (held(&sandbox).await, Holdings::of(std::process::id()).anonymous_kib);
    for _ in 0..30 {
        assert_eq!(shell(&sandbox, "echo prompt").await, "prompt\n");
    }
    let after = held(&sandbox).await;
    assert!(after[0] <= before[0] + 1024 && after[1] <= before[1] + 1024, "{before:?} became {after:?} KiB");
    let grown = Holdings::of(std::process::id()).anonymous_kib.saturating_sub(ours);
    assert!(grown < 4096, "this process grew by {grown} KiB");
    assert_eq!(shell(&sandbox, state).await, last, "it went on without a reader");
    drop(yes);
    discard(sandbox).await;
}

#[tokio::test]
async fn sixty_four_sessions_of_sixteen_clients_get_their_bytes_in_order_and_complete() {
    const EACH: usize = 64 << 10;
    let sandbox = sandbox("sixty-four").await;
    let name = sandbox.name().to_owned();
    // The sixteenth client is this one.
    let clients = (0..16).map(|client| {
        let (name, own) = (name.clone(), sandbox.clone());
        tokio::spawn(async move {
            let sandbox = if client == 0 { own } else { Sandbox::get(&name).await.unwrap() };
            let sessions = (0..4u32).map(|session| {
                let sandbox = sandbox.clone();
                tokio::spawn(async move {
                    // Any byte, and no two sessions the same.
                    let seed = client * 4 + session + 1;
                    let bytes: Vec<u8> = (0..u32::try_from(EACH).unwrap())
                        .map(|n| {
                            (n.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) >> 11).to_le_bytes()[0]
                        })
                        .collect();
                    let given = bytes.clone();
                    let output = sandbox.exec_with("cat", |options| options.stdin(given));
                    let output = tokio::time::timeout(4 * BOUND, output).await.expect("in time").unwrap();
                    assert!(output.stdout_bytes() == bytes, "client {client}, session {session}");
                    assert!(output.success() && output.stderr_bytes().is_empty());
                })
            });
            for session in sessions.collect::<Vec<_>>() {
                session.await.unwrap();
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    discard(sandbox).await;
}
