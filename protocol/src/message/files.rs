//! Files: what is asked of the guest's file system, and what comes back.
//!
//! A [`FileRequest`] opens a session ([`crate::Kind::FileRequest`]) that does one thing and ends with
//! [`crate::Kind::FileDone`] or [`crate::Kind::FileFailed`]. Three requests move bulk data in between:
//!
//! ```text
//!  Read   → FileOpened, then FileData and FileHole in the file's order, FileDone
//!  List   → FileEntries, again and again, FileDone
//!  Write  ← FileData and FileHole in the file's order, FileEnd; then FileDone →
//! ```
//!
//! The payloads of `FileData` and `FileEntries` take from the receiver's window, which [`super::Credit`] refills, and so do
//! holes, [`FileHole::COST`] each.
//! [`crate::Kind::FileCancel`] ends a session early: it is answered with `ECANCELED`, and what was begun is put away.

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A path or a name as the guest's kernel has it: any bytes but zero. Paths that do not begin with `/` are taken
/// from the root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathBytes(pub Vec<u8>);

impl From<&[u8]> for PathBytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl AsRef<[u8]> for PathBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Serialize for PathBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for PathBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl<'de> Visitor<'de> for Bytes {
            type Value = PathBytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<PathBytes, E> {
                Ok(PathBytes(bytes.to_vec()))
            }

            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<PathBytes, E> {
                Ok(PathBytes(bytes))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut bytes: A) -> Result<PathBytes, A::Error> {
                let mut path = Vec::new();
                while let Some(byte) = bytes.next_element()? {
                    path.push(byte);
                }
                Ok(PathBytes(path))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// Payload of [`crate::Kind::FileRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRequest {
    /// What is known of a file; answered with [`FileDone::Metadata`].
    Stat {
        /// Which.
        path: PathBytes,
        /// Whether a symbolic link at its end leads on.
        follow: bool,
    },
    /// The entries of a directory.
    List {
        /// Which.
        path: PathBytes,
    },
    /// The bytes of a regular file.
    Read {
        /// Which.
        path: PathBytes,
        /// From where, in bytes.
        offset: u64,
        /// How many at most; all without.
        length: Option<u64>,
    },
    /// A regular file's new bytes.
    Write {
        /// Which.
        path: PathBytes,
        /// What becomes of those that are there.
        how: WriteHow,
        /// What the file has at the end; a new file has mode 0644 otherwise.
        attributes: FileAttributes,
        /// Whether the file is on the disk before the answer.
        sync: bool,
    },
    /// Makes a directory and those above it that are missing; that it is there already is no failure.
    MakeDirectory {
        /// Which.
        path: PathBytes,
        /// The mode of the last one, if it is new; 0755 otherwise.
        mode: Option<u32>,
    },
    /// Removes a file, a symbolic link, or an empty directory.
    Remove {
        /// Which.
        path: PathBytes,
        /// Whether a directory goes with all that is in it. Symbolic links are removed, not followed.
        all: bool,
    },
    /// Renames, and replaces what had the new name.
    Rename {
        /// What.
        from: PathBytes,
        /// Its new name.
        to: PathBytes,
    },
    /// Copies a file, or a directory with all that is in it, with modes, owners and times; symbolic links as such.
    Copy {
        /// What.
        from: PathBytes,
        /// Where to.
        to: PathBytes,
    },
    /// Makes a symbolic link.
    Symlink {
        /// What it says.
        target: PathBytes,
        /// Where it is.
        path: PathBytes,
    },
    /// What a symbolic link says; answered with [`FileDone::Link`].
    ReadLink {
        /// Which.
        path: PathBytes,
    },
    /// Changes mode, owner and times, in this order: owner, mode, times.
    SetAttributes {
        /// Of what.
        path: PathBytes,
        /// Whether a symbolic link at its end leads on. A link's own mode cannot be set.
        follow: bool,
        /// To what.
        attributes: FileAttributes,
    },
}

/// What a write does with what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WriteHow {
    /// The file is created, or its bytes are replaced, from the beginning on.
    Truncate,
    /// The file is created, or its bytes stay and the new ones follow. Holes are refused.
    Append,
    /// The file must not be there.
    CreateNew,
    /// The bytes go to a file without a name that others know, which takes the file's place once they are on the disk:
    /// whoever opens it finds the old bytes or all of the new ones. Mode and owner stay unless they are given.
    Atomic,
}

/// What a file is to have; nothing changes that is not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAttributes {
    /// Permissions, with set-user-id, set-group-id and sticky: the lower twelve bits of `st_mode`.
    pub mode: Option<u32>,
    /// User and group.
    pub owner: Option<(u32, u32)>,
    /// When it was last read and last written.
    pub times: Option<(FileTime, FileTime)>,
}

/// A time of the guest's wall clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileTime {
    /// Seconds since the Unix epoch.
    pub seconds: i64,
    /// Nanoseconds of the second, below a milliard.
    pub nanoseconds: u32,
}

/// What is known of a file. Also the payload of [`crate::Kind::FileOpened`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMetadata {
    /// Type and permissions, as `st_mode` has them (inode(7)).
    pub mode: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes on the disk.
    pub allocated: u64,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// How many names it has.
    pub links: u64,
    /// Its number on its file system.
    pub inode: u64,
    /// When it was last read.
    pub accessed: FileTime,
    /// When it was last written.
    pub modified: FileTime,
    /// When something of this was last changed.
    pub changed: FileTime,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name, never `.` or `..`.
    pub name: PathBytes,
    /// What is known of it; of a symbolic link, not of what it leads to.
    pub metadata: FileMetadata,
}

/// Payload of [`crate::Kind::FileEntries`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntries(pub Vec<FileEntry>);

/// Payload of [`crate::Kind::FileHole`]: zeroes that need not be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHole {
    /// How many.
    pub bytes: u64,
}

impl FileHole {
    /// What one takes from the window, in bytes: more than its message is long, so that the window bounds their number.
    pub const COST: u32 = 16;
}

/// Payload of [`crate::Kind::FileDone`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileDone {
    /// All of it.
    Done,
    /// Answers [`FileRequest::Stat`].
    Metadata(FileMetadata),
    /// Answers [`FileRequest::ReadLink`].
    Link(PathBytes),
}

/// Payload of [`crate::Kind::FileFailed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFailed {
    /// The guest kernel's error number.
    pub errno: i32,
    /// The path that it was said of.
    pub path: PathBytes,
}
