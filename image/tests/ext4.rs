//! The formatter against e2fsprogs: what they check, read and show.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, UNIX_EPOCH};

use cubby_image::ext4::{Error, MAX_SIZE, MIN_SIZE, Options, format};
use proptest::prelude::*;
use tempfile::TempDir;

const UUID: [u8; 16] = *b"\x27\x40\xed\xe9\x65\x6d\x48\xa0\x87\x64\x42\x10\xc0\xd4\xc9\xad";
const MIB: u64 = 1 << 20;

struct Disk {
    _dir: TempDir,
    path: PathBuf,
}

impl Disk {
    fn new(size: u64, options: &Options<'_>) -> Result<Self, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.ext4");
        format(&File::create(&path).unwrap(), size, options)?;
        Ok(Disk { _dir: dir, path })
    }

    fn run(&self, program: &str, args: &[&str]) -> (bool, String) {
        // Where Debian keeps them, for a user whose PATH has no sbin.
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        let output = Command::new(program).env("PATH", path).args(args).arg(&self.path).output();
        let output = output.unwrap_or_else(|e| panic!("{program} (package e2fsprogs): {e}"));
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }

    fn assert_clean(&self) {
        let (clean, text) = self.run("e2fsck", &["-fn"]);
        assert!(clean, "{text}");
        // It also mends small things silently in its own mind.
        for word in ["WARNING", "wrong", "invalid", "?", "differ"] {
            assert!(!text.contains(word), "{text}");
        }
    }

    fn allocated(&self) -> u64 {
        fs::metadata(&self.path).unwrap().blocks() * 512
    }

    fn field(&self, name: &str) -> String {
        let (shown, text) = self.run("dumpe2fs", &["-h"]);
        assert!(shown, "{text}");
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}: {text}"));
        line.split_once(':').unwrap().1.trim().to_owned()
    }
}

fn options() -> Options<'static> {
    Options { label: "sandbox", directories: &["upper", "work"], ..Options::new(UUID) }
}

