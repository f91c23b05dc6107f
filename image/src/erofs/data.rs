//! The contents of files, written in the order they come. A file that fits beside its inode goes to an
//! arena in memory, which [`super::finish`] empties; once the arena is full, small files take a block each.
use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::{BLOCK, inode, writeback::Writeback};
use crate::{
    Error,
    layer::tree::{Extent, Meta},
    space::Space,
};

/// Bytes of small files held in memory.
pub(super) const ARENA: usize = 64 << 20;
/// Bytes gathered before the disk is written.
const BUFFER: usize = 1 << 20;
/// Zeros from this many bytes on are left out of the file.
const HOLE: usize = 64 << 10;

/// The disk being made.
pub(crate) struct Disk {
    file: File,
    path: PathBuf,
    space: Space,
    writeback: Writeback,
    /// Where `buffer` goes, in bytes.
    flushed: u64,
    buffer: Vec<u8>,
    arena: Vec<u8>,
    current: Option<Extent>,
    freed: Vec<(u32, u64)>,
}

impl Disk {
    /// Writes to `file`, which is empty; `path` names it in errors. `min_free` bytes stay free on its file system.
    pub(crate) fn new(file: File, path: PathBuf, min_free: u64) -> Result<Self, Error> {
        let writeback = Writeback::start(&file).map_err(Error::io("start to write", &path))?;
        Ok(Self {
            writeback,
            file,
            path,
            space: Space::new(min_free),
            flushed: BLOCK as u64,
            buffer: Vec::with_capacity(BUFFER),
            arena: Vec::new(),
            current: None,
            freed: Vec::new(),
        })
    }

    /// The next content has `size` bytes and belongs to an inode with `meta`.
    pub(crate) fn begin(&mut self, size: u64, meta: &Meta) -> Result<(), Error> {
        let beside = usize::try_from(size)
            .ok()
            .filter(|&size| inode::fits_inline(size, meta) && self.arena.len() + size <= ARENA);
        self.current = Some(match beside {
            Some(size) => Extent::Inline(self.arena.len(), size),
            None => Extent::Blocks(self.next_block()?, size),
        });
        Ok(())
    }

    /// The next bytes of the content.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if let Some(Extent::Inline(..)) = self.current {
            self.arena.extend_from_slice(bytes);
            return Ok(());
        }
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        if bytes.len() >= BUFFER {
            return self.write_through(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next `length` bytes are zero; where they are many, they take no space.
    pub(crate) fn hole(&mut self, length: u64) -> Result<(), Error> {
        match usize::try_from(length) {
            Ok(short) if matches!(self.current, Some(Extent::Inline(..))) => {
                self.arena.resize(self.arena.len() + short, 0)
            }
            Ok(short) if short < HOLE && self.buffer.len() + short <= BUFFER => {
                self.buffer.resize(self.buffer.len() + short, 0)
            }
            _ => {
                self.flush()?;
                self.flushed += length;
            }
        }
        Ok(())
    }

    /// The content is complete; the next one starts at a block.
    pub(crate) fn end(&mut self) -> Result<Extent, Error> {
        let extent = self.current.take().unwrap_or(Extent::Inline(0, 0));
        if let Extent::Blocks(_, size) = extent {
            self.hole(size.wrapping_neg() % BLOCK as u64)?;
        }
        Ok(extent)
    }

    /// Nothing names this content any more: its blocks are given back at the end.
    pub(crate) fn free(&mut self, extent: Extent) {
        if let Extent::Blocks(start, size) = extent {
            self.freed.push((start, size.div_ceil(BLOCK as u64)));
        }
    }

    /// What the arena holds.
    pub(super) fn small(&self, offset: usize, length: usize) -> &[u8] {
        self.arena.get(offset..offset + length).unwrap_or_default()
    }

    /// The block that the next content starts at.
    pub(super) fn next_block(&self) -> Result<u32, Error> {
        let bytes = self.flushed + self.buffer.len() as u64;
        u32::try_from(bytes / BLOCK as u64).map_err(|_| Error::Limit {
            what: "the image".to_owned(),
            limit: u64::from(u32::MAX) * BLOCK as u64,
            option: "max_unpacked",
        })
    }

    /// Appends raw bytes; for metadata.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.current = None;
        self.write(bytes)
    }

    /// Fills up the current block with zeros.
    pub(super) fn align(&mut self) -> Result<(), Error> {
        self.hole((self.buffer.len() as u64 + self.flushed).wrapping_neg() % BLOCK as u64)
    }

    /// Writes the superblock, gives back freed space and makes everything durable. Returns the disk's bytes.
    pub(super) fn close(mut self, superblock: &[u8]) -> Result<u64, Error> {
        self.align()?;
        self.flush()?;
        self.file.write_all_at(superblock, 0).map_err(Error::io("write", &self.path))?;
        self.file.set_len(self.flushed).map_err(Error::io("write", &self.path))?;
        let block = BLOCK as u64;
        for (start, blocks) in std::mem::take(&mut self.freed) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file system that cannot do it keeps the dead bytes, which nothing reads.
            let _ = fallocate(&self.file, flags, u64::from(start) * block, blocks * block);
        }
        self.writeback.finish().map_err(Error::io("sync", &self.path))?;
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        Ok(self.flushed)
    }

    fn flush(&mut self) -> Result<(), Error> {
        let buffer = std::mem::take(&mut self.buffer);
        self.write_through(&buffer)?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    fn write_through(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.space.about_to_write(&self.file, &self.path, bytes.len())?;
        self.file.write_all_at(bytes, self.flushed).map_err(Error::io("write", &self.path))?;
        self.flushed += bytes.len() as u64;
        self.writeback.wrote(bytes.len());
        Ok(())
    }
}
