//! Many clients and the processes of their sandboxes over one real store, in random order: what each sees and what
//! is stored must fit a model of the promises. A process here decides as a sandbox process does (its own status
//! meets the table, then the store, then it acts) but has no guest; ends come with a word and without.
//!
//! Every call of the store is one transaction, so that a random sequence of calls is any order that racing processes
//! can have. A second test races for real.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::expect_used)]

use std::fs;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use cubby_state::{
    Event, ExitReason, ExitReport, Home, LockError, Next, RunId, RunLock, SandboxConfig, SandboxName, Status,
    Store, StoreError,
};
use proptest::prelude::*;
use rusqlite::Connection;
use tempfile::TempDir;

const CLIENTS: usize = 4;
const NAMES: usize = 2;

/// What somebody does, or what happens.
#[derive(Clone, Copy, Debug)]
enum Act {
    Create,
    Start,
    /// The sandbox process that a create or start is to have comes to life.
    Launch,
    /// The application dies before it has started the process.
    LauncherDies,
    /// A request of a client, or what happens in the sandbox process; not an end.
    Happens(Event),
    /// A session ends in time.
    Finish,
    /// The guest powers off as announced.
    PowerOff,
    KilledByRequest,
    Crash,
    BootFails,
    /// SIGKILL out of nowhere.
    Vanish,
    /// A client announces a kill and sends SIGKILL.
    KillProcess,
    /// A process that has told its end lets go of its lock.
    Exit,
    Look,
    List,
    Remove,
    /// A process whose run was taken from it or is over tries to write.
    LateWord,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    client: usize,
    name: usize,
    act: Act,
}

fn step() -> impl Strategy<Value = Step> {
    const REQUESTS: [Event; 8] = [
        Event::Open,
        Event::Pause,
        Event::Resume,
        Event::Detach,
        Event::Drain,
        Event::Stop,
        Event::IdleExpired,
        Event::LifetimeExpired,
    ];
    let act = prop_oneof![
        3 => Just(Act::Create),
        3 => Just(Act::Start),
        6 => Just(Act::Launch),
        1 => Just(Act::LauncherDies),
        6 => Just(Act::Happens(Event::Ready)),
        6 => Just(Act::Happens(Event::Open)),
        8 => proptest::sample::select(&REQUESTS[..]).prop_map(Act::Happens),
        3 => Just(Act::Finish),
        2 => Just(Act::PowerOff),
        1 => Just(Act::KilledByRequest),
        1 => Just(Act::Crash),
        1 => Just(Act::BootFails),
        1 => Just(Act::Vanish),
        1 => Just(Act::KillProcess),
        3 => Just(Act::Exit),
        2 => Just(Act::Look),
        1 => Just(Act::List),
        2 => Just(Act::Remove),
        1 => Just(Act::LateWord),
    ];
    (0..CLIENTS, 0..NAMES, act).prop_map(|(client, name, act)| Step { client, name, act })
}

/// One sandbox process.
struct Process {
    run: RunId,
    store: Store,
    _lock: RunLock,
    status: Status,
    open: u32,
    /// A session after this would break the promise.
    draining: bool,
    /// It has written its end.
    ended: bool,
}

/// Everything behind one name.
#[derive(Default)]
struct Slot {
    /// A run that has no process yet.
    pending: Option<RunId>,
    process: Option<Process>,
    /// The last that vanished; it may turn out to have been only slow.
    late: Option<RunId>,
}

struct World {
    _dir: TempDir,
    home: Home,
    clients: Vec<Store>,
    slots: [Mutex<Slot>; NAMES],
    /// Sessions: accepted, finished, lost.
    sessions: Mutex<[u32; 3]>,
}

fn name(number: usize) -> SandboxName {
    format!("s{number}").parse().unwrap()
}

