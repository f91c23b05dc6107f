//! One client of the sandbox: an application's connection on the relay socket. Behind it is a vsock stream to the agent
//! ([`Upstream`]), whose bytes are forwarded as they lie in the device's buffer; and views of sessions that have been
//! detached, whose frames are among our own.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use cubby_protocol::message::{Attach, Credit, Fatal, Open, Refused, Reply, Request, Welcome};
use cubby_protocol::{Decoder, FrameError, Header, Hello, Kind, Role, SessionId, decode, encode};
use cubby_vmm::devices::vsock::Vsock;
use serde::Serialize;

use crate::backlog::Quota;
use crate::command::{Command, Served, ViewId};
use crate::upstream::{Notes, Upstream};
use crate::watches::{MAX_WATCHES, Watches};

/// Bytes forwarded from the guest for one client before the others have their turn.
const TURN: usize = 1 << 20;

/// Bytes of unread answers after which a client's frames wait.
const MAX_OWN: usize = 64 << 10;

/// Bytes for detached sessions after which others have their turn.
const MAX_DEEDS: usize = 64 << 10;

/// Sessions that a client may have open: as many as the agent takes.
const MAX_SESSIONS: usize = 1024;

/// What a client may do now.
#[derive(Clone, Debug)]
pub(crate) enum Gate {
    /// Open sessions.
    Open,
    /// Go on with those it has; new ones get this answer.
    Closed(Refused),
}

/// Something a client asked of the sandbox process itself.
pub(crate) struct Call {
    pub(crate) session: SessionId,
    pub(crate) request: Request,
}

/// What a client's frames ask of others than the agent.
pub(crate) enum Deed {
    Call(Call),
    /// Open a session that is a view of a detached one.
    Attach {
        session: SessionId,
        to: SessionId,
    },
    /// Open a session for what happens in the guest's network.
    Watch {
        session: SessionId,
    },
    /// A frame for the session behind a view.
    View {
        session: SessionId,
        kind: Kind,
        payload: Vec<u8>,
    },
}

/// What a client's turn works on besides its socket.
pub(crate) struct Turn<'a> {
    pub(crate) vsock: &'a mut Vsock,
    pub(crate) gate: &'a Gate,
    pub(crate) quota: &'a Quota,
    pub(crate) notes: &'a mut Notes,
    pub(crate) deeds: Vec<Deed>,
}

/// Why a client is no more.
#[derive(Debug)]
pub(crate) struct Gone;

pub(crate) struct Client {
    socket: UnixStream,
    readable: bool,
    writable: bool,
    /// The kernel is asked to say when the socket can be written again.
    awaits_room: bool,
    /// The application's Hello has come.
    greeted: bool,
    /// The numbers of the sessions that it opens.
    numbers: Welcome,
    from_app: Decoder,
    /// Frames of our own for the application, sent between two of the guest's.
    own: Vec<u8>,
    own_done: usize,
    /// Something has come that is use of the sandbox.
    used: bool,
    /// Its views, and the sessions behind them.
    pub(crate) views: BTreeMap<SessionId, SessionId>,
    /// What it hears of the guest's network.
    pub(crate) watches: Watches,
    /// The largest number of a session that it has opened.
    pub(crate) newest: u32,
    /// Nothing more is read; the connection ends once `own` is out.
    closing: bool,
}

impl Client {
    /// A client that has just connected. `socket` does not block.
    pub(crate) fn new(socket: UnixStream, numbers: Welcome) -> Self {
        let mut client = Self {
            socket,
            readable: true,
            writable: true,
            awaits_room: false,
            greeted: false,
            numbers,
            from_app: Decoder::default(),
            own: Hello::OURS.to_frame().to_vec(),
            own_done: 0,
            used: false,
            views: BTreeMap::new(),
            watches: Watches::default(),
            newest: 0,
            closing: false,
        };
        client.say(Kind::Welcome, SessionId::CONNECTION, &numbers);
        client
    }

