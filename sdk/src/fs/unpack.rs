//! A tar archive, unpacked in the guest while it comes.
//!
//! A thread of its own reads the archive, [`AHEAD`] pieces ahead of what the guest takes, so that neither its length nor a
//! slow guest takes memory. The archive is not trusted to stay where it is unpacked: no name leads up, and none leads
//! through a symbolic link that the same archive has made.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use cubby_image::tar::{Archive, Entry, Kind};
use cubby_protocol::CHUNK;
use cubby_protocol::message::{FileAttributes, FileRequest, FileTime};
use tokio::sync::mpsc;

use super::pieces::Piece;
use super::{Copied, CopyOptions, ENOTDIR, FileWriter, Fs, WriteOptions, bytes};
use crate::error::{Error, R};

/// Pieces that are read ahead, of [`CHUNK`] bytes at most.
const AHEAD: usize = 8;

/// Bytes that a long name or an extended header may have.
const HEADER: u64 = 1 << 20;

/// Bytes of names that are remembered: of directories, whose times come last, and of symbolic links.
const REMEMBERED: usize = 64 << 20;

/// What the archive says next.
enum Step {
    Entry(Entry),
    /// The next piece of the file that was the last entry.
    Piece(Piece),
    /// The end of that file.
    EndOfFile,
    /// The archive's end.
    End,
}

pub(super) async fn unpack(
    fs: &Fs,
    archive: impl Read + Send + 'static,
    guest: &Path,
    options: CopyOptions,
) -> R<Copied> {
    if !fs.stat(guest).await?.is_dir() {
        return Err(Error::Fs { operation: "unpack into", path: guest.to_owned(), errno: ENOTDIR });
    }
    let (send, steps) = mpsc::channel(AHEAD);
    // Not one of tokio's: it may wait for its next byte for ever, and nobody is to wait for it.
    let thread = std::thread::Builder::new().name("unpack".into());
    thread
        .spawn(move || {
            if let Err(error) = read(archive, &send) {
                // Nobody is left to hear of it, if this fails.
                let _ = send.blocking_send(Err(error));
            }
        })
        .map_err(|source| Error::Archive { source })?;
    let mut unpacking = Unpacking {
        fs,
        guest,
        options,
        steps,
        entered: PathBuf::new(),
        directories: Vec::new(),
        links: BTreeSet::new(),
        remembered: 0,
        copied: Copied::default(),
    };
    unpacking.all().await?;
    unpacking.tell();
    Ok(unpacking.copied)
}

struct Unpacking<'a> {
    fs: &'a Fs,
    guest: &'a Path,
    options: CopyOptions,
    steps: mpsc::Receiver<io::Result<Step>>,
    /// The directory that is known to be there.
    entered: PathBuf,
    /// Directories that the archive has, below the one that it is unpacked in.
    directories: Vec<(PathBuf, FileAttributes)>,
    /// Symbolic links that the archive has made.
    links: BTreeSet<PathBuf>,
    remembered: usize,
    copied: Copied,
}