/// What the promises let follow what, in other words than the table's.
fn promised(old: &str, new: &str) -> bool {
    match old {
        "Creating" => ["Running", "Draining", "Stopped", "Crashed"].contains(&new),
        "Running" => ["Paused", "Draining", "Stopped", "Crashed"].contains(&new),
        "Paused" => ["Running", "Draining", "Stopped", "Crashed"].contains(&new),
        "Draining" => ["Stopped", "Crashed"].contains(&new),
        "Stopped" | "Crashed" => ["Creating", "gone"].contains(&new),
        "none" => new == "Creating",
        _ => false,
    }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("home")).unwrap();
        let clients: Vec<_> = (0..CLIENTS).map(|_| Store::open(&home).unwrap()).collect();
        // The database itself notes every status that is ever stored.
        Connection::open(home.database())
            .unwrap()
            .execute_batch(
                "CREATE TABLE audit (id INTEGER PRIMARY KEY, old TEXT, new TEXT);
                 CREATE TRIGGER born AFTER INSERT ON sandboxes
                     BEGIN INSERT INTO audit (old, new) VALUES ('none', new.status); END;
                 CREATE TRIGGER moved AFTER UPDATE OF status ON sandboxes
                     BEGIN INSERT INTO audit (old, new) VALUES (old.status, new.status); END;
                 CREATE TRIGGER gone AFTER DELETE ON sandboxes
                     BEGIN INSERT INTO audit (old, new) VALUES (old.status, 'gone'); END;",
            )
            .unwrap();
        World { _dir: dir, home, clients, slots: Default::default(), sessions: Mutex::default() }
    }

    fn count(&self, which: usize, sessions: u32) {
        self.sessions.lock().unwrap()[which] += sessions;
    }

    /// Ends a process with its own words, or without any. Its open sessions are lost.
    fn end(&self, process: &mut Process, reason: Option<ExitReason>) {
        if process.ended {
            return;
        }
        if let Some(reason) = reason {
            let report = ExitReport::now(reason);
            let legal = process.status.after(report.reason.event()).is_ok();
            match process.store.finish(process.run, &report) {
                Ok(status) => assert!(legal && status == report.reason.status()),
                Err(StoreError::Refused { refused, .. }) => {
                    assert!(!legal && refused.status == process.status, "{refused}");
                    return;
                }
                Err(error) => panic!("{error}"),
            }
        }
        process.ended = true;
        self.count(2, std::mem::take(&mut process.open));
    }

    fn happens(&self, process: &mut Process, event: Event, client: &Store, name: &SandboxName) {
        if process.ended || (event == Event::IdleExpired && process.open > 0) {
            return;
        }
        let Ok(next) = process.status.after(event) else { return };
        let Next::Status(next) = next else { panic!("{event} removed a live sandbox") };
        if next != process.status {
            let stored = process.store.transition(process.run, process.status, event).unwrap();
            assert_eq!(stored, next);
        }
        process.status = next;
        process.draining |= next == Status::Draining;
        if event == Event::Open {
            assert!(!process.draining, "accepted after drain");
            // Whoever looks at this moment agrees that it runs, and that it is this run.
            let record = client.get(name).unwrap();
            assert_eq!((record.status, record.run.id), (Status::Running, process.run));
            process.open += 1;
            self.count(0, 1);
        }
    }

    fn launch(&self, slot: &mut Slot, name: &SandboxName) {
        let Some(run) = slot.pending.take() else { return };
        let store = Store::open(&self.home).unwrap();
        let lock = match RunLock::acquire(&self.home.lock(name), Duration::from_millis(20)) {
            Ok(lock) => lock,
            // The process before it is not gone yet; its creator says that the boot failed.
            Err(LockError::Held { .. }) => {
                let report = ExitReport::now(ExitReason::BootFailed { stage: "store".into() });
                store.finish(run, &report).unwrap();
                return;
            }
            Err(error) => panic!("{error}"),
        };
        match store.adopt(run, &lock) {
            Ok(()) => {
                slot.process = Some(Process {
                    run,
                    store,
                    _lock: lock,
                    status: Status::Creating,
                    open: 0,
                    draining: false,
                    ended: false,
                });
            }
            Err(StoreError::RunOver { .. }) => slot.late = Some(run),
            Err(error) => panic!("{error}"),
        }
    }

    fn take(&self, Step { client, name: number, act }: Step) {
        let (client, name) = (&self.clients[client], name(number));
        match act {
            // Readers wait for nobody: they meet everything that others do.
            Act::Look => drop(client.get(&name)),
            Act::List => drop(client.list().unwrap()),
            _ => {}
        }
        let mut slot: MutexGuard<'_, Slot> = self.slots[number].lock().unwrap();
        let Slot { process, late, .. } = &mut *slot;
        match (act, process) {
            (Act::Create, process) => match client.create(&name, &SandboxConfig::new("image")) {
                Ok(record) => {
                    assert!(process.is_none() && record.status == Status::Creating);
                    slot.pending = Some(record.run.id);
                }
                Err(StoreError::AlreadyExists { .. }) => {}
                Err(error) => panic!("{error}"),
            },
            (Act::Start, process) => match client.begin_run(&name) {
                Ok(record) => {
                    assert!(process.as_ref().is_none_or(|process| process.ended), "started twice");
                    // One whose launcher died and whom a reader gave up; it may still come to life.
                    slot.late = slot.pending.replace(record.run.id).or(slot.late);
                }
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => assert!(error.refused().unwrap().status.is_live(), "{error}"),
            },
            (Act::Launch, _) => self.launch(&mut slot, &name),
            (Act::LauncherDies, _) => {
                let Some(run) = slot.pending else { return };
                Connection::open(self.home.database())
                    .and_then(|connection| {
                        connection.busy_timeout(Duration::from_secs(60))?;
                        connection.execute(
                            "UPDATE runs SET launcher_start = launcher_start + 1 WHERE id = ?1",
                            [run.0],
                        )
                    })
                    .unwrap();
                // Its process may be on its way all the same, or nobody starts one for it now. The process of the
                // run before can still be ending, and what holds the lock counts as living.
                if run.0 % 2 == 0 && slot.process.is_none() {
                    slot.pending = None;
                    slot.late = Some(run);
                    assert_eq!(client.get(&name).unwrap().status, Status::Crashed);
                }
            }
            (Act::Happens(event), Some(process)) => self.happens(process, event, client, &name),
            (Act::Finish, Some(process)) if process.open > 0 && process.status != Status::Paused => {
                process.open -= 1;
                self.count(1, 1);
            }
            (Act::PowerOff, Some(process)) => self.end(process, Some(ExitReason::Drained)),
            (Act::KilledByRequest, Some(process)) => self.end(process, Some(ExitReason::Killed)),
            (Act::Crash, Some(process)) => self.end(process, Some(ExitReason::GuestPanic)),
            (Act::BootFails, Some(process)) => {
                self.end(process, Some(ExitReason::BootFailed { stage: "kernel".into() }));
            }
            (Act::Vanish | Act::KillProcess, Some(process)) => {
                let killed = matches!(act, Act::KillProcess) && client.request_kill(process.run).is_ok();
                let (run, told) = (process.run, process.ended);
                self.end(process, None);
                *late = Some(run);
                slot.process = None;
                if !told {
                    let reason = client.get(&name).unwrap().run.exit.unwrap().reason;
                    assert_eq!(matches!(reason, ExitReason::Killed), killed, "{reason:?}");
                }
            }
            (Act::Exit, process) if process.as_ref().is_some_and(|process| process.ended) => *process = None,
            // Waiting for a process that is just ending has a test of its own.
            (Act::Remove, process) if process.as_ref().is_none_or(|process| !process.ended) => {
                match client.remove(&name) {
                    Ok(()) => {
                        assert!(process.is_none(), "removed a live sandbox");
                        slot.pending = None;
                    }
                    Err(StoreError::NotFound { .. }) => {}
                    Err(error) => assert!(error.refused().unwrap().status.is_live(), "{error}"),
                }
            }
            (Act::LateWord, _) => {
                let Some(run) = *late else { return };
                // A reader has to have seen its end; then no word of it counts.
                if client.get(&name).is_ok() {
                    let report = ExitReport::now(ExitReason::Requested);
                    assert!(matches!(client.finish(run, &report), Err(StoreError::RunOver { .. })));
                    let moved = client.transition(run, Status::Running, Event::Drain);
                    assert!(matches!(moved, Err(StoreError::RunOver { .. })));
                }
            }
            _ => {}
        }
        drop(slot);
        self.check(client, number);
    }

    /// What holds at every moment.
    fn check(&self, client: &Store, number: usize) {
        let slot = self.slots[number].lock().unwrap();
        match (&slot.process, client.get(&name(number))) {
            (Some(process), Ok(record)) if !process.ended => {
                assert_eq!((record.status, record.run.id), (process.status, process.run));
                assert!(record.run.exit.is_none());
            }
            (Some(process), Err(error)) if !process.ended => panic!("{error}"),
            (_, Ok(record)) if record.status.is_live() => {
                assert_eq!((record.status, Some(record.run.id)), (Status::Creating, slot.pending));
            }
            (_, Ok(record)) => assert!(record.run.exit.is_some(), "an end without a report"),
            (_, Err(StoreError::NotFound { .. })) => {}
            (_, Err(error)) => panic!("{error}"),
        }
    }

    /// Ends everything, and looks at what was left and what was ever stored.
    fn finish(self) {
        let client = &self.clients[0];
        for (number, slot) in self.slots.iter().enumerate() {
            let mut slot = slot.lock().unwrap();
            let name = name(number);
            if let Some(mut process) = slot.process.take() {
                self.end(&mut process, Some(ExitReason::Killed));
            }
            self.launch(&mut slot, &name);
            if let Some(mut process) = slot.process.take() {
                self.end(&mut process, None);
            }
            match client.get(&name) {
                Ok(record) => assert!(!record.status.is_live(), "{name} is {}", record.status),
                Err(StoreError::NotFound { .. }) => continue,
                Err(error) => panic!("{error}"),
            }
            for run in client.history(&name).unwrap() {
                assert!(run.exit.is_some() && run.ended_at >= Some(run.started_at), "{run:?}");
            }
            client.remove(&name).unwrap();
        }
        assert!(client.list().unwrap().is_empty());
        for directory in [self.home.sandboxes(), self.home.run()] {
            let left: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
        let connection = Connection::open(self.home.database()).unwrap();
        let mut statement = connection.prepare("SELECT old, new FROM audit ORDER BY id").unwrap();
        let stored = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
        for stored in stored.unwrap() {
            let (old, new) = stored.unwrap();
            assert!(promised(&old, &new), "{old} became {new}");
        }
        let [accepted, finished, lost] = *self.sessions.lock().unwrap();
        assert_eq!(accepted, finished + lost, "a session that nobody heard of again");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_clients_and_processes_keeps_the_promises(
        steps in proptest::collection::vec(step(), 0..150),
    ) {
        let world = World::new();
        for step in steps {
            world.take(step);
        }
        world.finish();
    }
}

#[test]
fn clients_and_processes_that_race_keep_the_promises() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let world = World::new();
    let mut runner = TestRunner::deterministic();
    let plans: Vec<Vec<Step>> = (0..CLIENTS)
        .map(|_| proptest::collection::vec(step(), 300).new_tree(&mut runner).unwrap().current())
        .collect();
    std::thread::scope(|scope| {
        for (client, plan) in plans.iter().enumerate() {
            let world = &world;
            scope.spawn(move || plan.iter().for_each(|step| world.take(Step { client, ..*step })));
        }
    });
    world.finish();
}
