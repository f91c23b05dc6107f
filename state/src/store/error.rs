//! What can go wrong with the store, as a program can match on it.

use std::io;
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::RunId;
use crate::config::SandboxName;
use crate::home::HomeError;
use crate::machine::{Event, Refused, Status};

/// Why an operation on the store did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no sandbox of that name.
    #[error("there is no sandbox {name}")]
    NotFound {
        /// The name asked for.
        name: SandboxName,
    },
    /// There is a sandbox of that name.
    #[error("there is a sandbox {name} already; remove it or choose another name")]
    AlreadyExists {
        /// The name asked for.
        name: SandboxName,
    },
    /// Somebody else was quicker.
    #[error("the sandbox {name} was expected to be {expected} and is {actual}")]
    Conflict {
        /// The sandbox.
        name: SandboxName,
        /// The status the caller named.
        expected: Status,
        /// The status it has.
        actual: Status,
    },
    /// The lifecycle does not allow it.
    #[error("the sandbox {name} refused: {refused}")]
    Refused {
        /// The sandbox.
        name: SandboxName,
        /// Its status, and what was asked.
        refused: Refused,
    },
    /// The run has ended, was followed by another, or its sandbox was removed.
    #[error("run {run} is over")]
    RunOver {
        /// The run.
        run: RunId,
    },
    /// The event ends a run or a sandbox, and was given to a call that does neither.
    #[error("{event} ends a run and needs its own call")]
    NeedsReport {
        /// The event.
        event: Event,
    },
    /// The process of an ended sandbox is not gone.
    #[error("the process of the sandbox {name} has not gone yet; try again, or end it")]
    StillEnding {
        /// The sandbox.
        name: SandboxName,
    },
    /// The file was written by a newer version.
    #[error("{} has format {found}, and this version knows formats up to {known}; use the newer version, or another CUBBY_HOME", path.display())]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// The newest format this version knows.
        known: i64,
    },
    /// The file is damaged or no database.
    #[error("{} is damaged or not a database; nothing was changed in it: move it away to begin afresh", path.display())]
    Corrupt {
        /// The store's file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The file cannot be opened, read or written: no permission, a read-only directory, a full disk.
    #[error("cannot use {}: check its owner, its permissions and the space left", path.display())]
    Unusable {
        /// The store's file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// Some process has kept the write lock for longer than any of ours does.
    #[error("another process has held {} for more than {seconds} s", path.display())]
    Stuck {
        /// The store's file.
        path: PathBuf,
        /// How long this one waited.
        seconds: u64,
    },
    /// A row holds something that this version does not understand.
    #[error("the row of the sandbox {name} cannot be understood or written")]
    Row {
        /// The name in the row.
        name: String,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The home's directories cannot be used.
    #[error(transparent)]
    Home(HomeError),
    /// A file of a sandbox cannot be made, moved or deleted.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// SQLite refused a statement; a mistake of this library.
    #[error("the store refused a statement")]
    Sql(#[from] rusqlite::Error),
}

impl StoreError {
    /// Whether another process was in the way, and waiting helps.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, StoreError::Sql(e)
            if matches!(e.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)))
    }

    /// Whether the file could not be read or written and may be again: there is room on its disk, or another process has
    /// let go of it.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, StoreError::Unusable { .. } | StoreError::Stuck { .. } | StoreError::Io { .. })
    }

    /// The same error, with SQLite's codes turned into what they mean for the file at `path`.
    pub(super) fn at(self, path: &Path) -> Self {
        let StoreError::Sql(source) = self else { return self };
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                StoreError::Corrupt { path, source }
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                StoreError::Stuck { path, seconds: super::sql::LONGEST_WAIT.as_secs() }
            }
            Some(
                ErrorCode::PermissionDenied
                | ErrorCode::ReadOnly
                | ErrorCode::CannotOpen
                | ErrorCode::SystemIoFailure
                | ErrorCode::DiskFull
                | ErrorCode::FileLockingProtocolFailed,
            ) => StoreError::Unusable { path, source },
            _ => StoreError::Sql(source),
        }
    }
}
