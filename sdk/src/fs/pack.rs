//! Files and trees of the guest, packed into a tar archive while they are read.
//!
//! The guest may be hostile, and change while it is read. What leaves here is an archive that is whole and safe to
//! unpack: every name is one that a directory has listed once, nothing lies below what was no directory, and a file has
//! as many bytes as its header says.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::copy_out::{ENAMETOOLONG, ENTRIES, PATH_MAX};
use super::tar_header::{self, BLOCK, Type};
use super::{Copied, CopyOptions, DirEntry, EFBIG, FileKind, FileReader, Fs, Metadata};
use crate::error::{Error, R};

/// Pieces that wait to be written.
const AHEAD: usize = 8;

pub(super) async fn pack(
    fs: &Fs,
    guest: &Path,
    archive: impl Write + Send + 'static,
    options: CopyOptions,
) -> R<Copied> {
    let (pieces, written) = writer(archive).map_err(|source| Error::Archive { source })?;
    let mut packing = Packing { fs, options, pieces, copied: Copied::default() };
    let found = fs.stat(guest).await?;
    let packed = match packing.all(guest, found).await {
        // The writer has a better word for it.
        Err(Failed::Written) => Ok(()),
        Err(Failed::Read(error)) => Err(error),
        Ok(()) => Ok(()),
    };
    let Packing { copied, pieces, .. } = packing;
    if packed.is_ok() {
        drop(pieces);
        let end = written.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
        end.map_err(|source| Error::Archive { source })?;
    }
    packed.map(|()| copied)
}

/// A thread that writes what it is sent; how it ended comes at its end. Not one of tokio's: it may wait for ever for
/// somebody to take its bytes, and nobody is to wait for it.
fn writer(
    mut archive: impl Write + Send + 'static,
) -> io::Result<(mpsc::Sender<Bytes>, oneshot::Receiver<io::Result<()>>)> {
    let (send, mut pieces) = mpsc::channel::<Bytes>(AHEAD);
    let (end, written) = oneshot::channel();
    let thread = std::thread::Builder::new().name("pack".into());
    thread.spawn(move || {
        let mut write = || {
            while let Some(piece) = pieces.blocking_recv() {
                archive.write_all(&piece)?;
            }
            archive.flush()
        };
        // Whoever asked may have gone.
        let _ = end.send(write());
    })?;
    Ok((send, written))
}

enum Failed {
    /// The guest's files cannot be read.
    Read(Error),
    /// The archive cannot be written.
    Written,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Read(error)
    }
}

struct Packing<'a> {
    fs: &'a Fs,
    options: CopyOptions,
    pieces: mpsc::Sender<Bytes>,
    copied: Copied,
}

impl Packing<'_> {
    async fn all(&mut self, guest: &Path, found: Metadata) -> Result<(), Failed> {
        let content = guest.as_os_str().as_bytes().ends_with(b"/.");
        let name = guest.file_name().filter(|_| !content).map_or_else(|| PathBuf::from("."), PathBuf::from);
        if found.is_dir() {
            self.tree(guest, name, found).await?;
        } else {
            self.file(guest, &name).await?;
        }
        // Two empty blocks end an archive (POSIX.1-2017, pax § ustar Interchange Format).
        self.say(Bytes::from_static(&[0; 2 * BLOCK])).await?;
        self.tell();
        Ok(())
    }

    async fn tree(&mut self, guest: &Path, name: PathBuf, found: Metadata) -> Result<(), Failed> {
        self.header(Type::Directory, &name, &found, &[]).await?;
        let (mut waiting, mut entries) = (vec![(guest.to_owned(), name)], 0);
        while let Some((guest, name)) = waiting.pop() {
            self.copied.directories += 1;
            if guest.as_os_str().len() >= PATH_MAX {
                return Err(Error::Fs { operation: "pack", path: guest, errno: ENAMETOOLONG }.into());
            }
            let list = self.fs.list(&guest).await?;
            entries += list.len() as u64;
            if entries > ENTRIES {
                return Err(Error::Fs { operation: "pack", path: guest, errno: EFBIG }.into());
            }
            // A name that was a link must not be a directory a line later.
            if let Some(twice) = twice(list.iter().map(DirEntry::name)) {
                return Err(Error::BadFileName { directory: guest, name: twice.to_owned() }.into());
            }
            for entry in list {
                let (path, name, found) = (entry.path(), name.join(entry.name()), entry.metadata());
                match found.kind {
                    FileKind::Directory => {
                        self.header(Type::Directory, &name, found, &[]).await?;
                        waiting.push((path, name));
                    }
                    FileKind::Symlink => {
                        let target = self.fs.read_link(&path).await?;
                        self.header(Type::Symlink, &name, found, target.as_os_str().as_bytes()).await?;
                        self.copied.links += 1;
                    }
                    FileKind::File => self.file(&path, &name).await?,
                    _ => self.copied.skipped.push(path),
                }
            }
            self.tell();
        }
        Ok(())
    }

    async fn file(&mut self, path: &Path, name: &Path) -> Result<(), Failed> {
        let mut reader = self.fs.read_stream(path).await?;
        let found = *reader.metadata();
        self.header(Type::File, name, &found, &[]).await?;
        self.content(&mut reader, found.size).await?;
        self.copied.files += 1;
        Ok(())
    }

    /// Exactly `size` bytes: a file that has grown is cut there, and one that has shrunk ends in zeroes.
    async fn content(&mut self, reader: &mut FileReader, size: u64) -> Result<(), Failed> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut left = size;
        while left > 0 {
            let bytes = match reader.next().await {
                Some(bytes) => bytes?,
                None => Bytes::from_static(&ZEROES),
            };
            let bytes = bytes.slice(..bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
            left -= bytes.len() as u64;
            self.copied.bytes += bytes.len() as u64;
            self.say(bytes).await?;
            self.tell();
        }
        let padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        let padding = usize::try_from(padding).unwrap_or_default();
        self.say(Bytes::from_static(ZEROES.get(..padding).unwrap_or_default())).await
    }

    async fn header(&mut self, kind: Type, name: &Path, found: &Metadata, link: &[u8]) -> Result<(), Failed> {
        self.say(tar_header::encode(kind, name.as_os_str().as_bytes(), found, link).into()).await
    }

    async fn say(&mut self, bytes: Bytes) -> Result<(), Failed> {
        self.pieces.send(bytes).await.map_err(|_| Failed::Written)
    }

    fn tell(&mut self) {
        if let Some(listener) = &mut self.options.listener {
            listener(&self.copied);
        }
    }
}

/// A name that is there twice, in a list in the order of the names.
fn twice<'n>(names: impl Iterator<Item = &'n OsStr> + Clone) -> Option<&'n OsStr> {
    names.clone().zip(names.skip(1)).find(|(one, next)| one == next).map(|(one, _)| one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_guest_lists_makes_an_unsafe_archive() {
        let found = |names: &[&'static str]| twice(names.iter().map(OsStr::new)).map(OsStr::to_owned);
        for names in [&[][..], &["a"], &["a", "b"], &["a", "ab", "b"]] {
            assert_eq!(found(names), None);
        }
        for names in [&["a", "a"][..], &["a", "b", "b"], &["a", "a", "b"]] {
            assert!(found(names).is_some(), "{names:?}");
        }
    }
}
