//! The event loop: one thread, one epoll instance, every descriptor non-blocking.
//!
//! A turn takes events, reads from clients, reaps children, moves streams, and then writes what all that produced
//! in one write per client, so that a short command's Started, output and Exited leave together. Children are
//! noticed through a `signalfd` for SIGCHLD and not through one pidfd each: PID 1 has to reap orphans, for
//! which no pidfd exists, and a command costs three system calls less.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use cubby_protocol::message::{Exited, Fatal, GuestConfig};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::client::{Client, Drop, Shared};
use crate::control::Control;
use crate::events::Events;
use crate::files::pool::Pool;
use crate::oom::OomLog;
use crate::power::Progress;
use crate::spawn::Spawner;
use crate::sys;
use crate::token::Token;

/// How many clients the agent takes.
pub const MAX_CLIENTS: u16 = 1000;

const SIGKILL: i32 = 9;

/// What an event says of the end of a child.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sign {
    /// Nothing.
    None,
    /// A command has closed a stream, as it does just before its end, and perhaps long before.
    HungUp,
    /// A child has ended.
    Ended,
}

/// Who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// The machine with this CID.
    Cid(u32),
    /// Whoever can reach the socket.
    Anyone,
}

/// The agent at work.
#[derive(Debug)]
pub struct Server {
    shared: Shared,
    signals: OwnedFd,
    listener: OwnedFd,
    peers: Peers,
    clients: BTreeMap<u16, Client>,
    held: BTreeMap<u32, OwnedFd>,
    next_held: u32,
    oom: OomLog,
    control: Option<Control>,
    stopping: Option<Progress>,
}

impl Server {
    /// A server for clients of `listener` (non-blocking) in a guest that was set up with `config`.
    pub fn new(listener: OwnedFd, peers: Peers, config: GuestConfig) -> Result<Self, Errno> {
        let shared = Shared {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            spawner: Spawner::new(config)?,
            children: BTreeMap::new(),
            files: Pool::new()?,
            sessions: 0,
            stopping: false,
            held: Vec::new(),
            events: Events::default(),
        };
        let signals = sys::block_sigchld()?;
        shared.watch(&signals, Token::Children)?;
        shared.watch(&listener, Token::Listener)?;
        shared.watch(shared.files.bell(), Token::Files)?;
        Ok(Self {
            shared,
            signals,
            listener,
            peers,
            clients: BTreeMap::new(),
            held: BTreeMap::new(),
            next_held: 0,
            oom: OomLog::default(),
            control: None,
            stopping: None,
        })
    }

    /// Obeys this control connection from now on.
    pub fn obey(&mut self, control: Control) -> Result<(), Errno> {
        self.shared.watch(&control, Token::Control)?;
        self.control = Some(control);
        Ok(())
    }

    /// Lets guest processes exchange events with the host at `listener`, which does not block.
    pub fn exchange_events(&mut self, listener: OwnedFd) -> Result<(), Errno> {
        self.shared.watch(&listener, Token::Events)?;
        self.shared.events.listen(listener);
        Ok(())
    }

    /// Serves until the guest is to be powered off and every process is gone; returns the control connection,
    /// unless that is what was lost. Without a control connection it serves for ever.
    pub fn run(&mut self) -> Result<Option<Control>, Errno> {
        let mut events: [MaybeUninit<epoll::Event>; 64] = [const { MaybeUninit::uninit() }; 64];
        loop {
            let timeout = self.timeout();
            let (events, _) = match epoll::wait(&self.shared.epoll, &mut events[..], timeout.as_ref()) {
                Ok(events) => events,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            let mut sign = Sign::None;
            for event in events {
                sign = sign.max(self.on_event(*event));
            }
            if sign == Sign::HungUp {
                // An exit closes one stream after another and then the process: let it, and take all of it in one turn.
                std::thread::yield_now();
            }
            let stops = self.receive();
            if sign > Sign::None || stops {
                self.reap()?;
            }
            self.pass_time();
            self.send();
            if self.control.as_ref().is_some_and(Control::is_lost) {
                return Ok(None);
            }
            if self.stopping.as_ref().is_some_and(Progress::is_over) {
                return Ok(self.control.take());
            }
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let ready = self.clients.values().any(Client::is_ready);
        if ready || self.shared.events.is_ready() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let stop = self.stopping.as_ref().map(Progress::deadline);
        let next = self.clients.values().filter_map(Client::deadline).chain(stop).min()?;
        // One millisecond more, so that a deadline has passed when its turn comes.
        let wait = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Timespec::try_from(wait).ok()
    }

    fn on_event(&mut self, event: epoll::Event) -> Sign {
        let (data, flags) = (event.data, event.flags);
        match Token::from(data.u64()) {
            Token::Children => return Sign::Ended,
            Token::Control => self.control.iter_mut().for_each(Control::on_event),
            Token::Listener => self.accept(),
            Token::Client(slot) => {
                if let Some(client) = self.clients.get_mut(&slot) {
                    client.on_event(flags);
                }
            }
            Token::Session(slot, id, which) => {
                if let Some(client) = self.clients.get_mut(&slot) {
                    client.on_session_event(id, which, flags);
                }
                if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                    return Sign::HungUp;
                }
            }
            Token::Held(number) => self.drain(number),
            Token::Events => self.shared.events.accept(&self.shared.epoll),
            Token::Guest(number) => self.shared.events.on_event(number, flags),
            // While the guest shuts down, the last thread may be what it waits for.
            Token::Files => {
                if self.on_files() && self.stopping.is_some() {
                    return Sign::Ended;
                }
            }
        }
        Sign::None
    }

    /// Hands out what was done with files. Whether nothing more is under way.
    fn on_files(&mut self) -> bool {
        for completion in self.shared.files.completed() {
            match self.clients.get_mut(&completion.ticket.slot) {
                Some(client) => client.on_file(completion, &mut self.shared),
                None => self.shared.files.discard(completion.ticket, completion.outcome.next),
            }
        }
        self.shared.files.is_idle()
    }

    fn accept(&mut self) {
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (socket, peer) = match acceptfrom_with(&self.listener, flags) {
                Ok(accepted) => accepted,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => return,
            };
            let welcome = match self.peers {
                Peers::Anyone => true,
                Peers::Cid(cid) => peer.as_ref().and_then(sys::vsock_peer) == Some(cid),
            };
            let slot = (0..u16::MAX).find(|slot| !self.clients.contains_key(slot)).unwrap_or(u16::MAX);
            let client = if welcome { Client::new(slot, socket, &self.shared).ok() } else { None };
            let Some(client) = client else { continue };
            if self.clients.len() >= usize::from(MAX_CLIENTS) {
                client.close(Drop::Broke(Fatal::TooManyClients { max: MAX_CLIENTS }), &mut self.shared);
            } else {
                self.clients.insert(slot, client);
            }
        }
    }

