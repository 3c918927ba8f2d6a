// SPDX-License-Identifier: Apache-2.0
//! `VmConfig` to `VmPlan`: addresses, interrupts, command line. Pure.

use crate::arch::boot_params::Range;
use crate::arch::layout;
use crate::config::{ConfigError, MAX_VCPUS, MIN_MEMORY_MIB};

/// The devices of every VM, in the order of their slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotKind {
    Files,
    Vsock,
    Entropy,
    Balloon,
    Network,
}

/// Network cards that a VM can have. Their slots cost nothing until they are plugged.
pub const NETWORK_CARDS: usize = 4;

const SLOTS: [SlotKind; 4 + NETWORK_CARDS] = [
    SlotKind::Files,
    SlotKind::Vsock,
    SlotKind::Entropy,
    SlotKind::Balloon,
    SlotKind::Network,
    SlotKind::Network,
    SlotKind::Network,
    SlotKind::Network,
];
const _: () = assert!(SLOTS.len() <= layout::MAX_VIRTIO_SLOTS);

/// Where a virtio device answers and which pin of the IOAPIC it pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) kind: SlotKind,
    pub(crate) address: u64,
    pub(crate) pin: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmPlan {
    pub(crate) vcpus: u8,
    /// Host mappings: one below the hole, perhaps one above 4 GiB.
    pub(crate) memory: Vec<Range>,
    /// What of it the kernel may use as RAM.
    pub(crate) ram: Vec<Range>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) command_line: String,
}

impl VmPlan {
    /// First address behind the memory that kernel and initramfs may use.
    pub(crate) fn low_memory_end(&self) -> u64 {
        self.memory[0].size
    }
}

/// Parameters that every boot needs; the README of the guest kernel gives the reasons.
const COMMAND_LINE: &str = "quiet loglevel=1 earlyprintk=serial,ttyS0,115200,keep \
    unknown_nmi_panic panic=-1 reboot=t tsc=reliable no_timer_check random.trust_cpu=on \
    rcupdate.rcu_expedited=1 memory_hotplug.online_policy=auto-movable rdinit=/init";

pub(crate) fn plan(
    vcpus: u8,
    memory_mib: u64,
    extra_parameters: &[String],
) -> Result<VmPlan, ConfigError> {
    if !(1..=MAX_VCPUS).contains(&vcpus) {
        return Err(ConfigError::Vcpus(vcpus));
    }
    let size = memory_mib
        .checked_mul(1 << 20)
        .filter(|_| memory_mib >= MIN_MEMORY_MIB)
        .ok_or(ConfigError::Memory(memory_mib))?;
    let memory = memory_ranges(size);
    let slots = slots();
    let command_line = command_line(&slots, extra_parameters)?;
    Ok(VmPlan {
        vcpus,
        ram: ram(&memory),
        memory,
        slots,
        command_line,
    })
}

fn memory_ranges(size: u64) -> Vec<Range> {
    let low = size.min(layout::MMIO_HOLE);
    let mut ranges = vec![Range {
        start: 0,
        size: low,
    }];
    if size > low {
        ranges.push(Range {
            start: layout::MMIO_HOLE_END,
            size: size - low,
        });
    }
    ranges
}

/// Base memory up to the MP table, then everything above the first MiB.
fn ram(memory: &[Range]) -> Vec<Range> {
    let mut ram = vec![
        Range {
            start: 0,
            size: layout::BASE_MEMORY_END,
        },
        Range {
            start: layout::HIGH_MEMORY,
            size: memory[0].size - layout::HIGH_MEMORY,
        },
    ];
    ram.extend_from_slice(&memory[1..]);
    ram
}

fn slots() -> Vec<Slot> {
    SLOTS
        .iter()
        .zip(0u8..)
        .map(|(kind, index)| Slot {
            kind: *kind,
            address: layout::VIRTIO_SLOTS + u64::from(index) * layout::VIRTIO_SLOT_SIZE,
            pin: layout::VIRTIO_FIRST_PIN + index,
        })
        .collect()
}

fn command_line(slots: &[Slot], extra: &[String]) -> Result<String, ConfigError> {
    let mut line = COMMAND_LINE.to_owned();
    for slot in slots {
        let Slot { address, pin, .. } = slot;
        let size = layout::VIRTIO_SLOT_SIZE >> 10;
        line += &format!(" virtio_mmio.device={size}K@{address:#x}:{pin}");
    }
    for parameter in extra {
        line += " ";
        line += parameter;
    }
    // The kernel keeps a NUL behind it.
    if line.len() >= layout::COMMAND_LINE_SIZE {
        return Err(ConfigError::CommandLine(line.len()));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_leaves_the_hole_out() {
        let table = [
            (64, vec![(0, 64 << 20)]),
            (3072, vec![(0, 3 * GIB)]),
            (4096, vec![(0, 3 * GIB), (4 * GIB, GIB)]),
        ];
        for (mib, expected) in table {
            let plan = plan(1, mib, &[]).unwrap();
            let memory: Vec<_> = plan.memory.iter().map(|r| (r.start, r.size)).collect();
            assert_eq!(memory, expected, "{mib} MiB");
            let usable: u64 = plan.ram.iter().map(|r| r.size).sum();
            let legacy_hole = layout::HIGH_MEMORY - layout::BASE_MEMORY_END;
            assert_eq!(usable, (mib << 20) - legacy_hole);
        }
    }

    #[test]
    fn slots_do_not_overlap_and_are_announced() {
        let plan = plan(2, 512, &["extra=1".to_owned()]).unwrap();
        for pair in plan.slots.windows(2) {
            assert_eq!(pair[1].address - pair[0].address, layout::VIRTIO_SLOT_SIZE);
            assert_eq!(pair[1].pin, pair[0].pin + 1);
        }
        assert!(
            plan.command_line
                .contains(" virtio_mmio.device=4K@0xd0000000:1 ")
        );
        assert!(plan.command_line.ends_with(" extra=1"));
    }

    #[test]
    fn impossible_shapes_are_refused() {
        assert_eq!(plan(0, 512, &[]), Err(ConfigError::Vcpus(0)));
        assert_eq!(plan(33, 512, &[]), Err(ConfigError::Vcpus(33)));
        assert_eq!(plan(1, 31, &[]), Err(ConfigError::Memory(31)));
        assert_eq!(plan(1, u64::MAX, &[]), Err(ConfigError::Memory(u64::MAX)));
        let long = "x".repeat(2048);
        assert!(matches!(
            plan(1, 512, &[long]),
            Err(ConfigError::CommandLine(_))
        ));
    }
}
