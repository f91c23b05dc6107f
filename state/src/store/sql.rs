//! The statements: rows in, values out. What they mean is decided in the parent module.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::schema::{self, STEPS};
use super::{Record, Run, RunId, StoreError, Summary};
use crate::config::SandboxName;
use crate::liveness::ProcessIdentity;
use crate::machine::Status;

/// How long a call waits for other processes. Their transactions take microseconds, so that only a stopped
/// process that holds the lock can make it come to this.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A sandbox with the key of its row.
pub(super) struct Row {
    pub(super) id: i64,
    pub(super) record: Record,
}

pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    // Environments hold secrets. SQLite gives its other files the mode of this one.
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(StoreError::Io { path: path.to_owned(), source: e });
        }
        _ => {}
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    patiently(|| {
        let mut connection = Connection::open_with_flags(path, flags)?;
        connection.busy_handler(Some(wait))?;
        // Whoever closes last would otherwise write everything back and fsync it, at the end of a process
        // that somebody may be waiting for.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.execute_batch("PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;")?;
        // A status is a word of ours, and SQLite would fill a table of its own, with a page cache of 87 KiB, to look each
        // one up among those that `CHECK` lists.
        connection.pragma_update(None, "ignore_check_constraints", true)?;
        schema::migrate(&mut connection, path, STEPS)?;
        Ok(connection)
    })
    .map_err(|e| e.at(path))
}

/// Calls `f` until no other process is in its way. SQLite asks [`wait`] in most cases, and returns
/// `SQLITE_BUSY` unasked in a few: a change of journal mode, a recovery, what could be a deadlock.
pub(super) fn patiently<T>(mut f: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let begin = Instant::now();
    loop {
        match f() {
            Err(e) if e.is_busy() && begin.elapsed() < LONGEST_WAIT => std::thread::sleep(pause(0)),
            result => return result,
        }
    }
}

/// SQLite's own steps begin at 1 ms and end at 100 ms, and ours at 20 µs, for our transactions are as short.
/// The longest runs to about [`LONGEST_WAIT`].
fn wait(turn: i32) -> bool {
    std::thread::sleep(pause(turn));
    turn < 12_000
}

fn pause(turn: i32) -> Duration {
    let steps = u32::try_from(turn).unwrap_or(0).min(8);
    Duration::from_micros(20) * (1 << steps)
}

