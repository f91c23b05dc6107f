//! The owner's record of all frames: a file in pcap's format, opened before the lock-in, of bounded size. It ends when
//! that is reached, or when the file takes no more, and the network goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cubby_network::Pcap;

/// The most bytes of a record.
pub(crate) const MOST: u64 = 256 << 20;

/// Begins a record, in the place of what the file had before.
pub(super) fn begin(path: &Path) -> io::Result<Pcap> {
    // Not to wait for the reader of a pipe.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().write(true).create(true).mode(0o600).custom_flags(nonblock).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    file.set_len(0)?;
    Pcap::new(Box::new(Capture { file, left: MOST }))
}

/// The file. A record is written to it by one call.
struct Capture {
    file: File,
    left: u64,
}

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let outcome = match self.left.checked_sub(u64::try_from(bytes.len()).unwrap_or(u64::MAX)) {
            Some(_) => self.file.write(bytes),
            None => Err(io::Error::other(format!("it has the {MOST} bytes that it may have"))),
        };
        match &outcome {
            Ok(written) => self.left -= u64::try_from(*written).unwrap_or(self.left).min(self.left),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => crate::say(format_args!("network: the capture ends here: {error}")),
        }
        outcome
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_replaces_the_one_before_and_nobody_else_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        std::fs::write(&path, [0; 100]).unwrap();
        drop(begin(&path).unwrap());
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (24, &[0x4d, 0x3c, 0xb2, 0xa1][..]));
        let new = dir.path().join("new.pcap");
        drop(begin(&new).unwrap());
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&new).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        for wrong in [Path::new("/dev/null"), dir.path(), Path::new("/no/such/directory/x")] {
            assert!(begin(wrong).is_err(), "{}", wrong.display());
        }
    }

    #[test]
    fn a_record_ends_before_the_frame_that_does_not_fit() {
        let file = tempfile::tempfile().unwrap();
        let mut capture = Capture { file: file.try_clone().unwrap(), left: 100 };
        capture.write_all(&[1; 60]).unwrap();
        assert!(capture.write_all(&[2; 41]).is_err());
        assert_eq!(file.metadata().unwrap().len(), 60);
        capture.write_all(&[3; 40]).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 100);
    }
}
