//! One client of the sandbox: an application's connection on the relay socket and, behind it, a vsock
//! stream to the agent. Bytes from the guest are forwarded as they lie in the device's buffer; only their
//! headers are looked at, to know which sessions are open without trusting the guest's word for it.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use cubby_protocol::message::{Fatal, Refused, Reply, Request};
use cubby_protocol::{
    AGENT_PORT, Decoder, FrameError, Header, Hello, Kind, Role, Scanner, SessionId, decode, encode,
};
use cubby_vmm::devices::vsock::{Port, StreamId, Vsock};
use serde::Serialize;

/// Bytes forwarded from the guest for one client before the others have their turn.
const TURN: usize = 1 << 20;

/// Bytes of unread answers after which a client's frames wait.
const MAX_OWN: usize = 64 << 10;

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

/// How far the stream to the agent has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    /// The agent is not ready yet.
    None,
    /// Connecting, or waiting for the agent's Hello.
    Greeting(StreamId),
    Up(StreamId),
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
    from_app: Decoder,
    /// A frame that the stream did not take whole.
    to_guest: Vec<u8>,
    to_guest_done: usize,
    stream: Stream,
    from_guest: Scanner,
    /// Frames of our own for the application, sent between two of the guest's.
    own: Vec<u8>,
    own_done: usize,
    /// Open sessions, with what opened them.
    sessions: HashMap<SessionId, Role>,
    /// Something has come that is use of the sandbox.
    used: bool,
    /// Nothing more is read; the connection ends once `own` is out.
    closing: bool,
}