pub(super) fn to_ms(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn from_ms(ms: i64) -> SystemTime {
    let since = Duration::from_millis(u64::try_from(ms).unwrap_or(0));
    UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
}

const RUN_COLUMNS: &str = "r.id, r.launcher_pid, r.launcher_start, r.pid, r.start_ticks, r.boot_id, r.kill_requested, \
                           r.started_at, r.ended_at, r.exit, r.ports";

/// The run in the columns from `at` on; they are [`RUN_COLUMNS`].
fn run(row: &rusqlite::Row<'_>, at: usize, name: &str) -> Result<Run, StoreError> {
    let boot_id: String = row.get(at + 5)?;
    let identity = |pid, start_ticks| ProcessIdentity { pid, start_ticks, boot_id: boot_id.clone() };
    let process = match (row.get(at + 3)?, row.get(at + 4)?) {
        (Some(pid), Some(start)) => Some(identity(pid, start)),
        _ => None,
    };
    let exit: Option<String> = row.get(at + 9)?;
    let ports: Option<String> = row.get(at + 10)?;
    let ports = ports.map(|json| serde_json::from_str(&json)).transpose().map_err(|e| unclear(name, e))?;
    Ok(Run {
        id: RunId(row.get(at)?),
        launcher: identity(row.get(at + 1)?, row.get(at + 2)?),
        process,
        kill_requested: row.get(at + 6)?,
        started_at: from_ms(row.get(at + 7)?),
        ended_at: row.get::<_, Option<i64>>(at + 8)?.map(from_ms),
        exit: exit.map(|json| serde_json::from_str(&json)).transpose().map_err(|e| unclear(name, e))?,
        ports: ports.unwrap_or_default(),
    })
}

fn summary(row: &rusqlite::Row<'_>, text: &str) -> Result<Summary, StoreError> {
    let name: SandboxName = text.parse().map_err(|e| unclear(text, e))?;
    let status: String = row.get(2)?;
    Ok(Summary {
        name,
        status: status.parse::<Status>().map_err(|e| unclear(text, e))?,
        created_at: from_ms(row.get(3)?),
        updated_at: from_ms(row.get(4)?),
    })
}

fn unclear(name: &str, source: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Row { name: name.to_owned(), source: Box::new(source) }
}

fn full(row: &rusqlite::Row<'_>) -> Result<Row, StoreError> {
    let text: String = row.get(1)?;
    let Summary { name, status, created_at, updated_at } = summary(row, &text)?;
    let config: String = row.get(5)?;
    let config = serde_json::from_str(&config).map_err(|e| unclear(&text, e))?;
    let record = Record { name, status, config, created_at, updated_at, run: run(row, 6, &text)? };
    Ok(Row { id: row.get(0)?, record })
}

/// The sandbox of that name.
pub(super) fn load(connection: &Connection, name: &SandboxName) -> Result<Row, StoreError> {
    let sql = format!(
        "SELECT s.id, s.name, s.status, s.created_at, s.updated_at, s.config, {RUN_COLUMNS}
         FROM sandboxes s JOIN runs r ON r.id = s.run WHERE s.name = ?1"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([name.as_str()])?;
    rows.next()?.map(full).transpose()?.ok_or_else(|| StoreError::NotFound { name: name.clone() })
}

/// The sandbox whose current run this is, if the run has not ended.
pub(super) fn current(connection: &Connection, run: RunId) -> Result<Row, StoreError> {
    of_run(connection, run, "r.ended_at IS NULL")?.ok_or(StoreError::RunOver { run })
}

/// The sandbox whose current run this is, if the run has ended.
pub(super) fn ended(connection: &Connection, run: RunId) -> Result<Option<Row>, StoreError> {
    of_run(connection, run, "r.ended_at IS NOT NULL")
}

fn of_run(connection: &Connection, run: RunId, condition: &str) -> Result<Option<Row>, StoreError> {
    let sql = format!(
        "SELECT s.id, s.name, s.status, s.created_at, s.updated_at, s.config, {RUN_COLUMNS}
         FROM sandboxes s JOIN runs r ON r.id = s.run WHERE r.id = ?1 AND {condition}"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([run.0])?;
    rows.next()?.map(full).transpose()
}

/// All sandboxes with their current runs, the newest first; exit reports and ports are left out.
pub(super) fn list(connection: &Connection) -> Result<Vec<(Summary, Run)>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT s.id, s.name, s.status, s.created_at, s.updated_at, r.id, r.launcher_pid, r.launcher_start, r.pid,
                r.start_ticks, r.boot_id, r.kill_requested, r.started_at, r.ended_at, NULL, NULL
         FROM sandboxes s JOIN runs r ON r.id = s.run ORDER BY s.id DESC",
    )?;
    let mut rows = statement.query([])?;
    let mut list = Vec::new();
    while let Some(row) = rows.next()? {
        let name: String = row.get(1)?;
        list.push((summary(row, &name)?, run(row, 5, &name)?));
    }
    Ok(list)
}

/// The runs of ephemeral sandboxes that have ended and are still there.
pub(super) fn ephemeral_left(connection: &Connection) -> Result<Vec<RunId>, StoreError> {
    let sql = "SELECT run FROM sandboxes
               WHERE status IN ('Stopped', 'Crashed') AND json_extract(config, '$.ephemeral') = 1";
    let mut statement = connection.prepare_cached(sql)?;
    let runs = statement.query_map([], |row| Ok(RunId(row.get(0)?)))?.collect::<Result<_, _>>();
    Ok(runs?)
}

/// The sandboxes with a status behind which there is a process.
pub(super) fn live(connection: &Connection) -> Result<Vec<SandboxName>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT name FROM sandboxes WHERE status IN ('Creating', 'Running', 'Paused', 'Draining')",
    )?;
    let mut rows = statement.query([])?;
    let mut names = Vec::new();
    while let Some(row) = rows.next()? {
        let name: String = row.get(0)?;
        names.push(name.parse().map_err(|e| unclear(&name, e))?);
    }
    Ok(names)
}

/// Whether there is a sandbox with this key.
pub(super) fn exists(connection: &Connection, id: i64) -> Result<bool, StoreError> {
    Ok(connection.prepare_cached("SELECT 1 FROM sandboxes WHERE id = ?1")?.exists([id])?)
}

/// Whether a sandbox has this name.
pub(super) fn is_taken(connection: &Connection, name: &SandboxName) -> Result<bool, StoreError> {
    Ok(connection.prepare_cached("SELECT 1 FROM sandboxes WHERE name = ?1")?.exists([name.as_str()])?)
}

/// How a run ended, if it has: also one whose ephemeral sandbox is gone.
pub(super) fn exit(connection: &Connection, run: RunId) -> Result<Option<String>, StoreError> {
    let sql = "SELECT exit FROM runs WHERE id = ?1 AND exit IS NOT NULL
               UNION ALL SELECT exit FROM farewells WHERE run = ?1";
    Ok(connection.prepare_cached(sql)?.query_row([run.0], |row| row.get(0)).optional()?)
}

