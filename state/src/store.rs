//! The store: one row for each sandbox, one for each of its runs, in one SQLite file that every application
//! and every sandbox process opens at once.
//!
//! * Every change is one transaction that begins with the write lock (`BEGIN IMMEDIATE`), names the run it
//!   speaks for and the status it expects, and asks [`Status::after`]. Whoever comes second gets a
//!   typed [`StoreError::Conflict`] or [`StoreError::RunOver`], never the other's row.
//! * Waiting for another process's transaction is done here: `SQLITE_BUSY` reaches nobody.
//! * A sandbox process records its own end, its keeper that of one which could not ([`Store::bury`]). A reader
//!   that finds a live status without either records the crash ([`liveness`]), looking twice: the second time
//!   under the write lock, after which no process can claim the run any more.
//! * WAL with `synchronous=NORMAL`: a commit survives the death of any process; the last ones before a power
//!   cut may be lost, whole, together with the sandboxes they spoke of.
//! * A file that is no database, is damaged, or was written by a newer version is an error, and is not touched.

mod ending;
mod error;
mod reap;
mod schema;
mod sql;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use cubby_network_policy::NetworkPolicy;
use rusqlite::{Connection, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

pub use error::StoreError;
pub use reap::ReaperLease;

use crate::config::{SandboxConfig, SandboxName};
use crate::exit::{ExitReason, ExitReport};
use crate::home::{Home, HomeError};
use crate::liveness::{self, LockError, ProcessIdentity, RunLock};
use crate::machine::{Event, Next, Refused, Status};
use crate::ports::Port;

/// One run of one sandbox; never used twice in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RunId(pub i64);

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// One sandbox.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its name.
    pub name: SandboxName,
    /// Its status, as of the moment it was read.
    pub status: Status,
    /// What it is made of.
    pub config: SandboxConfig,
    /// When it was created.
    pub created_at: SystemTime,
    /// When its status last changed.
    pub updated_at: SystemTime,
    /// Its current run, or its last.
    pub run: Run,
}

/// One sandbox in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its name.
    pub name: SandboxName,
    /// Its status, as of the moment it was read.
    pub status: Status,
    /// When it was created.
    pub created_at: SystemTime,
    /// When its status last changed.
    pub updated_at: SystemTime,
}

/// One run of a sandbox, from `create` or `start` to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Its identifier.
    pub id: RunId,
    /// The application that began it.
    pub launcher: ProcessIdentity,
    /// The sandbox process, once it has said that it is there.
    pub process: Option<ProcessIdentity>,
    /// Whether somebody is about to kill the process; its end is then no crash.
    pub kill_requested: bool,
    /// When it began.
    pub started_at: SystemTime,
    /// When it ended.
    pub ended_at: Option<SystemTime>,
    /// How it ended.
    pub exit: Option<ExitReport>,
    /// Its published ports, with those of the host that it has got.
    pub ports: Vec<Port>,
}

/// The store of one home. It is `Send` and `Sync`; its calls take turns, and each is a few system calls long
/// unless another process is writing.
#[derive(Debug)]
pub struct Store {
    home: Home,
    connection: Mutex<Connection>,
}

impl Store {
    /// How many runs of a sandbox are remembered.
    pub const HISTORY: u32 = 100;

    /// How long [`Store::exit`] knows the end of an ephemeral sandbox that is gone.
    pub const FAREWELL: Duration = Duration::from_secs(3600);

    /// Opens the store of `home`, and makes it where there is none.
    ///
    /// # Errors
    /// [`StoreError::Home`] and [`StoreError::Unusable`] where it cannot be made or written;
    /// [`StoreError::Corrupt`] and [`StoreError::Newer`] for a file that is left as it is.
    pub fn open(home: &Home) -> Result<Self, StoreError> {
        home.create()?;
        let connection = sql::open(&home.database())?;
        Ok(Store { home: home.clone(), connection: Mutex::new(connection) })
    }

