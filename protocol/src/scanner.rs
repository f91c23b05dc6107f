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

impl Scanner {
    /// Goes over the next bytes of the stream and calls `on_header` for each header that ends in them.
    pub fn scan(&mut self, bytes: &[u8], mut on_header: impl FnMut(Header)) -> Result<(), FrameError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.payload_left > 0 {
                let (payload, later) = rest.split_at(self.payload_left.min(rest.len()));
                self.payload_left -= payload.len();
                rest = later;
                continue;
            }
            let free = self.partial.get_mut(self.partial_length..).unwrap_or_default();
            let (now, later) = rest.split_at(free.len().min(rest.len()));
            for (to, from) in free.iter_mut().zip(now) {
                *to = *from;
            }
            self.partial_length += now.len();
            rest = later;
            if self.partial_length == Header::SIZE {
                let header = Header::from_bytes(self.partial)?;
                self.partial_length = 0;
                self.payload_left = header.length as usize;
                on_header(header);
            }
        }
        Ok(())
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
