//! Events between the host and the guest's processes, in lines of JSON ([`cubby_protocol::message::MAX_EVENT`] and
//! its kin are the limits). A process connects to a Unix socket that is open to every user of the guest, writes its
//! events and reads the host's; clients of the agent emit, and subscribe ([`Subscriptions`]).
//!
//! Nobody waits for anybody: an event goes to who listens when it comes, and to nobody else. Each who listens has a
//! bounded queue of its own, and is told how many it has lost. A process that writes faster than the agent reads stands
//! still in its `write`, since one turn of the event loop takes `TURN` bytes of all processes together. What one
//! connection writes arrives in its order.

mod guest;
mod line;
mod subscription;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::event::epoll::{self, EventFlags};
use rustix::fs::{Mode, chmod, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};

use crate::client::WATCHED;
use crate::token::Token;
use guest::Guest;
pub use subscription::Subscriptions;

/// How many processes may be connected.
const MAX_GUESTS: usize = 128;

/// Bytes taken from all processes before the rest of the event loop has its turn.
const TURN: usize = 256 << 10;

/// Listens at `path`, in the place of what a run before has left there, for every user.
pub fn listener(path: impl rustix::path::Arg + Copy) -> Result<OwnedFd, Errno> {
    match unlink(path) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    chmod(path, Mode::from_raw_mode(0o666))?;
    listen(&socket, 32)?;
    Ok(socket)
}

/// The guest's side: the socket and whoever has connected.
#[derive(Debug, Default)]
pub struct Events {
    listener: Option<OwnedFd>,
    guests: BTreeMap<u32, Guest>,
    next: u32,
    /// Who has the next turn.
    turn: u32,
}

impl Events {
    /// Takes connections of `listener`, which does not block.
    pub fn listen(&mut self, listener: OwnedFd) {
        self.listener = Some(listener);
    }

    /// Somebody connects.
    pub fn accept(&mut self, epoll: &OwnedFd) {
        let Some(listener) = &self.listener else { return };
        loop {
            let socket = match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => return,
            };
            let mut guest = Guest::new(socket);
            if self.guests.len() >= MAX_GUESTS {
                guest.say_error(&format!(
                    "{MAX_GUESTS} processes are connected, which is all the agent takes"
                ));
                // It is told if its socket takes it, and that is all there is for it.
                let _ = guest.send();
                continue;
            }
            while self.guests.contains_key(&self.next) {
                self.next = self.next.wrapping_add(1);
            }
            let data = epoll::EventData::new_u64(Token::Guest(self.next).into());
            if epoll::add(epoll, &guest, data, WATCHED).is_ok() {
                self.guests.insert(self.next, guest);
                self.next = self.next.wrapping_add(1);
            }
        }
    }

    /// Something happened to a connection.
    pub fn on_event(&mut self, number: u32, flags: EventFlags) {
        if let Some(guest) = self.guests.get_mut(&number) {
            guest.on_event(flags);
        }
    }

    /// Whether somebody has written, which no event will announce again.
    pub fn is_ready(&self) -> bool {
        self.guests.values().any(Guest::is_ready)
    }

    /// Reads from those who have written, one after another, and tells each event with its name.
    pub fn receive(&mut self, mut tell: impl FnMut(&str, &Rc<str>)) {
        let mut tell = |name: &str, line: &str| tell(name, &Rc::from(line));
        let mut left = TURN;
        let ready = self.guests.iter().filter(|(_, guest)| guest.is_ready());
        let mut ready: Vec<u32> = ready.map(|(number, _)| *number).collect();
        ready.sort_unstable_by_key(|number| (*number < self.turn, *number));
        for number in ready {
            if left == 0 {
                // Who has come too late is the first next time.
                self.turn = number;
                return;
            }
            let Some(guest) = self.guests.get_mut(&number) else { continue };
            match guest.receive(&mut tell) {
                Ok(count) => left = left.saturating_sub(count),
                Err(guest::Gone) => drop(self.guests.remove(&number)),
            }
        }
    }

    /// An event of the host's, for every process that listens.
    pub fn emit(&mut self, line: &[u8]) {
        self.guests.values_mut().for_each(|guest| guest.offer(line));
    }

    /// Writes what the sockets take.
    pub fn send(&mut self) {
        self.guests.retain(|_, guest| guest.send().is_ok());
    }
}
