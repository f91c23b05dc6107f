//! Pause and resume. One guest under full load of processor, disk and loopback network is paused once for longer than
//! five seconds, and every test here looks at another side of what was seen then.
//!
//! `CUBBY_PAUSE_SECONDS` makes the pause longer. On the instruction clock an hour of it passes in minutes:
//! `CUBBY_KVM_MODE=icount CUBBY_PAUSE_SECONDS=3600 cargo test -p cubby-tests -- seed::pause`.

use std::time::{Duration, Instant};

use cubby_tests::{
    cpu_ticks, discard, host_time, next_output, process, python, refused_as, sandbox, shell, sleeps, until,
    within,
};
use cubbyhole::{ExecEvent, ExecHandle, ExitReason, Sandbox, Status};
use tokio::sync::OnceCell;

/// How long the guest is looked at while it is paused: what a promise of "zero" is counted over, in seconds.
const WATCHED: u64 = 5;

/// [`WATCHED`], or what `CUBBY_PAUSE_SECONDS` says.
fn watched() -> Duration {
    let seconds = std::env::var("CUBBY_PAUSE_SECONDS").map_or(WATCHED, |text| text.parse().unwrap());
    assert!(seconds >= WATCHED, "CUBBY_PAUSE_SECONDS is {seconds}, and less than {WATCHED} says nothing");
    Duration::from_secs(seconds)
}

/// What the guest's kernel takes for a stall, in seconds; its lowest setting (`rcupdate.rcu_cpu_stall_timeout`). A pause of
/// [`WATCHED`] is to such a kernel what one of 36 s, or of an hour, is to one that waits for 21 s.
const STALL: u64 = 3;

/// What keeps the guest busy, and a witness of it. Each part raises an alarm when it is not continued exactly: a
/// counter, a checksum of a file that is written and read back, a TCP connection over loopback, a timer.
/// Every line of output is `COUNT MONOTONIC REALTIME PARTS…`, nanoseconds both, and how far each part is; one each 10 ms at most.
const LOAD: &str = r#"
import hashlib, os, socket, sys, threading, time
os.nice(5)
counts = {}

def forever(part):
    def run():
        try:
            for n, _ in enumerate(part(), 1):
                counts[part.__name__] = n
        except BaseException as error:
            print('broken', part.__name__, repr(error), flush=True)
            os._exit(1)
    threading.Thread(target=run, daemon=True).start()

def checksum():
    fd = os.open('/root/stream', os.O_RDWR | os.O_CREAT)
    written, n = hashlib.sha256(), 0
    while True:
        block = hashlib.sha256(b'%d' % n).digest() * 128
        written.update(block)
        os.pwrite(fd, block, n % 256 * 4096)
        os.fsync(fd)
        read = os.pread(fd, 4096, n % 256 * 4096)
        assert read == block and written.digest()
        n += 1
        yield

def connection():
    listener = socket.create_server(('127.0.0.1', 0))
    ours = socket.create_connection(listener.getsockname())
    theirs = listener.accept()[0]
    def echo():
        while data := theirs.recv(4096):
            theirs.sendall(data)
    threading.Thread(target=echo, daemon=True).start()
    n = 0
    while True:
        message = b'%08d' % n
        ours.sendall(message)
        answer = b''
        while len(answer) < 8:
            part = ours.recv(8 - len(answer))
            assert part, 'closed'
            answer += part
        assert answer == message
        n += 1
        yield

def timer():
    while True:
        begin = time.monotonic()
        time.sleep(0.5)
        took = time.monotonic() - begin
        assert 0.5 <= took < 4.5, took
        yield

def kernel():
    while True:
        # A new process and a deleted file: grace periods of RCU without end.
        open('/tmp/file', 'w').close(); os.unlink('/tmp/file')
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitpid(pid, 0)
        yield

