//! Files and trees of the guest, copied to this computer.
//!
//! The guest may be hostile, and change while it is read: a name that was a directory is a link a moment later, one name
//! is listed twice, a name has a slash in it. So nothing is looked up on this side by a path that the guest has had a
//! hand in. Each directory is opened from the one above it, component by component and without following links; files
//! are created, never opened; and what is in the way is removed by its name in an open directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, chownat, mkdirat, openat, statat, symlinkat,
    unlinkat, utimensat,
};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

use super::options::Listener;
use super::pieces::{Attributes, BATCH, Piece, Target, on_host};
use super::{Copied, CopyOptions, DirEntry, EFBIG, FileKind, FileReader, Fs, Metadata, metadata};
use crate::error::{Error, R};

/// How many entries one call copies. No guest makes a host's memory grow beyond what these take.
pub(super) const ENTRIES: u64 = 2_000_000;

/// How long a path of the guest's can be (`PATH_MAX`, limits.h).
pub(super) const PATH_MAX: usize = 4096;

/// What Linux says of a longer one.
pub(super) const ENAMETOOLONG: i32 = 36;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

struct Copy<'a> {
    fs: &'a Fs,
    owners: bool,
    listener: Option<Listener>,
    copied: Copied,
    entries: u64,
}

pub(super) async fn copy(fs: &Fs, guest: &Path, host: &Path, options: CopyOptions) -> R<Copied> {
    let CopyOptions { owners, listener } = options;
    let mut copy = Copy { fs, owners, listener, copied: Copied::default(), entries: 0 };
    let found = fs.stat(guest).await?;
    if found.is_dir() {
        copy.tree(guest, host, &found).await?;
    } else {
        // The user's own path is the user's own business: it may lead through a link, or be a terminal.
        let reader = fs.read_stream(guest).await?;
        let path = host.to_owned();
        let open = move || OpenOptions::new().write(true).create(true).truncate(true).open(path);
        copy.file(reader, host, open).await?;
    }
    copy.tell();
    Ok(copy.copied)
}

