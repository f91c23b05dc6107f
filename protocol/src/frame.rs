//! The frame: a header of fixed layout, and the decoder that cuts a byte stream into frames.

use crate::{MAX_FRAME, MAX_PAYLOAD};

/// Names one session on one connection. Zero is the connection itself; the client picks the others and
/// does not use one again while it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u32);

impl SessionId {
    /// The connection itself.
    pub const CONNECTION: Self = Self(0);
}

/// What a frame does on a client's connection, which is all that a relay has to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// About the connection itself: [`Kind::Hello`], [`Kind::Fatal`], [`Kind::Ping`], [`Kind::Pong`].
    Connection,
    /// On the agent's control connection alone.
    Control,
    /// Between an application and the sandbox process.
    Call,
    /// An application's: opens the session that it names.
    Opens,
    /// The same for a session that only listens: it is use of the sandbox, and no work that a drain waits for.
    Listens,
    /// An application's: a question about the guest that is no use of it. One frame answers; no session is open.
    Asks,
    /// An application's, in an open session.
    ToGuest,
    /// The agent's, in an open session.
    FromGuest,
    /// Either side's, in an open session.
    Both,
    /// Whoever has the session's other end: ends it.
    Ends,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $role:ident;)*) => {
        /// What a frame is. The value is the byte on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $value,)* }

        impl Kind {
            /// Every kind, in the order of its byte.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What it does on a client's connection.
            pub fn role(self) -> Role {
                match self { $(Self::$name => Role::$role,)* }
            }
        }

        impl TryFrom<u8> for Kind {
            type Error = FrameError;
            fn try_from(byte: u8) -> Result<Self, FrameError> {
                match byte { $($value => Ok(Self::$name),)* _ => Err(FrameError::UnknownKind(byte)) }
            }
        }
    };
}

kinds! {
    /// First frame each way: [`crate::Hello`].
    Hello = 0x01, Connection;
    /// The sender cannot go on and closes the connection: [`crate::message::Fatal`].
    Fatal = 0x02, Connection;
    /// Asks the peer for a [`Kind::Pong`] with the same session and payload; the session need not be open.
    Ping = 0x03, Connection;
    /// Answers a [`Kind::Ping`].
    Pong = 0x04, Connection;

    /// Sandbox process to agent, once, on the control connection: [`crate::message::GuestConfig`].
    Configure = 0x10, Control;
    /// Agent to sandbox process: the guest takes sessions from now on: [`crate::message::GuestReady`].
    Ready = 0x11, Control;
    /// Agent to sandbox process: set-up failed: [`crate::message::SetupFailed`].
    SetupFailed = 0x12, Control;
    /// Sandbox process to agent: end every process, sync and power off: [`crate::message::Shutdown`].
    Shutdown = 0x13, Control;
    /// Agent to sandbox process: disks are synced and power-off follows. No payload.
    PoweringOff = 0x14, Control;
    /// Sandbox process to agent: the wall clock is now this: [`crate::message::SetClock`].
    SetClock = 0x15, Control;

    /// Application to sandbox process: [`crate::message::Request`]; the session names the call.
    Request = 0x20, Call;
    /// Answers a [`Kind::Request`] of the same session: [`crate::message::Reply`].
    Reply = 0x21, Call;
    /// Application to sandbox process: opens a session for what happens in the guest's network. No payload. It is no use of
    /// the sandbox. Answered by [`Kind::Subscribed`] or [`Kind::Refused`]; [`Kind::Credit`] asks for more, by bytes of
    /// payload, and [`Kind::Abandon`] ends it.
    WatchNetwork = 0x22, Call;
    /// Sandbox process to application, in such a session: [`crate::message::NetworkEvent`].
    NetworkEvent = 0x23, Call;

    /// Opens a session: [`crate::message::Open`].
    Open = 0x40, Opens;
    /// The command runs: [`crate::message::Started`].
    Started = 0x41, FromGuest;
    /// Raw bytes of standard output, or of the terminal.
    Stdout = 0x42, FromGuest;
    /// Raw bytes of standard error.
    Stderr = 0x43, FromGuest;
    /// The command ended and all of its output was sent; ends the session: [`crate::message::Exited`].
    Exited = 0x44, Ends;
    /// The command could not run; ends the session: [`crate::message::ExecFailed`].
    Failed = 0x45, Ends;
    /// Nobody took the session; ends it: [`crate::message::Refused`].
    Refused = 0x46, Ends;
    /// Raw bytes for standard input.
    Stdin = 0x47, ToGuest;
    /// End of standard input. No payload.
    StdinClose = 0x48, ToGuest;
    /// Sends a signal to the command's process group: [`crate::message::Signal`].
    Signal = 0x49, ToGuest;
    /// The terminal's new size: [`crate::message::TtySize`].
    Resize = 0x4a, ToGuest;
    /// The receiver of bulk data is ready for more: [`crate::message::Credit`].
    Credit = 0x4b, Both;

    /// Opens a session for one thing with files: [`crate::message::FileRequest`].
    FileRequest = 0x50, Opens;
    /// The file to be read is open: [`crate::message::FileMetadata`].
    FileOpened = 0x51, FromGuest;
    /// Raw bytes of a file.
    FileData = 0x52, Both;
    /// A hole in a file: [`crate::message::FileHole`].
    FileHole = 0x53, Both;
    /// Some of a directory: [`crate::message::FileEntries`].
    FileEntries = 0x54, FromGuest;
    /// All bytes of the file to be written were sent. No payload.
    FileEnd = 0x55, ToGuest;
    /// Nobody wants it any more. No payload.
    FileCancel = 0x56, ToGuest;
    /// It was done; ends the session: [`crate::message::FileDone`].
    FileDone = 0x57, Ends;
    /// It could not be done; ends the session: [`crate::message::FileFailed`].
    FileFailed = 0x58, Ends;

    /// An event for the guest's processes: one line of JSON, without its newline. The session is this one question.
    Emit = 0x60, Opens;
    /// The agent has it for those who listen; ends the session. No payload.
    Emitted = 0x61, Ends;
    /// Opens a session for events of the guest's processes: [`crate::message::Subscribe`].
    Subscribe = 0x62, Listens;
    /// What guest processes write from now on arrives. No payload.
    Subscribed = 0x63, FromGuest;
    /// An event of a guest process: [`crate::message::Event`].
    Event = 0x64, FromGuest;
    /// Enough of them. No payload.
    Unsubscribe = 0x65, ToGuest;
    /// No event follows; ends the session. No payload.
    Unsubscribed = 0x66, Ends;

    /// Asks what the guest uses. No payload.
    Measure = 0x68, Asks;
    /// Answers: [`crate::message::GuestMetrics`].
    Measured = 0x69, FromGuest;
    /// Application to sandbox process: opens a session that is another way into a detached one:
    /// [`crate::message::Attach`]. Its answers are those to an [`Kind::Open`].
    Attach = 0x4c, Call;
    /// The application gives the session up: its command is killed, and nothing of it follows. A session that was opened by
    /// [`Kind::Attach`] ends alone. No payload.
    Abandon = 0x4d, ToGuest;
    /// Sandbox process to application, after its Hello: [`crate::message::Welcome`].
    Welcome = 0x4e, Call;
}

