//! The store as many processes use it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::expect_used)]

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use cubby_state::network::{NetworkPolicy, Rule};
use cubby_state::{
    Event, ExitReason, ExitReport, Home, Port, ProcessIdentity, Record, RunLock, SandboxConfig, SandboxName,
    Status, Store, StoreError,
};
use rusqlite::Connection;
use tempfile::TempDir;

fn home() -> (TempDir, Home) {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path().join("home")).unwrap();
    (dir, home)
}

fn name(text: &str) -> SandboxName {
    text.parse().unwrap()
}

fn config() -> SandboxConfig {
    SandboxConfig::new("python:3.12")
}

/// Creates a sandbox and brings it to Running, as its own process would.
fn running(store: &Store, text: &str) -> (Record, RunLock) {
    let record = store.create(&name(text), &config()).unwrap();
    let lock = RunLock::acquire(&store.home().lock(&record.name), Duration::ZERO).unwrap();
    store.adopt(record.run.id, &lock).unwrap();
    assert_eq!(store.transition(record.run.id, Status::Creating, Event::Ready).unwrap(), Status::Running);
    (record, lock)
}

/// Makes it look as if another process, gone by now, had begun every run.
fn forget_launchers(home: &Home) {
    let connection = Connection::open(home.database()).unwrap();
    connection.execute("UPDATE runs SET launcher_start = launcher_start + 1", []).unwrap();
}

#[test]
fn a_policy_is_replaced_by_the_run_that_lives_or_by_whoever_finds_none() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let (record, lock) = running(&store, "worker");
    let (run, name) = (record.run.id, &record.name);
    let rules = NetworkPolicy::none().rule(Rule::allow().ports(443));
    store.set_network(run, &rules).unwrap();
    // Nothing else has changed.
    let expected = SandboxConfig { network: rules.clone(), ..config() };
    assert_eq!(store.get(name).unwrap().config, expected);
    assert!(!store.set_network_of_ended(name, &NetworkPolicy::all()).unwrap(), "it lives");
    assert_eq!(store.get(name).unwrap().config, expected);
    store.finish(run, &ExitReport::now(ExitReason::Killed)).unwrap();
    drop(lock);
    assert!(matches!(store.set_network(run, &rules), Err(StoreError::RunOver { .. })));
    assert!(store.set_network_of_ended(name, &NetworkPolicy::all()).unwrap());
    assert_eq!(store.begin_run(name).unwrap().config.network, NetworkPolicy::all());
    let nobody = store.set_network_of_ended(&"nobody".parse().unwrap(), &rules);
    assert!(matches!(nobody, Err(StoreError::NotFound { .. })));
}

#[test]
fn a_whole_life_is_remembered() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let (record, lock) = running(&store, "worker");
    assert_eq!(record.status, Status::Creating);
    assert_eq!(record.config, config());
    let run = record.run.id;
    let me = ProcessIdentity::current().unwrap();
    let ports = vec![Port::new(40_000, 80), Port::new(40_001, 53).on([0; 16]).udp()];
    store.set_ports(run, &ports).unwrap();
    let read = store.get(&record.name).unwrap();
    assert_eq!((read.status, read.run.process, read.run.ports), (Status::Running, Some(me), ports));

    store.transition(run, Status::Running, Event::Pause).unwrap();
    store.transition(run, Status::Paused, Event::Drain).unwrap();
    let report = ExitReport::now(ExitReason::Drained);
    assert_eq!(store.finish(run, &report).unwrap(), Status::Stopped);
    drop(lock);

    let second = store.begin_run(&record.name).unwrap();
    assert_eq!(second.status, Status::Creating);
    assert!(second.run.id > run);
    assert!(second.run.process.is_none() && second.run.ports.is_empty());
    assert!(matches!(store.set_ports(run, &[]), Err(StoreError::RunOver { .. })));
    let crash = ExitReport::now(ExitReason::BootFailed { stage: "kernel".into() }).with_console("oops");
    assert_eq!(store.finish(second.run.id, &crash).unwrap(), Status::Crashed);

    // Another process reads the same.
    let history = Store::open(&home).unwrap().history(&record.name).unwrap();
    let reports: Vec<_> = history.into_iter().map(|run| (run.id, run.exit.unwrap())).collect();
    assert_eq!(reports, [(second.run.id, crash), (run, report)]);

    store.remove(&record.name).unwrap();
    assert!(!home.sandbox(&record.name).exists());
    assert_eq!(fs::read_dir(home.sandboxes()).unwrap().count(), 0);
    assert!(matches!(store.get(&record.name), Err(StoreError::NotFound { .. })));
    let rows: i64 = Connection::open(home.database())
        .unwrap()
        .query_row("SELECT count(*) FROM runs", [], |row| row.get(0))
        .unwrap();
    assert_eq!(rows, 0);
}

