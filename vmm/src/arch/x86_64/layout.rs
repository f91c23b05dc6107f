//! The guest's physical address space.
//!
//! | from | to | what |
//! |---|---|---|
//! | `0x500` | | GDT |
//! | `0x7000` | `0x8000` | boot parameters ("zero page") |
//! | `0x9000` | `0xc000` | page tables: first GiB, identity |
//! | `0x20000` | `0x20800` | command line |
//! | `0x9fc00` | `0xa0000` | MP table, where a BIOS would keep its extended data |
//! | 1 MiB | 3328 MiB | memory; the kernel where it was linked, the initramfs at the end |
//! | 3328 MiB | 4 GiB | devices: virtio-mmio windows, I/O APIC, local APICs, KVM's TSS |
//! | 4 GiB | | the rest of memory |

/// The global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// `struct boot_params` of the Linux x86 boot protocol.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; nothing is pushed before the kernel sets its own.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4, and the two tables below it.
pub(crate) const PML4: u64 = 0x9000;
pub(crate) const PDPT: u64 = 0xa000;
pub(crate) const PD: u64 = 0xb000;
/// The kernel's command line, and the most that x86 Linux takes (`COMMAND_LINE_SIZE`), with its NUL.
pub(crate) const CMDLINE: u64 = 0x2_0000;
pub(crate) const CMDLINE_MAX: usize = 2048;
/// Linux looks for the MP floating pointer in the last KiB of base memory (MP specification 1.4, §4).
pub(crate) const MP_TABLE: u64 = 0x9_fc00;
pub(crate) const MP_TABLE_MAX: usize = 0x400;
/// Memory below 640 KiB ends where the MP table begins.
pub(crate) const BASE_MEMORY_END: u64 = MP_TABLE;
/// Everything above is the kernel's to use.
pub(crate) const HIGH_START: u64 = 0x10_0000;
/// Bytes of memory below the device hole.
pub(crate) const LOW_MEMORY_LIMIT: usize = 0xd000_0000;
/// Where memory goes on above the hole.
pub(crate) const HIGH_MEMORY_START: u64 = 1 << 32;
/// virtio-mmio windows, one page each.
pub(crate) const VIRTIO_MMIO: u64 = 0xd000_0000;
pub(crate) const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Three pages that KVM needs on Intel processors.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;
/// Interrupt controllers at their architectural addresses.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Serial port COM1.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_PORT_LAST: u16 = 0x3ff;
pub(crate) const SERIAL_GSI: u32 = 4;
/// Keyboard controller's data and command ports; only its reset line exists.
pub(crate) const I8042_PORT: u16 = 0x60;
/// I/O APIC pins for virtio devices, first and one past the last.
pub(crate) const VIRTIO_GSI: u32 = 5;
pub(crate) const GSI_END: u32 = 24;
/// The pin that KVM takes for a real-time clock's, whoever has it: it wants to see the end of each of its interrupts, which
/// is an exit that the others do without (paravirtual EOI).
const RTC_GSI: u32 = 8;

/// The pins for virtio devices in the order in which they are given out.
pub(crate) fn virtio_gsis() -> impl Iterator<Item = u32> {
    (VIRTIO_GSI..GSI_END).filter(|gsi| *gsi != RTC_GSI).chain([RTC_GSI])
}

/// Most vCPUs: the MP table's place holds so many.
pub(crate) const MAX_VCPUS: u8 = 32;
