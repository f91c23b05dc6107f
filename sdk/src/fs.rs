//! The guest's files: read, written, listed, changed, and copied in and out.
//!
//! Every call is one session with the guest's agent, and most are one message each way. The agent acts as root. What it
//! says is not trusted: names are checked, sizes are bounded, and what is copied out stays where it was to go.

mod call;
mod copy_in;
mod copy_out;
mod directory;
mod metadata;
mod options;
mod pack;
mod pieces;
mod reader;
mod tar_header;
mod unpack;
mod writer;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use cubby_protocol::message::{FileAttributes, FileDone, FileRequest, PathBytes};

pub use self::directory::{DirEntry, DirReader};
pub use self::metadata::{FileKind, Metadata};
pub use self::options::{Copied, CopyOptions, WriteOptions};
pub use self::reader::FileReader;
pub use self::writer::FileWriter;

use self::call::Call;
use crate::error::{Error, R};
use crate::link::Link;

/// Most bytes that [`Fs::read`] takes into memory; a guest can make a file of any length from nothing.
const READ_LIMIT: u64 = 1 << 30;

/// Most entries that [`Fs::list`] takes into memory.
const LIST_LIMIT: usize = 1 << 20;

/// What Linux says of a file that is too large, and of one that is not there.
const EFBIG: i32 = 27;
const ENOENT: i32 = 2;
const ENOTDIR: i32 = 20;

/// And of a name that is taken.
const EEXIST: i32 = 17;

/// A sandbox's files ([`Sandbox::fs`](crate::Sandbox::fs)).
///
/// Paths are the guest's and hold any bytes; those that do not begin with `/` are taken from the root. A symbolic link at
/// the end of a path is followed unless a call says otherwise. What the guest's kernel refuses is [`Error::Fs`], with
/// its error number and the path; what is no regular file, such as a FIFO or a device, is neither read nor written
/// (`EOPNOTSUPP`).
///
/// Calls may be called off: a write that is dropped before it is done may have been done in part, or in whole, but an
/// atomic one leaves the old bytes or all of the new ones.
#[derive(Clone)]
pub struct Fs {
    link: Arc<Link>,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("sandbox", &self.link.name()).finish_non_exhaustive()
    }
}

fn bytes(path: &Path) -> PathBytes {
    PathBytes::from(path.as_os_str().as_bytes())
}

impl Fs {
    pub(crate) fn new(link: Arc<Link>) -> Self {
        Self { link }
    }

    /// The bytes of a file, 1 GiB at most: [`Self::read_stream`] has no such limit.
    pub async fn read(&self, path: impl AsRef<Path>) -> R<Vec<u8>> {
        self.read_stream(path).await?.collect(READ_LIMIT).await
    }

    /// A file as text; [`Error::NotUtf8`] if it is none.
    pub async fn read_to_string(&self, path: impl AsRef<Path>) -> R<String> {
        String::from_utf8(self.read(path).await?).map_err(|error| Error::NotUtf8 {
            what: "the file",
            valid_up_to: error.utf8_error().valid_up_to(),
        })
    }

    /// `length` bytes of a file from `offset` on, or fewer if it ends before, 1 GiB at most.
    pub async fn read_at(&self, path: impl AsRef<Path>, offset: u64, length: u64) -> R<Vec<u8>> {
        let reader = FileReader::open(&self.link, path.as_ref(), offset, Some(length)).await?;
        reader.collect(READ_LIMIT).await
    }

    /// The bytes of a file as they come. The guest sends on only while they are taken.
    pub async fn read_stream(&self, path: impl AsRef<Path>) -> R<FileReader> {
        FileReader::open(&self.link, path.as_ref(), 0, None).await
    }

