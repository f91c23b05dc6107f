//! Guest memory: its KVM memory slots, the files mapped into it, the size of its pages.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use cubby_devices::Memory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// Asks for large pages in `length` bytes of `region` from `start` on, both multiples of a large page, when they are
/// first touched (madvise(2), `MADV_HUGEPAGE`; what most systems allow everybody).
pub(crate) fn prefer_large_pages(region: &GuestRegionMmap, start: usize, length: usize) -> io::Result<()> {
    let slice = region.get_slice(MemoryRegionAddress(start as u64), length).map_err(io::Error::other)?;
    // SAFETY: the range lies inside one live mapping, and the advice changes no contents.
    match unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), length, libc::MADV_HUGEPAGE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives `region` to the VM as memory slot `slot`. The caller keeps the mapping as long as the VM lives.
pub(crate) fn set_memory_slot(vm: &VmFd, slot: u32, region: &GuestRegionMmap) -> io::Result<()> {
    let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: host as u64,
    };
    // SAFETY: the range is a live mapping of this process that `Vm` drops after the VM's descriptor.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Puts `length` bytes of `file` from `offset` on into guest memory at `address` without copying them: the
/// pages are the page cache's until the guest writes to them. Everything is in whole pages.
pub(crate) fn map_private(
    memory: &Memory,
    address: GuestAddress,
    file: &File,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    let size = usize::try_from(length).map_err(io::Error::other)?;
    let slice = memory.get_slice(address, size).map_err(io::Error::other)?;
    let target = slice.ptr_guard_mut().as_ptr();
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: `target..target + size` lies inside one mapping of guest memory, to which no Rust reference
    // exists, and the new pages take its place for as long as it lives: the region unmaps them with its own.
    let mapped = unsafe {
        libc::mmap(
            target.cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}
