//! Applies layers in order: entries and whiteouts to the [`Tree`], contents to the disk (OCI image-spec,
//! layer.md § Applying Changesets).
//!
//! Refused with typed errors: paths and hard links that leave the image, names longer than Linux allows, and
//! whatever goes over the [`Limits`]. Not kept: extended attributes of namespaces that EROFS cannot hold.
use std::io;

use super::{
    stream::Stream,
    tar::{Archive, Entry, Kind, Malformed, lossy},
    tree::{Body, Extent, Leaf, Meta, Refusal, Tree, parts},
};
use crate::{Digest, Error, Progress, PullOptions, erofs};

/// What the names and attributes of an entry cost besides their bytes is counted by `max_entries`.
const NAME_MAX: usize = 255;
/// Linux's `PATH_MAX` less the NUL byte.
const LINK_MAX: usize = 4095;

/// The image as far as it has been applied.
pub(crate) struct Applier<'a> {
    pub(crate) tree: Tree,
    pub(crate) disk: erofs::Disk,
    options: &'a PullOptions,
    layer: String,
    entries: u64,
    metadata: u64,
    content: u64,
    reported: u64,
}

impl<'a> Applier<'a> {
    pub(crate) fn new(disk: erofs::Disk, options: &'a PullOptions) -> Self {
        Self {
            tree: Tree::new(),
            disk,
            options,
            layer: String::new(),
            entries: 0,
            metadata: 0,
            content: 0,
            reported: 0,
        }
    }

    /// Applies the next layer of `stream`.
    pub(crate) fn layer(
        &mut self,
        stream: &mut Stream,
        digest: &Digest,
        diff_id: Option<&Digest>,
    ) -> Result<(), Error> {
        self.layer = digest.to_string();
        self.tree.start_layer();
        stream.next_layer(diff_id);
        let before = stream.bytes();
        let mut archive = Archive::new(&mut *stream, self.options.limits.max_header);
        while let Some(entry) = archive.next_entry().map_err(|e| self.broken(e))? {
            self.entry(entry, &mut archive)?;
        }
        io::copy(stream, &mut io::sink()).map_err(|e| self.broken(e))?;
        self.reported = stream.bytes();
        if before != self.reported {
            self.options.report(Progress::Converting { bytes: self.reported });
        }
        for extent in self.tree.take_freed() {
            self.disk.free(extent);
        }
        stream.verify(diff_id)
    }

    fn entry(&mut self, entry: Entry, archive: &mut Archive<&mut Stream>) -> Result<(), Error> {
        let limits = &self.options.limits;
        self.entries += 1;
        let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        let metadata = entry.path.len() + entry.link.len() + xattrs;
        self.metadata += metadata as u64;
        let over = |what: &str, limit, option| {
            let what = format!("{what} at {} in layer {}", lossy(&entry.path), self.layer);
            Err(Error::Limit { what, limit, option })
        };
        if self.entries > limits.max_entries {
            return over("the number of entries", limits.max_entries, "max_entries");
        }
        if self.metadata > limits.max_metadata {
            return over("the size of all names and attributes", limits.max_metadata, "max_metadata");
        }
        if entry.path.len() as u64 > limits.max_path {
            return over("the length of a path", limits.max_path, "max_path");
        }
        if xattrs as u64 > limits.max_xattrs {
            return over("the size of extended attributes", limits.max_xattrs, "max_xattrs");
        }
        let path = self.path(&entry.path, &entry.path)?;
        match path.split_last() {
            Some((name, parents)) if name.starts_with(b".wh.") => self.whiteout(&entry, name, parents),
            _ => self.put(&entry, &path, archive),
        }
    }

    /// Whiteout files carry no content that means anything (layer.md § Whiteouts).
    fn whiteout(&mut self, entry: &Entry, name: &[u8], parents: &[&[u8]]) -> Result<(), Error> {
        let hidden = name.strip_prefix(b".wh.").unwrap_or_default();
        let done = match hidden {
            b".wh..opq" => self.tree.opaque(parents),
            b"" => Err(Refusal::Broken("a whiteout of nothing")),
            b"." | b".." => Err(Refusal::Escape("a whiteout of the directory itself or its parent")),
            // Bookkeeping of AUFS.
            _ if hidden.starts_with(b".wh.") => Ok(()),
            _ => self.tree.whiteout(&[parents, &[hidden]].concat()),
        };
        done.map_err(|refusal| self.refused(refusal, &entry.path))
    }

