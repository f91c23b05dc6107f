//! One connection to a sandbox, shared by everything a program does with it: sessions and calls are
//! multiplexed, and whoever reads slowly holds up only itself.
//!
//! A task reads frames and hands each to its session. What a session holds unread is bounded by its window
//! ([`cubby_protocol::INITIAL_WINDOW`]): credit goes back only as its reader takes bytes out.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use cubby_protocol::message::{Attach, Fatal, Reply, Request, Welcome};
use cubby_protocol::{
    Decoder, Frame, FrameError, Hello, INITIAL_WINDOW, Kind, SessionId, decode, encode, encode_raw,
};
use serde::Serialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::outbox::{Broken, Outbox, watch};

/// A frame of one session, taken off the connection.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) kind: Kind,
    pub(crate) payload: Bytes,
}

/// Why a connection is no more, or never was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("the sandbox ended the connection")]
    Closed,
    #[error("connection to the sandbox process: {0}")]
    Io(String),
    #[error(transparent)]
    Protocol(#[from] FrameError),
    #[error("protocol version {theirs} does not fit ours, {ours}")]
    Version { ours: u16, theirs: u16 },
    #[error("all {max} places for clients are taken")]
    TooManyClients { max: u16 },
    #[error("the sandbox process refused the connection: {0}")]
    Refused(String),
}

impl From<std::io::Error> for ConnectionError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

impl From<Fatal> for ConnectionError {
    fn from(fatal: Fatal) -> Self {
        match fatal {
            Fatal::VersionMismatch { ours } => Self::Version { ours: Hello::OURS.version, theirs: ours },
            Fatal::TooManyClients { max } => Self::TooManyClients { max },
            Fatal::Protocol(why) => Self::Refused(why),
        }
    }
}

/// A connection to a sandbox process. Dropping it ends its sessions.
pub(crate) struct Connection {
    outbox: Outbox,
    routes: Arc<Routes>,
    /// The sessions' numbers, and the next of them.
    numbers: Welcome,
    next_session: AtomicU32,
    ended: watch::Receiver<Option<ConnectionError>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Who waits for which session's frames.
#[derive(Default)]
struct Routes(Mutex<HashMap<SessionId, Route>>);

enum Route {
    Session(mpsc::UnboundedSender<Incoming>, Arc<Unread>),
    Once(oneshot::Sender<Incoming>),
}

/// What a session's reader has not taken yet. The guest is not trusted to keep to its window.
#[derive(Default)]
struct Unread {
    frames: AtomicUsize,
    bytes: AtomicUsize,
}

impl Unread {
    /// Counts a frame that came. Whether the window allows it: every frame of data has a byte or more.
    fn add(&self, incoming: &Incoming) -> bool {
        const WINDOW: usize = INITIAL_WINDOW as usize;
        /// Frames that carry no data: Started, credits, the end.
        const OTHERS: usize = 4096;
        let frames = self.frames.fetch_add(1, Ordering::Relaxed) + 1;
        let bytes = self.bytes.fetch_add(incoming.payload.len(), Ordering::Relaxed) + incoming.payload.len();
        frames <= WINDOW + OTHERS && bytes <= WINDOW + OTHERS
    }

    fn take(&self, incoming: &Incoming) {
        self.frames.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(incoming.payload.len(), Ordering::Relaxed);
    }
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Route>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Connects to the sandbox process behind `socket`.
    pub(crate) async fn open(socket: &Path) -> Result<Self, ConnectionError> {
        let socket = Arc::new(tokio::net::UnixStream::connect(socket).await?.into_std()?);
        // Whoever turns us away says why and closes, perhaps before this is written: what was said counts. A new
        // socket has room for it.
        let written = (&*socket).write_all(&Hello::OURS.to_frame());
        let reader = Reader(watch(socket.clone(), Interest::READABLE)?);
        let mut decoder = Decoder::default();
        let numbers = greet(&reader, &mut decoder).await?;
        written?;
        let routes = Arc::new(Routes::default());
        let (report, ended) = watch::channel(None);
        let reader = tokio::spawn({
            let routes = routes.clone();
            async move {
                let error = read_frames(reader, decoder, &routes).await.err();
                // Every waiting session sees its channel close, then asks why.
                let _ = report.send(Some(error.unwrap_or(ConnectionError::Closed)));
                routes.lock().clear();
            }
        });
        let next_session = AtomicU32::new(numbers.first);
        Ok(Self { outbox: Outbox::new(socket), routes, numbers, next_session, ended, reader })
    }

    /// Why the connection ended, if it has.
    pub(crate) fn ended(&self) -> Option<ConnectionError> {
        self.ended.borrow().clone()
    }

    /// Waits until the connection has ended.
    pub(crate) async fn wait_ended(&self) -> ConnectionError {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or(ConnectionError::Closed),
            Err(_) => ConnectionError::Closed,
        }
    }

    /// Asks the sandbox process itself.
    pub(crate) async fn call(&self, request: Request) -> Result<Reply, ConnectionError> {
        let answer = self.once(|session, out| encode(Kind::Request, session, &request, out)).await?;
        Ok(decode(&answer.payload)?)
    }

