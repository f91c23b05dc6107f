//! Lays out directories and inodes behind the contents, and writes the superblock.
//!
//! Inodes come directory by directory, so that listing one and looking at its files reads neighbours. An
//! inode and its inline tail never cross a block; gaps at the ends of blocks are filled by the next small
//! inodes.
use std::{collections::HashMap, ops::Range, rc::Rc};

use super::{
    BLOCK,
    data::Disk,
    dir::{self, Name, Type},
    inode::{Data, Inode, device, fits_inline},
};
use crate::{
    Error,
    layer::{
        tar::Time,
        tree::{Body, Dir, Extent, Leaf, Node, Tree},
    },
};

/// Unit of inode numbers: an inode's number is its distance from the metadata's start in these.
const SLOT: usize = 32;
/// Blocks with room that are remembered.
const OPEN: usize = 16;
/// Superblock checksum, inode times (`EROFS_FEATURE_COMPAT_*`).
const COMPATIBLE: u32 = 0x1 | 0x2;
const SUPERBLOCK: usize = 1024;

/// An inode with what it is made from.
struct Record<'a> {
    inode: Inode<'a>,
    source: Source<'a>,
    /// Bytes from the metadata's start.
    offset: u64,
}

enum Source<'a> {
    Dir {
        dir: &'a Dir,
        parent: usize,
        names: Range<usize>,
    },
    /// In the disk's arena.
    Small(usize, usize),
    Link(&'a [u8]),
    /// On the disk already, or without content.
    Done,
}

/// A name in some directory: the record that it names, and its type.
type Entry<'a> = (&'a [u8], usize, Type);

impl Record<'_> {
    fn nid(&self) -> u64 {
        self.offset / SLOT as u64
    }
}

/// Writes everything but the contents of files, which are on `disk`, and closes it. Returns its bytes.
pub(crate) fn finish(tree: &Tree, mut disk: Disk, uuid: [u8; 16]) -> Result<u64, Error> {
    let (mut records, names) = gather(&tree.root);
    let time = commonest_time(&records);

    let mut block = disk.next_block()?;
    for at in 0..records.len() {
        let data = lay_out_data(&records, &names, at, &mut block)?;
        if let Some(record) = records.get_mut(at) {
            record.inode.data = data;
        }
    }
    let metadata_block = block;
    let mut placer = Placer::new();
    for record in &mut records {
        record.offset = placer.place(record.inode.record_size(time));
    }
    let blocks = u64::from(metadata_block) + placer.blocks;
    let blocks = u32::try_from(blocks).map_err(|_| too_large())?;

    for record in &records {
        write_blocks(record, &records, &names, &mut disk)?;
    }
    let mut order: Vec<(usize, &Record<'_>)> = records.iter().enumerate().collect();
    order.sort_unstable_by_key(|(_, record)| record.offset);
    let (mut written, mut bytes) = (0_u64, Vec::new());
    for (at, record) in order {
        disk.hole(record.offset - written)?;
        bytes.clear();
        let number = u32::try_from(at + 1).unwrap_or(u32::MAX);
        record.inode.encode(time, number, &mut bytes);
        if let Data::Inline { tail, .. } = record.inode.data {
            match &record.source {
                Source::Dir { .. } => {
                    let whole = encode_dir(record, &records, &names);
                    bytes.extend_from_slice(whole.get(whole.len() - tail..).unwrap_or_default());
                }
                Source::Small(offset, length) => bytes.extend_from_slice(disk.small(*offset, *length)),
                Source::Link(target) => bytes.extend_from_slice(target),
                Source::Done => {}
            }
        }
        disk.append(&bytes)?;
        written = record.offset + bytes.len() as u64;
    }
    let root = records.first().map_or(0, Record::nid);
    disk.close(&superblock(uuid, root, records.len() as u64, blocks, metadata_block, time))
}

/// All inodes, the root first, and all names; a directory has a range of them.
fn gather(root: &Dir) -> (Vec<Record<'_>>, Vec<Entry<'_>>) {
    let mut records = vec![dir_record(root, 0)];
    let mut names = Vec::new();
    let mut shared: HashMap<*const Leaf, usize> = HashMap::new();
    let mut todo = vec![0];
    while let Some(at) = todo.pop() {
        let Some(Record { source: Source::Dir { dir, .. }, .. }) = records.get(at) else { continue };
        let (dir, start, first) = (*dir, names.len(), todo.len());
        for (name, node) in &dir.children {
            let next = records.len();
            let (index, kind) = match node {
                Node::Dir(child) => {
                    records.push(dir_record(child, at));
                    todo.push(next);
                    (next, Type::Dir)
                }
                Node::Leaf { leaf, .. } => {
                    let links = Rc::strong_count(leaf);
                    let index =
                        if links > 1 { *shared.entry(Rc::as_ptr(leaf)).or_insert(next) } else { next };
                    if index == next {
                        records.push(leaf_record(leaf, links));
                    }
                    (index, kind(&leaf.body))
                }
            };
            names.push((&**name, index, kind));
        }
        // Depth first, in the order of names.
        if let Some(subdirs) = todo.get_mut(first..) {
            subdirs.reverse();
        }
        if let Some(Record { source: Source::Dir { names: range, .. }, .. }) = records.get_mut(at) {
            *range = start..names.len();
        }
    }
    (records, names)
}

fn dir_record(dir: &Dir, parent: usize) -> Record<'_> {
    let subdirs = dir.children.values().filter(|node| matches!(node, Node::Dir(_))).count();
    let inode = Inode {
        meta: &dir.meta,
        mode: 0o040_000 | dir.meta.mode,
        links: u32::try_from(subdirs + 2).unwrap_or(u32::MAX),
        data: Data::None,
    };
    Record { inode, source: Source::Dir { dir, parent, names: 0..0 }, offset: 0 }
}

