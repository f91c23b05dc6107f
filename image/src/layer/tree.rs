//! The image's names and metadata in memory: what all layers so far amount to (OCI image-spec, layer.md
//! § Applying Changesets). Contents are elsewhere; a file here is an [`Extent`] of the disk being made.
//!
//! Every name remembers which layer set it. That makes whiteouts independent of their place in a layer:
//! they remove what lower layers set and keep what their own layer did. (A symbolic link that is followed
//! or a file that is linked to must still be there, as for every other unpacker.) Hard links share one [`Leaf`], so
//! that a link count is a reference count.
//!
//! Names are resolved inside the image: a parent that is a symbolic link is followed from the image's
//! root, as in a container, and one that climbs above the root is refused.
use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use super::tar::Time;

/// Symbolic links that one path may pass, as in the kernel (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;
/// Directories a path may be below the root after links are followed. A path of `PATH_MAX` bytes cannot
/// name more than 2,048; real images stay below 60.
const MAX_DEPTH: usize = 512;

/// Where a file's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// In the writer's arena, to be placed beside the inode: (offset, length).
    Inline(usize, usize),
    /// On the disk from this block on, that many bytes; 0 bytes have no block.
    Blocks(u32, u64),
}

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits with set-id and sticky, without the type.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Meta {
    /// A directory that no layer describes: `root:root`, 0755, 1970.
    fn implied() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: Time::default(), xattrs: BTreeMap::new() }
    }
}

/// Anything but a directory.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
}

/// The kinds of [`Leaf`].
#[derive(Debug)]
pub(crate) enum Body {
    File(Extent),
    Symlink(Box<[u8]>),
    /// (major, minor)
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// A directory.
#[derive(Debug)]
pub(crate) struct Dir {
    pub(crate) meta: Meta,
    pub(crate) children: BTreeMap<Box<[u8]>, Node>,
    layer: u32,
}

impl Dir {
    fn new(meta: Meta, layer: u32) -> Self {
        Self { meta, children: BTreeMap::new(), layer }
    }
}

/// What a name stands for.
#[derive(Debug)]
pub(crate) enum Node {
    Dir(Box<Dir>),
    Leaf {
        leaf: Rc<Leaf>,
        /// Who set this name; a hard link may be newer than what it names.
        layer: u32,
    },
}

/// Why a path cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It would leave the image.
    Escape(&'static str),
    /// It makes no sense.
    Broken(&'static str),
}

/// The merged image.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: Dir,
    /// Extents whose last name is gone.
    freed: Vec<Extent>,
    layer: u32,
}

type Path<'a> = Vec<&'a [u8]>;

impl Tree {
    pub(crate) fn new() -> Self {
        Self { root: Dir::new(Meta::implied(), 0), freed: Vec::new(), layer: 0 }
    }

    /// Later changes belong to a new layer above all before.
    pub(crate) fn start_layer(&mut self) {
        self.layer += 1;
    }

    /// The extents that nothing names any more, since the last call.
    pub(crate) fn take_freed(&mut self) -> Vec<Extent> {
        std::mem::take(&mut self.freed)
    }

    /// Makes a directory, or gives an existing one new metadata. An empty path is the root.
    pub(crate) fn put_dir(&mut self, path: &[&[u8]], meta: Meta) -> Result<(), Refusal> {
        let layer = self.layer;
        let Some((name, parents)) = path.split_last() else {
            self.root.meta = meta;
            self.root.layer = layer;
            return Ok(());
        };
        let (parent, freed) = self.parent(parents)?;
        match parent.children.get_mut(*name) {
            Some(Node::Dir(dir)) => {
                dir.meta = meta;
                dir.layer = layer;
            }
            _ => put(parent, name, Node::Dir(Box::new(Dir::new(meta, layer))), freed),
        }
        Ok(())
    }

    /// Puts something that is not a directory in place of whatever has the name.
    pub(crate) fn put_leaf(&mut self, path: &[&[u8]], leaf: Leaf) -> Result<(), Refusal> {
        self.put_rc(path, Rc::new(leaf))
    }

