//! What is left behind, and who clears it up: crashes that nobody reads, stale sockets, ephemeral sandboxes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::expect_used)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use cubby_state::{
    Death, Event, ExitReason, ExitReport, Home, ProcessIdentity, ReaperLease, Record, RunLock, SandboxConfig,
    Status, Store, StoreError,
};
use rusqlite::Connection;
use tempfile::TempDir;

fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path().join("home")).unwrap();
    (dir, Store::open(&home).unwrap())
}

/// Creates a sandbox with a disk and a socket and brings it to Running, as its own process would.
fn running(store: &Store, text: &str, ephemeral: bool) -> (Record, RunLock) {
    let config = SandboxConfig { ephemeral, ..SandboxConfig::new("python:3.12") };
    let record = store.create(&text.parse().unwrap(), &config).unwrap();
    let lock = RunLock::acquire(&store.home().lock(&record.name), Duration::ZERO).unwrap();
    store.adopt(record.run.id, &lock).unwrap();
    store.transition(record.run.id, Status::Creating, Event::Ready).unwrap();
    fs::write(store.home().disk(&record.name), "disk").unwrap();
    drop(UnixListener::bind(store.home().socket(&record.name)).unwrap());
    (record, lock)
}

fn reap(store: &Store) {
    let lease = ReaperLease::take(store.home(), Duration::ZERO).unwrap().expect("the lease");
    store.reap(&lease).unwrap();
}

/// The status in the row, which no reader has settled.
fn raw_status(store: &Store, record: &Record) -> String {
    let connection = Connection::open(store.home().database()).unwrap();
    let sql = "SELECT status FROM sandboxes WHERE name = ?1";
    connection.query_row(sql, [record.name.as_str()], |row| row.get(0)).unwrap()
}

fn names(path: std::path::PathBuf) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_keeper_records_what_its_child_could_not() {
    let deaths = [
        (Death::Signal(31), ExitReason::ProcessKilled { signal: 31 }),
        (Death::OutOfMemory, ExitReason::OutOfMemory),
        (Death::Exit, ExitReason::ProcessKilled { signal: 0 }),
    ];
    let (_dir, store) = store();
    for (number, (death, reason)) in deaths.into_iter().enumerate() {
        let (record, _lock) = running(&store, &format!("worker-{number}"), false);
        assert_eq!(store.bury(record.run.id, death, "last words").unwrap(), Status::Crashed);
        let report = store.exit(record.run.id).unwrap().unwrap();
        assert_eq!((report.reason, report.console_tail.as_deref()), (reason, Some("last words")));
        assert!(!store.home().socket(&record.name).exists());
        // Who comes second changes nothing.
        assert!(matches!(store.bury(record.run.id, Death::Signal(9), ""), Err(StoreError::RunOver { .. })));
    }
    // One that somebody meant to kill is no crash.
    let (record, _lock) = running(&store, "wanted", false);
    store.request_kill(record.run.id).unwrap();
    assert_eq!(store.bury(record.run.id, Death::Signal(9), "words").unwrap(), Status::Stopped);
    let report = store.exit(record.run.id).unwrap().unwrap();
    assert_eq!((report.reason, report.console_tail), (ExitReason::Killed, None));
    // One that gives up before the guest is ready has failed to boot.
    let record = store.create(&"young".parse().unwrap(), &SandboxConfig::new("python:3.12")).unwrap();
    store.bury(record.run.id, Death::Exit, "").unwrap();
    let report = store.exit(record.run.id).unwrap().unwrap();
    assert_eq!(report.reason, ExitReason::BootFailed { stage: "process".into() });
}

