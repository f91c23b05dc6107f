//! Vsock ports for applications: a Unix socket of the host at one end, a port of the guest's world at the other, and bytes
//! between them.
//!
//! * A process of the guest that connects to a port of the host (CID 2) which the owner has named reaches the Unix socket that
//!   the owner has named for it.
//! * Who connects to the sandbox's port socket and writes `CONNECT PORT\n` reaches a listener of the guest. One line
//!   answers, `OK\n` or `ERR REASON\n`; what follows an `OK` is the guest's.
//!
//! Nobody's bytes pile up: of each pipe a read's worth waits for the guest, and in the device what it has credit for. An
//! end in one direction is passed on, and the other direction goes on. A socket that breaks off resets the guest's
//! stream; a reset of the guest closes the socket. The agent's own ports are neither's to reach. Pipes are no sessions: they hold
//! neither the idle time-out nor a drain, as connections over the network do not.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cubby_protocol::RESERVED_PORTS;
use cubby_state::VsockPort;
use cubby_vmm::devices::vsock::{How, Port, Reason, StreamId, Vsock, VsockEvent};
use event_manager::{EventOps, Events};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::epoll::EventSet;

use crate::relay::is_owner;

/// Pipes at once, each with a descriptor.
pub(crate) const MAX_PIPES: u16 = 256;

/// What is read of a socket at once.
const READ: usize = 64 << 10;

/// What one pipe moves before the others have their turn.
const TURN: usize = 256 << 10;

/// The longest line of who connects: the word, ten digits, an end.
const MAX_LINE: usize = 32;

/// The event data of the listening socket, and what that of all pipes' sockets begins with.
pub(crate) const LISTENER: u32 = FIRST - 1;
const FIRST: u32 = 0x8000_0000;
const LAST: u32 = 0xbfff_ffff;

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// The line that says where to has not come yet, or not all of it.
    Asking(Vec<u8>),
    /// The guest has not answered yet.
    Calling,
    Open,
}

struct Pipe {
    socket: UnixStream,
    stage: Stage,
    stream: Option<StreamId>,
    readable: bool,
    writable: bool,
    /// Bytes for the guest that its stream has not taken.
    waiting: Vec<u8>,
    /// The socket's end has been passed on, and the guest's.
    told_guest: bool,
    told_host: bool,
    /// The host, and the guest, has nothing more to say.
    host_ended: bool,
    guest_ended: bool,
}

/// A pipe that is over.
struct Over;

pub(crate) struct Pipes {
    listener: UnixListener,
    targets: HashMap<Port, PathBuf>,
    pipes: HashMap<u32, Pipe>,
    streams: HashMap<StreamId, u32>,
    /// Those with something to do.
    awake: Vec<u32>,
    next: u32,
    /// The guest can be called.
    is_ready: bool,
    scratch: Vec<u8>,
}

