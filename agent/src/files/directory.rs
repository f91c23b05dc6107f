//! A directory being listed, some entries at a time.

use cubby_protocol::message::{FileEntries, FileEntry, PathBytes};
use cubby_protocol::{Kind, SessionId, encode};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, open, statat};
use rustix::io::Errno;

use super::metadata::describe;
use super::work::{Failure, at};
use crate::output::Output;

/// How many bytes the entries of one step take at most.
pub const BATCH: usize = 32 << 10;

/// How many bytes an entry takes at most: a name of 255, and eleven numbers of nine.
const LARGEST: usize = 400;

/// An open directory, and how far it has been listed.
#[derive(Debug)]
pub struct Lister {
    dir: Dir,
    path: Vec<u8>,
}

impl Lister {
    /// Opens a directory.
    pub fn open(path: &[u8]) -> Result<Self, Failure> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = open(path, flags, Mode::empty()).and_then(Dir::new).map_err(at(path))?;
        Ok(Self { dir, path: path.to_vec() })
    }

    /// Adds a frame of the next entries to `output`, and what it costs to `cost`. Whether that was all.
    pub fn step(
        &mut self,
        session: SessionId,
        output: &mut Output,
        cost: &mut usize,
    ) -> Result<bool, Failure> {
        let failed = at(&self.path);
        let (mut entries, mut size, mut over) = (FileEntries::default(), 0, false);
        while size + LARGEST <= BATCH {
            let Some(entry) = self.dir.read() else {
                over = true;
                break;
            };
            let entry = entry.map_err(&failed)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let fd = self.dir.fd().map_err(&failed)?;
            let found = match statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) => found,
                // It is gone since.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(failed(errno)),
            };
            size += name.to_bytes().len() + LARGEST - 255;
            entries.0.push(FileEntry { name: PathBytes::from(name.to_bytes()), metadata: describe(&found) });
        }
        if !entries.0.is_empty() {
            let mut frame = Vec::new();
            // A batch is far below a frame's limit.
            if encode(Kind::FileEntries, session, &entries, &mut frame).is_ok() {
                *cost += frame.len() - cubby_protocol::Header::SIZE;
                output.raw(&frame);
            }
        }
        Ok(over)
    }
}
