//! What of this process needs `unsafe`: the fork that separates the keeper from the sandbox process. Everything else is rustix, the standard library, or `cubby-vmm`.
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

/// Makes a copy of this process, which must have one thread only. Its end can be waited for.
pub(crate) fn fork() -> io::Result<Forked> {
    debug_assert!(std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1));
    // An application may ignore SIGCHLD, which execve(2) passes on, and the kernel would then tell nobody how
    // the child ended.
    // SAFETY: no handler is installed, and there is none that another thread could rely on.
    if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: there is no other thread, so that no lock is held and nothing is half written in the copy. Both
    // processes may go on with any code.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid).map_or(Forked::Child, Forked::Parent)),
    }
}