for part in (checksum, connection, timer, kernel): forever(part)
last = count = 0
while True:
    count += 1
    now = time.monotonic_ns()
    if now - last >= 10000000:
        last = now
        print(count, now, time.time_ns(), *(counts.get(part, 0) for part in ('checksum', 'connection', 'timer', 'kernel')), flush=True)
"#;

/// What the guest's clocks show: at once, and once more for each line that it gets.
const CLOCKS: &str = "import sys, time\n\
                      def tell(): print(time.time_ns(), time.monotonic_ns(), flush=True)\n\
                      tell()\nfor _ in sys.stdin: tell()";

/// One line of [`CLOCKS`].
#[derive(Clone, Copy, Debug)]
struct Clocks {
    realtime: Duration,
    monotonic: Duration,
}

impl Clocks {
    fn of(line: &str) -> Self {
        let (realtime, monotonic) = line.trim().split_once(' ').unwrap();
        let duration = |text: &str| Duration::from_nanos(text.parse().unwrap());
        Self { realtime: duration(realtime), monotonic: duration(monotonic) }
    }

    /// What changes only when somebody sets the wall clock.
    fn offset(&self) -> Duration {
        self.realtime - self.monotonic
    }

    /// Those of the guest between two looks at the host's, as near to each other as they come.
    async fn between_two_of_the_host(sandbox: &Sandbox) -> (Duration, Self, Duration) {
        let mut program = within("start", sandbox.exec_stream("python3", ["-c", CLOCKS])).await.unwrap();
        next_output(&mut program).await;
        let mut looks = Vec::new();
        for _ in 0..10 {
            let before = host_time();
            program.write_stdin("\n").await.unwrap();
            let clocks = Self::of(&next_output(&mut program).await);
            looks.push((before, clocks, host_time()));
        }
        looks.into_iter().min_by_key(|(before, _, after)| *after - *before).unwrap()
    }
}

