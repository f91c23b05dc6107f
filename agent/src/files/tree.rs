//! Whole trees: removed, or copied within the guest. They are walked without recursion and by descriptors: each
//! directory is opened from the one above it, and symbolic links are not followed, so that whoever renames things
//! meanwhile leads nobody out of the tree.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, chmodat, chownat,
    copy_file_range, fchmod, fstat, ftruncate, mkdirat, mknodat, openat, readlinkat, seek, statat, symlinkat,
    unlinkat, utimensat,
};
use rustix::io::{Errno, pread, pwrite};

use super::metadata;
use super::work::{Cancel, Failure, STEP, at};

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// How often a directory is looked at again because something new was in it.
const ATTEMPTS: u32 = 8;

/// A directory on the way down.
struct Level {
    dir: Dir,
    /// Its name in the one above; of the first one, its path.
    name: CString,
    attempts: u32,
    /// Its copy, and what it was.
    copy: Option<(OwnedFd, Stat)>,
}

/// The way down, and what failures are told of.
struct Walk<'a> {
    root: &'a [u8],
    levels: Vec<Level>,
}

impl Walk<'_> {
    fn failed(&self, name: &CStr, errno: Errno) -> Failure {
        let mut path = self.root.to_vec();
        for name in self.levels.iter().skip(1).map(|level| &*level.name).chain([name]) {
            path.push(b'/');
            path.extend_from_slice(name.to_bytes());
        }
        Failure { errno, path }
    }

    /// The next entry of the deepest directory; `None` at its end.
    fn next(&mut self) -> Result<Option<(CString, FileType)>, Failure> {
        let Some(level) = self.levels.last_mut() else { return Ok(None) };
        loop {
            match level.dir.read() {
                None => return Ok(None),
                Some(Ok(entry)) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
                Some(Ok(entry)) => return Ok(Some((entry.file_name().to_owned(), entry.file_type()))),
                Some(Err(errno)) => return Err(at(self.root)(errno)),
            }
        }
    }

    /// Where names of the deepest directory are looked up.
    fn here(&self) -> Result<BorrowedFd<'_>, Failure> {
        match self.levels.last() {
            Some(level) => level.dir.fd().map_err(at(self.root)),
            None => Ok(CWD),
        }
    }
}

fn name_of(path: &[u8]) -> Result<CString, Failure> {
    CString::new(path).map_err(|_| at(path)(Errno::INVAL))
}

/// Removes a file, or a directory with all that is in it. What is being added meanwhile may stay, and is told.
pub fn remove(path: &[u8], cancel: &Cancel) -> Result<(), Failure> {
    let failed = at(path);
    match metadata::remove(path) {
        Err(Failure { errno: Errno::NOTEMPTY | Errno::EXIST, .. }) => {}
        result => return result,
    }
    let dir = openat(CWD, path, DIRECTORY, Mode::empty()).and_then(Dir::new).map_err(&failed)?;
    let first = Level { dir, name: name_of(path)?, attempts: 0, copy: None };
    let mut walk = Walk { root: path, levels: vec![first] };
    loop {
        cancel.check().map_err(&failed)?;
        if let Some((name, kind)) = walk.next()? {
            let here = walk.here()?;
            let removed =
                if kind.is_dir() { Err(Errno::ISDIR) } else { unlinkat(here, &name, AtFlags::empty()) };
            match removed {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => match openat(here, &name, DIRECTORY, Mode::empty()).and_then(Dir::new) {
                    Ok(dir) => walk.levels.push(Level { dir, name, attempts: 0, copy: None }),
                    Err(Errno::NOENT) => {}
                    Err(errno) => return Err(walk.failed(&name, errno)),
                },
                Err(errno) => return Err(walk.failed(&name, errno)),
            }
            continue;
        }
        let Some(mut level) = walk.levels.pop() else { return Ok(()) };
        match unlinkat(walk.here()?, &level.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) if walk.levels.is_empty() => return Ok(()),
            Ok(()) | Err(Errno::NOENT) => {}
            // File systems differ in what a listing shows whose directory changes.
            Err(Errno::NOTEMPTY | Errno::EXIST) if level.attempts < ATTEMPTS => {
                level.attempts += 1;
                level.dir.rewind();
                walk.levels.push(level);
            }
            Err(errno) if walk.levels.is_empty() => return Err(failed(errno)),
            Err(errno) => return Err(walk.failed(&level.name, errno)),
        }
    }
}