/// Keeps how the run of a sandbox ended that is about to be forgotten, and forgets those from before `oldest`.
pub(super) fn insert_farewell(
    tx: &Connection,
    run: RunId,
    at: i64,
    report: &str,
    oldest: i64,
) -> Result<(), StoreError> {
    tx.prepare_cached("DELETE FROM farewells WHERE ended_at < ?1")?.execute([oldest])?;
    tx.prepare_cached("INSERT INTO farewells (run, ended_at, exit) VALUES (?1, ?2, ?3)")?
        .execute(params![run.0, at, report])?;
    Ok(())
}

/// All remembered runs of a sandbox, the newest first.
pub(super) fn history(connection: &Connection, id: i64, name: &SandboxName) -> Result<Vec<Run>, StoreError> {
    let sql = format!("SELECT {RUN_COLUMNS} FROM runs r WHERE r.sandbox = ?1 ORDER BY r.id DESC");
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([id])?;
    let mut runs = Vec::new();
    while let Some(row) = rows.next()? {
        runs.push(run(row, 0, name.as_str())?);
    }
    Ok(runs)
}

/// Adds a run, and makes it the sandbox's current one.
pub(super) fn insert_run(
    tx: &Connection,
    sandbox: i64,
    by: &ProcessIdentity,
    now: i64,
) -> Result<(), StoreError> {
    tx.prepare_cached(
        "INSERT INTO runs (sandbox, launcher_pid, launcher_start, boot_id, started_at) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![sandbox, by.pid, by.start_ticks, by.boot_id, now])?;
    let run = tx.last_insert_rowid();
    tx.prepare_cached("UPDATE sandboxes SET run = ?2 WHERE id = ?1")?.execute([sandbox, run])?;
    Ok(())
}

pub(super) fn set_process(tx: &Connection, run: RunId, process: &ProcessIdentity) -> Result<(), StoreError> {
    tx.prepare_cached("UPDATE runs SET pid = ?2, start_ticks = ?3 WHERE id = ?1")?.execute(params![
        run.0,
        process.pid,
        process.start_ticks
    ])?;
    Ok(())
}

pub(super) fn set_ports(tx: &Connection, run: RunId, ports: &str) -> Result<(), StoreError> {
    tx.prepare_cached("UPDATE runs SET ports = ?2 WHERE id = ?1")?.execute(params![run.0, ports])?;
    Ok(())
}

pub(super) fn set_config(tx: &Connection, id: i64, config: &str) -> Result<(), StoreError> {
    tx.prepare_cached("UPDATE sandboxes SET config = ?2 WHERE id = ?1")?.execute(params![id, config])?;
    Ok(())
}

pub(super) fn set_kill_requested(tx: &Connection, run: RunId) -> Result<(), StoreError> {
    tx.prepare_cached("UPDATE runs SET kill_requested = 1 WHERE id = ?1")?.execute([run.0])?;
    Ok(())
}

pub(super) fn end_run(tx: &Connection, run: RunId, at: i64, report: &str) -> Result<(), StoreError> {
    tx.prepare_cached("UPDATE runs SET ended_at = ?2, exit = ?3 WHERE id = ?1")?
        .execute(params![run.0, at, report])?;
    Ok(())
}

/// Gives the sandbox of this run, which has not ended, a status in the place of `expected`. Whether it had that.
pub(super) fn change_status(
    connection: &Connection,
    run: RunId,
    expected: Status,
    status: Status,
) -> Result<bool, StoreError> {
    let changed = connection
        .prepare_cached(
            "UPDATE sandboxes SET status = ?3, updated_at = ?4 WHERE run = ?1 AND status = ?2
             AND id = (SELECT sandbox FROM runs WHERE id = ?1 AND ended_at IS NULL)",
        )?
        .execute(params![run.0, expected.as_str(), status.as_str(), to_ms(SystemTime::now())])?;
    Ok(changed > 0)
}

pub(super) fn set_status(tx: &Connection, id: i64, status: Status, now: i64) -> Result<(), StoreError> {
    tx.prepare_cached("UPDATE sandboxes SET status = ?2, updated_at = ?3 WHERE id = ?1")?
        .execute(params![id, status.as_str(), now])?;
    Ok(())
}

/// Forgets all but the newest `keep` runs of a sandbox.
pub(super) fn forget_runs(tx: &Connection, sandbox: i64, keep: u32) -> Result<(), StoreError> {
    let oldest: Option<i64> = tx
        .prepare_cached("SELECT id FROM runs WHERE sandbox = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2")?
        .query_row(params![sandbox, keep], |row| row.get(0))
        .optional()?;
    if let Some(oldest) = oldest {
        tx.prepare_cached("DELETE FROM runs WHERE sandbox = ?1 AND id <= ?2")?.execute([sandbox, oldest])?;
    }
    Ok(())
}

/// Deletes a sandbox with its history.
pub(super) fn delete(tx: &Connection, id: i64) -> Result<(), StoreError> {
    tx.prepare_cached("DELETE FROM sandboxes WHERE id = ?1")?.execute([id])?;
    Ok(())
}
