//! Sessions that outlive the program that started them: which there are, and a way back to them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cubby_protocol::message::{self, Exited, Reply, Request};

use crate::error::{Error, ExecErrorKind, R};
use crate::exec::{ExecHandle, ExitStatus};
use crate::sandbox::Sandbox;

/// A command in a sandbox, as it was when the list was made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionInfo {
    /// Its number, for [`Sandbox::attach`]; no other session of this run of the sandbox has it.
    pub id: u32,
    /// The program and its arguments, at most 512 bytes of them.
    pub command: Vec<String>,
    /// When it was asked for, by the host's clock.
    pub started_at: SystemTime,
    /// Its process id in the guest, once it runs.
    pub pid: Option<u32>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether it was detached. All others end with the program that started them.
    pub detached: bool,
    /// How many have its output now, the program that started it included.
    pub attached: u32,
    /// How it ended; `None` while it runs.
    pub end: Option<SessionEnd>,
}

impl SessionInfo {
    /// The status that it exited with, if it ended in that way.
    pub fn status(&self) -> Option<ExitStatus> {
        match self.end {
            Some(SessionEnd::Exited(status)) => Some(status),
            _ => None,
        }
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionEnd {
    /// By `exit` or a signal.
    Exited(ExitStatus),
    /// The guest's kernel killed it for memory.
    OutOfMemory,
    /// It ran longer than it was given, and was ended.
    TimedOut,
    /// It could not run.
    NotRun(ExecErrorKind),
}

impl Sandbox {
    /// The commands that run, whoever started them, by their numbers, and the newest 64 detached ones that have ended
    /// in this run of the sandbox. Of more than 512 the newest are told.
    pub async fn sessions(&self) -> R<Vec<SessionInfo>> {
        match self.link.ask(Request::Sessions, "list the sessions of").await? {
            Reply::Sessions(sessions) => Ok(sessions.into_iter().map(SessionInfo::from).collect()),
            _ => Err(Error::unexpected(cubby_protocol::Kind::Reply)),
        }
    }

    /// Joins a session that [`ExecHandle::detach`] has let go, from whichever program: the handle gives the last 256 KiB of
    /// its output and what follows, takes input and signals, and tells how it ends. One that has ended already gives its
    /// last output and its status, as long as it is remembered (see [`Sandbox::sessions`]).
    ///
    /// Any number of handles can be attached, up to 64 in a sandbox. The command then goes at the pace of the slowest of
    /// them, and their input goes to it in the order in which it comes. Dropping the handle leaves the command running.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), cubbyhole::Error> {
    /// let handle = sandbox.exec_stream("make", ["-C", "/src"]).await?;
    /// let id = handle.id();
    /// handle.detach().await?;
    /// // Later, or in another program:
    /// let mut handle = sandbox.attach(id).await?;
    /// println!("{:?}", handle.wait().await?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::NoSuchSession`] if there is none of this number any more, [`Error::NotDetached`] if it is another
    /// connection's.
    pub async fn attach(&self, session: u32) -> R<ExecHandle> {
        ExecHandle::attach(&self.link, session).await
    }
}

impl From<message::SessionInfo> for SessionInfo {
    fn from(info: message::SessionInfo) -> Self {
        let exited = |code, signal| SessionEnd::Exited(ExitStatus { code, signal });
        let end = info.end.map(|end| match end {
            message::SessionEnd::Exited(Exited::Code(code)) => exited(Some(code), None),
            message::SessionEnd::Exited(Exited::Signal(signal)) => exited(None, Some(signal)),
            message::SessionEnd::Exited(Exited::OutOfMemory) => SessionEnd::OutOfMemory,
            message::SessionEnd::Exited(Exited::TimedOut) => SessionEnd::TimedOut,
            message::SessionEnd::Failed(failed) => SessionEnd::NotRun(failed.kind.into()),
        });
        Self {
            id: info.session,
            command: info.command,
            started_at: UNIX_EPOCH + Duration::from_nanos(info.started_ns),
            pid: info.pid,
            tty: info.tty,
            detached: info.detached,
            attached: info.attached,
            end,
        }
    }
}