impl Kind {
    /// Whether this frame ends its session.
    pub fn ends_session(self) -> bool {
        self.role() == Role::Ends
    }
}

/// The twelve bytes before every payload.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | payload length in bytes |
/// | 4 | 1 | kind |
/// | 5 | 3 | reserved, zero |
/// | 8 | 4 | session |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the payload in bytes, at most [`MAX_PAYLOAD`].
    pub length: u32,
    /// What the payload is.
    pub kind: Kind,
    /// Whom it concerns.
    pub session: SessionId,
}

impl Header {
    /// Size on the wire in bytes.
    pub const SIZE: usize = 12;

    /// The header's bytes.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [s0, s1, s2, s3] = self.session.0.to_le_bytes();
        [l0, l1, l2, l3, self.kind as u8, 0, 0, 0, s0, s1, s2, s3]
    }

    /// Reads a header and holds it to every rule.
    pub fn from_bytes(bytes: [u8; Self::SIZE]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, kind, r0, r1, r2, s0, s1, s2, s3] = bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong { length });
        }
        if [r0, r1, r2] != [0; 3] {
            return Err(FrameError::ReservedBits);
        }
        let session = SessionId(u32::from_le_bytes([s0, s1, s2, s3]));
        Ok(Self { length, kind: Kind::try_from(kind)?, session })
    }
}

/// Why bytes are not a frame of this protocol. The connection that sent them is beyond use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field is over the limit.
    #[error("frame of {length} payload bytes is over the limit of {MAX_PAYLOAD}")]
    TooLong {
        /// What the header said, in bytes.
        length: u32,
    },
    /// No kind has this byte.
    #[error("unknown frame kind {0:#04x}")]
    UnknownKind(u8),
    /// A reserved byte of the header is not zero.
    #[error("reserved header bytes are set")]
    ReservedBits,
    /// The payload is not the message that the kind promises.
    #[error("malformed {what} message: {why}")]
    Malformed {
        /// The message's type.
        what: &'static str,
        /// What the decoder found.
        why: String,
    },
    /// The message does not fit into a frame.
    #[error("{what} message does not fit into a frame of {MAX_FRAME} bytes")]
    DoesNotFit {
        /// The message's type.
        what: &'static str,
    },
}

/// One whole frame inside a [`Decoder`]'s buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The decoded header.
    pub header: Header,
    /// Header and payload as they came, to pass on unread.
    pub bytes: &'a [u8],
}