impl Copy<'_> {
    async fn tree(&mut self, guest: &Path, host: &Path, found: &Metadata) -> R<()> {
        let path = host.to_owned();
        let root = on_host(host, move || {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok(Arc::new(rustix::fs::open(path, flags, Mode::empty())?))
        });
        let root = root.await?;
        let mut waiting = vec![(PathBuf::new(), self.attributes(found))];
        let mut made = Vec::new();
        while let Some((below, attributes)) = waiting.pop() {
            let from = if below.as_os_str().is_empty() { guest.to_owned() } else { guest.join(&below) };
            if from.as_os_str().len() >= PATH_MAX {
                return Err(Error::Fs { operation: "copy", path: from, errno: ENAMETOOLONG });
            }
            let path = host.join(&below);
            let directory = on_host(&path, enter(&root, &below)).await?;
            self.copied.directories += 1;
            for entry in self.fs.list(&from).await? {
                self.count(&from)?;
                let (name, path) = (PathBuf::from(entry.name()), host.join(&below).join(entry.name()));
                match entry.metadata().kind {
                    FileKind::Directory => {
                        let (directory, entered) = (directory.clone(), name.clone());
                        on_host(&path, move || make_directory(&directory, &entered)).await?;
                        waiting.push((below.join(name), self.attributes(entry.metadata())));
                    }
                    FileKind::Symlink => self.link(&entry, directory.clone(), &path).await?,
                    FileKind::File => {
                        let reader = self.fs.read_stream(entry.path()).await?;
                        let directory = directory.clone();
                        self.file(reader, &path, move || replace(&directory, &name)).await?;
                    }
                    _ => self.copied.skipped.push(entry.path()),
                }
            }
            made.push((below, attributes));
        }
        // What is made read-only, and when, comes after what is made in it.
        for (below, attributes) in made.into_iter().rev() {
            let open = enter(&root, &below);
            on_host(&host.join(&below), move || attributes.give(&File::from(open()?.try_clone()?))).await?;
        }
        Ok(())
    }

    async fn link(&mut self, entry: &DirEntry, directory: Arc<OwnedFd>, path: &Path) -> R<()> {
        let target = self.fs.read_link(entry.path()).await?;
        let (name, attributes) = (PathBuf::from(entry.name()), self.attributes(entry.metadata()));
        on_host(path, move || {
            clear(&directory, &name)?;
            symlinkat(&target, &*directory, &name)?;
            if let Some((uid, gid)) = attributes.owner {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                chownat(&*directory, &name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            let time = |time| {
                let time = metadata::to_guest(time);
                Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() }
            };
            let times = Timestamps {
                last_access: time(attributes.accessed),
                last_modification: time(attributes.modified),
            };
            Ok(utimensat(&*directory, &name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
        })
        .await?;
        self.copied.links += 1;
        Ok(())
    }

    /// Copies what `reader` gives to the file that `open` makes at `path`.
    async fn file(
        &mut self,
        mut reader: FileReader,
        path: &Path,
        open: impl FnOnce() -> io::Result<File> + Send + 'static,
    ) -> R<()> {
        let attributes = self.attributes(reader.metadata());
        let mut open = Some(open);
        let mut target = None;
        loop {
            let (pieces, last) = gather(&mut reader).await?;
            let (opened, open) = (target.take(), open.take());
            self.copied.bytes += pieces.iter().map(|piece| piece.weight() as u64).sum::<u64>();
            target = on_host(path, move || {
                let mut target = match (opened, open) {
                    (Some(target), _) => target,
                    (None, Some(open)) => Target::new(open()?)?,
                    (None, None) => return Ok(None),
                };
                target.put(&pieces)?;
                if last { target.finish(&attributes).map(|()| None) } else { Ok(Some(target)) }
            })
            .await?;
            self.tell();
            if last {
                self.copied.files += 1;
                return Ok(());
            }
        }
    }

    fn attributes(&self, found: &Metadata) -> Attributes {
        Attributes {
            mode: found.mode,
            owner: self.owners.then_some((found.uid, found.gid)),
            accessed: found.accessed,
            modified: found.modified,
        }
    }

    fn count(&mut self, at: &Path) -> R<()> {
        self.entries += 1;
        if self.entries > ENTRIES {
            return Err(Error::Fs { operation: "copy", path: at.to_owned(), errno: EFBIG });
        }
        Ok(())
    }

    fn tell(&mut self) {
        if let Some(listener) = &mut self.listener {
            listener(&self.copied);
        }
    }
}

/// The next pieces of a guest's file, of about [`BATCH`] bytes, and whether they are the last.
async fn gather(reader: &mut FileReader) -> R<(Vec<Piece>, bool)> {
    let (mut pieces, mut size) = (Vec::new(), 0);
    while size < BATCH {
        let Some(piece) = reader.next_piece().await else { return Ok((pieces, true)) };
        let piece = piece?;
        // A hole counts, so that not even holes without end gather without end.
        size += piece.weight().max(64);
        pieces.push(piece);
    }
    Ok((pieces, false))
}

/// Opens the directory at `below`, link by link of the way, none of them a symbolic one.
fn enter(root: &Arc<OwnedFd>, below: &Path) -> impl FnOnce() -> io::Result<Arc<OwnedFd>> + Send + use<> {
    let (root, below) = (root.clone(), below.to_owned());
    move || {
        let mut directory = root;
        for component in below.components() {
            let Component::Normal(name) = component else { return Err(Errno::INVAL.into()) };
            directory = Arc::new(openat(&*directory, name, DIRECTORY, Mode::empty())?);
        }
        Ok(directory)
    }
}

/// One name of a directory's own, and no path.
fn single(name: &Path) -> io::Result<&Path> {
    let slash = name.as_os_str().as_bytes().contains(&b'/');
    let mut components = name.components();
    match (components.next(), components.next(), slash) {
        (Some(Component::Normal(_)), None, false) => Ok(name),
        _ => Err(Errno::INVAL.into()),
    }
}

/// Makes a directory, unless it is there.
fn make_directory(directory: &OwnedFd, name: &Path) -> io::Result<()> {
    let name = single(name)?;
    match mkdirat(directory, name, Mode::RWXU) {
        Err(Errno::EXIST) => {
            // A link to a directory is none.
            openat(directory, name, DIRECTORY, Mode::empty())?;
            Ok(())
        }
        result => Ok(result?),
    }
}

/// Removes the file or link that has this name, if one has.
fn clear(directory: &OwnedFd, name: &Path) -> io::Result<()> {
    let name = single(name)?;
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile | FileType::Symlink => Ok(unlinkat(directory, name, AtFlags::empty())?),
            FileType::Directory => Err(Errno::ISDIR.into()),
            // A device or the like is not what anybody means to replace.
            _ => Err(Errno::EXIST.into()),
        },
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Creates a file in the place of the one that has this name.
fn replace(directory: &OwnedFd, name: &Path) -> io::Result<File> {
    clear(directory, name)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_leads_out_of_the_destination() {
        let scratch = tempfile::tempdir().unwrap();
        let (inside, outside) = (scratch.path().join("inside"), scratch.path().join("outside"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "untouched").unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let root = Arc::new(rustix::fs::open(&inside, flags, Mode::empty()).unwrap());
        symlink(&outside, inside.join("to-directory")).unwrap();
        symlink(outside.join("file"), inside.join("to-file")).unwrap();
        symlink(outside.join("new"), inside.join("to-nothing")).unwrap();
        // A link in the way of a directory is none, on the way down or at the end of it.
        assert!(make_directory(&root, Path::new("to-directory")).is_err());
        assert!(enter(&root, Path::new("to-directory"))().is_err());
        assert!(enter(&root, Path::new("to-directory/below"))().is_err());
        for name in ["..", ".", "", "/", "a/b", "a/", "../outside/file", "/etc/passwd"] {
            let name = Path::new(name);
            assert!(replace(&root, name).is_err(), "{name:?}");
            assert!(make_directory(&root, name).is_err(), "{name:?}");
            assert!(clear(&root, name).is_err(), "{name:?}");
        }
        assert!(enter(&root, Path::new(".."))().is_err());
        // A link in the way of a file is replaced, and what it leads to is not touched.
        for name in ["to-file", "to-nothing"] {
            let mut target = Target::new(replace(&root, Path::new(name)).unwrap()).unwrap();
            target.put(&[Piece::Data("theirs".into())]).unwrap();
            assert_eq!(fs::read_to_string(inside.join(name)).unwrap(), "theirs");
        }
        let found: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(
            (found.len(), fs::read_to_string(outside.join("file")).unwrap().as_str()),
            (1, "untouched")
        );
        // A directory is in the way of a file, and stays.
        fs::create_dir(inside.join("directory")).unwrap();
        assert!(replace(&root, Path::new("directory")).is_err() && inside.join("directory").is_dir());
    }
}
