// SPDX-License-Identifier: Apache-2.0
//! Whether `/dev/kvm` runs an ordinary guest. Some hosts emulate it in software: virtual machines can
//! be made there, but `syscall` leaves a guest in ring 3, and instructions that kernels use are missing.
//!
//! A guest of some dozen bytes begins in ring 3 of long mode, executes `syscall`, and from ring 0
//! writes what it finds to a port.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A guest that runs at all is done in microseconds, also an emulated one.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("{operation}")]
    Kvm {
        operation: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("KVM API version is {0}, not 12")]
    ApiVersion(i32),
    #[error("KVM lacks {0}")]
    Capability(&'static str),
    #[error("guest memory")]
    Memory,
    #[error("system call")]
    Os(#[source] std::io::Error),
    #[error("`syscall` of a guest does not arrive in ring 0")]
    Ring,
    #[error("KVM cannot execute the instruction {0} in a guest")]
    Instruction(&'static str),
    #[error("the guest ended unexpectedly: {0}")]
    Exit(String),
    #[error("the guest did not answer within {} seconds", DEADLINE.as_secs())]
    Deadline,
}

/// What a machine is made with.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// Guest physical addresses, all in the one page that is mapped, of 2 MiB.
const USER_CODE: u64 = 0x1000;
const KERNEL_CODE: u64 = 0x2000;
const DATA: u64 = 0x3000;
const PML4: u64 = 0x5000;
const PDPT: u64 = 0x6000;
const PD: u64 = 0x7000;
const MEMORY: u64 = 0x20_0000;

/// Ring 3. Nothing comes after `syscall`: an undefined instruction if it does not leave.
const USER: [u8; 4] = [
    0x0f, 0x05, // syscall
    0x0f, 0x0b, // ud2
];

/// Ports that ring 0 reports to: first the selector of CS, which has the ring in it, then how many of
/// [`INSTRUCTIONS`] have been executed.
const PORT_CS: u16 = 0x10;
const PORT_STAGE: u16 = 0x11;

/// What kernels use and interpreters lack.
const INSTRUCTIONS: [&str; 2] = ["popcnt", "cmpxchg16b"];

#[rustfmt::skip]
const KERNEL: [u8; 34] = [
    0x8c, 0xc8,                                           // mov eax, cs
    0xe6, 0x10,                                           // out PORT_CS, al
    0x31, 0xc0,                                           // xor eax, eax
    0xf3, 0x0f, 0xb8, 0xc0,                               // popcnt eax, eax
    0xb0, 0x01,                                           // mov al, 1
    0xe6, 0x11,                                           // out PORT_STAGE, al
    0x31, 0xc0,                                           // xor eax, eax
    0x31, 0xd2,                                           // xor edx, edx
    0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x30, 0x00, 0x00, // cmpxchg16b [DATA]
    0xb0, 0x02,                                           // mov al, 2
    0xe6, 0x11,                                           // out PORT_STAGE, al
    0xf4,                                                 // hlt
    0xeb, 0xfd,                                           // jmp hlt
];

/// Runs the guest. `kvm` is `/dev/kvm`.
pub fn probe(kvm: &File) -> Result<(), ProbeError> {
    let kvm = kvm.try_clone().map_err(ProbeError::Os)?;
    // SAFETY: the descriptor is a fresh duplicate that nothing else owns; Kvm closes it.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(ProbeError::ApiVersion(version));
    }
    if let Some((_, name)) = NEEDED
        .iter()
        .find(|(cap, _)| kvm.check_extension_raw(*cap as u64) <= 0)
    {
        return Err(ProbeError::Capability(name));
    }
    let memory = memory().ok_or(ProbeError::Memory)?;
    let (vm, vcpu) = build(&kvm, &memory)?;
    let result = run_within(vcpu, DEADLINE);
    // The vCPU is gone, or hangs in the kernel and has the VM in its hands; both go before the memory.
    drop(vm);
    if matches!(result, Err(ProbeError::Deadline)) {
        // The thread may still run: what it runs in has to stay.
        std::mem::forget(memory);
    }
    result
}

fn memory() -> Option<GuestMemoryMmap<()>> {
    const PRESENT_WRITABLE_USER: u64 = 0x7;
    const LARGE: u64 = 0x80;
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(MEMORY).ok()?)]).ok()?;
    let write = |bytes: &[u8], address| memory.write_slice(bytes, GuestAddress(address)).ok();
    write(&USER, USER_CODE)?;
    write(&KERNEL, KERNEL_CODE)?;
    write(&[0; 16], DATA)?;
    for (table, entry) in [
        (PML4, PDPT | PRESENT_WRITABLE_USER),
        (PDPT, PD | PRESENT_WRITABLE_USER),
        (PD, LARGE | PRESENT_WRITABLE_USER),
    ] {
        write(&entry.to_le_bytes(), table)?;
    }
    Some(memory)
}

