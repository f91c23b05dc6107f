//! An empty ext4 file system in a sparse file: the disk that a sandbox writes to.
//!
//! It is made for being made quickly and mounted at once. Of a disk of 4 GiB about ten blocks are written;
//! all else is holes, which read as the zeros that the format wants there. Facts: the kernel's
//! `Documentation/filesystems/ext4/` (named below by page) and its `journal` page for the log.
//!
//! What is chosen, and why:
//! * `uninit_bg` with every inode table marked zeroed: bitmaps of untouched groups need not exist, and the
//!   kernel has nothing to initialise in the background. Of the checksums it has only those of the group
//!   descriptors. `metadata_csum` would cost the guest a checksum for each metadata block it writes, and
//!   protect nothing: whoever could damage the disk behind the guest's back could damage anything.
//! * `flex_bg` with 32 groups: one bitmap block in 4 GiB has to be written. `sparse_super2` without backups:
//!   a copy of the superblock is for repairing by hand.
//! * 32-bit block numbers: enough for 16 TiB, and half the descriptors.
//! * the mount option `no_prefetch_block_bitmaps` in the superblock: without it the kernel starts a thread
//!   that reads every bitmap.
//! * a journal of a 128th of the disk, from 4 to 32 MiB, of which the first block is written.
//! * no blocks reserved for root, for a sandbox's user often is root; errors make it read-only.
//!
//! Refused: sizes that do not fit, labels and directory names that ext4 cannot hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Smallest file system, in bytes.
pub const MIN_SIZE: u64 = 16 << 20;

/// Largest file system, in bytes.
pub const MAX_SIZE: u64 = 1 << 40;

const BLOCK: u32 = 4096;
const BLOCK_LEN: usize = 4096;
const BLOCKS_PER_GROUP: u32 = BLOCK * 8;
const INODE_SIZE: u32 = 256;
const INODES_PER_BLOCK: u32 = BLOCK / INODE_SIZE;
/// Bytes of disk for each inode, as mke2fs has it.
const BYTES_PER_INODE: u32 = 16 << 10;
const DESCRIPTOR_LEN: usize = 32;
const LOG_GROUPS_PER_FLEX: u8 = 5;
const GROUPS_PER_FLEX: u32 = 1 << LOG_GROUPS_PER_FLEX;

// Inode numbers (special_inodes.rst).
const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
const FIRST_INODE: u32 = 11;

// Flags of a group (group_descr.rst).
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const INODE_ZEROED: u16 = 4;

const HAS_JOURNAL: u32 = 0x4;
const EXT_ATTR: u32 = 0x8;
const DIR_INDEX: u32 = 0x20;
const SPARSE_SUPER2: u32 = 0x200;

const FILETYPE: u32 = 0x2;
const EXTENTS: u32 = 0x40;
const FLEX_BG: u32 = 0x200;
const LARGE_DIR: u32 = 0x4000;

const LARGE_FILE: u32 = 0x2;
const HUGE_FILE: u32 = 0x8;
const GDT_CSUM: u32 = 0x10;
const DIR_NLINK: u32 = 0x20;
const EXTRA_ISIZE: u32 = 0x40;

/// What goes into a file system beside its size.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Its identifier; the seed of its directory hashes as well.
    pub uuid: [u8; 16],
    /// Its label, 16 bytes at most.
    pub label: &'a str,
    /// Directories in its root, mode 0755, owned by root: up to 64 names.
    pub directories: &'a [&'a str],
    /// The time of all it holds, to the second.
    pub created: SystemTime,
}

