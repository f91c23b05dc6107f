//! Layers that mean harm end in a typed error, leave nothing behind, and cost neither disk nor memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
mod support;

use std::{fs, slice::from_ref};

use cubby_image::{Error, Limits, PullOptions};
use support::{
    Bench, Compression, Content, compress,
    erofs::Erofs,
    fsck,
    tar::{self, Item, archive, device, dir, file, hardlink, symlink},
};

fn limits(change: impl FnOnce(&mut Limits)) -> PullOptions {
    let mut options = PullOptions::default();
    change(&mut options.limits);
    options
}

fn refused(layers: &[Vec<u8>], how: Compression, options: &PullOptions) -> Error {
    let bench = Bench::new();
    let error = bench.convert(layers, how, options).expect_err("a hostile image was taken");
    assert_eq!(bench.litter(), [""; 0], "{error}");
    assert!(bench.store.list().unwrap().is_empty());
    error
}

fn refused_plain(layers: &[Vec<u8>]) -> Error {
    refused(layers, Compression::Plain, &PullOptions::default())
}

#[test]
fn no_path_leaves_the_image() {
    let cases: Vec<(&str, Vec<Item>)> = vec![
        ("../etc/passwd", vec![file("../etc/passwd", "x")]),
        ("a/../../x", vec![file("a/../../x", "x")]),
        ("a/..", vec![dir("a/..")]),
        ("/etc/passwd", vec![file("/etc/passwd", "x")]),
        ("hard", vec![hardlink("hard", "../../etc/shadow")]),
        ("hard", vec![hardlink("hard", "/etc/shadow")]),
        ("out/x", vec![symlink("out", "../../../etc"), file("out/x", "x")]),
        ("hard", vec![symlink("out", "a/../../.."), hardlink("hard", "out/etc/shadow")]),
        (".wh...", vec![file(".wh...", "")]),
        ("d/.wh..", vec![file("d/.wh..", "")]),
        ("out/.wh.x", vec![symlink("out", ".."), file("out/.wh.x", "")]),
        ("out/.wh..wh..opq", vec![symlink("out", ".."), file("out/.wh..wh..opq", "")]),
        ("out/x/y", vec![symlink("a", "../.."), symlink("out", "a"), dir("out/x/y")]),
    ];
    for (expected, items) in cases {
        let error = refused_plain(&[archive(&items)]);
        let Error::Escape { path, layer, .. } = &error else { panic!("{expected}: {error}") };
        assert_eq!(path, expected);
        assert!(layer.starts_with("sha256:"));
    }
}

#[test]
fn links_that_point_outside_are_only_text_and_absolute_ones_start_at_the_root() {
    let bench = Bench::new();
    let layer = archive(&[
        symlink("etc", "/host/etc"),
        symlink("up", "../../.."),
        file("etc/x", "inside"),
        file("/abs", "inside"),
        hardlink("hard", "/abs"),
    ]);
    let options = PullOptions { allow_absolute_paths: true, ..PullOptions::default() };
    let image = bench.convert(&[layer], Compression::Gzip, &options).unwrap();
    fsck(&image);
    let files = Erofs::open(&image.disk).read();
    assert_eq!(files[&b"/host/etc/x"[..]].content, b"inside");
    assert_eq!(files[&b"/hard"[..]].links, 2);
    assert_eq!(files[&b"/up"[..]].content, b"../../..");
}

