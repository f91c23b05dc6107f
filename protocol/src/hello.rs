//! The first frame each way. Its layout never changes, whatever the version, so that two builds that do
//! not fit together can still say so.

use crate::{FrameError, Header, Kind, SessionId};

const MAGIC: [u8; 4] = *b"cuby";

/// Who is speaking: sixteen little-endian bytes (magic, version, reserved, features).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The protocol's version. Peers work together only if theirs are equal. It is 1 until something is released; from then
    /// on each change that the other side would misread raises it by one: a kind or a message that is another, or gone.
    /// What is only asked for by those who know of it, and answered by those who do, is a feature instead.
    pub version: u16,
    /// Optional abilities, one bit each; a peer uses what both have. None is defined yet.
    pub features: u64,
}

/// The peers were built from different protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("protocol version {theirs} does not fit ours, {ours}: install matching versions on both sides")]
pub struct VersionMismatch {
    /// What this build speaks.
    pub ours: u16,
    /// What the peer speaks.
    pub theirs: u16,
}

impl Hello {
    /// What this build speaks.
    pub const OURS: Self = Self { version: 1, features: 0 };

    /// Size of the payload in bytes.
    pub const SIZE: usize = 16;

    /// The whole frame, header included.
    pub fn to_frame(self) -> [u8; Header::SIZE + Self::SIZE] {
        #[allow(clippy::cast_possible_truncation)] // Sixteen fits.
        let header = Header { length: Self::SIZE as u32, kind: Kind::Hello, session: SessionId::CONNECTION };
        let mut frame = [0; Header::SIZE + Self::SIZE];
        let (head, payload) = frame.split_at_mut(Header::SIZE);
        head.copy_from_slice(&header.to_bytes());
        let [v0, v1] = self.version.to_le_bytes();
        let [m0, m1, m2, m3] = MAGIC;
        let (who, features) = payload.split_at_mut(8);
        who.copy_from_slice(&[m0, m1, m2, m3, v0, v1, 0, 0]);
        features.copy_from_slice(&self.features.to_le_bytes());
        frame
    }

    /// Reads the payload of a [`Kind::Hello`] frame.
    pub fn from_payload(payload: &[u8]) -> Result<Self, FrameError> {
        let malformed = |why: &str| FrameError::Malformed { what: "Hello", why: why.into() };
        let bytes: [u8; Self::SIZE] = payload.try_into().map_err(|_| malformed("not 16 bytes long"))?;
        let [m0, m1, m2, m3, v0, v1, _, _, features @ ..] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(malformed("the magic number is not ours"));
        }
        Ok(Self { version: u16::from_le_bytes([v0, v1]), features: u64::from_le_bytes(features) })
    }

    /// Whether a peer that said `self` can work with us, and with which features.
    pub fn agree(self) -> Result<u64, VersionMismatch> {
        let ours = Self::OURS;
        if self.version == ours.version {
            Ok(self.features & ours.features)
        } else {
            Err(VersionMismatch { ours: ours.version, theirs: self.version })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_has_its_golden_bytes() {
        let frame = Hello { version: 1, features: 0x0102 }.to_frame();
        let golden = [
            16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, // header
            b'c', b'u', b'b', b'y', 1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(frame, golden);
        let read = Hello::from_payload(&frame[Header::SIZE..]).unwrap();
        assert_eq!(read, Hello { version: 1, features: 0x0102 });
    }

    #[test]
    fn another_version_is_a_typed_error_and_another_protocol_malformed() {
        let theirs = Hello { version: 2, ..Hello::OURS };
        assert_eq!(theirs.agree(), Err(VersionMismatch { ours: 1, theirs: 2 }));
        assert_eq!(Hello::OURS.agree(), Ok(0));
        assert!(matches!(Hello::from_payload(b"HTTP/1.1 400 Bad"), Err(FrameError::Malformed { .. })));
        assert!(matches!(Hello::from_payload(b""), Err(FrameError::Malformed { .. })));
    }
}
