//! What of this process needs `unsafe`: the fork that separates the keeper from the sandbox process, its signals,
//! and two calls of the lock-in. Everything else is rustix, the standard library, or `cubby-vmm`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use libc::{sock_filter, sock_fprog};
use rustix::process::{Pid, Signal};
use vmm_sys_util::signal::{block_signal, create_sigset};

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

/// Blocks `signals` for this thread and all that it makes from now on, and gives a descriptor from which they are
/// read instead (signalfd(2)), which does not block.
pub(crate) fn signal_descriptor(signals: &[Signal]) -> io::Result<File> {
    let numbers: Vec<i32> = signals.iter().map(|signal| signal.as_raw()).collect();
    for number in &numbers {
        // One that the application had blocked stays so, and is an error here.
        let _ = block_signal(*number);
    }
    let set = create_sigset(&numbers).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    // SAFETY: the set is a valid one, and the result is checked and owned by nobody else.
    unsafe {
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            descriptor => Ok(File::from_raw_fd(descriptor)),
        }
    }
}

/// Closes every descriptor but standard input, output and error. Only for the first line of `main`: nothing else
/// in the process may own a descriptor yet.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: no pointer is passed. No value of this process owns a descriptor over 2 so early, by this
    // function's contract, so that none is closed under its owner.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts a filter on the calling thread, which has `no_new_privs`.
pub(crate) fn install_filter(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions, which `program` borrows, and copies them before it returns.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