/// Copies a file, or a directory with all that is in it. Files and links that are in the way are replaced, directories
/// are merged.
pub fn copy(from: &[u8], to: &[u8], cancel: &Cancel) -> Result<(), Failure> {
    let failed = at(from);
    let found = statat(CWD, from, AtFlags::SYMLINK_NOFOLLOW).map_err(&failed)?;
    let (name, target) = (name_of(from)?, name_of(to)?);
    if let Ok(there) = statat(CWD, to, AtFlags::SYMLINK_NOFOLLOW)
        && same(&found, &there)
    {
        return Err(at(to)(Errno::INVAL));
    }
    if !FileType::from_raw_mode(found.st_mode).is_dir() {
        return copy_one((CWD, &name), (CWD, &target), &found, cancel).map_err(at(to));
    }
    let dir = openat(CWD, from, DIRECTORY, Mode::empty()).and_then(Dir::new).map_err(&failed)?;
    let top = enter(CWD, &target).map_err(at(to))?;
    let root = fstat(&top).map_err(at(to))?;
    let mut walk =
        Walk { root: from, levels: vec![Level { dir, name, attempts: 0, copy: Some((top, found)) }] };
    loop {
        cancel.check().map_err(&failed)?;
        let next = walk.next()?;
        let Some(Level { copy: Some((copy, _)), .. }) = walk.levels.last() else { return Ok(()) };
        let Some((name, _)) = next else {
            let Some(Level { copy: Some((copy, was)), name, .. }) = walk.levels.pop() else { return Ok(()) };
            describe_as((copy.as_fd(), c""), &was).map_err(|errno| walk.failed(&name, errno))?;
            continue;
        };
        let here = walk.here()?;
        let failed = |errno| walk.failed(&name, errno);
        let found = match statat(here, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => found,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(failed(errno)),
        };
        if FileType::from_raw_mode(found.st_mode).is_dir() {
            // A copy of a tree into itself has no end.
            if same(&found, &root) {
                return Err(at(to)(Errno::INVAL));
            }
            let dir = openat(here, &name, DIRECTORY, Mode::empty()).and_then(Dir::new).map_err(failed)?;
            let copy = enter(copy.as_fd(), &name).map_err(failed)?;
            walk.levels.push(Level { dir, name, attempts: 0, copy: Some((copy, found)) });
        } else {
            copy_one((here, &name), (copy.as_fd(), &name), &found, cancel).map_err(failed)?;
        }
    }
}

fn same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// The directory of this name, made if it is not there.
fn enter(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    match mkdirat(parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => openat(parent, name, DIRECTORY, Mode::empty()),
        Err(errno) => Err(errno),
    }
}

type Place<'a> = (BorrowedFd<'a>, &'a CStr);

