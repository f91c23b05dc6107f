//! What is done to a file in one call of the kernel, or few.

use cubby_protocol::message::{FileAttributes, FileMetadata, FileTime, PathBytes};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, chmodat, chownat, lstat, mkdir,
    readlink, rmdir, statat, unlink, utimensat,
};
use rustix::io::Errno;

use super::work::{Failure, at};

/// The lower twelve bits of `st_mode`.
const PERMISSIONS: u32 = 0o7777;

/// What is known of a file.
pub fn describe(found: &Stat) -> FileMetadata {
    let time = |seconds: i64, nanoseconds: u64| FileTime {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or_default(),
    };
    FileMetadata {
        mode: found.st_mode,
        size: u64::try_from(found.st_size).unwrap_or_default(),
        // Whatever the file system's blocks are, these are of 512 bytes (stat(2)).
        allocated: u64::try_from(found.st_blocks).unwrap_or_default().saturating_mul(512),
        uid: found.st_uid,
        gid: found.st_gid,
        links: found.st_nlink,
        inode: found.st_ino,
        accessed: time(found.st_atime, found.st_atime_nsec),
        modified: time(found.st_mtime, found.st_mtime_nsec),
        changed: time(found.st_ctime, found.st_ctime_nsec),
    }
}

/// A file whose bytes are all there is to it: to open it blocks nobody and does nothing.
pub fn expect_regular(found: &Stat) -> Result<(), Errno> {
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// What is known of the file at `path`.
pub fn stat(path: &[u8], follow: bool) -> Result<FileMetadata, Failure> {
    statat(CWD, path, flags(follow)).map(|found| describe(&found)).map_err(at(path))
}

/// What a symbolic link says.
pub fn read_link(path: &[u8]) -> Result<PathBytes, Failure> {
    readlink(path, Vec::new()).map(|target| PathBytes(target.into_bytes())).map_err(at(path))
}

/// Makes a symbolic link.
pub fn symlink(target: &[u8], path: &[u8]) -> Result<(), Failure> {
    rustix::fs::symlink(target, path).map_err(at(path))
}

/// Renames.
pub fn rename(from: &[u8], to: &[u8]) -> Result<(), Failure> {
    rustix::fs::rename(from, to).map_err(|errno| {
        // The kernel does not say which of the two; the old name is the likelier one only if it is not there.
        let path = if errno == Errno::NOENT && lstat(from).is_err() { from } else { to };
        at(path)(errno)
    })
}

/// Removes a file, a symbolic link, or an empty directory.
pub fn remove(path: &[u8]) -> Result<(), Failure> {
    match unlink(path) {
        Err(Errno::ISDIR) => rmdir(path).map_err(at(path)),
        result => result.map_err(at(path)),
    }
}

/// Makes a directory and those above it that are missing.
pub fn make_directory(path: &[u8], mode: Option<u32>) -> Result<(), Failure> {
    const DEFAULT: u32 = 0o755;
    // From the end to the first that is there, and back.
    let mut missing = vec![path];
    while let Some(&deepest) = missing.last() {
        let mode = if missing.len() == 1 { mode.unwrap_or(DEFAULT) } else { DEFAULT };
        match mkdir(deepest, Mode::from_raw_mode(mode & PERMISSIONS)) {
            Ok(()) if missing.len() == 1 && mode != DEFAULT => {
                // The kernel has taken this process's umask from it, and knows no other special bit than sticky.
                chmodat(CWD, path, permissions(mode), AtFlags::empty()).map_err(at(path))?;
                missing.pop();
            }
            Ok(()) => drop(missing.pop()),
            Err(Errno::EXIST) => match statat(CWD, deepest, AtFlags::empty()) {
                Ok(found) if FileType::from_raw_mode(found.st_mode).is_dir() => drop(missing.pop()),
                _ => return Err(at(deepest)(Errno::EXIST)),
            },
            Err(Errno::NOENT) => match parent(deepest) {
                Some(parent) => missing.push(parent),
                None => return Err(at(deepest)(Errno::NOENT)),
            },
            Err(errno) => return Err(at(deepest)(errno)),
        }
    }
    Ok(())
}

/// Changes mode, owner and times.
pub fn set(path: &[u8], follow: bool, attributes: FileAttributes) -> Result<(), Failure> {
    let failed = at(path);
    if let Some((uid, gid)) = attributes.owner {
        chownat(CWD, path, user(uid), group(gid), flags(follow)).map_err(&failed)?;
    }
    if let Some(mode) = attributes.mode {
        chmodat(CWD, path, permissions(mode), flags(follow)).map_err(&failed)?;
    }
    if let Some(times) = attributes.times {
        utimensat(CWD, path, &timestamps(times), flags(follow)).map_err(&failed)?;
    }
    Ok(())
}

/// Those of a mode.
pub fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & PERMISSIONS)
}

/// A user; the kernel takes the highest number for "leave it".
pub fn user(uid: u32) -> Option<Uid> {
    (uid != u32::MAX).then(|| Uid::from_raw(uid))
}

/// A group; the same.
pub fn group(gid: u32) -> Option<Gid> {
    (gid != u32::MAX).then(|| Gid::from_raw(gid))
}

/// Both times, as the kernel takes them.
pub fn timestamps((accessed, modified): (FileTime, FileTime)) -> Timestamps {
    let time = |time: FileTime| Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    Timestamps { last_access: time(accessed), last_modification: time(modified) }
}

/// The path without its last component; `None` if that is all there is of it.
pub fn parent(path: &[u8]) -> Option<&[u8]> {
    let trimmed = path.len() - path.iter().rev().take_while(|byte| **byte == b'/').count();
    let slash = path.get(..trimmed)?.iter().rposition(|byte| *byte == b'/')?;
    let parent = path.get(..slash.max(1))?;
    (parent != path).then_some(parent)
}

fn flags(follow: bool) -> AtFlags {
    if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_lead_to_the_root_and_no_further() {
        for (path, expected) in [
            (&b"/a/b"[..], Some(&b"/a"[..])),
            (b"/a/b//", Some(b"/a")),
            (b"/a", Some(b"/")),
            (b"a/b", Some(b"a")),
            (b"a", None),
            (b"/", None),
            (b"//", None),
            (b"", None),
        ] {
            assert_eq!(parent(path), expected, "{}", path.escape_ascii());
        }
    }
}