#[test]
fn a_round_records_crashes_and_removes_stale_sockets_and_nothing_else() {
    let (_dir, store) = store();
    let home = store.home().clone();
    let (dead, lock) = running(&store, "dead", false);
    drop(lock);
    let (alive, _lock) = running(&store, "alive", false);
    let (stopped, lock) = running(&store, "stopped", false);
    store.finish(stopped.run.id, &ExitReport::now(ExitReason::Requested)).unwrap();
    drop(lock);
    // As of a sandbox that was removed while somebody bound its socket, and of one that has stopped.
    drop(UnixListener::bind(home.socket(&"removed".parse().unwrap())).unwrap());
    drop(UnixListener::bind(home.socket(&stopped.name)).unwrap());
    drop(UnixListener::bind(home.port_socket(&stopped.name)).unwrap());
    drop(UnixListener::bind(home.port_socket(&alive.name)).unwrap());
    fs::create_dir(home.sandboxes().join(".removed-4711")).unwrap();
    fs::create_dir(home.sandboxes().join(".orphan-4712")).unwrap();
    // One that was being created, and what another store knew.
    fs::create_dir(home.sandboxes().join("unborn")).unwrap();
    fs::create_dir(home.sandboxes().join("kept")).unwrap();
    fs::write(home.sandboxes().join("kept/disk.ext4"), "somebody's work").unwrap();
    // A removal whose transaction has not ended: its row is still there.
    let not_yet = home.sandboxes().join(format!(".removed-{}", 1));
    fs::create_dir(&not_yet).unwrap();
    fs::write(home.run().join("other"), "theirs").unwrap();

    assert_eq!(raw_status(&store, &dead), "Running");
    reap(&store);
    assert_eq!(raw_status(&store, &dead), "Crashed");
    let report = store.exit(dead.run.id).unwrap().unwrap();
    assert_eq!(report.reason, ExitReason::ProcessKilled { signal: 0 });
    assert_eq!(raw_status(&store, &alive), "Running");
    let socket = home.socket(&alive.name).file_name().unwrap().to_str().unwrap().to_owned();
    let mut left = names(home.run());
    left.sort();
    let port = socket.replace(".sock", ".port");
    let mut expected = vec![port, socket, "other".into(), "reaper.lock".into()];
    expected.sort();
    assert_eq!(left, expected);
    let mut left = names(home.sandboxes());
    left.sort();
    assert_eq!(left, [".removed-1", "alive", "dead", "kept", "stopped"]);
    // A second round finds nothing to do.
    reap(&store);
    assert_eq!(raw_status(&store, &alive), "Running");
}

#[test]
fn a_pid_that_is_somebody_elses_now_is_a_crash_and_is_left_alone() {
    let (_dir, store) = store();
    let (record, lock) = running(&store, "worker", false);
    drop(lock);
    let mut foreign = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let identity = ProcessIdentity::of(foreign.id()).unwrap();
    let connection = Connection::open(store.home().database()).unwrap();
    for start in [identity.start_ticks, identity.start_ticks + 1] {
        // Even with the start time of the other process: what counts is the lock.
        connection.execute("UPDATE runs SET pid = ?1, start_ticks = ?2", (identity.pid, start)).unwrap();
        reap(&store);
        assert_eq!(raw_status(&store, &record), "Crashed");
        assert!(identity.is_running(), "the reaper harmed a foreign process");
        store.begin_run(&record.name).unwrap();
        connection.execute("UPDATE runs SET launcher_start = 1", ()).unwrap();
    }
    drop(foreign.stdin.take());
    assert!(foreign.wait().unwrap().success(), "the reaper harmed a foreign process");
}

#[test]
fn one_process_at_a_time_reaps_and_no_more_often_than_it_should() {
    let (dir, store) = store();
    let home = store.home();
    let lease = ReaperLease::take(home, Duration::ZERO).unwrap().unwrap();
    assert!(ReaperLease::take(home, Duration::ZERO).unwrap().is_none(), "two had it at once");
    drop(lease);
    let minute = Duration::from_secs(60);
    assert!(ReaperLease::take(home, minute).unwrap().is_none(), "it was done a moment ago");
    let file = fs::File::options().write(true).open(home.reaper_lock()).unwrap();
    file.set_modified(SystemTime::now() - minute).unwrap();
    assert!(ReaperLease::take(home, minute).unwrap().is_some());
    assert!(ReaperLease::take(home, minute).unwrap().is_none(), "a round did not count");
    // A clock that was set back must not end all reaping.
    file.set_modified(SystemTime::now() + minute * 60).unwrap();
    assert!(ReaperLease::take(home, minute).unwrap().is_some());
    // A home that was removed stays so.
    fs::remove_dir_all(dir.path().join("home")).unwrap();
    let error = ReaperLease::take(home, Duration::ZERO).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert!(!dir.path().join("home").exists());
}

