//! Thousands of connections of one guest at once: each of them works, and when they are gone, so is what they took.
//!
//! `CUBBY_CONNECTIONS` is how many there are: 10,000 unless told otherwise, which is the whole promise.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use cubby_tests::{
    BOUND, Holdings, discard, next_output, number, own_kib, process, python, run_traffic, until, within,
};
use cubby_traffic::{Guest, Order};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::network::{PRELUDE, online_with};

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
    assert!(
        most >= needed,
        "{count} connections need {needed} descriptors, and the hard limit is {most} (ulimit -Hn)"
    );
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

/// Of a guest's connections so many may wait for an answer (`Limits::half_open` in `network/src/config.rs`).
const UNANSWERED: u64 = 1024;

/// Asks for 1,100 connections at once of somebody who answers none, and says how many are refused and how many wait, while
/// another connection goes on; then lets all go and says how that connection is.
const FLOOD: &str = r#"
import resource, select
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
host = socket.gethostbyname(HOST)
kept = socket.create_connection((host, kept_at), 60)
# The queue of who does not answer holds one.
queued = socket.create_connection((host, silent_at), 60)
poll, flood = select.epoll(), {}
for _ in range(1100):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex((host, silent_at))
    flood[s.fileno()] = s
    poll.register(s, select.EPOLLOUT | select.EPOLLERR)
outcomes = []
# As long as one comes within a second of the other.
while told := poll.poll(1):
    for fd, _ in told:
        poll.unregister(fd)
        outcomes.append(errno.errorcode.get(flood[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 'open'))
kept.sendall(b'!')
print(len(outcomes), set(outcomes), len(flood) - len(outcomes), kept.recv(1), flush=True)
print(refused(socket.SOCK_STREAM, host, kept_at), flush=True)
sys.stdin.read()
"#;

#[tokio::test]
async fn connections_that_nobody_answers_are_bounded_and_harm_no_others() {
    let sandbox = online_with("unanswered", |building| building).await;
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&silent, 0).unwrap();
    let kept = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = |address: std::io::Result<std::net::SocketAddr>| address.unwrap().port();
    let (silent_at, kept_at) = (at(silent.local_addr()), at(kept.local_addr()));
    let program = format!("{PRELUDE}silent_at, kept_at = {silent_at}, {kept_at}\n{FLOOD}");
    let flood = within("start", sandbox.exec_stream("python3", ["-c", &program])).await;
    let mut flood = flood.unwrap();
    let (mut stream, _) = within("accept", kept.accept()).await.unwrap();
    let mut byte = [0];
    within("byte", stream.read_exact(&mut byte)).await.unwrap();
    within("answer", stream.write_all(&byte)).await.unwrap();
    let refused = 1100 - UNANSWERED;
    assert_eq!(next_output(&mut flood).await, format!("{refused} {{'ECONNREFUSED'}} {UNANSWERED} b'!'\n"));
    // One more is one too many, whoever it is for: at once, and on the record.
    assert_eq!(next_output(&mut flood).await, "ECONNREFUSED\n");
    let network = within("metrics", sandbox.metrics()).await.unwrap().host_network.unwrap();
    assert_eq!(network.limited, refused + 1, "{network:?}");
    assert_eq!((network.denied, network.tcp_open), (0, UNANSWERED + 2), "{network:?}");
    // Another sandbox has its own.
    let other = online_with("answered", |building| building).await;
    let program = format!("{PRELUDE}s = socket.create_connection((HOST, {kept_at}), 60)");
    python(&other, &program).await;
    discard(other).await;
    discard(sandbox).await;
}
