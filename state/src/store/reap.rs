//! Looking after what nobody reads: sandboxes whose process and keeper are gone, sockets that nobody listens at,
//! ephemeral sandboxes that could not be removed at their end, and what interrupted removals have left.
//!
//! One process at a time does it, whoever holds the [`ReaperLease`], and no more often than the shortest period
//! of all that ask. It touches rows and files only: no process is ever signalled.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, SystemTime};

use super::{Store, StoreError, sql};
use crate::config::SandboxName;
use crate::home::Home;

/// The right to do one round of reaping: a lock (flock(2)) that ends with its holder, however that ends.
#[derive(Debug)]
pub struct ReaperLease {
    _lock: File,
}

impl ReaperLease {
    /// Takes the lease, unless another process has it, or had it less than `period` ago.
    ///
    /// # Errors
    /// What the system said; [`io::ErrorKind::NotFound`] if the home was removed, and nothing is made then.
    pub fn take(home: &Home, period: Duration) -> io::Result<Option<Self>> {
        let path = home.reaper_lock();
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // A clock that was set back makes the age an error, and the round due.
        if file.metadata()?.modified()?.elapsed().is_ok_and(|age| age < period) {
            return Ok(None);
        }
        file.set_modified(SystemTime::now())?;
        Ok(Some(ReaperLease { _lock: file }))
    }
}

impl Store {
    /// Does one round, and goes on where something cannot be done.
    ///
    /// # Errors
    /// The first thing that could not be done.
    pub fn reap(&self, _lease: &ReaperLease) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        for name in self.read(sql::live)? {
            match self.get(&name) {
                // It was ephemeral, or somebody else was quicker.
                Ok(_) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        for run in self.read(sql::ephemeral_left)? {
            outcome = outcome.and(self.discard(run));
        }
        outcome.and(self.sweep_sockets()).and(self.sweep())
    }

    /// Removes the sockets at which no live sandbox listens. Names of sandboxes cannot be read from them.
    fn sweep_sockets(&self) -> Result<(), StoreError> {
        let run = self.home().run();
        let mut sockets = Vec::new();
        for entry in fs::read_dir(&run).map_err(|source| self.io(&run, source))? {
            let path = entry.map_err(|source| self.io(&run, source))?.path();
            if path.extension().is_some_and(|extension| extension == "sock" || extension == "port") {
                sockets.push(path);
            }
        }
        let stale = |live: Vec<SandboxName>| {
            let of = |name: &SandboxName| [self.home().socket(name), self.home().port_socket(name)];
            let used: Vec<_> = live.iter().flat_map(of).collect();
            sockets.iter().filter(|path| !used.contains(path)).collect::<Vec<_>>()
        };
        if stale(self.read(sql::live)?).is_empty() {
            return Ok(());
        }
        // Under the write lock no run can begin whose socket this would be.
        self.write(|tx| {
            for path in stale(sql::live(tx)?) {
                match fs::remove_file(path) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(self.io(path, source));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
    }

    /// Deletes what interrupted removals and creates have left behind. A directory that has no row and holds something
    /// is left alone: the row may be lost, and what it holds belongs to somebody.
    ///
    /// # Errors
    /// [`StoreError::Io`] if something cannot be deleted.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let sandboxes = self.home().sandboxes();
        for entry in fs::read_dir(&sandboxes).map_err(|source| self.io(&sandboxes, source))? {
            let name = entry.map_err(|source| self.io(&sandboxes, source))?.file_name();
            let Some(name) = name.to_str() else { continue };
            let ours = match (name.strip_prefix(".orphan-"), name.strip_prefix(".removed-")) {
                (Some(_), _) => true,
                // Unless its removal has not come so far that it counts.
                (None, Some(id)) => match id.parse() {
                    Ok(id) => !self.read(|connection| sql::exists(connection, id))?,
                    Err(_) => false,
                },
                (None, None) => {
                    if let Ok(name) = name.parse() {
                        self.sweep_unmade(&name)?;
                    }
                    false
                }
            };
            if ours {
                self.delete(&sandboxes.join(name))?;
            }
        }
        Ok(())
    }

    /// Removes the empty directory of a sandbox whose create was killed before its row counted.
    fn sweep_unmade(&self, name: &SandboxName) -> Result<(), StoreError> {
        if self.read(|connection| sql::is_taken(connection, name))? {
            return Ok(());
        }
        // Under the write lock no create is between its directory and its row.
        self.write(|tx| {
            if !sql::is_taken(tx, name)? {
                // What is not empty stays.
                let _ = fs::remove_dir(self.home().sandbox(name));
            }
            Ok(())
        })
    }
}
