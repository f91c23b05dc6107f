//! Reads EROFS from its on-disk format alone (Linux: fs/erofs/erofs_fs.h), and insists on what the kernel
//! relies on: sorted names, inline data inside one block, everything inside the file.
use std::{collections::BTreeMap, fs, path::Path};

use super::files::{Files, Node, group};

pub struct Erofs {
    bytes: Vec<u8>,
    metadata: usize,
    root: u64,
    time: (i64, u32),
    pub inodes: u64,
    pub blocks: u32,
}

struct Inode {
    node: Node,
    size: u64,
    layout: u16,
    block: u64,
    /// Where inline data begins.
    tail: usize,
}

const BLOCK: usize = 4096;

impl Erofs {
    pub fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let mut image = Self { bytes, metadata: 0, root: 0, time: (0, 0), inodes: 0, blocks: 0 };
        assert_eq!(image.u32(1024), 0xe0f5_e1e2);
        assert_eq!(image.u32(1024 + 80), 0, "no incompatible feature");
        assert_eq!(image.bytes[1024 + 12], 12);
        image.root = u64::from(image.u16(1024 + 14));
        image.inodes = image.u64(1024 + 16);
        image.time = (image.u64(1024 + 24) as i64, image.u32(1024 + 32));
        image.blocks = image.u32(1024 + 36);
        image.metadata = image.u32(1024 + 40) as usize * BLOCK;
        assert_eq!(image.blocks as usize * BLOCK, image.bytes.len());
        image
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn inode(&self, nid: u64) -> Inode {
        let at = self.metadata + nid as usize * 32;
        let format = self.u16(at);
        let mode = u32::from(self.u16(at + 4));
        let (size, uid, gid, mtime, links, head);
        if format & 1 == 0 {
            (size, head) = (u64::from(self.u32(at + 8)), 32);
            links = u64::from(self.u16(at + 6));
            (uid, gid) = (u32::from(self.u16(at + 24)), u32::from(self.u16(at + 26)));
            mtime = self.time;
        } else {
            (size, head) = (self.u64(at + 8), 64);
            (uid, gid) = (self.u32(at + 24), self.u32(at + 28));
            mtime = (self.u64(at + 32) as i64, self.u32(at + 40));
            links = u64::from(self.u32(at + 44));
        }
        assert!(at % BLOCK + head <= BLOCK, "an inode crosses a block");
        let word = self.u32(at + 16);
        let count = usize::from(self.u16(at + 2));
        let xattr_size = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let is_device = matches!(mode & 0o170_000, 0o020_000 | 0o060_000);
        let device =
            if is_device { ((word >> 8) & 0xfff, (word & 0xff) | ((word >> 12) & !0xff)) } else { (0, 0) };
        let node = Node {
            mode,
            uid,
            gid,
            mtime,
            xattrs: self.xattrs(at + head, xattr_size),
            device,
            content: Vec::new(),
            links,
            same_as: Vec::new(),
        };
        let layout = format >> 1;
        assert!(layout == 0 || layout == 2);
        Inode { node, size, layout, block: u64::from(word), tail: at + head + xattr_size }
    }

    fn xattrs(&self, start: usize, size: usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut all = BTreeMap::new();
        if size == 0 {
            return all;
        }
        assert!(size > 12 && self.bytes[start + 4] == 0);
        let mut at = start + 12;
        while at < start + size {
            let (length, index, value) =
                (usize::from(self.bytes[at]), self.bytes[at + 1], usize::from(self.u16(at + 2)));
            let prefix = [
                "",
                "user.",
                "system.posix_acl_access",
                "system.posix_acl_default",
                "trusted.",
                "",
                "security.",
            ];
            let name = [prefix[usize::from(index)].as_bytes(), &self.bytes[at + 4..at + 4 + length]].concat();
            let from = at + 4 + length;
            assert!(all.insert(name, self.bytes[from..from + value].to_vec()).is_none());
            at = (from + value).next_multiple_of(4);
        }
        assert_eq!(at, start + size);
        all
    }

    fn data(&self, inode: &Inode) -> Vec<u8> {
        let size = inode.size as usize;
        let blocks = size.div_ceil(BLOCK);
        let plain = if inode.layout == 2 { blocks.saturating_sub(1) * BLOCK } else { size };
        let start = inode.block as usize * BLOCK;
        let mut data = if plain > 0 { self.bytes[start..start + plain].to_vec() } else { Vec::new() };
        if plain < size {
            let length = size - plain;
            assert!(inode.tail % BLOCK + length <= BLOCK, "inline data crosses a block");
            data.extend_from_slice(&self.bytes[inode.tail..inode.tail + length]);
        }
        data
    }

    /// Names, inode numbers and types of a directory.
    fn names(data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut all: Vec<(Vec<u8>, u64, u8)> = Vec::new();
        for block in data.chunks(BLOCK) {
            let offset = |at: usize| {
                usize::from(u16::from_le_bytes(block[at * 12 + 8..at * 12 + 10].try_into().unwrap()))
            };
            let count = offset(0) / 12;
            assert!(count > 0 && offset(0) % 12 == 0);
            for at in 0..count {
                let end = if at + 1 < count { offset(at + 1) } else { block.len() };
                let name = block[offset(at)..end].split(|&byte| byte == 0).next().unwrap().to_vec();
                assert!(!name.is_empty() && name.len() <= 255);
                assert!(all.last().is_none_or(|(last, ..)| *last < name), "names are not sorted");
                let nid = u64::from_le_bytes(block[at * 12..at * 12 + 8].try_into().unwrap());
                all.push((name, nid, block[at * 12 + 10]));
            }
        }
        all
    }

    /// Everything in it.
    pub fn read(&self) -> Files {
        let (mut files, mut inodes) = (Files::new(), BTreeMap::new());
        self.walk(self.root, self.root, b"", &mut files, &mut inodes);
        group(&mut files, &inodes);
        let distinct: std::collections::BTreeSet<_> = inodes.values().collect();
        assert_eq!(distinct.len() as u64, self.inodes);
        for (path, node) in &files {
            let names = files.values().filter(|other| other.same_as == node.same_as).count();
            assert!(
                node.links == 0 || node.links == names as u64,
                "links of {}",
                String::from_utf8_lossy(path)
            );
        }
        files
    }

    fn walk(&self, nid: u64, parent: u64, at: &[u8], files: &mut Files, inodes: &mut BTreeMap<Vec<u8>, u64>) {
        let mut inode = self.inode(nid);
        let data = self.data(&inode);
        let path = if at.is_empty() { b"/".to_vec() } else { at.to_vec() };
        inodes.insert(path.clone(), nid);
        if inode.node.mode & 0o170_000 != 0o040_000 {
            inode.node.content = data;
            files.insert(path, inode.node);
            return;
        }
        let names = Self::names(&data);
        let mut subdirs = 0;
        for (name, child, kind) in &names {
            let mode = self.inode(*child).node.mode >> 12;
            let expected = [0, 5, 3, 0, 2, 0, 4, 0, 1, 0, 7, 0, 6][mode as usize];
            assert_eq!(*kind, expected, "the type of {}", String::from_utf8_lossy(name));
            subdirs += u64::from(*kind == 2);
            match name.as_slice() {
                b"." => assert_eq!(*child, nid),
                b".." => assert_eq!(*child, parent),
                _ => self.walk(*child, nid, &[at, b"/", name].concat(), files, inodes),
            }
        }
        assert_eq!(inode.node.links, subdirs, "links of {}", String::from_utf8_lossy(&path));
        inode.node.links = 0;
        files.insert(path, inode.node);
    }
}