#[test]
fn whoever_comes_second_learns_what_is_true() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let (record, _lock) = running(&store, "worker");
    let run = record.run.id;
    let error = store.transition(run, Status::Paused, Event::Resume).unwrap_err();
    let StoreError::Conflict { expected: Status::Paused, actual: Status::Running, .. } = error else {
        panic!("{error}")
    };
    let refused = store.transition(run, Status::Running, Event::Resume).unwrap_err().refused().unwrap();
    assert_eq!((refused.status, refused.event), (Status::Running, Event::Resume));
    assert!(matches!(
        store.transition(run, Status::Running, Event::Crash),
        Err(StoreError::NeedsReport { .. })
    ));
    for refused in [store.begin_run(&record.name).map(drop), store.remove(&record.name)] {
        assert_eq!(refused.unwrap_err().refused().unwrap().status, Status::Running);
    }
    assert_eq!(store.get(&record.name).unwrap().status, Status::Running);

    store.finish(run, &ExitReport::now(ExitReason::Requested)).unwrap();
    let late = ExitReport::now(ExitReason::GuestPanic);
    assert!(matches!(store.finish(run, &late), Err(StoreError::RunOver { .. })));
    assert!(matches!(store.transition(run, Status::Stopped, Event::Pause), Err(StoreError::RunOver { .. })));
    assert!(matches!(store.request_kill(run), Err(StoreError::RunOver { .. })));
    store.begin_run(&record.name).unwrap();
    assert!(matches!(store.finish(run, &late), Err(StoreError::RunOver { .. })));
}

#[test]
fn one_of_many_wins_a_name() {
    let (_dir, home) = home();
    // Also the first opening is theirs: the file, its format and its directories are made at once by all.
    let start = Barrier::new(8);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    let store = Store::open(&home).unwrap();
                    store.create(&name("worker"), &config())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    for error in results.into_iter().filter_map(Result::err) {
        assert!(matches!(error, StoreError::AlreadyExists { .. }), "{error}");
    }
}

#[test]
fn nobody_is_told_that_the_store_is_busy() {
    let (_dir, home) = home();
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (home, start) = (&home, &start);
            scope.spawn(move || {
                start.wait();
                for turn in 0..25 {
                    // A connection of its own each time: opening meets the others' writes too.
                    let store = Store::open(home).unwrap();
                    let (record, lock) = running(&store, &format!("s{thread}-{turn}"));
                    let run = record.run.id;
                    store.transition(run, Status::Running, Event::Pause).unwrap();
                    store.transition(run, Status::Paused, Event::Resume).unwrap();
                    store.list().unwrap();
                    store.finish(run, &ExitReport::now(ExitReason::Requested)).unwrap();
                    drop(lock);
                    if turn % 2 == 0 {
                        store.remove(&record.name).unwrap();
                    }
                }
            });
        }
    });
    let left = Store::open(&home).unwrap().list().unwrap();
    assert_eq!(left.len(), 8 * 12);
    assert!(left.iter().all(|summary| summary.status == Status::Stopped));
}