#[test]
fn what_is_ephemeral_goes_with_its_end_whoever_records_that() {
    let (_dir, store) = store();
    let home = store.home().clone();
    type End<'a> = &'a dyn Fn(&Record, RunLock);
    let ends: [(&str, End<'_>); 5] = [
        ("itself", &|record, _lock| {
            let report = ExitReport::now(ExitReason::Drained);
            assert_eq!(store.finish(record.run.id, &report).unwrap(), Status::Stopped);
        }),
        ("keeper", &|record, _lock| {
            assert_eq!(store.bury(record.run.id, Death::Signal(9), "words").unwrap(), Status::Crashed);
        }),
        ("reader", &|record, lock| {
            drop(lock);
            assert!(matches!(store.get(&record.name), Err(StoreError::NotFound { .. })));
        }),
        ("list", &|_, lock| {
            drop(lock);
            assert!(store.list().unwrap().is_empty());
        }),
        ("reaper", &|_, lock| {
            drop(lock);
            reap(&store);
        }),
    ];
    for (who, end) in ends {
        let (record, lock) = running(&store, who, true);
        assert_eq!(store.exit(record.run.id).unwrap(), None);
        end(&record, lock);
        assert!(matches!(store.get(&record.name), Err(StoreError::NotFound { .. })), "{who}");
        assert!(matches!(store.begin_run(&record.name), Err(StoreError::NotFound { .. })), "{who}");
        assert_eq!(names(home.sandboxes()), [""; 0], "{who}");
        assert!(!home.socket(&record.name).exists(), "{who}");
        let reason = store.exit(record.run.id).unwrap().unwrap().reason;
        let expected = match who {
            "itself" => ExitReason::Drained,
            "keeper" => ExitReason::ProcessKilled { signal: 9 },
            _ => ExitReason::ProcessKilled { signal: 0 },
        };
        assert_eq!(reason, expected, "{who}");
    }
}

#[test]
fn an_ephemeral_sandbox_that_cannot_be_removed_is_recorded_and_goes_later() {
    for later in ["keeper", "reaper"] {
        let (_dir, store) = store();
        let home = store.home().clone();
        let (record, _lock) = running(&store, "worker", true);
        // Something is where its directory is to be put.
        let obstacle = home.sandboxes().join(".removed-1");
        fs::write(&obstacle, "").unwrap();
        store.finish(record.run.id, &ExitReport::now(ExitReason::IdleTimeout)).unwrap();
        assert_eq!(store.get(&record.name).unwrap().status, Status::Stopped);
        assert!(home.disk(&record.name).exists());
        fs::remove_file(obstacle).unwrap();
        if later == "keeper" {
            store.discard(record.run.id).unwrap()
        } else {
            reap(&store)
        }
        assert!(matches!(store.get(&record.name), Err(StoreError::NotFound { .. })));
        assert_eq!(names(home.sandboxes()), [""; 0]);
        assert_eq!(store.exit(record.run.id).unwrap().unwrap().reason, ExitReason::IdleTimeout);
        store.discard(record.run.id).unwrap();
    }
    // What is not ephemeral is not discarded.
    let (_dir, store) = store();
    let (record, _lock) = running(&store, "worker", false);
    store.finish(record.run.id, &ExitReport::now(ExitReason::Requested)).unwrap();
    store.discard(record.run.id).unwrap();
    assert_eq!(store.get(&record.name).unwrap().status, Status::Stopped);
}

#[test]
fn farewells_are_forgotten_after_their_time() {
    let (_dir, store) = store();
    let (first, _lock) = running(&store, "first", true);
    let mut report = ExitReport::now(ExitReason::Drained);
    report.at = SystemTime::now() - Store::FAREWELL - Duration::from_secs(1);
    store.finish(first.run.id, &report).unwrap();
    assert!(store.exit(first.run.id).unwrap().is_some());
    let (second, _lock) = running(&store, "second", true);
    store.finish(second.run.id, &ExitReport::now(ExitReason::Drained)).unwrap();
    assert!(store.exit(first.run.id).unwrap().is_none());
    assert!(store.exit(second.run.id).unwrap().is_some());
}
