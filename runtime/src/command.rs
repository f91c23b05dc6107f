//! A session that runs a command, as the relay knows it: what it is, the newest of its output, and, once it is detached,
//! the clients that are attached to it.
//!
//! A detached session's flow is the relay's. Output goes to all views, at the pace of the slowest of them, and with
//! none it runs free. Input of all views goes to the guest in the order in which it came, as far as the guest takes it.
//! The guest holds to its window or is found out: no view holds more than [`MAX_HELD_PIECES`] allows.

use std::collections::VecDeque;

use cubby_protocol::message::{Credit, ExecFailed, Exited, Open, SessionEnd, SessionInfo, Started};
use cubby_protocol::{CHUNK, INITIAL_WINDOW, Kind, SessionId, decode, encode, encode_raw};

use crate::backlog::{Backlog, Quota};
use crate::machine::realtime_ns;

/// How much of a session's output whoever attaches gets to see, in bytes.
pub(crate) const HISTORY: usize = 256 << 10;

/// Pieces of output that a view may hold: those of a guest that keeps to its window and does not write bytes to two
/// streams in turn just to make many.
const MAX_HELD_PIECES: usize = 64 << 10;

const WINDOW: u64 = INITIAL_WINDOW as u64;

/// A client's way into a detached session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ViewId {
    /// The client.
    pub(crate) client: u32,
    /// What the session is called on that client's connection.
    pub(crate) session: SessionId,
}

#[derive(Debug)]
struct View {
    id: ViewId,
    /// Output that the client has not been sent.
    held: Backlog,
    /// How much it may be sent.
    window: u64,
    /// How much input it may send.
    input: u64,
    /// Input taken for which it was given no credit back.
    owed: u32,
    /// Whether it knows that the command has started.
    started: bool,
}

/// How far a client's view has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// There is nothing to send now.
    Idle,
    /// There is more.
    More,
    /// The end has been sent.
    Over,
}

/// The client sent more input than it may.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overrun;

#[derive(Debug)]
pub(crate) struct Command {
    session: SessionId,
    words: Vec<String>,
    tty: bool,
    started_ns: u64,
    pid: Option<u32>,
    detached: bool,
    history: Backlog,
    /// Bytes of output that came.
    sent: u64,
    /// Bytes of output that the guest may have sent by now.
    granted: u64,
    /// Bytes of input that the guest takes.
    room: u64,
    views: Vec<View>,
    input: VecDeque<(ViewId, Vec<u8>)>,
    /// The input is to end, or has ended.
    closing: bool,
    closed: bool,
    /// The frame that ends it.
    end: Option<(Kind, Vec<u8>)>,
}

impl Command {
    /// One that a client has just asked for.
    pub(crate) fn new(session: SessionId, open: Open, quota: &Quota) -> Box<Self> {
        Box::new(Self {
            session,
            words: shorten(open.program, open.args),
            tty: open.tty.is_some(),
            started_ns: realtime_ns(),
            pid: None,
            detached: false,
            history: Backlog::new(quota),
            sent: 0,
            granted: WINDOW,
            room: WINDOW,
            views: Vec::new(),
            input: VecDeque::new(),
            closing: false,
            closed: false,
            end: None,
        })
    }

    pub(crate) fn session(&self) -> SessionId {
        self.session
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.detached
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.tty
    }

    pub(crate) fn detach(&mut self) {
        self.detached = true;
    }

    /// What is told of it.
    pub(crate) fn info(&self) -> SessionInfo {
        let owner = u32::from(!self.detached && self.end.is_none());
        SessionInfo {
            session: self.session.0,
            command: self.words.clone(),
            started_ns: self.started_ns,
            pid: self.pid,
            tty: self.tty,
            detached: self.detached,
            attached: owner + u32::try_from(self.views.len()).unwrap_or(u32::MAX),
            end: self.end.as_ref().and_then(|(kind, payload)| match kind {
                Kind::Exited => decode::<Exited>(payload).ok().map(SessionEnd::Exited),
                _ => decode::<ExecFailed>(payload).ok().map(SessionEnd::Failed),
            }),
        }
    }