impl<'a> Frame<'a> {
    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        self.bytes.get(Header::SIZE..).unwrap_or_default()
    }
}

/// Cuts a byte stream into frames. It holds at most one frame and what came behind it in the same read.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Decoder {
    /// Room for the next read: at least one byte, usually [`crate::CHUNK`] and more.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let want = (self.end + crate::CHUNK + Header::SIZE).max(self.frame_size());
        if self.buffer.len() < want {
            self.buffer.resize(want, 0);
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// Says how many bytes of [`Self::space`] the read filled.
    pub fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
    }

    /// Copies bytes in, for a caller that has them elsewhere already.
    pub fn push(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let space = self.space();
            let (now, later) = rest.split_at(rest.len().min(space.len()));
            if let Some(target) = space.get_mut(..now.len()) {
                target.copy_from_slice(now);
            }
            self.filled(now.len());
            rest = later;
        }
    }

    /// Takes the next whole frame, if there is one.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let Some(header) = self.peek()? else { return Ok(None) };
        let size = Header::SIZE + header.length as usize;
        if self.end - self.start < size {
            return Ok(None);
        }
        let from = self.start;
        self.start += size;
        let bytes = self.buffer.get(from..from + size).unwrap_or_default();
        Ok(Some(Frame { header, bytes }))
    }

    /// Whether bytes of an unfinished frame are waiting: at the end of a stream this means it was cut off.
    pub fn is_mid_frame(&self) -> bool {
        self.end > self.start
    }

    fn peek(&self) -> Result<Option<Header>, FrameError> {
        let held = self.buffer.get(self.start..self.end).unwrap_or_default();
        held.first_chunk().map(|bytes| Header::from_bytes(*bytes)).transpose()
    }

    fn frame_size(&self) -> usize {
        match self.peek() {
            Ok(Some(header)) => Header::SIZE + header.length as usize,
            _ => Header::SIZE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_its_golden_bytes() {
        let header = Header { length: 0x0001_0203, kind: Kind::Stdout, session: SessionId(0xa0b0_c0d0) };
        let header = Header { length: header.length & 0xffff, ..header };
        assert_eq!(header.to_bytes(), [0x03, 0x02, 0, 0, 0x42, 0, 0, 0, 0xd0, 0xc0, 0xb0, 0xa0]);
        assert_eq!(Header::from_bytes(header.to_bytes()), Ok(header));
    }

    #[test]
    fn every_kind_survives_its_byte_and_no_other_byte_is_one() {
        let known: Vec<u8> = Kind::ALL.iter().map(|kind| *kind as u8).collect();
        for byte in 0..=u8::MAX {
            match Kind::try_from(byte) {
                Ok(kind) => assert_eq!(kind as u8, byte),
                Err(error) => {
                    assert!(!known.contains(&byte));
                    assert_eq!(error, FrameError::UnknownKind(byte));
                }
            }
        }
    }

    #[test]
    fn bad_headers_are_refused() {
        let good = Header { length: 0, kind: Kind::Ping, session: SessionId(1) }.to_bytes();
        let mut long = good;
        long[..4].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        assert_eq!(
            Header::from_bytes(long),
            Err(FrameError::TooLong { length: u32::try_from(MAX_PAYLOAD).unwrap() + 1 })
        );
        for at in 5..8 {
            let mut reserved = good;
            reserved[at] = 1;
            assert_eq!(Header::from_bytes(reserved), Err(FrameError::ReservedBits));
        }
    }

    #[test]
    fn decoder_finds_the_same_frames_however_the_stream_is_cut() {
        let mut stream = Vec::new();
        let sizes = [0usize, 1, 11, 12, 13, 70_000, MAX_PAYLOAD, 3];
        for (index, size) in sizes.iter().enumerate() {
            let session = SessionId(u32::try_from(index).unwrap());
            crate::encode_raw(Kind::Stdin, session, &vec![index as u8; *size], &mut stream).unwrap();
        }
        for step in [1usize, 7, 4096, 1 << 21] {
            let step = if step == 1 { 97 } else { step };
            let (mut decoder, mut seen) = (Decoder::default(), 0);
            for piece in stream.chunks(step) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    assert_eq!(frame.header.session.0 as usize, seen);
                    assert_eq!(frame.payload().len(), sizes[seen]);
                    assert!(frame.payload().iter().all(|byte| *byte as usize == seen));
                    assert_eq!(frame.bytes.len(), Header::SIZE + sizes[seen]);
                    seen += 1;
                }
            }
            assert_eq!(seen, sizes.len());
            assert!(!decoder.is_mid_frame());
        }
    }

    #[test]
    fn decoder_reports_a_cut_off_stream_and_a_bad_header() {
        let mut decoder = Decoder::default();
        decoder.push(&[1, 0, 0]);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.is_mid_frame());
        decoder.push(&[0, 0xff, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::UnknownKind(0xff)));
    }
}
