//! A converted image equals what `umoci unpack` makes of it, and `fsck.erofs` has nothing to say. Without
//! root, umoci can neither set owners nor make devices; they are then left out of the comparison.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]
mod support;

use std::{fs, process::Command};

use cubby_image::PullOptions;
use support::{
    Bench, Compression,
    erofs::Erofs,
    files::{self, Files, comparable},
    fsck, is_root,
    tar::{self, archive, device, dir, fifo, file, hardlink, symlink},
    umoci,
};

fn assert_like_umoci(layers: &[Vec<u8>]) -> Files {
    let bench = Bench::new();
    let mut first = None;
    for how in [Compression::Gzip, Compression::Plain, Compression::Zstd] {
        let image = bench.convert(layers, how, &PullOptions::default()).unwrap();
        fsck(&image);
        let ours = Erofs::open(&image.disk).read();
        // Once is enough: the same layers give the same files.
        if how == Compression::Gzip {
            let theirs = umoci(&bench.path("layout"), &bench.path("bundle"));
            files::assert_same(&comparable(ours.clone()), &comparable(theirs));
        }
        match &first {
            Some(files) => files::assert_same(&ours, files),
            None => first = Some(ours),
        }
    }
    first.unwrap()
}

fn all_kinds() -> Vec<u8> {
    let long = "n".repeat(255);
    let deep = "d/".repeat(60);
    let mut items = vec![
        dir("./").mode(0o751).time(1_500_000_000, 123_456_789),
        dir("d").mode(0o1777).owner(1000, 1000),
        file("d/!sorts-before-dot", ""),
        file("d/-so-does-this", "x"),
        file("d/setuid", "x").mode(0o4755).owner(1, 2),
        file("empty", ""),
        file("d/nanos", "n").time(1_700_000_000, 999_999_999),
        file("d/before-1970", "n").time(-1_000, 0),
        file("d/far-owner", "o").owner(4_000_000_000, 70_000),
        file(format!("d/{long}"), "long name"),
        file(b"d/not \xff\xfe utf-8 \n", "bytes"),
        symlink("d/link", "../empty"),
        symlink("d/long-link", "x/".repeat(2000)),
        symlink("d/block-link", "y".repeat(4040)),
        hardlink("d/hard", "d/nanos").time(1_700_000_000, 999_999_999),
        fifo("d/fifo"),
        file("d/acl", "x")
            .xattr(b"user.empty", b"")
            .xattr(b"user.zero", b"\0\0=\n")
            .xattr(b"security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        dir("d/attributes").xattr(b"user.big", &[7; 3000]),
        symlink("d/.wh", "not a whiteout"),
    ];
    if is_root() {
        items.push(file("d/trusted", "x").xattr(b"trusted.a", b"1"));
        items.push(device("d/null", b'3', 1, 3).mode(0o666));
        items.push(device("d/block", b'4', 259, 300));
    }
    for size in [1_usize, 511, 512, 4031, 4032, 4033, 4064, 4095, 4096, 4097, 8191, 8192, 100_000, 2_000_000]
    {
        let data: Vec<u8> = (0..size).map(|at| (at * 31 + at / 4096) as u8).collect();
        items.push(file(format!("d/size-{size}"), data));
    }
    let parts: Vec<&str> = deep.split_terminator('/').collect();
    items.push(dir("deep"));
    for depth in 1..=parts.len() {
        items.push(dir(format!("deep/{}", parts[..depth].join("/"))));
    }
    items.push(file(format!("deep/{deep}f"), "deep"));
    items.push(dir("many"));
    for n in 0..10_000 {
        items.push(file(format!("many/entry-{n}-{}", "x".repeat(n % 90)), format!("{n}")));
    }
    archive(&items)
}

#[test]
fn every_kind_of_file_survives() {
    let files = assert_like_umoci(&[all_kinds()]);
    assert!(files.len() > 10_050, "{}", files.len());
    assert_eq!(files[&b"/d/hard"[..]].same_as, b"/d/hard");
    assert_eq!(files[&b"/d/nanos"[..]].same_as, b"/d/hard");
}

#[test]
fn layers_change_each_other_as_umoci_does() {
    let one = archive(&[
        dir("."),
        dir("keep"),
        file("keep/a", "1"),
        dir("gone"),
        file("gone/x", "1"),
        dir("opaque").mode(0o700),
        file("opaque/old", "1"),
        dir("opaque/olddir"),
        file("opaque/olddir/x", "1"),
        file("was-file", "1"),
        dir("was-dir"),
        file("was-dir/x", "1"),
        file("linked", "shared"),
        dir("real"),
        symlink("alias", "real"),
        symlink("absolute", "/real"),
        dir("times").time(1_111_111_111, 5),
        file("big", vec![1; 50_000]),
        symlink("replaced-link", "real"),
    ]);
    let two = archive(&[
        file(".wh.gone", ""),
        dir("opaque").mode(0o755),
        file("opaque/.wh..wh..opq", ""),
        file("opaque/new", "2"),
        dir("was-file"),
        file("was-file/x", "2"),
        file("was-dir", "2"),
        hardlink("again", "linked"),
        file("alias/through-link", "2"),
        file("absolute/through-absolute-link", "2"),
        file("times/new", "2"),
        file("big", vec![2; 70_000]),
        file("replaced-link", "now a file"),
        file("keep/.wh.never-was", ""),
    ]);
    let three = archive(&[
        file(".wh.linked", ""),
        hardlink("third", "again"),
        file("twice", "first"),
        file("twice", "last"),
        file(".wh.was-dir", ""),
    ]);
    let files = assert_like_umoci(&[one, two, three]);
    let content = |path: &str| String::from_utf8_lossy(&files[path.as_bytes()].content).into_owned();
    assert_eq!(content("/again"), "shared");
    assert_eq!(files[&b"/again"[..]].links, 2);
    assert_eq!(content("/twice"), "last");
    for path in ["/real/through-link", "/real/through-absolute-link", "/opaque/new", "/was-file/x"] {
        assert_eq!(content(path), "2");
    }
    for path in ["/gone", "/opaque/old", "/opaque/olddir", "/linked", "/was-dir", "/keep/.wh.never-was"] {
        assert!(!files.contains_key(path.as_bytes()), "{path}");
    }
}

/// GNU tar writes all sparse formats, and reads back what it meant.
#[test]
fn sparse_files_are_whole() {
    let bench = Bench::new();
    let root = bench.path("root");
    fs::create_dir(&root).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    for n in 0..40_u64 {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[n as u8 + 1; 5000], n * 100_000 + 3).unwrap();
    }
    sparse.set_len(10_000_000).unwrap();
    fs::File::create(root.join("hole")).unwrap().set_len(3_000_000).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        let path = bench.path("sparse.tar");
        let status = Command::new("tar")
            .arg("-C")
            .arg(&root)
            .args(format)
            .args(["--sparse", "--mtime=@1600000000", "-cf"])
            .arg(&path)
            .arg(".")
            .status();
        assert!(status.unwrap().success());
        let layer = fs::read(&path).unwrap();
        assert!(layer.len() < 1_000_000, "tar did not write the files sparse");
        let image = bench.convert(&[layer], Compression::Plain, &PullOptions::default()).unwrap();
        fsck(&image);
        let files = Erofs::open(&image.disk).read();
        for name in ["sparse", "hole"] {
            let node = &files[format!("/{name}").as_bytes()];
            assert!(node.content == fs::read(root.join(name)).unwrap(), "{name} of {format:?}");
        }
        let used = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&image.disk).unwrap()) * 512;
        assert!(used < 3_000_000, "holes take {used} bytes");
    }
}

