//! What the kernel finds in memory at its 64-bit entry point (Linux `Documentation/arch/x86/boot.rst`):
//! boot parameters with the memory map, command line, initramfs, page tables, GDT and MP table.

use cubby_devices::Memory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{layout, mptable};
use crate::config::Error;
use crate::initramfs::Initramfs;

const E820_RAM: u32 = 1;
/// Boot loader id: "undefined", as the protocol asks of loaders without a number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"

/// What is to be placed beside the kernel.
pub(crate) struct Boot<'a> {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    /// End of the kernel's image in guest memory.
    pub(crate) kernel_end: u64,
    pub(crate) cmdline: &'a str,
    pub(crate) initramfs: Option<&'a Initramfs>,
}

/// Writes all of it into guest memory.
pub(crate) fn place(memory: &Memory, boot: &Boot) -> Result<(), Error> {
    let mib = boot.memory_mib;
    let fit = |what, needed| move |_| Error::DoesNotFit { what, needed, mib };

    let low_end = memory.iter().next().map_or(0, |region| region.len());
    let size = boot.initramfs.map_or(0, Initramfs::size);
    let initramfs = low_end.saturating_sub(size) & !0xfff;
    if initramfs < boot.kernel_end || size > low_end {
        return Err(Error::DoesNotFit { what: "the initramfs", needed: size, mib });
    }
    if let Some(archive) = boot.initramfs {
        archive.place(memory, initramfs).map_err(Error::resource("the initramfs"))?;
    }

    let mut cmdline = boot.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    if cmdline.len() > layout::CMDLINE_MAX {
        return Err(Error::Config {
            field: "cmdline",
            given: format!("{} bytes long with the devices", boot.cmdline.len()),
            allowed: "x86 Linux takes 2047 bytes",
        });
    }
    let page = zero_page(memory, initramfs, size, cmdline.len());
    let pieces: [(u64, &[u8]); 5] = [
        (layout::CMDLINE, &cmdline),
        (layout::ZERO_PAGE, page.as_slice()),
        (layout::MP_TABLE, &mptable::build(boot.vcpus)),
        (layout::GDT, &gdt()),
        (layout::PML4, &page_tables()),
    ];
    for (address, bytes) in pieces {
        memory.write_slice(bytes, GuestAddress(address)).map_err(fit("boot data", bytes.len() as u64))?;
    }
    Ok(())
}

fn zero_page(memory: &Memory, initramfs: u64, initramfs_size: u64, cmdline_size: usize) -> boot_params {
    let mut page = boot_params::default();
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.version = 0x020f;
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.kernel_alignment = 0x100_0000;
    // Both lie below 4 GiB: `layout` says so, and `initramfs` is in the low range.
    page.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE).unwrap_or_default();
    page.hdr.cmdline_size = u32::try_from(cmdline_size).unwrap_or_default();
    if initramfs_size > 0 {
        page.hdr.ramdisk_image = u32::try_from(initramfs).unwrap_or_default();
        page.hdr.ramdisk_size = u32::try_from(initramfs_size).unwrap_or_default();
    }
    let low_end = memory.iter().next().map_or(0, |region| region.len());
    let ranges = [(0, layout::BASE_MEMORY_END), (layout::HIGH_START, low_end)].into_iter().chain(
        memory.iter().skip(1).map(|region| (region.start_addr().0, region.start_addr().0 + region.len())),
    );
    for ((start, end), slot) in ranges.zip(page.e820_table.iter_mut()) {
        *slot = boot_e820_entry { addr: start, size: end.saturating_sub(start), r#type: E820_RAM };
        page.e820_entries += 1;
    }
    page
}

/// Null, then 64-bit code, data and task-state segments: `__BOOT_CS` is 0x10 and `__BOOT_DS` 0x18, as the
/// boot protocol asks.
fn gdt() -> [u8; 40] {
    let entries: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
    let mut bytes = [0; 40];
    for (slot, entry) in bytes.chunks_exact_mut(8).zip(entries) {
        slot.copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

/// One PML4 entry, one PDPT entry, 512 large pages: the first GiB, identity.
fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let mut tables = vec![0u64; 3 * 512];
    if let Some((pml4, rest)) = tables.split_first_mut() {
        *pml4 = layout::PDPT | PRESENT_WRITABLE;
        if let Some(pdpt) = rest.get_mut(511) {
            *pdpt = layout::PD | PRESENT_WRITABLE;
        }
    }
    for (index, entry) in tables.iter_mut().skip(1024).enumerate() {
        *entry = ((index as u64) << 21) | LARGE | PRESENT_WRITABLE;
    }
    tables.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(initramfs: Option<&Initramfs>) -> Boot<'_> {
        Boot { vcpus: 1, memory_mib: 64, kernel_end: 0x180_0000, cmdline: "quiet", initramfs }
    }

    fn initramfs_of(length: u64) -> Initramfs {
        let path = std::env::temp_dir().join(format!("cubby-boot-{}-{length}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(length).unwrap();
        let archive = Initramfs::with_init(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        archive
    }

    #[test]
    fn memory_map_leaves_out_the_mp_table_and_the_device_hole() {
        let memory = crate::memory::map(4096).unwrap();
        let page = zero_page(&memory, 0, 0, 1);
        let entries: Vec<(u64, u64)> = page.e820_table[..usize::from(page.e820_entries)]
            .iter()
            .map(|entry| (entry.addr, entry.addr + entry.size))
            .collect();
        assert_eq!(entries, [(0, 0x9_fc00), (0x10_0000, 0xd000_0000), (1 << 32, (1 << 32) + 0x3000_0000)]);
    }

    #[test]
    fn an_initramfs_lies_at_the_end_of_low_memory_or_does_not_fit() {
        let memory = crate::memory::map(64).unwrap();
        let small = initramfs_of(3000);
        place(&memory, &boot(Some(&small))).unwrap();
        let mut page = [0; 4096];
        memory.read_slice(&mut page, GuestAddress((64 << 20) - 8192)).unwrap();
        assert!(page.windows(6).any(|bytes| bytes == b"070701"));
        let large = initramfs_of(41 << 20);
        assert!(matches!(place(&memory, &boot(Some(&large))), Err(Error::DoesNotFit { .. })));
    }

    #[test]
    fn a_long_command_line_is_refused() {
        let memory = crate::memory::map(64).unwrap();
        let cmdline = "x".repeat(layout::CMDLINE_MAX);
        let result = place(&memory, &Boot { cmdline: &cmdline, ..boot(None) });
        assert!(matches!(result, Err(Error::Config { field: "cmdline", .. })));
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let tables = page_tables();
        let entry = |index: usize| u64::from_le_bytes(tables[index * 8..][..8].try_into().unwrap());
        assert_eq!(entry(0), layout::PDPT | 3);
        assert_eq!(entry(512), layout::PD | 3);
        assert_eq!(entry(1024), 0x83);
        assert_eq!(entry(1024 + 511), 0x3fe0_0083);
    }
}
