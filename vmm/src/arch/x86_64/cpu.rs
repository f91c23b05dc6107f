//! A processor before its first instruction: CPUID, the registers of 64-bit mode, the local APIC.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::layout;
use crate::config::Error;

/// The leaves of caches (Intel's two, AMD's three), of which the C library asks again and again at each program's
/// start: for GNU's on AMD 24 of 33. They come first, since KVM looks for a leaf from the beginning.
const ASKED_BY_PROGRAMS: [u32; 5] = [0x2, 0x4, 0x8000_0000, 0x8000_0005, 0x8000_0006];

/// What the host's processors and KVM offer to guests; the same for every vCPU but for its number.
pub(crate) struct CpuTemplate {
    supported: CpuId,
    tsc_deadline: bool,
}

impl CpuTemplate {
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, Error> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { supported, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// The CPUID of vCPU `index` of `count`: one package, a core each, no threads.
    fn for_vcpu(&self, index: u8, count: u8) -> CpuId {
        let mut cpuid = self.supported.clone();
        for entry in cpuid.as_mut_slice() {
            adjust(entry, u32::from(index), u32::from(count), self.tsc_deadline);
        }
        cpuid.as_mut_slice().sort_by_key(|entry| !ASKED_BY_PROGRAMS.contains(&entry.function));
        cpuid
    }
}

/// Sets the fields of a CPUID leaf that are the VMM's to decide (Intel SDM vol. 2A, CPUID; AMD APM vol. 3,
/// appendix E).
fn adjust(entry: &mut kvm_cpuid_entry2, index: u32, count: u32, tsc_deadline: bool) {
    let core_bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (index << 24);
            // A timer that needs no calibration, and no I/O port: Linux then needs no PIT.
            entry.ecx = set_bit(entry.ecx, 24, tsc_deadline);
            entry.ecx |= 1 << 31; // a hypervisor is present
            entry.edx = set_bit(entry.edx, 28, count > 1);
        }
        // Deterministic cache parameters: caches below the third level are a core's own.
        0x4 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((count - 1) << 26);
        }
        0x6 => entry.eax |= 1 << 2, // the APIC timer never stops
        // No performance counters: probing them costs boot time and they tell about the host.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0xb | 0x1f => {
            entry.edx = index;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (core_bits, count, 1 | (2 << 8)),
                level => (0, 0, level),
            };
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (core_bits << 12) | (count - 1),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
        _ => {}
    }
}

fn set_bit(word: u32, bit: u32, on: bool) -> u32 {
    (word & !(1 << bit)) | (u32::from(on) << bit)
}

/// Prepares vCPU `index` of `count`. The first starts at `entry`; the others wait for its start-up
/// interrupts.
pub(crate) fn set_up(
    vcpu: &VcpuFd,
    template: &CpuTemplate,
    index: u8,
    count: u8,
    entry: u64,
) -> Result<(), Error> {
    vcpu.set_cpuid2(&template.for_vcpu(index, count)).map_err(Error::kvm("KVM_SET_CPUID2"))?;
    set_msrs(vcpu)?;
    set_local_interrupts(vcpu)?;
    if index == 0 {
        enter_long_mode(vcpu)?;
        let regs = kvm_regs {
            rflags: 2,
            rip: entry,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rsi: layout::ZERO_PAGE,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))?;
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        vcpu.set_fpu(&fpu).map_err(Error::kvm("KVM_SET_FPU"))?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[
        entry(IA32_MISC_ENABLE, FAST_STRINGS),
        entry(IA32_MTRR_DEF_TYPE, ENABLED_WRITE_BACK),
    ])
    .map_err(|_| Error::Kvm { call: "KVM_SET_MSRS", source: std::io::ErrorKind::OutOfMemory.into() })?;
    let set = vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
    if set < msrs.as_slice().len() {
        return Err(Error::Kvm { call: "KVM_SET_MSRS", source: std::io::ErrorKind::Unsupported.into() });
    }
    Ok(())
}

/// LINT0 delivers the 8259's interrupts and LINT1 the NMI, as the MP table says (Intel SDM vol. 3A,
/// "Local Vector Table").
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXTINT: u32 = 0x700;
    const NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, EXTINT);
    set_delivery_mode(&mut lapic, LVT_LINT1, NMI);
    vcpu.set_lapic(&lapic).map_err(Error::kvm("KVM_SET_LAPIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
        for (byte, value) in bytes.iter_mut().zip(mode.to_le_bytes()).skip(1).take(1) {
            let value = i8::from_le_bytes([value]);
            *byte = (*byte & !7) | value;
        }
    }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Error> {
    const CR0_PE_ET_PG: u64 = (1 << 31) | (1 << 4) | 1;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let code = segment(0x10, 0xb, true);
    let data = segment(0x18, 0x3, false);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 39;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { s: 0, ..segment(0x20, 0xb, false) };
    sregs.cr0 = CR0_PE_ET_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))
}

/// A flat segment of 4 GiB (AMD APM vol. 2, §4.7 and §4.8).
fn segment(selector: u16, kind: u8, long_code: bool) -> kvm_segment {
    kvm_segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long_code),
        db: u8::from(!long_code),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, cpu: u32, count: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 { function, index, eax: 3 << 5, ..Default::default() };
        adjust(&mut entry, cpu, count, true);
        entry
    }

    #[test]
    fn what_programs_ask_for_comes_first_and_nothing_is_lost() {
        let given: Vec<_> = [0, 1, 4, 4, 7, 0x8000_0000, 0x8000_0001, 0x8000_0006]
            .into_iter()
            .zip(0..)
            .map(|(function, index)| kvm_cpuid_entry2 { function, index, ..Default::default() })
            .collect();
        let supported = CpuId::from_entries(&given).unwrap();
        let cpuid = CpuTemplate { supported, tsc_deadline: true }.for_vcpu(0, 1);
        let leaves: Vec<_> = cpuid.as_slice().iter().map(|entry| (entry.function, entry.index)).collect();
        let rest = [(0, 0), (1, 1), (7, 4), (0x8000_0001, 6)];
        assert_eq!(leaves, [&[(4, 2), (4, 3), (0x8000_0000, 5), (0x8000_0006, 7)][..], &rest].concat());
    }

    #[test]
    fn every_vcpu_is_a_core_of_one_package() {
        let first = leaf(1, 0, 3, 6);
        assert_eq!(first.ebx, (6 << 16) | (3 << 24));
        assert_eq!(first.ecx & (1 << 31 | 1 << 24), 1 << 31 | 1 << 24);
        let threads = leaf(0xb, 0, 3, 6);
        assert_eq!((threads.eax, threads.ebx, threads.edx), (0, 1, 3));
        let cores = leaf(0xb, 1, 3, 6);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 3));
        assert_eq!(leaf(0x8000_0008, 0, 3, 6).ecx, (3 << 12) | 5);
        assert_eq!(leaf(0x8000_001e, 0, 3, 6).eax, 3);
        assert_eq!(leaf(4, 3, 3, 6).eax >> 14, (5 << 12) | 5);
    }

    #[test]
    fn lint_delivery_modes_change_only_their_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x351] = 0x10;
        set_delivery_mode(&mut lapic, 0x350, 0x700);
        assert_eq!(lapic.regs[0x350..0x354], [0, 0x17, 0, 0]);
    }
}
