//! One client connection: the handshake, its sessions, and what its frames ask for.
//!
//! A client that breaks the protocol gets a [`Fatal`] and is dropped with all of its commands; nobody else
//! notices. Frames for sessions that are over are passed over, since they may have crossed the session's end.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use cubby_protocol::message::{
    Credit, ExecFailed, ExecFailure, Exited, Fatal, FileRequest, MAX_EVENT, Open, Refused, Signal, Started,
    Subscribe, TtySize,
};
use cubby_protocol::{Decoder, Frame, FrameError, Hello, Kind, SessionId, decode};
use rustix::event::epoll;
use rustix::io::Errno;

use crate::events::{Events, Subscriptions};
use crate::files::pool::{Completion, Pool};
use crate::files::{Files, Misuse};
use crate::metrics;
use crate::output::{HARD_LIMIT, Output, SOFT_LIMIT};
use crate::session::{Session, Which};
use crate::spawn::Spawner;
use crate::token::Token;

/// How many sessions the guest takes, over all clients.
pub const MAX_SESSIONS: usize = 1024;

/// How long news of a command's start may wait for company: a short command's Started, output and Exited then leave
/// in one write, which is one message to the host instead of two.
const PATIENCE: Duration = Duration::from_millis(2);

/// How descriptors of connections and sessions are watched: edge-triggered, so that a full buffer or an exhausted
/// window needs no system call to stop listening.
pub const WATCHED: epoll::EventFlags = epoll::EventFlags::IN
    .union(epoll::EventFlags::OUT)
    .union(epoll::EventFlags::RDHUP)
    .union(epoll::EventFlags::ET);

/// What all clients share.
#[derive(Debug)]
pub struct Shared {
    /// The event loop's epoll instance.
    pub epoll: OwnedFd,
    /// Starts commands.
    pub spawner: Spawner,
    /// Whose session a child is.
    pub children: BTreeMap<i32, (u16, SessionId)>,
    /// Does what blocks.
    pub files: Pool,
    /// Open sessions of all clients.
    pub sessions: usize,
    /// Whether the guest is shutting down.
    pub stopping: bool,
    /// Streams that background processes hold after their session's end.
    pub held: Vec<OwnedFd>,
    /// The guest's processes that exchange events.
    pub events: Events,
}

impl Shared {
    /// Watches a descriptor for everything.
    pub fn watch(&self, fd: impl AsFd, token: Token) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.into()), WATCHED)
    }
}

/// Why a client is dropped.
#[derive(Debug)]
pub enum Drop {
    /// It is gone.
    Gone,
    /// It broke a rule; it is told.
    Broke(Fatal),
}

impl From<FrameError> for Drop {
    fn from(error: FrameError) -> Self {
        Self::Broke(Fatal::Protocol(error.to_string()))
    }
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    slot: u16,
    socket: OwnedFd,
    decoder: Decoder,
    output: Output,
    sessions: BTreeMap<SessionId, Session>,
    files: Files,
    /// Sessions that may have bytes to move, so that idle ones cost nothing.
    active: BTreeSet<SessionId>,
    /// Sessions that wait for events of guest processes.
    pub subscriptions: Subscriptions,
    /// No session's deadline is before this.
    deadline: Option<Instant>,
    /// Until when nothing but news of started commands waits to be written.
    patience: Option<Instant>,
    /// How many bytes of such news there are.
    waiting_starts: usize,
    greeted: bool,
    readable: bool,
    hung_up: bool,
    writable: bool,
}

impl Client {
    /// Greets a new connection and watches it.
    pub fn new(slot: u16, socket: OwnedFd, shared: &Shared) -> Result<Self, Errno> {
        shared.watch(&socket, Token::Client(slot))?;
        let mut output = Output::default();
        output.raw(&Hello::OURS.to_frame());
        Ok(Self {
            slot,
            socket,
            decoder: Decoder::default(),
            output,
            sessions: BTreeMap::new(),
            files: Files::new(slot),
            active: BTreeSet::new(),
            subscriptions: Subscriptions::default(),
            deadline: None,
            patience: None,
            waiting_starts: 0,
            greeted: false,
            readable: true,
            hung_up: false,
            writable: true,
        })
    }

