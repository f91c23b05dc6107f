//! A regular file being read: data as it lies there, holes as their length.

use std::os::fd::OwnedFd;

use cubby_protocol::message::{FileHole, FileMetadata};
use cubby_protocol::{CHUNK, Kind, SessionId};
use rustix::fs::{Mode, OFlags, SeekFrom, fstat, open, seek};
use rustix::io::{Errno, pread};

use super::metadata::{self, describe};
use super::work::{Failure, at};
use crate::output::Output;

/// What a step needs of the window to get on, whatever comes next.
pub const LEAST: usize = HOLE_COST;

const HOLE_COST: usize = FileHole::COST as usize;

/// An open file, and how far it has been read.
#[derive(Debug)]
pub struct Reader {
    fd: OwnedFd,
    path: Vec<u8>,
    at: u64,
    end: u64,
    /// Where the data ends that `at` is in; holes are looked for from there on.
    data_until: u64,
}

impl Reader {
    /// Opens a file. What is no regular file is refused, and is opened only if it became one's successor just now; that
    /// does not block either.
    pub fn open(path: &[u8], offset: u64, length: Option<u64>) -> Result<(Self, FileMetadata), Failure> {
        let failed = at(path);
        let found = rustix::fs::stat(path).map_err(&failed)?;
        metadata::expect_regular(&found).map_err(&failed)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::empty()).map_err(&failed)?;
        let opened = fstat(&fd).map_err(&failed)?;
        metadata::expect_regular(&opened).map_err(&failed)?;
        let description = describe(&opened);
        // What the kernel makes up as it is read, as in /proc, has no length and no holes.
        let sparse = description.allocated < description.size;
        let data_until = if sparse { 0 } else { u64::MAX };
        let end = length.map_or(u64::MAX, |length| offset.saturating_add(length));
        Ok((Self { fd, path: path.to_vec(), at: offset, end, data_until }, description))
    }

    /// Adds frames of the next bytes to `output`, worth `budget` of the window or a little less, and what they cost to
    /// `cost`. Whether that was all.
    pub fn step(
        &mut self,
        session: SessionId,
        budget: usize,
        output: &mut Output,
        cost: &mut usize,
    ) -> Result<bool, Failure> {
        let failed = at(&self.path);
        while *cost < budget {
            if self.at >= self.end {
                return Ok(true);
            }
            if self.at >= self.data_until {
                let (data, until) = self.next_data().map_err(&failed)?;
                self.data_until = until;
                if data > self.at {
                    if budget - *cost < HOLE_COST {
                        self.data_until = self.at; // It is looked for again.
                        return Ok(false);
                    }
                    let bytes = data.min(self.end) - self.at;
                    output.message(Kind::FileHole, session, &FileHole { bytes });
                    *cost += HOLE_COST;
                    self.at += bytes;
                    continue;
                }
            }
            let most = (self.data_until.min(self.end) - self.at).min(CHUNK as u64);
            let size = usize::try_from(most).unwrap_or(CHUNK).min(budget - *cost);
            match pread(&self.fd, output.room(size), self.at) {
                Ok(0) => return Ok(true),
                Ok(count) => {
                    output.commit(Kind::FileData, session, count);
                    *cost += count;
                    self.at += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(false)
    }

    /// Where the next data begins and ends (lseek(2), `SEEK_DATA`). After the last of it comes the file's end.
    fn next_data(&self) -> Result<(u64, u64), Errno> {
        match seek(&self.fd, SeekFrom::Data(self.at)) {
            Ok(data) => Ok((data, seek(&self.fd, SeekFrom::Hole(data))?)),
            // It may have been cut meanwhile.
            Err(Errno::NXIO) => Ok((describe(&fstat(&self.fd)?).size.max(self.at), u64::MAX)),
            // Whoever cannot tell has none.
            Err(_) => Ok((self.at, u64::MAX)),
        }
    }
}