    /// Asks the guest's agent for a sign of life.
    pub(crate) async fn ping(&self) -> Result<(), ConnectionError> {
        self.once(|session, out| encode_raw(Kind::Ping, session, &[], out)).await.map(drop)
    }

    /// Asks the guest's agent something that one frame answers.
    pub(crate) async fn ask(&self, kind: Kind, payload: &[u8]) -> Result<Incoming, ConnectionError> {
        self.once(|session, out| encode_raw(kind, session, payload, out)).await
    }

    async fn once(
        &self,
        frame: impl FnOnce(SessionId, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> Result<Incoming, ConnectionError> {
        let (sender, receiver) = oneshot::channel();
        let session = self.register(Route::Once(sender));
        let mut out = Vec::new();
        frame(session, &mut out)?;
        self.write(&out).await?;
        match receiver.await {
            Ok(incoming) => Ok(incoming),
            Err(_) => Err(self.wait_ended().await),
        }
    }

    /// Opens a session; its frames arrive at the receiver until the one that ends it.
    pub(crate) async fn open_session(
        self: &Arc<Self>,
        message: &impl Serialize,
    ) -> Result<Session, ConnectionError> {
        self.start_session(Kind::Open, message).await
    }

    /// Opens another way into a detached session of the sandbox.
    pub(crate) async fn attach(self: &Arc<Self>, session: u32) -> Result<Session, ConnectionError> {
        self.start_session(Kind::Attach, &Attach { session }).await
    }

    /// The same for a session of another kind.
    pub(crate) async fn start_session(
        self: &Arc<Self>,
        kind: Kind,
        message: &impl Serialize,
    ) -> Result<Session, ConnectionError> {
        self.begin_session(|id, out| encode(kind, id, message, out)).await
    }

    /// Opens a session with frames of any kind, all of them sent at once.
    pub(crate) async fn begin_session(
        self: &Arc<Self>,
        frames: impl FnOnce(SessionId, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> Result<Session, ConnectionError> {
        let (sender, incoming) = mpsc::unbounded_channel();
        let unread = Arc::<Unread>::default();
        let id = self.register(Route::Session(sender, unread.clone()));
        let out = SessionOut { connection: self.clone(), id };
        let session = Session { out, incoming, unread };
        let mut bytes = Vec::new();
        frames(id, &mut bytes)?;
        self.write(&bytes).await?;
        Ok(session)
    }

    fn register(&self, route: Route) -> SessionId {
        let mut routes = self.routes.lock();
        loop {
            let id = SessionId(self.next_session.load(Ordering::Relaxed));
            // Once they are used up they begin again; nobody changes the next one without the routes.
            let next = id.0.checked_add(self.numbers.step).unwrap_or(self.numbers.first);
            self.next_session.store(next, Ordering::Relaxed);
            if id != SessionId::CONNECTION && !routes.contains_key(&id) {
                routes.insert(id, route);
                return id;
            }
        }
    }

    async fn write(&self, frame: &[u8]) -> Result<(), ConnectionError> {
        match self.outbox.send(frame).await {
            Ok(()) => Ok(()),
            // The reader knows more than "broken pipe": what the sandbox process said at last.
            Err(Broken) => Err(self.wait_ended().await),
        }
    }
}

/// One session's end of a connection.
pub(crate) struct Session {
    pub(crate) out: SessionOut,
    incoming: mpsc::UnboundedReceiver<Incoming>,
    unread: Arc<Unread>,
}

impl Session {
    /// The next frame; an error when the connection ended before the session did.
    pub(crate) async fn next(&mut self) -> Result<Incoming, ConnectionError> {
        match self.incoming.recv().await {
            Some(incoming) => {
                self.unread.take(&incoming);
                Ok(incoming)
            }
            None => Err(self.out.connection.wait_ended().await),
        }
    }

    /// The next frame, if it has come already.
    pub(crate) fn try_next(&mut self) -> Option<Incoming> {
        let incoming = self.incoming.try_recv().ok()?;
        self.unread.take(&incoming);
        Some(incoming)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Frames that still come for it are nobody's.
        self.out.connection.routes.lock().remove(&self.out.id);
    }
}

/// The way to one session's other end.
#[derive(Clone)]
pub(crate) struct SessionOut {
    connection: Arc<Connection>,
    pub(crate) id: SessionId,
}

impl SessionOut {
    /// The connection that it is on.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) async fn send(&self, kind: Kind, message: &impl Serialize) -> Result<(), ConnectionError> {
        let mut out = Vec::new();
        encode(kind, self.id, message, &mut out)?;
        self.connection.write(&out).await
    }

    pub(crate) async fn send_raw(&self, kind: Kind, payload: &[u8]) -> Result<(), ConnectionError> {
        let mut out = Vec::new();
        encode_raw(kind, self.id, payload, &mut out)?;
        self.connection.write(&out).await
    }

    /// Sends frames of this session.
    pub(crate) async fn send_frames(
        &self,
        frames: impl FnOnce(SessionId, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> Result<(), ConnectionError> {
        let mut out = Vec::new();
        frames(self.id, &mut out)?;
        self.connection.write(&out).await
    }

    /// Gives the session up without waiting.
    pub(crate) fn abandon(&self) {
        self.push_raw(Kind::Abandon);
    }

    /// Sends a frame without a payload, and waits for nothing.
    pub(crate) fn push_raw(&self, kind: Kind) {
        let mut out = Vec::new();
        if encode_raw(kind, self.id, &[], &mut out).is_ok() {
            let _ = self.connection.outbox.push(&out);
        }
    }

    /// Sends a small message without waiting. If the connection has ended, whoever reads from it is told.
    pub(crate) fn push(&self, kind: Kind, message: &impl Serialize) {
        let mut out = Vec::new();
        if encode(kind, self.id, message, &mut out).is_ok() {
            let _ = self.connection.outbox.push(&out);
        }
    }
}

/// Reads up to and including the peer's welcome.
async fn greet(reader: &Reader, decoder: &mut Decoder) -> Result<Welcome, ConnectionError> {
    let mut greeted = false;
    loop {
        let Some(frame) = decoder.next_frame()? else {
            reader.fill(decoder).await?;
            continue;
        };
        match frame.header.kind {
            Kind::Hello if !greeted => {
                let agreed = Hello::from_payload(frame.payload())?.agree();
                agreed.map_err(|mismatch| ConnectionError::Version {
                    ours: mismatch.ours,
                    theirs: mismatch.theirs,
                })?;
                greeted = true;
            }
            Kind::Welcome if greeted => {
                let welcome: Welcome = decode(frame.payload())?;
                return Ok(Welcome { step: welcome.step.max(1), ..welcome });
            }
            Kind::Fatal => return Err(decode::<Fatal>(frame.payload())?.into()),
            kind => return Err(ConnectionError::Refused(format!("it began with {kind:?}"))),
        }
    }
}

/// The receiving end of a connection: a socket that is watched for bytes, and not for room. [`Outbox`] says why.
struct Reader(AsyncFd<Arc<UnixStream>>);

impl Reader {
    /// Waits for bytes and reads once.
    async fn fill(&self, decoder: &mut Decoder) -> Result<(), ConnectionError> {
        loop {
            // This way of waiting yields now and then to the program's other tasks, whatever a guest sends.
            let mut ready = poll_fn(|context| self.0.poll_read_ready(context)).await?;
            let space = decoder.space();
            match ready.get_inner().as_ref().read(space) {
                Ok(0) => return Err(ConnectionError::Closed),
                Ok(count) => {
                    // A short read has emptied the socket, and whatever comes later is a new event.
                    if count < space.len() {
                        ready.clear_ready();
                    }
                    decoder.filled(count);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

async fn read_frames(reader: Reader, mut decoder: Decoder, routes: &Routes) -> Result<(), ConnectionError> {
    loop {
        while let Some(frame) = decoder.next_frame()? {
            route(&frame, routes)?;
        }
        reader.fill(&mut decoder).await?;
    }
}

fn route(frame: &Frame<'_>, routes: &Routes) -> Result<(), ConnectionError> {
    let Frame { header, .. } = frame;
    if header.kind == Kind::Fatal {
        return Err(decode::<Fatal>(frame.payload())?.into());
    }
    let incoming = || Incoming { kind: header.kind, payload: Bytes::copy_from_slice(frame.payload()) };
    let mut routes = routes.lock();
    // A session without a route was dropped by its owner.
    match routes.remove(&header.session) {
        Some(Route::Session(sender, unread)) => {
            let incoming = incoming();
            if !unread.add(&incoming) {
                let why = "the guest sent more than the session's window".to_owned();
                return Err(FrameError::Malformed { what: "session frame", why }.into());
            }
            let open = sender.send(incoming).is_ok();
            if open && !header.kind.ends_session() {
                routes.insert(header.session, Route::Session(sender, unread));
            }
        }
        Some(Route::Once(sender)) => drop(sender.send(incoming())),
        None => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubby_protocol::CHUNK;

    #[test]
    fn a_guest_that_ignores_its_window_ends_the_connection() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let (routes, unread) = (Routes::default(), Arc::<Unread>::default());
        routes.lock().insert(SessionId(1), Route::Session(sender, unread.clone()));
        let mut decoder = Decoder::default();
        let mut send = |payload: &[u8]| {
            let mut bytes = Vec::new();
            encode_raw(Kind::Stdout, SessionId(1), payload, &mut bytes).unwrap();
            decoder.push(&bytes);
            let frame = decoder.next_frame().unwrap().unwrap();
            route(&frame, &routes)
        };
        let whole = INITIAL_WINDOW as usize / CHUNK;
        for _ in 0..whole {
            send(&[0; CHUNK]).unwrap();
        }
        // What the reader has taken may come again.
        unread.take(&receiver.try_recv().unwrap());
        send(&[0; CHUNK]).unwrap();
        let refused = send(&[0; CHUNK]);
        assert!(matches!(refused, Err(ConnectionError::Protocol(_))), "{refused:?}");
    }
}
