//! Commands in a sandbox: what to run, what comes back, and the handle of one that runs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cubby_protocol::message::{Credit, Exited, Open, Request, Rlimit, Signal, Started, TtySize};
use cubby_protocol::{CHUNK, INITIAL_WINDOW, Kind, decode};

use crate::connection::{ConnectionError, Incoming, Session};
use crate::error::{Error, R};
use crate::input::{ExecInput, Room};
use crate::link::Link;

/// How a command is run. What is not set is as the sandbox was configured.
#[derive(Debug, Default)]
pub struct ExecOptions {
    pub(crate) open: Open,
    pub(crate) stdin: Option<Vec<u8>>,
}

impl ExecOptions {
    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<String>>) -> &mut Self {
        self.open.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    pub fn env(&mut self, name: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.open.env.push((name.into(), value.into()));
        self
    }

    /// The working directory.
    pub fn cwd(&mut self, path: impl Into<String>) -> &mut Self {
        self.open.cwd = Some(path.into());
        self
    }

    /// `name`, `uid`, `name:group` or `uid:gid`.
    pub fn user(&mut self, user: impl Into<String>) -> &mut Self {
        self.open.user = Some(user.into());
        self
    }

    /// Ends the command's process group (TERM, and KILL two seconds later) when it runs longer than this;
    /// the guest keeps the time. The call then fails with [`Error::Timeout`].
    pub fn timeout(&mut self, timeout: Duration) -> &mut Self {
        self.open.timeout_ms = Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1));
        self
    }

    /// What the command reads from its standard input, which then ends. Without it, `exec` gives the
    /// command `/dev/null`.
    pub fn stdin(&mut self, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// A resource limit by its Linux number (`RLIMIT_NOFILE` is 7); [`u64::MAX`] is unlimited. Without one a command may
    /// have 1,024 open files, and raise that to 1,048,576 by itself.
    pub fn rlimit(&mut self, resource: u8, soft: u64, hard: u64) -> &mut Self {
        self.open.rlimits.push(Rlimit { resource, soft, hard });
        self
    }

    /// A terminal of this size for all three streams; its output arrives as standard output.
    pub fn tty(&mut self, rows: u16, cols: u16) -> &mut Self {
        self.open.tty = Some(TtySize { rows, cols });
        self
    }
}

/// How a command ended: by `exit`, or by a signal. Never both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// What it passed to `exit`, if it did.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
}

impl ExitStatus {
    /// Whether the command exited with zero.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// A finished command and all of its output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl ExecOutput {
    /// How it ended.
    pub fn status(&self) -> ExitStatus {
        self.status
    }

    /// Whether it exited with zero.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Standard output as text; [`Error::NotUtf8`] if it is none.
    pub fn stdout(&self) -> R<String> {
        text("standard output", &self.stdout)
    }

    /// Standard output.
    pub fn stdout_bytes(&self) -> &[u8] {
        &self.stdout
    }

    /// Standard error as text; [`Error::NotUtf8`] if it is none.
    pub fn stderr(&self) -> R<String> {
        text("standard error", &self.stderr)
    }

    /// Standard error.
    pub fn stderr_bytes(&self) -> &[u8] {
        &self.stderr
    }
}

fn text(what: &'static str, bytes: &[u8]) -> R<String> {
    String::from_utf8(bytes.to_vec())
        .map_err(|error| Error::NotUtf8 { what, valid_up_to: error.utf8_error().valid_up_to() })
}

/// What a running command does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// It wrote to standard output, or to its terminal.
    Stdout(Bytes),
    /// It wrote to standard error.
    Stderr(Bytes),
    /// It ended, and all of its output was delivered.
    Exited(ExitStatus),
}

/// A running command. Output is taken with [`ExecHandle::next`]; a command whose output nobody takes stops
/// in its `write` once its window (512 KiB) is full. Dropping the handle kills the command, unless it was detached
/// ([`ExecHandle::detach`]).
pub struct ExecHandle {
    session: Session,
    /// The session's number in the sandbox.
    number: u32,
    program: Arc<str>,
    link: Arc<Link>,
    /// Bytes taken by the caller for which no credit was given back yet.
    owed: u32,
    /// How much standard input the guest takes now.
    room: Room,
    /// Frames that came while something else was awaited.
    early: VecDeque<Incoming>,
    ended: bool,
    /// It is a way into a session that was detached, and not its own.
    attached: bool,
}

impl ExecHandle {
    /// Starts a command.
    pub(crate) async fn start(link: &Arc<Link>, open: &Open) -> R<Self> {
        Ok(Self::of(link, link.open_session(open).await?, &open.program, false))
    }

    /// Joins a session that was detached.
    pub(crate) async fn attach(link: &Arc<Link>, session: u32) -> R<Self> {
        let way = link.attach(session).await?;
        let mut handle = Self::of(link, way, &format!("session {session}"), true);
        handle.number = session;
        let first = handle.receive().await?;
        if first.kind == Kind::Refused {
            handle.end();
            return Err(Error::refused(link.name(), "attach", decode(&first.payload)?));
        }
        handle.early.push_back(first);
        Ok(handle)
    }

