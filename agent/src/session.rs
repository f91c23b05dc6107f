//! One command: its streams, its windows, its end.
//!
//! The end of a command: [`Kind::Exited`] follows when its process was reaped and all that its process could have
//! written was sent. A stream ends at end-of-file, or, if a background process still holds it, after the bytes that
//! were in the pipe when the process was reaped; what such a process writes later is read and dropped, so that it
//! neither blocks nor dies of it. A terminal ends with its hang-up, at the latest [`HANGUP_WAIT`] after the process.
//!
//! A time-out sends TERM to the process group and [`KILL_AFTER`] later KILL; when the process is gone, whatever is
//! left of the group is killed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use cubby_protocol::message::{Credit, Exited, TtySize};
use cubby_protocol::{CHUNK, INITIAL_WINDOW, Kind, SessionId};
use rustix::io::{Errno, ioctl_fionread};

use crate::output::{Output, SOFT_LIMIT};
use crate::spawn::{self, Child, Streams};
use crate::sys;

/// How long a command that timed out has between TERM and KILL.
pub const KILL_AFTER: Duration = Duration::from_secs(2);

/// How long a terminal's last output may take to come through the kernel after its process ended.
pub const HANGUP_WAIT: Duration = Duration::from_millis(100);

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
const END_OF_TRANSMISSION: u8 = 4;

/// Which of a session's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Standard input.
    Stdin,
    /// Standard output, or the terminal for both directions.
    Stdout,
    /// Standard error.
    Stderr,
}

#[derive(Debug)]
struct Stream {
    fd: OwnedFd,
    /// It may have bytes for us; edge-triggered, so this is remembered until a read says otherwise.
    ready: bool,
    /// The other side is closed: read until end-of-file.
    hung_up: bool,
    /// After the process ended: how much is still to be sent.
    left: Option<u64>,
}

impl Stream {
    fn new(fd: OwnedFd) -> Self {
        Self { fd, ready: false, hung_up: false, left: None }
    }
}

#[derive(Debug, Default)]
struct Stdin {
    pipe: Option<OwnedFd>,
    waiting: Vec<u8>,
    /// How much of `waiting` was written.
    start: usize,
    closing: bool,
    window: u32,
    owed: u32,
}

/// The client sent more than the window allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{sent} bytes of standard input overrun the window of {window}")]
pub struct Overrun {
    /// The frame's payload in bytes.
    pub sent: usize,
    /// What it was allowed to be.
    pub window: u32,
}

/// A command that runs, or whose output is not all sent yet.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    pid: i32,
    tty: bool,
    stdin: Stdin,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    window: u64,
    ended: Option<Exited>,
    deadline: Option<Instant>,
    timed_out: bool,
    killed: bool,
}

impl Session {
    /// The session of a new child.
    pub fn new(id: SessionId, child: Child, timeout: Option<Duration>) -> Self {
        let (stdin, stdout, stderr, tty) = match child.streams {
            Streams::Pipes { stdin, stdout, stderr } => (stdin, stdout, Some(Stream::new(stderr)), false),
            Streams::Terminal(master) => (None, master, None, true),
        };
        Self {
            id,
            pid: child.pid,
            tty,
            stdin: Stdin { pipe: stdin, window: INITIAL_WINDOW, ..Stdin::default() },
            stdout: Some(Stream::new(stdout)),
            stderr,
            window: u64::from(INITIAL_WINDOW),
            ended: None,
            deadline: timeout.and_then(|after| Instant::now().checked_add(after)),
            timed_out: false,
            killed: false,
        }
    }

    /// The descriptors to watch.
    pub fn descriptors(&self) -> impl Iterator<Item = (Which, BorrowedFd<'_>)> {
        let stdin = self.stdin.pipe.as_ref().map(|fd| (Which::Stdin, fd.as_fd()));
        let stdout = self.stdout.as_ref().map(|stream| (Which::Stdout, stream.fd.as_fd()));
        let stderr = self.stderr.as_ref().map(|stream| (Which::Stderr, stream.fd.as_fd()));
        [stdin, stdout, stderr].into_iter().flatten()
    }

