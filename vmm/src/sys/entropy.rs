//! The host's random numbers.

use std::io;

use cubby_devices::rng::EntropySource;

/// `getrandom(2)`: never blocks once the host has booted.
pub(crate) struct OsEntropy;

impl EntropySource for OsEntropy {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        while !rest.is_empty() {
            // SAFETY: the kernel writes at most `rest.len()` bytes to memory that `rest` borrows mutably.
            let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
            match usize::try_from(count) {
                Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}
