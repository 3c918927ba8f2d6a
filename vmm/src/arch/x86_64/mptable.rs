// SPDX-License-Identifier: Apache-2.0
//! The MP table: tells a kernel without ACPI about CPUs, the IOAPIC and interrupt wiring
//! (Intel MultiProcessor Specification 1.4, chapter 4).

use super::layout::{IOAPIC, IOAPIC_PINS, LAPIC, MPTABLE};

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const SPEC_REVISION: u8 = 4;
/// Version of an integrated APIC.
const APIC_VERSION: u8 = 0x14;
/// Family 6 with FPU and APIC: enough for a kernel that reads CPUID anyway.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const ALL_LOCAL_APICS: u8 = 0xff;

/// The bytes of the MP table for `vcpus` CPUs, to be put at [`MPTABLE`].
pub(crate) fn mptable(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for cpu in 0..vcpus {
        let bootstrap = u8::from(cpu == 0) << 1;
        let mut entry = vec![PROCESSOR, cpu, APIC_VERSION, 1 | bootstrap];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = vec![IO_APIC, ioapic_id, APIC_VERSION, 1];
    ioapic.extend(address(IOAPIC));
    add(&ioapic);
    for pin in 0..IOAPIC_PINS {
        // Type 0: a vectored interrupt; flags 0: as usual for the bus, that is edge, active high.
        add(&[IO_INTERRUPT, 0, 0, 0, 0, pin, ioapic_id, pin]);
    }
    const EXT_INT: u8 = 3;
    const NMI: u8 = 1;
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);

    let mut table = pointer();
    table.extend(header(&entries, count));
    table.extend(entries);
    table
}

fn address(value: u64) -> [u8; 4] {
    u32::try_from(value)
        .expect("constant addresses of the layout lie below 4 GiB")
        .to_le_bytes()
}

fn pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(address(MPTABLE + POINTER_SIZE as u64));
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&[&pointer]);
    pointer
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let length = u16::try_from(HEADER_SIZE + entries.len())
        .expect("a table for at most 255 CPUs is smaller than 64 KiB");
    let mut header = b"PCMP".to_vec();
    header.extend(length.to_le_bytes());
    header.extend([SPEC_REVISION, 0]);
    header.extend(b"SANDBOX MICROVM     ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(address(LAPIC));
    header.extend([0; 4]);
    header[7] = checksum(&[&header, entries]);
    header
}

/// The byte that makes the sum of all bytes zero.
fn checksum(parts: &[&[u8]]) -> u8 {
    parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::MPTABLE_SIZE;

    #[test]
    fn checksums_are_zero_and_the_largest_fits() {
        for vcpus in [1, 2, 32] {
            let table = mptable(vcpus);
            assert!(table.len() as u64 <= MPTABLE_SIZE, "{} bytes", table.len());
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum(&table[..POINTER_SIZE]), 0);
            assert_eq!(sum(&table[POINTER_SIZE..]), 0);
        }
    }

    #[test]
    fn entry_count_matches_the_entries() {
        let table = mptable(4);
        let count = u16::from_le_bytes([table[POINTER_SIZE + 34], table[POINTER_SIZE + 35]]);
        // CPUs, bus, IOAPIC, pins, two local interrupts.
        assert_eq!(count, 4 + 1 + 1 + u16::from(IOAPIC_PINS) + 2);
        let expected = POINTER_SIZE + HEADER_SIZE + 4 * 20 + (usize::from(count) - 4) * 8;
        assert_eq!(table.len(), expected);
    }
}