    /// Creates a file, with mode 0644, or replaces its bytes. The directory must be there.
    pub async fn write(&self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> R<()> {
        self.write_with(path, bytes, |options| options).await
    }

    /// Writes a file with options: atomically, with a mode, to the disk before it returns.
    ///
    /// ```no_run
    /// # async fn example(fs: cubbyhole::Fs) -> Result<(), cubbyhole::Error> {
    /// fs.write_with("/etc/app.conf", "debug = true\n", |o| o.atomic().mode(0o600)).await
    /// # }
    /// ```
    pub async fn write_with(
        &self,
        path: impl AsRef<Path>,
        bytes: impl AsRef<[u8]>,
        options: impl FnOnce(&mut WriteOptions) -> &mut WriteOptions,
    ) -> R<()> {
        let mut chosen = WriteOptions::default();
        options(&mut chosen);
        FileWriter::write_whole(&self.link, path.as_ref(), &chosen, bytes.as_ref()).await
    }

    /// Adds to the end of a file, which is created if it is not there.
    pub async fn append(&self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> R<()> {
        self.write_with(path, bytes, WriteOptions::append).await
    }

    /// Opens a file to be written piece by piece: created, with mode 0644, or emptied.
    pub async fn write_stream(&self, path: impl AsRef<Path>) -> R<FileWriter> {
        self.write_stream_with(path, |options| options).await
    }

    /// The same with options.
    pub async fn write_stream_with(
        &self,
        path: impl AsRef<Path>,
        options: impl FnOnce(&mut WriteOptions) -> &mut WriteOptions,
    ) -> R<FileWriter> {
        let mut chosen = WriteOptions::default();
        options(&mut chosen);
        FileWriter::open(&self.link, path.as_ref(), &chosen).await
    }

    /// What is in a directory, in the order of the names' bytes; 1,048,576 entries at most: [`Self::list_stream`] has no
    /// such limit.
    pub async fn list(&self, path: impl AsRef<Path>) -> R<Vec<DirEntry>> {
        let path = path.as_ref();
        let (mut reader, mut entries) = (self.list_stream(path).await?, Vec::new());
        while let Some(entry) = reader.next().await {
            if entries.len() >= LIST_LIMIT {
                return Err(Error::Fs { operation: "list", path: path.to_owned(), errno: EFBIG });
            }
            entries.push(entry?);
        }
        entries.sort_by(|one: &DirEntry, other| one.name().cmp(other.name()));
        Ok(entries)
    }

    /// What is in a directory, as it comes.
    pub async fn list_stream(&self, path: impl AsRef<Path>) -> R<DirReader> {
        DirReader::open(&self.link, path.as_ref()).await
    }

    /// What is known of a file.
    pub async fn stat(&self, path: impl AsRef<Path>) -> R<Metadata> {
        self.metadata(path.as_ref(), true).await
    }

    /// What is known of a file, or of the symbolic link that it is.
    pub async fn lstat(&self, path: impl AsRef<Path>) -> R<Metadata> {
        self.metadata(path.as_ref(), false).await
    }

    async fn metadata(&self, path: &Path, follow: bool) -> R<Metadata> {
        let request = FileRequest::Stat { path: bytes(path), follow };
        match self.ask("stat", path, &request).await? {
            FileDone::Metadata(metadata) => Ok(metadata.into()),
            _ => Err(call::nonsense()),
        }
    }

    /// Whether there is such a file. A symbolic link that leads nowhere is none.
    pub async fn exists(&self, path: impl AsRef<Path>) -> R<bool> {
        match self.stat(path).await {
            Ok(_) => Ok(true),
            Err(Error::Fs { errno: ENOENT | ENOTDIR, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a directory, with mode 0755, and those above it that are missing. That it is there is no failure.
    pub async fn mkdir(&self, path: impl AsRef<Path>) -> R<()> {
        let path = path.as_ref();
        self.does("make directory", path, FileRequest::MakeDirectory { path: bytes(path), mode: None }).await
    }

    /// Removes a file, a symbolic link, or an empty directory.
    pub async fn remove(&self, path: impl AsRef<Path>) -> R<()> {
        let path = path.as_ref();
        self.does("remove", path, FileRequest::Remove { path: bytes(path), all: false }).await
    }

    /// Removes a file, or a directory with all that is in it. Symbolic links are removed and not followed.
    pub async fn remove_all(&self, path: impl AsRef<Path>) -> R<()> {
        let path = path.as_ref();
        self.does("remove", path, FileRequest::Remove { path: bytes(path), all: true }).await
    }

    /// Gives a file another name, on the same file system, and replaces what had that name.
    pub async fn rename(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> R<()> {
        let (from, to) = (from.as_ref(), to.as_ref());
        self.does("rename", from, FileRequest::Rename { from: bytes(from), to: bytes(to) }).await
    }

    /// Copies within the guest: a file, or a directory with all that is in it, with modes, owners, times and holes. Symbolic
    /// links are copied as such, the first one too. Directories are merged with those that are there, files and links
    /// replaced. Hard links become files of their own; extended attributes are left out.
    pub async fn copy(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> R<()> {
        let (from, to) = (from.as_ref(), to.as_ref());
        self.does("copy", from, FileRequest::Copy { from: bytes(from), to: bytes(to) }).await
    }

    /// Makes a symbolic link at `link` that says `target`.
    pub async fn symlink(&self, target: impl AsRef<Path>, link: impl AsRef<Path>) -> R<()> {
        let (target, path) = (target.as_ref(), link.as_ref());
        self.does("link", path, FileRequest::Symlink { target: bytes(target), path: bytes(path) }).await
    }

    /// What a symbolic link says.
    pub async fn read_link(&self, path: impl AsRef<Path>) -> R<PathBuf> {
        let path = path.as_ref();
        match self.ask("read link", path, &FileRequest::ReadLink { path: bytes(path) }).await? {
            FileDone::Link(target) => Ok(OsString::from_vec(target.0).into()),
            _ => Err(call::nonsense()),
        }
    }

    /// Sets a file's permissions: the lower twelve bits of `mode`.
    pub async fn set_mode(&self, path: impl AsRef<Path>, mode: u32) -> R<()> {
        let attributes = FileAttributes { mode: Some(mode), ..FileAttributes::default() };
        self.set("set mode of", path.as_ref(), true, attributes).await
    }

    /// Gives a file to a user and a group, by number; `u32::MAX` leaves the one or the other.
    pub async fn set_owner(&self, path: impl AsRef<Path>, uid: u32, gid: u32) -> R<()> {
        let attributes = FileAttributes { owner: Some((uid, gid)), ..FileAttributes::default() };
        self.set("set owner of", path.as_ref(), true, attributes).await
    }

    /// Sets when a file was last read and last written.
    pub async fn set_times(
        &self,
        path: impl AsRef<Path>,
        accessed: SystemTime,
        modified: SystemTime,
    ) -> R<()> {
        let times = Some((metadata::to_guest(accessed), metadata::to_guest(modified)));
        self.set("set times of", path.as_ref(), true, FileAttributes { times, ..FileAttributes::default() })
            .await
    }

    /// Copies a file or a directory of this computer into the guest, to exactly this path; the directory above must be
    /// there. Modes, times, symbolic links and holes are kept, and what is new belongs to root. Directories are merged
    /// with those that are there, files are written over, and links of the guest's that are in the way are followed, as by
    /// whoever writes there. `host` itself is followed if it is a symbolic link. Hard links become files of their own;
    /// extended attributes are left out.
    pub async fn copy_in(&self, host: impl AsRef<Path>, guest: impl AsRef<Path>) -> R<Copied> {
        self.copy_in_with(host, guest, |options| options).await
    }

    /// The same with options.
    pub async fn copy_in_with(
        &self,
        host: impl AsRef<Path>,
        guest: impl AsRef<Path>,
        options: impl FnOnce(&mut CopyOptions) -> &mut CopyOptions,
    ) -> R<Copied> {
        let mut chosen = CopyOptions::default();
        options(&mut chosen);
        copy_in::copy(self, host.as_ref(), guest.as_ref(), chosen).await
    }

    /// Copies a file or a directory of the guest to this computer, to exactly this path; the directory above must be
    /// there. Modes but for set-user-id, set-group-id and sticky, times, symbolic links and holes are kept, and all
    /// belongs to whoever copies. Directories are merged with those that are there. Hard links become files of their own;
    /// extended attributes are left out.
    ///
    /// Below `host` no symbolic link is followed, whatever the guest does while it is read: files and links that are in
    /// the way are replaced. Where a link of the guest's leads is another matter, for whoever follows it later.
    pub async fn copy_out(&self, guest: impl AsRef<Path>, host: impl AsRef<Path>) -> R<Copied> {
        self.copy_out_with(guest, host, |options| options).await
    }

    /// The same with options.
    pub async fn copy_out_with(
        &self,
        guest: impl AsRef<Path>,
        host: impl AsRef<Path>,
        options: impl FnOnce(&mut CopyOptions) -> &mut CopyOptions,
    ) -> R<Copied> {
        let mut chosen = CopyOptions::default();
        options(&mut chosen);
        copy_out::copy(self, guest.as_ref(), host.as_ref(), chosen).await
    }

    /// Unpacks a tar archive into a directory of the guest, while it is read: ustar, PAX and GNU, not compressed. Modes,
    /// times of writing, symbolic links and holes are kept, and what is new belongs to root, unless the options keep owners.
    /// Directories that are missing are made, files and links that are there are replaced; `guest` itself must be there and
    /// stays as it is. Hard links become files of their own, extended attributes are left out, and devices and FIFOs are
    /// told as skipped, by their names in the archive.
    ///
    /// Names are taken from `guest` on. One that leads out of it, by `..` or through a symbolic link that the archive itself
    /// has made, is [`Error::Archive`], as is what is no archive or ends too early. What came before that is there. Links
    /// of the guest's own are followed, as by [`Self::copy_in`].
    ///
    /// The archive is read on a thread of its own, which may wait in it for ever: whoever calls this off goes on at once. An
    /// archive may have about 64 MiB of names of directories and symbolic links.
    ///
    /// ```no_run
    /// # async fn example(fs: cubbyhole::Fs) -> Result<(), Box<dyn std::error::Error>> {
    /// let copied = fs.unpack(std::fs::File::open("site.tar")?, "/srv", |o| o).await?;
    /// println!("{} files", copied.files);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn unpack(
        &self,
        archive: impl std::io::Read + Send + 'static,
        guest: impl AsRef<Path>,
        options: impl FnOnce(&mut CopyOptions) -> &mut CopyOptions,
    ) -> R<Copied> {
        let mut chosen = CopyOptions::default();
        options(&mut chosen);
        unpack::unpack(self, archive, guest.as_ref(), chosen).await
    }

    /// Packs a file, or a directory with all that is in it, into a tar archive (ustar with PAX headers), while it is
    /// written: under its own name, or as `.` if the path ends in `/.`. Modes but for set-user-id, set-group-id and
    /// sticky, owners, times of writing and symbolic links are kept; holes are written as zeroes, and each hard link is a
    /// file of its own. A file that changes while it is read is cut, or filled with zeroes, to the size that it had.
    ///
    /// Whatever the guest does, no name in the archive leads up, is there twice in its directory, or lies below a link. The
    /// archive is written on a thread of its own. Fails with [`Error::Archive`] if it cannot be.
    ///
    /// ```no_run
    /// # async fn example(fs: cubbyhole::Fs) -> Result<(), Box<dyn std::error::Error>> {
    /// fs.pack("/var/log", std::fs::File::create("log.tar")?, |o| o).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn pack(
        &self,
        guest: impl AsRef<Path>,
        archive: impl std::io::Write + Send + 'static,
        options: impl FnOnce(&mut CopyOptions) -> &mut CopyOptions,
    ) -> R<Copied> {
        let mut chosen = CopyOptions::default();
        options(&mut chosen);
        pack::pack(self, guest.as_ref(), archive, chosen).await
    }

    /// Makes a symbolic link, in the place of a file or link that is there.
    async fn link_over(&self, target: &Path, link: &Path) -> R<()> {
        match self.symlink(target, link).await {
            Err(Error::Fs { errno: EEXIST, .. }) => {
                self.remove(link).await?;
                self.symlink(target, link).await
            }
            result => result,
        }
    }

    /// Sets attributes.
    async fn set(
        &self,
        operation: &'static str,
        path: &Path,
        follow: bool,
        attributes: FileAttributes,
    ) -> R<()> {
        self.does(operation, path, FileRequest::SetAttributes { path: bytes(path), follow, attributes }).await
    }

    /// Asks for what has no answer but that it was done.
    async fn does(&self, operation: &'static str, path: &Path, request: FileRequest) -> R<()> {
        self.ask(operation, path, &request).await.map(drop)
    }

    async fn ask(&self, operation: &'static str, path: &Path, request: &FileRequest) -> R<FileDone> {
        Call::begin(&self.link, operation, path, request, |_, _| Ok(())).await?.done().await
    }
}
