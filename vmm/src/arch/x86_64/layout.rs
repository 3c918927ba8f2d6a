// SPDX-License-Identifier: Apache-2.0
//! All guest physical addresses. Each is derived from the one before it where they depend on each other.

/// The MP table, in the last KiB of base memory, where the kernel looks for it (MP specification 1.4, 4).
pub(crate) const MPTABLE: u64 = 0x9_fc00;
#[cfg(test)]
pub(crate) const MPTABLE_SIZE: u64 = 0x400;

/// RAM below the legacy hole, as told to the kernel: it ends where the MP table begins.
pub(crate) const BASE_MEMORY_END: u64 = MPTABLE;

/// RAM above the legacy hole.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// `hvm_start_info`, followed by its module list and memory map (PVH boot ABI).
pub(crate) const START_INFO: u64 = 0x6000;
pub(crate) const MODULE_LIST: u64 = START_INFO + 0x100;
pub(crate) const MEMORY_MAP: u64 = START_INFO + 0x200;

/// The kernel command line, NUL included. 2048 is the kernel's COMMAND_LINE_SIZE on x86.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
pub(crate) const COMMAND_LINE_SIZE: usize = 2048;

/// Addresses below 4 GiB that are not RAM: virtio slots, IOAPIC, LAPIC, and what KVM needs on Intel.
pub(crate) const MMIO_HOLE: u64 = 0xc000_0000;
pub(crate) const MMIO_HOLE_END: u64 = 1 << 32;

/// The virtio-mmio slots, one page each.
pub(crate) const VIRTIO_SLOTS: u64 = 0xd000_0000;
pub(crate) const VIRTIO_SLOT_SIZE: u64 = 0x1000;

pub(crate) const IOAPIC: u64 = 0xfec0_0000;
pub(crate) const IOAPIC_SIZE: u64 = 0x1000;
/// Pins of the IOAPIC. The kernel touches the entry of each several times at boot, every time with two exits.
pub(crate) const IOAPIC_PINS: u8 = 12;
/// First pin used by a virtio slot: interrupt 0 means none to a driver.
pub(crate) const VIRTIO_FIRST_PIN: u8 = 1;
/// As many slots as there are pins for.
pub(crate) const MAX_VIRTIO_SLOTS: usize = (IOAPIC_PINS - VIRTIO_FIRST_PIN) as usize;

pub(crate) const LAPIC: u64 = 0xfee0_0000;

/// Three pages that KVM uses on Intel CPUs without unrestricted guest mode (KVM_SET_TSS_ADDR).
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// The first serial port, output only: the boot console.
pub(crate) const UART_PORT: u16 = 0x3f8;
pub(crate) const UART_PORTS: u16 = 8;

/// System control port B: zero says that no memory or I/O error has caused an NMI.
pub(crate) const NMI_STATUS_PORT: u16 = 0x61;

/// The keyboard controller's command port; 0xfe there is the old way to reset a PC.
pub(crate) const RESET_PORT: u16 = 0x64;
pub(crate) const RESET_COMMAND: u8 = 0xfe;
