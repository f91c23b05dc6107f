//! One connection: the guest's end, the host's end, and the bytes between them.
//!
//! Bytes wait on one side only for the other's sake: what the host's socket does not take closes the guest's window, and
//! nothing is read from the socket that the guest's window has no room for.

use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Instant;

use cubby_network_policy::Direction;

use super::endpoint::{Endpoint, Phase};
use super::segment::Segment;
use crate::emit::Ends;
use crate::ring::Pool;
use crate::socket;

/// How much is read at once, at least and at most; it grows while the socket fills it.
const READ: usize = 4 << 10;
const MOST_READ: usize = 256 << 10;
const GROWTH: usize = 4;
/// After so much the guest gets its part before there is more.
const ENOUGH: usize = 64 << 10;

/// The host's end.
#[derive(Debug)]
pub(super) enum Far {
    /// The host connects.
    Connecting(TcpStream),
    /// Bytes move.
    Open(TcpStream),
    /// The stack's own resolver.
    Resolver(Inbox),
    /// It is closed.
    Closed,
}

/// Messages for the resolver, behind their lengths, as far as they have come (RFC 1035 §4.2.2).
#[derive(Debug, Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
    unanswered: usize,
}

/// The longest message with its length. Nobody needs to send the next one early.
const MESSAGE: usize = 2 + 65_535;
/// Messages of one connection that are worked on at once.
const UNANSWERED: usize = 16;

impl Inbox {
    fn push(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(MESSAGE.saturating_sub(self.bytes.len()));
        self.bytes.extend_from_slice(bytes.get(..n).unwrap_or_default());
        n
    }

    /// The length of the first message, if it is whole.
    fn whole(&self) -> Option<usize> {
        let len = 2 + usize::from(u16::from_be_bytes(*self.bytes.first_chunk()?));
        (self.bytes.len() >= len).then_some(len)
    }

    /// Whether nothing is left to answer.
    fn is_done(&self) -> bool {
        self.unanswered == 0 && self.whole().is_none()
    }

    /// Takes the first message, if it is whole and not too much is under way.
    pub(super) fn take(&mut self) -> Option<Vec<u8>> {
        let len = self.whole().filter(|_| self.unanswered < UNANSWERED)?;
        self.unanswered += 1;
        let rest = self.bytes.split_off(len);
        let message = std::mem::replace(&mut self.bytes, rest);
        message.get(2..).map(<[u8]>::to_vec)
    }

    pub(super) fn answered(&mut self) {
        self.unanswered = self.unanswered.saturating_sub(1);
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ends: Ends,
    /// Tells one connection from the next that gets its place.
    pub(super) serial: u64,
    pub(super) near: Endpoint,
    pub(super) far: Far,
    pub(super) direction: Direction,
    /// The other side on the host's network, and the port that was called.
    pub(super) peer: SocketAddr,
    pub(super) called: u16,
    /// Whether both sides have answered.
    pub(super) opened: bool,
    /// Whether it waits for its turn to send to the guest.
    pub(super) queued: bool,
    /// Whether it waits for memory to read into.
    pub(super) starved: bool,
    /// When the clock will look at it.
    pub(super) scheduled: Option<Instant>,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The host's peer has finished: what is read ends with an end.
    pub(super) hung_up: bool,
    pub(super) shut: bool,
    /// The host's end broke off.
    pub(super) broken: bool,
    pub(super) appetite: usize,
}

impl Connection {
    pub(super) fn new(
        ends: Ends,
        serial: u64,
        near: Endpoint,
        far: Far,
        (direction, peer, called): (Direction, SocketAddr, u16),
    ) -> Self {
        Connection {
            ends,
            serial,
            near,
            far,
            direction,
            peer,
            called,
            opened: false,
            queued: false,
            starved: false,
            scheduled: None,
            readable: false,
            writable: true,
            hung_up: false,
            shut: false,
            broken: false,
            appetite: READ,
        }
    }