    /// Gives what `target` names another name.
    pub(crate) fn put_link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> Result<(), Refusal> {
        let leaf = match self.find(target)? {
            Some(Node::Leaf { leaf, .. }) => Rc::clone(leaf),
            Some(Node::Dir(_)) => return Err(Refusal::Broken("a hard link to a directory")),
            None => return Err(Refusal::Broken("a hard link to nothing")),
        };
        self.put_rc(path, leaf)
    }

    fn put_rc(&mut self, path: &[&[u8]], leaf: Rc<Leaf>) -> Result<(), Refusal> {
        let layer = self.layer;
        let (name, parents) = path.split_last().ok_or(Refusal::Broken("the root is not a directory"))?;
        let (parent, freed) = self.parent(parents)?;
        put(parent, name, Node::Leaf { leaf, layer }, freed);
        Ok(())
    }

    /// Removes what lower layers put at `path`; what this layer put there stays.
    pub(crate) fn whiteout(&mut self, path: &[&[u8]]) -> Result<(), Refusal> {
        let layer = self.layer;
        let (name, parents) = path.split_last().ok_or(Refusal::Broken("a whiteout of the root"))?;
        let Some((parent, freed)) = self.existing(parents)? else {
            return Ok(());
        };
        if parent.children.get_mut(*name).is_some_and(|node| !keep(node, layer, freed))
            && let Some(node) = parent.children.remove(*name)
        {
            discard(node, freed);
        }
        Ok(())
    }

    /// Removes what lower layers put into the directory at `path`.
    pub(crate) fn opaque(&mut self, path: &[&[u8]]) -> Result<(), Refusal> {
        let layer = self.layer;
        if let Some((dir, freed)) = self.existing(path)? {
            prune(dir, layer, freed);
        }
        Ok(())
    }

    /// What `path` names, with links followed in its parents but not at its end.
    fn find(&self, path: &[&[u8]]) -> Result<Option<&Node>, Refusal> {
        let Some((name, parents)) = path.split_last() else {
            return Err(Refusal::Broken("a hard link to a directory"));
        };
        let parents = self.resolve(parents)?;
        let mut dir = &self.root;
        for part in &parents {
            match dir.children.get(part.as_slice()) {
                Some(Node::Dir(next)) => dir = next,
                _ => return Ok(None),
            }
        }
        Ok(dir.children.get(*name))
    }

    /// The directory at `path`, made if need be.
    fn parent(&mut self, path: &[&[u8]]) -> Result<(&mut Dir, &mut Vec<Extent>), Refusal> {
        let path = self.resolve(path)?;
        let layer = self.layer;
        let mut dir = &mut self.root;
        for part in path {
            let child = dir
                .children
                .entry(part.into_boxed_slice())
                .or_insert_with(|| Node::Dir(Box::new(Dir::new(Meta::implied(), layer))));
            dir = match child {
                Node::Dir(next) => next,
                Node::Leaf { .. } => return Err(Refusal::Broken("a parent that is not a directory")),
            };
        }
        Ok((dir, &mut self.freed))
    }

    /// The directory at `path`, if there is one.
    fn existing(&mut self, path: &[&[u8]]) -> Result<Option<(&mut Dir, &mut Vec<Extent>)>, Refusal> {
        let path = self.resolve(path)?;
        let mut dir = &mut self.root;
        for part in &path {
            match dir.children.get_mut(part.as_slice()) {
                Some(Node::Dir(next)) => dir = next,
                _ => return Ok(None),
            }
        }
        Ok(Some((dir, &mut self.freed)))
    }