    /// The process id while the process has not been reaped.
    pub fn running(&self) -> Option<i32> {
        self.ended.is_none().then_some(self.pid)
    }

    /// Whether a KILL came from here.
    pub fn was_killed(&self) -> bool {
        self.killed
    }

    /// An event on one of the descriptors.
    pub fn on_event(&mut self, which: Which, hung_up: bool) {
        let stream = match which {
            Which::Stdin => None,
            Which::Stdout => self.stdout.as_mut(),
            Which::Stderr => self.stderr.as_mut(),
        };
        if let Some(stream) = stream {
            stream.ready = true;
            stream.hung_up |= hung_up;
        }
    }

    /// The client takes so many more bytes of output.
    pub fn on_credit(&mut self, bytes: u32) {
        self.window = self.window.saturating_add(u64::from(bytes));
    }

    /// Bytes for standard input. What a command does not read any more is dropped.
    pub fn on_stdin(&mut self, bytes: &[u8]) -> Result<(), Overrun> {
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let overrun = Overrun { sent: bytes.len(), window: self.stdin.window };
        self.stdin.window = self.stdin.window.checked_sub(size).ok_or(overrun)?;
        if self.takes_input() && !self.stdin.closing {
            self.stdin.waiting.extend_from_slice(bytes);
        } else {
            self.stdin.owed = self.stdin.owed.saturating_add(size);
        }
        Ok(())
    }

    /// No more standard input. On a terminal this is the end-of-transmission character.
    pub fn on_stdin_close(&mut self) {
        if self.tty && !self.stdin.closing && self.stdout.is_some() {
            self.stdin.waiting.push(END_OF_TRANSMISSION);
        }
        self.stdin.closing = true;
    }

    /// The terminal's new size.
    pub fn on_resize(&mut self, size: TtySize) {
        if let (true, Some(stream)) = (self.tty, &self.stdout) {
            // A terminal that is gone needs no size.
            let _ = spawn::resize(&stream.fd, size);
        }
    }

    /// Sends a signal to the process group, unless the process is gone.
    pub fn signal(&mut self, number: i32) {
        if self.ended.is_none() && (1..=64).contains(&number) {
            self.killed |= number == SIGKILL;
            // The group can only have ended by itself.
            let _ = sys::kill_group(self.pid, number);
        }
    }

    /// Ends the process group, for a client that is gone.
    pub fn abandon(&mut self) {
        self.signal(SIGKILL);
    }

    /// When [`Self::on_deadline`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The deadline has passed.
    pub fn on_deadline(&mut self, now: Instant) {
        self.deadline = None;
        if self.ended.is_some() {
            self.stdout = None;
        } else if self.timed_out {
            self.signal(SIGKILL);
        } else {
            self.timed_out = true;
            self.signal(SIGTERM);
            self.deadline = now.checked_add(KILL_AFTER);
        }
    }