#[test]
fn archives_that_make_no_sense_are_refused() {
    let mut lying = tar::header(&file("f", ""), 1 << 40);
    lying.extend_from_slice(&[0; 2048]);
    let mut bad_sum = archive(&[file("f", "x")]);
    bad_sum[0] ^= 1;
    let mut huge_number = tar::header(&file("f", ""), 0);
    huge_number[124..136].fill(0xff);
    tar::seal(&mut huge_number);
    let truncated = archive(&[file("f", [1; 5000])])[..3000].to_vec();
    let nul = {
        let mut records = Vec::new();
        tar::record(b"path", b"a\0b", &mut records);
        let mut layer = Vec::new();
        tar::extension(b'x', &records, &mut layer);
        layer.extend(archive(&[file("f", "x")]));
        layer
    };
    let sparse = |map: &str| {
        let mut records = Vec::new();
        tar::record(b"GNU.sparse.size", b"100", &mut records);
        tar::record(b"GNU.sparse.map", map.as_bytes(), &mut records);
        let mut layer = Vec::new();
        tar::extension(b'x', &records, &mut layer);
        layer.extend(archive(&[file("f", [1; 20])]));
        layer
    };
    let cases = [
        lying.clone(),
        bad_sum,
        huge_number,
        truncated,
        nul,
        b"not a tar archive at all, but long enough to be looked at".repeat(40),
        vec![7; 100],
        sparse("0,10,5,10"),
        sparse("0,10,90,20"),
        sparse("0,10"),
        sparse("18446744073709551615,20"),
        sparse("0,10,20"),
        archive(&[Item { kind: b'Z', ..file("f", "") }]),
        archive(&[file("a".repeat(256), "")]),
        archive(&[symlink("s", "")]),
        archive(&[symlink("s", "t".repeat(4096))]),
        archive(&[hardlink("h", "nothing")]),
        archive(&[dir("d"), hardlink("h", "d")]),
        archive(&[file("f", ""), file("f/x", "")]),
        archive(&[file("./", "x")].map(|item| Item { kind: b'2', link: b"x".to_vec(), ..item })),
        archive(&[symlink("a", "b"), symlink("b", "a"), file("a/x", "")]),
        archive(&[device("n", b'3', 1 << 12, 0)]),
        archive(&[file(".wh.", "")]),
        archive(&[dir("d/".repeat(600))]),
    ];
    for (at, layer) in cases.into_iter().enumerate() {
        let error = refused_plain(&[layer]);
        let fits = matches!(error, Error::Layer { .. }) || (at == 0 && matches!(error, Error::Limit { .. }));
        assert!(fits, "case {at}: {error}");
    }
}

/// A file of 200 MiB of zeros, compressed piece by piece: both formats may be concatenated.
fn bomb(how: Compression) -> Vec<u8> {
    let mut stored = compress(&tar::header(&file("zeros", ""), 200 << 20), how);
    let zeros = vec![0; 1 << 20];
    let piece = match how {
        Compression::Gzip => {
            let mut out = Vec::new();
            std::io::Read::read_to_end(
                &mut flate2::read::GzEncoder::new(&zeros[..], flate2::Compression::best()),
                &mut out,
            )
            .unwrap();
            out
        }
        _ => compress(&zeros, how),
    };
    (0..201).for_each(|_| stored.extend_from_slice(&piece));
    stored
}

#[test]
fn a_decompression_bomb_ends_in_an_error() {
    for how in [Compression::Gzip, Compression::Zstd] {
        let bench = Bench::new();
        let stored = bomb(how);
        assert!(stored.len() < 1 << 20);
        // Nobody gets as far as the layer's `diff_id`.
        Content::new(&[stored], Compression::Plain).write(&bench.path("layout"));
        let reference = format!("oci:{}", bench.path("layout").display());
        let error = bench.pull(&reference, &PullOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Limit { option: "max_ratio", limit: 100, .. }), "{error}");
        let options = limits(|limits| limits.max_unpacked = 10 << 20);
        let error = bench.pull(&reference, &options).unwrap_err();
        assert!(matches!(error, Error::Limit { option: "max_unpacked", .. }), "{error}");
        let options = limits(|limits| limits.min_free = u64::MAX / 2);
        let error = bench.pull(&reference, &options).unwrap_err();
        assert!(matches!(error, Error::NoSpace { .. }), "{error}");
        assert_eq!(bench.litter(), [""; 0]);
    }
}

#[test]
fn every_limit_is_kept_and_named() {
    let option = |layers: &[Vec<u8>], options: &PullOptions| match refused(layers, Compression::Gzip, options)
    {
        Error::Limit { option, .. } => option,
        other => panic!("{other}"),
    };
    let files: Vec<Item> = (0..100).map(|n| file(format!("f{n}"), "x")).collect();
    let many = archive(&files);
    assert_eq!(option(from_ref(&many), &limits(|limits| limits.max_entries = 99)), "max_entries");
    assert_eq!(option(from_ref(&many), &limits(|limits| limits.max_metadata = 200)), "max_metadata");
    assert_eq!(option(&[many.clone(), many.clone()], &limits(|limits| limits.max_layers = 1)), "max_layers");
    assert_eq!(option(from_ref(&many), &limits(|limits| limits.max_layer = 10)), "max_layer");
    assert_eq!(option(from_ref(&many), &limits(|limits| limits.max_manifest = 10)), "max_manifest");
    assert_eq!(option(&[many], &limits(|limits| limits.max_unpacked = 2048)), "max_unpacked");
    let long = archive(&[file("p/".repeat(2100), "x")]);
    assert_eq!(option(&[long], &PullOptions::default()), "max_path");
    let attributes = archive(&[file("f", "")
        .xattr(b"user.a", &[0; 60_000])
        .xattr(b"user.b", &[0; 60_000])
        .xattr(b"user.c", &[0; 60_000])]);
    assert_eq!(option(&[attributes], &PullOptions::default()), "max_xattrs");
}

