//! Inodes: 32 bytes where the owner is small and the time is the image's own (compact), 64 otherwise
//! (extended); then extended attributes; then, for small contents, the content.
use super::BLOCK;
use crate::layer::{tar::Time, tree::Meta};

const COMPACT: usize = 32;
const EXTENDED: usize = 64;
/// Bytes before an inode's extended attributes.
const XATTR_HEADER: usize = 12;
const XATTR_ENTRY: usize = 4;

/// Prefixes that have a number of their own; only names below one of them can be stored.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Whether an inode can carry an extended attribute of this name.
pub(crate) fn holds_xattr(name: &[u8]) -> bool {
    split_xattr(name).is_some()
}

/// Whether an inode can carry all of these: values have 16 bits for their length, all of them together 16
/// bits for their number of words.
pub(crate) fn holds_xattrs(meta: &Meta) -> bool {
    let fits = |value: &Vec<u8>| u16::try_from(value.len()).is_ok();
    meta.xattrs.values().all(fits) && u16::try_from(xattr_size(meta) / 4).is_ok()
}

/// Whether Linux can encode the device number (`new_encode_dev`).
pub(crate) fn holds_device(major: u32, minor: u32) -> bool {
    major < 1 << 12 && minor < 1 << 20
}

pub(super) fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, index)| {
        let rest = name.strip_prefix(*prefix)?;
        let whole = matches!(index, 2 | 3);
        (rest.is_empty() == whole && rest.len() <= 255).then_some((*index, rest))
    })
}

/// Whether content of `size` bytes has room in one block with its inode, whichever form that takes.
pub(super) fn fits_inline(size: usize, meta: &Meta) -> bool {
    EXTENDED + xattr_size(meta) + size <= BLOCK
}

/// Bytes of the extended attributes, header included; 0 without any.
pub(super) fn xattr_size(meta: &Meta) -> usize {
    let entries = meta.xattrs.iter().map(|(name, value)| {
        let name = split_xattr(name).map_or(0, |(_, rest)| rest.len());
        (XATTR_ENTRY + name + value.len()).next_multiple_of(4)
    });
    let total = entries.sum::<usize>();
    if total == 0 { 0 } else { XATTR_HEADER + total }
}

/// What an inode says about its content.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data {
    /// Nothing: a pipe, a socket.
    None,
    Device(u32),
    /// Whole blocks from this one on; the last may be partly used.
    Plain {
        block: u32,
        size: u64,
    },
    /// Whole blocks from this one on, and the last bytes behind the inode.
    Inline {
        block: u32,
        size: u64,
        tail: usize,
    },
}

/// An inode, ready but for its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inode<'a> {
    pub(super) meta: &'a Meta,
    /// Type and permissions (`st_mode`).
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) data: Data,
}

impl Inode<'_> {
    fn size(&self) -> u64 {
        match self.data {
            Data::None | Data::Device(_) => 0,
            Data::Plain { size, .. } | Data::Inline { size, .. } => size,
        }
    }

    /// The compact form has 16 bits for owners and links, 32 for the size, and no time.
    fn compact(&self, time: Time) -> Option<(u16, u16, u16, u32)> {
        if self.meta.mtime != time {
            return None;
        }
        let uid = u16::try_from(self.meta.uid).ok()?;
        let gid = u16::try_from(self.meta.gid).ok()?;
        Some((uid, gid, u16::try_from(self.links).ok()?, u32::try_from(self.size()).ok()?))
    }

    /// Bytes from the inode's start to the end of its inline content.
    pub(super) fn record_size(&self, time: Time) -> usize {
        let head = if self.compact(time).is_some() { COMPACT } else { EXTENDED };
        let tail = if let Data::Inline { tail, .. } = self.data { tail } else { 0 };
        head + xattr_size(self.meta) + tail
    }

    /// Appends inode and extended attributes; the inline content follows them. `time` is what compact
    /// inodes inherit, `number` what 32-bit `stat` shows.
    pub(super) fn encode(&self, time: Time, number: u32, out: &mut Vec<u8>) {
        let (layout, word) = match self.data {
            Data::None => (0, 0),
            Data::Device(device) => (0, device),
            Data::Plain { block, .. } => (0, block),
            Data::Inline { block, .. } => (2, block),
        };
        let xattrs = xattr_size(self.meta);
        let count = if xattrs == 0 { 0 } else { (xattrs - XATTR_HEADER) / 4 + 1 };
        // `holds_xattrs` was asked before.
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let compact = self.compact(time);
        let format: u16 = (layout << 1) | u16::from(compact.is_none());
        let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
        put(&format.to_le_bytes());
        put(&count.to_le_bytes());
        put(&self.mode.to_le_bytes());
        if let Some((uid, gid, links, size)) = compact {
            put(&links.to_le_bytes());
            put(&size.to_le_bytes());
            put(&[0; 4]);
            put(&word.to_le_bytes());
            put(&number.to_le_bytes());
            put(&uid.to_le_bytes());
            put(&gid.to_le_bytes());
            put(&[0; 4]);
        } else {
            put(&[0; 2]);
            put(&self.size().to_le_bytes());
            put(&word.to_le_bytes());
            put(&number.to_le_bytes());
            put(&self.meta.uid.to_le_bytes());
            put(&self.meta.gid.to_le_bytes());
            put(&self.meta.mtime.seconds.to_le_bytes());
            put(&self.meta.mtime.nanos.to_le_bytes());
            put(&self.links.to_le_bytes());
            put(&[0; 16]);
        }
        if xattrs == 0 {
            return;
        }
        out.extend_from_slice(&[0; XATTR_HEADER]);
        for (name, value) in &self.meta.xattrs {
            let Some((index, name)) = split_xattr(name) else { continue };
            out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
            out.push(index);
            out.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
            out.extend_from_slice(name);
            out.extend_from_slice(value);
            out.resize(out.len().next_multiple_of(4), 0);
        }
    }
}
