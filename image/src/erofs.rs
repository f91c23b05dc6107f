//! Writes EROFS (Linux: Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h): uncompressed, 4 KiB blocks,
//! no incompatible features, so that every kernel since 5.4 mounts it.
//!
//! ```text
//!  block 0           1 …                       metadata block …
//!  superblock  file contents as they came   directory blocks, long links | inodes + inline tails
//! ```
//!
//! Contents stream to the disk while layers are read ([`Disk`]); when all names are known, [`finish`] lays
//! out directories and inodes behind them. Files that fit beside their inode go there and cost no block.
//! The same tree and contents give the same bytes, and the UUID comes from the image's digest. Memory: the
//! tree, [`data::ARENA`] bytes of small files, and about 64 bytes per inode.
mod data;
mod dir;
mod inode;
mod layout;
mod writeback;

pub(crate) use data::Disk;
pub(crate) use inode::{holds_device, holds_xattr, holds_xattrs};
pub(crate) use layout::finish;

/// Bytes of a block.
const BLOCK: usize = 4096;