#[test]
fn an_extended_header_cannot_fill_the_memory() {
    let mut layer = Vec::new();
    let head = Item { kind: b'x', ..file("pax", "") };
    layer.extend_from_slice(&tar::header(&head, 8 << 30));
    layer.extend_from_slice(&[b'1'; 4096]);
    let error = refused_plain(&[layer]);
    assert!(error.to_string().contains("extended header"), "{error}");

    // Many of them before one entry are bounded as well, by what they may say.
    let mut layer = Vec::new();
    for n in 0..200 {
        let mut records = Vec::new();
        tar::record(format!("SCHILY.xattr.user.{n}").as_bytes(), &[b'v'; 10_000], &mut records);
        tar::extension(b'x', &records, &mut layer);
    }
    layer.extend(archive(&[file("f", "")]));
    assert!(matches!(refused_plain(&[layer]), Error::Limit { option: "max_xattrs", .. }));
}

#[test]
fn content_that_is_not_what_it_says_is_refused() {
    let bench = Bench::new();
    let layout = bench.path("layout");
    let reference = format!("oci:{}", layout.display());
    let layer = archive(&[file("f", "honest")]);
    let image = Content::new(from_ref(&layer), Compression::Gzip);
    let blob = |image: &Content| {
        let stored = compress(&layer, Compression::Gzip);
        let digest = cubby_image::Digest::sha256(&stored).to_string();
        assert!(image.blobs.contains_key(&digest));
        digest
    };
    let pull = |change: &dyn Fn(&mut Content)| {
        let mut image = image.clone();
        change(&mut image);
        let _ = fs::remove_dir_all(&layout);
        image.write(&layout);
        bench.pull(&reference, &PullOptions::default()).unwrap_err()
    };
    let flip = |bytes: &mut Vec<u8>| {
        let last = bytes.len() - 1;
        bytes[last / 2] ^= 1;
    };
    // A damaged gzip stream may be noticed before its digest is.
    let error = pull(&|image| flip(image.blobs.get_mut(&blob(image)).unwrap()));
    assert!(matches!(error, Error::DigestMismatch { .. } | Error::Layer { .. }), "{error}");
    let honest_but_other = compress(&archive(&[file("f", "evilst")]), Compression::Gzip);
    let error = pull(&|image| drop(image.blobs.insert(blob(image), honest_but_other.clone())));
    assert!(matches!(error, Error::DigestMismatch { .. } | Error::SizeMismatch { .. }), "{error}");
    let error = pull(&|image| assert!(image.blobs.get_mut(&blob(image)).unwrap().pop().is_some()));
    assert!(matches!(error, Error::SizeMismatch { .. } | Error::Layer { .. }), "{error}");
    let error = pull(&|image| image.blobs.get_mut(&blob(image)).unwrap().extend([0; 99]));
    assert!(matches!(error, Error::SizeMismatch { .. }), "{error}");
    // A layer that matches its own digest, but not what the configuration says it unpacks to.
    let config = Content::new(&[archive(&[file("f", "other!")])], Compression::Gzip);
    let other = config.manifest;
    let error = pull(&|image| {
        let text = String::from_utf8(image.manifest.clone()).unwrap();
        let from_config = String::from_utf8(other.clone()).unwrap();
        let cut = |text: &str| text.split(r#""layers""#).map(str::to_owned).collect::<Vec<_>>();
        image.blobs.extend(config.blobs.clone());
        image.manifest = format!(r#"{}"layers"{}"#, cut(&from_config)[0], cut(&text)[1]).into_bytes();
        image.add(image.manifest.clone());
    });
    let Error::DigestMismatch { what, .. } = &error else { panic!("{error}") };
    assert_eq!(what, "an unpacked layer");
    assert_eq!(bench.litter(), [""; 0]);
}
