//! An agent of our own and a client to it. Every wait has a limit, after which the test fails.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cubby_protocol::message::{Credit, ExecFailed, Exited, Fatal, Open, Refused, Started};
use cubby_protocol::{Decoder, Hello, Kind, SessionId, decode, encode, encode_raw};

pub const LIMIT: Duration = Duration::from_secs(20);

/// A running agent; dropped, it is killed.
pub struct Agent {
    process: Child,
    pub socket: PathBuf,
}

impl Agent {
    pub fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("cubby-agent-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        // As a script starts what it does not wait for: with signals ignored.
        let process = Command::new("sh")
            .args(["-c", "trap '' HUP INT QUIT; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_cubby-agent")])
            .arg("--listen")
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, socket }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Connects as a process of the guest does that exchanges events.
    pub fn guest(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket.with_extension("sock.events")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Connects without saying anything.
    pub fn connect_raw(&self) -> Client {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    assert!(Instant::now() < deadline, "the agent does not listen");
                    std::thread::yield_now();
                }
                Err(error) => panic!("{error}"),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Client { stream, decoder: Decoder::default(), next: 1, waiting: HashMap::new() }
    }

    /// Connects and exchanges greetings.
    pub fn connect(&self) -> Client {
        let mut client = self.connect_raw();
        client.stream.write_all(&Hello::OURS.to_frame()).unwrap();
        let (kind, _, payload) = client.frame().unwrap();
        assert_eq!(kind, Kind::Hello);
        Hello::from_payload(&payload).unwrap().agree().unwrap();
        client
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(self.socket.with_extension("sock.events"));
    }
}

/// What a session came to.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    pub pid: Option<u32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub stdin_credit: u64,
    pub end: Option<End>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum End {
    Exited(Exited),
    Failed(ExecFailed),
    Refused(Refused),
}

pub struct Client {
    pub stream: UnixStream,
    decoder: Decoder,
    next: u32,
    waiting: HashMap<SessionId, Outcome>,
}

pub fn command(program: &str, args: &[&str]) -> Open {
    Open { program: program.into(), args: args.iter().map(|arg| (*arg).into()).collect(), ..Open::default() }
}

pub fn shell(script: &str) -> Open {
    command("sh", &["-c", script])
}

impl Client {
    /// The next frame, or `None` at end-of-file.
    pub fn frame(&mut self) -> Option<(Kind, SessionId, Vec<u8>)> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some((frame.header.kind, frame.header.session, frame.payload().to_vec()));
            }
            let space = self.decoder.space();
            match self.stream.read(space) {
                Ok(0) => return None,
                Ok(count) => self.decoder.filled(count),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no frame: {error}"),
            }
        }
    }

    /// All that comes before the answer to a ping.
    pub fn frames_until_pong(&mut self) -> Vec<(Kind, SessionId, Vec<u8>)> {
        self.send_raw(Kind::Ping, SessionId(0), b"until");
        let next = || self.frame().filter(|(kind, _, _)| *kind != Kind::Pong);
        std::iter::from_fn(next).collect()
    }

    pub fn send<M: serde::Serialize>(&mut self, kind: Kind, session: SessionId, message: &M) {
        let mut bytes = Vec::new();
        encode(kind, session, message, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    pub fn send_raw(&mut self, kind: Kind, session: SessionId, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode_raw(kind, session, payload, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// A session's number that was not used yet.
    pub fn fresh(&mut self) -> SessionId {
        self.next += 1;
        SessionId(self.next - 1)
    }

    pub fn open(&mut self, open: &Open) -> SessionId {
        let id = self.fresh();
        self.waiting.insert(id, Outcome::default());
        self.send(Kind::Open, id, open);
        id
    }

    /// Takes one frame into the outcomes; output is credited at once. False at the connection's end.
    pub fn turn(&mut self) -> bool {
        let Some((kind, id, payload)) = self.frame() else { return false };
        let outcome = self.waiting.entry(id).or_default();
        match kind {
            Kind::Started => outcome.pid = Some(decode::<Started>(&payload).unwrap().pid),
            Kind::Stdout | Kind::Stderr => {
                let target = if kind == Kind::Stdout { &mut outcome.stdout } else { &mut outcome.stderr };
                target.extend_from_slice(&payload);
                self.send(Kind::Credit, id, &Credit { bytes: payload.len().try_into().unwrap() });
            }
            Kind::Credit => outcome.stdin_credit += u64::from(decode::<Credit>(&payload).unwrap().bytes),
            Kind::Exited => outcome.end = Some(End::Exited(decode(&payload).unwrap())),
            Kind::Failed => outcome.end = Some(End::Failed(decode(&payload).unwrap())),
            Kind::Refused => outcome.end = Some(End::Refused(decode(&payload).unwrap())),
            kind => panic!("unexpected {kind:?} for {id:?}"),
        }
        true
    }

    pub fn until(&mut self, id: SessionId, done: impl Fn(&Outcome) -> bool) -> Outcome {
        loop {
            let outcome = self.waiting.get(&id).unwrap();
            if done(outcome) {
                return outcome.clone();
            }
            assert!(outcome.end.is_none(), "session is over: {outcome:?}");
            assert!(self.turn(), "the agent closed the connection");
        }
    }

    pub fn wait(&mut self, id: SessionId) -> Outcome {
        self.until(id, |outcome| outcome.end.is_some())
    }

    pub fn run(&mut self, open: &Open) -> Outcome {
        let id = self.open(open);
        self.wait(id)
    }

    /// Reads to the end of the connection and returns the reason the agent gave.
    pub fn fatal(&mut self) -> Fatal {
        let mut reason = None;
        while let Some((kind, _, payload)) = self.frame() {
            if kind == Kind::Fatal {
                reason = Some(decode(&payload).unwrap());
            }
        }
        reason.expect("the agent closed without a reason")
    }
}

impl Outcome {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn code(&self) -> i32 {
        match self.end {
            Some(End::Exited(Exited::Code(code))) => code,
            _ => panic!("not an exit code: {self:?}"),
        }
    }

    pub fn failure(&self) -> &ExecFailed {
        match &self.end {
            Some(End::Failed(failed)) => failed,
            _ => panic!("not a failure: {self:?}"),
        }
    }
}

/// Waits until no process has this number, or it is a zombie that somebody else has to reap.
pub fn wait_gone(pid: u32) {
    let deadline = Instant::now() + LIMIT;
    while let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')) {
            return;
        }
        assert!(Instant::now() < deadline, "process {pid} lives on");
        std::thread::yield_now();
    }
}