/// The other process of the tests below: this binary, running this test alone.
#[test]
fn child() {
    let Some(root) = std::env::var_os("CUBBY_TEST_CHILD") else { return };
    let store = Store::open(&Home::at(root).unwrap()).unwrap();
    let outcome = match std::env::var("CUBBY_TEST_DO").unwrap().as_str() {
        "create" => match store.create(&name("worker"), &config()) {
            Ok(_) => "created",
            Err(StoreError::AlreadyExists { .. }) => "exists",
            Err(e) => panic!("{e}"),
        },
        "run" => {
            std::mem::forget(running(&store, "worker"));
            "running"
        }
        other => panic!("{other}"),
    };
    println!("outcome: {outcome}");
    std::io::stdout().flush().unwrap();
    // Lives until its input ends or it is killed.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

struct Child(std::process::Child);

impl Child {
    fn start(home: &Home, what: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("CUBBY_TEST_CHILD", home.root())
            .env("CUBBY_TEST_DO", what)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Child(child)
    }

    fn outcome(&mut self) -> String {
        let mut text = String::new();
        let mut byte = [0];
        let out = self.0.stdout.as_mut().unwrap();
        loop {
            assert_ne!(out.read(&mut byte).unwrap(), 0, "the child ended: {text}");
            text.push(char::from(byte[0]));
            if let Some(line) = text.split_once("outcome: ").and_then(|(_, rest)| rest.strip_suffix('\n')) {
                return line.to_owned();
            }
        }
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn one_of_two_processes_wins_a_name() {
    let (_dir, home) = home();
    let mut children = [Child::start(&home, "create"), Child::start(&home, "create")];
    let mut outcomes = children.each_mut().map(Child::outcome);
    outcomes.sort();
    assert_eq!(outcomes, ["created", "exists"]);
    children.into_iter().for_each(Child::kill);
    // The winner is gone before it started any process: its sandbox is no ghost.
    let record = Store::open(&home).unwrap().get(&name("worker")).unwrap();
    assert_eq!(record.status, Status::Crashed);
    assert_eq!(record.run.exit.unwrap().reason, ExitReason::BootFailed { stage: "launch".into() });
}

#[test]
fn a_reader_finds_the_crash_of_a_killed_process() {
    for (kill_requested, status, reason) in [
        (false, Status::Crashed, ExitReason::ProcessKilled { signal: 0 }),
        (true, Status::Stopped, ExitReason::Killed),
    ] {
        let (_dir, home) = home();
        let mut child = Child::start(&home, "run");
        assert_eq!(child.outcome(), "running");
        let store = Store::open(&home).unwrap();
        let record = store.get(&name("worker")).unwrap();
        assert_eq!(record.status, Status::Running);
        assert_eq!(record.run.process.as_ref().unwrap().pid, child.0.id());
        assert!(record.run.process.unwrap().is_running());
        assert_eq!(store.list().unwrap()[0].status, Status::Running);
        if kill_requested {
            store.request_kill(record.run.id).unwrap();
        }
        child.kill();
        assert_eq!(store.list().unwrap()[0].status, status);
        let record = store.get(&name("worker")).unwrap();
        assert_eq!((record.status, record.run.exit.unwrap().reason), (status, reason));
        store.begin_run(&record.name).unwrap();
    }
}

#[test]
fn a_reused_pid_is_not_taken_for_the_sandbox() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let (record, lock) = running(&store, "worker");
    // The pid in the row lives (it is ours), but the lock of the sandbox is free.
    drop(lock);
    let record = store.get(&record.name).unwrap();
    assert_eq!(record.status, Status::Crashed);

    // The launcher's pid lives, but it started at another time.
    store.begin_run(&record.name).unwrap();
    assert_eq!(store.get(&record.name).unwrap().status, Status::Creating);
    forget_launchers(&home);
    assert_eq!(store.get(&record.name).unwrap().status, Status::Crashed);
}

#[test]
fn a_process_whose_launcher_died_keeps_its_run_or_learns_that_it_is_over() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let record = store.create(&name("kept"), &config()).unwrap();
    let lock = RunLock::acquire(&home.lock(&record.name), Duration::ZERO).unwrap();
    forget_launchers(&home);
    assert_eq!(store.get(&record.name).unwrap().status, Status::Creating);
    store.adopt(record.run.id, &lock).unwrap();

    let record = store.create(&name("late"), &config()).unwrap();
    forget_launchers(&home);
    assert_eq!(store.get(&record.name).unwrap().status, Status::Crashed);
    let lock = RunLock::acquire(&home.lock(&record.name), Duration::ZERO).unwrap();
    assert!(matches!(store.adopt(record.run.id, &lock), Err(StoreError::RunOver { .. })));
}

#[test]
fn a_disk_without_a_row_is_not_given_to_the_next_of_that_name() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let worker = name("worker");
    home.create_sandbox(&worker).unwrap();
    fs::write(home.disk(&worker), "another's secret").unwrap();
    store.create(&worker, &config()).unwrap();
    assert_eq!(fs::read_dir(home.sandbox(&worker)).unwrap().count(), 0);
    assert_eq!(fs::read_dir(home.sandboxes()).unwrap().count(), 1);

    fs::create_dir(home.sandboxes().join(".removed-7")).unwrap();
    store.sweep().unwrap();
    assert_eq!(fs::read_dir(home.sandboxes()).unwrap().count(), 1);
}

#[test]
fn what_a_create_that_was_killed_has_left_is_swept_and_a_disk_is_not() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let made = store.create(&name("made"), &config()).unwrap();
    // Killed between its directory and its row.
    home.create_sandbox(&name("unmade")).unwrap();
    // Of a database that was lost.
    home.create_sandbox(&name("lost")).unwrap();
    fs::write(home.disk(&name("lost")), "somebody's").unwrap();
    store.sweep().unwrap();
    assert!(home.sandbox(&made.name).exists());
    assert!(!home.sandbox(&name("unmade")).exists());
    assert_eq!(fs::read(home.disk(&name("lost"))).unwrap(), b"somebody's");
}

