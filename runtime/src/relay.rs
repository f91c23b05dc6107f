//! The relay: the socket that clients connect to, and all who are connected.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use cubby_protocol::message::{Fatal, NetworkEvent, Refused, Reply, Welcome};
use cubby_vmm::devices::vsock::{StreamId, Vsock};
use event_manager::{EventOps, Events};
use rustix::net::SocketFlags;
use vmm_sys_util::epoll::EventSet;

use crate::backlog::Quota;
use crate::client::{Call, Client, Deed, Gate, Gone, Turn};
use crate::detached::Ended;
use crate::output_log::OutputLog;
use crate::upstream::{Notes, Upstream};

/// Names a client while it is connected.
pub(crate) type ClientId = u32;

/// A request of a client, to be answered with [`Relay::reply`].
pub(crate) struct Asked {
    pub(crate) client: ClientId,
    pub(crate) call: Call,
}

pub(crate) struct Relay {
    listener: UnixListener,
    pub(crate) clients: BTreeMap<ClientId, Client>,
    /// Each client's stream. It outlives its client for a detached session.
    pub(crate) upstreams: BTreeMap<ClientId, Upstream>,
    streams: BTreeMap<StreamId, ClientId>,
    pub(crate) ended: Ended,
    quota: Quota,
    notes: Notes,
    /// The largest number of a session so far.
    newest_session: u32,
    /// Clients with something to do in this turn.
    awake: Vec<ClientId>,
    next_id: ClientId,
    max_clients: u16,
    agent_ready: bool,
    used: bool,
    /// Whether the guest has a network that can be watched.
    has_network: bool,
}

impl Relay {
    /// The event data of the listening socket; a client's is its id.
    pub(crate) const LISTENER: u32 = 0;

