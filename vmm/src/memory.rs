//! Guest memory: private anonymous mappings, one range below the 32-bit device hole and one above 4 GiB.
//!
//! They begin at a multiple of 2 MiB, as the guest's addresses do, so that KVM can map a large page of the host's as
//! one. Large pages are asked for where the guest's kernel is known to write all or nearly all at boot: its page
//! structures, and what it allocates first. Elsewhere a page comes when it is touched, 4 KiB at a time, so that an idle
//! sandbox stays small.

use std::io;

use cubby_devices::Memory;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use crate::arch::layout;
use crate::config::Error;
use crate::sys;

const LARGE_PAGE: usize = 2 << 20;

/// MiB of memory whose page structures (64 bytes for 4 KiB) fill one large page: a section of Linux's sparse memory
/// model, x86_64.
const SECTION_MIB: u32 = 128;

/// Where in the first range Linux's page allocator begins, offset and length: with the second of the blocks of 4 MiB, its
/// largest, that nobody has a part of. A guess from guests of 64 MiB to 3 GiB; those with a second range begin in that.
const FIRST_ALLOCATIONS: (usize, usize) = (8 << 20, 4 << 20);

/// Maps guest memory of `mib` MiB. Pages are allocated when they are first touched.
pub(crate) fn map(mib: u32) -> Result<Memory, Error> {
    let failed = |source| Error::Memory { mib, source };
    let size = usize::try_from(u64::from(mib) << 20)
        .map_err(|_| failed(io::Error::from(io::ErrorKind::OutOfMemory)))?;
    let low = size.min(layout::LOW_MEMORY_LIMIT);
    let region = |start, size| {
        GuestRegionMmap::new(aligned(size)?, GuestAddress(start))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let mut regions = vec![region(0, low).map_err(failed)?];
    if size > low {
        regions.push(region(layout::HIGH_MEMORY_START, size - low).map_err(failed)?);
    }
    let places = [
        regions.first().map(|first| (first, FIRST_ALLOCATIONS)),
        regions.last().and_then(|last| Some((last, page_structures(last, mib)?))),
    ];
    for (region, (start, length)) in places.into_iter().flatten() {
        // A kernel without large pages refuses; small ones do as well, a little later.
        let _ = sys::prefer_large_pages(region, start, length);
    }
    Memory::from_regions(regions).map_err(|error| failed(io::Error::other(error)))
}

/// Where in the last range Linux puts its page structures: it allocates from the top, and the uppermost 2 MiB are the
/// initramfs's or taken by what it allocates before. A guess: where it is wrong, the guest runs as well.
fn page_structures(last: &GuestRegionMmap, mib: u32) -> Option<(usize, usize)> {
    let length = usize::try_from(mib.div_ceil(SECTION_MIB)).ok()?.checked_mul(LARGE_PAGE)?;
    let end = (last.size() & !(LARGE_PAGE - 1)).checked_sub(LARGE_PAGE)?;
    Some((end.checked_sub(length)?, length))
}

/// A mapping that begins at a multiple of 2 MiB, if that can be had. Linux aligns large ones by itself from 6.7 on. An
/// older one puts each mapping right below the one before, so that one of the right size moves the next into place.
fn aligned(size: usize) -> io::Result<MmapRegion> {
    let map = |size| MmapRegion::new(size).map_err(io::Error::other);
    let first: MmapRegion = map(size)?;
    match first.as_ptr().addr() % LARGE_PAGE {
        0 => Ok(first),
        excess => {
            drop(first);
            let _above: MmapRegion = map(excess)?;
            map(size)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_over_the_hole_is_two_ranges() {
        let memory = map(4096).unwrap();
        assert_eq!(memory.num_regions(), 2);
        memory.write_obj(7u8, GuestAddress(layout::HIGH_MEMORY_START)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(layout::LOW_MEMORY_LIMIT as u64)).is_err());
        let small = map(64).unwrap();
        assert_eq!(small.num_regions(), 1);
        assert!(small.write_obj(7u8, GuestAddress(64 << 20)).is_err());
    }

    #[test]
    fn it_begins_where_a_large_page_can() {
        // Other threads map and unmap meanwhile, so one try is not enough.
        let aligned = |_| super::aligned(6 << 20).unwrap().as_ptr().addr().is_multiple_of(LARGE_PAGE);
        assert!((0..100).any(aligned));
    }

    #[test]
    fn page_structures_lie_below_the_uppermost_large_page() {
        let range = |size, mib| {
            page_structures(&GuestRegionMmap::from_range(GuestAddress(0), size, None).unwrap(), mib)
        };
        assert_eq!(range(512 << 20, 512), Some((502 << 20, 8 << 20)));
        assert_eq!(range(65 << 20, 65), Some((60 << 20, 2 << 20)));
        // More of them than the last range holds.
        assert_eq!(range(4 << 20, 3332), None);
    }
}
