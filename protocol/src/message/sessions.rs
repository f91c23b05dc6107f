//! Sessions that outlive the connection that opened them: what they are called, how they are let go and found again.

use serde::{Deserialize, Serialize};

use super::{ExecFailed, Exited};

/// Payload of [`crate::Kind::Welcome`]: the numbers that this connection gives to the sessions it opens are `first`,
/// `first + step` and so on, each of them once. No other connection to the sandbox has them, so that a session's number
/// names it for everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The first number.
    pub first: u32,
    /// From each number to the next, at least 1.
    pub step: u32,
}

impl Welcome {
    /// Whether a connection with these numbers may open a session of this one.
    pub fn allows(&self, session: u32) -> bool {
        session != 0
            && session.checked_sub(self.first).and_then(|ahead| ahead.checked_rem(self.step)) == Some(0)
    }
}

/// Payload of [`crate::Kind::Attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The detached session to join.
    pub session: u32,
}

/// One session that runs a command, or a detached one that has ended and is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its number.
    pub session: u32,
    /// The program and its arguments, as far as they fit into [`Self::MAX_COMMAND`].
    pub command: Vec<String>,
    /// When it was asked for: nanoseconds since the Unix epoch.
    pub started_ns: u64,
    /// Its process id in the guest, once it has one.
    pub pid: Option<u32>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether it was detached: the others end with the connection that opened them.
    pub detached: bool,
    /// How many connections have its output.
    pub attached: u32,
    /// How it ended, if it has.
    pub end: Option<SessionEnd>,
}

impl SessionInfo {
    /// How many bytes of a command are told.
    pub const MAX_COMMAND: usize = 512;
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionEnd {
    /// Its command ended.
    Exited(Exited),
    /// Its command could not run.
    Failed(ExecFailed),
}