    /// What its own client, which has it as long as it is not detached, sends to the guest.
    pub(crate) fn on_owner_frame(&mut self, kind: Kind, payload: &[u8]) {
        match kind {
            Kind::Stdin => self.room = self.room.saturating_sub(payload.len() as u64),
            Kind::StdinClose => (self.closing, self.closed) = (true, true),
            Kind::Credit => {
                let bytes = decode::<Credit>(payload).map_or(0, |credit| credit.bytes);
                self.granted = self.granted.saturating_add(bytes.into());
            }
            _ => {}
        }
    }

    /// Some of its output.
    pub(crate) fn on_output(&mut self, kind: Kind, bytes: &[u8]) {
        self.sent = self.sent.saturating_add(bytes.len() as u64);
        self.history.push(kind, bytes);
        self.history.trim(HISTORY);
        for view in &mut self.views {
            view.held.push(kind, bytes);
        }
    }

    /// A message of the guest's that ends nothing.
    pub(crate) fn on_message(&mut self, kind: Kind, payload: &[u8]) {
        match kind {
            Kind::Started => self.pid = decode::<Started>(payload).ok().map(|started| started.pid),
            Kind::Credit => {
                let bytes = decode::<Credit>(payload).map_or(0, |credit| credit.bytes);
                self.room = self.room.saturating_add(bytes.into()).min(2 * WINDOW);
            }
            _ => {}
        }
    }

    /// It is over.
    pub(crate) fn on_end(&mut self, kind: Kind, payload: &[u8]) {
        self.end = Some((kind, payload.to_vec()));
        self.input.clear();
    }

    /// It is over without the guest's word for it.
    pub(crate) fn on_lost(&mut self) {
        const SIGKILL: i32 = 9;
        let mut frame = Vec::new();
        // Two numbers always fit.
        let _ = encode(Kind::Exited, self.session, &Exited::Signal(SIGKILL), &mut frame);
        self.on_end(Kind::Exited, frame.get(cubby_protocol::Header::SIZE..).unwrap_or_default());
    }

    /// Lets a client in. It gets what is kept of the output, and then what follows.
    pub(crate) fn attach(&mut self, id: ViewId) {
        let held = self.history.copy(&Quota::default());
        let view = View { id, held, window: WINDOW, input: WINDOW, owed: 0, started: false };
        self.views.push(view);
    }

    /// A client is gone, or has had enough.
    pub(crate) fn leave(&mut self, id: ViewId) {
        self.views.retain(|view| view.id != id);
    }

    /// Whose views there are.
    pub(crate) fn viewers(&self) -> impl Iterator<Item = u32> {
        self.views.iter().map(|view| view.id.client)
    }

    /// The views that hold more than a guest can have sent that keeps to the protocol; they are gone.
    pub(crate) fn overrun(&mut self) -> Vec<ViewId> {
        let over = |view: &View| {
            view.held.pieces() > MAX_HELD_PIECES || view.held.len() > HISTORY + 2 * INITIAL_WINDOW as usize
        };
        let lost = self.views.iter().filter(|view| over(view)).map(|view| view.id).collect();
        self.views.retain(|view| !over(view));
        lost
    }

    /// The client takes so much more output.
    pub(crate) fn on_credit(&mut self, id: ViewId, bytes: u32) {
        if let Some(view) = self.view(id) {
            view.window = view.window.saturating_add(bytes.into()).min(WINDOW);
        }
    }

    /// Input of a client.
    pub(crate) fn on_input(&mut self, id: ViewId, bytes: &[u8]) -> Result<(), Overrun> {
        let gone = self.closing || self.end.is_some();
        let Some(view) = self.view(id) else { return Ok(()) };
        view.input = view.input.checked_sub(bytes.len() as u64).ok_or(Overrun)?;
        if gone {
            view.owed = view.owed.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        } else if !bytes.is_empty() {
            self.input.push_back((id, bytes.to_vec()));
        }
        Ok(())
    }