#[test]
fn the_same_image_gives_the_same_bytes_and_no_dead_ones() {
    let old: Vec<u8> = (0..20_000_000_u32).map(|n| (n % 251) as u8).collect();
    let layers = [archive(&[dir("."), file("a", &old), file("b", "b")]), archive(&[file("a", "new")])];
    let make = || {
        let bench = Bench::new();
        let image = bench.convert(&layers, Compression::Gzip, &PullOptions::default()).unwrap();
        fsck(&image);
        let used = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&image.disk).unwrap()) * 512;
        assert!(used < 1_000_000, "the overwritten file still takes space: {used} bytes");
        fs::read(&image.disk).unwrap()
    };
    assert!(make() == make());
}

#[test]
fn old_long_names_and_directories_by_slash_are_read() {
    let long = format!("gnu/{}", "l".repeat(200));
    let mut layer = Vec::new();
    for item in [dir("."), dir("gnu")] {
        tar::write(&item, &mut layer);
    }
    tar::extension(b'L', format!("{long}\0").as_bytes(), &mut layer);
    tar::extension(b'K', format!("{}\0", "t".repeat(300)).as_bytes(), &mut layer);
    layer.extend_from_slice(&tar::header(&symlink("cut", "cut"), 0));
    tar::write(&tar::Item { kind: 0, ..dir("v7/") }, &mut layer);
    // Go's readers and ours take what a global header says as a comment.
    let mut records = Vec::new();
    tar::record(b"comment", b"git", &mut records);
    tar::extension(b'g', &records, &mut layer);
    tar::write(&file("after", "x"), &mut layer);
    let bench = Bench::new();
    let image = bench.convert(&[layer], Compression::Plain, &PullOptions::default()).unwrap();
    fsck(&image);
    let files = Erofs::open(&image.disk).read();
    assert_eq!(files[format!("/{long}").as_bytes()].content, "t".repeat(300).as_bytes());
    assert_eq!(files[&b"/v7"[..]].mode, 0o040_755);
    assert_eq!(files[&b"/after"[..]].content, b"x");
}
