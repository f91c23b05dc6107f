//! The store's format and the way to it from every earlier one.
//!
//! `user_version` in the file's header is the number of steps it has taken. A step is never changed once it is
//! released; a new format is a new step at the end. The tests build a file with only the first n steps, fill
//! it, and open it with all of them.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// Step n turns format n into format n + 1.
pub(super) const STEPS: &[&str] = &[
    // 1: sandboxes and their runs. Times are milliseconds since 1970; ids are never used again, so that the
    // newest sandbox is the one with the highest, whatever the clock did.
    "CREATE TABLE sandboxes (
         id         INTEGER PRIMARY KEY AUTOINCREMENT,
         name       TEXT NOT NULL UNIQUE,
         status     TEXT NOT NULL
                    CHECK (status IN ('Creating', 'Running', 'Paused', 'Draining', 'Stopped', 'Crashed')),
         config     TEXT NOT NULL,
         created_at INTEGER NOT NULL,
         updated_at INTEGER NOT NULL,
         run        INTEGER
     ) STRICT;
     CREATE TABLE runs (
         id             INTEGER PRIMARY KEY AUTOINCREMENT,
         sandbox        INTEGER NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
         launcher_pid   INTEGER NOT NULL,
         launcher_start INTEGER NOT NULL,
         pid            INTEGER,
         start_ticks    INTEGER,
         boot_id        TEXT NOT NULL,
         kill_requested INTEGER NOT NULL DEFAULT 0,
         started_at     INTEGER NOT NULL,
         ended_at       INTEGER,
         exit           TEXT
     ) STRICT;
     CREATE INDEX runs_of_sandbox ON runs (sandbox);",
    // 2: how the runs of ephemeral sandboxes ended, kept for a while for those who were waiting for it.
    "CREATE TABLE farewells (
         run      INTEGER PRIMARY KEY,
         ended_at INTEGER NOT NULL,
         exit     TEXT NOT NULL
     ) STRICT;",
    // 3: the published ports of a run, with those of the host that it has got.
    "ALTER TABLE runs ADD COLUMN ports TEXT;",
];

/// Brings the file to the newest format: `steps` are all there are.
///
/// # Errors
/// [`StoreError::Newer`] if it has taken more steps than there are.
pub(super) fn migrate(connection: &mut Connection, path: &Path, steps: &[&str]) -> Result<(), StoreError> {
    let known = i64::try_from(steps.len()).unwrap_or(i64::MAX);
    let found = version(connection)?;
    if found > known || found < 0 {
        return Err(StoreError::Newer { path: path.to_owned(), found, known });
    }
    if found == known {
        return Ok(());
    }
    // Kept in the file; has to be outside a transaction.
    connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get::<_, String>(0))?;
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have done it meanwhile.
    let found = version(&tx)?;
    for step in steps.iter().skip(usize::try_from(found).unwrap_or(0)) {
        tx.execute_batch(step)?;
    }
    if found < known {
        tx.pragma_update(None, "user_version", known)?;
    }
    tx.commit()?;
    Ok(())
}

fn version(connection: &Connection) -> Result<i64, rusqlite::Error> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migrated(path: &Path, steps: &[&str]) -> Result<Connection, StoreError> {
        let mut connection = Connection::open(path).unwrap();
        migrate(&mut connection, path, steps)?;
        Ok(connection)
    }

    /// The schema as SQLite remembers it.
    fn shape(connection: &Connection) -> Vec<String> {
        let mut statement = connection.prepare("SELECT sql FROM sqlite_schema ORDER BY name").unwrap();
        let rows =
            statement.query_map([], |row| Ok(row.get::<_, Option<String>>(0)?.unwrap_or_default())).unwrap();
        rows.map(Result::unwrap).collect()
    }

    #[test]
    fn every_earlier_format_becomes_the_newest_and_keeps_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let newest = shape(&migrated(&dir.path().join("new.db"), STEPS).unwrap());
        for old in 1..=STEPS.len() {
            let path = dir.path().join(format!("{old}.db"));
            migrated(&path, &STEPS[..old])
                .unwrap()
                .execute_batch(
                    r#"INSERT INTO sandboxes VALUES (5, 'worker', 'Stopped', '{"image":{"reference":"a"}}', 1, 2, 9);
                       INSERT INTO runs (id, sandbox, launcher_pid, launcher_start, pid, start_ticks, boot_id, started_at, ended_at)
                       VALUES (9, 5, 1, 2, 3, 4, 'boot', 5, 6);"#,
                )
                .unwrap();
            let connection = migrated(&path, STEPS).unwrap();
            assert_eq!(shape(&connection), newest, "from format {old}");
            let record = super::super::sql::load(&connection, &"worker".parse().unwrap()).unwrap().record;
            assert_eq!(record.config.image.reference, "a");
            assert_eq!(record.run.process.unwrap().pid, 3);
            assert_eq!(record.run.ports, []);
        }
    }

    #[test]
    fn a_step_that_fails_leaves_the_format_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        migrated(&path, STEPS).unwrap();
        let mut more = STEPS.to_vec();
        more.extend(["ALTER TABLE runs ADD COLUMN a TEXT", "ALTER TABLE runs ADD COLUMN a TEXT"]);
        let known = i64::try_from(STEPS.len()).unwrap();
        assert!(matches!(migrated(&path, &more), Err(StoreError::Sql(_))));
        assert_eq!(version(&Connection::open(&path).unwrap()).unwrap(), known);
        more.pop();
        let connection = migrated(&path, &more).unwrap();
        assert_eq!(version(&connection).unwrap(), known + 1);
        connection.execute("UPDATE runs SET a = 'b'", []).unwrap();

        // And this is what today's version then says.
        let Err(StoreError::Newer { found, known: ours, .. }) = migrated(&path, STEPS) else {
            panic!("opened a newer format")
        };
        assert_eq!((found, ours), (known + 1, known));
    }
}
