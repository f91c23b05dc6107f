//! Bytes in motion: much of them, any of them, and nobody waits for somebody else's reader.

use cubby_tests::{shared, shell, within};
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