    fn put(
        &mut self,
        entry: &Entry,
        path: &[&[u8]],
        archive: &mut Archive<&mut Stream>,
    ) -> Result<(), Error> {
        let meta = Meta {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry
                .xattrs
                .iter()
                .filter(|(name, _)| erofs::holds_xattr(name))
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
        };
        if !erofs::holds_xattrs(&meta) {
            return Err(self.refused(
                Refusal::Broken("extended attributes larger than a file system holds"),
                &entry.path,
            ));
        }
        let body = match entry.kind {
            Kind::Dir => {
                return self.tree.put_dir(path, meta).map_err(|refusal| self.refused(refusal, &entry.path));
            }
            Kind::HardLink => {
                let target = self.path(&entry.link, &entry.path)?;
                return self
                    .tree
                    .put_link(path, &target)
                    .map_err(|refusal| self.refused(refusal, &entry.path));
            }
            Kind::File => Body::File(self.content(entry, archive, &meta)?),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > LINK_MAX {
                    return Err(self
                        .refused(Refusal::Broken("a symbolic link that is empty or too long"), &entry.path));
                }
                Body::Symlink(entry.link.as_slice().into())
            }
            Kind::Char | Kind::Block => {
                let (major, minor) = entry.device;
                if !erofs::holds_device(major, minor) {
                    return Err(self
                        .refused(Refusal::Broken("a device number that Linux does not have"), &entry.path));
                }
                if entry.kind == Kind::Char { Body::Char(major, minor) } else { Body::Block(major, minor) }
            }
            Kind::Fifo => Body::Fifo,
        };
        self.tree.put_leaf(path, Leaf { meta, body }).map_err(|refusal| self.refused(refusal, &entry.path))
    }

    /// Streams a file's content to the disk.
    fn content(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<&mut Stream>,
        meta: &Meta,
    ) -> Result<Extent, Error> {
        let limit = self.options.limits.max_unpacked;
        // Sparse files unpack to more than the stream has.
        self.content = self.content.saturating_add(entry.size);
        if self.content > limit {
            let what = format!("the size of all files, at {} in layer {}", lossy(&entry.path), self.layer);
            return Err(Error::Limit { what, limit, option: "max_unpacked" });
        }
        self.disk.begin(entry.size, meta)?;
        let whole = [(0, entry.size)];
        let mut at = 0;
        for &(offset, length) in entry.segments.as_deref().unwrap_or(&whole) {
            self.disk.hole(offset - at)?;
            at = offset + length;
            let mut left = length;
            while left > 0 {
                let piece = archive.data().map_err(|e| self.broken(e))?;
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
                self.disk.write(piece.get(..take).unwrap_or_default())?;
                archive.consume(take);
                left -= take as u64;
            }
        }
        self.disk.hole(entry.size - at)?;
        debug_assert_eq!(archive.stored(), 0);
        self.disk.end()
    }

    /// The components of `path`, which must lead into the image; `entry` is whose path or link it is.
    fn path<'p>(&self, path: &'p [u8], entry: &[u8]) -> Result<Vec<&'p [u8]>, Error> {
        if path.starts_with(b"/") && !self.options.allow_absolute_paths {
            let why = "its path is absolute (`allow_absolute_paths` in the pull options takes it as relative to the image)";
            return Err(self.refused(Refusal::Escape(why), entry));
        }
        let parts = parts(path);
        if parts.contains(&&b".."[..]) {
            return Err(self.refused(Refusal::Escape("its path has a `..`"), entry));
        }
        if parts.iter().any(|part| part.len() > NAME_MAX) {
            return Err(self.refused(Refusal::Broken("a name longer than 255 bytes"), entry));
        }
        Ok(parts)
    }

    fn refused(&self, refusal: Refusal, path: &[u8]) -> Error {
        let layer = self.layer.clone();
        match refusal {
            Refusal::Escape(why) => Error::Escape { layer, path: lossy(path), why },
            Refusal::Broken(why) => Error::Layer { layer, why: format!("{}: {why}", lossy(path)) },
        }
    }

    /// An error of the reader: its own, or the archive's.
    fn broken(&self, error: io::Error) -> Error {
        match error.downcast::<Error>() {
            Ok(error) => error,
            Err(error) => match error.downcast::<Malformed>() {
                Ok(Malformed(why)) => Error::Layer { layer: self.layer.clone(), why },
                Err(error) => Error::Layer { layer: self.layer.clone(), why: error.to_string() },
            },
        }
    }
}
