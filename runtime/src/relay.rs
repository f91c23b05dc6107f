//! The relay: the socket that clients connect to, and all who are connected.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use cubby_protocol::message::{Fatal, Reply};
use cubby_vmm::devices::vsock::{StreamId, Vsock};
use event_manager::{EventOps, Events};
use rustix::net::SocketFlags;
use vmm_sys_util::epoll::EventSet;

use crate::client::{Call, Client, Gate, Gone};

/// Names a client while it is connected.
pub(crate) type ClientId = u32;

/// A request of a client, to be answered with [`Relay::reply`].
pub(crate) struct Asked {
    pub(crate) client: ClientId,
    pub(crate) call: Call,
}

pub(crate) struct Relay {
    listener: UnixListener,
    clients: HashMap<ClientId, Client>,
    streams: HashMap<StreamId, ClientId>,
    /// Clients with something to do in this turn.
    awake: Vec<ClientId>,
    next_id: ClientId,
    max_clients: u16,
    agent_ready: bool,
    used: bool,
}

impl Relay {
    /// The event data of the listening socket; a client's is its id.
    pub(crate) const LISTENER: u32 = 0;

    /// Listens at `path`, which only the owner can open (the directory is 0700 and the socket 0600). Whoever
    /// records the end of the run removes it.
    pub(crate) fn listen(path: &Path, max_clients: u16) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        Ok(Self {
            listener,
            clients: HashMap::new(),
            streams: HashMap::new(),
            awake: Vec::new(),
            next_id: Self::LISTENER,
            max_clients,
            agent_ready: false,
            used: false,
        })
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Open sessions over all clients.
    pub(crate) fn sessions(&self) -> usize {
        self.clients.values().map(Client::sessions).sum()
    }

    /// Those of them that a drain waits for.
    pub(crate) fn working(&self) -> usize {
        self.clients.values().map(Client::working).sum()
    }

    pub(crate) fn clients(&self) -> u16 {
        u16::try_from(self.clients.len()).unwrap_or(u16::MAX)
    }

    /// The agent accepts streams from now on.
    pub(crate) fn set_agent_ready(&mut self, vsock: &mut Vsock) {
        self.agent_ready = true;
        for (id, client) in &mut self.clients {
            connect(*id, client, vsock, &mut self.streams);
            self.awake.push(*id);
        }
    }

    /// Something happened to a socket: a new client, or one that can go on.
    pub(crate) fn on_socket(&mut self, events: Events, ops: &mut EventOps, vsock: &mut Vsock) {
        let id = events.data();
        if id == Self::LISTENER {
            self.accept_all(ops, vsock);
        } else if let Some(client) = self.clients.get_mut(&id) {
            let set = events.event_set();
            let broken = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
            client.wake(set.contains(EventSet::IN) || broken, set.contains(EventSet::OUT) || broken);
            self.awake.push(id);
        }
    }

    /// Something happened to a stream. Whether it is a client's.
    pub(crate) fn on_stream(&mut self, stream: StreamId) {
        if let Some(id) = self.streams.get(&stream) {
            self.awake.push(*id);
        }
    }

    /// A stream is over: so is its client, whose agent has ended it.
    pub(crate) fn on_stream_closed(&mut self, stream: StreamId, ops: &mut EventOps) {
        if let Some(id) = self.streams.remove(&stream)
            && let Some(client) = self.clients.remove(&id)
        {
            forget(&client, ops);
        }
    }

    fn accept_all(&mut self, ops: &mut EventOps, vsock: &mut Vsock) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags).map(UnixStream::from) {
            if !is_owner(&socket) {
                continue;
            }
            let mut client = Client::new(socket);
            if self.clients() >= self.max_clients {
                client.turn_away(&Fatal::TooManyClients { max: self.max_clients });
                continue;
            }
            self.next_id = self.next_id.wrapping_add(1).max(1);
            let id = self.next_id;
            if ops.add(Events::with_data(client.socket(), id, interest(false))).is_err() {
                continue;
            }
            if self.agent_ready {
                connect(id, &mut client, vsock, &mut self.streams);
            }
            self.clients.insert(id, client);
            self.awake.push(id);
        }
    }

    /// Lets everybody who has something to do go on. Whether somebody still has.
    pub(crate) fn turn(
        &mut self,
        vsock: &mut Vsock,
        gate: &Gate,
        ops: &mut EventOps,
        asked: &mut Vec<Asked>,
    ) -> bool {
        let mut calls = Vec::new();
        for id in std::mem::take(&mut self.awake) {
            let Some(client) = self.clients.get_mut(&id) else { continue };
            let mut outcome = client.pump(vsock, gate, &mut calls);
            if let Some(for_room) = client.awaits_room()
                && ops.modify(Events::with_data(client.socket(), id, interest(for_room))).is_err()
            {
                outcome = Err(Gone);
            }
            match outcome {
                Ok(true) => self.awake.push(id),
                Ok(false) => {}
                Err(Gone) => self.remove(id, vsock, ops),
            }
            self.used |= self.clients.get_mut(&id).is_some_and(Client::take_use);
            asked.extend(calls.drain(..).map(|call| Asked { client: id, call }));
        }
        self.is_awake()
    }

    /// Whether somebody has used the sandbox since this was asked last. To look at it is no use.
    pub(crate) fn take_use(&mut self) -> bool {
        std::mem::take(&mut self.used)
    }

    /// Whether somebody has something to do without being woken.
    pub(crate) fn is_awake(&self) -> bool {
        !self.awake.is_empty()
    }

    fn remove(&mut self, id: ClientId, vsock: &mut Vsock, ops: &mut EventOps) {
        let Some(client) = self.clients.remove(&id) else { return };
        if let Some(stream) = client.stream() {
            self.streams.remove(&stream);
            vsock.reset(stream);
        }
        forget(&client, ops);
    }

    /// Answers a client that may be gone by now.
    pub(crate) fn reply(&mut self, asked: &Asked, reply: &Reply) {
        if let Some(client) = self.clients.get_mut(&asked.client)
            && !client.reply(asked.call.session, reply)
        {
            self.awake.push(asked.client);
        }
    }
}

/// What to be told of a client's socket. Of room only while it is full: whenever the application reads there is more room,
/// and each time that would be a turn of the event loop for nothing.
fn interest(for_room: bool) -> EventSet {
    let room = if for_room { EventSet::OUT } else { EventSet::empty() };
    EventSet::IN | EventSet::EDGE_TRIGGERED | room
}

fn connect(id: ClientId, client: &mut Client, vsock: &mut Vsock, streams: &mut HashMap<StreamId, ClientId>) {
    client.connect(vsock);
    if let Some(stream) = client.stream() {
        streams.insert(stream, id);
    }
}

fn forget(client: &Client, ops: &mut EventOps) {
    // Closing the descriptor would do as well; the event manager keeps a table of its own.
    let _ = ops.remove(Events::empty_raw(client.socket().as_raw_fd()));
}

/// Whether the other end belongs to the user who runs this process.
fn is_owner(socket: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}