    /// An event on the connection itself.
    pub fn on_event(&mut self, flags: epoll::EventFlags) {
        use epoll::EventFlags as Flags;
        self.readable |= flags.intersects(Flags::IN | Flags::RDHUP | Flags::HUP | Flags::ERR);
        self.hung_up |= flags.intersects(Flags::RDHUP | Flags::HUP | Flags::ERR);
        self.writable |= flags.contains(Flags::OUT);
    }

    /// An event on a session's descriptor.
    pub fn on_session_event(&mut self, id: u32, which: Which, flags: epoll::EventFlags) {
        if let Some(session) = self.sessions.get_mut(&SessionId(id)) {
            session.on_event(which, flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR));
            self.active.insert(SessionId(id));
        }
    }

    /// A session's process was reaped.
    pub fn on_exit(&mut self, id: SessionId, now: Instant, how: impl FnOnce(&Session) -> Exited) {
        if let Some(session) = self.sessions.get_mut(&id) {
            let how = how(session);
            session.on_exit(how, now);
            self.active.insert(id);
            self.deadline = earlier(self.deadline, session.deadline());
        }
    }

    /// When [`Self::on_deadlines`] wants to be called; it may find that a session ended before.
    pub fn deadline(&self) -> Option<Instant> {
        earlier(self.deadline, self.patience)
    }

    /// Lets sessions whose deadline has passed act.
    pub fn on_deadlines(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.deadline = None;
        for (id, session) in &mut self.sessions {
            if session.deadline().is_some_and(|deadline| deadline <= now) {
                session.on_deadline(now);
                self.active.insert(*id);
            }
            self.deadline = earlier(self.deadline, session.deadline());
        }
    }

    /// Reads once and does what the frames ask.
    pub fn receive(&mut self, shared: &mut Shared) -> Result<(), Drop> {
        if !self.readable || self.output.len() >= HARD_LIMIT {
            return Ok(());
        }
        let space = self.decoder.space();
        let size = space.len();
        match rustix::io::read(&self.socket, space) {
            Ok(0) => return Err(Drop::Gone),
            Ok(count) => {
                self.readable = count == size || self.hung_up;
                self.decoder.filled(count);
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(Errno::INTR) => {}
            Err(_) => return Err(Drop::Gone),
        }
        let mut decoder = std::mem::take(&mut self.decoder);
        while let Some(frame) = decoder.next_frame()? {
            self.on_frame(frame, shared)?;
        }
        self.decoder = decoder;
        Ok(())
    }

    /// Moves the bytes of all sessions and ends those that are over.
    pub fn pump(&mut self, shared: &mut Shared) {
        for id in std::mem::take(&mut self.active) {
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            if let Some(how) = session.pump(&mut self.output, &mut shared.held) {
                self.output.message(Kind::Exited, id, &how);
                self.sessions.remove(&id);
                shared.sessions -= 1;
            } else if session.has_more() {
                self.active.insert(id);
            }
        }
        self.subscriptions.pump(&mut self.output);
        self.files.pump(&self.output, &mut shared.files);
    }

    /// A step of a file session was done.
    pub fn on_file(&mut self, completion: Completion, shared: &mut Shared) {
        let before = self.files.count();
        self.files.on_completion(completion, &mut self.output, &mut shared.files);
        shared.sessions -= before - self.files.count();
    }

    /// Ends what is done with files.
    pub fn cancel_files(&mut self, shared: &mut Shared) {
        let before = self.files.count();
        self.files.cancel_all(&mut self.output, &mut shared.files);
        shared.sessions -= before - self.files.count();
    }

    /// Writes what the connection takes.
    pub fn flush(&mut self) -> Result<(), Drop> {
        if let Some(until) = self.patience.take()
            && self.output.len() == self.waiting_starts
            && Instant::now() < until
        {
            self.patience = Some(until);
            return Ok(());
        }
        self.waiting_starts = 0;
        if self.writable && !self.output.is_empty() {
            self.writable = self.output.flush(&self.socket).map_err(|_| Drop::Gone)?;
        }
        Ok(())
    }

    /// Whether there is work that no event will announce.
    pub fn is_ready(&self) -> bool {
        let reads = self.readable && self.output.len() < HARD_LIMIT;
        let moves = !self.active.is_empty() || self.subscriptions.has_news();
        reads || (moves && self.output.len() < SOFT_LIMIT) || self.files.is_ready(&self.output)
    }

    /// Tells the client why, as far as its connection takes it, and ends its commands.
    pub fn close(mut self, why: Drop, shared: &mut Shared) {
        if let Drop::Broke(fatal) = why {
            self.output.message(Kind::Fatal, SessionId::CONNECTION, &fatal);
            // It is being dropped; there is nobody else to tell.
            let _ = self.output.flush(&self.socket);
        }
        for session in self.sessions.values_mut() {
            session.abandon();
        }
        shared.sessions -= self.sessions.len() + self.subscriptions.count() + self.files.count();
        self.files.cancel_all(&mut self.output, &mut shared.files);
    }

    fn on_frame(&mut self, frame: Frame<'_>, shared: &mut Shared) -> Result<(), Drop> {
        let (kind, id, payload) = (frame.header.kind, frame.header.session, frame.payload());
        if !self.greeted {
            return self.greet(kind, payload);
        }
        let on_connection = id == SessionId::CONNECTION;
        match kind {
            // Whoever asks may number its questions.
            Kind::Ping => self.output.urgent(Kind::Pong, id, payload)?,
            Kind::Pong if on_connection => {}
            Kind::Fatal => return Err(Drop::Gone),
            Kind::Open if !on_connection => self.open(id, &decode(payload)?, shared),
            Kind::Emit if !on_connection => self.emit(id, payload, shared)?,
            Kind::Subscribe if !on_connection => self.subscribe(id, decode(payload)?, shared),
            Kind::Unsubscribe if !on_connection => {
                if self.subscriptions.close(id) {
                    shared.sessions -= 1;
                    self.output.message(Kind::Unsubscribed, id, &());
                }
            }
            Kind::Credit if self.subscriptions.contains(id) => {
                self.subscriptions.on_credit(id, decode::<Credit>(payload)?.bytes);
            }
            Kind::Measure if !on_connection => self.output.message(Kind::Measured, id, &metrics::measure()),
            Kind::Abandon if !on_connection => self.abandon(id, shared)?,
            Kind::Stdin | Kind::StdinClose | Kind::Signal | Kind::Resize | Kind::Credit if !on_connection => {
                self.on_session_frame(kind, id, payload)?;
            }
            Kind::FileRequest if !on_connection => self.open_file(id, decode(payload)?, shared),
            Kind::FileData | Kind::FileHole | Kind::FileEnd | Kind::FileCancel if !on_connection => {
                self.on_file_frame(kind, id, payload, shared)?;
            }
            _ => return Err(broke(format!("{kind:?} frame for session {} is not for the agent", id.0))),
        }
        Ok(())
    }

    fn greet(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Drop> {
        if kind != Kind::Hello {
            return Err(broke(format!("{kind:?} frame before Hello")));
        }
        let mismatch = |_| Drop::Broke(Fatal::VersionMismatch { ours: Hello::OURS.version });
        Hello::from_payload(payload)?.agree().map_err(mismatch)?;
        self.greeted = true;
        Ok(())
    }

    fn on_session_frame(&mut self, kind: Kind, id: SessionId, payload: &[u8]) -> Result<(), Drop> {
        // Messages are checked even if their session is over.
        self.active.insert(id);
        let session = self.sessions.get_mut(&id);
        match kind {
            Kind::Stdin => {
                if let Some(session) = session {
                    session.on_stdin(payload).map_err(|overrun| broke(overrun.to_string()))?;
                }
            }
            Kind::StdinClose => {
                if let Some(session) = session {
                    session.on_stdin_close();
                }
            }
            Kind::Signal => {
                let signal: Signal = decode(payload)?;
                if let Some(session) = session {
                    session.signal(signal.number);
                }
            }
            Kind::Resize => {
                let size: TtySize = decode(payload)?;
                if let Some(session) = session {
                    session.on_resize(size);
                }
            }
            _ => {
                let credit: Credit = decode(payload)?;
                if let Some(session) = session {
                    session.on_credit(credit.bytes);
                }
                self.files.on_credit(id, credit.bytes);
            }
        }
        Ok(())
    }

    fn on_file_frame(
        &mut self,
        kind: Kind,
        id: SessionId,
        payload: &[u8],
        shared: &mut Shared,
    ) -> Result<(), Drop> {
        let before = self.files.count();
        let heard = self.files.on_frame(kind, id, payload, &mut self.output, &mut shared.files);
        shared.sessions -= before - self.files.count();
        heard.map_err(|misuse: Misuse| broke(misuse.to_string()))
    }

    /// Whether there can be a session `id`; if not, the client is told.
    fn admits(&mut self, id: SessionId, shared: &Shared) -> bool {
        let refused = if shared.stopping {
            Some(Refused::InvalidState { state: "stopping".into(), operation: "open a session".into() })
        } else if self.sessions.contains_key(&id) || self.subscriptions.contains(id) || self.files.has(id) {
            Some(Refused::SessionInUse)
        } else if shared.sessions >= MAX_SESSIONS {
            let max = u32::try_from(MAX_SESSIONS).unwrap_or(u32::MAX);
            Some(Refused::TooManySessions { max })
        } else {
            None
        };
        if let Some(refused) = &refused {
            self.output.message(Kind::Refused, id, refused);
        }
        refused.is_none()
    }

    /// One event for the guest's processes.
    fn emit(&mut self, id: SessionId, line: &[u8], shared: &mut Shared) -> Result<(), Drop> {
        if line.len() > MAX_EVENT || line.contains(&b'\n') {
            return Err(broke(format!("an event of {} bytes is no line of at most {MAX_EVENT}", line.len())));
        }
        if self.admits(id, shared) {
            shared.events.emit(line);
            self.output.message(Kind::Emitted, id, &());
        }
        Ok(())
    }

    fn subscribe(&mut self, id: SessionId, subscribe: Subscribe, shared: &mut Shared) {
        if self.admits(id, shared) {
            self.subscriptions.open(id, subscribe);
            shared.sessions += 1;
            self.output.message(Kind::Subscribed, id, &());
        }
    }

    fn open_file(&mut self, id: SessionId, request: FileRequest, shared: &mut Shared) {
        if self.admits(id, shared) {
            shared.sessions += 1;
            self.files.open(id, request, &mut shared.files);
        }
    }

    fn open(&mut self, id: SessionId, open: &Open, shared: &mut Shared) {
        if !self.admits(id, shared) {
            return;
        }
        match self.start(id, open, shared) {
            Ok(pid) => {
                let (started, before) = (Started { pid: pid.unsigned_abs() }, self.output.len());
                self.output.message(Kind::Started, id, &started);
                if before == self.waiting_starts {
                    self.waiting_starts = self.output.len();
                    self.patience = self.patience.or_else(|| Instant::now().checked_add(PATIENCE));
                }
            }
            Err(failed) => self.output.message(Kind::Failed, id, &failed),
        }
    }

    /// One session is treated as all are when the client is gone.
    fn abandon(&mut self, id: SessionId, shared: &mut Shared) -> Result<(), Drop> {
        if let Some(mut session) = self.sessions.remove(&id) {
            session.abandon();
            shared.sessions -= 1;
        } else if self.subscriptions.close(id) {
            shared.sessions -= 1;
        } else if self.files.has(id) {
            self.on_file_frame(Kind::FileCancel, id, &[], shared)?;
        }
        Ok(())
    }

    fn start(&mut self, id: SessionId, open: &Open, shared: &mut Shared) -> Result<i32, ExecFailed> {
        let child = shared.spawner.spawn(open)?;
        let pid = child.pid;
        let mut session = Session::new(id, child, open.timeout_ms.map(Duration::from_millis));
        let watched = session
            .descriptors()
            .try_for_each(|(which, fd)| shared.watch(fd, Token::Session(self.slot, id.0, which)));
        if let Err(errno) = watched {
            session.abandon();
            let (kind, errno) = (ExecFailure::Other, errno.raw_os_error());
            return Err(ExecFailed { kind, errno, subject: "epoll".into() });
        }
        shared.children.insert(pid, (self.slot, id));
        shared.sessions += 1;
        self.deadline = earlier(self.deadline, session.deadline());
        self.sessions.insert(id, session);
        Ok(pid)
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

fn broke(why: String) -> Drop {
    Drop::Broke(Fatal::Protocol(why))
}
