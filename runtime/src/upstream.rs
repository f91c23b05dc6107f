//! The stream to the agent that belongs to one client: the sessions on it, what goes out, and what comes in, which is
//! followed frame by frame without trusting the guest's word for anything.
//!
//! Frames of the client's own sessions are forwarded as they lie in the device's buffer. Those of detached sessions stay
//! here, with whoever is attached. The stream outlives its client as long as a detached session runs on it.

use std::collections::{BTreeMap, BTreeSet};

use cubby_protocol::{
    AGENT_PORT, Header, Hello, Kind, MAX_AGENT_FRAME, Part, Role, Scanner, SessionId, encode_raw,
};
use cubby_vmm::devices::vsock::{BUF_ALLOC, Port, StreamId, TooManyStreams, Vsock};

use crate::client::Gone;
use crate::command::{Command, ViewId};
use crate::output_log::OutputLog;

/// A guest's message about a command is no longer than this, in bytes: the longest names a path.
const MAX_MESSAGE: usize = 8 << 10;

/// The device keeps a whole frame until it can go.
const _: () = assert!(BUF_ALLOC as usize >= MAX_AGENT_FRAME);

/// How far the stream has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    /// The agent is not ready yet.
    None,
    /// Connecting, or waiting for the agent's Hello.
    Greeting(StreamId),
    Up(StreamId),
}

/// What came of a stream's bytes, for others than its client.
pub(crate) struct Notes {
    /// Where all output is kept.
    pub(crate) log: OutputLog,
    /// Clients that have something to read in a view.
    pub(crate) awake: Vec<u32>,
    /// Commands that have ended.
    #[expect(clippy::vec_box, reason = "they come in their boxes and go on in them")]
    pub(crate) ended: Vec<Box<Command>>,
    /// Views that a guest has sent more than it may.
    pub(crate) lost: Vec<ViewId>,
}

impl Notes {
    /// None, and the log to write to.
    pub(crate) fn new(log: OutputLog) -> Self {
        Self { log, awake: Vec::new(), ended: Vec::new(), lost: Vec::new() }
    }
}

/// An open session.
struct Session {
    /// Of the frame that has opened it.
    role: Role,
    /// What is known of the command, if it runs one.
    command: Option<Box<Command>>,
}

impl Session {
    fn is_detached(&self) -> bool {
        self.command.as_deref().is_some_and(Command::is_detached)
    }
}

pub(crate) struct Upstream {
    stream: Stream,
    /// Frames that the stream did not take whole.
    to_guest: Vec<u8>,
    to_guest_done: usize,
    sessions: BTreeMap<SessionId, Session>,
    /// How many of them are detached.
    detached: usize,
    scanner: Scanner,
    /// The frame that the scanner is in.
    frame: Option<Header>,
    /// Whether that frame stays here.
    stays: bool,
    /// Its payload, if it is a message about a command.
    message: Vec<u8>,
    /// Detached sessions whose windows may have changed.
    unsettled: BTreeSet<SessionId>,
}

/// The next bytes of a stream that go the same way, of which there may be none yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) length: usize,
    /// They are no frame of the client's.
    pub(crate) stays: bool,
}

impl Upstream {
    pub(crate) fn new() -> Self {
        Self {
            stream: Stream::None,
            to_guest: Vec::new(),
            to_guest_done: 0,
            sessions: BTreeMap::new(),
            detached: 0,
            scanner: Scanner::default(),
            frame: None,
            stays: false,
            message: Vec::new(),
            unsettled: BTreeSet::new(),
        }
    }

    pub(crate) fn stream(&self) -> Option<StreamId> {
        match self.stream {
            Stream::None => None,
            Stream::Greeting(id) | Stream::Up(id) => Some(id),
        }
    }

    /// The stream, once the agent has greeted.
    pub(crate) fn up(&self) -> Option<StreamId> {
        match self.stream {
            Stream::Up(id) => Some(id),
            Stream::None | Stream::Greeting(_) => None,
        }
    }

    /// The agent takes connections from now on.
    pub(crate) fn connect(&mut self, vsock: &mut Vsock) -> Result<(), TooManyStreams> {
        if self.stream == Stream::None {
            let id = vsock.connect(Port(AGENT_PORT))?;
            vsock.send(id, &Hello::OURS.to_frame());
            self.stream = Stream::Greeting(id);
        }
        Ok(())
    }

    /// Takes the agent's Hello, which must be ours.
    pub(crate) fn greet(&mut self, vsock: &mut Vsock) -> Result<(), Gone> {
        const SIZE: usize = Header::SIZE + Hello::SIZE;
        let Stream::Greeting(id) = self.stream else { return Ok(()) };
        let Some(frame) = vsock.received(id).first_chunk::<SIZE>() else { return Ok(()) };
        if *frame != Hello::OURS.to_frame() {
            return Err(Gone);
        }
        vsock.consume(id, SIZE);
        self.stream = Stream::Up(id);
        self.flush(vsock);
        Ok(())
    }