impl Pipes {
    /// Listens for those who call the guest. Whoever records the end of the run removes the socket.
    pub(crate) fn listen(path: &Path, ports: &[VsockPort]) -> io::Result<Self> {
        let listener = crate::relay::listen(path)?;
        Ok(Self {
            listener,
            targets: ports.iter().map(|port| (Port(port.port), port.path.clone())).collect(),
            pipes: HashMap::new(),
            streams: HashMap::new(),
            awake: Vec::new(),
            next: FIRST,
            is_ready: false,
            scratch: vec![0; READ],
        })
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Ports of the host that the guest may connect to.
    pub(crate) fn ports(&self) -> impl Iterator<Item = Port> {
        self.targets.keys().copied()
    }

    /// The guest runs.
    pub(crate) fn set_ready(&mut self) {
        self.is_ready = true;
    }

    /// Whether somebody has something to do without being woken.
    pub(crate) fn is_awake(&self) -> bool {
        !self.awake.is_empty()
    }

    /// Whether an event is of the listener or of a pipe's socket.
    pub(crate) fn is_ours(data: u32) -> bool {
        (LISTENER..=LAST).contains(&data)
    }

    /// Something has happened to a socket.
    pub(crate) fn on_socket(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == LISTENER {
            return self.accept_all(ops);
        }
        let Some(pipe) = self.pipes.get_mut(&events.data()) else { return };
        let set = events.event_set();
        let ended = set.intersects(EventSet::HANG_UP | EventSet::ERROR | EventSet::READ_HANG_UP);
        pipe.readable |= set.contains(EventSet::IN) || ended;
        pipe.writable |= set.contains(EventSet::OUT) || ended;
        self.awake.push(events.data());
    }

    fn accept_all(&mut self, ops: &mut EventOps) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags).map(UnixStream::from) {
            if !is_owner(&socket) {
                continue;
            }
            let refused = match (self.is_ready, self.has_room()) {
                (false, _) => Some("the guest is not ready"),
                (_, false) => Some("too many connections"),
                _ => None,
            };
            match refused {
                // An empty socket takes so few bytes at once.
                Some(why) => drop((&socket).write_all(format!("ERR {why}\n").as_bytes())),
                None => drop(self.add(socket, Stage::Asking(Vec::new()), None, ops)),
            }
        }
    }

    fn has_room(&self) -> bool {
        self.pipes.len() < usize::from(MAX_PIPES)
    }

    fn add(
        &mut self,
        socket: UnixStream,
        stage: Stage,
        stream: Option<StreamId>,
        ops: &mut EventOps,
    ) -> io::Result<()> {
        while self.pipes.contains_key(&self.next) {
            self.next = if self.next == LAST { FIRST } else { self.next + 1 };
        }
        let id = self.next;
        self.next = if id == LAST { FIRST } else { id + 1 };
        let all = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        ops.add(Events::with_data(&socket, id, all))
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        let pipe = Pipe {
            socket,
            stage,
            stream,
            readable: true,
            writable: true,
            waiting: Vec::new(),
            told_guest: false,
            told_host: false,
            host_ended: false,
            guest_ended: false,
        };
        self.pipes.insert(id, pipe);
        if let Some(stream) = stream {
            self.streams.insert(stream, id);
        }
        self.awake.push(id);
        Ok(())
    }

    /// A process of the guest has connected to one of the host's ports. If nobody listens where that leads, or there are
    /// too many, the guest's connection is reset.
    pub(crate) fn accept(&mut self, stream: StreamId, port: Port, vsock: &mut Vsock, ops: &mut EventOps) {
        let target = self.targets.get(&port).filter(|_| self.has_room());
        let connected = target.ok_or(ErrorKind::NotFound.into()).and_then(|path| connect(path));
        if connected.and_then(|socket| self.add(socket, Stage::Open, Some(stream), ops)).is_err() {
            vsock.reset(stream);
        }
    }

    /// Something has happened to a stream. Whether it is a pipe's.
    pub(crate) fn on_stream(&mut self, event: VsockEvent, ops: &mut EventOps) -> bool {
        let (VsockEvent::Connected(stream)
        | VsockEvent::Readable(stream)
        | VsockEvent::Writable(stream)
        | VsockEvent::PeerShutdown(stream, _)
        | VsockEvent::Closed(stream, _)) = event
        else {
            return false;
        };
        let Some(id) = self.streams.get(&stream).copied() else { return false };
        let Some(pipe) = self.pipes.get_mut(&id) else { return false };
        match event {
            VsockEvent::Connected(_) => {
                // An empty socket takes so few bytes at once.
                let _ = pipe.socket.write_all(b"OK\n");
                pipe.stage = Stage::Open;
            }
            VsockEvent::PeerShutdown(_, how) => {
                pipe.guest_ended |= how != How::Read;
                if how != How::Write {
                    // Nobody in the guest reads any more: whoever writes is to find out.
                    let _ = pipe.socket.shutdown(Shutdown::Read);
                }
            }
            VsockEvent::Closed(_, reason) => {
                if pipe.stage == Stage::Calling && reason == Reason::Refused {
                    let _ = pipe.socket.write_all(b"ERR nobody listens there\n");
                }
                self.streams.remove(&stream);
                self.remove(id, ops);
                return true;
            }
            _ => {}
        }
        self.awake.push(id);
        true
    }

    fn remove(&mut self, id: u32, ops: &mut EventOps) {
        if let Some(pipe) = self.pipes.remove(&id) {
            let _ = ops.remove(Events::empty_raw(pipe.socket.as_raw_fd()));
        }
    }

    /// Moves what can be moved. What is left over has its turn again.
    pub(crate) fn turn(&mut self, vsock: &mut Vsock, ops: &mut EventOps) {
        let mut awake = std::mem::take(&mut self.awake);
        awake.sort_unstable();
        awake.dedup();
        for id in awake {
            let Some(pipe) = self.pipes.get_mut(&id) else { continue };
            let known = pipe.stream;
            let outcome = pipe.pump(vsock, &mut self.scratch);
            if known.is_none()
                && let Some(stream) = pipe.stream
            {
                self.streams.insert(stream, id);
            }
            match outcome {
                Ok(true) => self.awake.push(id),
                Ok(false) => {}
                Err(Over) => {
                    if let Some(stream) = pipe.stream {
                        self.streams.remove(&stream);
                        vsock.reset(stream);
                    }
                    self.remove(id, ops);
                }
            }
        }
    }
}

