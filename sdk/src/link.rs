//! A sandbox's link to its process: its record, one connection that is made on first use, and what the loss of
//! that connection means.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cubby_protocol::message::{Open, Reply, Request};
use cubby_protocol::{FrameError, SessionId};
use cubby_state::{Event, ExitReport, Record, RunId, SandboxName, Status};
use tokio::sync::Mutex;

use crate::connection::{Connection, ConnectionError, Session};
use crate::context::Context;
use crate::error::{Error, R};

/// How soon after its connections are gone a sandbox's end is in the store.
const RECORDED_WITHIN: Duration = Duration::from_secs(1);

/// What all clones of a [`Sandbox`](crate::Sandbox) and its commands share.
pub(crate) struct Link {
    pub(crate) context: Context,
    pub(crate) id: SandboxName,
    /// The run that it had when this link was made.
    pub(crate) run: RunId,
    connection: Mutex<Option<Arc<Connection>>>,
}

impl Link {
    pub(crate) fn new(context: Context, record: &Record, connection: Option<Arc<Connection>>) -> Self {
        Self { context, id: record.name.clone(), run: record.run.id, connection: Mutex::new(connection) }
    }

    pub(crate) fn name(&self) -> &str {
        self.id.as_str()
    }

    pub(crate) fn record(&self) -> R<Record> {
        self.context.store.get(&self.id).map_err(|error| Error::store(self.name(), error))
    }

    /// Whether there is a process behind it. There is none behind what is gone.
    pub(crate) fn is_live(&self) -> R<bool> {
        match self.record() {
            Ok(record) => Ok(record.status.is_live()),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// How `run` ended whose sandbox cannot be found any more, if it was ephemeral.
    pub(crate) fn exit_of(&self, run: RunId, gone: Error) -> R<ExitReport> {
        match gone {
            Error::NotFound { .. } => self.context.store.exit(run)?.ok_or(gone),
            error => Err(error),
        }
    }

    /// The connection, made if there is none or if it has ended.
    pub(crate) async fn connection(&self, operation: &str) -> R<Arc<Connection>> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = &*slot
            && connection.ended().is_none()
        {
            return Ok(connection.clone());
        }
        let status = self.record()?.status;
        if !status.is_live() || status == Status::Creating {
            return Err(Error::invalid_state(self.name(), status, operation));
        }
        let socket = self.context.store.home().socket(&self.id);
        match Connection::open(&socket).await {
            Ok(connection) => Ok(slot.insert(Arc::new(connection)).clone()),
            Err(error) => Err(match self.lost(error, operation).await {
                // It had not begun.
                Error::Ended { report, .. } => {
                    Error::invalid_state(self.name(), report.reason.status(), operation)
                }
                error => error,
            }),
        }
    }

    /// Opens a session in the guest.
    pub(crate) async fn open_session(&self, open: &Open) -> R<Session> {
        let connection = self.connection("exec").await?;
        match connection.open_session(open).await {
            Ok(session) => Ok(session),
            Err(error) => Err(self.lost(error, "exec").await),
        }
    }

    /// Opens a session in the guest with frames of any kind, for `operation`.
    pub(crate) async fn begin_session(
        &self,
        operation: &str,
        frames: impl FnOnce(SessionId, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> R<Session> {
        let connection = self.connection(operation).await?;
        match connection.begin_session(frames).await {
            Ok(session) => Ok(session),
            Err(error) => Err(self.lost(error, operation).await),
        }
    }

    /// What the end of the connection during `operation` means: the sandbox's own end, if that was it.
    pub(crate) async fn lost(&self, error: ConnectionError, operation: &str) -> Error {
        if matches!(error, ConnectionError::Closed | ConnectionError::Io(_))
            && let Ok(Some(report)) = self.ended_soon().await
        {
            return Error::Ended { name: self.name().into(), operation: operation.into(), report };
        }
        Error::connection(self.name(), error)
    }

    /// How the sandbox ended, if it has or is just about to.
    async fn ended_soon(&self) -> R<Option<ExitReport>> {
        let begin = Instant::now();
        let mut run = self.run;
        loop {
            let record = match self.record() {
                Ok(record) => record,
                Err(gone) => return self.exit_of(run, gone).map(Some),
            };
            run = record.run.id;
            if !record.status.is_live() || begin.elapsed() >= RECORDED_WITHIN {
                return Ok(record.run.exit);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Another way into a detached session.
    pub(crate) async fn attach(&self, session: u32) -> R<Session> {
        let connection = self.connection("attach").await?;
        match connection.attach(session).await {
            Ok(session) => Ok(session),
            Err(error) => Err(self.lost(error, "attach").await),
        }
    }

    /// Asks the sandbox process for something.
    pub(crate) async fn call(&self, request: Request, event: Event) -> R<()> {
        self.ask(request, event.as_str()).await.map(drop)
    }

    /// Asks the sandbox process for an answer.
    pub(crate) async fn ask(&self, request: Request, operation: &str) -> R<Reply> {
        let connection = self.connection(operation).await?;
        self.answer(connection.call(request).await, operation).await
    }

    /// What an answer of the sandbox process means.
    pub(crate) async fn answer(&self, reply: Result<Reply, ConnectionError>, operation: &str) -> R<Reply> {
        match reply {
            Ok(Reply::Refused(refused)) => Err(Error::refused(self.name(), operation, refused)),
            Ok(Reply::Failed(why)) => Err(Error::Process { name: self.name().into(), why }),
            Ok(reply) => Ok(reply),
            Err(error) => Err(self.lost(error, operation).await),
        }
    }

    /// Asks the sandbox process for its end, which is the answer, whoever brings it about.
    pub(crate) async fn end(&self, request: Request, event: Event) -> R<()> {
        match self.call(request, event).await {
            Ok(()) | Err(Error::Ended { .. }) => {
                // It may not know of its own end yet; what comes next asks the store.
                *self.connection.lock().await = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}