fn leaf_record(leaf: &Leaf, links: usize) -> Record<'_> {
    let (format, data, source) = match &leaf.body {
        Body::File(Extent::Inline(_, 0)) => (0o100_000, Data::Plain { block: 0, size: 0 }, Source::Done),
        Body::File(Extent::Inline(offset, length)) => {
            let data = Data::Inline { block: 0, size: *length as u64, tail: *length };
            (0o100_000, data, Source::Small(*offset, *length))
        }
        Body::File(Extent::Blocks(block, size)) => {
            (0o100_000, Data::Plain { block: *block, size: *size }, Source::Done)
        }
        Body::Symlink(target) => (0o120_000, Data::None, Source::Link(target)),
        Body::Char(major, minor) => (0o020_000, Data::Device(device(*major, *minor)), Source::Done),
        Body::Block(major, minor) => (0o060_000, Data::Device(device(*major, *minor)), Source::Done),
        Body::Fifo => (0o010_000, Data::None, Source::Done),
    };
    let links = u32::try_from(links).unwrap_or(u32::MAX);
    Record {
        inode: Inode { meta: &leaf.meta, mode: format | leaf.meta.mode, links, data },
        source,
        offset: 0,
    }
}

fn kind(body: &Body) -> Type {
    match body {
        Body::File(_) => Type::File,
        Body::Symlink(_) => Type::Symlink,
        Body::Char(..) => Type::Char,
        Body::Block(..) => Type::Block,
        Body::Fifo => Type::Fifo,
    }
}