impl Unpacking<'_> {
    async fn all(&mut self) -> R<()> {
        loop {
            match self.step().await? {
                Step::Entry(entry) => self.entry(entry).await?,
                Step::End => break,
                Step::Piece(_) | Step::EndOfFile => return Err(broken("bytes of no file")),
            }
            self.tell();
        }
        // A directory's time is that of its last new entry, so it comes after them.
        while let Some((below, attributes)) = self.directories.pop() {
            // What has become a link since then is another directory.
            if !below.ancestors().any(|above| self.links.contains(above)) {
                self.fs.set("unpack into", &self.guest.join(below), true, attributes).await?;
            }
        }
        Ok(())
    }

    async fn step(&mut self) -> R<Step> {
        let step = self.steps.recv().await.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
        step.map_err(|source| Error::Archive { source })
    }

    async fn entry(&mut self, entry: Entry) -> R<()> {
        let Some(below) = self.place(&entry.path)? else {
            // The directory itself stays as it is.
            return if entry.kind == Kind::File { self.leave_out().await } else { Ok(()) };
        };
        if let Some(parent) = below.parent().filter(|parent| **parent != *self.entered) {
            if !parent.as_os_str().is_empty() {
                self.fs.mkdir(self.guest.join(parent)).await?;
            }
            self.entered = parent.to_owned();
        }
        let path = self.guest.join(&below);
        let attributes = self.attributes(&entry);
        match entry.kind {
            Kind::Dir => {
                self.refuse_link(&below, &entry.path)?;
                self.fs.mkdir(&path).await?;
                self.copied.directories += 1;
                self.remember(&below)?;
                self.directories.push((below, attributes));
            }
            Kind::Symlink => {
                self.fs.link_over(Path::new(OsStr::from_bytes(&entry.link)), &path).await?;
                let attributes = FileAttributes { mode: None, ..attributes };
                let request = FileRequest::SetAttributes { path: bytes(&path), follow: false, attributes };
                self.fs.does("unpack into", &path, request).await?;
                self.copied.links += 1;
                self.remember(&below)?;
                self.links.insert(below);
            }
            Kind::HardLink => {
                let first = self.place(&entry.link)?;
                let first = first.ok_or_else(|| broken("a hard link to the directory itself"))?;
                self.refuse_link(&first, &entry.link)?;
                if first != below {
                    self.clear(&below, &path).await?;
                    self.fs.copy(self.guest.join(first), &path).await?;
                }
                self.copied.files += 1;
            }
            Kind::File => {
                self.clear(&below, &path).await?;
                self.file(&path, attributes).await?;
                self.copied.files += 1;
            }
            Kind::Char | Kind::Block | Kind::Fifo => self.copied.skipped.push(below),
        }
        Ok(())
    }

    /// Where an entry goes, below the directory; `None` is the directory itself. Names from the root are taken from there.
    fn place(&self, name: &[u8]) -> R<Option<PathBuf>> {
        let mut below = PathBuf::new();
        for component in Path::new(OsStr::from_bytes(name)).components() {
            match component {
                Component::Normal(_) if self.links.contains(&below) => return Err(leads_out(name)),
                Component::Normal(component) => below.push(component),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return Err(leads_out(name)),
            }
        }
        Ok(Some(below).filter(|below| !below.as_os_str().is_empty()))
    }

    fn refuse_link(&self, below: &Path, name: &[u8]) -> R<()> {
        if self.links.contains(below) { Err(leads_out(name)) } else { Ok(()) }
    }

    /// Removes the archive's own link that is in a file's way; it would be written through.
    async fn clear(&mut self, below: &Path, path: &Path) -> R<()> {
        if self.links.remove(below) { self.fs.remove(path).await } else { Ok(()) }
    }

    async fn file(&mut self, path: &Path, attributes: FileAttributes) -> R<()> {
        let options = WriteOptions { attributes, ..WriteOptions::default() };
        let first = match self.step().await? {
            Step::EndOfFile => return FileWriter::write_whole(&self.fs.link, path, &options, &[]).await,
            Step::Piece(piece) => piece,
            _ => return Err(broken("a file without an end")),
        };
        let mut next = self.step().await?;
        // Most files are small, and a small one is one message.
        if let (Piece::Data(bytes), Step::EndOfFile) = (&first, &next) {
            self.copied.bytes += bytes.len() as u64;
            return FileWriter::write_whole(&self.fs.link, path, &options, bytes).await;
        }
        let mut writer = FileWriter::open(&self.fs.link, path, &options).await?;
        let mut piece = first;
        loop {
            self.copied.bytes += piece.weight() as u64;
            match piece {
                Piece::Data(bytes) => writer.write(bytes).await?,
                Piece::Hole(size) => writer.write_hole(size).await?,
            }
            self.tell();
            piece = match next {
                Step::Piece(piece) => piece,
                Step::EndOfFile => return writer.finish().await,
                _ => return Err(broken("a file without an end")),
            };
            next = self.step().await?;
        }
    }

    async fn leave_out(&mut self) -> R<()> {
        while !matches!(self.step().await?, Step::EndOfFile) {}
        Ok(())
    }

    fn attributes(&self, entry: &Entry) -> FileAttributes {
        let time = FileTime { seconds: entry.mtime.seconds, nanoseconds: entry.mtime.nanos };
        FileAttributes {
            mode: Some(entry.mode.into()),
            owner: self.options.owners.then_some((entry.uid, entry.gid)),
            times: Some((time, time)),
        }
    }

    fn remember(&mut self, path: &Path) -> R<()> {
        self.remembered += path.as_os_str().len() + size_of::<(PathBuf, FileAttributes)>();
        if self.remembered > REMEMBERED {
            return Err(broken("more directories and links than one call unpacks"));
        }
        Ok(())
    }

    fn tell(&mut self) {
        if let Some(listener) = &mut self.options.listener {
            listener(&self.copied);
        }
    }
}

/// Reads an archive to its end.
fn read(archive: impl Read, steps: &mpsc::Sender<io::Result<Step>>) -> io::Result<()> {
    let say = |step| steps.blocking_send(Ok(step)).map_err(|_| io::ErrorKind::BrokenPipe.into());
    let mut reader = BufReader::with_capacity(CHUNK, archive);
    match reader.fill_buf()? {
        [] => return Err(invalid("it is empty")),
        [0x1f, 0x8b, ..] => return Err(invalid("it is compressed: gunzip it first")),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => return Err(invalid("it is compressed: unzstd it first")),
        [0xfd, b'7', b'z', ..] => return Err(invalid("it is compressed: unxz it first")),
        _ => {}
    }
    let mut archive = Archive::new(reader, HEADER);
    while let Some(mut entry) = archive.next_entry()? {
        let (is_file, size) = (entry.kind == Kind::File, entry.size);
        let segments = entry.segments.take().unwrap_or_else(|| vec![(0, size)]);
        say(Step::Entry(entry))?;
        if !is_file {
            continue;
        }
        let mut at = 0;
        for (offset, length) in segments.into_iter().chain([(size, 0)]) {
            if offset > at {
                say(Step::Piece(Piece::Hole(offset - at)))?;
            }
            let mut left = length;
            while left > 0 {
                let data = archive.data()?;
                let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                let data = data.get(..most).unwrap_or(data);
                let count = data.len();
                if count == 0 {
                    return Err(invalid("it ends inside a file"));
                }
                say(Step::Piece(Piece::Data(Bytes::copy_from_slice(data))))?;
                archive.consume(count);
                left -= count as u64;
            }
            at = offset + length;
        }
        say(Step::EndOfFile)?;
    }
    say(Step::End)
}

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn broken(why: &str) -> Error {
    Error::Archive { source: invalid(why) }
}

fn leads_out(name: &[u8]) -> Error {
    let name = String::from_utf8_lossy(name);
    Error::Archive { source: invalid(format!("{name:?} leads out of where it is unpacked")) }
}