#[test]
fn e2fsck_finds_nothing_in_sizes_that_matter() {
    let group = 128 * MIB;
    let mut sizes = vec![MIN_SIZE, 17 * MIB + 123, 100 * MIB, group - 4096, group, group + 4096, MAX_SIZE];
    // Last groups that are kept and left out, and flex groups of one group.
    sizes.extend([group + 2 * MIB, group + 3 * MIB, 32 * group - 4096, 32 * group, 32 * group + 2 * MIB]);
    sizes.extend([33 * group, 63 * group + 77 * MIB, 64 * group + 4 * MIB, 1000 * group]);
    for size in sizes {
        let disk = Disk::new(size, &options()).unwrap();
        println!("{size}: {} bytes", disk.allocated());
        disk.assert_clean();
        assert_eq!(fs::metadata(&disk.path).unwrap().len(), size);
        let blocks: u64 = disk.field("Block count").parse().unwrap();
        assert!(blocks * 4096 <= size && size - blocks * 4096 < 4 * MIB, "{size}: {blocks}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn e2fsck_finds_nothing(
        groups in 0_u64..80,
        rest in prop_oneof![0..128 * MIB, 0..4 * MIB],
        label in "[a-z]{0,16}",
        names in proptest::collection::btree_set("[a-zA-Z0-9 é]{1,30}", 0..40),
    ) {
        let size = (groups * 128 * MIB + rest).max(MIN_SIZE);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let disk = Disk::new(size, &Options { label: &label, directories: &names, ..Options::new(UUID) }).unwrap();
        disk.assert_clean();
    }
}

#[test]
fn dumpe2fs_shows_what_was_chosen() {
    let created = UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    let disk = Disk::new(4096 * MIB, &Options { created, ..options() }).unwrap();
    let features = disk.field("Filesystem features");
    let mut features: Vec<_> = features.split_whitespace().collect();
    features.sort_unstable();
    let expected = "dir_index dir_nlink ext_attr extent extra_isize filetype flex_bg has_journal huge_file \
                    large_dir large_file sparse_super2 uninit_bg";
    assert_eq!(features.join(" "), expected);
    for (name, value) in [
        ("Filesystem volume name", "sandbox"),
        ("Filesystem UUID", "2740ede9-656d-48a0-8764-4210c0d4c9ad"),
        ("Filesystem state", "clean"),
        ("Errors behavior", "Remount read-only"),
        ("Mount options", "no_prefetch_block_bitmaps"),
        ("Block count", "1048576"),
        ("Inode count", "262144"),
        ("Reserved block count", "0"),
        ("Total journal size", "32M"),
        ("Journal start", "0"),
    ] {
        assert_eq!(disk.field(name), value, "{name}");
    }
    let (_, text) = disk.run("dumpe2fs", &[]);
    let groups: Vec<_> = text.lines().filter(|line| line.starts_with("Group ")).collect();
    assert_eq!(groups.len(), 32);
    assert!(groups.iter().all(|line| line.contains("ITABLE_ZEROED")), "{text}");
    assert!(groups[1..31].iter().all(|line| line.contains("INODE_UNINIT, BLOCK_UNINIT")), "{text}");
    assert!(!text.contains("EXPECTED"), "{text}");
}

#[test]
fn the_counts_are_those_of_the_free_lists() {
    let disk = Disk::new(200 * MIB, &options()).unwrap();
    let number = |name| disk.field(name).parse::<u64>().unwrap();
    let (_, text) = disk.run("dumpe2fs", &[]);
    let free: u64 = text
        .lines()
        .filter_map(|line| line.trim().split_once(" free blocks"))
        .map(|(count, _)| count.parse::<u64>().unwrap())
        .sum();
    assert_eq!(number("Free blocks"), free);
    // Root, lost+found, upper and work have the only blocks that are neither overhead nor free.
    assert_eq!(number("Block count") - number("Overhead clusters") - free, 4);
    assert_eq!(number("Inode count") - number("Free inodes"), 13);
}

#[test]
fn debugfs_reads_the_directories() {
    let created = UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    let disk = Disk::new(64 * MIB, &Options { created, ..options() }).unwrap();
    let (_, text) = disk.run("debugfs", &["-R", "ls -p /"]);
    let entries: Vec<_> = text.lines().filter(|line| line.starts_with('/')).collect();
    let expected = [
        "/2/040755/0/0/.//",
        "/2/040755/0/0/..//",
        "/11/040700/0/0/lost+found//",
        "/12/040755/0/0/upper//",
        "/13/040755/0/0/work//",
    ];
    assert_eq!(entries, expected);
    let (_, text) = disk.run("debugfs", &["-R", "stat /work"]);
    assert!(text.contains("crtime: 0xee6b2800:00000001"), "{text}");
}

#[test]
fn few_blocks_are_written() {
    for (size, bound) in [(16 * MIB, 64 << 10), (4096 * MIB, 64 << 10), (MAX_SIZE, 2 << 20)] {
        let disk = Disk::new(size, &options()).unwrap();
        assert!(disk.allocated() <= bound, "{size}: {}", disk.allocated());
    }
}

#[test]
fn what_was_in_the_file_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.ext4");
    fs::write(&path, vec![0xff; 20 << 20]).unwrap();
    format(&File::options().write(true).open(&path).unwrap(), MIN_SIZE, &options()).unwrap();
    let disk = Disk { _dir: dir, path };
    disk.assert_clean();
    assert!(disk.allocated() <= 64 << 10);
}

#[test]
fn mistakes_are_told_before_anything_is_written() {
    let file = tempfile::tempfile().unwrap();
    let with =
        |size, label, directories| format(&file, size, &Options { label, directories, ..Options::new(UUID) });
    for size in [0, MIN_SIZE - 1, MAX_SIZE + 1, u64::MAX] {
        assert!(matches!(with(size, "", &[]), Err(Error::Size { .. })), "{size}");
    }
    assert!(matches!(with(MIN_SIZE, "seventeen letters", &[]), Err(Error::Label { .. })));
    let long = "d".repeat(256);
    let fitting: Vec<String> = (0..30).map(|i| format!("{i:0>255}")).collect();
    let many: Vec<String> = (0..65).map(|i| i.to_string()).collect();
    let lists: [Vec<&str>; 9] = [
        vec![""],
        vec!["."],
        vec![".."],
        vec!["a/b"],
        vec!["a\0"],
        vec!["lost+found"],
        vec!["a", "a"],
        vec![&long],
        fitting.iter().map(String::as_str).collect(),
    ];
    for names in lists.iter().chain([&many.iter().map(String::as_str).collect()]) {
        assert!(matches!(with(MIN_SIZE, "", names), Err(Error::Directory { .. })), "{names:?}");
    }
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn it_is_quick() {
    // The first run pages the code in.
    let mut best = Duration::MAX;
    let dir = tempfile::tempdir().unwrap();
    for i in 0..20 {
        let file = File::create(dir.path().join(i.to_string())).unwrap();
        let begin = Instant::now();
        format(&file, 4096 * MIB, &options()).unwrap();
        best = best.min(begin.elapsed());
    }
    println!("4 GiB in {best:?}");
    assert!(best < Duration::from_millis(20), "{best:?}");
}
