//! One entry's header in a tar archive: ustar, and a PAX header before it for what does not fit or is more exact
//! (POSIX.1-2017, pax § pax Interchange Format).

use cubby_protocol::message::FileTime;

use super::{Metadata, metadata};

/// What everything in an archive is a multiple of, in bytes.
pub(super) const BLOCK: usize = 512;

/// Lengths of the fields for names and for what links say.
const NAME: usize = 100;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    File,
    Symlink,
    Directory,
}

impl Type {
    fn flag(self) -> u8 {
        match self {
            Self::File => b'0',
            Self::Symlink => b'2',
            Self::Directory => b'5',
        }
    }
}

/// The blocks before an entry's bytes. Set-user-id, set-group-id and sticky are left out: nothing that comes from a guest
/// runs as somebody else.
pub(super) fn encode(kind: Type, name: &[u8], found: &Metadata, link: &[u8]) -> Vec<u8> {
    let mut name = name.to_vec();
    if kind == Type::Directory {
        name.push(b'/');
    }
    let size = if kind == Type::File { found.size } else { 0 };
    let modified = metadata::to_guest(found.modified);
    let mut records = Vec::new();
    if name.len() > NAME {
        record(&mut records, "path", &name);
    }
    if link.len() > NAME {
        record(&mut records, "linkpath", link);
    }
    let numbers = [("size", size, 11), ("uid", u64::from(found.uid), 7), ("gid", u64::from(found.gid), 7)];
    for (key, value, digits) in numbers {
        if octal(value, digits).is_none() {
            record(&mut records, key, value.to_string().as_bytes());
        }
    }
    let seconds = u64::try_from(modified.seconds).ok().filter(|seconds| octal(*seconds, 11).is_some());
    if seconds.is_none() || modified.nanoseconds > 0 {
        record(&mut records, "mtime", time(modified).as_bytes());
    }
    let mut blocks = Vec::new();
    if !records.is_empty() {
        block(&mut blocks, b'x', b"././@PaxHeader", 0o644, (0, 0), records.len() as u64, 0, &[]);
        blocks.append(&mut records);
        blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
    }
    let mode = u64::from(found.mode & 0o777);
    let owner = (found.uid.into(), found.gid.into());
    block(&mut blocks, kind.flag(), &name, mode, owner, size, seconds.unwrap_or_default(), link);
    blocks
}

/// One header block. What does not fit is cut or left empty; then a record says it.
#[expect(clippy::too_many_arguments, reason = "a block has that many fields")]
fn block(
    blocks: &mut Vec<u8>,
    flag: u8,
    name: &[u8],
    mode: u64,
    (uid, gid): (u64, u64),
    size: u64,
    seconds: u64,
    link: &[u8],
) {
    let start = blocks.len();
    let mut field = |bytes: &[u8], length: usize| {
        let end = blocks.len() + length;
        blocks.extend_from_slice(bytes.get(..length).unwrap_or(bytes));
        blocks.resize(end, 0);
    };
    let number = |value, digits| octal(value, digits).unwrap_or_else(|| "0".repeat(digits)).into_bytes();
    field(name, NAME);
    field(&number(mode, 7), 8);
    field(&number(uid, 7), 8);
    field(&number(gid, 7), 8);
    field(&number(size, 11), 12);
    field(&number(seconds, 11), 12);
    // The checksum counts its own field as spaces.
    field(b"        ", 8);
    field(&[flag], 1);
    field(link, NAME);
    field(b"ustar\x0000", 8);
    field(&[], BLOCK - 265);
    let sum = blocks.iter().skip(start).map(|byte| u64::from(*byte)).sum();
    if let Some(checksum) = blocks.get_mut(start + 148..start + 155) {
        checksum.copy_from_slice(&[number(sum, 6).as_slice(), &[0]].concat());
    }
}

/// A number in so many octal digits, if it fits.
fn octal(value: u64, digits: usize) -> Option<String> {
    Some(format!("{value:0digits$o}")).filter(|text| text.len() == digits)
}

/// Adds a record, `LENGTH KEY=VALUE\n`, whose length counts its own digits.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// A time as decimal seconds, before the epoch with a sign before all of it.
fn time(FileTime { seconds, nanoseconds }: FileTime) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        _ => {
            format!("-{}.{:09}", (seconds + 1).unsigned_abs(), 1_000_000_000_u32.saturating_sub(nanoseconds))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubby_image::tar::{Archive, Kind};
    use cubby_protocol::message::FileMetadata;

    fn found(mode: u32, size: u64, uid: u32, modified: FileTime) -> Metadata {
        let (accessed, changed) = (FileTime::default(), FileTime::default());
        FileMetadata {
            mode,
            size,
            allocated: 0,
            uid,
            gid: 7,
            links: 1,
            inode: 1,
            accessed,
            modified,
            changed,
        }
        .into()
    }

    #[test]
    fn what_is_written_is_read_as_it_was() {
        let time = |seconds, nanoseconds| FileTime { seconds, nanoseconds };
        let (short, long) = (b"dir/\xff\nfile".to_vec(), [b'n'; 3000].to_vec());
        let target = [b't'; 101].to_vec();
        for (kind, name, found, link) in [
            (Type::File, &short, found(0o106_751, 3, 1000, time(1 << 30, 0)), &[][..]),
            (Type::File, &long, found(0o100_644, 9 << 30, u32::MAX, time(1, 5)), &[]),
            (Type::Directory, &[b'd'; 100].to_vec(), found(0o040_755, 4096, 0, time(-1, 999_999_999)), &[]),
            (Type::Symlink, &short, found(0o120_777, 101, 0, time(-7, 0)), &target),
            (Type::Symlink, &[b'l'; 100].to_vec(), found(0o120_777, 1, 0, time(1 << 34, 1)), b"x"),
        ] {
            let blocks = encode(kind, name, &found, link);
            assert_eq!(blocks.len() % BLOCK, 0);
            let entry = Archive::new(&blocks[..], 1 << 20).next_entry().unwrap().expect("an entry");
            let (expected, slash) = match kind {
                Type::File => (Kind::File, &b""[..]),
                Type::Symlink => (Kind::Symlink, &b""[..]),
                Type::Directory => (Kind::Dir, &b"/"[..]),
            };
            assert_eq!((entry.kind, entry.path), (expected, [name, slash].concat()));
            assert_eq!(entry.link, link);
            assert_eq!(u32::from(entry.mode), found.mode & 0o777);
            assert_eq!((entry.uid, entry.gid), (found.uid, found.gid));
            assert_eq!(entry.size, if kind == Type::File { found.size } else { 0 });
            let modified = metadata::to_guest(found.modified);
            assert_eq!((entry.mtime.seconds, entry.mtime.nanos), (modified.seconds, modified.nanoseconds));
        }
    }

    #[test]
    fn a_record_counts_its_own_length() {
        for size in [0, 1, 90, 91, 92, 93, 990, 991, 992, 993, 994] {
            let mut records = Vec::new();
            record(&mut records, "path", &vec![b'x'; size]);
            let text = String::from_utf8(records).unwrap();
            assert_eq!(text.split_once(' ').unwrap().0, text.len().to_string());
        }
    }
}