    /// Listens at `path`, which only the owner can open (the directory is 0700 and the socket 0600). Whoever
    /// records the end of the run removes it.
    pub(crate) fn listen(path: &Path, max_clients: u16, log: OutputLog) -> io::Result<Self> {
        Ok(Self {
            listener: self::listen(path)?,
            clients: BTreeMap::new(),
            upstreams: BTreeMap::new(),
            streams: BTreeMap::new(),
            ended: Ended::default(),
            quota: Quota::default(),
            notes: Notes::new(log),
            newest_session: 0,
            awake: Vec::new(),
            next_id: Self::LISTENER,
            max_clients,
            agent_ready: false,
            used: false,
            has_network: false,
        })
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where the output of all sessions is kept.
    pub(crate) fn log(&mut self) -> &mut OutputLog {
        &mut self.notes.log
    }

    /// Open sessions over all clients, and those without one.
    pub(crate) fn sessions(&self) -> usize {
        self.upstreams.values().map(Upstream::sessions).sum()
    }

    /// Those of them that a drain waits for.
    pub(crate) fn working(&self) -> usize {
        self.upstreams.values().map(Upstream::working).sum()
    }

    pub(crate) fn clients(&self) -> u16 {
        u16::try_from(self.clients.len()).unwrap_or(u16::MAX)
    }

    /// The guest has a network.
    pub(crate) fn set_network(&mut self) {
        self.has_network = true;
    }

    /// Whether somebody wants to hear of it.
    pub(crate) fn listens(&self) -> bool {
        self.clients.values().any(|client| !client.watches.is_empty())
    }

    /// Something has happened in the guest's network.
    pub(crate) fn on_network(&mut self, events: impl IntoIterator<Item = NetworkEvent>) {
        let listeners = || self.clients.iter().filter(|(_, client)| !client.watches.is_empty());
        self.awake.extend(listeners().map(|(id, _)| *id));
        for event in events.into_iter().map(Arc::new) {
            self.clients.values_mut().for_each(|client| client.watches.push(&event));
        }
    }

    /// The agent accepts streams from now on.
    pub(crate) fn set_agent_ready(&mut self, vsock: &mut Vsock) {
        self.agent_ready = true;
        for id in self.clients.keys().copied().collect::<Vec<_>>() {
            self.connect(id, vsock);
        }
    }

    fn connect(&mut self, id: ClientId, vsock: &mut Vsock) {
        if let (Some(client), Some(up)) = (self.clients.get_mut(&id), self.upstreams.get_mut(&id)) {
            client.connect(up, vsock);
            if let Some(stream) = up.stream() {
                self.streams.insert(stream, id);
            }
        }
        self.wake(id);
    }

    /// Somebody has something to do in this turn.
    pub(crate) fn wake(&mut self, id: ClientId) {
        self.awake.push(id);
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
        let Some(id) = self.streams.remove(&stream) else { return };
        self.forget(id, ops);
        for command in self.upstreams.remove(&id).into_iter().flat_map(Upstream::lose) {
            self.awake.extend(command.viewers());
            self.ended.remember(command);
        }
    }

    fn accept_all(&mut self, ops: &mut EventOps, vsock: &mut Vsock) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags).map(UnixStream::from) {
            if !is_owner(&socket) {
                continue;
            }
            let client = Client::new(socket, self.numbers());
            if self.clients() >= self.max_clients {
                client.turn_away(&Fatal::TooManyClients { max: self.max_clients });
                continue;
            }
            // The upper half is that of pipes.
            self.next_id = (self.next_id.wrapping_add(1) & (u32::MAX >> 2)).max(1);
            let id = self.next_id;
            if ops.add(Events::with_data(client.socket(), id, interest(false))).is_err() {
                continue;
            }
            self.clients.insert(id, client);
            self.upstreams.insert(id, Upstream::new());
            if self.agent_ready {
                self.connect(id, vsock);
            }
            self.wake(id);
        }
    }

    /// Numbers for the sessions of a new client, beyond all that were there and apart from those of all that are.
    fn numbers(&self) -> Welcome {
        let step = u32::from(self.max_clients.max(1));
        let taken = |place: &u32| self.clients.values().any(|client| client.numbers().first % step == *place);
        let place = (0..step).find(|place| !taken(place)).unwrap_or(0);
        let begin = self.newest_session / step + 1;
        let first = begin.checked_mul(step).and_then(|begin| begin.checked_add(place));
        Welcome { first: first.unwrap_or(step + place), step }
    }

    /// Lets everybody who has something to do go on. Whether somebody still has.
    pub(crate) fn turn(
        &mut self,
        vsock: &mut Vsock,
        gate: &Gate,
        ops: &mut EventOps,
        asked: &mut Vec<Asked>,
    ) -> bool {
        for id in std::mem::take(&mut self.awake) {
            let Some(up) = self.upstreams.get_mut(&id) else { continue };
            let Some(client) = self.clients.get_mut(&id) else {
                let over = up.absorb(vsock, &mut self.notes).is_err() || up.detached() == 0;
                self.take_notes();
                if over {
                    self.drop_stream(id, vsock);
                }
                continue;
            };
            let (notes, quota) = (&mut self.notes, &self.quota);
            let mut turn = Turn { vsock, gate, quota, notes, deeds: Vec::new() };
            let outcome = client.pump(up, &mut turn);
            let deeds = turn.deeds;
            self.used |= client.take_use();
            self.newest_session = self.newest_session.max(client.newest);
            self.take_notes();
            // What is said to that goes out in its next turn.
            let answered = !deeds.is_empty();
            for deed in deeds {
                match deed {
                    Deed::Call(call) => asked.push(Asked { client: id, call }),
                    Deed::Attach { session, to } => self.attach(id, session, to),
                    Deed::Watch { session } => {
                        if let Some(client) = self.clients.get_mut(&id) {
                            match self.has_network {
                                true => client.watch(session),
                                false => client.refuse_session(session, &Refused::NoNetwork),
                            }
                        }
                    }
                    Deed::View { session, kind, payload } => {
                        self.on_view_frame(id, session, kind, &payload, vsock);
                    }
                }
            }
            match outcome {
                Ok(more) => {
                    if self.serve(id) || more || answered {
                        self.wake(id);
                    }
                    // All that this turn has written is written.
                    if let Some(client) = self.clients.get_mut(&id)
                        && let Some(for_room) = client.awaits_room()
                        && ops.modify(Events::with_data(client.socket(), id, interest(for_room))).is_err()
                    {
                        self.remove(id, vsock, ops);
                    }
                }
                Err(Gone) => self.remove(id, vsock, ops),
            }
        }
        // Who has been woken by many is woken once.
        self.awake.sort_unstable();
        self.awake.dedup();
        self.is_awake()
    }

    /// Whether somebody has used the sandbox since this was asked last. To look at it is no use.
    pub(crate) fn take_use(&mut self) -> bool {
        std::mem::take(&mut self.used)
    }

    /// Does what a stream's bytes have brought up for others.
    fn take_notes(&mut self) {
        self.awake.append(&mut self.notes.awake);
        for command in std::mem::take(&mut self.notes.ended) {
            self.ended.remember(command);
        }
        for view in std::mem::take(&mut self.notes.lost) {
            if let Some(client) = self.clients.get_mut(&view.client) {
                client.refuse_session(view.session, &Refused::Overrun);
            }
            self.wake(view.client);
        }
    }

    /// Whether somebody has something to do without being woken.
    pub(crate) fn is_awake(&self) -> bool {
        !self.awake.is_empty()
    }

    /// A client is gone. Its stream goes with it, unless a detached session is on it.
    fn remove(&mut self, id: ClientId, vsock: &mut Vsock, ops: &mut EventOps) {
        self.forget(id, ops);
        match self.upstreams.get_mut(&id) {
            Some(up) if up.detached() > 0 => {
                up.abandon(vsock);
                self.wake(id);
            }
            _ => self.drop_stream(id, vsock),
        }
    }

    fn forget(&mut self, id: ClientId, ops: &mut EventOps) {
        let Some(client) = self.clients.remove(&id) else { return };
        // Closing the descriptor would do as well; the event manager keeps a table of its own.
        let _ = ops.remove(Events::empty_raw(client.socket().as_raw_fd()));
        let numbers = client.numbers();
        self.ended.forget(|session| numbers.allows(session.0));
        self.leave(id, client.views);
    }

    fn drop_stream(&mut self, id: ClientId, vsock: &mut Vsock) {
        let Some(up) = self.upstreams.remove(&id) else { return };
        if let Some(stream) = up.stream() {
            self.streams.remove(&stream);
            vsock.reset(stream);
        }
        for command in up.lose() {
            self.awake.extend(command.viewers());
            self.ended.remember(command);
        }
    }

    /// Answers a client that may be gone by now.
    pub(crate) fn reply(&mut self, asked: &Asked, reply: &Reply) {
        if let (Some(client), Some(up)) =
            (self.clients.get_mut(&asked.client), self.upstreams.get(&asked.client))
            && !client.reply(asked.call.session, reply, up)
        {
            self.awake.push(asked.client);
        }
    }
}

/// Listens at `path`, in the place of whoever did before, for the owner alone.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    Ok(listener)
}

/// What to be told of a client's socket. Of room only while it is full: whenever the application reads there is more room,
/// and each time that would be a turn of the event loop for nothing.
fn interest(for_room: bool) -> EventSet {
    let room = if for_room { EventSet::OUT } else { EventSet::empty() };
    EventSet::IN | EventSet::EDGE_TRIGGERED | room
}

/// Whether the other end belongs to the user who runs this process.
pub(crate) fn is_owner(socket: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}
