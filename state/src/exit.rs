//! How a run ended: a value that says why, when, and what the guest last wrote.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::machine::{Event, Status};

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum ExitReason {
    /// Somebody asked it to stop, or the application it was attached to ended.
    Requested,
    /// Somebody asked it to drain, and the last session finished.
    Drained,
    /// Nobody used it for its idle timeout.
    IdleTimeout,
    /// It lived for its maximum duration.
    MaxDuration,
    /// Somebody killed it through this library.
    Killed,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset itself: a reboot or a triple fault.
    GuestReset,
    /// The agent ended or stopped answering for good while the guest's kernel lived on.
    AgentDied,
    /// The sandbox process was killed from outside.
    ProcessKilled {
        /// The signal that ended it. 0 where none is known: the process gave up by itself, or its keeper, who
        /// alone learns the signal, was killed as well.
        signal: i32,
    },
    /// The host was out of memory and killed the sandbox process, as far as the kernel's counters tell
    /// ([`Death::OutOfMemory`]).
    OutOfMemory,
    /// The boot did not reach a ready agent.
    BootFailed {
        /// The stage that failed.
        stage: String,
    },
    /// This host cannot run virtual machines.
    HostUnsupported,
}

impl ExitReason {
    /// The event with which this reason meets the lifecycle's table.
    #[must_use]
    pub fn event(&self) -> Event {
        match self {
            ExitReason::Requested
            | ExitReason::Drained
            | ExitReason::IdleTimeout
            | ExitReason::MaxDuration => Event::PoweredOff,
            ExitReason::Killed => Event::Kill,
            ExitReason::GuestPanic
            | ExitReason::GuestReset
            | ExitReason::AgentDied
            | ExitReason::ProcessKilled { .. }
            | ExitReason::OutOfMemory => Event::Crash,
            ExitReason::BootFailed { .. } | ExitReason::HostUnsupported => Event::BootFailed,
        }
    }

    /// The status that a run with this reason ends in.
    #[must_use]
    pub fn status(&self) -> Status {
        match self.event() {
            Event::PoweredOff | Event::Kill => Status::Stopped,
            _ => Status::Crashed,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ExitReason::Requested => "it was asked to stop",
            ExitReason::Drained => "it was drained",
            ExitReason::IdleTimeout => "nobody used it for its idle timeout",
            ExitReason::MaxDuration => "it lived for its maximum duration",
            ExitReason::Killed => "it was killed on request",
            ExitReason::GuestPanic => "the guest's kernel panicked",
            ExitReason::GuestReset => "the guest reset itself",
            ExitReason::AgentDied => "the guest's agent died",
            ExitReason::ProcessKilled { signal: 0 } => "its process was killed",
            ExitReason::ProcessKilled { signal } => {
                return write!(f, "its process was killed by signal {signal}");
            }
            ExitReason::OutOfMemory => "the host ran out of memory and killed its process",
            ExitReason::BootFailed { stage } => return write!(f, "its boot failed at {stage}"),
            ExitReason::HostUnsupported => "this host cannot run virtual machines",
        })
    }
}

/// How a sandbox process ended that did not say so itself, as its parent saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// By this signal.
    Signal(i32),
    /// By SIGKILL, while the kernel counted an out-of-memory kill where the process lived.
    OutOfMemory,
    /// By itself.
    Exit,
}

impl Death {
    /// The reason to record for a sandbox that had `status`.
    #[must_use]
    pub fn reason(self, status: Status) -> ExitReason {
        match self {
            Death::Signal(signal) => ExitReason::ProcessKilled { signal },
            Death::OutOfMemory => ExitReason::OutOfMemory,
            Death::Exit if status == Status::Creating => {
                ExitReason::BootFailed { stage: "process".to_owned() }
            }
            Death::Exit => ExitReason::ProcessKilled { signal: 0 },
        }
    }
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExitReport {
    /// Why it ended.
    pub reason: ExitReason,
    /// When whoever wrote the report saw the end, by the host's wall clock.
    pub at: SystemTime,
    /// The last that the guest wrote to its console, 64 KiB at most; kept for ends that nobody asked for.
    #[serde(default)]
    pub console_tail: Option<String>,
}

impl ExitReport {
    /// Most bytes of console that a report keeps.
    pub const MAX_CONSOLE_TAIL: usize = 64 << 10;

    /// A report of an end that is seen now, without any console.
    #[must_use]
    pub fn now(reason: ExitReason) -> Self {
        ExitReport { reason, at: SystemTime::now(), console_tail: None }
    }

    /// The same report with the last [`Self::MAX_CONSOLE_TAIL`] bytes of `console`, cut at a character.
    #[must_use]
    pub fn with_console(mut self, console: &str) -> Self {
        let mut from = console.len().saturating_sub(Self::MAX_CONSOLE_TAIL);
        while !console.is_char_boundary(from) {
            from = from.saturating_add(1);
        }
        self.console_tail = console.get(from..).filter(|tail| !tail.is_empty()).map(str::to_owned);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Next;

    fn reasons() -> Vec<ExitReason> {
        vec![
            ExitReason::Requested,
            ExitReason::Drained,
            ExitReason::IdleTimeout,
            ExitReason::MaxDuration,
            ExitReason::Killed,
            ExitReason::GuestPanic,
            ExitReason::GuestReset,
            ExitReason::AgentDied,
            ExitReason::ProcessKilled { signal: 9 },
            ExitReason::OutOfMemory,
            ExitReason::BootFailed { stage: "mount".into() },
            ExitReason::HostUnsupported,
        ]
    }

    #[test]
    fn every_reason_ends_a_draining_run_in_its_own_status() {
        for reason in reasons() {
            assert_eq!(
                Status::Draining.after(reason.event()),
                Ok(Next::Status(reason.status())),
                "{reason:?}"
            );
            assert!(!reason.status().is_live());
        }
    }

    #[test]
    fn reports_survive_json() {
        for reason in reasons() {
            let report = ExitReport::now(reason).with_console("panic: ü\n");
            let json = serde_json::to_string(&report).unwrap();
            assert_eq!(serde_json::from_str::<ExitReport>(&json).unwrap(), report);
        }
        let json = serde_json::to_string(&ExitReason::ProcessKilled { signal: 9 }).unwrap();
        assert_eq!(json, r#"{"kind":"process_killed","signal":9}"#);
    }

    #[test]
    fn a_console_is_cut_at_a_character() {
        let long = format!("x{}", "ü".repeat(ExitReport::MAX_CONSOLE_TAIL));
        let tail = ExitReport::now(ExitReason::GuestPanic).with_console(&long).console_tail.unwrap();
        assert_eq!(tail.len(), ExitReport::MAX_CONSOLE_TAIL);
        let odd = format!("{}y", "ü".repeat(ExitReport::MAX_CONSOLE_TAIL));
        let tail = ExitReport::now(ExitReason::GuestPanic).with_console(&odd).console_tail.unwrap();
        assert_eq!(tail.len(), ExitReport::MAX_CONSOLE_TAIL - 1);
        assert_eq!(ExitReport::now(ExitReason::GuestPanic).with_console("").console_tail, None);
    }
}