/// Reads the time stamp counter, by a program of one page that is put together here: `rdtsc`, `write(1, ..)`, `exit(0)`.
/// What it prints is `MONOTONIC COUNTER`, nanoseconds and ticks.
const COUNTER: &str = r#"
import os, struct, time
code = bytes.fromhex('0f31 48c1e220 4809d0 50 4889e6 6a085a 6a015f 89f8 0f05 6a3c58 31ff 0f05')
size = 120 + len(code)
header = b'\x7fELF\2\1\1' + bytes(9) + struct.pack('<HHIQQQIHHHHHH', 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
segment = struct.pack('<IIQQQQQQ', 1, 5, 0, 0x400000, 0x400000, size, size, 4096)
open('/root/counter', 'wb').write(header + segment + code)
os.chmod('/root/counter', 0o700)
ours, theirs = os.pipe()
pid = os.fork()
if pid == 0:
    os.dup2(theirs, 1)
    os.execv('/root/counter', ['counter'])
os.waitpid(pid, 0)
print(time.monotonic_ns(), int.from_bytes(os.read(ours, 8), 'little'))
"#;

/// The monotonic clock and the time stamp counter of the guest, at about the same moment.
async fn counter(sandbox: &Sandbox) -> (Duration, u64) {
    let line = python(sandbox, COUNTER).await;
    let (monotonic, counter) = line.trim().split_once(' ').unwrap();
    (Duration::from_nanos(monotonic.parse().unwrap()), counter.parse().unwrap())
}

/// One line of [`LOAD`].
#[derive(Clone, Debug)]
struct Sample {
    count: u64,
    monotonic: Duration,
    realtime: Duration,
    parts: Vec<u64>,
}

/// What was seen of one pause.
struct Seen {
    /// The guest's own record, from before the pause until after it.
    samples: Vec<Sample>,
    /// How long it was paused at least, and how long at most.
    paused: (Duration, Duration),
    /// How long it took until the guest had heard of its resume: the time that it was told is no older.
    heard: Duration,
    /// Processor time of the sandbox process while it was, in clock ticks, for each of its threads.
    ticks: Vec<u64>,
    /// The same over as long a time while it was not.
    ticks_running: Vec<u64>,
    /// The guest's clocks in the first command after the pause.
    first: Clocks,
    /// The guest's between two looks at the host's wall clock, when there was time to look closely.
    later: (Duration, Clocks, Duration),
    /// Monotonic clock and time stamp counter: in the beginning, before the pause, after it.
    counters: [(Duration, u64); 3],
    /// What its kernel said about it.
    kernel_log: String,
    /// The guest's boot, before and after.
    boots: [String; 2],
}

/// Reads samples until there are `count` of them more, or an alarm.
async fn read(load: &mut ExecHandle, text: &mut String, count: usize) {
    let wanted = text.lines().count() + count;
    while text.lines().count() < wanted {
        match within("a sample", load.next()).await.expect("the load ended").unwrap() {
            ExecEvent::Stdout(bytes) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
            ExecEvent::Started { .. } => {}
            other => panic!("{other:?} after {text}"),
        }
    }
}

fn samples(text: &str) -> Vec<Sample> {
    let complete = &text[..text.rfind('\n').unwrap()];
    let sample = |line: &str| {
        assert!(!line.starts_with("broken"), "{line}");
        let mut numbers = line.split(' ').map(|number| number.parse::<u64>().unwrap());
        let mut next = || numbers.next().unwrap();
        let (count, monotonic, realtime) =
            (next(), Duration::from_nanos(next()), Duration::from_nanos(next()));
        Sample { count, monotonic, realtime, parts: numbers.collect() }
    };
    complete.lines().map(sample).collect()
}

/// Ticks that each thread took between two looks at it.
fn between(before: &[(u32, u64)], after: &[(u32, u64)]) -> Vec<u64> {
    after
        .iter()
        .map(|(thread, ticks)| {
            let before = before.iter().find(|(earlier, _)| earlier == thread);
            ticks - before.map_or(0, |(_, ticks)| *ticks)
        })
        .collect()
}

async fn look() -> Seen {
    let sandbox = sandbox("paused").await;
    let pid = process(sandbox.name()).pid;
    let boot = async || {
        shell(&sandbox, "cat /proc/sys/kernel/random/boot_id; cat /proc/1/stat | cut -d' ' -f22").await
    };
    let stall = format!("echo {STALL} > /sys/module/rcupdate/parameters/rcu_cpu_stall_timeout; dmesg -n 8");
    shell(&sandbox, &stall).await;
    let boot_before = boot().await;
    let in_the_beginning = counter(&sandbox).await;
    let mut load = within("start", sandbox.exec_stream("python3", ["-c", LOAD])).await.unwrap();
    let mut text = String::new();
    // Until each part has done something.
    read(&mut load, &mut text, 1).await;
    until("every part of the load", async || {
        read(&mut load, &mut text, 1).await;
        samples(&text).last().is_some_and(|sample| sample.parts.iter().all(|count| *count > 1))
    })
    .await;
    let running = cpu_ticks(pid);
    let second = Duration::from_secs(1);
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < second {
        read(&mut load, &mut text, 1).await;
    }
    let ticks_running = between(&running, &cpu_ticks(pid));

    let before_pause = counter(&sandbox).await;
    let asked = tokio::time::Instant::now();
    within("pause", sandbox.pause()).await.unwrap();
    let paused = tokio::time::Instant::now();
    // It has answered, and may have a last look around.
    until("the sandbox process to sleep", async || sleeps(pid)).await;
    let before = cpu_ticks(pid);
    // The passing of time is what is measured.
    tokio::time::sleep(watched()).await;
    let ticks = between(&before, &cpu_ticks(pid));
    let least = paused.elapsed();
    let resuming = Instant::now();
    within("resume", sandbox.resume()).await.unwrap();
    let most = asked.elapsed();
    // The agent hears the time before anything that a client asks.
    within("ping", sandbox.ping()).await.unwrap();
    let heard = resuming.elapsed();
    let first = Clocks::of(&python(&sandbox, CLOCKS).await);
    let counters = [in_the_beginning, before_pause, counter(&sandbox).await];

    read(&mut load, &mut text, 20).await;
    // The stall detector looks once in its time-out.
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < Duration::from_secs(STALL + 1) {
        read(&mut load, &mut text, 1).await;
    }
    let kernel_log = shell(&sandbox, "dmesg").await;
    let boots = [boot_before, boot().await];
    drop(load);
    let later = Clocks::between_two_of_the_host(&sandbox).await;
    discard(sandbox).await;
    Seen {
        samples: samples(&text),
        paused: (least, most),
        heard,
        ticks,
        ticks_running,
        first,
        later,
        counters,
        kernel_log,
        boots,
    }
}

async fn seen() -> &'static Seen {
    static SEEN: OnceCell<Seen> = OnceCell::const_new();
    SEEN.get_or_init(look).await
}

