//! Directory blocks: twelve bytes an entry (inode, where its name starts, type), then the names. All names,
//! `.` and `..` among them, rise bytewise over all blocks, because the kernel searches by halves.
use super::BLOCK;

/// Bytes of an entry without its name.
const ENTRY: usize = 12;

/// File types as directory entries have them (Linux: include/linux/fs_types.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Type {
    File = 1,
    Dir = 2,
    Char = 3,
    Block = 4,
    Fifo = 5,
    Symlink = 7,
}

/// A name in a directory. Inodes are numbered later than names are laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) kind: Type,
}

/// The size of a directory with these names: whole blocks, and bytes used of the last.
pub(super) fn measure<'a>(names: impl Iterator<Item = &'a [u8]>) -> (u64, usize) {
    let (mut full, mut used) = (0, 0);
    for name in names {
        let need = ENTRY + name.len();
        if used + need > BLOCK {
            full += 1;
            used = 0;
        }
        used += need;
    }
    (full, used)
}

/// The bytes of a directory, as long as [`measure`] says: whole blocks, then the last one's used part.
pub(super) fn encode(names: &[Name<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = names;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |name: &&Name<'_>| {
            used += ENTRY + name.name.len();
            used <= BLOCK
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (block, next) = rest.split_at(count);
        let start = out.len();
        let mut offset = count * ENTRY;
        for name in block {
            out.extend_from_slice(&name.nid.to_le_bytes());
            // At most a block.
            out.extend_from_slice(&u16::try_from(offset).unwrap_or(u16::MAX).to_le_bytes());
            out.extend_from_slice(&[name.kind as u8, 0]);
            offset += name.name.len();
        }
        for name in block {
            out.extend_from_slice(name.name);
        }
        if !next.is_empty() {
            out.resize(start + BLOCK, 0);
        }
        rest = next;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measure_says_what_encode_writes() {
        for count in [2_usize, 3, 17, 18, 300, 3000] {
            let names: Vec<Vec<u8>> =
                (0..count).map(|n| format!("{n:0width$}", width = 4 + n % 200).into_bytes()).collect();
            let entries: Vec<_> = names.iter().map(|name| Name { name, nid: 1, kind: Type::File }).collect();
            let (full, used) = measure(names.iter().map(Vec::as_slice));
            assert_eq!(encode(&entries).len(), usize::try_from(full).unwrap() * BLOCK + used);
        }
    }

    #[test]
    fn an_entry_points_at_its_name() {
        let names = [
            Name { name: b".", nid: 36, kind: Type::Dir },
            Name { name: b"..", nid: 36, kind: Type::Dir },
            Name { name: b"a", nid: 0x0102, kind: Type::Symlink },
        ];
        let bytes = encode(&names);
        assert_eq!(bytes.len(), 36 + 4);
        assert_eq!(bytes[24..36], [2, 1, 0, 0, 0, 0, 0, 0, 39, 0, 7, 0]);
        assert_eq!(&bytes[36..], b"...a");
    }
}