#[test]
fn a_process_that_will_not_go_keeps_its_files() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let (record, lock) = running(&store, "worker");
    store.finish(record.run.id, &ExitReport::now(ExitReason::Requested)).unwrap();
    let begin = Instant::now();
    assert!(matches!(store.remove(&record.name), Err(StoreError::StillEnding { .. })));
    assert!(begin.elapsed() >= RunLock::PATIENCE);
    assert!(home.lock(&record.name).exists());
    drop(lock);
    store.remove(&record.name).unwrap();
}

#[test]
fn history_is_bounded() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let mut record = store.create(&name("worker"), &config()).unwrap();
    for _ in 0..Store::HISTORY + 5 {
        store.finish(record.run.id, &ExitReport::now(ExitReason::HostUnsupported)).unwrap();
        record = store.begin_run(&record.name).unwrap();
    }
    let runs = store.history(&record.name).unwrap();
    assert_eq!(runs.len(), Store::HISTORY as usize);
    assert_eq!(runs[0].id, record.run.id);
}

#[test]
fn what_is_no_store_is_an_error_and_stays_as_it_is() {
    let (_dir, home) = home();
    home.create().unwrap();
    let text = "not a database, but somebody's text\n".repeat(200);
    fs::write(home.database(), &text).unwrap();
    assert!(matches!(Store::open(&home), Err(StoreError::Corrupt { .. })));
    assert_eq!(fs::read_to_string(home.database()).unwrap(), text);

    fs::remove_file(home.database()).unwrap();
    drop(Store::open(&home).unwrap());
    Connection::open(home.database()).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let Err(StoreError::Newer { found: 99, known: 3, .. }) = Store::open(&home) else {
        panic!("opened a newer store")
    };
}

#[test]
fn a_damaged_page_is_an_error_and_stays_as_it_is() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    for i in 0..200 {
        store.create(&name(&format!("s{i}")), &config()).unwrap();
    }
    drop(store);
    let connection = Connection::open(home.database()).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    let mut file = fs::OpenOptions::new().write(true).open(home.database()).unwrap();
    // Past the header's page, so that opening alone does not see it.
    file.seek(SeekFrom::Start(4096)).unwrap();
    let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
    file.write_all(&vec![0xa5; size - 4096]).unwrap();
    let damaged = fs::read(home.database()).unwrap();
    let error = Store::open(&home).unwrap().list().unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    let error = Store::open(&home).unwrap().create(&name("new"), &config()).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    assert_eq!(fs::read(home.database()).unwrap(), damaged);
}

#[test]
fn a_home_that_cannot_be_written_is_an_error() {
    // Read-only for root as well.
    assert!(matches!(Store::open(&Home::at("/sys/cubby").unwrap()), Err(StoreError::Home(_))));
    let (_dir, home) = home();
    home.create().unwrap();
    fs::create_dir(home.database()).unwrap();
    assert!(matches!(Store::open(&home), Err(StoreError::Unusable { .. })));
}

#[test]
fn a_row_of_the_future_is_named() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    store.create(&name("worker"), &config()).unwrap();
    let connection = Connection::open(home.database()).unwrap();
    let json = r#"{"image":{"reference":"a"},"network":"friends_only"}"#;
    connection.execute("UPDATE sandboxes SET config = ?1", [json]).unwrap();
    let Err(StoreError::Row { name: row, .. }) = store.get(&name("worker")) else { panic!("understood it") };
    assert_eq!(row, "worker");
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn the_file_is_the_owners_alone() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    store.create(&name("worker"), &config()).unwrap();
    for entry in fs::read_dir(home.root().join("db")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{}", entry.path().display());
    }
}

#[test]
fn a_thousand_are_listed_newest_first() {
    let (_dir, home) = home();
    let store = Store::open(&home).unwrap();
    let locks: Vec<_> = (0..1000).map(|i| running(&store, &format!("s{i}")).1).collect();
    let begin = Instant::now();
    let list = store.list().unwrap();
    let took = begin.elapsed();
    println!("list of {} living: {took:?}", list.len());
    let names: Vec<_> = list.iter().map(|summary| summary.name.to_string()).collect();
    let expected: Vec<_> = (0..1000).rev().map(|i| format!("s{i}")).collect();
    assert_eq!(names, expected);
    assert!(list.iter().all(|summary| summary.status == Status::Running));
    drop(locks);
    assert!(store.list().unwrap().iter().all(|summary| summary.status == Status::Crashed));
}
