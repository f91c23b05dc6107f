//! Privileges: none, and none to be gained. They are a thread's own (capabilities(7)).

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::refused;

/// Takes from the calling thread, and from those it will start, every way to gain a privilege.
pub(super) fn gain_none() -> io::Result<()> {
    set_no_new_privs(true).map_err(|errno| refused("no_new_privs")(&errno))?;
    let failed = |errno: Errno| refused("capabilities")(&errno);
    clear_ambient_capability_set().map_err(failed)?;
    // The bounding set is root's to shrink. For all others no_new_privs makes it meaningless.
    if capabilities(None).map_err(failed)?.effective.contains(CapabilitySet::SETPCAP) {
        // The kernel may know more of them than the bindings: the first that it does not know is the end.
        for bit in 0..u64::BITS {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
                Ok(()) => {}
                Err(Errno::INVAL) => break,
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
    Ok(())
}

/// Takes from the calling thread the capabilities that it has.
pub(super) fn drop_all() -> io::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(|errno| refused("capabilities")(&errno))
}