    /// The path of the directory that `path` leads to when links are followed inside the image. Parts
    /// that do not exist stay as they are.
    fn resolve(&self, path: &[&[u8]]) -> Result<Vec<Vec<u8>>, Refusal> {
        let mut todo: VecDeque<Vec<u8>> = path.iter().map(|part| part.to_vec()).collect();
        let mut done: Vec<Vec<u8>> = Vec::with_capacity(todo.len());
        // The directories on the way, as far as they exist.
        let mut dirs: Vec<&Dir> = vec![&self.root];
        let mut links = 0;
        while let Some(part) = todo.pop_front() {
            if part == b".." {
                if done.pop().is_none() {
                    return Err(Refusal::Escape("a symbolic link on the way climbs above the image's root"));
                }
                dirs.truncate(done.len() + 1);
                continue;
            }
            let node = match dirs.last() {
                Some(dir) if dirs.len() == done.len() + 1 => dir.children.get(part.as_slice()),
                _ => None,
            };
            match node {
                Some(Node::Dir(dir)) => dirs.push(dir),
                Some(Node::Leaf { leaf, .. }) => {
                    let Body::Symlink(target) = &leaf.body else {
                        return Err(Refusal::Broken("a parent that is not a directory"));
                    };
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Refusal::Broken("too many symbolic links on the way"));
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                        dirs.truncate(1);
                    }
                    for part in parts(target).into_iter().rev() {
                        todo.push_front(part.to_vec());
                    }
                    continue;
                }
                None => {}
            }
            done.push(part);
            if done.len() > MAX_DEPTH {
                return Err(Refusal::Broken("too many directories below one another"));
            }
        }
        Ok(done)
    }
}

/// The components of a path, without empty ones and `.`.
pub(crate) fn parts(path: &[u8]) -> Path<'_> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect()
}

fn put(parent: &mut Dir, name: &[u8], node: Node, freed: &mut Vec<Extent>) {
    if let Some(old) = parent.children.insert(name.into(), node) {
        discard(old, freed);
    }
}

/// Takes what lower layers put out of `dir`.
fn prune(dir: &mut Dir, layer: u32, freed: &mut Vec<Extent>) {
    let removed = dir.children.extract_if(.., |_, node| !keep(node, layer, freed)).collect::<Vec<_>>();
    for (_, node) in removed {
        discard(node, freed);
    }
}

/// Whether anything of `node` is this layer's; what is not is taken out of it.
fn keep(node: &mut Node, layer: u32, freed: &mut Vec<Extent>) -> bool {
    match node {
        Node::Leaf { layer: at, .. } => *at == layer,
        Node::Dir(dir) => {
            prune(dir, layer, freed);
            if dir.layer < layer && !dir.children.is_empty() {
                // As if the whiteout had come first and the children had implied the directory.
                dir.meta = Meta::implied();
                dir.layer = layer;
            }
            dir.layer == layer
        }
    }
}

