//! The one system call that needs `unsafe`.
#![allow(unsafe_code)]

use std::io;

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
