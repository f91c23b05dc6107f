//! Taking a vCPU out of `KVM_RUN` from another thread: a signal whose handler sets `immediate_exit`.
//!
//! The signal alone would be lost if it came between the thread's last look at its commands and the
//! ioctl; the flag makes the next `KVM_RUN` return at once instead (KVM API, "immediate_exit").

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::os::raw::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let _ = IMMEDIATE_EXIT.try_with(|target| {
        let flag = target.get();
        if !flag.is_null() {
            // SAFETY: `KickTarget` sets the pointer to this thread's mapped kvm_run and clears it before
            // the mapping goes; the handler runs on this thread, so neither can happen meanwhile.
            unsafe { ptr::write_volatile(flag, 1) };
        }
    });
}

/// Installs the handler, once a process.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    (*INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| error.errno())))
        .map_err(io::Error::from_raw_os_error)
}

/// Interrupts the vCPU that runs on `thread`, which holds a [`KickTarget`].
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // The signal number is valid and the handle is a thread's: there is nothing that can fail.
    let _ = thread.kill(SIGRTMIN());
}

/// While it lives, kicks of the current thread interrupt the vCPU it was made from.
pub(crate) struct KickTarget {
    stay_on_this_thread: PhantomData<*mut ()>,
}

impl KickTarget {
    /// Makes the current thread the one that runs `vcpu`, which must outlive the value.
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self { stay_on_this_thread: PhantomData }
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
