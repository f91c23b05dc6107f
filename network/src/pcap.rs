//! A record of the guest's frames, in the format of libpcap: nanoseconds, Ethernet.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
/// What is kept of a frame.
const SNAP: usize = 65_553;

/// Writes frames to where its owner likes. A frame that cannot be written ends the record, not the network.
pub struct Pcap {
    out: Option<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for Pcap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pcap").field("writes", &self.out.is_some()).finish()
    }
}

impl Pcap {
    /// Begins a record.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(mut out: Box<dyn Write + Send>) -> io::Result<Self> {
        let mut header = Vec::with_capacity(24);
        header.extend_from_slice(&MAGIC_NANOSECONDS.to_le_bytes());
        for version in [2u16, 4] {
            header.extend_from_slice(&version.to_le_bytes());
        }
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&u32::try_from(SNAP).unwrap_or(u32::MAX).to_le_bytes());
        header.extend_from_slice(&ETHERNET.to_le_bytes());
        out.write_all(&header)?;
        Ok(Pcap { out: Some(out) })
    }

    pub(crate) fn write(&mut self, pieces: &[&[u8]], at: SystemTime) {
        let Some(out) = &mut self.out else { return };
        let frame = pieces.concat();
        let kept = frame.get(..SNAP).unwrap_or(&frame);
        let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let fields = [
            u32::try_from(at.as_secs()).unwrap_or(u32::MAX),
            at.subsec_nanos(),
            narrow(kept.len()),
            narrow(frame.len()),
        ];
        let mut record = Vec::with_capacity(16 + kept.len());
        for field in fields {
            record.extend_from_slice(&field.to_le_bytes());
        }
        record.extend_from_slice(kept);
        if out.write_all(&record).is_err() {
            self.out = None;
        }
    }
}
