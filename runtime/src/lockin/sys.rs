//! The two system calls that need `unsafe`.
#![allow(unsafe_code)]

use std::io;

use libc::{sock_filter, sock_fprog};

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
pub(super) fn install_filter(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions, which `program` borrows, and copies them before it returns.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