    /// Takes a segment of the guest, and passes its bytes on.
    pub(super) fn on_segment(&mut self, segment: &Segment<'_>, now: Instant, pool: &mut Pool) {
        let Connection { near, far, writable, broken, .. } = self;
        near.on_segment(segment, now, pool, |bytes| pass(far, writable, broken, bytes));
    }

    /// Passes on what waits for the host, and then the guest's end.
    pub(super) fn flush(&mut self, pool: &mut Pool) {
        loop {
            let (bytes, _) = self.near.waiting();
            if bytes.is_empty() {
                break;
            }
            let n = pass(&mut self.far, &mut self.writable, &mut self.broken, bytes);
            if n == 0 {
                break;
            }
            self.near.taken(n, pool);
        }
        if self.near.heard_all() && !self.shut {
            match &self.far {
                Far::Open(stream) => {
                    self.shut = true;
                    // It fails if the peer has broken off, which reading tells too.
                    let _ = stream.shutdown(Shutdown::Write);
                }
                Far::Resolver(inbox) if !inbox.is_done() => {}
                Far::Resolver(_) => {
                    self.shut = true;
                    self.near.finish();
                }
                Far::Connecting(_) | Far::Closed => {}
            }
        }
    }

    /// Whether there is something to read that the guest has room for.
    pub(super) fn is_hungry(&self, pool: &Pool) -> bool {
        let readable = self.readable && !self.starved && matches!(self.far, Far::Open(_));
        readable && self.near.appetite(pool.share()) > 0
    }

    /// Reads for the guest. `false`: there is no memory for it.
    pub(super) fn fill(&mut self, pool: &mut Pool) -> bool {
        let Far::Open(stream) = &mut self.far else { return true };
        while self.readable {
            let wanted = self.near.appetite(pool.share()).min(self.appetite);
            if wanted == 0 {
                break;
            }
            let room = self.near.sending().reserve(wanted, pool);
            if room == 0 {
                return false;
            }
            let (first, second) = self.near.sending().spare(room);
            match stream.read_vectored(&mut [IoSliceMut::new(first), IoSliceMut::new(second)]) {
                Ok(0) => {
                    self.readable = false;
                    self.near.finish();
                }
                Ok(n) => {
                    self.near.sending().commit(n);
                    if n < room {
                        // All there was: more will be told, but for an end that has been told already.
                        self.readable = self.hung_up;
                        self.appetite = (self.appetite / 2).max(n).clamp(READ, MOST_READ);
                    } else {
                        self.appetite = (self.appetite * GROWTH).min(MOST_READ);
                        if n >= ENOUGH {
                            break;
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    self.readable = false;
                    self.broken = true;
                }
            }
        }
        // Memory that was made for what then did not come.
        if self.near.sending().is_empty() {
            self.near.sending().release(pool);
        }
        true
    }

    /// Closes the host's end: with a reset, unless everything has been said.
    pub(super) fn close(&mut self, reset: bool) {
        if let Far::Connecting(stream) | Far::Open(stream) = std::mem::replace(&mut self.far, Far::Closed)
            && reset
        {
            socket::end_with_reset(&stream);
        }
    }

    /// Whether nothing waits for the host any more.
    pub(super) fn is_flushed(&self) -> bool {
        matches!(self.far, Far::Closed) || self.near.waiting().0.is_empty()
    }

    /// Whether either side has yet to answer.
    pub(super) fn is_half_open(&self) -> bool {
        matches!(self.near.phase(), Phase::Asked | Phase::SynSent | Phase::SynReceived)
    }
}

/// Gives bytes to the host's end; returns how many it took.
fn pass(far: &mut Far, writable: &mut bool, broken: &mut bool, bytes: &[u8]) -> usize {
    match far {
        Far::Open(stream) if *writable => loop {
            match stream.write(bytes) {
                Ok(n) => {
                    *writable = n == bytes.len();
                    return n;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    *writable = false;
                    *broken |= error.kind() != ErrorKind::WouldBlock;
                    return 0;
                }
            }
        },
        Far::Resolver(inbox) => inbox.push(bytes),
        Far::Open(_) | Far::Connecting(_) | Far::Closed => 0,
    }
}
