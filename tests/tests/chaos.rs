//! Anything at any time: eight clients create sandboxes and do with them what chance says, while clients, sandbox
//! processes and keepers are killed. At the end the store tells the truth, and after removing nothing is left.
//!
//! `CUBBY_CHAOS` is the number of sandboxes (200 for the whole promise, 40 unless told otherwise) and
//! `CUBBY_CHAOS_SEED` what chance begins with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cubby_state::{Home, Record, Status, Store, liveness};
use cubby_tests::random::Random;
use cubby_tests::{Client, kill, name, own_home, until, within};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::CLIENT;

const CLIENTS: u64 = 8;

/// How long all of it may take for each sandbox, on the slowest machine.
const BOUND_EACH: Duration = Duration::from_secs(10);

/// How long the last of it may take to be on record: a boot whose client is gone has two minutes, a stop ten seconds.
const PATIENCE: Duration = Duration::from_secs(180);

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn client(home: &Home, arguments: &[&str]) -> Client {
    let variable = format!("CUBBY_HOME={}", home.root().display());
    Client::start(&[&["env", &variable, CLIENT], arguments].concat())
}

/// The keeper of a sandbox process, if it has not been killed before.
fn keeper_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
    let name = std::fs::read_to_string(format!("/proc/{parent}/comm")).ok()?;
    (name.trim() == "cubby-keeper").then_some(parent)
}

/// The pids of all that hold a file of this home open, or a socket in it.
fn holders(home: &Home) -> Vec<(u32, PathBuf)> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap() {
        let process = process.unwrap();
        let Some(pid) = process.file_name().to_str().and_then(|pid| pid.parse().ok()) else { continue };
        for fd in std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(path) = std::fs::read_link(fd.path()) else { continue };
            let shared = path.starts_with(home.images());
            if path.starts_with(home.root()) && !shared && pid != std::process::id() {
                found.push((pid, path));
            }
        }
    }
    found
}

/// Whether the row of a sandbox agrees with the processes, files and locks that are there.
fn is_true(home: &Home, record: &Record, holders: &[(u32, PathBuf)]) -> bool {
    let held = liveness::is_held(&home.lock(&record.name)).unwrap();
    let running = record.run.process.as_ref().is_some_and(|process| process.is_running());
    let disk = holders.iter().any(|(_, path)| *path == home.disk(&record.name));
    let socket = home.socket(&record.name).exists();
    match record.status {
        Status::Running | Status::Paused => {
            held && running && disk && socket && record.run.exit.is_none() && record.run.ended_at.is_none()
        }
        // On its way: nobody asks for anything any more.
        Status::Creating | Status::Draining => false,
        Status::Stopped | Status::Crashed => {
            let report = record.run.exit.as_ref();
            !held && !running && !disk && report.is_some_and(|exit| exit.reason.status() == record.status)
        }
    }
}

/// What speaks for or against a row: what its processes do, thread by thread, and what they have said.
fn evidence(home: &Home, record: &Record) -> String {
    let directory = home.sandbox(&record.name);
    let mut text = format!("{record:?}\n");
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let path = process.path();
        let holds = |fd: &std::fs::DirEntry| {
            std::fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(&directory))
        };
        if !std::fs::read_dir(path.join("fd")).into_iter().flatten().flatten().any(|fd| holds(&fd)) {
            continue;
        }
        for thread in std::fs::read_dir(path.join("task")).into_iter().flatten().flatten() {
            let read = |file| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
            let (status, place, call) = (read("status"), read("wchan"), read("syscall"));
            let lines: Vec<_> = status.lines().take(3).collect();
            text += &format!("{}: {lines:?} in {place:?}, {call:?}\n", thread.path().display());
        }
    }
    let log = directory.join("process.log");
    text + &std::fs::read_to_string(log).unwrap_or_default()
}

