//! Guest memory: one memfd, mapped shared, in one range below the 32-bit device hole and one above 4 GiB.

use std::io;

use cubby_devices::Memory;
use vm_memory::{FileOffset, GuestAddress};

use crate::arch::layout;
use crate::config::Error;
use crate::sys;

/// Maps guest memory of `mib` MiB. Pages are allocated when they are first touched.
pub(crate) fn map(mib: u32) -> Result<Memory, Error> {
    let failed = |source| Error::Memory { mib, source };
    let size = usize::try_from(u64::from(mib) << 20)
        .map_err(|_| failed(io::Error::from(io::ErrorKind::OutOfMemory)))?;
    let file = sys::memfd("cubbyhole-guest", size as u64).map_err(failed)?;
    let low = size.min(layout::LOW_MEMORY_LIMIT);
    let file = FileOffset::new(file, 0);
    let mut ranges = vec![(GuestAddress(0), low, Some(file.clone()))];
    if size > low {
        let rest = FileOffset::from_arc(file.arc().clone(), low as u64);
        ranges.push((GuestAddress(layout::HIGH_MEMORY_START), size - low, Some(rest)));
    }
    Memory::from_ranges_with_files(ranges).map_err(|error| failed(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_over_the_hole_is_two_ranges_of_one_file() {
        let memory = map(4096).unwrap();
        assert_eq!(memory.num_regions(), 2);
        memory.write_obj(7u8, GuestAddress(layout::HIGH_MEMORY_START)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(layout::LOW_MEMORY_LIMIT as u64)).is_err());
        let small = map(64).unwrap();
        assert_eq!(small.num_regions(), 1);
        assert!(small.write_obj(7u8, GuestAddress(64 << 20)).is_err());
    }
}
