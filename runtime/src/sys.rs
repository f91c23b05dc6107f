//! The one system call of this process that needs `unsafe`: the fork that separates the keeper from the sandbox
//! process. Everything else is rustix, the standard library, or `cubby-vmm`.
#![allow(unsafe_code)]

use std::io;

use rustix::process::Pid;

/// Which of the two processes this one is after a [`fork`].
pub(crate) enum Forked {
    /// The one that called; the new one has this pid.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Makes a copy of this process, which must have one thread only.
pub(crate) fn fork() -> io::Result<Forked> {
    debug_assert!(std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1));
    // SAFETY: there is no other thread, so that no lock is held and nothing is half written in the copy. Both
    // processes may go on with any code.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid).map_or(Forked::Child, Forked::Parent)),
    }
}
