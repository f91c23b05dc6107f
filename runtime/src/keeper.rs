//! The keeper: the parent of the sandbox process. It waits, and records the end of one that could not do so
//! itself: killed by a signal, by the kernel for want of memory, by its own confinement, or by a mistake of
//! ours. It opens nothing and knows nothing of the guest until then ([ADR 12](../../docs/adr/0012-keeper.md)).
//!
//! It shares the run's lock with its child, so that nobody takes the sandbox for dead, or starts it again, before
//! its end is written; and the launch socket, which closes for the application only after that.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cubby_state::{Death, LaunchSpec, ReaperLease, RunLock, Store, StoreError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal, waitid,
};
use vmm_sys_util::signal::block_signal;

use crate::last_words::LastWords;
use crate::signals::Signals;
use crate::will::Will;

/// What else may come to the whole process group. Only SIGKILL ends a keeper before its child.
const NOT_OURS: [Signal; 3] = [Signal::QUIT, Signal::PIPE, Signal::ALARM];

/// Waits for the sandbox process `child` and sees to it that its end is on record. The status it returns is what
/// the application that started the two may learn: whether all went well.
pub(crate) fn keep(
    child: Pid,
    spec: &LaunchSpec,
    lock: RunLock,
    console: &LastWords,
    will: &Will,
    signals: &Signals,
) -> ExitCode {
    for signal in NOT_OURS {
        // A keeper that can be ended is still one.
        let _ = block_signal(signal.as_raw());
    }
    let _ = rustix::thread::set_name(c"cubby-keeper");
    let kills = OomKills::now();
    attend(child, spec, signals);
    let ended = wait(child, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    let death = match ended.as_ref() {
        // It says so only once its end is recorded.
        Some(status) if status.exit_status() == Some(0) => None,
        Some(status) => Some(match status.terminating_signal() {
            // The zombie is still there, and still in its control group.
            Some(SIGKILL) if kills.have_risen(child) => Death::OutOfMemory,
            Some(signal) => Death::Signal(signal),
            None => Death::Exit,
        }),
        None => Some(Death::Exit),
    };
    let recorded = match death {
        None if !spec.config.ephemeral => Ok(()),
        death => patiently(|| in_store(spec, |store| clear_up(store, spec, death, console, will))),
    };
    // Who finds the process gone finds its end recorded; and from here on the sandbox may begin again.
    wait(child, WaitIdOptions::EXITED);
    drop(lock);
    match recorded {
        Ok(()) if death.is_none() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => {
            // The next reader finds the sandbox without a process.
            crate::say(format_args!("its end is not on record: {}", crate::chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// How often a keeper looks after what others have left, at most: programs that use the library do it more often.
const REAPER_PERIOD: Duration = Duration::from_secs(60);

/// Until the end of `child`, passes signals on to it, and now and then does a round of reaping. A keeper that
/// wakes finds out by one look at a file that there is nothing to do, unless no other process has been there
/// within the period.
fn attend(child: Pid, spec: &LaunchSpec, signals: &Signals) {
    // Without the descriptor, only the end is waited for.
    let Ok(ended) = pidfd_open(child, PidfdFlags::empty()) else { return };
    let period = Timespec { tv_sec: REAPER_PERIOD.as_secs().cast_signed(), tv_nsec: 0 };
    loop {
        let mut sources =
            [PollFd::new(&ended, PollFlags::IN), PollFd::new(signals.descriptor(), PollFlags::IN)];
        match poll(&mut sources, Some(&period)) {
            Ok(0) => {
                // The next round finds what this one could not do.
                if let Ok(Some(lease)) = ReaperLease::take(&spec.home, REAPER_PERIOD) {
                    let _ = in_store(spec, |store| store.reap(&lease));
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) if sources[0].revents().is_empty() => {
                while let Some(signal) = signals.next() {
                    // One that has just ended needs it no more.
                    let _ = pidfd_send_signal(&ended, signal);
                }
            }
            Ok(_) | Err(_) => return,
        }
    }
}

const SIGKILL: i32 = Signal::KILL.as_raw();

fn wait(child: Pid, options: WaitIdOptions) -> Option<WaitIdStatus> {
    loop {
        match waitid(WaitId::Pid(child), options) {
            Ok(status) => return status,
            Err(rustix::io::Errno::INTR) => {}
            // No such child: somebody made the kernel reap for us.
            Err(_) => return None,
        }
    }
}

/// How long a keeper tries to record an end, and how often. Until then the sandbox has its last status, and cannot be
/// started or removed: nobody could be told in which state it was left.
const RECORD: (Duration, Duration) = (Duration::from_secs(3600), Duration::from_millis(500));

/// Calls `record` until the store can be written again: a disk that was full has room.
fn patiently(mut record: impl FnMut() -> Result<(), StoreError>) -> Result<(), StoreError> {
    let begin = Instant::now();
    let mut told = false;
    loop {
        match record() {
            Err(error) if error.may_pass() && begin.elapsed() < RECORD.0 => {
                if !std::mem::replace(&mut told, true) {
                    crate::say(format_args!("its end waits to be recorded: {}", crate::chain(&error)));
                }
                std::thread::sleep(RECORD.1);
            }
            outcome => return outcome,
        }
    }
}

/// Does something in the store, if it is still there: opening it would bring it back.
fn in_store(spec: &LaunchSpec, f: impl FnOnce(&Store) -> Result<(), StoreError>) -> Result<(), StoreError> {
    if spec.home.database().exists() { f(&Store::open(&spec.home)?) } else { Ok(()) }
}

/// Records the end, if the sandbox process has not, and removes what is ephemeral.
fn clear_up(
    store: &Store,
    spec: &LaunchSpec,
    death: Option<Death>,
    console: &LastWords,
    will: &Will,
) -> Result<(), StoreError> {
    if let Some(death) = death {
        let ended = match will.read() {
            Some(report) => store.finish(spec.run, &report),
            None => store.bury(spec.run, death, &console.read().unwrap_or_default()),
        };
        match ended {
            // It had recorded its end and then failed at something else, or was given up.
            Ok(_) | Err(StoreError::RunOver { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    // The sandbox process may not have had the right to.
    store.discard(spec.run)
}

/// The kernel's counts of out-of-memory kills, to compare with later ones: in the child's control group
/// (`memory.events.local`, cgroup v2) and on the whole host (`oom_kill` in `/proc/vmstat`).
///
/// Ours was a victim only if every count there is has risen. Another process may have been one as well, while
/// ours was killed by hand within the same life: the verdict is likely, not certain.
struct OomKills {
    group: Option<(PathBuf, u64)>,
    host: Option<u64>,
}

impl OomKills {
    fn now() -> Self {
        let group = group_file(Path::new("/proc/self/cgroup"));
        Self { group: group.and_then(|file| Some((file.clone(), count(&file)?))), host: host_count() }
    }

    fn have_risen(&self, child: Pid) -> bool {
        let group = group_file(&PathBuf::from(format!("/proc/{}/cgroup", child.as_raw_nonzero())));
        let group = group.and_then(|file| {
            let before = match &self.group {
                Some((same, before)) if *same == file => *before,
                // It was moved there in the middle of its life, and nobody knows the group's past.
                _ => 0,
            };
            Some(count(&file)? > before)
        });
        let host = host_count().map(|count| count > self.host.unwrap_or(0));
        (group.is_some() || host.is_some()) && group.unwrap_or(true) && host.unwrap_or(true)
    }
}

fn host_count() -> Option<u64> {
    count(Path::new("/proc/vmstat"))
}

/// The counters of the group that `/proc/PID/cgroup` names (cgroups(7)): the line of version 2 begins with `0::`.
fn group_file(proc_file: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(proc_file).ok()?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(group).join("memory.events.local"))
}

/// The count of out-of-memory kills in a file of counters.
fn count(file: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok()
}
