//! Keeps a pull from filling the disk: whoever writes asks here first.
use std::{fs::File, path::Path};

use rustix::fs::fstatvfs;

use crate::Error;

/// How often, in bytes written, the free space is looked at.
const CHECK: u64 = 64 << 20;

/// The watch over one file's growth.
pub(crate) struct Space {
    min_free: u64,
    unchecked: u64,
}

impl Space {
    /// `min_free` bytes are to stay free.
    pub(crate) fn new(min_free: u64) -> Self {
        Self { min_free, unchecked: CHECK }
    }

    /// Fails if the next bytes could leave too little.
    pub(crate) fn about_to_write(&mut self, file: &File, path: &Path, bytes: usize) -> Result<(), Error> {
        self.unchecked += bytes as u64;
        if self.unchecked < CHECK {
            return Ok(());
        }
        self.unchecked = 0;
        let space = fstatvfs(file).map_err(|e| Error::io("measure", path)(e.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < self.min_free.saturating_add(CHECK) {
            return Err(Error::NoSpace { path: path.to_owned(), free, reserve: self.min_free });
        }
        Ok(())
    }
}
