//! The kernel's first root file system: a cpio archive in the "newc" format (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`) that is put together in guest memory. The
//! executable in it begins on a page, so that its file is mapped there and not copied.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

use cubby_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::sys;

const PAGE: u64 = 4096;
const PAGE_SIZE: usize = 4096;
const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive with one executable as `/init`, and the devices that the kernel and a C library open for it:
/// `/dev/console` and `/dev/null`.
#[derive(Debug)]
pub struct Initramfs {
    /// Whole pages; the headers are at the end of the last one.
    head: Vec<u8>,
    init: File,
    length: u64,
    tail: Vec<u8>,
}

impl Initramfs {
    /// An archive of the executable at `path`, which must not be truncated while a VM runs.
    ///
    /// # Errors
    /// What opening the file gave; [`io::ErrorKind::FileTooLarge`] for one of 4 GiB or more.
    pub fn with_init(path: &Path) -> io::Result<Self> {
        let init = File::open(path)?;
        let length = init.metadata()?.len();
        let size = u32::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut archive = Archive(Vec::new());
        archive.entry("dev", DIRECTORY, (0, 0), 0);
        archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), 0);
        archive.entry("dev/null", CHARACTER_DEVICE, (1, 3), 0);
        archive.entry("init", EXECUTABLE, (0, 0), size);
        // The kernel skips zeros in front of an archive.
        let mut head = vec![0; archive.0.len().next_multiple_of(PAGE_SIZE) - archive.0.len()];
        head.append(&mut archive.0);
        let mut tail = vec![0; padding(length)];
        archive.entry("TRAILER!!!", 0, (0, 0), 0);
        tail.append(&mut archive.0);
        Ok(Self { head, init, length, tail })
    }

    /// Bytes of guest memory that it needs.
    pub(crate) fn size(&self) -> u64 {
        self.head.len() as u64 + self.length + self.tail.len() as u64
    }

    /// Puts the archive at `address`, the begin of a page.
    pub(crate) fn place(&self, memory: &Memory, address: u64) -> io::Result<()> {
        let write = |bytes: &[u8], at| memory.write_slice(bytes, GuestAddress(at)).map_err(io::Error::other);
        write(&self.head, address)?;
        let begin = address + self.head.len() as u64;
        let mapped = self.length & !(PAGE - 1);
        if mapped > 0 {
            sys::map_private(memory, GuestAddress(begin), &self.init, 0, mapped)?;
        }
        let mut rest = &self.init;
        rest.seek(SeekFrom::Start(mapped))?;
        memory
            .read_exact_volatile_from(
                GuestAddress(begin + mapped),
                &mut rest,
                usize::try_from(self.length - mapped).map_err(io::Error::other)?,
            )
            .map_err(io::Error::other)?;
        write(&self.tail, begin + self.length)
    }
}

/// Zeros after so many bytes of data.
fn padding(length: u64) -> usize {
    usize::try_from(length.next_multiple_of(4) - length).unwrap_or_default()
}

struct Archive(Vec<u8>);

impl Archive {
    /// A header and a name; the data follows on a multiple of four bytes.
    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), size: u32) {
        // ino, mode, uid, gid, nlink, mtime, filesize, dev (2), rdev (2), namesize, check
        let inode = self.0.len();
        let name_size = name.len() + 1;
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}{name_size:08x}{0:08x}",
            0, 1
        );
        let begin = self.0.len();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(name.as_bytes());
        let end = begin + (header.len() + name_size).next_multiple_of(4);
        self.0.resize(end, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn archive_of(contents: &[u8]) -> Vec<u8> {
        let path = std::env::temp_dir().join(format!("cubby-init-{}-{}", std::process::id(), contents.len()));
        std::fs::write(&path, contents).unwrap();
        let initramfs = Initramfs::with_init(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let memory = crate::memory::map(64).unwrap();
        initramfs.place(&memory, 0x10_0000).unwrap();
        let mut archive = vec![0; usize::try_from(initramfs.size()).unwrap()];
        memory.read_slice(&mut archive, GuestAddress(0x10_0000)).unwrap();
        archive
    }

    fn cpio(archive: &[u8], arguments: &[&str]) -> String {
        let mut cpio = Command::new("cpio")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(archive).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn cpio_reads_the_archive_back() {
        for length in [0usize, 1, 4095, 4096, 4097, 12_290] {
            let contents: Vec<u8> = (0..length).map(|at| b'a' + (at % 26) as u8).collect();
            let archive = archive_of(&contents);
            let archive = &archive[archive.iter().position(|byte| *byte != 0).unwrap()..];
            let listing = cpio(archive, &["-itv", "--quiet"]);
            let lines: Vec<&str> = listing.lines().collect();
            assert_eq!(lines.len(), 4, "{listing}");
            assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" dev"), "{listing}");
            assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,"), "{listing}");
            assert!(lines[2].starts_with("crw-------") && lines[2].contains("1,"), "{listing}");
            assert!(lines[3].starts_with("-rwxr-xr-x") && lines[3].ends_with(" init"), "{listing}");
            assert_eq!(cpio(archive, &["-i", "--quiet", "--to-stdout", "init"]).as_bytes(), contents);
        }
    }
}
