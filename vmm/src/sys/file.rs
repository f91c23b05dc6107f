//! Positioned, vectored file I/O straight between a file and guest memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use cubby_devices::Slice;

/// The most segments that one call takes (`IOV_MAX` of Linux).
const SEGMENTS: usize = 1024;

/// Fills all of `to` from `offset` on; the end of the file before that is an error.
pub(crate) fn read_exact_at(file: &File, offset: u64, to: &[Slice<'_>]) -> io::Result<()> {
    transfer(to, offset, |iovecs, count, at| {
        // SAFETY: each iovec is a live range of guest memory, for which any write by the kernel is sound:
        // no Rust reference to it exists, and `to` keeps the mapping.
        unsafe { libc::preadv(file.as_raw_fd(), iovecs, count, at) }
    })
}

/// Writes all of `from` at `offset`.
pub(crate) fn write_all_at(file: &File, offset: u64, from: &[Slice<'_>]) -> io::Result<()> {
    transfer(from, offset, |iovecs, count, at| {
        // SAFETY: each iovec is a live range of guest memory, which the kernel only reads.
        unsafe { libc::pwritev(file.as_raw_fd(), iovecs, count, at) }
    })
}

/// Gives a range's space back; it reads as zeros. The file's length stays.
pub(crate) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    allocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
}

/// Makes a range read as zeros and keeps its space.
pub(crate) fn zero_range(file: &File, offset: u64, length: u64) -> io::Result<()> {
    allocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
}

/// Takes the host's page cache out of the way of later reads and writes.
pub(crate) fn set_direct(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: these two calls pass no pointer.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    match unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn allocate(file: &File, mode: i32, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, signed(offset)?, signed(length)?) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn transfer(
    segments: &[Slice<'_>],
    offset: u64,
    mut call: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut iovecs = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; SEGMENTS];
    let mut offset = offset;
    for group in segments.chunks(SEGMENTS) {
        for (iovec, segment) in iovecs.iter_mut().zip(group) {
            *iovec =
                libc::iovec { iov_base: segment.ptr_guard_mut().as_ptr().cast(), iov_len: segment.len() };
        }
        let mut rest = iovecs.get_mut(..group.len()).unwrap_or_default();
        while let Some(first) = rest.first() {
            if first.iov_len == 0 {
                rest = rest.split_first_mut().map(|(_, later)| later).unwrap_or_default();
                continue;
            }
            let count = libc::c_int::try_from(rest.len()).unwrap_or(libc::c_int::MAX);
            let done = match usize::try_from(call(rest.as_ptr(), count, signed(offset)?)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => done,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
            };
            offset = offset.saturating_add(done as u64);
            rest = advance(rest, done);
        }
    }
    Ok(())
}

/// What is left of `iovecs` after `done` bytes.
fn advance(iovecs: &mut [libc::iovec], done: usize) -> &mut [libc::iovec] {
    let mut done = done;
    let mut whole = 0;
    for iovec in iovecs.iter_mut() {
        if done < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(done);
            iovec.iov_len -= done;
            break;
        }
        done -= iovec.iov_len;
        whole += 1;
    }
    iovecs.get_mut(whole..).unwrap_or_default()
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn segments_and_file_agree_in_both_directions() {
        let path = std::env::temp_dir().join(format!("cubby-file-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.write_all(&[0; 10_000]).unwrap();
        let mut memory: Vec<u8> = (0..=255).cycle().take(9000).collect();
        let whole = Slice::from(memory.as_mut_slice());
        let parts: Vec<_> = (0..9).map(|part| whole.subslice(part * 1000, 1000).unwrap()).collect();
        write_all_at(&file, 500, &parts).unwrap();
        punch_hole(&file, 600, 100).unwrap();
        let mut back = vec![0xffu8; 9500];
        read_exact_at(&file, 0, &[Slice::from(back.as_mut_slice())]).unwrap();
        let expected = |at: usize| match at {
            0..500 | 600..700 => 0,
            _ => ((at - 500) % 256) as u8,
        };
        assert!(back.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        let mut beyond = vec![0; 600];
        let error = read_exact_at(&file, 9500, &[Slice::from(beyond.as_mut_slice())]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        drop(file.read(&mut beyond));
    }

    #[test]
    fn advancing_stops_inside_a_segment() {
        let mut bytes = [0u8; 10];
        let base = bytes.as_mut_ptr();
        let mut iovecs = [
            libc::iovec { iov_base: base.cast(), iov_len: 4 },
            libc::iovec { iov_base: base.wrapping_add(4).cast(), iov_len: 6 },
        ];
        let rest = advance(&mut iovecs, 5);
        assert_eq!(rest.len(), 1);
        assert_eq!((rest[0].iov_base, rest[0].iov_len), (base.wrapping_add(5).cast(), 5));
        assert!(advance(rest, 5).is_empty());
    }
}