    /// The input is to end, after what came before.
    pub(crate) fn on_input_close(&mut self) {
        self.closing = true;
    }

    fn view(&mut self, id: ViewId) -> Option<&mut View> {
        self.views.iter_mut().find(|view| view.id == id)
    }

    /// Adds the frames that go to the guest now: input that it takes, and leave to send more.
    pub(crate) fn settle(&mut self, out: &mut Vec<u8>) {
        if !self.detached || self.end.is_some() {
            return;
        }
        while self.room > 0
            && let Some((id, bytes)) = self.input.front_mut()
        {
            let (id, count) = (*id, bytes.len().min(CHUNK).min(usize::try_from(self.room).unwrap_or(CHUNK)));
            let rest = bytes.split_off(count);
            // A chunk always fits into a frame.
            let _ = encode_raw(Kind::Stdin, self.session, bytes, out);
            if rest.is_empty() {
                self.input.pop_front();
            } else {
                *bytes = rest;
            }
            self.room -= count as u64;
            if let Some(view) = self.view(id) {
                view.owed = view.owed.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            }
        }
        if self.closing && !self.closed && self.input.is_empty() {
            self.closed = true;
            let _ = encode_raw(Kind::StdinClose, self.session, &[], out);
        }
        let slowest = self.views.iter().map(|view| view.window.saturating_sub(view.held.len() as u64)).min();
        let allowed = self.sent + slowest.unwrap_or(WINDOW);
        // Not each byte is worth a frame.
        if let Some(bytes @ QUARTER..) = allowed.checked_sub(self.granted) {
            self.granted = allowed;
            let credit = Credit { bytes: u32::try_from(bytes).unwrap_or(u32::MAX) };
            let _ = encode(Kind::Credit, self.session, &credit, out);
        }
    }

    /// Adds what a view has to say to its client, about `most` bytes.
    pub(crate) fn serve(&mut self, id: ViewId, out: &mut Vec<u8>, most: usize) -> Served {
        let (pid, end) = (self.pid, &self.end);
        let Some(view) = self.views.iter_mut().find(|view| view.id == id) else { return Served::Over };
        if let (Some(pid), false) = (pid, view.started) {
            view.started = true;
            let _ = encode(Kind::Started, id.session, &Started { pid }, out);
        }
        if u64::from(view.owed) >= QUARTER {
            view.input += u64::from(view.owed);
            let credit = Credit { bytes: std::mem::take(&mut view.owed) };
            let _ = encode(Kind::Credit, id.session, &credit, out);
        }
        while out.len() < most {
            let allowed = usize::try_from(view.window).unwrap_or(usize::MAX);
            let taken = view.held.take(allowed, |kind, bytes| {
                let _ = encode_raw(kind, id.session, bytes, out);
            });
            let Some(taken) = taken else { break };
            view.window -= taken as u64;
        }
        if !view.held.is_empty() {
            return if view.window > 0 { Served::More } else { Served::Idle };
        }
        let Some((kind, payload)) = end else { return Served::Idle };
        // It came in a frame, and goes in one.
        let _ = encode_raw(*kind, id.session, payload, out);
        self.leave(id);
        Served::Over
    }
}

/// Credit is given by the quarter of a window, as the other ends do.
const QUARTER: u64 = WINDOW / 4;

/// As much of a command as is told of it.
fn shorten(program: String, args: Vec<String>) -> Vec<String> {
    let mut left = SessionInfo::MAX_COMMAND;
    let fits = |word: &mut String| {
        let end = word.floor_char_boundary(left);
        let whole = end == word.len();
        word.truncate(end);
        left -= end;
        whole
    };
    let mut words: Vec<String> = std::iter::once(program).chain(args).collect();
    let whole = words.iter_mut().map(fits).take_while(|whole| *whole).count();
    words.truncate(whole + 1);
    words
}