/// One client after another, until `count` sandboxes were begun. Every line is sent on.
async fn carry(
    home: Home,
    mut random: Random,
    mut count: u64,
    mut murder: mpsc::Receiver<()>,
    created: mpsc::UnboundedSender<String>,
) {
    while count > 0 {
        let seed = format!("{}", random.bits() >> 16);
        let mut client = client(&home, &["chaos", "c", &seed, &count.to_string()]);
        loop {
            tokio::select! {
                line = client.next_line() => match line {
                    Some(line) => {
                        count -= 1;
                        created.send(line).unwrap();
                    }
                    None => {
                        client.finish().await;
                        assert_eq!(count, 0, "a client ended early");
                        return;
                    }
                },
                Some(()) = murder.recv(), if count > 0 => {
                    client.kill().await;
                    break;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_the_store_tells_the_truth_and_nothing_is_left() {
    let (count, seed) = (number("CUBBY_CHAOS", 40), number("CUBBY_CHAOS_SEED", 20_261_123));
    println!("{}: CUBBY_CHAOS={count} CUBBY_CHAOS_SEED={seed}", name("chaos"));
    let directory = tempfile::tempdir().unwrap();
    let home = own_home(directory.path()).await;
    let store = Store::open(&home).unwrap();
    let mut random = Random(seed);
    let (sender, mut created) = mpsc::unbounded_channel();
    let (mut clients, mut murders) = (tokio::task::JoinSet::new(), Vec::new());
    for client in 0..CLIENTS {
        let (murder, receiver) = mpsc::channel(1);
        murders.push(murder);
        let share = count / CLIENTS + u64::from(client < count % CLIENTS);
        clients.spawn(carry(home.clone(), Random(random.bits()), share, receiver, sender.clone()));
    }
    drop(sender);
    let work = async {
        let (mut begun, mut killed) = (0, BTreeMap::new());
        loop {
            // Chance has its turn with every third create or so, and from time to time.
            match timeout(Duration::from_millis(500 + random.below(1500)), created.recv()).await {
                Ok(None) => break (begun, killed),
                Ok(Some(_)) => begun += 1,
                Err(_) => {}
            }
            let choice = random.below(6);
            match choice {
                0 => {
                    *killed.entry("clients").or_insert(0) += 1;
                    let _ = random.one_of(&murders).try_send(());
                }
                1 | 2 => {
                    // One that boots has an application that waits for it. One that does not, and whose keeper is killed
                    // with it, is found dead by nobody but who looks.
                    let alone = choice == 2;
                    let list = store.list().unwrap();
                    let live = list.iter().filter(|one| match one.status {
                        Status::Running | Status::Paused => true,
                        status => status.is_live() && !alone,
                    });
                    let live: Vec<_> = live.collect();
                    if live.is_empty() {
                        continue;
                    }
                    let process =
                        store.get(&random.one_of(&live).name).ok().and_then(|record| record.run.process);
                    if let Some(process) = process.filter(|process| process.is_running()) {
                        if let Some(keeper) = keeper_of(process.pid).filter(|_| alone) {
                            *killed.entry("keepers").or_insert(0) += 1;
                            kill(keeper);
                        }
                        *killed.entry("sandbox processes").or_insert(0) += 1;
                        kill(process.pid);
                    }
                }
                _ => {}
            }
        }
    };
    let bound = BOUND_EACH * u32::try_from(count).unwrap() + Duration::from_secs(60);
    let (begun, killed) = timeout(bound, work).await.expect("chaos without end");
    clients.join_all().await;
    println!("{begun} sandboxes were begun; killed: {killed:?}");
    assert_eq!(begun, count);

    let begin = Instant::now();
    loop {
        let holders = holders(&home);
        let rows = store.list().unwrap();
        let records = rows.iter().filter_map(|row| store.get(&row.name).ok());
        let lies: Vec<_> = records.filter(|record| !is_true(&home, record, &holders)).collect();
        if lies.is_empty() {
            break;
        }
        let evidence = || lies.iter().map(|record| evidence(&home, record)).collect::<String>();
        assert!(begin.elapsed() < PATIENCE, "{}", evidence());
        // No event tells.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut ends = BTreeMap::new();
    for row in store.list().unwrap() {
        let status = row.status.to_string();
        *ends.entry(status).or_insert(0) += 1;
        for run in store.history(&row.name).unwrap().iter().skip(1) {
            assert!(
                run.exit.is_some() && run.ended_at.is_some(),
                "a run of {} has no end: {run:?}",
                row.name
            );
        }
    }
    println!("before they were removed: {ends:?}");

    let mut cleaner = client(&home, &["remove-all"]);
    assert_eq!(within("removing", cleaner.next_line()).await, None);
    cleaner.finish().await;
    assert!(store.list().unwrap().is_empty());
    until("nobody to hold a file", async || holders(&home).is_empty()).await;
    // As the next round of any process would: a create whose client was killed has left its directory.
    store.sweep().unwrap();
    let left = |directory: PathBuf| {
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
    };
    assert!(left(home.sandboxes()).is_empty(), "{:?}", left(home.sandboxes()));
    let sockets = left(home.run()).into_iter().filter(|name| name.to_string_lossy().ends_with(".sock"));
    assert_eq!(sockets.count(), 0, "a socket stayed");
    let unix = std::fs::read_to_string("/proc/net/unix").unwrap();
    assert!(!unix.contains(home.root().to_str().unwrap()), "{unix}");
}
