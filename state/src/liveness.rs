//! Whether the process behind a sandbox lives.
//!
//! A pid alone is no identity: pids are used again. What counts is a lock (flock(2)) that the sandbox process
//! and its keeper hold together on their sandbox's lock file, from before the process says that it is there
//! until its end is recorded; the kernel lets go of it once both are gone, however they went. Pid, start time and boot id ([`ProcessIdentity`]) say which process to signal,
//! and stand in for the lock while the application that starts a sandbox has no process for it yet.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// One process of one boot of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since the boot (proc_pid_stat(5), field 22).
    pub start_ticks: u64,
    /// The boot it belongs to (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl ProcessIdentity {
    /// The calling process.
    ///
    /// # Errors
    /// What reading `/proc` gave.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has this pid now.
    ///
    /// # Errors
    /// What reading `/proc` gave: [`io::ErrorKind::NotFound`] if there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let (_, start_ticks) = stat(pid)?;
        Ok(ProcessIdentity { pid, start_ticks, boot_id: boot_id()?.to_owned() })
    }

    /// Whether exactly this process still runs. One that has ended and waits for its parent does not.
    #[must_use]
    pub fn is_running(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id)
            && stat(self.pid)
                .is_ok_and(|(state, start)| start == self.start_ticks && !matches!(state, b'Z' | b'X'))
    }
}

/// The identifier of this boot; read once.
fn boot_id() -> io::Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = BOOT_ID.get() {
        return Ok(id);
    }
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| text.trim().to_owned()))
}

/// State and start time of a process.
fn stat(pid: u32) -> io::Result<(u8, u64)> {
    let text = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat has an unknown form"))
}

/// Fields 3 and 22. The name in field 2 may hold anything, spaces and parentheses included, so that only what
/// follows the last `)` can be counted.
fn parse_stat(text: &[u8]) -> Option<(u8, u64)> {
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let mut fields =
        text.get(end.checked_add(1)?..)?.split(u8::is_ascii_whitespace).filter(|f| !f.is_empty());
    let state = *fields.next()?.first()?;
    let start = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some((state, start))
}

/// The lock that a sandbox process and its keeper hold for as long as one of them lives: it belongs to the open
/// file, which a fork shares. When the last of them drops it, nobody answers for the sandbox any more.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

/// Why a lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("another process holds {}", path.display())]
    Held {
        /// The lock file.
        path: PathBuf,
    },
    /// The file cannot be opened or locked.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl RunLock {
    /// How long the next run of a sandbox, or its removal, should wait for the process of the last one, which
    /// writes that it has stopped shortly before it is gone: it still has to give its memory back, which can
    /// take seconds on a host that has more to do than it can.
    pub const PATIENCE: Duration = Duration::from_secs(10);

    /// Locks the file, which is made if it is missing. A reader that looks whether the lock is held has it for
    /// some microseconds; up to `patience` is spent on waiting for that, or for a process that is just ending.
    ///
    /// # Errors
    /// [`LockError::Held`] if a process still holds it after `patience`; [`LockError::Io`].
    pub fn acquire(path: &Path, patience: Duration) -> Result<Self, LockError> {
        let failed = |source| LockError::Io { path: path.to_owned(), source };
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(failed)?;
        let deadline = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(RunLock { _file: file }),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(LockError::Held { path: path.to_owned() });
                }
                // Waiting in flock(2) itself could not be ended by a deadline.
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }
}

/// Whether some process holds the lock on this file. A file that does not exist is held by nobody.
///
/// # Errors
/// What opening or locking the file gave; then nothing is known.
pub fn is_held(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_full_of_parentheses_does_not_shift_the_fields() {
        let line = b"7 (a) R 1 (b c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21\n";
        assert_eq!(parse_stat(line), Some((b'S', 4242)));
        assert_eq!(parse_stat(b"7 (a) S 1 2"), None);
        assert_eq!(parse_stat(b""), None);
        assert_eq!(parse_stat(b")"), None);
    }

    #[test]
    fn a_reused_pid_is_another_process() {
        let me = ProcessIdentity::current().unwrap();
        assert!(me.is_running());
        assert!(!ProcessIdentity { start_ticks: me.start_ticks + 1, ..me.clone() }.is_running());
        assert!(!ProcessIdentity { boot_id: "another".into(), ..me.clone() }.is_running());
        assert!(!ProcessIdentity { pid: u32::MAX, ..me }.is_running());
    }

    #[test]
    fn a_process_that_waits_for_its_parent_does_not_run() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        assert!(identity.is_running());
        child.kill().unwrap();
        // Its end of the pipe closes as it exits, a moment before it is a zombie.
        let mut rest = Vec::new();
        io::Read::read_to_end(&mut child.stdout.take().unwrap(), &mut rest).unwrap();
        while stat(child.id()).unwrap().0 != b'Z' {
            std::thread::yield_now();
        }
        assert!(!identity.is_running());
        child.wait().unwrap();
    }

    #[test]
    fn a_lock_is_seen_and_ends_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!is_held(&path).unwrap());
        let lock = RunLock::acquire(&path, Duration::ZERO).unwrap();
        assert!(is_held(&path).unwrap());
        assert!(matches!(RunLock::acquire(&path, Duration::ZERO), Err(LockError::Held { .. })));
        drop(lock);
        assert!(!is_held(&path).unwrap());
        assert!(matches!(
            RunLock::acquire(&dir.path().join("no/lock"), Duration::ZERO),
            Err(LockError::Io { .. })
        ));
    }

    #[test]
    fn readers_do_not_keep_a_run_from_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        drop(RunLock::acquire(&path, Duration::ZERO).unwrap());
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        is_held(&path).unwrap();
                    }
                });
            }
            for _ in 0..50 {
                RunLock::acquire(&path, Duration::from_secs(10)).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
