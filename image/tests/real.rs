//! A real system, built by mmdebstrap from Debian's packages: equal to what umoci unpacks, and converted in
//! times that are printed beside those of `mkfs.erofs`. Its archive is kept in the system's temporary
//! directory, because building it takes half a minute and the network.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
mod support;

use std::{fs, path::PathBuf, time::Instant};

use cubby_image::PullOptions;
use support::{Bench, Compression, Content, erofs::Erofs, files, files::comparable, fsck, run, umoci};

/// The archive; the name says what is in it.
fn system() -> PathBuf {
    let path = std::env::temp_dir().join("cubby-test-bookworm-minbase-python3-minimal.tar");
    if !path.exists() {
        // Complete or not there: tests of several checkouts may meet here.
        let part = path.with_extension(format!("{}.part.tar", std::process::id()));
        run(
            "mmdebstrap",
            &["--variant=minbase", "--include=python3-minimal", "bookworm", part.to_str().unwrap()],
        );
        fs::rename(part, &path).unwrap();
    }
    path
}

#[test]
fn a_real_system_equals_what_umoci_unpacks() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test needs root: umoci makes device nodes and owners"
    );
    let layer = fs::read(system()).unwrap();
    let bench = Bench::new();
    let mut times = Vec::new();
    let mut last = None;
    for how in [Compression::Gzip, Compression::Zstd, Compression::Plain] {
        let layout = bench.path(&format!("{how:?}"));
        Content::new(std::slice::from_ref(&layer), how).write(&layout);
        let start = Instant::now();
        let image = bench.pull(&format!("oci:{}:t", layout.display()), &PullOptions::default()).unwrap();
        times.push(format!("{how:?} {} ms", start.elapsed().as_millis()));
        last = Some(image);
    }
    let image = last.unwrap();
    fsck(&image);
    let mut theirs = umoci(&bench.path("Plain"), &bench.path("bundle"));
    let ours = Erofs::open(&image.disk).read();
    // umoci does not restore the root's time after filling it.
    theirs.get_mut(&b"/"[..]).unwrap().mtime = ours[&b"/"[..]].mtime;
    files::assert_same(&comparable(ours.clone()), &comparable(theirs));
    assert!(ours.len() > 5000);

    let (start, rootfs) = (Instant::now(), bench.path("bundle/rootfs"));
    run("mkfs.erofs", &[bench.path("mkfs.erofs").to_str().unwrap(), rootfs.to_str().unwrap()]);
    let mkfs = start.elapsed().as_millis();
    let size = fs::metadata(bench.path("mkfs.erofs")).unwrap().len();
    println!(
        "converted (digests checked, synced): {}; mkfs.erofs from a tree in the page cache: {mkfs} ms",
        times.join(", ")
    );
    println!("disk: {} bytes, mkfs.erofs: {size} bytes, unpacked layer: {} bytes", image.size, layer.len());
}