#[cfg(test)]
mod tests {
    use cubby_protocol::Decoder;

    use super::*;

    const ONE: ViewId = ViewId { client: 1, session: SessionId(16) };
    const TWO: ViewId = ViewId { client: 2, session: SessionId(33) };

    fn detached() -> Box<Command> {
        let open = Open { program: "cat".into(), args: vec!["-".into()], ..Open::default() };
        let mut command = Command::new(SessionId(7), open, &Quota::default());
        command.detach();
        command
    }

    fn frames(bytes: &[u8]) -> Vec<(Kind, SessionId, Vec<u8>)> {
        let (mut decoder, mut all) = (Decoder::default(), Vec::new());
        decoder.push(bytes);
        while let Some(frame) = decoder.next_frame().unwrap() {
            all.push((frame.header.kind, frame.header.session, frame.payload().to_vec()));
        }
        assert!(!decoder.is_mid_frame());
        all
    }

    fn credit(bytes: &[u8]) -> u32 {
        let credits = frames(bytes).into_iter().filter(|(kind, ..)| *kind == Kind::Credit);
        credits.map(|(_, _, payload)| decode::<Credit>(&payload).unwrap().bytes).sum()
    }

    /// All that a view has to say now.
    fn told(command: &mut Command, id: ViewId) -> Vec<(Kind, SessionId, Vec<u8>)> {
        let mut out = Vec::new();
        while command.serve(id, &mut out, usize::MAX) == Served::More {}
        frames(&out)
    }

    #[test]
    fn whoever_attaches_gets_what_was_what_is_and_the_end() {
        let mut command = detached();
        command.on_message(Kind::Started, &[9]);
        command.on_output(Kind::Stdout, b"before");
        command.attach(ONE);
        command.on_output(Kind::Stderr, b"after");
        let started = |id: ViewId| (Kind::Started, id.session, vec![9]);
        let rest = [(Kind::Stdout, b"before".to_vec()), (Kind::Stderr, b"after".to_vec())];
        let expected = |id: ViewId| {
            let rest = rest.clone().map(|(kind, bytes)| (kind, id.session, bytes));
            [vec![started(id)], rest.into()].concat()
        };
        assert_eq!(told(&mut command, ONE), expected(ONE));
        command.on_end(Kind::Exited, &[0, 4]);
        assert_eq!(told(&mut command, ONE), [(Kind::Exited, ONE.session, vec![0, 4])]);
        // And whoever comes too late, as well.
        command.attach(TWO);
        let end = (Kind::Exited, TWO.session, vec![0, 4]);
        assert_eq!(told(&mut command, TWO), [expected(TWO), vec![end]].concat());
        assert_eq!(command.info().attached, 0);
        assert_eq!(command.info().end, Some(SessionEnd::Exited(Exited::Code(2))));
    }

    #[test]
    fn without_readers_it_runs_free_and_with_them_it_goes_at_the_pace_of_the_slowest() {
        let mut command = detached();
        let mut allowed = WINDOW;
        let mut write = |command: &mut Command, bytes: usize| {
            command.on_output(Kind::Stdout, &vec![b'x'; bytes]);
            let mut out = Vec::new();
            command.settle(&mut out);
            allowed = allowed - bytes as u64 + u64::from(credit(&out));
            allowed
        };
        for _ in 0..100 {
            assert!(write(&mut command, CHUNK) > 3 * QUARTER, "it is held up by nobody");
        }
        command.attach(ONE);
        command.attach(TWO);
        let held: usize = command.history.len();
        // One of them reads all that it may, the other nothing.
        let mut written = 0;
        while write(&mut command, 0) > CHUNK as u64 {
            write(&mut command, CHUNK);
            written += CHUNK;
            let taken: usize = told(&mut command, ONE).iter().map(|(.., bytes)| bytes.len()).sum();
            command.on_credit(ONE, taken.try_into().unwrap());
        }
        assert!(written <= INITIAL_WINDOW as usize, "{written} bytes went past a reader that is not there");
        assert!(command.overrun().is_empty(), "what it has to hold is bounded");
        assert_eq!(command.views[1].held.len(), held + written);
        // The other one leaves, and it goes on.
        command.leave(TWO);
        assert!(write(&mut command, 0) > 2 * QUARTER);
    }

