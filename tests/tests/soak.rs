//! Streams in both directions whose every byte both ends know, while all goes wrong that may: peers break off, stall, read
//! slowly and finish on one side only; connections come in floods; a program in the guest sends frames that are none; and the sandbox
//! is paused again and again. No byte is lost or another, and at the end nothing is left.
//!
//! `CUBBY_SOAK_SECONDS` is for how long (600 for the whole promise, 20 unless told otherwise), `CUBBY_SOAK_SEED` what chance
//! begins with.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cubby_tests::random::Random;
use cubby_tests::{Holdings, discard, next_output, number, own_kib, process, run_traffic, until, within};
use cubby_traffic::exchange::{self, Plan};
use cubby_traffic::{Guest, Order};
use cubbyhole::ExecEvent;
use tokio::time::sleep;

use crate::network::online_with;

/// Streams at once from the guest, and to it.
const OUTWARDS: u32 = 8;
const INWARDS: u64 = 4;

/// The port of the guest that answers streams.
const PORT: u16 = 7;

/// What the sandbox process may have more of at the end than in the beginning, in KiB: memory that is kept for the next
/// ring (8 MiB, `network/src/ring.rs`), and chance.
const KEPT_KIB: u64 = (8 << 10) + (4 << 10);

/// Memory of the guest, in MiB.
const MEMORY: u32 = 384;

/// Sends frames for ever: such as are right up to some point, and any.
const MALFORMED: &str = r#"
import os, random, socket, struct, sys
chance = random.Random(int(sys.argv[1]))
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('eth0', 0))
own = s.getsockname()[4]
gateway = bytes.fromhex('026375620001')
def ip(protocol, payload):
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0,
                       socket.inet_aton('198.18.0.2'), socket.inet_aton('198.18.0.254'))
    total = sum(struct.unpack('!10H', head))
    total = ~(total + (total >> 16)) & 0xffff
    return head[:10] + struct.pack('!H', total) + head[12:] + payload
def frame():
    kind = chance.choice((0x0800, 0x0800, 0x0800, 0x86dd, 0x0806, chance.randrange(65536)))
    body = chance.randbytes(chance.randrange(120))
    if kind == 0x0800:
        protocol = chance.choice((1, 6, 17, chance.randrange(256)))
        body = ip(protocol, body)
    elif kind == 0x86dd and len(body) > 40:
        body = struct.pack('!IHBB', 0x60000000, len(body) - 40, chance.choice((0, 6, 17, 43, 44, 58)), 64) + body[8:]
    whole = bytearray(gateway + own + struct.pack('!H', kind) + body)
    for _ in range(chance.randrange(3)):
        whole[chance.randrange(12, len(whole))] = chance.randrange(256)
    return bytes(whole)
print('sends', flush=True)
sent = 0
while True:
    try:
        s.send(frame())
    except OSError as error:
        if error.errno not in (22, 90, 105): raise
    sent += 1
    # Not all of the processor, which the streams want as well.
    if sent % 20 == 0: __import__('time').sleep(0.02)
"#;

/// What has gone well, and the first thing that has not.
#[derive(Default)]
struct Tally {
    streams: AtomicU64,
    bytes: AtomicU64,
    wrong: Mutex<Option<String>>,
}