    /// The home this store belongs to.
    #[must_use]
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Adds a sandbox, [`Status::Creating`], with its first run, and makes its directory. The configuration is
    /// stored as it is: validate it before.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name is taken, by whatever status.
    pub fn create(&self, name: &SandboxName, config: &SandboxConfig) -> Result<Record, StoreError> {
        let launcher = ProcessIdentity::current().map_err(|source| self.io("/proc/self/stat", source))?;
        let json = serde_json::to_string(config).map_err(|source| row(name, source))?;
        let (record, orphan) = self.write(|tx| {
            let now = sql::to_ms(SystemTime::now());
            let inserted = tx
                .prepare_cached(
                    "INSERT INTO sandboxes (name, status, config, created_at, updated_at)
                     VALUES (?1, ?2, ?3, ?4, ?4) ON CONFLICT (name) DO NOTHING",
                )?
                .execute(params![name.as_str(), Status::Creating.as_str(), json, now])?;
            if inserted == 0 {
                return Err(StoreError::AlreadyExists { name: name.clone() });
            }
            let id = tx.last_insert_rowid();
            // A directory without a row is what a power cut has left of a sandbox: its disk must not
            // become this one's.
            let orphan = self.set_aside(name, &format!(".orphan-{id}"))?;
            self.home.create_sandbox(name)?;
            sql::insert_run(tx, id, &launcher, now)?;
            Ok((sql::load(tx, name)?, orphan))
        })?;
        if let Some(path) = orphan {
            self.delete(&path)?;
        }
        Ok(record.record)
    }