/// Compact inodes share one time: the one that most inodes have, the earliest of several.
fn commonest_time(records: &[Record<'_>]) -> Time {
    let mut counts: HashMap<Time, usize> = HashMap::new();
    for record in records {
        *counts.entry(record.inode.meta.mtime).or_default() += 1;
    }
    counts.into_iter().max_by_key(|&(time, count)| (count, std::cmp::Reverse(time))).unwrap_or_default().0
}

/// Where the content of a directory or link goes; files have theirs already.
fn lay_out_data(
    records: &[Record<'_>],
    names: &[Entry<'_>],
    at: usize,
    next: &mut u32,
) -> Result<Data, Error> {
    let Some(record) = records.get(at) else { return Ok(Data::None) };
    let (full, tail) = match &record.source {
        Source::Small(..) | Source::Done => return Ok(record.inode.data),
        Source::Link(target) => (0, target.len()),
        Source::Dir { .. } => dir::measure(dir_names(record, records, names).iter().map(|name| name.name)),
    };
    let size = full * BLOCK as u64 + tail as u64;
    let block = *next;
    let inline = fits_inline(tail, record.inode.meta);
    let used = if inline { full } else { full + 1 };
    *next = u32::try_from(u64::from(block) + used).map_err(|_| too_large())?;
    Ok(if inline { Data::Inline { block, size, tail } } else { Data::Plain { block, size } })
}

/// A directory's names with `.` and `..`, sorted.
fn dir_names<'a>(record: &Record<'a>, records: &[Record<'_>], names: &[Entry<'a>]) -> Vec<Name<'a>> {
    let Source::Dir { parent, names: range, .. } = &record.source else { return Vec::new() };
    let nid = |index: usize| records.get(index).map_or(0, Record::nid);
    let children = names.get(range.clone()).unwrap_or_default();
    let mut all = Vec::with_capacity(children.len() + 2);
    all.push(Name { name: b".", nid: record.nid(), kind: Type::Dir });
    all.push(Name { name: b"..", nid: nid(*parent), kind: Type::Dir });
    all.extend(children.iter().map(|&(name, index, kind)| Name { name, nid: nid(index), kind }));
    all.sort_by_key(|name| name.name);
    all
}

fn encode_dir(record: &Record<'_>, records: &[Record<'_>], names: &[Entry<'_>]) -> Vec<u8> {
    dir::encode(&dir_names(record, records, names))
}

/// Writes what a directory or link has in blocks of its own, in the order in which they were laid out.
fn write_blocks(
    record: &Record<'_>,
    records: &[Record<'_>],
    names: &[Entry<'_>],
    disk: &mut Disk,
) -> Result<(), Error> {
    let size = match (&record.source, record.inode.data) {
        (Source::Dir { .. } | Source::Link(_), Data::Plain { size, .. }) => size,
        (Source::Dir { .. }, Data::Inline { size, tail, .. }) => size - tail as u64,
        _ => return Ok(()),
    };
    if size == 0 {
        return Ok(());
    }
    let encoded;
    let bytes = match &record.source {
        Source::Link(target) => *target,
        _ => {
            encoded = encode_dir(record, records, names);
            encoded.as_slice()
        }
    };
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    disk.append(bytes.get(..size).unwrap_or_default())?;
    disk.align()
}

/// Finds places for inodes, in bytes from the metadata's start.
struct Placer {
    /// Blocks begun, with the bytes used in each.
    open: Vec<(u64, usize)>,
    blocks: u64,
}

impl Placer {
    /// The first slot stays empty: user space takes inode number 0 for a deleted name.
    fn new() -> Self {
        Self { open: vec![(0, SLOT)], blocks: 1 }
    }

    fn place(&mut self, size: usize) -> u64 {
        if size > BLOCK {
            let start = self.blocks;
            self.blocks += size.div_ceil(BLOCK) as u64;
            return start * BLOCK as u64;
        }
        let room = self.open.iter_mut().find(|(_, used)| *used + size <= BLOCK);
        let (block, used) = match room {
            Some(open) => open,
            None => {
                if self.open.len() == OPEN {
                    let fullest = self.open.iter().enumerate().max_by_key(|(_, (_, used))| *used);
                    if let Some((at, _)) = fullest {
                        self.open.remove(at);
                    }
                }
                self.open.push((self.blocks, 0));
                self.blocks += 1;
                // Just pushed.
                let Some(last) = self.open.last_mut() else { return 0 };
                last
            }
        };
        let place = *block * BLOCK as u64 + *used as u64;
        *used = (*used + size).next_multiple_of(SLOT);
        place
    }
}

fn superblock(
    uuid: [u8; 16],
    root: u64,
    inodes: u64,
    blocks: u32,
    metadata_block: u32,
    time: Time,
) -> Vec<u8> {
    let mut out = vec![0; SUPERBLOCK];
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    put(&0xe0f5_e1e2_u32.to_le_bytes());
    put(&[0; 4]); // the checksum, below
    put(&COMPATIBLE.to_le_bytes());
    put(&[12, 0]); // log2 of the block size; no extension slots
    put(&u16::try_from(root).unwrap_or(u16::MAX).to_le_bytes());
    put(&inodes.to_le_bytes());
    put(&time.seconds.to_le_bytes());
    put(&time.nanos.to_le_bytes());
    put(&blocks.to_le_bytes());
    put(&metadata_block.to_le_bytes());
    put(&[0; 4]); // no shared extended attributes
    put(&uuid);
    out.resize(BLOCK, 0);
    let checksum = crc32c(out.get(SUPERBLOCK..).unwrap_or_default());
    if let Some(field) = out.get_mut(SUPERBLOCK + 4..SUPERBLOCK + 8) {
        field.copy_from_slice(&checksum.to_le_bytes());
    }
    out
}

/// CRC-32C without the final inversion, as the kernel checks it; for one block, so bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
        }
    }
    crc
}

fn too_large() -> Error {
    Error::Limit {
        what: "the disk".to_owned(),
        limit: u64::from(u32::MAX) * BLOCK as u64,
        option: "max_unpacked",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnoli() {
        // RFC 3720 appendix B.4 has the inverted value of "123456789".
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn no_record_crosses_a_block_or_another() {
        let mut placer = Placer::new();
        let mut taken = vec![(0_u64, 32_u64)];
        for n in 0..2000_usize {
            let size = 32 + (n * 7919) % (if n % 50 == 0 { 9000 } else { 4064 });
            let at = placer.place(size);
            let block = BLOCK as u64;
            assert_eq!(at % 32, 0);
            if size <= BLOCK {
                assert_eq!(at / block, (at + size as u64 - 1) / block);
            }
            taken.push((at, at + size as u64));
        }
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(taken.last().unwrap().1 <= placer.blocks * BLOCK as u64);
    }
}