    fn of(link: &Arc<Link>, session: Session, program: &str, attached: bool) -> Self {
        Self {
            number: session.out.id.0,
            session,
            program: program.into(),
            link: link.clone(),
            owed: 0,
            room: Room::new(INITIAL_WINDOW),
            early: VecDeque::new(),
            ended: false,
            attached,
        }
    }

    /// The session's number, by which [`Sandbox::attach`](crate::Sandbox::attach) finds it once it is detached, in whatever
    /// program. No other session of this run of the sandbox has it.
    pub fn id(&self) -> u32 {
        self.number
    }

    /// Lets the command go on without this program, whatever becomes of that. Its output is then nobody's, and it runs as
    /// if it were read, until somebody attaches to it ([`Sandbox::attach`](crate::Sandbox::attach)); its last 256 KiB are
    /// kept. A sandbox that drains waits for it, and one with an idle time-out is not idle.
    ///
    /// A command that has just ended is kept as one that was detached before; of an end that lies longer back,
    /// [`Error::NoSuchSession`] says that nothing is left. At most 256 detached commands can run in a sandbox.
    pub async fn detach(mut self) -> R<()> {
        if !self.attached {
            let request = Request::DetachSession { session: self.number };
            let reply = self.session.out.connection().call(request).await;
            self.link.answer(reply, "detach").await?;
            // The number is nothing of this connection's any more.
            self.end();
        }
        Ok(())
    }

