//! Puts an uncompressed kernel into guest memory where it was linked to run.

use std::fs::File;
use std::path::Path;

use cubby_devices::Memory;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use crate::arch::layout;
use crate::config::Error;

/// Where a loaded kernel begins to run and where its image ends.
pub(crate) struct Loaded {
    pub(crate) entry: u64,
    pub(crate) end: u64,
}

/// Loads the ELF file at `path`.
pub(crate) fn load(memory: &Memory, path: &Path) -> Result<Loaded, Error> {
    let failed = |why: String| Error::Kernel { path: path.into(), why };
    let mut file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let loaded = Elf::load(memory, None, &mut file, Some(GuestAddress(layout::HIGH_START)))
        .map_err(|error| failed(format!("{error} (an uncompressed x86_64 vmlinux is needed)")))?;
    Ok(Loaded { entry: loaded.kernel_load.0, end: loaded.kernel_end })
}
