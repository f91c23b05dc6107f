//! What waits to be written to one connection: frames in order, and before them the answers that may not wait.
//!
//! Pipes are read straight into the buffer behind room for the header, and everything that a turn of the event
//! loop produced leaves in one write. The size is bounded by its users: they stop reading pipes above
//! [`SOFT_LIMIT`] and the client itself above [`HARD_LIMIT`].

use std::io::IoSlice;
use std::os::fd::AsFd;

use cubby_protocol::{CHUNK, FrameError, Header, Kind, SessionId, encode, encode_raw};
use rustix::io::Errno;

/// Above this many waiting bytes no more output is taken from this client's commands.
pub const SOFT_LIMIT: usize = 256 << 10;

/// Above this many waiting bytes no more requests are taken from this client.
pub const HARD_LIMIT: usize = 1 << 20;

/// Frames on their way out.
#[derive(Debug, Default)]
pub struct Output {
    data: Vec<u8>,
    start: usize,
    end: usize,
    /// The first frame boundary at or after `start`.
    boundary: usize,
    urgent: Vec<u8>,
    scratch: Vec<u8>,
}

impl Output {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.end - self.start + self.urgent.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a frame with a message.
    pub fn message<M: serde::Serialize>(&mut self, kind: Kind, session: SessionId, message: &M) {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        // The agent's own messages are far below a frame's limit.
        if encode(kind, session, message, &mut scratch).is_ok() {
            self.raw(&scratch);
        }
        self.scratch = scratch;
    }

    /// Adds whole frames that are encoded already.
    pub fn raw(&mut self, frames: &[u8]) {
        self.make_room(frames.len());
        if let Some(room) = self.data.get_mut(self.end..self.end + frames.len()) {
            room.copy_from_slice(frames);
            self.end += frames.len();
        }
    }

    /// Moves all frames of `other`, none of which is urgent, behind those that are here.
    pub fn append(&mut self, other: &mut Self) {
        if self.start == self.end {
            (self.start, self.end, self.boundary) = (0, 0, 0);
            std::mem::swap(&mut self.data, &mut other.data);
            std::mem::swap(&mut self.start, &mut other.start);
            std::mem::swap(&mut self.end, &mut other.end);
            std::mem::swap(&mut self.boundary, &mut other.boundary);
        } else {
            self.raw(other.data.get(other.start..other.end).unwrap_or_default());
            (other.start, other.end, other.boundary) = (0, 0, 0);
        }
    }

    /// Adds a frame that leaves before everything else but the frame that is being written.
    pub fn urgent(&mut self, kind: Kind, session: SessionId, payload: &[u8]) -> Result<(), FrameError> {
        encode_raw(kind, session, payload, &mut self.urgent)
    }

    /// Room for a payload of up to `size` bytes; [`Self::commit`] makes a frame of what was filled.
    pub fn room(&mut self, size: usize) -> &mut [u8] {
        self.make_room(Header::SIZE + size);
        let from = self.end + Header::SIZE;
        self.data.get_mut(from..from + size).unwrap_or_default()
    }

    /// Makes a frame of the first `size` bytes of the last [`Self::room`].
    pub fn commit(&mut self, kind: Kind, session: SessionId, size: usize) {
        let header = Header { length: u32::try_from(size).unwrap_or_default(), kind, session };
        if let Some(room) = self.data.get_mut(self.end..self.end + Header::SIZE) {
            room.copy_from_slice(&header.to_bytes());
            self.end += Header::SIZE + size;
        }
    }

    /// Writes what the socket takes. `Ok(false)` when it is full.
    pub fn flush(&mut self, socket: impl AsFd) -> Result<bool, Errno> {
        while !self.is_empty() {
            let written = match self.write_once(socket.as_fd()) {
                Ok(written) => written,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno),
            };
            let partial = written < self.len();
            self.consume(written);
            if partial {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write_once(&self, socket: impl AsFd) -> Result<usize, Errno> {
        let bulk = self.data.get(self.start..self.end).unwrap_or_default();
        if self.urgent.is_empty() {
            return rustix::io::write(socket, bulk);
        }
        let (begun, later) = bulk.split_at((self.boundary - self.start).min(bulk.len()));
        let slices = [IoSlice::new(begun), IoSlice::new(&self.urgent), IoSlice::new(later)];
        rustix::io::writev(socket, &slices)
    }

    fn consume(&mut self, mut count: usize) {
        let begun = self.boundary.min(self.end) - self.start;
        let first = count.min(begun);
        self.start += first;
        count -= first;
        let urgent = count.min(self.urgent.len());
        self.urgent.drain(..urgent);
        self.start += count - urgent;
        while self.boundary < self.start {
            let Some(length) = self.data.get(self.boundary..).and_then(|rest| rest.first_chunk::<4>()) else {
                break;
            };
            self.boundary += Header::SIZE + u32::from_le_bytes(*length) as usize;
        }
        if self.start == self.end {
            (self.start, self.end, self.boundary) = (0, 0, 0);
        }
    }

    fn make_room(&mut self, size: usize) {
        if self.end + size <= self.data.len() {
            return;
        }
        let live = self.end - self.start;
        if live + size <= self.data.len() {
            self.data.copy_within(self.start..self.end, 0);
        } else {
            // New zeroed pages cost nothing until they are touched; growing in place would clear them all.
            let mut larger = vec![0; (live + size).max(SOFT_LIMIT + 2 * CHUNK).next_power_of_two()];
            let kept = self.data.get(self.start..self.end).unwrap_or_default();
            larger.get_mut(..live).unwrap_or_default().copy_from_slice(kept);
            self.data = larger;
        }
        self.boundary -= self.start;
        (self.start, self.end) = (0, live);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubby_protocol::Decoder;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn urgent_frames_pass_everything_but_the_frame_being_written() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        let mut output = Output::default();
        for id in 1..=30 {
            output.room(CHUNK).fill(7);
            output.commit(Kind::Stdout, SessionId(id), CHUNK);
        }
        assert_eq!(output.flush(&ours), Ok(false));
        output.urgent(Kind::Pong, SessionId::CONNECTION, b"now").unwrap();
        let (mut decoder, mut order, mut buffer) = (Decoder::default(), Vec::new(), vec![0; 1 << 16]);
        while order.len() < 31 {
            output.flush(&ours).unwrap();
            let count = rustix::io::read(&theirs, &mut buffer[..]).unwrap();
            decoder.push(&buffer[..count]);
            while let Some(frame) = decoder.next_frame().unwrap() {
                order.push((frame.header.kind, frame.header.session.0));
            }
        }
        let place = order.iter().position(|(kind, _)| *kind == Kind::Pong).unwrap();
        assert!(place < 15, "the answer came {place}th");
        let rest: Vec<u32> =
            order.iter().filter(|(kind, _)| *kind == Kind::Stdout).map(|(_, id)| *id).collect();
        assert_eq!(rest, (1..=30).collect::<Vec<_>>());
        assert!(output.is_empty());
    }
}