impl Pipe {
    /// Whether there is more to move after this turn.
    fn pump(&mut self, vsock: &mut Vsock, scratch: &mut [u8]) -> Result<bool, Over> {
        if let Stage::Asking(_) = self.stage {
            self.ask(vsock)?;
        }
        let Some(stream) = self.stream.filter(|_| self.stage == Stage::Open) else { return Ok(false) };
        let from_host = self.feed_guest(stream, vsock, scratch)?;
        let from_guest = self.feed_host(stream, vsock)?;
        if self.told_guest && self.told_host {
            // The guest's kernel forgets the stream then, whatever its process still holds.
            vsock.shutdown(stream, How::Both);
        }
        Ok(from_host || from_guest)
    }

    /// Reads the line that says where to, byte by byte, for what follows it is the guest's.
    fn ask(&mut self, vsock: &mut Vsock) -> Result<(), Over> {
        let Stage::Asking(line) = &mut self.stage else { return Ok(()) };
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            match self.socket.read(&mut byte) {
                Ok(0) => return Err(Over),
                Ok(_) if line.len() < MAX_LINE => line.extend_from_slice(&byte),
                Ok(_) => return self.refuse("write CONNECT and a port"),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Over),
            }
        }
        let port = std::str::from_utf8(line).ok().and_then(|line| line.strip_prefix("CONNECT "));
        match port.and_then(|port| port.trim_end().parse().ok()) {
            None => self.refuse("write CONNECT and a port"),
            Some(port) if RESERVED_PORTS.contains(&port) => self.refuse("that port is the agent's"),
            Some(port) => match vsock.connect(Port(port)) {
                Ok(stream) => {
                    self.stream = Some(stream);
                    self.stage = Stage::Calling;
                    Ok(())
                }
                Err(_) => self.refuse("too many connections"),
            },
        }
    }

    fn refuse(&mut self, why: &str) -> Result<(), Over> {
        let _ = self.socket.write_all(format!("ERR {why}\n").as_bytes());
        // What is unread would make an error of the end.
        let _ = self.socket.read(&mut [0; 4096]);
        Err(Over)
    }

    fn feed_guest(&mut self, stream: StreamId, vsock: &mut Vsock, scratch: &mut [u8]) -> Result<bool, Over> {
        let mut moved = 0;
        loop {
            if !self.waiting.is_empty() {
                let taken = vsock.send(stream, &self.waiting);
                self.waiting.drain(..taken);
                if !self.waiting.is_empty() {
                    return Ok(false);
                }
            }
            if self.host_ended && !self.told_guest {
                self.told_guest = true;
                vsock.shutdown(stream, How::Write);
            }
            if !self.readable || self.host_ended {
                return Ok(false);
            }
            if moved >= TURN {
                return Ok(true);
            }
            match self.socket.read(scratch) {
                Ok(0) => self.host_ended = true,
                Ok(count) => {
                    let bytes = scratch.get(..count).unwrap_or_default();
                    moved += count;
                    let taken = vsock.send(stream, bytes);
                    self.waiting.extend_from_slice(bytes.get(taken..).unwrap_or_default());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Over),
            }
        }
    }

    fn feed_host(&mut self, stream: StreamId, vsock: &mut Vsock) -> Result<bool, Over> {
        let mut moved = 0;
        loop {
            let bytes = vsock.received(stream);
            if bytes.is_empty() {
                if self.guest_ended && !self.told_host {
                    self.told_host = true;
                    let _ = self.socket.shutdown(Shutdown::Write);
                }
                return Ok(false);
            }
            if !self.writable {
                return Ok(false);
            }
            if moved >= TURN {
                return Ok(true);
            }
            match self.socket.write(bytes) {
                Ok(count) => {
                    vsock.consume(stream, count);
                    moved += count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Over),
            }
        }
    }
}

/// Connects without waiting: a listener that has no room for one more has as good as refused.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}