    /// Whether the client's side of the stream is between two frames.
    pub(crate) fn at_boundary(&self) -> bool {
        self.scanner.at_boundary() || self.stays
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Those that a drain waits for.
    pub(crate) fn working(&self) -> usize {
        self.sessions.values().filter(|session| session.role != Role::Listens).count()
    }

    pub(crate) fn detached(&self) -> usize {
        self.detached
    }

    pub(crate) fn is_open(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    /// A session begins, by a frame of this role; with what it is, if it runs a command.
    pub(crate) fn open(&mut self, session: SessionId, role: Role, command: Option<Box<Command>>) {
        self.sessions.insert(session, Session { role, command });
    }

    /// A session that its client gives up.
    pub(crate) fn close(&mut self, session: SessionId) {
        self.sessions.remove(&session);
    }

    pub(crate) fn command(&mut self, session: SessionId) -> Option<&mut Command> {
        self.sessions.get_mut(&session)?.command.as_deref_mut()
    }

    pub(crate) fn commands(&self) -> impl Iterator<Item = &Command> {
        self.sessions.values().filter_map(|session| session.command.as_deref())
    }

    /// Whether this session is its client's to use.
    pub(crate) fn belongs_to_client(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(|session| !session.is_detached())
    }

    /// A session goes on without its client. Whether there is such a command.
    pub(crate) fn detach(&mut self, session: SessionId) -> bool {
        let Some(command) = self.command(session).filter(|command| !command.is_detached()) else {
            return false;
        };
        command.detach();
        self.detached += 1;
        self.unsettled.insert(session);
        true
    }

    /// Its windows may have changed.
    pub(crate) fn unsettle(&mut self, session: SessionId) {
        self.unsettled.insert(session);
    }

    /// The client is gone: what is its own ends, as the agent would end it with the stream.
    pub(crate) fn abandon(&mut self, vsock: &mut Vsock) {
        let mut frames = Vec::new();
        self.sessions.retain(|id, session| {
            let stays = session.is_detached();
            if !stays {
                // An empty frame always fits.
                let _ = encode_raw(Kind::Abandon, *id, &[], &mut frames);
            }
            stays
        });
        self.forward(&frames, vsock);
    }

    /// The stream is over, and what ran on it.
    pub(crate) fn lose(self) -> impl Iterator<Item = Box<Command>> {
        let detached = self.sessions.into_values().filter(Session::is_detached);
        detached.filter_map(|session| session.command).map(|mut command| {
            command.on_lost();
            command
        })
    }

    /// Sends whole frames, after those that wait.
    pub(crate) fn forward(&mut self, frames: &[u8], vsock: &mut Vsock) {
        let taken = match self.stream {
            Stream::Up(id) if self.to_guest.is_empty() => vsock.send(id, frames),
            // The agent's Hello comes first; the frame waits.
            _ => 0,
        };
        self.to_guest.extend_from_slice(frames.get(taken..).unwrap_or_default());
    }

    /// Sends what is left of frames. Whether all of it went.
    pub(crate) fn flush(&mut self, vsock: &mut Vsock) -> bool {
        if self.to_guest.is_empty() {
            return true;
        }
        let Stream::Up(id) = self.stream else { return false };
        let rest = self.to_guest.get(self.to_guest_done..).unwrap_or_default();
        self.to_guest_done += vsock.send(id, rest);
        if self.to_guest_done < self.to_guest.len() {
            return false;
        }
        self.to_guest.clear();
        self.to_guest_done = 0;
        true
    }

    /// Gives detached sessions what the guest takes of their input, and leave to send more.
    pub(crate) fn settle(&mut self, vsock: &mut Vsock) {
        while !self.unsettled.is_empty() && self.flush(vsock) {
            let Some(session) = self.unsettled.pop_first() else { return };
            let mut frames = Vec::new();
            if let Some(command) = self.command(session) {
                command.settle(&mut frames);
            }
            if !frames.is_empty() {
                self.forward(&frames, vsock);
            }
        }
    }

    /// How many of the next bytes belong to frames that have begun to go or are there whole. The others wait: what is
    /// ours to say to the client goes between two frames, and whoever pauses the guest in the middle of one is told so.
    fn whole(&self, bytes: &[u8]) -> Result<usize, Gone> {
        let (mut ahead, mut rest, mut whole) = (self.scanner.clone(), bytes, 0);
        while let Some(part) = ahead.next(&mut rest).map_err(|_| Gone)? {
            if matches!(part, Part::Header(header) if Header::SIZE + header.length as usize > MAX_AGENT_FRAME)
            {
                return Err(Gone);
            }
            if ahead.at_boundary() {
                whole = bytes.len() - rest.len();
            }
        }
        Ok(whole)
    }

    /// How many of the next bytes go the same way.
    pub(crate) fn next_run(&self, bytes: &[u8]) -> Result<Run, Gone> {
        let bytes = bytes.get(..self.whole(bytes)?).unwrap_or_default();
        if self.detached == 0 && !self.stays {
            return Ok(Run { length: bytes.len(), stays: false });
        }
        let (mut ahead, mut rest) = (self.scanner.clone(), bytes);
        // The rest of a header goes the way of its beginning, and only a client's is ever cut.
        let mut way = (!ahead.at_boundary()).then_some(self.stays);
        let mut cut = ahead.at_boundary() || ahead.payload_left() > 0;
        loop {
            let begin = bytes.len() - rest.len();
            let run = Run { length: begin, stays: way.unwrap_or(false) };
            let at_boundary = ahead.at_boundary();
            match ahead.next(&mut rest).map_err(|_| Gone)? {
                Some(Part::Header(header)) if cut => {
                    let stays = !self.belongs_to_client(header.session) && self.is_open(header.session);
                    if *way.get_or_insert(stays) != stays {
                        return Ok(run);
                    }
                }
                Some(Part::Header(_)) => cut = true,
                Some(Part::Payload(_)) => {}
                // An unfinished header says nothing yet.
                None if at_boundary => return Ok(run),
                None => return Ok(Run { length: bytes.len(), ..run }),
            }
        }
    }

    /// Takes note of bytes of one run that have gone their way.
    pub(crate) fn commit(&mut self, mut bytes: &[u8], stays: bool, notes: &mut Notes) -> Result<(), Gone> {
        while let Some(part) = self.scanner.next(&mut bytes).map_err(|_| Gone)? {
            match part {
                Part::Header(header) => {
                    if !agent_may_send(header.kind) {
                        return Err(Gone);
                    }
                    self.frame = Some(header);
                    self.stays = stays;
                    self.message.clear();
                }
                Part::Payload(payload) => self.on_payload(payload, notes)?,
            }
            if self.scanner.payload_left() == 0
                && let Some(header) = self.frame.take()
            {
                self.stays = false;
                self.on_frame_end(header, notes);
            }
        }
        Ok(())
    }

    fn on_payload(&mut self, payload: &[u8], notes: &mut Notes) -> Result<(), Gone> {
        let Some(Header { kind, session, .. }) = self.frame else { return Ok(()) };
        let Some(command) = self.sessions.get_mut(&session).and_then(|open| open.command.as_mut()) else {
            return Ok(());
        };
        if !matches!(kind, Kind::Stdout | Kind::Stderr) {
            self.message.extend_from_slice(payload);
            return if self.message.len() > MAX_MESSAGE { Err(Gone) } else { Ok(()) };
        }
        notes.log.output(session, kind, command.has_terminal(), payload);
        command.on_output(kind, payload);
        if command.is_detached() {
            notes.lost.extend(command.overrun());
            notes.awake.extend(command.viewers());
            self.unsettled.insert(session);
        }
        Ok(())
    }

    fn on_frame_end(&mut self, header: Header, notes: &mut Notes) {
        let Header { kind, session, .. } = header;
        if kind.ends_session() {
            let Some(mut command) = self.sessions.remove(&session).and_then(|open| open.command) else {
                return;
            };
            command.on_end(kind, &self.message);
            notes.awake.extend(command.viewers());
            self.detached -= usize::from(command.is_detached());
            notes.ended.push(command);
        } else if let Some(command) = self.sessions.get_mut(&session).and_then(|open| open.command.as_mut()) {
            command.on_message(kind, &self.message);
            if command.is_detached() && matches!(kind, Kind::Started | Kind::Credit) {
                notes.awake.extend(command.viewers());
                self.unsettled.insert(session);
            }
        }
    }

    /// Takes in what comes on a stream whose client is gone.
    pub(crate) fn absorb(&mut self, vsock: &mut Vsock, notes: &mut Notes) -> Result<(), Gone> {
        self.greet(vsock)?;
        self.flush(vsock);
        if let Some(id) = self.up() {
            // What the stream holds is bounded; what comes meanwhile is another turn's.
            let bytes = vsock.received(id);
            let count = bytes.len();
            self.commit(bytes, true, notes)?;
            vsock.consume(id, count);
        }
        self.settle(vsock);
        Ok(())
    }
}

/// What an agent sends on a client's stream after its Hello.
fn agent_may_send(kind: Kind) -> bool {
    matches!(kind, Kind::Pong | Kind::Fatal)
        || matches!(kind.role(), Role::FromGuest | Role::Both | Role::Ends)
}

#[cfg(test)]
mod tests;
