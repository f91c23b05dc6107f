//! One guest process at the event socket: the lines it writes, and those that wait for it to read.
//!
//! What it reads, besides events: `{"error":"..."}` for a line that is none, and `{"dropped":N}` in the place of `N`
//! events that it was too slow for. It reads only what came after it had connected.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cubby_protocol::message::MAX_EVENT;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::line::{self, Fault};

/// Bytes taken from one process before others have their turn.
const TURN: usize = 16 << 10;

/// Bytes that wait for a process to read; beyond them, events are dropped for it.
const WAITING: usize = 512 << 10;

/// Above this much of it, nobody reads what is said of bad lines.
const PATIENT: usize = 16 << 10;

/// The connection is over.
#[derive(Debug)]
pub struct Gone;

/// A connection.
#[derive(Debug)]
pub struct Guest {
    socket: OwnedFd,
    /// The beginning of a line.
    line: Vec<u8>,
    /// The line is too long; its end is awaited.
    skipping: bool,
    readable: bool,
    writable: bool,
    hung_up: bool,
    /// It writes no more. It may still read.
    ended: bool,
    waiting: VecDeque<u8>,
    dropped: u64,
}

impl AsFd for Guest {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Guest {
    /// Of a socket that does not block.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            line: Vec::new(),
            skipping: false,
            readable: true,
            writable: true,
            hung_up: false,
            ended: false,
            waiting: VecDeque::new(),
            dropped: 0,
        }
    }

    /// An event on the connection.
    pub fn on_event(&mut self, flags: EventFlags) {
        self.readable |=
            flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        self.hung_up |= flags.intersects(EventFlags::HUP | EventFlags::ERR);
        self.writable |= flags.contains(EventFlags::OUT);
    }

    /// Whether it has something to say, or is gone.
    pub fn is_ready(&self) -> bool {
        self.readable
    }

    /// Reads once. Each event is told with its name and its line. How many bytes that were.
    pub fn receive(&mut self, tell: &mut impl FnMut(&str, &str)) -> Result<usize, Gone> {
        let mut buffer = [0; TURN];
        match rustix::io::read(&self.socket, &mut buffer) {
            Ok(count @ 1..) => {
                self.take(buffer.get(..count).unwrap_or_default(), tell);
                return Ok(count);
            }
            Err(Errno::INTR) => return Ok(0),
            Err(Errno::AGAIN) => {
                self.readable = false;
                return Ok(0);
            }
            Ok(_) => {}
            // The process is gone and has left something unread.
            Err(_) => self.hung_up = true,
        }
        self.readable = false;
        if !std::mem::replace(&mut self.ended, true) {
            // The last line needs no newline.
            self.finish_line(&[], tell);
        }
        if self.hung_up { Err(Gone) } else { Ok(0) }
    }

    fn take(&mut self, mut bytes: &[u8], tell: &mut impl FnMut(&str, &str)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            self.finish_line(line, tell);
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.keep(bytes);
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.skipping {
            return;
        }
        if self.line.len() + bytes.len() > MAX_EVENT {
            self.skipping = true;
            self.line = Vec::new();
            return self.complain(Fault::TooLong);
        }
        self.line.extend_from_slice(bytes);
    }

    fn finish_line(&mut self, end: &[u8], tell: &mut impl FnMut(&str, &str)) {
        self.keep(end);
        let mut line = std::mem::take(&mut self.line);
        if std::mem::take(&mut self.skipping) {
            return;
        }
        match line::read(&line) {
            Ok(Some((name, line))) => tell(&name, line),
            Ok(None) => {}
            Err(fault) => self.complain(fault),
        }
        line.clear();
        // Its room is of use again, unless one long line made it large.
        line.shrink_to(TURN);
        self.line = line;
    }

    fn complain(&mut self, fault: Fault) {
        self.say_error(&fault.to_string());
    }

    /// Says why something did not go well, unless too much is unread already. `why` is JSON as it is.
    pub fn say_error(&mut self, why: &str) {
        if self.waiting.len() < PATIENT {
            self.waiting.extend(format!("{{\"error\":\"{why}\"}}\n").as_bytes());
        }
    }

    /// An event of the host's.
    pub fn offer(&mut self, line: &[u8]) {
        let notice = self.losses();
        if self.waiting.len() + notice.len() + line.len() + 1 > WAITING {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        self.dropped = 0;
        self.waiting.extend(notice.as_bytes());
        self.waiting.extend(line);
        self.waiting.push_back(b'\n');
    }

    fn losses(&self) -> String {
        if self.dropped > 0 { format!("{{\"dropped\":{}}}\n", self.dropped) } else { String::new() }
    }

    /// Writes what the socket takes.
    pub fn send(&mut self) -> Result<(), Gone> {
        while self.writable {
            if self.waiting.is_empty() {
                if self.dropped == 0 {
                    return Ok(());
                }
                let notice = self.losses();
                self.waiting.extend(notice.as_bytes());
                self.dropped = 0;
            }
            match rustix::io::write(&self.socket, self.waiting.as_slices().0) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }
}