impl Tally {
    fn count(&self, side: &str, result: std::io::Result<u64>) {
        match result {
            Ok(bytes) => {
                self.streams.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(error) => {
                self.wrong.lock().unwrap().get_or_insert(format!("{side}: {error}"));
            }
        }
    }

    fn check(&self) {
        if let Some(wrong) = &*self.wrong.lock().unwrap() {
            panic!("{wrong}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_wrong_no_byte_is_lost_and_nothing_is_left() {
    let length = Duration::from_secs(number("CUBBY_SOAK_SECONDS", 20));
    let seed = number("CUBBY_SOAK_SEED", 1);
    println!("CUBBY_SOAK_SEED={seed}");
    cubby_traffic::raise_descriptors();
    let sandbox = online_with("soak", |building| building.memory(MEMORY).port(0, PORT)).await;
    let pid = process(sandbox.name()).pid;
    let published = sandbox.ports().await.unwrap()[0].listens_on();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut outwards = run_traffic(&sandbox, &listener).await;
    let mut guest = Guest::accept(&listener).unwrap();
    let port = PORT.to_string();
    let mut inwards = within("serve", sandbox.exec_stream("/traffic", ["serve", &port])).await.unwrap();
    assert_eq!(next_output(&mut inwards).await, "serves\n");
    let first = seed.to_string();
    let malformed = sandbox.exec_stream("python3", ["-c", MALFORMED, &first]);
    let mut malformed = within("python3", malformed).await.unwrap();
    assert_eq!(next_output(&mut malformed).await, "sends\n");
    let (before, memory) = (Holdings::of(pid), own_kib(pid, MEMORY));

    let tally = Arc::new(Tally::default());
    let over = Arc::new(AtomicBool::new(false));
    // Streams of the guest's are answered here …
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let answering = tokio::spawn({
        let tally = tally.clone();
        async move {
            loop {
                let stream = listener.accept().await.unwrap().0.into_std().unwrap();
                stream.set_nonblocking(false).unwrap();
                let tally = tally.clone();
                std::thread::spawn(move || tally.count("answering", exchange::answer(&stream)));
            }
        }
    });
    // … and there are such as the guest has to answer.
    let asking: Vec<_> = (0..INWARDS)
        .map(|number| {
            let (tally, over) = (tally.clone(), over.clone());
            std::thread::spawn(move || {
                let mut random = Random(seed ^ (number + 100) << 32);
                while !over.load(Ordering::Relaxed) {
                    let plan = Plan::draw(&mut random);
                    let asked =
                        TcpStream::connect(published).and_then(|stream| exchange::ask(&stream, &plan));
                    tally.count(&format!("asking {plan:?}"), asked);
                }
            })
        })
        .collect();
    guest.order(Order::Mix { seed, workers: OUTWARDS }).unwrap();
    guest.ready().unwrap();

    let mut random = Random(!seed);
    let begin = Instant::now();
    let mut pauses = 0;
    while begin.elapsed() < length {
        // Chance decides when something happens, not how long it is waited for.
        sleep(Duration::from_millis(100 + random.below(1500))).await;
        within("pause", sandbox.pause()).await.unwrap();
        sleep(Duration::from_millis(random.below(300))).await;
        within("resume", sandbox.resume()).await.unwrap();
        pauses += 1;
        tally.check();
    }
    over.store(true, Ordering::Relaxed);
    let asked = tokio::task::spawn_blocking(move || asking.into_iter().for_each(|it| it.join().unwrap()));
    within("the host's streams", asked).await.unwrap();
    let told = tokio::task::spawn_blocking(move || {
        guest.go().unwrap();
        (guest.done().unwrap(), guest)
    });
    let (told, guest) = within("the guest's streams", told).await.unwrap();
    tally.check();
    within("signal", malformed.signal(9)).await.unwrap();
    while let Some(event) = within("python3", malformed.next()).await {
        let fine = !matches!(event, Ok(ExecEvent::Stderr(_)) | Err(_));
        assert!(fine, "who sends what is no frame has failed: {event:?}");
    }
    until("the descriptors' end", async || Holdings::of(pid).descriptors == before.descriptors).await;
    let (after, memory_after) = (Holdings::of(pid), own_kib(pid, MEMORY));
    println!(
        "{:?}: the guest's streams and bytes: {told}; heard here: {} and {}; {pauses} pauses; {memory} KiB, then {memory_after}",
        begin.elapsed(),
        tally.streams.load(Ordering::Relaxed),
        tally.bytes.load(Ordering::Relaxed),
    );
    assert_eq!(after.threads, before.threads);
    assert!(memory_after <= memory + KEPT_KIB, "{memory} KiB, and {memory_after} afterwards");
    answering.abort();
    // The programs of the guest have not ended, which they would have for a byte that is another.
    drop(guest);
    let ended = within("the end of who asked", outwards.wait()).await.unwrap();
    assert!(ended.success(), "{ended:?}");
    within("signal", inwards.signal(9)).await.unwrap();
    assert_eq!(within("the end of who answered", inwards.wait()).await.unwrap().signal, Some(9));
    // Whatever was answered after that.
    tally.check();
    // The host's count agrees: every byte has gone by, everybody who sent what is no frame was seen, and no limit was met.
    let network = async || within("metrics", sandbox.metrics()).await.unwrap().host_network.unwrap();
    until("the connections' end", async || network().await.tcp_open == 0).await;
    let network = network().await;
    println!("{network:?}");
    let streams =
        told.split_once(' ').map(|(streams, bytes)| [streams, bytes].map(|it| it.parse::<u64>().unwrap()));
    let [streams, bytes] = streams.unwrap_or_else(|| panic!("{told}"));
    assert!(network.received_bytes > bytes, "{network:?}");
    assert!(network.sent_bytes > tally.bytes.load(Ordering::Relaxed), "{network:?}");
    assert!(network.tcp_opened > streams, "{network:?}");
    let dropped = network.dropped;
    assert!(dropped.malformed > 0 && dropped.checksum > 0 && dropped.ignored > 0, "{dropped:?}");
    assert_eq!((dropped.refused, network.limited), (0, 0), "{network:?}");
    discard(sandbox).await;
}