fn failed(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |source| ProbeError::Kvm { operation, source }
}

fn build(kvm: &Kvm, memory: &GuestMemoryMmap<()>) -> Result<(VmFd, VcpuFd), ProbeError> {
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    // Three pages that Intel's processors want, above all else.
    vm.set_tss_address(0xfffb_d000)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|_| ProbeError::Memory)?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: host.addr() as u64,
    };
    // SAFETY: `probe` keeps the memory mapped until the VM and its vCPU are closed, and forgets it if
    // the vCPU's thread could not be ended.
    unsafe { vm.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    enter_ring_3(&vcpu)?;
    Ok((vm, vcpu))
}

/// Long mode, ring 3, with `syscall` leading to [`KERNEL`].
fn enter_ring_3(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    // Intel SDM volume 3A, 2.5 (CR0, CR4) and 2.2.1 (EFER).
    const CR0_PE_WP_PG: u64 = 1 | 1 << 16 | 1 << 31;
    const CR0_ET: u64 = 1 << 4;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_SCE_LME_LMA: u64 = 1 | 1 << 8 | 1 << 10;
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const SFMASK: u32 = 0xc000_0084;
    const KERNEL_CS: u64 = 0x08;
    const USER_CS: u16 = 0x23;
    const USER_SS: u16 = 0x1b;

    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let segment = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: USER_SS,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: USER_CS,
        type_: 11,
        db: 0,
        l: 1,
        ..segment
    };
    sregs.ss = segment;
    sregs.ds = segment;
    sregs.es = segment;
    sregs.cr0 = CR0_PE_WP_PG | CR0_ET;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_SCE_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(STAR, KERNEL_CS << 32),
        entry(LSTAR, KERNEL_CODE),
        entry(SFMASK, 0),
    ])
    .map_err(|_| ProbeError::Memory)?;
    vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    let regs = kvm_regs {
        rip: USER_CODE,
        // Bit 1 is always set.
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

/// Runs the vCPU in a thread of its own, which can be interrupted.
fn run_within(mut vcpu: VcpuFd, deadline: Duration) -> Result<(), ProbeError> {
    extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Not the one that interrupts the vCPUs of a machine.
    let signal = SIGRTMIN() + 3;
    register_signal_handler(signal, interrupt).map_err(|error| ProbeError::Os(error.into()))?;
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("probe".to_owned())
        .spawn(move || {
            // After the deadline nobody listens.
            let _ = sender.send(run(&mut vcpu));
        })
        .map_err(ProbeError::Os)?;
    match receiver.recv_timeout(deadline) {
        Ok(result) => {
            // It has sent its result and does nothing more.
            let _ = thread.join();
            result
        }
        Err(RecvTimeoutError::Disconnected) => Err(ProbeError::Exit("its thread ended".to_owned())),
        Err(RecvTimeoutError::Timeout) => {
            // A signal that comes just before KVM_RUN interrupts nothing, so one may not be enough.
            for _ in 0..10 {
                if thread.kill(signal).is_err()
                    || receiver.recv_timeout(Duration::from_millis(50)).is_ok()
                {
                    break;
                }
            }
            Err(ProbeError::Deadline)
        }
    }
}

fn run(vcpu: &mut VcpuFd) -> Result<(), ProbeError> {
    let mut ring_0 = false;
    let mut executed = 0;
    // The guest exits four times; anything else is a host that is not right.
    for _ in 0..16 {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT_CS, [cs, ..])) if cs & 3 == 0 => ring_0 = true,
            Ok(VcpuExit::IoOut(PORT_CS, _)) => return Err(ProbeError::Ring),
            Ok(VcpuExit::IoOut(PORT_STAGE, [stage, ..])) => executed = usize::from(*stage),
            Ok(VcpuExit::Hlt) if ring_0 && executed == INSTRUCTIONS.len() => return Ok(()),
            // In ring 3 writing to a port is a fault, and there is no handler for it.
            Ok(_) if !ring_0 => return Err(ProbeError::Ring),
            Ok(exit) => {
                return Err(match INSTRUCTIONS.get(executed) {
                    Some(instruction) => ProbeError::Instruction(instruction),
                    None => ProbeError::Exit(format!("{exit:?}")),
                });
            }
            Err(error) if error.errno() == libc::EINTR => return Err(ProbeError::Deadline),
            Err(error) => return Err(failed("KVM_RUN")(error)),
        }
    }
    Err(ProbeError::Exit("it does not come to an end".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a host whose KVM runs guests it does, on one that emulates them in software the ring is what
    /// is wrong. Nothing else may come out.
    #[test]
    fn this_host() {
        let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
            eprintln!("skipped: no access to /dev/kvm");
            return;
        };
        let result = probe(&kvm);
        assert!(
            matches!(
                result,
                Ok(()) | Err(ProbeError::Ring | ProbeError::Instruction(_))
            ),
            "{result:?}"
        );
    }
}
