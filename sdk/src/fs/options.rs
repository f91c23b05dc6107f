//! How files are written and copied.

use std::path::PathBuf;
use std::time::SystemTime;

use cubby_protocol::message::{FileAttributes, WriteHow};

use super::metadata::to_guest;

/// How a file is written ([`Fs::write_with`](super::Fs::write_with)). Of [`Self::append`], [`Self::create_new`] and
/// [`Self::atomic`], the last one counts.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    pub(super) how: WriteHow,
    pub(super) attributes: FileAttributes,
    pub(super) sync: bool,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { how: WriteHow::Truncate, attributes: FileAttributes::default(), sync: false }
    }
}

impl WriteOptions {
    /// Adds to what is there.
    pub fn append(&mut self) -> &mut Self {
        self.how = WriteHow::Append;
        self
    }

    /// Fails with `EEXIST` if the file is there.
    pub fn create_new(&mut self) -> &mut Self {
        self.how = WriteHow::CreateNew;
        self
    }

    /// Writes a temporary file in the same directory, brings it to the disk and gives it the name: whoever reads finds
    /// the old bytes or all of the new ones, after a crash too. Mode and owner stay those of the old file unless they are
    /// given. A symbolic link is replaced.
    pub fn atomic(&mut self) -> &mut Self {
        self.how = WriteHow::Atomic;
        self
    }

    /// The bytes are on the disk before the write returns.
    pub fn sync(&mut self) -> &mut Self {
        self.sync = true;
        self
    }

    /// Permissions, whether or not the file is new.
    pub fn mode(&mut self, mode: u32) -> &mut Self {
        self.attributes.mode = Some(mode);
        self
    }

    /// User and group, by number.
    pub fn owner(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.attributes.owner = Some((uid, gid));
        self
    }

    /// When it was last read and last written.
    pub fn times(&mut self, accessed: SystemTime, modified: SystemTime) -> &mut Self {
        self.attributes.times = Some((to_guest(accessed), to_guest(modified)));
        self
    }
}

/// What is told of a copy under way.
pub(super) type Listener = Box<dyn FnMut(&Copied) + Send>;

/// How files are copied in and out ([`Fs::copy_in_with`](super::Fs::copy_in_with)).
#[derive(Default)]
pub struct CopyOptions {
    pub(super) owners: bool,
    pub(super) listener: Option<Listener>,
}

impl CopyOptions {
    /// Keeps users and groups, by number. Out of the guest, that takes the right to give files away.
    pub fn owners(&mut self, keep: bool) -> &mut Self {
        self.owners = keep;
        self
    }

    /// Calls this with what was copied so far, every so often and at the end.
    pub fn on_progress(&mut self, listener: impl FnMut(&Copied) + Send + 'static) -> &mut Self {
        self.listener = Some(Box::new(listener));
        self
    }
}

impl std::fmt::Debug for CopyOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyOptions").field("owners", &self.owners).finish_non_exhaustive()
    }
}

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// Bytes of files, without holes.
    pub bytes: u64,
    /// FIFOs, sockets and devices, which are not copied: where they are.
    pub skipped: Vec<PathBuf>,
}