    /// Reads from everybody; true when that began the shutdown, so that children have to be counted. The host comes
    /// first: what it said before a client's frame (the time, after a pause) holds for that frame.
    fn receive(&mut self) -> bool {
        let grace = self.control.as_mut().and_then(Control::receive);
        let stop = grace.filter(|_| self.stopping.is_none());
        if let Some(grace) = stop {
            self.shared.stopping = true;
            self.clients.values_mut().for_each(|client| client.cancel_files(&mut self.shared));
            self.stopping = Some(Progress::start(grace));
        }
        let shared = &mut self.shared;
        let mut dropped = Vec::new();
        for (slot, client) in &mut self.clients {
            if let Err(why) = client.receive(shared) {
                dropped.push((*slot, why));
            }
        }
        self.drop_clients(dropped);
        let clients = &mut self.clients;
        self.shared.events.receive(|name, line| {
            clients.values_mut().for_each(|client| client.subscriptions.offer(name, line));
        });
        stop.is_some()
    }

    fn send(&mut self) {
        let mut dropped = Vec::new();
        for (slot, client) in &mut self.clients {
            client.pump(&mut self.shared);
            if let Err(why) = client.flush() {
                dropped.push((*slot, why));
            }
        }
        self.drop_clients(dropped);
        self.control.iter_mut().for_each(Control::send);
        self.shared.events.send();
        for stream in std::mem::take(&mut self.shared.held) {
            self.hold(stream);
        }
    }

    fn drop_clients(&mut self, dropped: Vec<(u16, Drop)>) {
        for (slot, why) in dropped {
            if let Some(client) = self.clients.remove(&slot) {
                client.close(why, &mut self.shared);
            }
        }
    }

    /// Reaps every child that ended, orphans included.
    fn reap(&mut self) -> Result<(), Errno> {
        // SIGCHLD is never pending twice, so that one read re-arms the event; `wait` says all that it says. The
        // end of a child while there is nothing to read is no error.
        let _ = rustix::io::read(&self.signals, &mut [0; 128]);
        let now = Instant::now();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.on_exit(pid.as_raw_nonzero().get(), status, now),
                Ok(None) => return Ok(()),
                Err(Errno::CHILD) => {
                    // Whatever is being written has to be put away as well.
                    if let Some(stopping) = self.stopping.as_mut().filter(|_| self.shared.files.is_idle()) {
                        stopping.nobody_left();
                    }
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn on_exit(&mut self, pid: i32, status: WaitStatus, now: Instant) {
        let Some((slot, id)) = self.shared.children.remove(&pid) else { return };
        let (clients, oom) = (&mut self.clients, &mut self.oom);
        let Some(client) = clients.get_mut(&slot) else { return };
        client.on_exit(id, now, |session| match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exited::Code(code),
            (_, Some(SIGKILL)) if !session.was_killed() && oom.names(pid) => Exited::OutOfMemory,
            (_, signal) => Exited::Signal(signal.unwrap_or_default()),
        });
    }

    fn pass_time(&mut self) {
        if self.stopping.is_none() && self.clients.values().all(|client| client.deadline().is_none()) {
            return;
        }
        let now = Instant::now();
        self.clients.values_mut().for_each(|client| client.on_deadlines(now));
        if let Some(stopping) = &mut self.stopping {
            stopping.pass_time(now);
        }
    }

    fn hold(&mut self, stream: OwnedFd) {
        let number = self.next_held;
        self.next_held = number.wrapping_add(1);
        let data = epoll::EventData::new_u64(Token::Held(number).into());
        if epoll::modify(&self.shared.epoll, &stream, data, epoll::EventFlags::IN).is_ok() {
            self.held.insert(number, stream);
        }
    }

    fn drain(&mut self, number: u32) {
        let Some(stream) = self.held.get(&number) else { return };
        let mut nowhere = [0; 16 << 10];
        if !matches!(rustix::io::read(stream, &mut nowhere), Ok(1..) | Err(Errno::AGAIN | Errno::INTR)) {
            self.held.remove(&number);
        }
    }
}
