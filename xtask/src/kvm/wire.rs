//! What a client and the server inside the KVM test machine say to each other over one connection for each command:
//! frames of a kind, a length and a payload. The server speaks first, so that a client knows it is there.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The longest payload. Only a request comes near it (a large environment).
const MAX_PAYLOAD: usize = 4 << 20;

/// The secret that opens a connection to the server; it comes before the first frame.
pub const TOKEN_SIZE: usize = 32;

/// One thing said.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// Server: ready for a request.
    Hello,
    /// Client: run this; first and once.
    Request(Request),
    /// Client: standard input. Empty at its end.
    Stdin(Vec<u8>),
    /// Server: standard output.
    Stdout(Vec<u8>),
    /// Server: standard error.
    Stderr(Vec<u8>),
    /// Server, last: the command ended with this status (128 plus the number of the signal that killed it).
    Exit(u8),
    /// Server, last: the command could not be run.
    Failed(String),
}

/// A command. Strings are bytes, because that is what they are to the system.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The program and its arguments.
    pub arguments: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// The directory to run in.
    pub directory: Vec<u8>,
    /// Directories of the host that are to be the host's own, writable, and not an overlay.
    pub shared: Vec<Vec<u8>>,
    /// Whom to run it as.
    pub user: u32,
    /// The group.
    pub group: u32,
}

/// Sends one frame.
pub fn send(to: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let json;
    let (kind, payload): (u8, &[u8]) = match frame {
        Frame::Hello => (0, &[]),
        Frame::Request(request) => {
            json = serde_json::to_vec(request)?;
            (1, &json)
        }
        Frame::Stdin(bytes) => (2, bytes),
        Frame::Stdout(bytes) => (3, bytes),
        Frame::Stderr(bytes) => (4, bytes),
        Frame::Exit(code) => (5, std::slice::from_ref(code)),
        Frame::Failed(why) => (6, why.as_bytes()),
    };
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(payload.len() + 5);
    bytes.push(kind);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes)
}

/// Receives one frame; `None` when the other side has closed the connection between two.
pub fn receive(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut kind = [0];
    if from.read(&mut kind)? == 0 {
        return Ok(None);
    }
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_PAYLOAD {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some(match (kind, payload.as_slice()) {
        ([0], []) => Frame::Hello,
        ([1], json) => Frame::Request(serde_json::from_slice(json)?),
        ([2], _) => Frame::Stdin(payload),
        ([3], _) => Frame::Stdout(payload),
        ([4], _) => Frame::Stderr(payload),
        ([5], &[code]) => Frame::Exit(code),
        ([6], text) => Frame::Failed(String::from_utf8_lossy(text).into_owned()),
        ([kind], _) => return Err(io::Error::other(format!("no frame is of kind {kind}, length {length}"))),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_arrives_as_it_was_sent() {
        let request = Request {
            arguments: vec![b"sh".to_vec(), vec![0xff, 0]],
            environment: vec![(b"A".to_vec(), b"\xfe".to_vec())],
            directory: b"/".to_vec(),
            shared: vec![b"/x".to_vec()],
            user: 1,
            group: 2,
        };
        let frames = [
            Frame::Hello,
            Frame::Request(request),
            Frame::Stdin(vec![]),
            Frame::Stdout(vec![1, 2]),
            Frame::Stderr(vec![3; 70_000]),
            Frame::Exit(7),
            Frame::Failed("why".into()),
        ];
        let mut bytes = vec![];
        frames.iter().for_each(|frame| send(&mut bytes, frame).unwrap());
        let mut from = bytes.as_slice();
        for frame in frames {
            assert_eq!(receive(&mut from).unwrap(), Some(frame));
        }
        assert_eq!(receive(&mut from).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        for bytes in
            [&[9, 0, 0, 0, 0][..], &[3, 255, 255, 255, 255], &[5, 0, 0, 0, 0], &[3, 2, 0, 0, 0, 1], &[3, 2]]
        {
            assert!(receive(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
