// SPDX-License-Identifier: Apache-2.0
//! All registers of a vCPU, read and written while it is not running.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::vm::{VmError, failed};

const IA32_TSC: u32 = 0x10;
/// Arms the timer of the local APIC: after the TSC that it is compared with, and after the APIC.
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Msr {
    index: u32,
    value: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<Msr>,
}

impl VcpuState {
    /// Reads everything. `msrs` are the registers that KVM can save; those that this vCPU does not have are left out.
    pub(crate) fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, VmError> {
        Ok(VcpuState {
            mp_state: vcpu.get_mp_state().map_err(failed("read the MP state"))?,
            regs: vcpu.get_regs().map_err(failed("read the registers"))?,
            sregs: vcpu.get_sregs().map_err(failed("read the registers"))?,
            xsave: vcpu.get_xsave().map_err(failed("read the FPU state"))?,
            xcrs: vcpu.get_xcrs().map_err(failed("read the FPU state"))?,
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(failed("read the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(failed("read the local APIC"))?,
            msrs: read_msrs(vcpu, msrs)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("read the vCPU events"))?,
        })
    }

    /// Writes everything to a new vCPU whose CPUID is set.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("set the registers"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(failed("set the FPU state"))?;
        // SAFETY: no state components beyond the 4096 bytes of kvm_xsave are enabled: that takes an arch_prctl call
        // which this process never makes.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("set the FPU state"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(failed("set the debug registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(failed("set the registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(failed("set the local APIC"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("set the MP state"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("set the vCPU events"))
    }

    /// All vCPUs of a VM continue with one time stamp counter, that of the first.
    pub(crate) fn share_tsc(states: &mut [VcpuState]) {
        let tsc = |state: &VcpuState| state.msrs.iter().find(|msr| msr.index == IA32_TSC).copied();
        let Some(first) = states.first().and_then(tsc) else {
            return;
        };
        for msr in states.iter_mut().flat_map(|state| &mut state.msrs) {
            if msr.index == IA32_TSC {
                msr.value = first.value;
            }
        }
    }
}

fn batch(msrs: &[Msr]) -> Msrs {
    let entry = |msr: &Msr| kvm_msr_entry {
        index: msr.index,
        data: msr.value,
        ..Default::default()
    };
    let entries: Vec<kvm_msr_entry> = msrs.iter().map(entry).collect();
    Msrs::from_entries(&entries).expect("the batches are below the limit of the wrapper")
}

/// Registers in one call: KVM takes 256.
const BATCH: usize = 128;

/// KVM stops at the first register that a vCPU does not have: that one is left out and the rest is read again.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VmError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest: Vec<Msr> = indices
        .iter()
        .map(|index| Msr {
            index: *index,
            value: 0,
        })
        .collect();
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(BATCH)];
        let mut msrs = batch(some);
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("read the MSRs"))?;
        found.extend(msrs.as_slice()[..count].iter().map(|entry| Msr {
            index: entry.index,
            value: entry.data,
        }));
        let skipped = usize::from(count < some.len());
        rest.drain(..count + skipped);
    }
    found.sort_by_key(|msr| msr.index == IA32_TSC_DEADLINE);
    Ok(found)
}

/// A register that can be read but not written is the host's business: left as it is.
fn write_msrs(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), VmError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(BATCH)];
        let count = vcpu
            .set_msrs(&batch(some))
            .map_err(failed("set the MSRs"))?;
        let skipped = usize::from(count < some.len());
        if let Some(msr) = some.get(count) {
            log::debug!("MSR {:#x} cannot be restored", msr.index);
        }
        rest = &rest[count + skipped..];
    }
    Ok(())
}
