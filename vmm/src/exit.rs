//! How a VM ended, as a value. The first vCPU or caller to end it decides; nobody guesses from exit codes.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the vCPUs run no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest said through the embedder's mark port that it is done.
    PowerOff,
    /// The guest asked the keyboard controller for a reset, as Linux does for `reboot=k`.
    Reset,
    /// A triple fault: the guest cannot take even its double-fault handler.
    TripleFault,
    /// KVM could not go on with the guest.
    KvmFailure {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM reported.
        reason: String,
    },
    /// The embedder ended it.
    Killed,
}

/// The place where the first [`Exit`] is kept, with a descriptor that becomes readable then.
pub(crate) struct ExitSlot {
    value: Mutex<Option<Exit>>,
    event: EventFd,
}

impl ExitSlot {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { value: Mutex::new(None), event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Keeps `exit` unless the VM has ended already.
    pub(crate) fn set(&self, exit: Exit) {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        if value.is_none() {
            *value = Some(exit);
            // A write of one to a counter that was never read cannot overflow it.
            let _ = self.event.write(1);
        }
    }

    pub(crate) fn get(&self) -> Option<Exit> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_exit_stays() {
        let slot = ExitSlot::new().unwrap();
        assert_eq!(slot.get(), None);
        assert!(slot.event().read().is_err());
        slot.set(Exit::Reset);
        slot.set(Exit::Killed);
        assert_eq!(slot.get(), Some(Exit::Reset));
        assert_eq!(slot.event().read().unwrap(), 1);
    }
}
