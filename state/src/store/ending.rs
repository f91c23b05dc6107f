//! How a run ends on record: by its own sandbox process, or by whoever finds it gone; and what goes with an ephemeral
//! sandbox.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use rusqlite::Transaction;

use super::{Record, RunId, Store, StoreError, next, sql};
use crate::exit::{Death, ExitReason, ExitReport};
use crate::machine::Status;

/// What the end of a run has come to.
pub(super) struct End {
    status: Status,
    /// The sandbox was ephemeral, and is gone.
    pub(super) removed: bool,
    /// Its directory, to be deleted once its row is.
    aside: Option<PathBuf>,
}

impl Store {
    /// Ends `run` with a report, and returns the status it ends in: [`Status::Stopped`] or
    /// [`Status::Crashed`]. The sandbox process writes it when its guest is gone and its disk is flushed. An
    /// ephemeral sandbox is removed with that, whoever records its end; [`Store::exit`] still knows it.
    ///
    /// # Errors
    /// [`StoreError::RunOver`] if it has ended already, perhaps in the words of another;
    /// [`StoreError::Refused`] if the reason cannot end a sandbox with its status.
    pub fn finish(&self, run: RunId, report: &ExitReport) -> Result<Status, StoreError> {
        let end = self.write(|tx| self.end(tx, &sql::current(tx, run)?, report))?;
        Ok(self.leave(end))
    }

    /// Like [`Store::finish`], for a sandbox process that has given up the right to remove anything: an ephemeral
    /// sandbox is left to its keeper, which calls [`Store::discard`].
    ///
    /// # Errors
    /// Those of [`Store::finish`].
    pub fn record_end(&self, run: RunId, report: &ExitReport) -> Result<Status, StoreError> {
        self.write(|tx| self.set_ended(tx, &sql::current(tx, run)?, report))
    }

    /// Ends `run` in the place of a sandbox process that could not, with the last that its guest wrote. An end
    /// that somebody had announced ([`Store::request_kill`]) is no crash.
    ///
    /// # Errors
    /// [`StoreError::RunOver`] if the process had recorded its end before it went.
    pub fn bury(&self, run: RunId, death: Death, console: &str) -> Result<Status, StoreError> {
        let end = self.write(|tx| {
            let row = sql::current(tx, run)?;
            let report = if row.record.run.kill_requested {
                ExitReport::now(ExitReason::Killed)
            } else {
                ExitReport::now(death.reason(row.record.status)).with_console(console)
            };
            self.end(tx, &row, &report)
        })?;
        Ok(self.leave(end))
    }

    /// Removes the ephemeral sandbox of `run`, if it has ended and is still there: whoever recorded its end could
    /// not do it.
    ///
    /// # Errors
    /// [`StoreError::Io`] if its directory cannot be put aside.
    pub fn discard(&self, run: RunId) -> Result<(), StoreError> {
        let aside = self.write(|tx| match sql::ended(tx, run)? {
            Some(row) if row.record.config.ephemeral => match row.record.run.exit.clone() {
                Some(report) => self.forget(tx, &row, &report),
                None => Ok(None),
            },
            _ => Ok(None),
        })?;
        aside.map_or(Ok(()), |path| self.delete(&path))
    }

    /// Ends the run of `row`, and removes an ephemeral sandbox. Its socket goes under the same write lock, before
    /// which no other run of that name can have begun.
    pub(super) fn end(
        &self,
        tx: &Transaction<'_>,
        row: &sql::Row,
        report: &ExitReport,
    ) -> Result<End, StoreError> {
        let status = self.set_ended(tx, row, report)?;
        if !row.record.config.ephemeral {
            return Ok(End { status, removed: false, aside: None });
        }
        match self.forget(tx, row, report) {
            Ok(aside) => Ok(End { status, removed: true, aside }),
            // Files that stay are the reaper's; the end is worth more.
            Err(StoreError::Io { .. }) => Ok(End { status, removed: false, aside: None }),
            Err(error) => Err(error),
        }
    }

    fn set_ended(
        &self,
        tx: &Transaction<'_>,
        row: &sql::Row,
        report: &ExitReport,
    ) -> Result<Status, StoreError> {
        let Record { name, run, .. } = &row.record;
        let status = next(&row.record, report.reason.event())?;
        let json = serde_json::to_string(report).map_err(|source| super::row(name, source))?;
        sql::end_run(tx, run.id, sql::to_ms(report.at), &json)?;
        sql::set_status(tx, row.id, status, sql::to_ms(SystemTime::now()))?;
        // One that stays does no harm: the next run binds its own in its place.
        for socket in [self.home.socket(name), self.home.port_socket(name)] {
            let _ = fs::remove_file(socket);
        }
        Ok(status)
    }

    /// Removes an ephemeral sandbox that has ended with `report`, which is kept for a while.
    fn forget(
        &self,
        tx: &Transaction<'_>,
        row: &sql::Row,
        report: &ExitReport,
    ) -> Result<Option<PathBuf>, StoreError> {
        let Record { name, run, .. } = &row.record;
        let json = serde_json::to_string(report).map_err(|source| super::row(name, source))?;
        let aside = self.set_aside(name, &format!(".removed-{}", row.id))?;
        let oldest = report.at.checked_sub(Self::FAREWELL).unwrap_or(SystemTime::UNIX_EPOCH);
        sql::insert_farewell(tx, run.id, sql::to_ms(report.at), &json, sql::to_ms(oldest))?;
        sql::delete(tx, row.id)?;
        Ok(aside)
    }

    /// Deletes what an end has put aside. What cannot be deleted is left to [`Store::sweep`].
    pub(super) fn leave(&self, end: End) -> Status {
        if let Some(path) = end.aside {
            let _ = self.delete(&path);
        }
        end.status
    }
}
