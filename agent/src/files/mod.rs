//! Files: sessions that read, write, list and change what is in the guest's file system.
//!
//! File I/O blocks and the event loop must not, so each session's work is cut into steps that threads do
//! ([`pool::Pool`]; `docs/adr/0013-files-in-steps.md` says why). Between two steps the session is here, with its window
//! and what came for it: a client that stalls holds an open file and no thread, and one that is gone leaves
//! nothing, as what was open is closed and what was temporary removed.

mod directory;
mod metadata;
pub mod pool;
mod reader;
mod tree;
pub mod work;
mod writer;

use std::collections::{BTreeMap, VecDeque};

use cubby_protocol::message::{Credit, FileFailed, FileHole, FileRequest, PathBytes};
use cubby_protocol::{FrameError, INITIAL_WINDOW, Kind, SessionId, decode};
use rustix::io::Errno;

use self::pool::{Completion, Pool};
use self::work::{Cancel, Input, Job, Means, Next, Open, Run, STEP, Ticket, Work};
use crate::output::{Output, SOFT_LIMIT};

/// How much a client's steps may have under way together with what waits to be written to it.
const PROMISED: usize = 2 * SOFT_LIMIT;

/// Where a session is.
#[derive(Debug)]
enum State {
    /// Nothing was done yet.
    New(FileRequest),
    /// Between two steps.
    Open(Open),
    /// On a thread.
    Working,
}

#[derive(Debug)]
struct Session {
    number: u64,
    state: State,
    cancel: Cancel,
    /// Whether it takes bytes.
    writes: bool,
    /// How much more may be sent.
    window: u64,
    /// What the step on its thread may send.
    promised: usize,
    input: Input,
    input_window: u32,
    owed: u32,
    /// It is in the queue.
    queued: bool,
}

impl Session {
    fn new(request: FileRequest, number: u64) -> Self {
        Self {
            number,
            writes: matches!(request, FileRequest::Write { .. }),
            state: State::New(request),
            cancel: Cancel::default(),
            window: u64::from(INITIAL_WINDOW),
            promised: 0,
            input: Input::default(),
            input_window: INITIAL_WINDOW,
            owed: 0,
            queued: false,
        }
    }

    /// Takes so much from the window for what came.
    fn admit(&mut self, run: Run, sent: u32) -> Result<(), Misuse> {
        let overrun = Misuse::Overrun { sent, window: self.input_window };
        self.input_window = self.input_window.checked_sub(sent).ok_or(overrun)?;
        self.input.push(run, sent);
        Ok(())
    }

    /// What is to be given back to the window, once it is worth a frame.
    fn grant(&mut self) -> Option<u32> {
        let grant = self.owed.min(INITIAL_WINDOW - self.input_window.min(INITIAL_WINDOW));
        if grant < INITIAL_WINDOW / 4 {
            return None;
        }
        self.input_window += grant;
        self.owed = 0;
        Some(grant)
    }

    /// How much the next step may send; `None` if there is nothing to do.
    fn wants(&self) -> Option<usize> {
        let window = usize::try_from(self.window).unwrap_or(usize::MAX).min(STEP);
        match &self.state {
            State::New(FileRequest::Read { .. } | FileRequest::List { .. }) => Some(window),
            State::New(_) => Some(0),
            State::Open(Open::Reader(_)) => (window >= reader::LEAST).then_some(window),
            State::Open(Open::Lister(_)) => (window >= directory::BATCH).then_some(window),
            State::Open(Open::Writer(_)) => (self.input.last || self.input.cost > 0).then_some(0),
            State::Working => None,
        }
    }

    /// The next step, which may send as much and uses these buffers.
    fn step(&mut self, ticket: Ticket, budget: usize, output: Output, empty: Input) -> Job {
        self.promised = budget;
        let input = std::mem::replace(&mut self.input, empty);
        let means = Means { budget, output, input };
        let work = match std::mem::replace(&mut self.state, State::Working) {
            State::New(request) => Work::Begin(request, means),
            State::Open(open) => Work::Go(open, means),
            State::Working => Work::Nothing(means),
        };
        Job { ticket, cancel: self.cancel.clone(), work }
    }
}

/// A frame that a session does not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// More than the window allows.
    #[error("{sent} bytes for a file overrun the window of {window}")]
    Overrun {
        /// What the frame takes from it.
        sent: u32,
        /// What was left of it.
        window: u32,
    },
    /// Bytes for a file that is not being written.
    #[error("{0:?} frame for a session that writes nothing")]
    NothingToWrite(Kind),
    /// It is not the message that it should be.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// The file sessions of one client.
#[derive(Debug)]
pub struct Files {
    slot: u16,
    sessions: BTreeMap<SessionId, Session>,
    /// Those that may have something to do, in the order of their turns.
    queue: VecDeque<SessionId>,
    promised: usize,
    /// Buffers to use again.
    spare: (Output, Input),
}

