//! Files and trees of this computer, copied into the guest.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cubby_protocol::CHUNK;
use cubby_protocol::message::{FileAttributes, FileRequest, FileTime};
use rustix::io::Errno;

use super::options::Listener;
use super::pieces::{Piece, Source, on_host};
use super::{Copied, CopyOptions, FileWriter, Fs, WriteOptions, bytes};
use crate::error::R;

struct Copy<'a> {
    fs: &'a Fs,
    owners: bool,
    listener: Option<Listener>,
    copied: Copied,
}

pub(super) async fn copy(fs: &Fs, host: &Path, guest: &Path, options: CopyOptions) -> R<Copied> {
    let mut copy = Copy { fs, owners: options.owners, listener: options.listener, copied: Copied::default() };
    let path = host.to_owned();
    let found = on_host(host, move || std::fs::metadata(path)).await?;
    if found.is_dir() {
        copy.tree(host, guest, &found).await?;
    } else {
        // The first one may be a link; it was named.
        copy.file(host, guest, true).await?;
    }
    copy.tell();
    Ok(copy.copied)
}

impl Copy<'_> {
    async fn tree(&mut self, host: &Path, guest: &Path, found: &Metadata) -> R<()> {
        if let Some(parent) = guest.parent() {
            // What is made is the directory itself, not the way to it.
            self.fs.stat(if parent.as_os_str().is_empty() { Path::new("/") } else { parent }).await?;
        }
        let mut waiting = vec![(host.to_owned(), guest.to_owned(), self.attributes(found))];
        let mut made = Vec::new();
        while let Some((host, guest, attributes)) = waiting.pop() {
            self.fs.mkdir(&guest).await?;
            self.copied.directories += 1;
            for (name, found) in entries(&host).await? {
                let (from, to) = (host.join(&name), guest.join(&name));
                let kind = found.file_type();
                if kind.is_dir() {
                    waiting.push((from, to, self.attributes(&found)));
                } else if kind.is_symlink() {
                    self.link(&from, &to, &found).await?;
                } else if kind.is_file() {
                    self.file(&from, &to, false).await?;
                } else {
                    debug_assert!(
                        kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device()
                    );
                    self.copied.skipped.push(from);
                }
            }
            made.push((guest, attributes));
        }
        // A directory's time is that of its last new entry, so it comes after them.
        for (guest, attributes) in made.into_iter().rev() {
            self.fs.set("copy into", &guest, true, attributes).await?;
        }
        Ok(())
    }

    async fn link(&mut self, from: &Path, to: &Path, found: &Metadata) -> R<()> {
        let path = from.to_owned();
        let target = on_host(from, move || std::fs::read_link(path)).await?;
        self.fs.link_over(&target, to).await?;
        self.copied.links += 1;
        let attributes = FileAttributes { mode: None, ..self.attributes(found) };
        let request = FileRequest::SetAttributes { path: bytes(to), follow: false, attributes };
        self.fs.does("copy into", to, request).await
    }

    async fn file(&mut self, from: &Path, to: &Path, follow: bool) -> R<()> {
        let path = from.to_owned();
        let opened = on_host(from, move || {
            let (mut source, found) = Source::open(&path, follow)?;
            let first = source.gather()?;
            Ok((source, found, first))
        });
        let (mut source, found, (mut pieces, mut last)) = opened.await?;
        let options = WriteOptions { attributes: self.attributes(&found), ..WriteOptions::default() };
        self.copied.files += 1;
        // Most files are small, and a small one is one message.
        match &pieces[..] {
            [] if last => return FileWriter::write_whole(&self.fs.link, to, &options, &[]).await,
            [Piece::Data(bytes)] if last && bytes.len() <= CHUNK => {
                self.copied.bytes += bytes.len() as u64;
                FileWriter::write_whole(&self.fs.link, to, &options, bytes).await?;
                self.tell();
                return Ok(());
            }
            _ => {}
        }
        let mut writer = FileWriter::open(&self.fs.link, to, &options).await?;
        loop {
            for piece in &pieces {
                match piece {
                    Piece::Data(bytes) => writer.write(bytes).await?,
                    Piece::Hole(size) => writer.write_hole(*size).await?,
                }
                self.copied.bytes += piece.weight() as u64;
            }
            self.tell();
            if last {
                return writer.finish().await;
            }
            (source, pieces, last) = on_host(from, move || {
                let (pieces, last) = source.gather()?;
                Ok((source, pieces, last))
            })
            .await?;
        }
    }

    fn attributes(&self, found: &Metadata) -> FileAttributes {
        let time = |seconds, nanoseconds| FileTime {
            seconds,
            nanoseconds: u32::try_from(nanoseconds).unwrap_or_default(),
        };
        FileAttributes {
            mode: Some(found.permissions().mode()),
            owner: self.owners.then(|| (found.uid(), found.gid())),
            times: Some((time(found.atime(), found.atime_nsec()), time(found.mtime(), found.mtime_nsec()))),
        }
    }

    fn tell(&mut self) {
        if let Some(listener) = &mut self.listener {
            listener(&self.copied);
        }
    }
}

/// What is in a directory of this computer, in the order of the names. What goes meanwhile is left out.
async fn entries(path: &Path) -> R<Vec<(OsString, Metadata)>> {
    let directory: PathBuf = path.to_owned();
    on_host(path, move || {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            match entry.metadata() {
                Ok(metadata) => entries.push((entry.file_name(), metadata)),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(entries)
    })
    .await
}

fn is_gone(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::NOENT)
}