/// The two samples between which the wall clock moved most: those around the pause.
fn around(seen: &Seen) -> (&Sample, &Sample) {
    let pairs = seen.samples.iter().zip(&seen.samples[1..]);
    pairs.max_by_key(|(one, other)| other.realtime.saturating_sub(one.realtime)).unwrap()
}

/// "No CPU cycles consumed."
#[tokio::test]
async fn the_vm_uses_zero_cpu_while_paused() {
    let seen = seen().await;
    assert_eq!(
        seen.ticks.iter().sum::<u64>(),
        0,
        "ticks of each thread in {:?}: {:?}",
        watched(),
        seen.ticks
    );
    // It is the right process that was looked at: the guest had one processor's full use in the second before.
    let running = seen.ticks_running.iter().sum::<u64>();
    assert!(running >= 30, "{running} ticks in a second of full load");
}

/// "All guest processes are frozen."
#[tokio::test]
async fn all_guest_processes_are_frozen_while_paused() {
    let (before, after) = around(seen().await);
    let (least, most) = seen().await.paused;
    // Time that passed outside and that no process of the guest has had, of which each is sampled by both clocks.
    let missing = (after.realtime - before.realtime).saturating_sub(after.monotonic - before.monotonic);
    let tolerance = Duration::from_millis(200);
    assert!(
        least <= missing + tolerance && missing <= most + tolerance,
        "{missing:?} in a pause of {least:?} to {most:?}"
    );
}

/// "The guest continues exactly where it left off."
#[tokio::test]
async fn the_guest_continues_exactly_where_it_left_off() {
    let seen = seen().await;
    // An alarm of a part would be in the samples; here is that each went on, and began nowhere anew.
    let (before, after) = around(seen);
    let last = seen.samples.last().unwrap();
    for ((before, after), last) in before.parts.iter().zip(&after.parts).zip(&last.parts) {
        assert!(before <= after && after < last, "{before}, {after}, {last}");
    }
    assert!(seen.samples.is_sorted_by(|one, other| one.count < other.count), "the counter went back");
}

/// "No re-boot or re-init."
#[tokio::test]
async fn a_resume_is_no_reboot_and_no_reinit() {
    let [before, after] = &seen().await.boots;
    assert_eq!(before, after);
}

#[tokio::test]
async fn the_monotonic_clock_stands_still_during_a_pause() {
    let (before, after) = around(seen().await);
    let moved = after.monotonic.checked_sub(before.monotonic).expect("it went back");
    // What the guest itself had around the pause is in it; a guest on a busy machine has its samples late.
    assert!(
        moved < Duration::from_secs(WATCHED) / 2,
        "it moved by {moved:?} in a pause of {:?}",
        seen().await.paused
    );
    let all = &seen().await.samples;
    assert!(all.is_sorted_by(|one, other| one.monotonic < other.monotonic), "it went back");
}