    /// The process was reaped.
    pub fn on_exit(&mut self, how: Exited, now: Instant) {
        if self.timed_out {
            // Its group has the number until the last of it is gone.
            let _ = sys::kill_group(self.pid, SIGKILL);
        }
        self.ended = Some(if self.timed_out { Exited::TimedOut } else { how });
        self.deadline = None;
        self.stdin.pipe = None;
        self.drop_input();
        let waits_for_hangup = self.tty;
        for stream in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            stream.ready = true;
            if !waits_for_hangup {
                stream.left = ioctl_fionread(&stream.fd).ok();
            }
        }
        if self.tty && self.stdout.is_some() {
            self.deadline = now.checked_add(HANGUP_WAIT);
        }
    }

    /// Moves bytes both ways. `Some` when the command is over and [`Kind::Exited`] may be sent with what is in it.
    /// Streams that others still hold are put into `held`.
    pub fn pump(&mut self, output: &mut Output, held: &mut Vec<OwnedFd>) -> Option<Exited> {
        self.feed(output);
        for (slot, kind) in [(&mut self.stdout, Kind::Stdout), (&mut self.stderr, Kind::Stderr)] {
            let Some(stream) = slot else { continue };
            match forward(stream, kind, self.id, &mut self.window, output) {
                Forwarded::More => {}
                Forwarded::End => *slot = None,
                Forwarded::Held => held.extend(slot.take().map(|stream| stream.fd)),
            }
        }
        self.ended.filter(|_| self.stdout.is_none() && self.stderr.is_none())
    }

    /// Whether [`Self::pump`] has more to do as soon as the output has room.
    pub fn has_more(&self) -> bool {
        let ready = |stream: &Stream| stream.ready && (self.window > 0 || stream.left == Some(0));
        [&self.stdout, &self.stderr].into_iter().flatten().any(ready)
    }

    fn takes_input(&self) -> bool {
        self.stdin.pipe.is_some() || (self.tty && self.stdout.is_some() && self.ended.is_none())
    }

    fn drop_input(&mut self) {
        let unread = self.stdin.waiting.len() - self.stdin.start;
        self.stdin.owed = self.stdin.owed.saturating_add(u32::try_from(unread).unwrap_or(u32::MAX));
        self.stdin.waiting = Vec::new();
        self.stdin.start = 0;
    }

    fn feed(&mut self, output: &mut Output) {
        while let Some(bytes) = self.stdin.waiting.get(self.stdin.start..).filter(|bytes| !bytes.is_empty()) {
            let terminal = self.stdout.as_ref().filter(|_| self.tty).map(|stream| &stream.fd);
            let Some(target) = self.stdin.pipe.as_ref().or(terminal) else { break };
            match rustix::io::write(target, bytes) {
                Ok(count) => {
                    self.stdin.start += count;
                    self.stdin.owed += u32::try_from(count).unwrap_or(u32::MAX);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.stdin.pipe = None;
                    self.drop_input();
                }
            }
        }
        if self.stdin.start == self.stdin.waiting.len() {
            self.stdin.waiting.clear();
            self.stdin.start = 0;
            if self.stdin.closing {
                self.stdin.pipe = None;
            }
        } else if self.stdin.start >= CHUNK {
            self.stdin.waiting.drain(..self.stdin.start);
            self.stdin.start = 0;
        }
        let room = INITIAL_WINDOW - self.stdin.window.min(INITIAL_WINDOW);
        let grant = self.stdin.owed.min(room);
        if grant >= INITIAL_WINDOW / 4 && self.ended.is_none() {
            self.stdin.window += grant;
            self.stdin.owed = 0;
            output.message(Kind::Credit, self.id, &Credit { bytes: grant });
        }
    }
}

enum Forwarded {
    More,
    End,
    Held,
}

fn forward(
    stream: &mut Stream,
    kind: Kind,
    id: SessionId,
    window: &mut u64,
    output: &mut Output,
) -> Forwarded {
    while stream.ready && output.len() < SOFT_LIMIT {
        if stream.left == Some(0) {
            return last_look(stream);
        }
        let allowed = stream.left.unwrap_or(u64::MAX).min(*window);
        let size = usize::try_from(allowed).unwrap_or(usize::MAX).min(CHUNK);
        if size == 0 {
            return Forwarded::More;
        }
        match rustix::io::read(&stream.fd, output.room(size)) {
            Ok(0) => return Forwarded::End,
            Ok(count) => {
                output.commit(kind, id, count);
                *window -= count as u64;
                stream.left = stream.left.map(|left| left.saturating_sub(count as u64));
                stream.ready = count == size || stream.hung_up || stream.left.is_some();
                if count == CHUNK {
                    return Forwarded::More; // Others have their turn first.
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                stream.ready = false;
                if stream.left.is_some() {
                    return Forwarded::Held; // Someone else read what was there.
                }
            }
            Err(_) => return Forwarded::End, // EIO: the terminal was hung up.
        }
    }
    Forwarded::More
}

/// All that the process wrote was sent. Does anyone else still hold the stream?
fn last_look(stream: &Stream) -> Forwarded {
    match rustix::io::read(&stream.fd, &mut [0; 512]) {
        Ok(0) => Forwarded::End,
        _ => Forwarded::Held,
    }
}