impl Files {
    /// Those of the client in this slot.
    pub fn new(slot: u16) -> Self {
        Self {
            slot,
            sessions: BTreeMap::new(),
            queue: VecDeque::new(),
            promised: 0,
            spare: Default::default(),
        }
    }

    /// Whether there is such a session.
    pub fn has(&self, id: SessionId) -> bool {
        self.sessions.contains_key(&id)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.sessions.len()
    }

    /// Opens a session. `id` is free.
    pub fn open(&mut self, id: SessionId, request: FileRequest, pool: &mut Pool) {
        self.sessions.insert(id, Session::new(request, pool.number()));
        self.enqueue(id);
    }

    /// A frame for a session. One that is over does not care.
    pub fn on_frame(
        &mut self,
        kind: Kind,
        id: SessionId,
        payload: &[u8],
        output: &mut Output,
        pool: &mut Pool,
    ) -> Result<(), Misuse> {
        // Messages are checked even if their session is over.
        let hole = if kind == Kind::FileHole { decode::<FileHole>(payload)?.bytes } else { 0 };
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        match kind {
            Kind::FileCancel => self.cancel(id, output, pool),
            _ if !session.writes => return Err(Misuse::NothingToWrite(kind)),
            Kind::FileEnd => session.input.last = true,
            Kind::FileHole => session.admit(Run::Hole(hole), FileHole::COST)?,
            _ => {
                session.admit(Run::Data(payload.len()), u32::try_from(payload.len()).unwrap_or(u32::MAX))?;
                session.input.bytes.extend_from_slice(payload);
            }
        }
        self.enqueue(id);
        Ok(())
    }

    /// The receiver of a session is ready for more.
    pub fn on_credit(&mut self, id: SessionId, bytes: u32) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.window = session.window.saturating_add(bytes.into());
            self.enqueue(id);
        }
    }

    /// Hands out the next steps, as far as the client takes what they will send.
    pub fn pump(&mut self, output: &Output, pool: &mut Pool) {
        for _ in 0..self.queue.len() {
            let Some(id) = self.queue.pop_front() else { return };
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            session.queued = false;
            let Some(budget) = session.wants() else { continue };
            if output.len() + self.promised + budget > PROMISED {
                self.enqueue(id);
                continue;
            }
            self.promised += budget;
            let ticket = Ticket { slot: self.slot, session: id, number: session.number };
            let (output, empty) = std::mem::take(&mut self.spare);
            pool.submit(session.step(ticket, budget, output, empty));
        }
    }

    /// Whether a step waits for nothing but its turn.
    pub fn is_ready(&self, output: &Output) -> bool {
        !self.queue.is_empty() && output.len() + self.promised + STEP <= PROMISED
    }

    /// A step was done.
    pub fn on_completion(&mut self, completion: Completion, output: &mut Output, pool: &mut Pool) {
        let Completion { ticket, mut outcome } = completion;
        let id = ticket.session;
        let session = self.sessions.get_mut(&id).filter(|session| session.number == ticket.number);
        let Some(session) = session else { return pool.discard(ticket, outcome.next) };
        self.promised -= std::mem::take(&mut session.promised);
        session.window = session.window.saturating_sub(outcome.cost as u64);
        session.owed = session.owed.saturating_add(outcome.input.cost);
        output.append(&mut outcome.output);
        self.spare = (outcome.output, outcome.input.emptied());
        match outcome.next {
            Next::Go(open) => {
                session.state = State::Open(open);
                if session.cancel.is_set() {
                    return self.cancel(id, output, pool);
                }
                if let Some(bytes) = session.grant() {
                    output.message(Kind::Credit, id, &Credit { bytes });
                }
                return self.enqueue(id);
            }
            Next::Done(done) => output.message(Kind::FileDone, id, &done),
            Next::Failed(failed) => output.message(Kind::FileFailed, id, &failed),
            Next::Nothing => {}
        }
        self.sessions.remove(&id);
    }

    /// Nobody wants this session's outcome any more. One that is on a thread ends when it comes back.
    fn cancel(&mut self, id: SessionId, output: &mut Output, pool: &mut Pool) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.cancel.set();
        match std::mem::replace(&mut session.state, State::Working) {
            State::Working => return,
            State::Open(open) => {
                let ticket = Ticket { slot: self.slot, session: id, number: session.number };
                pool.discard(ticket, Next::Go(open));
            }
            State::New(_) => {}
        }
        self.sessions.remove(&id);
        let errno = Errno::CANCELED.raw_os_error();
        output.message(Kind::FileFailed, id, &FileFailed { errno, path: PathBytes::default() });
    }

    /// Nobody wants any of them.
    pub fn cancel_all(&mut self, output: &mut Output, pool: &mut Pool) {
        for id in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.cancel(id, output, pool);
        }
    }

    fn enqueue(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id)
            && !session.queued
        {
            session.queued = true;
            self.queue.push_back(id);
        }
    }
}
