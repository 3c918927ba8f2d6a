// SPDX-License-Identifier: Apache-2.0
//! Registers of the boot CPU at the PVH entry (Linux, Documentation/arch/x86/… and the Xen PVH boot ABI:
//! 32-bit protected mode, paging off, flat segments, ebx = physical address of `hvm_start_info`).

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::layout::START_INFO;

const CR0_PE: u64 = 1;
/// Fixed to one on all CPUs since the 486.
const CR0_ET: u64 = 1 << 4;
/// Bit 1 of EFLAGS is always set.
const EFLAGS_RESERVED: u64 = 2;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: without it the kernel believes all memory uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// A flat 4 GiB segment. `kind` is the type field of the descriptor (Intel SDM volume 3A, 3.4.5.1).
fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn protected_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    const TASK_BUSY: u8 = 0xb;
    sregs.cs = flat(0x8, CODE);
    let data = flat(0x10, DATA);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..flat(0x18, TASK_BUSY)
    };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs
}

/// Puts the boot CPU at the kernel's PVH entry point.
pub(crate) fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_sregs(&protected_mode(vcpu.get_sregs()?))?;
    vcpu.set_regs(&kvm_regs {
        rflags: EFLAGS_RESERVED,
        rip: entry,
        rbx: START_INFO,
        ..Default::default()
    })
}

/// Model-specific registers that firmware would have set, for each CPU.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ])
    .expect("two entries are below the limit of the wrapper");
    // KVM stops at the first register that it does not know and says how many it set. All of these are tuning only.
    vcpu.set_msrs(&msrs).map(|_| ())
}