    /// What the command does next; `None` once it has ended. A command that could not run is an error, as is
    /// one that was killed for memory or time. Nothing is lost when the future is dropped before it is ready.
    pub async fn next(&mut self) -> Option<R<ExecEvent>> {
        loop {
            if self.ended {
                return None;
            }
            let received = match self.early.pop_front() {
                Some(incoming) => Ok(incoming),
                None => self.receive().await,
            };
            let event = match received {
                Ok(incoming) => self.on_frame(incoming),
                Err(error) => Err(error),
            };
            match event {
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(event)),
                Err(error) => {
                    self.end();
                    return Some(Err(error));
                }
            }
        }
    }

    fn on_frame(&mut self, incoming: Incoming) -> R<Option<ExecEvent>> {
        let Incoming { kind, payload } = incoming;
        let event = match kind {
            Kind::Started => ExecEvent::Started { pid: decode::<Started>(&payload)?.pid },
            Kind::Stdout => {
                self.give_back(payload.len());
                ExecEvent::Stdout(payload)
            }
            Kind::Stderr => {
                self.give_back(payload.len());
                ExecEvent::Stderr(payload)
            }
            Kind::Credit => {
                self.room.add(decode::<Credit>(&payload)?.bytes);
                return Ok(None);
            }
            Kind::Exited => {
                self.end();
                let status = match decode::<Exited>(&payload)? {
                    Exited::Code(code) => ExitStatus { code: Some(code), signal: None },
                    Exited::Signal(signal) => ExitStatus { code: None, signal: Some(signal) },
                    Exited::OutOfMemory => return Err(Error::killed_for_memory(&self.program)),
                    Exited::TimedOut => return Err(Error::Timeout { what: self.program.to_string() }),
                };
                ExecEvent::Exited(status)
            }
            Kind::Failed => return Err(Error::exec_failed(&self.program, decode(&payload)?)),
            Kind::Refused => return Err(Error::refused(self.link.name(), "exec", decode(&payload)?)),
            kind => return Err(Error::unexpected(kind)),
        };
        Ok(Some(event))
    }

    /// Lets the guest send more once a good part of the window was taken.
    fn give_back(&mut self, bytes: usize) {
        self.owed = self.owed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.owed >= INITIAL_WINDOW / 4 {
            let credit = Credit { bytes: std::mem::take(&mut self.owed) };
            self.session.out.push(Kind::Credit, &credit);
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.room.close();
    }

    /// The way in: whoever has it can write to the command and signal it while the handle's owner waits for output.
    /// It is of use only as long as somebody calls [`Self::next`], which is what hears how much input the command
    /// takes.
    ///
    /// ```
    /// # #[tokio::main] async fn main() -> Result<(), cubbyhole::Error> {
    /// # let image = std::env::var("CUBBY_TEST_IMAGE").expect("the runner sets it");
    /// # let sandbox = cubbyhole::Sandbox::builder("input").image(image).ephemeral(true).create().await?;
    /// let mut sort = sandbox.exec_stream("sort", [""; 0]).await?;
    /// let input = sort.input();
    /// let feed = tokio::spawn(async move {
    ///     input.write("b\na\n").await?;
    ///     input.close().await
    /// });
    /// let mut sorted = Vec::new();
    /// while let Some(event) = sort.next().await {
    ///     if let cubbyhole::ExecEvent::Stdout(bytes) = event? {
    ///         sorted.extend(bytes);
    ///     }
    /// }
    /// feed.await.expect("it does not panic")?;
    /// assert_eq!(sorted, b"a\nb\n");
    /// # sandbox.stop().await
    /// # }
    /// ```
    pub fn input(&self) -> ExecInput {
        let (out, room) = (self.session.out.clone(), self.room.clone());
        ExecInput { out, room, program: self.program.clone(), link: self.link.clone() }
    }

    /// Writes to the command's standard input; waits while the command does not read. Fails with
    /// [`Error::ExecEnded`] once the command has ended, and with [`Error::OutputFull`], which says how much was
    /// written, when the command can read no more before its output is taken: call [`Self::next`] and go on.
    pub async fn write_stdin(&mut self, bytes: impl AsRef<[u8]>) -> R<()> {
        let bytes = bytes.as_ref();
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = self.write_some(rest).await?;
            if rest.is_empty() || self.room.now() > 0 {
                continue;
            }
            let unread: usize = self.early.iter().map(|incoming| incoming.payload.len()).sum();
            if unread >= INITIAL_WINDOW as usize / 2 {
                return Err(Error::OutputFull { written: bytes.len() - rest.len() });
            }
            let incoming = self.receive().await?;
            match incoming.kind {
                Kind::Credit => drop(self.on_frame(incoming)?),
                _ => self.early.push_back(incoming),
            }
        }
        Ok(())
    }

    /// Writes as much as the window allows and returns what is left.
    async fn write_some<'b>(&mut self, bytes: &'b [u8]) -> R<&'b [u8]> {
        if self.ended || self.early.iter().any(|incoming| incoming.kind.ends_session()) {
            return Err(Error::ExecEnded { program: self.program.to_string() });
        }
        let (now, later) = bytes.split_at(self.room.take(bytes.len().min(CHUNK)));
        if !now.is_empty() {
            self.send_raw(Kind::Stdin, now).await?;
        }
        Ok(later)
    }

    /// Ends the command's standard input.
    pub async fn close_stdin(&mut self) -> R<()> {
        self.send_raw(Kind::StdinClose, &[]).await
    }

    /// Sends a signal to the command's process group.
    pub async fn signal(&mut self, number: i32) -> R<()> {
        self.send(Kind::Signal, &Signal { number }).await
    }

    /// Tells the command's terminal its new size.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> R<()> {
        self.send(Kind::Resize, &TtySize { rows, cols }).await
    }

    /// Waits for the command's end and discards what it still writes.
    pub async fn wait(&mut self) -> R<ExitStatus> {
        while let Some(event) = self.next().await {
            if let ExecEvent::Exited(status) = event? {
                return Ok(status);
            }
        }
        Err(Error::ExecEnded { program: self.program.to_string() })
    }

    /// Feeds `stdin`, collects all output and waits for the end.
    pub(crate) async fn collect(mut self, stdin: Option<Vec<u8>>) -> R<ExecOutput> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut input = stdin.as_deref();
        loop {
            // Input goes in as far as the window allows, and output comes out meanwhile.
            if let Some(rest) = input {
                let left = self.write_some(rest).await?;
                input = (!left.is_empty()).then_some(left);
                if input.is_none() {
                    self.close_stdin().await?;
                }
                if self.room.now() > 0 {
                    continue;
                }
            }
            let incoming = self.receive().await?;
            match self.on_frame(incoming)? {
                None | Some(ExecEvent::Started { .. }) => {}
                Some(ExecEvent::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                Some(ExecEvent::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(ExecEvent::Exited(status)) => return Ok(ExecOutput { status, stdout, stderr }),
            }
        }
    }

    async fn receive(&mut self) -> R<Incoming> {
        let received = self.session.next().await;
        self.or_lost(received).await
    }

    async fn send_raw(&self, kind: Kind, payload: &[u8]) -> R<()> {
        let sent = self.session.out.send_raw(kind, payload).await;
        self.or_lost(sent).await
    }

    async fn send(&self, kind: Kind, message: &impl serde::Serialize) -> R<()> {
        let sent = self.session.out.send(kind, message).await;
        self.or_lost(sent).await
    }

    async fn or_lost<T>(&self, result: Result<T, ConnectionError>) -> R<T> {
        match result {
            Ok(value) => Ok(value),
            Err(error) => Err(self.link.lost(error, &format!("exec {:?}", self.program)).await),
        }
    }
}

impl Drop for ExecHandle {
    fn drop(&mut self) {
        // Nobody will hear of more room.
        self.room.close();
        const SIGKILL: i32 = 9;
        match (self.ended, self.attached) {
            (true, _) => {}
            (false, true) => self.session.out.abandon(),
            (false, false) => self.session.out.push(Kind::Signal, &Signal { number: SIGKILL }),
        }
    }
}
