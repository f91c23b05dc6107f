//! A raw file as a disk's backend. Bytes move between the file and guest memory with no copy in between.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use cubby_devices::Slice;
use cubby_devices::blk::{Backend, Blk, Options};

use crate::config::{Disk, DiskCache, Error};
use crate::sys;

pub(crate) struct RawFile {
    file: File,
    length: u64,
}

/// Makes the device for disk number `index`.
pub(crate) fn open(index: usize, disk: Disk) -> Result<Blk<RawFile>, Error> {
    let failed = |source| Error::Disk { index, source };
    let length = disk.file.metadata().map_err(failed)?.len();
    if disk.cache == DiskCache::Direct {
        sys::set_direct(&disk.file).map_err(failed)?;
    }
    let mut id = [0; 20];
    for (to, from) in id.iter_mut().zip(disk.serial.bytes()) {
        *to = from;
    }
    let options = Options { read_only: disk.read_only, id, ..Options::default() };
    Ok(Blk::new(RawFile { file: disk.file, length }, options))
}

impl Backend for RawFile {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_at(&mut self, offset: u64, to: &[Slice<'_>]) -> io::Result<()> {
        sys::read_exact_at(&self.file, offset, to)
    }

    fn write_at(&mut self, offset: u64, from: &[Slice<'_>]) -> io::Result<()> {
        sys::write_all_at(&self.file, offset, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        sys::punch_hole(&self.file, offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let result = match unmap {
            true => sys::punch_hole(&self.file, offset, len),
            false => sys::zero_range(&self.file, offset, len),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, len),
            result => result,
        }
    }
}

impl RawFile {
    /// For file systems that cannot do better.
    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < len {
            let piece = usize::try_from(len - done).unwrap_or(ZEROS.len()).min(ZEROS.len());
            let zeros = ZEROS.get(..piece).unwrap_or(&ZEROS);
            self.file.write_all_at(zeros, offset + done)?;
            done += piece as u64;
        }
        Ok(())
    }
}