    /// Begins another run of an ended sandbox: [`Status::Creating`] again.
    ///
    /// The process of the run before may be about to exit; the new one waits for the sandbox's lock
    /// ([`RunLock::PATIENCE`]).
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Refused`] if it has not ended.
    pub fn begin_run(&self, name: &SandboxName) -> Result<Record, StoreError> {
        let launcher = ProcessIdentity::current().map_err(|source| self.io("/proc/self/stat", source))?;
        self.write(|tx| {
            let row = self.settled(tx, name)?;
            let status = next(&row.record, Event::Start)?;
            let now = sql::to_ms(SystemTime::now());
            sql::set_status(tx, row.id, status, now)?;
            sql::insert_run(tx, row.id, &launcher, now)?;
            sql::forget_runs(tx, row.id, Self::HISTORY)?;
            self.home.create_sandbox(name)?;
            Ok(sql::load(tx, name)?.record)
        })
    }

    /// Says that the calling process is the sandbox process of `run`. Until then the run lives as long as the
    /// application that began it, from then on as long as the lock is held.
    ///
    /// # Errors
    /// [`StoreError::RunOver`] if the run was given up meanwhile; the process has to end.
    pub fn adopt(&self, run: RunId, _held: &RunLock) -> Result<(), StoreError> {
        let process = ProcessIdentity::current().map_err(|source| self.io("/proc/self/stat", source))?;
        self.write(|tx| {
            sql::current(tx, run)?;
            sql::set_process(tx, run, &process)
        })
    }

    /// Says which ports of the host lead into the sandbox of `run`.
    ///
    /// # Errors
    /// [`StoreError::RunOver`] if the run has ended.
    pub fn set_ports(&self, run: RunId, ports: &[Port]) -> Result<(), StoreError> {
        self.write(|tx| {
            let record = sql::current(tx, run)?.record;
            let json = serde_json::to_string(ports).map_err(|source| row(&record.name, source))?;
            sql::set_ports(tx, run, &json)
        })
    }

    /// Says whom the sandbox of `run` may talk to from now on, and in later runs.
    ///
    /// # Errors
    /// [`StoreError::RunOver`] if the run has ended.
    pub fn set_network(&self, run: RunId, policy: &NetworkPolicy) -> Result<(), StoreError> {
        self.write(|tx| write_network(tx, sql::current(tx, run)?, policy))
    }

    /// Says whom a sandbox that has ended may talk to in later runs. `false`: it lives, and its process is to be asked.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn set_network_of_ended(
        &self,
        name: &SandboxName,
        policy: &NetworkPolicy,
    ) -> Result<bool, StoreError> {
        self.write(|tx| {
            let row = self.settled(tx, name)?;
            let ended = !row.record.status.is_live();
            if ended {
                write_network(tx, row, policy)?;
            }
            Ok(ended)
        })
    }

    /// Moves the sandbox of `run` from `expected` by `event`, and returns its new status.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if its status is not `expected`; [`StoreError::Refused`] if the table does not
    /// allow the event; [`StoreError::RunOver`] if the run has ended; [`StoreError::NeedsReport`] for an
    /// event that ends it, which is [`Store::finish`]'s.
    pub fn transition(&self, run: RunId, expected: Status, event: Event) -> Result<Status, StoreError> {
        // What the table allows is one statement; what stands in its way is looked for only if there is something.
        if let Ok(Next::Status(status)) = expected.after(event)
            && status.is_live()
            && status != expected
            && self.statement(|connection| sql::change_status(connection, run, expected, status))?
        {
            return Ok(status);
        }
        let row = self.statement(|connection| sql::current(connection, run))?;
        let actual = row.record.status;
        if actual != expected {
            return Err(StoreError::Conflict { name: row.record.name, expected, actual });
        }
        let status = next(&row.record, event)?;
        if status.is_live() { Ok(status) } else { Err(StoreError::NeedsReport { event }) }
    }

    /// Says that `run` is about to be killed: whoever then finds its process gone records
    /// [`ExitReason::Killed`] and no crash. Call it before the signal.
    ///
    /// # Errors
    /// [`StoreError::RunOver`] if the run has ended.
    pub fn request_kill(&self, run: RunId) -> Result<(), StoreError> {
        self.write(|tx| {
            let row = sql::current(tx, run)?;
            next(&row.record, Event::Kill)?;
            sql::set_kill_requested(tx, run)
        })
    }

    /// How `run` ended, if it has and is remembered. The end of an ephemeral sandbox is, for
    /// [`Store::FAREWELL`], although the sandbox is gone.
    ///
    /// # Errors
    /// [`StoreError::Row`] for a report that this version does not understand.
    pub fn exit(&self, run: RunId) -> Result<Option<ExitReport>, StoreError> {
        let json = self.read(|connection| sql::exit(connection, run))?;
        let report = json.map(|json| serde_json::from_str(&json)).transpose();
        report.map_err(|source| StoreError::Row { name: format!("of run {run}"), source: Box::new(source) })
    }

    /// One sandbox. If its process is gone, its crash is recorded first.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn get(&self, name: &SandboxName) -> Result<Record, StoreError> {
        let row = self.statement(|connection| sql::load(connection, name))?;
        if self.is_dead(&row.record.name, row.record.status, &row.record.run) {
            return self.reconcile(name);
        }
        Ok(row.record)
    }

    /// Looks under the write lock whether the sandbox's process is gone, and records its end if so.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for an ephemeral sandbox that is removed by this.
    pub fn reconcile(&self, name: &SandboxName) -> Result<Record, StoreError> {
        let (record, end) = self.write(|tx| {
            let row = sql::load(tx, name)?;
            let Some(reason) = self.unattended(&row) else { return Ok((Some(row.record), None)) };
            let end = self.end(tx, &row, &ExitReport::now(reason))?;
            let left = if end.removed { None } else { Some(sql::load(tx, name)?.record) };
            Ok((left, Some(end)))
        })?;
        end.map(|end| self.leave(end));
        record.ok_or_else(|| StoreError::NotFound { name: name.clone() })
    }

    /// All sandboxes, the newest first. The crash of each whose process is gone is recorded first.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`], [`StoreError::Unusable`].
    pub fn list(&self) -> Result<Vec<Summary>, StoreError> {
        let rows = self.read(sql::list)?;
        let mut list = Vec::with_capacity(rows.len());
        for (mut summary, run) in rows {
            if self.is_dead(&summary.name, summary.status, &run) {
                match self.reconcile(&summary.name) {
                    Ok(Record { status, updated_at, .. }) => {
                        summary = Summary { status, updated_at, ..summary };
                    }
                    Err(StoreError::NotFound { .. }) => continue,
                    Err(e) => return Err(e),
                }
            }
            list.push(summary);
        }
        Ok(list)
    }

    /// The runs of a sandbox that are remembered, the newest first.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn history(&self, name: &SandboxName) -> Result<Vec<Run>, StoreError> {
        self.read(|connection| sql::history(connection, sql::load(connection, name)?.id, name))
    }

    /// Removes an ended sandbox: row, history, directory and socket.
    ///
    /// The directory is first put aside under the same transaction, so that a crash in the middle leaves
    /// either the whole sandbox or something for [`Store::sweep`], and never a disk for the next of that name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Refused`] if it has not ended; [`StoreError::StillEnding`] if
    /// its process does not go; [`StoreError::Io`] if files remain.
    pub fn remove(&self, name: &SandboxName) -> Result<(), StoreError> {
        next(&self.get(name)?, Event::Remove)?;
        let lock = match RunLock::acquire(&self.home.lock(name), RunLock::PATIENCE) {
            Ok(lock) => Some(lock),
            Err(LockError::Held { .. }) => return Err(StoreError::StillEnding { name: name.clone() }),
            // No directory, no process in it.
            Err(LockError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(LockError::Io { path, source }) => return Err(StoreError::Io { path, source }),
        };
        let aside = self.write(|tx| {
            let row = self.settled(tx, name)?;
            next(&row.record, Event::Remove)?;
            sql::delete(tx, row.id)?;
            for socket in [self.home.socket(name), self.home.port_socket(name)] {
                match fs::remove_file(&socket) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(self.io(socket, source));
                    }
                    _ => {}
                }
            }
            self.set_aside(name, &format!(".removed-{}", row.id))
        })?;
        drop(lock);
        aside.map_or(Ok(()), |path| self.delete(&path))
    }

    /// Whether a row with a live status has lost its process. What cannot be found out counts as living.
    fn is_dead(&self, name: &SandboxName, status: Status, run: &Run) -> bool {
        status.is_live()
            && !(run.process.is_none() && run.launcher.is_running())
            && liveness::is_held(&self.home.lock(name)).is_ok_and(|held| !held)
    }

    /// Why the run of `row` ended, if its process and its keeper are gone without a word.
    fn unattended(&self, row: &sql::Row) -> Option<ExitReason> {
        let Record { name, status, run, .. } = &row.record;
        self.is_dead(name, *status, run).then(|| match (&run.process, run.kill_requested) {
            (_, true) => ExitReason::Killed,
            (None, false) if *status == Status::Creating => {
                ExitReason::BootFailed { stage: "launch".to_owned() }
            }
            (_, false) => ExitReason::ProcessKilled { signal: 0 },
        })
    }

    /// The row as it is once the crash of a process that is gone is recorded. The caller has the write lock,
    /// and may still fail: nothing but the row is touched. What is ephemeral is gone.
    fn settled(&self, tx: &Transaction<'_>, name: &SandboxName) -> Result<sql::Row, StoreError> {
        let row = sql::load(tx, name)?;
        match self.unattended(&row) {
            None => Ok(row),
            Some(_) if row.record.config.ephemeral => Err(StoreError::NotFound { name: name.clone() }),
            Some(reason) => {
                self.end(tx, &row, &ExitReport::now(reason))?;
                sql::load(tx, name)
            }
        }
    }

    /// Renames the directory of `name`, if there is one.
    fn set_aside(&self, name: &SandboxName, to: &str) -> Result<Option<PathBuf>, StoreError> {
        let from = self.home.sandbox(name);
        let to = self.home.sandboxes().join(to);
        match fs::rename(&from, &to) {
            Ok(()) => Ok(Some(to)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.io(from, source)),
        }
    }

    fn delete(&self, path: &Path) -> Result<(), StoreError> {
        match fs::remove_dir_all(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(self.io(path, source)),
            _ => Ok(()),
        }
    }

    fn io(&self, path: impl Into<PathBuf>, source: io::Error) -> StoreError {
        StoreError::Io { path: path.into(), source }
    }

    /// One statement, which is a transaction of its own.
    fn statement<T>(&self, f: impl Fn(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        sql::patiently(|| f(&connection)).map_err(|e| e.at(&self.home.database()))
    }

    /// One reading transaction.
    fn read<T>(&self, f: impl Fn(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.transaction(TransactionBehavior::Deferred, |tx| f(tx))
    }

    /// One writing transaction; nothing is written if `f` fails.
    fn write<T>(&self, f: impl Fn(&Transaction<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.transaction(TransactionBehavior::Immediate, f)
    }

    fn transaction<T>(
        &self,
        behavior: TransactionBehavior,
        f: impl Fn(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let result = sql::patiently(|| {
            let tx = connection.transaction_with_behavior(behavior)?;
            let value = f(&tx)?;
            tx.commit()?;
            Ok(value)
        });
        result.map_err(|e| e.at(&self.home.database()))
    }
}

/// The status that the table lets `event` lead to: for a removal, the last one.
fn next(record: &Record, event: Event) -> Result<Status, StoreError> {
    match record.status.after(event) {
        Ok(Next::Status(status)) => Ok(status),
        Ok(Next::Gone) => Ok(record.status),
        Err(refused) => Err(StoreError::Refused { name: record.name.clone(), refused }),
    }
}

fn write_network(tx: &Transaction<'_>, row: sql::Row, policy: &NetworkPolicy) -> Result<(), StoreError> {
    let Record { name, config, .. } = row.record;
    let config = SandboxConfig { network: policy.clone(), ..config };
    let json = serde_json::to_string(&config).map_err(|source| self::row(&name, source))?;
    sql::set_config(tx, row.id, &json)
}

fn row(name: &SandboxName, source: serde_json::Error) -> StoreError {
    StoreError::Row { name: name.to_string(), source: Box::new(source) }
}

impl From<HomeError> for StoreError {
    fn from(source: HomeError) -> Self {
        StoreError::Home(source)
    }
}

impl StoreError {
    /// The refusal of the lifecycle's table, where it is one.
    #[must_use]
    pub fn refused(&self) -> Option<Refused> {
        match self {
            StoreError::Refused { refused, .. } => Some(*refused),
            _ => None,
        }
    }
}