#[tokio::test]
async fn the_time_stamp_counter_stands_still_during_a_pause() {
    let [beginning, before, after] = seen().await.counters;
    // Its frequency, by the monotonic clock of the same guest.
    let rate = (before.1 - beginning.1) as f64 / (before.0 - beginning.0).as_secs_f64();
    let counted = (after.1 - before.1) as f64 / rate;
    let passed = (after.0 - before.0).as_secs_f64();
    assert!(
        (counted - passed).abs() < WATCHED as f64 / 2.0,
        "{counted} s by the counter, {passed} s by the clock, around a pause of {:?}",
        seen().await.paused
    );
}

#[tokio::test]
async fn the_wall_clock_is_right_in_the_first_command_after_a_resume() {
    let Seen { heard, first, later: (before, later, after), .. } = seen().await;
    let tolerance = Duration::from_millis(20).max(*heard);
    let guest = later.realtime;
    assert!(
        *before <= guest + tolerance && guest <= *after + tolerance,
        "{guest:?} not in {before:?} to {after:?}"
    );
    // And the first command, which may have taken long to say so, had the same.
    let moved = first.offset().abs_diff(later.offset());
    assert!(moved <= tolerance, "it was set by {moved:?} after the first command");
}

#[tokio::test]
async fn a_pause_longer_than_the_kernel_takes_for_a_stall_is_reported_by_nobody() {
    let log = &seen().await.kernel_log;
    let reports: Vec<_> = log
        .lines()
        .filter(|line| ["rcu:", "RCU", "soft lockup", "stall"].iter().any(|word| line.contains(word)))
        .collect();
    // What the kernel says of RCU while it boots.
    let alarms: Vec<_> =
        reports.iter().filter(|line| line.contains("stall") || line.contains("lockup")).collect();
    assert!(alarms.is_empty(), "{alarms:#?}");
    assert!(!log.is_empty(), "the guest's log cannot be read");
}

/// What goes in which state: the table of docs/lifecycle.md, met through the sandbox process.
#[tokio::test]
async fn a_paused_sandbox_runs_no_command_and_can_be_drained_stopped_and_killed() {
    let sandbox = sandbox("frozen").await;
    let mut cat = within("start", sandbox.exec_stream("cat", [""; 0])).await.unwrap();
    within("start", cat.next()).await.unwrap().unwrap();
    let pause = async |sandbox: &Sandbox| {
        within("pause", sandbox.pause()).await.unwrap();
        assert_eq!(sandbox.status().await.unwrap(), Status::Paused);
    };
    let resumed = within("resume", sandbox.resume()).await;
    assert!(refused_as(&resumed, Status::Running), "{resumed:?}");
    pause(&sandbox).await;
    let refused = within("exec", sandbox.exec("true", [""; 0])).await;
    assert!(refused_as(&refused, Status::Paused), "{refused:?}");
    let twice = within("pause", sandbox.pause()).await;
    assert!(refused_as(&twice, Status::Paused), "{twice:?}");
    // A drain wakes it, lets the command finish, and ends it.
    let drain = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.drain().await }
    });
    until("draining", async || sandbox.status().await.unwrap() == Status::Draining).await;
    cat.write_stdin("awake").await.unwrap();
    cat.close_stdin().await.unwrap();
    assert!(within("the end of cat", cat.wait()).await.unwrap().success());
    within("drain", drain).await.unwrap().unwrap();
    let reason = async |sandbox: &Sandbox| within("the end", sandbox.wait()).await.unwrap().reason;
    assert_eq!(reason(&sandbox).await, ExitReason::Drained);

    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    shell(&again, "echo kept > /root/note").await;
    pause(&again).await;
    within("stop", again.stop()).await.unwrap();
    assert_eq!(reason(&again).await, ExitReason::Requested);

    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    assert_eq!(shell(&again, "cat /root/note").await, "kept\n");
    pause(&again).await;
    within("kill", again.kill()).await.unwrap();
    assert_eq!(reason(&again).await, ExitReason::Killed);
    Sandbox::remove(sandbox.name()).await.unwrap();
}