/// Notes the extents that go away with `node`.
fn discard(node: Node, freed: &mut Vec<Extent>) {
    match node {
        Node::Leaf { leaf, .. } => {
            if let Some(Leaf { body: Body::File(extent), .. }) = Rc::into_inner(leaf) {
                freed.push(extent);
            }
        }
        Node::Dir(dir) => {
            for (_, child) in dir.children {
                discard(child, freed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(mode: u16) -> Meta {
        Meta { mode, ..Meta::implied() }
    }

    fn file(tree: &mut Tree, path: &str, block: u32) {
        let leaf = Leaf { meta: meta(0o644), body: Body::File(Extent::Blocks(block, 1)) };
        tree.put_leaf(&parts(path.as_bytes()), leaf).unwrap();
    }

    fn symlink(tree: &mut Tree, path: &str, target: &str) {
        let leaf = Leaf { meta: meta(0o777), body: Body::Symlink(target.as_bytes().into()) };
        tree.put_leaf(&parts(path.as_bytes()), leaf).unwrap();
    }

    fn names(tree: &Tree) -> Vec<String> {
        fn walk(dir: &Dir, at: &str, all: &mut Vec<String>) {
            for (name, node) in &dir.children {
                let path = format!("{at}/{}", String::from_utf8_lossy(name));
                if let Node::Dir(dir) = node {
                    walk(dir, &path, all);
                }
                all.push(path);
            }
        }
        let mut all = Vec::new();
        walk(&tree.root, "", &mut all);
        all.sort();
        all
    }

    #[test]
    fn a_whiteout_spares_its_own_layer_wherever_it_stands() {
        let build = |first: bool| {
            let mut tree = Tree::new();
            tree.start_layer();
            tree.put_dir(&[b"d"], meta(0o700)).unwrap();
            file(&mut tree, "d/old", 1);
            tree.start_layer();
            if first {
                tree.whiteout(&[b"d"]).unwrap();
            }
            file(&mut tree, "d/new", 2);
            if !first {
                tree.whiteout(&[b"d"]).unwrap();
            }
            let Some(Node::Dir(dir)) = tree.root.children.get(&b"d"[..]) else { panic!("d is gone") };
            assert_eq!(dir.meta.mode, 0o755, "the directory that was whited out must not leave its mode");
            assert_eq!(tree.take_freed(), [Extent::Blocks(1, 1)]);
            names(&tree)
        };
        assert_eq!(build(true), ["/d", "/d/new"]);
        assert_eq!(build(true), build(false));
    }

    #[test]
    fn an_opaque_directory_keeps_itself_and_its_own_layer() {
        let mut tree = Tree::new();
        tree.start_layer();
        tree.put_dir(&[b"d"], meta(0o700)).unwrap();
        file(&mut tree, "d/sub/old", 1);
        tree.start_layer();
        file(&mut tree, "d/new", 2);
        tree.opaque(&[b"d"]).unwrap();
        assert_eq!(names(&tree), ["/d", "/d/new"]);
        let Some(Node::Dir(dir)) = tree.root.children.get(&b"d"[..]) else { panic!("d is gone") };
        assert_eq!(dir.meta.mode, 0o700);
    }

    #[test]
    fn hard_links_share_until_the_last_name_goes() {
        let mut tree = Tree::new();
        tree.start_layer();
        file(&mut tree, "a", 7);
        tree.start_layer();
        tree.put_link(&[b"b"], &[b"a"]).unwrap();
        tree.start_layer();
        tree.whiteout(&[b"a"]).unwrap();
        assert_eq!(tree.take_freed(), []);
        file(&mut tree, "b", 8);
        assert_eq!(tree.take_freed(), [Extent::Blocks(7, 1)]);
        assert_eq!(tree.put_link(&[b"c"], &[b"zz"]), Err(Refusal::Broken("a hard link to nothing")));
    }

    #[test]
    fn links_on_the_way_are_followed_inside_the_image_only() {
        let mut tree = Tree::new();
        tree.start_layer();
        symlink(&mut tree, "lib", "/usr/lib");
        symlink(&mut tree, "a/up", "../lib");
        file(&mut tree, "a/up/x", 1);
        assert_eq!(names(&tree), ["/a", "/a/up", "/lib", "/usr", "/usr/lib", "/usr/lib/x"]);

        symlink(&mut tree, "out", "../../etc");
        let leaf = || Leaf { meta: meta(0), body: Body::Fifo };
        assert!(matches!(tree.put_leaf(&[b"out", b"x"], leaf()), Err(Refusal::Escape(_))));
        assert!(matches!(tree.put_link(&[b"y"], &[b"out", b"passwd"]), Err(Refusal::Escape(_))));
        assert!(matches!(tree.whiteout(&[b"out", b"x"]), Err(Refusal::Escape(_))));
        symlink(&mut tree, "loop", "loop");
        assert!(matches!(tree.put_leaf(&[b"loop", b"x"], leaf()), Err(Refusal::Broken(_))));
        assert!(matches!(tree.put_leaf(&[b"lib", b"x", b"y"], leaf()), Err(Refusal::Broken(_))));
    }

    #[test]
    fn depth_is_bounded_even_through_links() {
        let mut tree = Tree::new();
        tree.start_layer();
        let deep = vec![&b"d"[..]; MAX_DEPTH];
        tree.put_dir(&deep, meta(0o755)).unwrap();
        symlink(&mut tree, "l", &"d/".repeat(MAX_DEPTH));
        assert!(matches!(tree.put_dir(&[b"l", b"d", b"d"], meta(0)), Err(Refusal::Broken(_))));
    }
}