impl Options<'_> {
    /// No label, no directories, created now.
    #[must_use]
    pub fn new(uuid: [u8; 16]) -> Self {
        Options { uuid, label: "", directories: &[], created: SystemTime::now() }
    }
}

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The size is out of range.
    #[error("an ext4 file system of {size} bytes is impossible: from {MIN_SIZE} to {MAX_SIZE} are allowed")]
    Size {
        /// What was asked, in bytes.
        size: u64,
    },
    /// The label is too long.
    #[error("the label {label:?} has more than 16 bytes, or a NUL")]
    Label {
        /// What was asked.
        label: String,
    },
    /// The directories cannot all be in one root.
    #[error("cannot make the directory {name:?}: {why}")]
    Directory {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file cannot be written.
    #[error("cannot write the file system")]
    Io(#[from] io::Error),
}

/// Makes `file` an empty ext4 file system of `size_bytes`, rounded down to 4 KiB; what was in it is gone. The
/// file is as long as the size says, and holes but for some blocks. It is not synced: a file system that a
/// power cut has undone was empty.
///
/// # Errors
/// [`Error::Size`], [`Error::Label`] and [`Error::Directory`] before anything is written; [`Error::Io`].
pub fn format(file: &File, size_bytes: u64, options: &Options<'_>) -> Result<(), Error> {
    check(options)?;
    let layout = Layout::new(size_bytes, options)?;
    // What is not written has to be zero.
    file.set_len(0)?;
    file.set_len(size_bytes)?;
    let write = |block: u32, bytes: &[u8]| file.write_all_at(bytes, u64::from(block) * u64::from(BLOCK));

    let mut head = superblock(&layout, options);
    head.extend(descriptors(&layout, options));
    head.resize(blocks_len(layout.flex_start(0)), 0);
    // The first group's block bitmap is the next block.
    head.extend(bitmap(layout.used_in(0), layout.blocks_in(0)));
    write(0, &head)?;
    for group in (1..layout.groups).filter(|group| layout.has_bitmap(*group)) {
        write(layout.block_bitmap(group), &bitmap(layout.used_in(group), layout.blocks_in(group)))?;
    }
    write(layout.inode_bitmap(0), &bitmap(layout.inodes_used(), layout.inodes_per_group))?;
    write(layout.inode_table(0), &inodes(&layout, options))?;
    let mut files = directories(options);
    files.extend(journal_superblock(&layout, options));
    write(layout.root, &files)?;
    Ok(())
}

/// Where everything is. The first group of each flex group holds the bitmaps and inode tables of all its
/// groups, behind superblock and descriptors in the very first; there, files follow.
#[derive(Debug)]
struct Layout {
    blocks: u32,
    groups: u32,
    inodes_per_group: u32,
    /// Blocks of one group's inode table.
    table: u32,
    /// Blocks of all descriptors.
    descriptors: u32,
    /// First block of the root directory; `lost+found` and the options' directories follow, a block each.
    root: u32,
    directories: u32,
    journal: u32,
    journal_blocks: u32,
}

impl Layout {
    fn new(size_bytes: u64, options: &Options<'_>) -> Result<Self, Error> {
        let refused = || Error::Size { size: size_bytes };
        if !(MIN_SIZE..=MAX_SIZE).contains(&size_bytes) {
            return Err(refused());
        }
        let mut blocks = u32::try_from(size_bytes / u64::from(BLOCK)).map_err(|_| refused())?;
        let inodes = blocks.min(BLOCKS_PER_GROUP) / (BYTES_PER_INODE / BLOCK);
        let table = inodes.div_ceil(INODES_PER_BLOCK);
        // A last group that could not even hold its own bitmaps and inodes is left out.
        let rest = blocks % BLOCKS_PER_GROUP;
        if blocks > BLOCKS_PER_GROUP && rest < table + 64 {
            blocks -= rest;
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let descriptors = groups.div_ceil(BLOCK / 32);
        let directories = u32::try_from(options.directories.len()).map_err(|_| refused())?;
        let mut layout = Layout {
            blocks,
            groups,
            inodes_per_group: table * INODES_PER_BLOCK,
            table,
            descriptors,
            root: 0,
            directories,
            journal: 0,
            journal_blocks: (blocks / 128).clamp(1024, 8192),
        };
        layout.root = layout.flex_start(0) + layout.flex_len(0);
        layout.journal = layout.root + 2 + directories;
        debug_assert!(layout.journal + layout.journal_blocks <= layout.blocks_in(0));
        Ok(layout)
    }

    /// Where the metadata of the flex group that begins with `group` begin.
    fn flex_start(&self, group: u32) -> u32 {
        group * BLOCKS_PER_GROUP + if group == 0 { 1 + self.descriptors } else { 0 }
    }

    /// How many groups the flex group that begins with `group` has.
    fn flex_groups(&self, group: u32) -> u32 {
        (self.groups - group).min(GROUPS_PER_FLEX)
    }

    /// How many blocks its metadata have.
    fn flex_len(&self, group: u32) -> u32 {
        self.flex_groups(group) * (2 + self.table)
    }

    /// Which group a group's metadata are in, and how many others' come before.
    fn flex_of(group: u32) -> (u32, u32) {
        (group - group % GROUPS_PER_FLEX, group % GROUPS_PER_FLEX)
    }

    fn block_bitmap(&self, group: u32) -> u32 {
        let (first, index) = Self::flex_of(group);
        self.flex_start(first) + index
    }

    fn inode_bitmap(&self, group: u32) -> u32 {
        let (first, index) = Self::flex_of(group);
        self.flex_start(first) + self.flex_groups(first) + index
    }

    fn inode_table(&self, group: u32) -> u32 {
        let (first, index) = Self::flex_of(group);
        self.flex_start(first) + 2 * self.flex_groups(first) + index * self.table
    }

    fn blocks_in(&self, group: u32) -> u32 {
        (self.blocks - group * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP)
    }

    /// Blocks in use in a group; they are its first.
    fn used_in(&self, group: u32) -> u32 {
        match Self::flex_of(group) {
            (0, 0) => self.journal + self.journal_blocks,
            (first, 0) => self.flex_len(first),
            _ => 0,
        }
    }

    /// Whether a group's block bitmap is written. e2fsck wants that of the last group, used or not.
    fn has_bitmap(&self, group: u32) -> bool {
        self.used_in(group) > 0 || group + 1 == self.groups
    }

    /// Inodes in use; they are the first of the first group.
    fn inodes_used(&self) -> u32 {
        FIRST_INODE + self.directories
    }

    fn free_blocks(&self) -> u32 {
        (0..self.groups).map(|group| self.blocks_in(group) - self.used_in(group)).sum()
    }

    /// What no file will ever have: all but the directories' blocks and the free ones.
    fn overhead(&self) -> u32 {
        self.blocks - self.free_blocks() - 2 - self.directories
    }
}

fn check(options: &Options<'_>) -> Result<(), Error> {
    if options.label.len() > 16 || options.label.contains('\0') {
        return Err(Error::Label { label: options.label.to_owned() });
    }
    // `.`, `..` and `lost+found` take 44 bytes of the root's block.
    let mut room = BLOCK_LEN - 44;
    for (i, name) in options.directories.iter().enumerate() {
        let bad = |why| Error::Directory { name: (*name).to_owned(), why };
        if name.is_empty() || name.len() > 255 || name.contains(['/', '\0']) {
            return Err(bad("a name has 1 to 255 bytes and neither / nor NUL"));
        }
        if [".", "..", "lost+found"].contains(name) || options.directories.iter().take(i).any(|n| n == name) {
            return Err(bad("the name is taken"));
        }
        room = room.checked_sub(entry_len(name)).ok_or_else(|| bad("the names do not fit in one block"))?;
        if i >= 64 {
            return Err(bad("there are more than 64"));
        }
    }
    Ok(())
}

/// Bytes of so many blocks.
fn blocks_len(blocks: u32) -> usize {
    usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(BLOCK_LEN)
}

/// A structure that is written field by field at the offsets the kernel's documentation gives. All offsets are
/// constants within the structure; a field outside it is a mistake that the tests' e2fsck would see.
struct Fields(Vec<u8>);

impl Fields {
    fn new(len: usize) -> Self {
        Fields(vec![0; len])
    }

    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        let place = self.0.get_mut(at..at.saturating_add(bytes.len()));
        debug_assert!(place.is_some());
        if let Some(place) = place {
            place.copy_from_slice(bytes);
        }
    }

    fn u8(&mut self, at: usize, value: u8) {
        self.bytes(at, &[value]);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn be32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_be_bytes());
    }
}

