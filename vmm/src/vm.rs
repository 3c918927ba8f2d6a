// SPDX-License-Identifier: Apache-2.0
//! The KVM virtual machine: memory slots, interrupts, kicks.
//!
//! The order of calls matters for start time: memory slots first, then vCPUs, then event fds. Registering anything on
//! KVM's I/O bus starts a grace period that the next memory slot or vCPU would wait for (seen on Linux 6.18 and later).

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting,
    kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::devices::ioapic::Routes;
use crate::memory::GuestMemory;

const API_VERSION: i32 = 12;

/// A KVM call failed. The operation is named; the source is the host's errno.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error("kvm: API version {0}, expected {API_VERSION}")]
    ApiVersion(i32),
    #[error("kvm: cannot {operation}")]
    Call {
        operation: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Names the operation of a failed call.
pub(crate) fn failed(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Call { operation, source }
}

/// A virtual machine with a split irqchip: local APICs in KVM, the IOAPIC here.
#[derive(Debug)]
pub(crate) struct Vm {
    fd: Arc<VmFd>,
    cpuid: CpuId,
    msrs: Vec<u32>,
}

impl Vm {
    pub(crate) fn new(kvm: File, memory: &GuestMemory) -> Result<Vm, VmError> {
        // SAFETY: the file descriptor is open and owned; Kvm takes it over and closes it.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(VmError::ApiVersion(version));
        }
        let msrs = kvm.get_msr_index_list().map_err(failed("list the MSRs"))?;
        let fd = kvm.create_vm().map_err(failed("create a VM"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read the supported CPUID"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(failed("set the TSS address"))?;
        for (slot, region) in (0u32..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the region is mapped for the life of `memory`, of which each device and the machine hold a
            // clone, and the VM ends before them (fields of Machine are dropped in order).
            unsafe { fd.set_user_memory_region(slot) }.map_err(failed("set guest memory"))?;
        }
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [u64::from(layout::IOAPIC_PINS), 0, 0, 0],
            ..Default::default()
        };
        fd.enable_cap(&split).map_err(failed("split the irqchip"))?;
        // The device itself is let go of: what could make further VMs is not for the jail.
        Ok(Vm {
            fd: Arc::new(fd),
            cpuid,
            msrs: msrs.as_slice().to_vec(),
        })
    }

    /// What KVM says a vCPU can do.
    pub(crate) fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The model-specific registers that KVM can save.
    pub(crate) fn saved_msrs(&self) -> &[u32] {
        &self.msrs
    }

    pub(crate) fn clock(&self) -> Result<kvm_clock_data, VmError> {
        self.fd.get_clock().map_err(failed("read the clock"))
    }

    /// The guest's clock goes on where it was.
    pub(crate) fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), VmError> {
        let clock = kvm_clock_data {
            clock: clock.clock,
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(failed("set the clock"))
    }

    pub(crate) fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(failed("create a vCPU"))
    }

    /// `line` becomes the interrupt of a pin of the IOAPIC.
    pub(crate) fn connect_interrupt(&self, line: &EventFd, pin: u8) -> Result<(), VmError> {
        self.fd
            .register_irqfd(line, u32::from(pin))
            .map_err(failed("connect an interrupt"))
    }

    /// A guest's write of `queue` to `address` signals `kick` without leaving the kernel.
    pub(crate) fn connect_kick(
        &self,
        kick: &EventFd,
        address: u64,
        queue: u32,
    ) -> Result<(), VmError> {
        self.fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), queue)
            .map_err(failed("connect a queue's kick"))
    }

    /// What the IOAPIC calls when its routes change.
    pub(crate) fn route_setter(&self) -> Box<dyn Fn(&Routes) + Send> {
        let fd = self.fd.clone();
        Box::new(move |routes| {
            if let Err(error) = set_routes(&fd, routes) {
                log::error!("kvm: cannot route interrupts: {error}");
            }
        })
    }
}

fn set_routes(fd: &VmFd, routes: &Routes) -> Result<(), kvm_ioctls::Error> {
    let entries: Vec<kvm_irq_routing_entry> = (0u32..)
        .zip(routes)
        .filter_map(|(gsi, route)| {
            let message = (*route)?;
            Some(kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: message.address,
                        address_hi: 0,
                        data: message.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
        })
        .collect();
    let table = KvmIrqRouting::from_entries(&entries)
        .expect("one route a pin is below the limit of the wrapper");
    fd.set_gsi_routing(&table)
}
