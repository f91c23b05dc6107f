//! Files of this computer on their way in and out, as data and holes. All of this blocks, and is done on tokio's threads
//! for that.

use std::fs::{File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use cubby_protocol::CHUNK;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, R};

/// How much is read or written in one go on a thread.
pub(super) const BATCH: usize = 4 * CHUNK;

/// A piece of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// What lies there; never nothing.
    Data(Bytes),
    /// So many zeroes of which nothing lies there.
    Hole(u64),
}

impl Piece {
    /// How much of the file it is, in bytes.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Hole(size) => *size,
        }
    }

    /// How much of it is sent, in bytes.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Data(bytes) => bytes.len(),
            Self::Hole(_) => 0,
        }
    }
}

/// Does something with files of this computer, on a thread where it may block. A failure is one of `path`.
pub(super) async fn on_host<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> R<T> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|source| Error::File { path: path.to_owned(), source })
}

/// A file that is read.
#[derive(Debug)]
pub(super) struct Source {
    file: File,
    at: u64,
    /// Where the data ends that `at` is in.
    data_until: u64,
}

impl Source {
    /// Opens a regular file, through a symbolic link or not.
    pub(super) fn open(path: &Path, follow: bool) -> io::Result<(Self, Metadata)> {
        let link = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
        // What is no regular file any more must not block.
        let flags = (link | OFlags::NONBLOCK).bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Errno::OPNOTSUPP.into());
        }
        let sparse = metadata.blocks().saturating_mul(512) < metadata.len();
        Ok((Self { file, at: 0, data_until: if sparse { 0 } else { u64::MAX } }, metadata))
    }

    /// The next pieces, of [`BATCH`] bytes at most, and whether they are the last.
    pub(super) fn gather(&mut self) -> io::Result<(Vec<Piece>, bool)> {
        let (mut pieces, mut room) = (Vec::new(), BATCH);
        while room > 0 {
            if self.at >= self.data_until {
                let data = self.next_data()?;
                if data > self.at {
                    pieces.push(Piece::Hole(data - self.at));
                    self.at = data;
                }
            }
            let most = usize::try_from(self.data_until - self.at).unwrap_or(room).min(room).min(CHUNK);
            let mut bytes = vec![0; most];
            let count = self.file.read_at(&mut bytes, self.at)?;
            if count == 0 {
                return Ok((pieces, true));
            }
            bytes.truncate(count);
            pieces.push(Piece::Data(bytes.into()));
            self.at += count as u64;
            room -= count;
        }
        Ok((pieces, false))
    }

    /// Where the next data begins (lseek(2), `SEEK_DATA`); after the last of it, the file's end.
    fn next_data(&mut self) -> io::Result<u64> {
        use rustix::fs::{SeekFrom, seek};
        self.data_until = u64::MAX;
        match seek(&self.file, SeekFrom::Data(self.at)) {
            Ok(data) => {
                self.data_until = seek(&self.file, SeekFrom::Hole(data))?;
                Ok(data)
            }
            Err(Errno::NXIO) => Ok(self.file.metadata()?.len().max(self.at)),
            // Whoever cannot tell has none.
            Err(_) => Ok(self.at),
        }
    }
}

/// What a copy gets at its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    /// Permissions, of which a copy gets the lower nine bits: nothing that comes from a guest runs as somebody else.
    pub(super) mode: u32,
    /// User and group, if they are kept.
    pub(super) owner: Option<(u32, u32)>,
    /// When it was last read.
    pub(super) accessed: SystemTime,
    /// When it was last written.
    pub(super) modified: SystemTime,
}

impl Attributes {
    /// Gives them to an open file or directory.
    pub(super) fn give(&self, file: &File) -> io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        file.set_permissions(Permissions::from_mode(self.mode & 0o777))?;
        file.set_times(FileTimes::new().set_accessed(self.accessed).set_modified(self.modified))
    }
}

/// A file that is written.
#[derive(Debug)]
pub(super) struct Target {
    file: File,
    /// Only a regular file has holes and attributes.
    regular: bool,
    hole: bool,
}

impl Target {
    /// An open file without bytes.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let regular = file.metadata()?.is_file();
        Ok(Self { file, regular, hole: false })
    }

    /// Writes the next pieces.
    pub(super) fn put(&mut self, pieces: &[Piece]) -> io::Result<()> {
        for piece in pieces {
            match piece {
                Piece::Data(bytes) => self.file.write_all(bytes)?,
                Piece::Hole(size) if self.regular => {
                    let size = i64::try_from(*size).map_err(|_| Errno::FBIG)?;
                    self.file.seek(SeekFrom::Current(size))?;
                }
                Piece::Hole(size) => {
                    io::copy(&mut io::Read::take(io::repeat(0), *size), &mut self.file)?;
                }
            }
            self.hole = matches!(piece, Piece::Hole(_));
        }
        Ok(())
    }

    /// Gives it its length and its attributes.
    pub(super) fn finish(mut self, attributes: &Attributes) -> io::Result<()> {
        if !self.regular {
            return Ok(());
        }
        if self.hole {
            let length = self.file.stream_position()?;
            self.file.set_len(length)?;
        }
        attributes.give(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_out_of_its_pieces_as_it_was_holes_and_all() {
        let scratch = tempfile::tempdir().unwrap();
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        let mut file = File::create(&from).unwrap();
        file.write_all(b"head").unwrap();
        file.seek(SeekFrom::Start(3 << 30)).unwrap();
        file.write_all(&[7; BATCH + 5]).unwrap();
        file.set_len(5 << 30).unwrap();
        let (mut source, metadata) = Source::open(&from, false).unwrap();
        let mut target = Target::new(File::create(&to).unwrap()).unwrap();
        let (mut sent, mut last) = (0, false);
        while !last {
            let (pieces, end) = source.gather().unwrap();
            sent += pieces.iter().map(Piece::weight).sum::<usize>();
            target.put(&pieces).unwrap();
            last = end;
        }
        let time = SystemTime::UNIX_EPOCH;
        let attributes = Attributes { mode: 0o6751, owner: None, accessed: time, modified: time };
        target.finish(&attributes).unwrap();
        assert!(sent < 2 * BATCH, "{sent} bytes of a file of few");
        let copied = std::fs::metadata(&to).unwrap();
        assert_eq!((copied.len(), copied.permissions().mode() & 0o7777), (5 << 30, 0o751));
        assert_eq!(copied.modified().unwrap(), time);
        assert!(copied.blocks() <= metadata.blocks() + 16, "{} blocks", copied.blocks());
        let at = |offset| {
            let mut bytes = [1; 4];
            File::open(&to).unwrap().read_exact_at(&mut bytes, offset).unwrap();
            bytes
        };
        assert_eq!((at(0), at(1 << 30), at((3 << 30) - 2)), (*b"head", [0; 4], [0, 0, 7, 7]));
        assert_eq!(at((3 << 30) + BATCH as u64 + 3), [7, 7, 0, 0]);
        // Nothing is followed that is not to be, and nothing blocks.
        std::os::unix::fs::symlink(&from, scratch.path().join("link")).unwrap();
        assert!(Source::open(&scratch.path().join("link"), false).is_err());
        assert!(Source::open(&scratch.path().join("link"), true).is_ok());
        assert!(Source::open(scratch.path(), false).is_err());
    }
}
