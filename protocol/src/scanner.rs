//! Follows the frames of a stream that somebody else reads: a relay forwards bytes as they come and still
//! knows every header.

use crate::{FrameError, Header};

/// How far into a stream of frames its reader has come. It keeps at most one unfinished header.
#[derive(Clone, Debug, Default)]
pub struct Scanner {
    partial: [u8; Header::SIZE],
    partial_length: usize,
    payload_left: usize,
}

/// What comes next in a stream of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'b> {
    /// A header has come to its end.
    Header(Header),
    /// Some of the payload of the last header's frame, at least a byte.
    Payload(&'b [u8]),
}

impl Scanner {
    /// Takes the next part of the stream off the front of `bytes`; `None` once they are used up.
    pub fn next<'b>(&mut self, bytes: &mut &'b [u8]) -> Result<Option<Part<'b>>, FrameError> {
        if self.payload_left > 0 {
            let (payload, later) = bytes.split_at(self.payload_left.min(bytes.len()));
            self.payload_left -= payload.len();
            *bytes = later;
            return Ok((!payload.is_empty()).then_some(Part::Payload(payload)));
        }
        let free = self.partial.get_mut(self.partial_length..).unwrap_or_default();
        let (now, later) = bytes.split_at(free.len().min(bytes.len()));
        for (to, from) in free.iter_mut().zip(now) {
            *to = *from;
        }
        self.partial_length += now.len();
        *bytes = later;
        if self.partial_length < Header::SIZE {
            return Ok(None);
        }
        let header = Header::from_bytes(self.partial)?;
        self.partial_length = 0;
        self.payload_left = header.length as usize;
        Ok(Some(Part::Header(header)))
    }

    /// Goes over the next bytes of the stream and calls `on_header` for each header that ends in them.
    pub fn scan(&mut self, mut bytes: &[u8], mut on_header: impl FnMut(Header)) -> Result<(), FrameError> {
        while let Some(part) = self.next(&mut bytes)? {
            if let Part::Header(header) = part {
                on_header(header);
            }
        }
        Ok(())
    }

    /// How much of the current frame's payload is still to come, in bytes.
    pub fn payload_left(&self) -> usize {
        self.payload_left
    }

    /// Whether the stream is between two frames, where another frame may be put in.
    pub fn at_boundary(&self) -> bool {
        self.partial_length == 0 && self.payload_left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, SessionId, encode_raw};

    #[test]
    fn every_header_is_seen_however_the_stream_is_cut() {
        let mut stream = Vec::new();
        let sizes = [0usize, 5, 70_000, 1];
        for (session, size) in (0u32..).zip(sizes) {
            encode_raw(Kind::Stdout, SessionId(session), &vec![0; size], &mut stream).unwrap();
        }
        for step in [1, 5, 12, 13, 4096, stream.len()] {
            let mut scanner = Scanner::default();
            let mut seen = Vec::new();
            for piece in stream.chunks(step) {
                scanner.scan(piece, |header| seen.push(header.length as usize)).unwrap();
            }
            assert_eq!(seen, sizes, "in steps of {step}");
            assert!(scanner.at_boundary());
        }
    }

    #[test]
    fn the_boundary_is_only_between_frames() {
        let mut stream = Vec::new();
        encode_raw(Kind::Stdout, SessionId(1), b"abc", &mut stream).unwrap();
        let mut scanner = Scanner::default();
        for (position, byte) in stream.iter().enumerate() {
            assert_eq!(scanner.at_boundary(), position == 0, "before byte {position}");
            scanner.scan(&[*byte], |_| ()).unwrap();
        }
        assert!(scanner.at_boundary());
        assert_eq!(scanner.scan(&[0xff; 12], |_| ()), Err(FrameError::TooLong { length: u32::MAX }));
    }
}