    #[test]
    fn a_view_is_not_sent_more_than_its_window() {
        let mut command = detached();
        command.attach(ONE);
        command.on_output(Kind::Stdout, &vec![b'x'; INITIAL_WINDOW as usize]);
        command.on_output(Kind::Stdout, b"and more");
        let sum = |frames: Vec<(Kind, SessionId, Vec<u8>)>| -> usize {
            frames.iter().map(|(.., bytes)| bytes.len()).sum()
        };
        assert_eq!(sum(told(&mut command, ONE)), INITIAL_WINDOW as usize);
        let mut out = Vec::new();
        assert_eq!(command.serve(ONE, &mut out, usize::MAX), Served::Idle);
        command.on_credit(ONE, 3);
        assert_eq!(sum(told(&mut command, ONE)), 3);
    }

    #[test]
    fn a_guest_that_sends_more_than_it_may_loses_its_viewer() {
        let mut command = detached();
        command.attach(ONE);
        command.attach(TWO);
        for n in 0..2 * MAX_HELD_PIECES {
            command.on_output(if n % 2 == 0 { Kind::Stdout } else { Kind::Stderr }, b"x");
            told(&mut command, TWO);
            command.on_credit(TWO, 1);
            if command.overrun() == [ONE] {
                assert_eq!(command.viewers().collect::<Vec<_>>(), [TWO.client]);
                return;
            }
        }
        panic!("it holds without bound");
    }

    #[test]
    fn input_goes_in_its_order_as_far_as_the_guest_takes_it() {
        let mut command = detached();
        command.attach(ONE);
        command.attach(TWO);
        let half = vec![b'1'; INITIAL_WINDOW as usize / 2];
        command.on_input(ONE, &half).unwrap();
        command.on_input(TWO, b"two").unwrap();
        command.on_input(ONE, &half).unwrap();
        command.on_input_close();
        assert_eq!(command.on_input(ONE, b"!"), Err(Overrun), "it is beyond its window");
        let mut out = Vec::new();
        command.settle(&mut out);
        let sent = |out: &[u8]| -> Vec<u8> {
            let input = frames(out).into_iter().filter(|(kind, ..)| *kind == Kind::Stdin);
            input.flat_map(|(.., bytes)| bytes).collect()
        };
        let all = [&half[..], b"two", &half].concat();
        assert_eq!(sent(&out), all[..INITIAL_WINDOW as usize]);
        assert!(!frames(&out).iter().any(|(kind, ..)| *kind == Kind::StdinClose));
        // The guest takes more, and what was taken may be sent again.
        command.on_message(Kind::Credit, &[251, 0, 4]);
        out.clear();
        command.settle(&mut out);
        assert_eq!(sent(&out), all[INITIAL_WINDOW as usize..]);
        assert!(frames(&out).iter().any(|(kind, ..)| *kind == Kind::StdinClose));
        out.clear();
        command.serve(ONE, &mut out, usize::MAX);
        assert_eq!(credit(&out), INITIAL_WINDOW);
    }

    #[test]
    fn long_commands_are_told_in_part() {
        let long =
            |words: &[&str]| shorten(words[0].into(), words[1..].iter().map(|&word| word.into()).collect());
        assert_eq!(long(&["sh", "-c", "true"]), ["sh", "-c", "true"]);
        let shortened = long(&["x", &"ü".repeat(300), "never told"]);
        assert_eq!((shortened.len(), shortened.concat().len()), (2, 511));
    }
}