impl Client {
    /// A client that has just connected. `socket` does not block.
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            readable: true,
            writable: true,
            awaits_room: false,
            greeted: false,
            from_app: Decoder::default(),
            to_guest: Vec::new(),
            to_guest_done: 0,
            stream: Stream::None,
            from_guest: Scanner::default(),
            own: Hello::OURS.to_frame().to_vec(),
            own_done: 0,
            sessions: HashMap::new(),
            used: false,
            closing: false,
        }
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    pub(crate) fn stream(&self) -> Option<StreamId> {
        match self.stream {
            Stream::None => None,
            Stream::Greeting(id) | Stream::Up(id) => Some(id),
        }
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Whether it has used the sandbox since this was asked last.
    pub(crate) fn take_use(&mut self) -> bool {
        std::mem::take(&mut self.used)
    }

    /// Those of them that a drain waits for.
    pub(crate) fn working(&self) -> usize {
        self.sessions.values().filter(|role| **role != Role::Listens).count()
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
    pub(crate) fn connect(&mut self, vsock: &mut Vsock) {
        if self.stream == Stream::None && !self.closing {
            let Ok(id) = vsock.connect(Port(AGENT_PORT)) else {
                return self.refuse(&Fatal::Protocol("the guest has no stream left".into()));
            };
            vsock.send(id, &Hello::OURS.to_frame());
            self.stream = Stream::Greeting(id);
        }
    }

    /// Answers a call. Whether the answer is out already.
    pub(crate) fn reply(&mut self, session: SessionId, reply: &Reply) -> bool {
        self.say(Kind::Reply, session, reply);
        self.from_guest.at_boundary() && matches!(self.flush_own(), Ok(true)) && !self.closing
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

    fn say(&mut self, kind: Kind, session: SessionId, message: &impl Serialize) {
        // Our own messages are small: they always fit.
        let _ = encode(kind, session, message, &mut self.own);
    }

    /// Moves all that can be moved in both directions. Calls of the client are added to `calls`.
    pub(crate) fn pump(
        &mut self,
        vsock: &mut Vsock,
        gate: &Gate,
        calls: &mut Vec<Call>,
    ) -> Result<bool, Gone> {
        if !self.closing {
            self.application_to_guest(vsock, gate, calls)?;
        }
        let more = self.guest_to_application(vsock)?;
        if self.closing && self.own.is_empty() {
            return Err(Gone);
        }
        Ok(more)
    }

    fn application_to_guest(
        &mut self,
        vsock: &mut Vsock,
        gate: &Gate,
        calls: &mut Vec<Call>,
    ) -> Result<(), Gone> {
        loop {
            // A client that does not read its answers is not listened to.
            if !self.flush_to_guest(vsock) || self.own.len() > MAX_OWN {
                return Ok(());
            }
            // The decoder is taken out for as long as a frame of its buffer is looked at.
            let mut decoder = std::mem::take(&mut self.from_app);
            let outcome = match decoder.next_frame() {
                Ok(Some(frame)) => {
                    self.on_application_frame(frame.header, frame.bytes, vsock, gate, calls).map(|()| true)
                }
                Ok(None) => Ok(false),
                Err(error) => Err(error),
            };
            self.from_app = decoder;
            match outcome {
                Ok(true) => {}
                Ok(false) if !self.readable => return Ok(()),
                Ok(false) => self.read_application()?,
                Err(error) => {
                    self.refuse(&Fatal::Protocol(error.to_string()));
                    return Ok(());
                }
            }
            if self.closing {
                return Ok(());
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
        vsock: &mut Vsock,
        gate: &Gate,
        calls: &mut Vec<Call>,
    ) -> Result<(), FrameError> {
        let payload = bytes.get(Header::SIZE..).unwrap_or_default();
        if !self.greeted {
            if header.kind != Kind::Hello {
                return Err(FrameError::Malformed { what: "Hello", why: "it must come first".into() });
            }
            match Hello::from_payload(payload)?.agree() {
                Ok(_) => self.greeted = true,
                Err(mismatch) => self.refuse(&Fatal::VersionMismatch { ours: mismatch.ours }),
            }
            return Ok(());
        }
        let role = header.kind.role();
        self.used |= !matches!(role, Role::Call | Role::Asks);
        match (role, header.kind) {
            (Role::Call, Kind::Request) => {
                let request = decode(payload)?;
                self.used |= request != Request::Status;
                calls.push(Call { session: header.session, request });
            }
            (Role::Opens | Role::Listens, _) => match gate {
                Gate::Closed(why) => self.say(Kind::Refused, header.session, why),
                Gate::Open if self.sessions.contains_key(&header.session) => {
                    self.say(Kind::Refused, header.session, &Refused::SessionInUse);
                }
                Gate::Open => {
                    self.sessions.insert(header.session, role);
                    self.forward(bytes, vsock);
                }
            },
            (Role::Asks, _) => match gate {
                Gate::Closed(why @ Refused::InvalidState { .. }) => {
                    self.say(Kind::Refused, header.session, why);
                }
                _ => self.forward(bytes, vsock),
            },
            (Role::Connection, Kind::Ping) => self.forward(bytes, vsock),
            (Role::ToGuest | Role::Both, _) => {
                // A frame for a session that has just ended is no mistake of the sender's.
                if self.sessions.contains_key(&header.session) {
                    self.forward(bytes, vsock);
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

    fn forward(&mut self, frame: &[u8], vsock: &mut Vsock) {
        let taken = match self.stream {
            Stream::Up(id) => vsock.send(id, frame),
            // The agent's Hello comes first; the frame waits.
            Stream::None | Stream::Greeting(_) => 0,
        };
        self.to_guest.extend_from_slice(frame.get(taken..).unwrap_or_default());
    }

    /// Sends what is left of a frame. Whether all of it went.
    fn flush_to_guest(&mut self, vsock: &mut Vsock) -> bool {
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

    /// Whether there may be more to forward after this turn.
    fn guest_to_application(&mut self, vsock: &mut Vsock) -> Result<bool, Gone> {
        if let Stream::Greeting(id) = self.stream {
            self.await_greeting(id, vsock)?;
        }
        let mut moved = 0;
        loop {
            if self.from_guest.at_boundary() && !self.flush_own()? {
                return Ok(false);
            }
            let Stream::Up(id) = self.stream else { return Ok(false) };
            if !self.writable || self.closing {
                return Ok(false);
            }
            let bytes = vsock.received(id);
            if bytes.is_empty() {
                return Ok(false);
            }
            if moved >= TURN {
                return Ok(true);
            }
            let Some(count) = write(&mut self.socket, bytes, &mut self.writable)? else { continue };
            let forwarded = bytes.get(..count).unwrap_or_default();
            let checked = check_agent(&mut self.from_guest, forwarded, &mut self.sessions);
            vsock.consume(id, count);
            moved += count;
            // The application was sent the same bytes and finds the same fault.
            checked?;
        }
    }

    fn await_greeting(&mut self, id: StreamId, vsock: &mut Vsock) -> Result<(), Gone> {
        const SIZE: usize = Header::SIZE + Hello::SIZE;
        let Some(frame) = vsock.received(id).first_chunk::<SIZE>() else { return Ok(()) };
        if *frame != Hello::OURS.to_frame() {
            return Err(Gone);
        }
        vsock.consume(id, SIZE);
        self.stream = Stream::Up(id);
        self.flush_to_guest(vsock);
        Ok(())
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

/// Looks at the headers in what came from the guest: takes sessions that end out of `sessions`, and finds what no
/// agent sends.
fn check_agent(
    scanner: &mut Scanner,
    bytes: &[u8],
    sessions: &mut HashMap<SessionId, Role>,
) -> Result<(), Gone> {
    let mut forbidden = false;
    let scanned = scanner.scan(bytes, |header| {
        if header.kind.ends_session() {
            sessions.remove(&header.session);
        } else {
            forbidden |= !agent_may_send(header.kind);
        }
    });
    if scanned.is_err() || forbidden { Err(Gone) } else { Ok(()) }
}

/// What an agent sends on a client's stream after its Hello.
fn agent_may_send(kind: Kind) -> bool {
    matches!(kind, Kind::Pong | Kind::Fatal) || matches!(kind.role(), Role::FromGuest | Role::Both)
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
    use cubby_vmm::devices::vsock::GuestCid;

    fn frame(kind: Kind, session: SessionId) -> Vec<u8> {
        let mut bytes = Vec::new();
        cubby_protocol::encode_raw(kind, session, b"x", &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn frames_that_an_agent_may_not_send_end_the_connection() {
        let mut allowed =
            vec![0x02, 0x04, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x4b, 0x61, 0x63, 0x64, 0x66, 0x69];
        // Those of files.
        allowed.extend([0x51, 0x52, 0x53, 0x54, 0x57, 0x58]);
        let mut seen = 0;
        for byte in 0..=u8::MAX {
            let Ok(kind) = Kind::try_from(byte) else { continue };
            // A good one before it, and all of it in pieces of any size.
            let session = SessionId::CONNECTION;
            let bytes = [frame(Kind::Pong, session), frame(kind, session)].concat();
            for size in 1..=bytes.len() {
                let (mut scanner, mut sessions) = (Scanner::default(), HashMap::new());
                let outcome: Result<(), Gone> =
                    bytes.chunks(size).try_for_each(|piece| check_agent(&mut scanner, piece, &mut sessions));
                assert_eq!(outcome.is_ok(), allowed.contains(&byte), "{kind:?} in pieces of {size}");
            }
            seen += usize::from(allowed.contains(&byte));
        }
        assert_eq!(seen, allowed.len());
        // Nor may it send what is no frame.
        let mut broken = frame(Kind::Stdout, SessionId::CONNECTION);
        broken[..4].fill(0xff);
        assert!(check_agent(&mut Scanner::default(), &broken, &mut HashMap::new()).is_err());
    }

    #[test]
    fn a_drain_waits_for_work_and_not_for_who_listens() {
        let mut client = Client::new(UnixStream::pair().unwrap().0);
        for kind in [Kind::Open, Kind::Subscribe, Kind::Emit] {
            client.sessions.insert(SessionId(kind as u32), kind.role());
        }
        assert_eq!((client.sessions(), client.working()), (3, 2));
    }

    #[test]
    fn to_look_at_a_sandbox_is_no_use_of_it() {
        let mut vsock = Vsock::new(GuestCid::try_from(3).unwrap());
        let mut client = Client::new(UnixStream::pair().unwrap().0);
        let mut used = |gate: &Gate, kind: Kind, message: Option<Request>| {
            let (mut bytes, session) = (Vec::new(), SessionId(kind as u32));
            match message {
                Some(request) => encode(kind, session, &request, &mut bytes).unwrap(),
                None if kind == Kind::Hello => bytes.extend(Hello::OURS.to_frame()),
                None => cubby_protocol::encode_raw(kind, session, &[], &mut bytes).unwrap(),
            }
            let header = Header::from_bytes(*bytes.first_chunk().unwrap()).unwrap();
            client.on_application_frame(header, &bytes, &mut vsock, gate, &mut Vec::new()).unwrap();
            (client.take_use(), client.sessions())
        };
        assert_eq!(used(&Gate::Open, Kind::Hello, None), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Measure, None), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Request, Some(Request::Status)), (false, 0));
        assert_eq!(used(&Gate::Open, Kind::Request, Some(Request::Touch)), (true, 0));
        assert_eq!(used(&Gate::Open, Kind::Ping, None), (true, 0));
        assert_eq!(used(&Gate::Open, Kind::Subscribe, None), (true, 1));
        let draining = Gate::Closed(Refused::Draining);
        assert_eq!(used(&draining, Kind::Emit, None), (true, 1));
        assert_eq!(used(&draining, Kind::Measure, None), (false, 1));
    }

    #[test]
    fn sessions_are_over_when_the_relay_sees_their_end_and_not_before() {
        let [one, two] = [SessionId(1), SessionId(2)];
        let (mut scanner, mut sessions) =
            (Scanner::default(), HashMap::from([one, two].map(|id| (id, Role::Opens))));
        let mut from_agent = |bytes: &[u8], left: &[SessionId]| {
            check_agent(&mut scanner, bytes, &mut sessions).unwrap();
            assert_eq!(sessions, left.iter().map(|id| (*id, Role::Opens)).collect());
        };
        from_agent(&frame(Kind::Stdout, one), &[one, two]);
        let end = frame(Kind::Exited, one);
        let (begin, rest) = end.split_at(Header::SIZE - 1);
        from_agent(begin, &[one, two]);
        from_agent(rest, &[two]);
        // One that is over, or never was, ends nothing.
        from_agent(&frame(Kind::Failed, one), &[two]);
        from_agent(&frame(Kind::Refused, two), &[]);
    }
}
