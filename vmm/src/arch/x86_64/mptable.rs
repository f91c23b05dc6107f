//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of processors
//! and interrupt wiring. One ISA bus whose line *n* is the I/O APIC's pin *n*.

use super::layout;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Local APIC version that KVM's in-kernel controller reports.
const APIC_VERSION: u8 = 0x14;

/// The floating pointer and the table behind it, for `vcpus` processors, as they lie at
/// [`layout::MP_TABLE`].
pub(super) fn build(vcpus: u8) -> Vec<u8> {
    let mut entries: Vec<u8> = Vec::with_capacity(layout::MP_TABLE_MAX);
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        // §4.3.1: enabled, and the first is the bootstrap processor. Family and features are CPUID's to tell.
        let flags = if id == 0 { 3 } else { 1 };
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, id, APIC_VERSION, flags]);
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a0, a1, a2, a3] = layout::IO_APIC.to_le_bytes();
    add(&[IO_APIC, vcpus, 0x11, 1, a0, a1, a2, a3]);
    for pin in 0..24u8 {
        // §4.3.4: vectored interrupt, polarity and trigger as the bus has them (edge, active high).
        add(&[IO_INTERRUPT, 0, 0, 0, 0, pin, vcpus, pin]);
    }
    // §4.3.5: LINT0 takes the 8259's interrupts, LINT1 the NMI, on every processor (0xff).
    add(&[LOCAL_INTERRUPT, 3, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, 1, 0, 0, 0, 0, 0xff, 1]);

    const POINTER: usize = 16;
    const HEADER: usize = 44;
    let mut pointer = [0u8; POINTER];
    pointer[..4].copy_from_slice(b"_MP_");
    #[allow(clippy::cast_possible_truncation)] // The address is below 1 MiB.
    pointer[4..8].copy_from_slice(&(layout::MP_TABLE as u32 + POINTER as u32).to_le_bytes());
    pointer[8] = 1; // length in 16-byte units
    pointer[9] = 4; // version 1.4
    pointer[10] = checksum(&[&pointer]);

    let length = u16::try_from(HEADER + entries.len()).unwrap_or(u16::MAX);
    let mut header = [0u8; HEADER];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&length.to_le_bytes());
    header[6] = 4;
    header[8..16].copy_from_slice(b"CUBBYHOL");
    header[16..28].copy_from_slice(b"MICROVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    header[7] = checksum(&[&header, &entries]);

    [&pointer[..], &header, &entries].concat()
}

/// The byte that makes the sum of all bytes zero.
fn checksum(parts: &[&[u8]]) -> u8 {
    parts.iter().flat_map(|part| part.iter()).fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_sum_to_zero_and_fit_for_every_number_of_processors() {
        for vcpus in 1..=layout::MAX_VCPUS {
            let table = build(vcpus);
            assert!(table.len() <= layout::MP_TABLE_MAX, "{vcpus} vCPUs need {} bytes", table.len());
            let (pointer, rest) = table.split_at(16);
            assert_eq!(checksum(&[pointer]), 0);
            assert_eq!(checksum(&[rest]), 0);
            let length = u16::from_le_bytes([rest[4], rest[5]]);
            assert_eq!(usize::from(length), rest.len());
            let count = u16::from_le_bytes([rest[34], rest[35]]);
            assert_eq!(count, u16::from(vcpus) + 1 + 1 + 24 + 2);
        }
    }
}