/// Copies what is no directory.
fn copy_one(from: Place<'_>, to: Place<'_>, found: &Stat, cancel: &Cancel) -> Result<(), Errno> {
    if let Ok(there) = statat(to.0, to.1, AtFlags::SYMLINK_NOFOLLOW) {
        match FileType::from_raw_mode(there.st_mode) {
            FileType::RegularFile | FileType::Symlink => unlinkat(to.0, to.1, AtFlags::empty())?,
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::EXIST),
        }
    }
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let source = openat(from.0, from.1, flags, Mode::empty())?;
            metadata::expect_regular(&fstat(&source)?)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let copy = openat(to.0, to.1, flags, Mode::RUSR | Mode::WUSR)?;
            copy_bytes(&source, &copy, cancel)?;
            describe_as((copy.as_fd(), c""), found)
        }
        FileType::Symlink => {
            symlinkat(readlinkat(from.0, from.1, Vec::new())?, to.0, to.1)?;
            describe_as(to, found)
        }
        kind => {
            mknodat(to.0, to.1, kind, Mode::RUSR | Mode::WUSR, found.st_rdev)?;
            describe_as(to, found)
        }
    }
}

/// Gives a copy the owner, the mode and the times of what it was copied from. Who may not give a file away keeps it.
fn describe_as((dir, name): Place<'_>, was: &Stat) -> Result<(), Errno> {
    let flags = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::SYMLINK_NOFOLLOW };
    match chownat(dir, name, metadata::user(was.st_uid), metadata::group(was.st_gid), flags) {
        Ok(()) => {}
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => {}
        Err(errno) => return Err(errno),
    }
    let mode = metadata::permissions(was.st_mode);
    if name.is_empty() {
        fchmod(dir, mode)?;
    } else if !FileType::from_raw_mode(was.st_mode).is_symlink() {
        // It was made here a moment ago, and is no link.
        chmodat(dir, name, mode, AtFlags::empty())?;
    }
    let time = |tv_sec: i64, nanoseconds: u64| Timespec { tv_sec, tv_nsec: nanoseconds.cast_signed() };
    let times = Timestamps {
        last_access: time(was.st_atime, was.st_atime_nsec),
        last_modification: time(was.st_mtime, was.st_mtime_nsec),
    };
    utimensat(dir, name, &times, flags)
}

/// Copies what a file holds; holes stay holes.
fn copy_bytes(source: &OwnedFd, copy: &OwnedFd, cancel: &Cancel) -> Result<(), Errno> {
    let size = u64::try_from(fstat(source)?.st_size).unwrap_or_default();
    let mut position = 0;
    loop {
        let (data, until) = match seek(source, SeekFrom::Data(position)) {
            Ok(data) => (data, seek(source, SeekFrom::Hole(data))?),
            Err(Errno::NXIO) => break,
            // Whoever cannot tell has no holes.
            Err(_) => (position, u64::MAX),
        };
        position = copy_range(source, copy, data, until, cancel)?;
        if position < until {
            break;
        }
    }
    if size > position { ftruncate(copy, size) } else { Ok(()) }
}

/// Copies the bytes from `position` to `until`, or to the file's end, and tells where that was.
fn copy_range(
    source: &OwnedFd,
    copy: &OwnedFd,
    mut position: u64,
    until: u64,
    cancel: &Cancel,
) -> Result<u64, Errno> {
    /// How much the kernel copies between two looks at whether anybody still wants it.
    const PIECE: u64 = 4 << 20;
    let mut buffer = Vec::new();
    while position < until {
        cancel.check()?;
        let most = usize::try_from((until - position).min(PIECE)).unwrap_or(STEP);
        let (mut from, mut to) = (position, position);
        let copied = if buffer.is_empty() {
            match copy_file_range(source, Some(&mut from), copy, Some(&mut to), most) {
                // Not between these two file systems; or from a file whose length the kernel does not know.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) | Ok(0) => {
                    buffer = vec![0; STEP];
                    continue;
                }
                result => result,
            }
        } else {
            let room = buffer.get_mut(..most.min(STEP)).unwrap_or_default();
            let count = pread(source, &mut *room, position)?;
            let mut written = 0;
            while let Some(rest) = room.get(written..count).filter(|rest| !rest.is_empty()) {
                written += pwrite(copy, rest, position + written as u64)?;
            }
            Ok(count)
        };
        match copied {
            Ok(0) => break,
            Ok(count) => position += count as u64,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(position)
}
