//! A regular file being written.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use cubby_protocol::message::{FileAttributes, WriteHow};
use rustix::fs::{Mode, OFlags, Stat, fchmod, fchown, fstat, fsync, ftruncate, futimens, lstat, open};
use rustix::io::{Errno, pwrite, write};

use super::metadata::{self, expect_regular};
use super::work::{Failure, Input, Run, at};

const NEW: Mode = Mode::from_raw_mode(0o644);

/// Flags of everything that is opened to be written: nothing blocks.
const FLAGS: OFlags = OFlags::WRONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

/// A file of no name that others know. Dropped, it is removed.
#[derive(Debug)]
struct Temporary(Vec<u8>);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Who cannot remove it cannot do better.
        let _ = rustix::fs::unlink(&*self.0);
    }
}

/// An open file, and how far it has been written.
#[derive(Debug)]
pub struct Writer {
    fd: OwnedFd,
    path: Vec<u8>,
    temporary: Option<Temporary>,
    append: bool,
    at: u64,
    /// It ends with a hole, which the kernel has not heard of yet.
    hole: bool,
    attributes: FileAttributes,
    sync: bool,
}

impl Writer {
    /// Opens or creates a file. What is there and no regular file is refused.
    pub fn open(
        path: &[u8],
        how: WriteHow,
        mut attributes: FileAttributes,
        sync: bool,
    ) -> Result<Self, Failure> {
        let failed = at(path);
        let mut temporary = None;
        let fd = match how {
            WriteHow::Atomic => {
                let (fd, hidden) = begin_atomic(path, &mut attributes)?;
                temporary = Some(hidden);
                fd
            }
            WriteHow::CreateNew => open(path, FLAGS | OFlags::CREATE | OFlags::EXCL, NEW).map_err(&failed)?,
            WriteHow::Truncate | WriteHow::Append => {
                // Opening it could do something already. Of what is not there the kernel says more.
                if let Ok(found) = rustix::fs::stat(path) {
                    expect_regular(&found).map_err(&failed)?;
                }
                let how = if how == WriteHow::Append { OFlags::APPEND } else { OFlags::TRUNC };
                let fd = open(path, FLAGS | OFlags::CREATE | how, NEW).map_err(&failed)?;
                fstat(&fd).and_then(|found| expect_regular(&found)).map_err(&failed)?;
                fd
            }
        };
        let append = how == WriteHow::Append;
        Ok(Self { fd, path: path.to_vec(), temporary, append, at: 0, hole: false, attributes, sync })
    }

    /// Writes what came.
    pub fn write(&mut self, input: &Input) -> Result<(), Failure> {
        self.take(input).map_err(at(&self.path))
    }

    fn take(&mut self, input: &Input) -> Result<(), Errno> {
        let mut bytes = &input.bytes[..];
        for run in &input.runs {
            match *run {
                Run::Data(size) => {
                    let (now, later) = bytes.split_at(size.min(bytes.len()));
                    bytes = later;
                    self.put(now)?;
                    self.hole = false;
                }
                Run::Hole(_) if self.append => return Err(Errno::INVAL),
                Run::Hole(size) => {
                    let end = self.at.checked_add(size).filter(|end| i64::try_from(*end).is_ok());
                    self.at = end.ok_or(Errno::FBIG)?;
                    self.hole = true;
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let written = if self.append { write(&self.fd, bytes) } else { pwrite(&self.fd, bytes, self.at) };
            match written {
                Ok(count) => {
                    self.at = self.at.saturating_add(count as u64);
                    bytes = bytes.get(count..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Everything was written: gives the file its length, its attributes, and its name.
    pub fn finish(self) -> Result<(), Failure> {
        let failed = at(&self.path);
        if self.hole {
            ftruncate(&self.fd, self.at).map_err(&failed)?;
        }
        let FileAttributes { mode, owner, times } = self.attributes;
        if let Some((uid, gid)) = owner {
            fchown(&self.fd, metadata::user(uid), metadata::group(gid)).map_err(&failed)?;
        }
        if let Some(mode) = mode {
            fchmod(&self.fd, metadata::permissions(mode)).map_err(&failed)?;
        }
        if let Some(times) = times {
            futimens(&self.fd, &metadata::timestamps(times)).map_err(&failed)?;
        }
        if self.sync || self.temporary.is_some() {
            fsync(&self.fd).map_err(&failed)?;
        }
        if let Some(temporary) = self.temporary {
            rustix::fs::rename(&*temporary.0, &*self.path).map_err(&failed)?;
            // It has another name now.
            std::mem::forget(temporary);
            sync_directory(&self.path).map_err(&failed)?;
        }
        Ok(())
    }
}

/// Makes the file that will take the place of `path`, beside it. It is to have the mode and the owner of what is there.
fn begin_atomic(path: &[u8], attributes: &mut FileAttributes) -> Result<(OwnedFd, Temporary), Failure> {
    /// Whoever has left one of these behind had more of them than anybody tries.
    const TRIES: usize = 100;
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let failed = at(path);
    match lstat(path) {
        Ok(found) => match expect_regular(&found) {
            Ok(()) => inherit(attributes, &found),
            // A link is replaced, as a rename replaces it.
            Err(Errno::LOOP) => {}
            Err(errno) => return Err(failed(errno)),
        },
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let directory = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    for _ in 0..TRIES {
        let mut name = path.get(..directory).unwrap_or_default().to_vec();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        name.extend(format!(".cubby-{}-{number}", std::process::id()).bytes());
        match open(&*name, FLAGS | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, NEW) {
            Ok(fd) => return Ok((fd, Temporary(name))),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    Err(failed(Errno::EXIST))
}

fn inherit(attributes: &mut FileAttributes, found: &Stat) {
    attributes.mode = attributes.mode.or(Some(found.st_mode));
    attributes.owner = attributes.owner.or(Some((found.st_uid, found.st_gid)));
}

fn sync_directory(path: &[u8]) -> Result<(), Errno> {
    let parent = metadata::parent(path).unwrap_or(b".");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fsync(open(parent, flags, Mode::empty())?)
}
