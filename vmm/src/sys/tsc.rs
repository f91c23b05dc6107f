//! A vCPU's time stamp counter, held back by the time that the guest was paused.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The host's counter now.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: the instruction reads a counter, and every x86-64 processor has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Sets the vCPU's counter back by `ticks`. vCPUs that get the same number stay in step, which writing the counter
/// itself could not promise: KVM takes a write that is near to another for a wish to be equal to it.
///
/// # Errors
/// Linux before 5.16 has no such attribute (KVM documentation, "KVM_VCPU_TSC_OFFSET").
pub(crate) fn hold_back_tsc(vcpu: &VcpuFd, ticks: u64) -> io::Result<()> {
    let offset = AtomicU64::new(0);
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset.as_ptr().expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: the descriptor is a vCPU's, and KVM writes the attribute's eight bytes to an address of eight bytes that
    // may change behind a shared reference and live until the end of this function.
    if unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(io::Error::last_os_error());
    }
    offset.store(offset.load(Relaxed).wrapping_sub(ticks), Relaxed);
    // SAFETY: as above, and KVM only reads.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
