//! File systems as values that can be compared.
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::FileTypeExt, fs::MetadataExt},
    path::Path,
};

/// All that is compared of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// As in `st_mode`, with the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub device: (u32, u32),
    /// Content of a file, target of a link.
    pub content: Vec<u8>,
    /// Links; 0 for directories, whose count has no one meaning.
    pub links: u64,
    /// The first path of the same file.
    pub same_as: Vec<u8>,
}

/// By path: `/`, `/a`, `/a/b`.
pub type Files = BTreeMap<Vec<u8>, Node>;

/// Sets `same_as` from inode numbers.
pub fn group(files: &mut Files, inodes: &BTreeMap<Vec<u8>, u64>) {
    let mut first: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for (path, inode) in inodes {
        first.entry(*inode).or_insert_with(|| path.clone());
    }
    for (path, node) in files {
        node.same_as = first[&inodes[path]].clone();
    }
}

/// Reads a directory of this machine as the root of a file system.
pub fn read(root: &Path) -> Files {
    let (mut files, mut inodes) = (Files::new(), BTreeMap::new());
    walk(root, b"", &mut files, &mut inodes);
    group(&mut files, &inodes);
    files
}

fn walk(path: &Path, at: &[u8], files: &mut Files, inodes: &mut BTreeMap<Vec<u8>, u64>) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    let content = if kind.is_file() {
        fs::read(path).unwrap()
    } else if kind.is_symlink() {
        fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    let device = if kind.is_char_device() || kind.is_block_device() {
        (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()))
    } else {
        (0, 0)
    };
    let node = Node {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
        xattrs: xattrs(path),
        device,
        content,
        links: if kind.is_dir() { 0 } else { metadata.nlink() },
        same_as: Vec::new(),
    };
    let name = if at.is_empty() { b"/".to_vec() } else { at.to_vec() };
    inodes.insert(name.clone(), metadata.ino());
    files.insert(name, node);
    if kind.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            walk(&entry.path(), &[at, b"/", entry.file_name().as_bytes()].concat(), files, inodes);
        }
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let get = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), get(name))).collect()
}

/// Fails with the first difference, shortened.
pub fn assert_same(ours: &Files, theirs: &Files) {
    let lossy = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    for (path, node) in ours {
        let Some(other) = theirs.get(path) else { panic!("{} is in ours only", lossy(path)) };
        let strip =
            |node: &Node| Node { content: node.content.iter().take(64).copied().collect(), ..node.clone() };
        assert_eq!(strip(node), strip(other), "{}", lossy(path));
        assert!(node.content == other.content, "the content of {} differs", lossy(path));
    }
    for path in theirs.keys() {
        assert!(ours.contains_key(path), "{} is in theirs only", lossy(path));
    }
}

/// Takes out what an unprivileged umoci cannot keep: owners, device nodes and most extended attributes.
pub fn comparable(mut files: Files) -> Files {
    if !super::is_root() {
        files.retain(|path, node| node.device == (0, 0) && !path.starts_with(b"/dev/"));
        for node in files.values_mut() {
            (node.uid, node.gid) = (0, 0);
            node.xattrs.retain(|name, _| name.starts_with(b"user.") && name != b"user.rootlesscontainers");
        }
    }
    files
}
