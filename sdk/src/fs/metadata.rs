//! What is known of a guest's file.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cubby_protocol::message::{FileMetadata, FileTime};

/// The lower twelve bits of `st_mode`.
const PERMISSIONS: u32 = 0o7777;

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// Something that Linux does not have.
    Unknown,
}

/// What is known of a file, as it was when the guest was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// What kind of file it is.
    pub kind: FileKind,
    /// Permissions, set-user-id, set-group-id and sticky: twelve bits.
    pub mode: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes on the disk; fewer than `size` if it has holes.
    pub allocated: u64,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// How many names it has.
    pub links: u64,
    /// Its number on its file system.
    pub inode: u64,
    /// When it was last read, by the guest's clock.
    pub accessed: SystemTime,
    /// When it was last written.
    pub modified: SystemTime,
    /// When something of this was last changed.
    pub changed: SystemTime,
}

impl Metadata {
    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.kind == FileKind::File
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == FileKind::Directory
    }

    /// Whether it is a symbolic link, which only what does not follow one can tell.
    pub fn is_symlink(&self) -> bool {
        self.kind == FileKind::Symlink
    }
}

impl From<FileMetadata> for Metadata {
    fn from(found: FileMetadata) -> Self {
        // `S_IFMT` and the rest (inode(7)).
        let kind = match found.mode & 0o170_000 {
            0o100_000 => FileKind::File,
            0o040_000 => FileKind::Directory,
            0o120_000 => FileKind::Symlink,
            0o010_000 => FileKind::Fifo,
            0o140_000 => FileKind::Socket,
            0o020_000 => FileKind::CharDevice,
            0o060_000 => FileKind::BlockDevice,
            _ => FileKind::Unknown,
        };
        Self {
            kind,
            mode: found.mode & PERMISSIONS,
            size: found.size,
            allocated: found.allocated,
            uid: found.uid,
            gid: found.gid,
            links: found.links,
            inode: found.inode,
            accessed: from_guest(found.accessed),
            modified: from_guest(found.modified),
            changed: from_guest(found.changed),
        }
    }
}

/// A time of the guest's. One that this computer cannot tell is the epoch.
fn from_guest(time: FileTime) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole =
        if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    let time = whole.and_then(|whole| whole.checked_add(Duration::from_nanos(time.nanoseconds.into())));
    time.unwrap_or(UNIX_EPOCH)
}

/// A time for the guest.
pub(super) fn to_guest(time: SystemTime) -> FileTime {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => FileTime { seconds: seconds(after), nanoseconds: after.subsec_nanos() },
        Err(before) => match before.duration() {
            // Nanoseconds count forwards, before the epoch too.
            before if before.subsec_nanos() > 0 => {
                FileTime { seconds: -seconds(before) - 1, nanoseconds: 1_000_000_000 - before.subsec_nanos() }
            }
            before => FileTime { seconds: -seconds(before), nanoseconds: 0 },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_on_both_sides_of_the_epoch() {
        for (seconds, nanoseconds) in [(0, 0), (0, 1), (-1, 0), (-1, 999_999_999), (-7, 1), (1 << 33, 5)] {
            let time = FileTime { seconds, nanoseconds };
            assert_eq!(to_guest(from_guest(time)), time);
        }
        assert_eq!(
            to_guest(UNIX_EPOCH - Duration::from_nanos(1)),
            FileTime { seconds: -1, nanoseconds: 999_999_999 }
        );
        // A guest may say anything.
        for seconds in [i64::MIN, i64::MAX] {
            from_guest(FileTime { seconds, nanoseconds: u32::MAX });
        }
    }
}
