//! Puts an uncompressed kernel into guest memory where it was linked to run.
//!
//! Whole pages of the file are mapped, not copied: every VM on the host shares them with the page cache, and
//! a page is copied only when its guest writes to it. A page that the guest never touches costs nothing.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use cubby_devices::Memory;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::arch::layout;
use crate::config::Error;
use crate::sys;

const PAGE: u64 = 4096;

/// Magic number, class and byte order of a 64-bit little-endian object.
const ELF64_LITTLE_ENDIAN: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const EM_X86_64: u16 = 62;

/// Most program headers; a kernel has five.
const MAX_HEADERS: u16 = 64;

/// Where a loaded kernel begins to run and where its image ends.
pub(crate) struct Loaded {
    pub(crate) entry: u64,
    pub(crate) end: u64,
}

/// Loads the ELF file at `path` (System V ABI, "Object Files" and "Program Loading").
///
/// The file must not be truncated while a VM runs; replacing it by renaming another over it is fine.
pub(crate) fn load(memory: &Memory, path: &Path) -> Result<Loaded, Error> {
    let failed = |why: &dyn std::fmt::Display| Error::Kernel { path: path.into(), why: why.to_string() };
    let mut file = File::open(path).map_err(|error| failed(&error))?;
    let size = file.metadata().map_err(|error| failed(&error))?.len();
    let mut header = Elf64_Ehdr::default();
    file.read_exact(header.as_mut_slice()).map_err(|error| failed(&error))?;
    if !header.e_ident.starts_with(&ELF64_LITTLE_ENDIAN)
        || header.e_machine != EM_X86_64
        || header.e_phnum > MAX_HEADERS
    {
        return Err(failed(&"it is not an uncompressed x86_64 kernel (vmlinux, ELF)"));
    }
    let mut segments = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    file.seek(SeekFrom::Start(header.e_phoff)).map_err(|error| failed(&error))?;
    for segment in &mut segments {
        file.read_exact(segment.as_mut_slice()).map_err(|error| failed(&error))?;
    }
    let mut end = 0;
    for segment in segments.iter().filter(|segment| segment.p_type == PT_LOAD) {
        let last = segment.p_paddr.checked_add(segment.p_memsz.max(segment.p_filesz));
        let in_file = segment.p_offset.checked_add(segment.p_filesz).is_some_and(|last| last <= size);
        match last {
            Some(last) if in_file && segment.p_paddr >= layout::HIGH_START => end = end.max(last),
            _ => return Err(failed(&"a segment lies outside the file or below 1 MiB")),
        }
        place(memory, &mut file, segment).map_err(|error| failed(&error))?;
    }
    if end == 0 || header.e_entry < layout::HIGH_START || header.e_entry >= end {
        return Err(failed(&"its entry point is not in it"));
    }
    Ok(Loaded { entry: header.e_entry, end })
}

/// Maps the whole pages of a segment and copies what is left of it. Memory behind it is zero already.
fn place(memory: &Memory, file: &mut File, segment: &Elf64_Phdr) -> Result<(), String> {
    let aligned = segment.p_paddr.is_multiple_of(PAGE) && segment.p_offset.is_multiple_of(PAGE);
    let mapped = if aligned { segment.p_filesz & !(PAGE - 1) } else { 0 };
    if mapped > 0 {
        sys::map_private(memory, GuestAddress(segment.p_paddr), file, segment.p_offset, mapped)
            .map_err(|error| format!("mapping a segment at {:#x}: {error}", segment.p_paddr))?;
    }
    let rest = usize::try_from(segment.p_filesz - mapped).map_err(|error| error.to_string())?;
    file.seek(SeekFrom::Start(segment.p_offset + mapped)).map_err(|error| error.to_string())?;
    memory
        .read_exact_volatile_from(GuestAddress(segment.p_paddr + mapped), file, rest)
        .map_err(|error| format!("reading a segment at {:#x}: {error}", segment.p_paddr))
}