    /// Whose sessions have these numbers.
    pub(crate) fn numbers(&self) -> Welcome {
        self.numbers
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether it has used the sandbox since this was asked last.
    pub(crate) fn take_use(&mut self) -> bool {
        std::mem::take(&mut self.used)
    }

    /// The kernel said that the socket can be read or written again.
    pub(crate) fn wake(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Whether the kernel is to say when the socket can be written again, if that has changed.
    pub(crate) fn awaits_room(&mut self) -> Option<bool> {
        let before = std::mem::replace(&mut self.awaits_room, !self.writable);
        (before != self.awaits_room).then_some(self.awaits_room)
    }

    /// The agent takes connections from now on.
    pub(crate) fn connect(&mut self, up: &mut Upstream, vsock: &mut Vsock) {
        if !self.closing && up.connect(vsock).is_err() {
            self.refuse(&Fatal::Protocol("the guest has no stream left".into()));
        }
    }

    /// Answers a call. Whether the answer is out already.
    pub(crate) fn reply(&mut self, session: SessionId, reply: &Reply, up: &Upstream) -> bool {
        self.say(Kind::Reply, session, reply);
        up.at_boundary() && matches!(self.flush_own(), Ok(true)) && !self.closing
    }

    /// Says why, in the place of a greeting, to a client that is not taken.
    pub(crate) fn turn_away(mut self, why: &Fatal) {
        self.own.clear();
        self.refuse(why);
        // An empty socket takes so few bytes at once.
        let _ = self.flush_own();
    }

    /// Says why and ends the connection.
    pub(crate) fn refuse(&mut self, why: &Fatal) {
        self.say(Kind::Fatal, SessionId::CONNECTION, why);
        self.closing = true;
    }

    /// Begins to tell what happens in the guest's network.
    pub(crate) fn watch(&mut self, session: SessionId) {
        self.watches.begin(session);
        self.say(Kind::Subscribed, session, &());
    }

    /// Ends a session of the client's.
    pub(crate) fn refuse_session(&mut self, session: SessionId, why: &Refused) {
        self.views.remove(&session);
        self.say(Kind::Refused, session, why);
    }

    fn say(&mut self, kind: Kind, session: SessionId, message: &impl Serialize) {
        // Our own messages are small: they always fit.
        let _ = encode(kind, session, message, &mut self.own);
    }

    /// Moves all that can be moved in both directions. Whether there may be more to move after this turn.
    pub(crate) fn pump(&mut self, up: &mut Upstream, turn: &mut Turn<'_>) -> Result<bool, Gone> {
        up.greet(turn.vsock)?;
        let mut more = false;
        if !self.closing {
            more = self.application_to_guest(up, turn)?;
        }
        up.settle(turn.vsock);
        if !self.closing && self.watches.is_due() {
            self.watches.write(&mut self.own, MAX_OWN);
        }
        more |= self.guest_to_application(up, turn)?;
        more |= self.own.is_empty() && self.watches.is_due();
        if self.closing && self.own.is_empty() {
            return Err(Gone);
        }
        Ok(more)
    }

    fn application_to_guest(&mut self, up: &mut Upstream, turn: &mut Turn<'_>) -> Result<bool, Gone> {
        let mut asked = 0;
        loop {
            // A client that does not read its answers is not listened to.
            if !up.flush(turn.vsock) || self.own.len() > MAX_OWN {
                return Ok(false);
            }
            if asked > MAX_DEEDS {
                return Ok(true);
            }
            // The decoder is taken out for as long as a frame of its buffer is looked at.
            let mut decoder = std::mem::take(&mut self.from_app);
            let outcome = match decoder.next_frame() {
                Ok(Some(frame)) => {
                    asked += frame.bytes.len() * usize::from(!up.is_open(frame.header.session));
                    self.on_application_frame(frame.header, frame.bytes, up, turn).map(|()| true)
                }
                Ok(None) => Ok(false),
                Err(error) => Err(error),
            };
            self.from_app = decoder;
            match outcome {
                Ok(true) => {}
                Ok(false) if !self.readable => return Ok(false),
                Ok(false) => self.read_application()?,
                Err(error) => {
                    self.refuse(&Fatal::Protocol(error.to_string()));
                    return Ok(false);
                }
            }
            if self.closing {
                return Ok(false);
            }
        }
    }

    fn read_application(&mut self) -> Result<(), Gone> {
        let space = self.from_app.space();
        let room = space.len();
        match self.socket.read(space) {
            Ok(0) => Err(Gone),
            Ok(count) => {
                self.from_app.filled(count);
                // A short read means that the socket is empty: the next one would only say so.
                self.readable = count == room;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(_) => Err(Gone),
        }
    }

    fn on_application_frame(
        &mut self,
        header: Header,
        bytes: &[u8],
        up: &mut Upstream,
        turn: &mut Turn<'_>,
    ) -> Result<(), FrameError> {
        let Header { kind, session, .. } = header;
        let payload = bytes.get(Header::SIZE..).unwrap_or_default();
        if !self.greeted {
            if kind != Kind::Hello {
                return Err(FrameError::Malformed { what: "Hello", why: "it must come first".into() });
            }
            match Hello::from_payload(payload)?.agree() {
                Ok(_) => self.greeted = true,
                Err(mismatch) => self.refuse(&Fatal::VersionMismatch { ours: mismatch.ours }),
            }
            return Ok(());
        }
        let role = kind.role();
        self.used |= !matches!(role, Role::Call | Role::Asks) && !self.watches.has(session);
        match (role, kind) {
            (Role::Call, Kind::Request) => {
                let request = decode(payload)?;
                self.used |=
                    !matches!(request, Request::Status | Request::Sessions | Request::NetworkCounters);
                turn.deeds.push(Deed::Call(Call { session, request }));
            }
            (Role::Call, Kind::Attach) => {
                self.used = true;
                let attach: Attach = decode(payload)?;
                if self.begin(session, up)? {
                    let to = SessionId(attach.session);
                    self.views.insert(session, to);
                    turn.deeds.push(Deed::Attach { session, to });
                }
            }
            (Role::Call, Kind::WatchNetwork) => {
                if self.watches.len() >= MAX_WATCHES {
                    let max = u32::try_from(MAX_WATCHES).unwrap_or(u32::MAX);
                    self.say(Kind::Refused, session, &Refused::TooManySessions { max });
                } else if self.begin(session, up)? {
                    turn.deeds.push(Deed::Watch { session });
                }
            }
            (Role::Opens | Role::Listens, _) => match turn.gate {
                Gate::Closed(why) => self.say(Kind::Refused, session, why),
                Gate::Open => {
                    let open = (kind == Kind::Open).then(|| decode::<Open>(payload)).transpose()?;
                    if self.begin(session, up)? {
                        let command = open.map(|open| Command::new(session, open, turn.quota));
                        up.open(session, role, command);
                        up.forward(bytes, turn.vsock);
                    }
                }
            },
            (Role::Asks, _) => match turn.gate {
                Gate::Closed(why @ Refused::InvalidState { .. }) => self.say(Kind::Refused, session, why),
                _ => up.forward(bytes, turn.vsock),
            },
            (Role::Connection, Kind::Ping) => up.forward(bytes, turn.vsock),
            // A frame for a session that has just ended is no mistake of the sender's.
            (Role::ToGuest | Role::Both, _) => {
                if up.belongs_to_client(session) {
                    if let Some(command) = up.command(session) {
                        command.on_owner_frame(kind, payload);
                    }
                    if kind == Kind::Abandon {
                        up.close(session);
                    }
                    up.forward(bytes, turn.vsock);
                } else if self.views.contains_key(&session) {
                    turn.deeds.push(Deed::View { session, kind, payload: payload.to_vec() });
                } else if self.watches.has(session) {
                    match kind {
                        Kind::Credit => self.watches.credit(session, decode::<Credit>(payload)?.bytes),
                        Kind::Abandon => self.watches.end(session),
                        _ => {}
                    }
                }
            }
            (_, kind) => {
                return Err(FrameError::Malformed {
                    what: "application frame",
                    why: format!("{kind:?} is not an application's to send"),
                });
            }
        }
        Ok(())
    }

    /// Whether a session may begin; if not, the client is told.
    fn begin(&mut self, session: SessionId, up: &Upstream) -> Result<bool, FrameError> {
        if !self.numbers.allows(session.0) {
            return Err(FrameError::Malformed {
                what: "session",
                why: format!("{} is not a number of this connection", session.0),
            });
        }
        if up.is_open(session) || self.views.contains_key(&session) || self.watches.has(session) {
            self.say(Kind::Refused, session, &Refused::SessionInUse);
            return Ok(false);
        }
        if up.sessions() + self.views.len() + self.watches.len() >= MAX_SESSIONS {
            let max = u32::try_from(MAX_SESSIONS).unwrap_or(u32::MAX);
            self.say(Kind::Refused, session, &Refused::TooManySessions { max });
            return Ok(false);
        }
        self.newest = self.newest.max(session.0);
        Ok(true)
    }

    /// Whether there may be more to forward after this turn.
    fn guest_to_application(&mut self, up: &mut Upstream, turn: &mut Turn<'_>) -> Result<bool, Gone> {
        let mut moved = 0;
        loop {
            if up.at_boundary() && !self.flush_own()? {
                return Ok(false);
            }
            let Some(id) = up.up().filter(|_| !self.closing) else { return Ok(false) };
            let bytes = turn.vsock.received(id);
            let run = up.next_run(bytes)?;
            if run.length == 0 || !(self.writable || run.stays) {
                return Ok(false);
            }
            if moved >= TURN {
                return Ok(true);
            }
            let bytes = bytes.get(..run.length).unwrap_or_default();
            let written = if run.stays {
                Some(run.length)
            } else {
                write(&mut self.socket, bytes, &mut self.writable)?
            };
            let Some(count) = written else { continue };
            let checked = up.commit(bytes.get(..count).unwrap_or_default(), run.stays, turn.notes);
            turn.vsock.consume(id, count);
            moved += count;
            // The application was sent the same bytes and finds the same fault.
            checked?;
            up.settle(turn.vsock);
        }
    }

    /// Sends what a view has to say. Whether it said something, and whether it has more that can be sent now.
    pub(crate) fn show(
        &mut self,
        session: SessionId,
        command: &mut Command,
        client: u32,
        at_boundary: bool,
    ) -> (bool, bool) {
        let (mut said, mut more) = (false, true);
        while more && self.own.len() < MAX_OWN && !self.closing {
            let before = self.own.len();
            let served = command.serve(ViewId { client, session }, &mut self.own, MAX_OWN);
            said |= self.own.len() > before;
            more = served == Served::More;
            if served == Served::Over {
                self.views.remove(&session);
            }
            // What stands in the way is found out by the next turn.
            if at_boundary {
                let _ = self.flush_own();
            }
        }
        (said, more && self.own.is_empty())
    }

    /// Sends our own frames. Whether all went.
    fn flush_own(&mut self) -> Result<bool, Gone> {
        while self.own_done < self.own.len() && self.writable {
            let rest = self.own.get(self.own_done..).unwrap_or_default();
            self.own_done += write(&mut self.socket, rest, &mut self.writable)?.unwrap_or(0);
        }
        if self.own_done < self.own.len() {
            return Ok(false);
        }
        self.own.clear();
        self.own_done = 0;
        Ok(true)
    }
}

/// Writes some of `bytes`; `None` if the socket takes nothing now.
fn write(socket: &mut UnixStream, bytes: &[u8], writable: &mut bool) -> Result<Option<usize>, Gone> {
    match socket.write(bytes) {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            *writable = false;
            Ok(None)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
        Err(_) => Err(Gone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output_log::OutputLog;
    use cubby_vmm::devices::vsock::GuestCid;

    #[test]
    fn to_look_at_a_sandbox_is_no_use_of_it() {
        let mut vsock = Vsock::new(GuestCid::try_from(3).unwrap());
        let mut client = Client::new(UnixStream::pair().unwrap().0, Welcome { first: 1, step: 1 });
        let (mut up, mut notes) = (Upstream::new(), Notes::new(OutputLog::default()));
        let mut used = |gate: &Gate, kind: Kind, message: Option<Request>| {
            let (mut bytes, session) = (Vec::new(), SessionId(kind as u32));
            match message {
                Some(request) => encode(kind, session, &request, &mut bytes).unwrap(),
                None if kind == Kind::Hello => bytes.extend(Hello::OURS.to_frame()),
                None => cubby_protocol::encode_raw(kind, session, &[], &mut bytes).unwrap(),
            }
            let header = Header::from_bytes(*bytes.first_chunk().unwrap()).unwrap();
            let quota = &Quota::default();
            let mut turn = Turn { vsock: &mut vsock, gate, quota, notes: &mut notes, deeds: Vec::new() };
            client.on_application_frame(header, &bytes, &mut up, &mut turn).unwrap();
            (client.take_use(), up.sessions())
        };
        assert_eq!(used(&Gate::Open, Kind::Hello, None), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Measure, None), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Request, Some(Request::Status)), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Request, Some(Request::Sessions)), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Request, Some(Request::NetworkCounters)), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::WatchNetwork, None), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Request, Some(Request::Touch)), (true, 0));
        assert_eq!(used(&Gate::Open, Kind::Ping, None), (true, 0));
        assert_eq!(used(&Gate::Open, Kind::Subscribe, None), (true, 1));
        let draining = Gate::Closed(Refused::Draining);
        assert_eq!(used(&draining, Kind::Emit, None), (true, 1));
        assert_eq!(used(&draining, Kind::Measure, None), (false, 1));
    }
}
