//! Guest memory's file and its KVM memory slots.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// A file of `size` bytes in memory that no other process can open.
pub(crate) fn memfd(name: &str, size: u64) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: `name` is a valid C string for the call, which keeps no pointer to it.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
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
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}