/// For counts that a group's size bounds: 32768 at most.
fn u16_of(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

fn seconds(options: &Options<'_>) -> u32 {
    let since = options.created.duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
}

/// The first block (super.rst): the superblock at its offset of 1024.
fn superblock(layout: &Layout, options: &Options<'_>) -> Vec<u8> {
    let now = seconds(options);
    let inodes = layout.groups * layout.inodes_per_group;
    let mut sb = Fields::new(1024);
    sb.u32(0x00, inodes);
    sb.u32(0x04, layout.blocks);
    sb.u32(0x0c, layout.free_blocks());
    sb.u32(0x10, inodes - layout.inodes_used());
    sb.u32(0x18, 2); // block size: 1024 << 2
    sb.u32(0x1c, 2);
    sb.u32(0x20, BLOCKS_PER_GROUP);
    sb.u32(0x24, BLOCKS_PER_GROUP);
    sb.u32(0x28, layout.inodes_per_group);
    sb.u32(0x30, now);
    sb.u16(0x36, u16::MAX); // no check after so many mounts
    sb.u16(0x38, 0xef53);
    sb.u16(0x3a, 1); // clean
    sb.u16(0x3c, 2); // read-only on errors
    sb.u32(0x40, now);
    sb.u32(0x4c, 1); // dynamic inode sizes
    sb.u32(0x54, FIRST_INODE);
    sb.u16(0x58, u16_of(INODE_SIZE));
    sb.u32(0x5c, HAS_JOURNAL | EXT_ATTR | DIR_INDEX | SPARSE_SUPER2);
    sb.u32(0x60, FILETYPE | EXTENTS | FLEX_BG | LARGE_DIR);
    sb.u32(0x64, LARGE_FILE | HUGE_FILE | GDT_CSUM | DIR_NLINK | EXTRA_ISIZE);
    sb.bytes(0x68, &options.uuid);
    sb.bytes(0x78, options.label.as_bytes());
    sb.u32(0xe0, JOURNAL_INODE);
    sb.bytes(0xec, &options.uuid); // seed of the directory hashes
    sb.u8(0xfc, 1); // half MD4
    sb.u8(0xfd, 1); // a copy of the journal's inode follows
    sb.u32(0x100, 0xc); // user xattrs and ACLs
    sb.u32(0x108, now);
    sb.bytes(0x10c, &extent(layout.journal, layout.journal_blocks));
    sb.u32(0x10c + 64, layout.journal_blocks * BLOCK);
    sb.u16(0x15c, 32);
    sb.u16(0x15e, 32);
    sb.u32(0x160, 1); // hashes of signed characters
    sb.u8(0x174, LOG_GROUPS_PER_FLEX);
    sb.bytes(0x200, b"no_prefetch_block_bitmaps");
    sb.u32(0x248, layout.overhead());
    let mut block = vec![0; 1024];
    block.append(&mut sb.0);
    block.resize(BLOCK_LEN, 0);
    block
}

/// All group descriptors (group_descr.rst).
fn descriptors(layout: &Layout, options: &Options<'_>) -> Vec<u8> {
    let mut all = Vec::with_capacity(blocks_len(layout.descriptors));
    let seed = crc16(u16::MAX, &options.uuid);
    for group in 0..layout.groups {
        let (inodes, dirs) = if group == 0 { (layout.inodes_used(), 2 + layout.directories) } else { (0, 0) };
        let mut flags = INODE_ZEROED;
        if inodes == 0 {
            flags |= INODE_UNINIT;
        }
        if !layout.has_bitmap(group) {
            flags |= BLOCK_UNINIT;
        }
        let mut desc = Fields::new(DESCRIPTOR_LEN);
        desc.u32(0x00, layout.block_bitmap(group));
        desc.u32(0x04, layout.inode_bitmap(group));
        desc.u32(0x08, layout.inode_table(group));
        desc.u16(0x0c, u16_of(layout.blocks_in(group) - layout.used_in(group)));
        desc.u16(0x0e, u16_of(layout.inodes_per_group - inodes));
        desc.u16(0x10, u16_of(dirs));
        desc.u16(0x12, flags);
        desc.u16(0x1c, u16_of(layout.inodes_per_group - inodes)); // never used, at the table's end
        // The checksum is the last field, and covers all before it.
        let before = desc.0.get(..0x1e).unwrap_or_default();
        let sum = crc16(crc16(seed, &group.to_le_bytes()), before);
        desc.u16(0x1e, sum);
        all.append(&mut desc.0);
    }
    all
}

/// A bitmap of which the first `used` of `valid` bits are set, and all behind (bitmaps.rst).
fn bitmap(used: u32, valid: u32) -> Vec<u8> {
    let byte = |i: u32| {
        (0..8).fold(0_u8, |byte, bit| {
            let at = i * 8 + bit;
            byte | (u8::from(at < used || at >= valid) << bit)
        })
    };
    (0..BLOCK).map(byte).collect()
}

/// `i_block` of a file in one piece (ifork.rst, extent tree).
fn extent(start: u32, blocks: u32) -> [u8; 60] {
    let mut tree = [0; 60];
    let header_and_extent = [
        0x0001_f30a_u32.to_le_bytes(),
        4_u32.to_le_bytes(),
        [0; 4],
        [0; 4],
        blocks.to_le_bytes(),
        start.to_le_bytes(),
    ];
    for (place, byte) in tree.iter_mut().zip(header_and_extent.into_iter().flatten()) {
        *place = byte;
    }
    tree
}

/// The used part of the first inode table, in whole blocks (inodes.rst).
fn inodes(layout: &Layout, options: &Options<'_>) -> Vec<u8> {
    let now = seconds(options);
    let mut table = Vec::new();
    for number in 1..=layout.inodes_used() {
        let (mode, links, start, blocks) = match number {
            ROOT_INODE => (0o040_755, u16_of(3 + layout.directories), layout.root, 1),
            JOURNAL_INODE => (0o100_600, 1, layout.journal, layout.journal_blocks),
            FIRST_INODE => (0o040_700, 2, layout.root + 1, 1),
            number if number > FIRST_INODE => (0o040_755, 2, layout.root + 1 + number - FIRST_INODE, 1),
            _ => (0, 0, 0, 0),
        };
        let mut inode = Fields::new(256);
        if links > 0 {
            inode.u16(0x00, mode);
            inode.u32(0x04, blocks * BLOCK);
            inode.u16(0x1a, links);
            inode.u32(0x1c, blocks * (BLOCK / 512));
            inode.u32(0x20, 0x8_0000); // its blocks are extents
            inode.bytes(0x28, &extent(start, blocks));
            inode.u16(0x80, 32);
            // The seconds are signed; the lowest bits of the extra fields carry on from 2038.
            let epoch = now >> 31;
            for (time, extra) in [(0x08, 0x8c), (0x0c, 0x84), (0x10, 0x88), (0x90, 0x94)] {
                inode.u32(time, now);
                inode.u32(extra, epoch);
            }
        }
        table.append(&mut inode.0);
    }
    let blocks = layout.inodes_used().div_ceil(INODES_PER_BLOCK);
    table.resize(blocks_len(blocks), 0);
    table
}

/// The length of a directory's entry: 8 bytes and the name, rounded up to 4.
fn entry_len(name: &str) -> usize {
    (8 + name.len()).next_multiple_of(4)
}

/// One block of a directory (directory.rst): the last entry reaches to its end.
fn directory(entries: &[(u32, &str)]) -> Vec<u8> {
    let mut block = Fields::new(BLOCK_LEN);
    let mut at = 0;
    for (i, (inode, name)) in entries.iter().enumerate() {
        let len = if i + 1 == entries.len() { BLOCK_LEN.saturating_sub(at) } else { entry_len(name) };
        block.u32(at, *inode);
        block.u16(at + 4, u16::try_from(len).unwrap_or(u16::MAX));
        block.u8(at + 6, u8::try_from(name.len()).unwrap_or(u8::MAX));
        block.u8(at + 7, 2); // a directory
        block.bytes(at + 8, name.as_bytes());
        at += len;
    }
    block.0
}

/// The blocks of all directories: the root, `lost+found`, the options'.
fn directories(options: &Options<'_>) -> Vec<u8> {
    let mut root = vec![(ROOT_INODE, "."), (ROOT_INODE, "..")];
    let names = std::iter::once(&"lost+found").chain(options.directories);
    root.extend((FIRST_INODE..).zip(names.copied()));
    let mut blocks = directory(&root);
    for (inode, _) in root.iter().skip(2) {
        blocks.extend(directory(&[(*inode, "."), (ROOT_INODE, "..")]));
    }
    blocks
}

/// The first block of an empty journal (journal.rst); its numbers are big-endian.
fn journal_superblock(layout: &Layout, options: &Options<'_>) -> Vec<u8> {
    let mut sb = Fields::new(BLOCK_LEN);
    sb.be32(0x00, 0xc03b_3998);
    sb.be32(0x04, 4); // a superblock of version 2
    sb.be32(0x0c, BLOCK);
    sb.be32(0x10, layout.journal_blocks);
    sb.be32(0x14, 1); // the log begins in the next block
    sb.be32(0x18, 1); // with this sequence number; it is empty
    sb.bytes(0x30, &options.uuid);
    sb.be32(0x40, 1); // one file system uses it
    sb.0
}

/// CRC-16 with the polynomial 0x8005, least significant bit first, as group descriptors have it.
fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8)
            .fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xa001 } else { crc >> 1 })
    })
}
