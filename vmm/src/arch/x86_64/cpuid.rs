// SPDX-License-Identifier: Apache-2.0
//! What a vCPU says it is: KVM's supported leaves, with identity and topology filled in.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// CPUID leaves (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E).
const FEATURES: u32 = 1;
const CACHE_TOPOLOGY: u32 = 4;
const EXTENDED_TOPOLOGY: u32 = 0xb;
const EXTENDED_TOPOLOGY_V2: u32 = 0x1f;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// KVM_CPUID_FEATURES (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;

/// KVM_FEATURE_ASYNC_PF, _VMEXIT and _INT. A page that the host does not have at hand at once is waited for: the guest
/// would exit over and over, or run its scheduler for nothing, since what it waits for is in the host's memory already.
const EAX_ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The leaves for vCPU `index` of `count`, each vCPU being a core of one socket. `supported` is what
/// KVM_GET_SUPPORTED_CPUID gave.
pub(crate) fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adapt(entry, u32::from(index), u32::from(count));
    }
    cpuid
}

/// Structured extended features: leaf 7; XSAVE: leaf 13.
const MORE_FEATURES: u32 = 7;
const XSAVE: u32 = 0xd;
const AMD_FEATURES: u32 = 0x8000_0001;
const VENDOR: u32 = 0;

/// Whether a guest that was told `saved` can go on where KVM supports `host`: the same vendor, family and model, and
/// no feature missing. The error names what differs.
pub(crate) fn check(saved: &[kvm_cpuid_entry2], host: &CpuId) -> Result<(), &'static str> {
    for entry in saved {
        let same = |other: &&kvm_cpuid_entry2| {
            (other.function, other.index) == (entry.function, entry.index)
        };
        let found = host.as_slice().iter().find(same);
        let found = found.copied().unwrap_or_default();
        let lacks = |saved: u32, host: u32| saved & !host != 0;
        match (entry.function, entry.index) {
            (VENDOR, _)
                if (entry.ebx, entry.ecx, entry.edx) != (found.ebx, found.ecx, found.edx) =>
            {
                return Err("vendor");
            }
            (FEATURES, _) if entry.eax != found.eax => return Err("family, model or stepping"),
            (FEATURES | AMD_FEATURES, _)
                if lacks(entry.ecx, found.ecx) || lacks(entry.edx, found.edx) =>
            {
                return Err("features");
            }
            (MORE_FEATURES, _)
                if lacks(entry.ebx, found.ebx)
                    || lacks(entry.ecx, found.ecx)
                    || lacks(entry.edx, found.edx) =>
            {
                return Err("extended features");
            }
            (XSAVE, 0) if lacks(entry.eax, found.eax) => return Err("FPU state"),
            _ => {}
        }
    }
    Ok(())
}

/// Bits of an APIC id that number the cores of a socket.
fn core_bits(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u32, count: u32) {
    match entry.function {
        FEATURES => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (index << 24) | (count << 16);
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            if count > 1 {
                entry.edx |= EDX_HTT;
            }
        }
        // Bits 31:26: cores of the package; 25:14: logical CPUs that share the cache.
        CACHE_TOPOLOGY if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & 0x3fff) | (((1 << core_bits(count)) - 1) << 26);
        }
        EXTENDED_TOPOLOGY | EXTENDED_TOPOLOGY_V2 => {
            let (shift, logical, kind) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (core_bits(count), count, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = logical;
            entry.ecx = entry.index | (kind << 8);
            entry.edx = index;
        }
        KVM_FEATURES => entry.eax &= !EAX_ASYNC_PAGE_FAULTS,
        AMD_SIZES => entry.ecx = (core_bits(count) << 12) | (count - 1),
        AMD_TOPOLOGY => {
            entry.eax = index;
            entry.ebx = index;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_moves_to_hosts_that_have_what_it_was_told() {
        let leaf = |function, eax, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ecx,
            ..Default::default()
        };
        let saved = [leaf(VENDOR, 0, 7), leaf(FEATURES, 0x306a9, 0b0110)];
        let host = |vendor, model, features| {
            CpuId::from_entries(&[leaf(VENDOR, 0, vendor), leaf(FEATURES, model, features)])
                .unwrap()
        };
        assert_eq!(check(&saved, &host(7, 0x306a9, 0b0110)), Ok(()));
        assert_eq!(check(&saved, &host(7, 0x306a9, 0b1111)), Ok(()));
        let features = check(&saved, &host(7, 0x306a9, 0b0010));
        assert_eq!(features, Err("features"));
        assert!(check(&saved, &host(7, 0x306aa, 0b0110)).is_err());
        assert_eq!(check(&saved, &host(8, 0x306a9, 0b0110)), Err("vendor"));
        assert!(check(&saved, &CpuId::from_entries(&[]).unwrap()).is_err());
    }

    #[test]
    fn identity_and_topology_are_per_vcpu() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[
            leaf(FEATURES, 0),
            leaf(EXTENDED_TOPOLOGY, 0),
            leaf(EXTENDED_TOPOLOGY, 1),
            leaf(AMD_SIZES, 0),
        ])
        .unwrap();
        let cpuid = for_vcpu(&supported, 3, 5);
        let entries = cpuid.as_slice();
        assert_eq!(entries[0].ebx >> 16, (3 << 8) | 5);
        assert_ne!(entries[0].ecx & ECX_TSC_DEADLINE, 0);
        assert_eq!((entries[1].eax, entries[1].ebx, entries[1].edx), (0, 1, 3));
        assert_eq!((entries[2].eax, entries[2].ebx, entries[2].edx), (3, 5, 3));
        assert_eq!(entries[3].ecx, (3 << 12) | 4);
    }

    #[test]
    fn one_core_needs_no_bits() {
        assert_eq!(core_bits(1), 0);
        assert_eq!(core_bits(2), 1);
        assert_eq!(core_bits(32), 5);
    }
}
