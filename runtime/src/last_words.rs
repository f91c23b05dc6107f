//! The newest of what the guest wrote to its console, where it outlives the sandbox process: a ring in a file
//! without a name, which its keeper reads when the process cannot tell any more.
//!
//! Writing is one system call for each piece of output and nothing is mapped: the position in the ring is that
//! of the open file, which a fork shares.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use cubby_state::ExitReport;
use rustix::fs::{MemfdFlags, memfd_create};

/// The ring. Its clones, and what a fork makes of it, are the same one.
pub(crate) struct LastWords(File);

/// The end of the ring that is written to, by one writer.
struct Pen {
    ring: File,
    at: usize,
}

impl LastWords {
    const SIZE: usize = ExitReport::MAX_CONSOLE_TAIL;

    /// An empty ring, which takes no memory yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(File::from(memfd_create("console", MemfdFlags::CLOEXEC)?)))
    }

    /// What the console's output goes into. There may be one.
    pub(crate) fn pen(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(Pen { ring: self.0.try_clone()?, at: 0 }))
    }

    /// What the ring holds, oldest first. What is no UTF-8 is replaced: the bytes are the guest's.
    pub(crate) fn read(&self) -> io::Result<String> {
        let mut bytes = vec![0; usize::try_from(self.0.metadata()?.len()).unwrap_or(0).min(Self::SIZE)];
        self.0.read_exact_at(&mut bytes, 0)?;
        // In a ring that has never been full, the position is where the bytes end.
        let position = usize::try_from((&self.0).stream_position()?).unwrap_or(0).min(bytes.len());
        bytes.rotate_left(position);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Write for Pen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.at == LastWords::SIZE {
            self.ring.seek(SeekFrom::Start(0))?;
            self.at = 0;
        }
        let room = bytes.len().min(LastWords::SIZE - self.at);
        let written = self.ring.write(bytes.get(..room).unwrap_or_default())?;
        self.at += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_kept_in_its_order() {
        let ring = LastWords::new().unwrap();
        let mut pen = ring.pen().unwrap();
        assert_eq!(ring.read().unwrap(), "");
        pen.write_all(b"panic: ").unwrap();
        pen.write_all(b"\xff\n").unwrap();
        assert_eq!(ring.read().unwrap(), "panic: \u{fffd}\n");

        // Several times around, in pieces that do not fit the size.
        let text: String = (0..40_000).map(|number| format!("{number}\n")).collect();
        for piece in text.as_bytes().chunks(1000) {
            pen.write_all(piece).unwrap();
        }
        assert_eq!(ring.read().unwrap(), text[text.len() - LastWords::SIZE..]);
        // And exactly to its end.
        pen.write_all(&vec![b'x'; LastWords::SIZE]).unwrap();
        assert_eq!(ring.read().unwrap(), "x".repeat(LastWords::SIZE));
    }

    #[test]
    fn whoever_shares_the_file_reads_the_same() {
        let ring = LastWords::new().unwrap();
        let other = LastWords(ring.0.try_clone().unwrap());
        ring.pen().unwrap().write_all(b"words").unwrap();
        assert_eq!(other.read().unwrap(), "words");
    }
}
