// SPDX-License-Identifier: Apache-2.0
//! The pages that a restored guest is about to use: those that the first one from the same snapshot has used. They are
//! made and mapped at once, where the guest would otherwise stop at each of them.

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::memory::{GuestMemory, PAGE};
use crate::snapshot::{self, Content, PAGE_OF_FILE, PAGE_PRESENT, SnapshotError};
use crate::vcpu::Part;

/// The most that is taken from a list, which was made by a monitor with a guest in it: 32 MiB of copied pages.
const MAX_COPIED: u64 = 8192;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Pages of guest memory that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    first: u32,
    count: u32,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkingSet {
    /// Of these the guest has copies of its own.
    copied: Vec<Run>,
    /// These are those of the snapshot's file.
    shared: Vec<Run>,
}

impl WorkingSet {
    /// What the guest uses now.
    pub(crate) fn of(memory: &GuestMemory, content: &Content) -> Result<WorkingSet, SnapshotError> {
        let mut set = WorkingSet::default();
        for region in memory.iter() {
            let first = region.start_addr().raw_value() / PAGE;
            content.each_page(region, |index, entry| {
                match (entry & PAGE_PRESENT != 0, entry & PAGE_OF_FILE != 0) {
                    (true, true) => push(&mut set.shared, first + index),
                    (true, false) => push(&mut set.copied, first + index),
                    (false, _) => {}
                }
                Ok(())
            })?;
        }
        Ok(set)
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, SnapshotError> {
        let body = postcard::to_stdvec(self).map_err(|_| SnapshotError::Damaged)?;
        Ok(snapshot::envelope(&body))
    }

    /// The list in `bytes`, as far as it fits this memory.
    pub(crate) fn decode(bytes: &[u8], memory: &GuestMemory) -> Result<WorkingSet, SnapshotError> {
        let set: WorkingSet =
            postcard::from_bytes(snapshot::body(bytes)?).map_err(|_| SnapshotError::Damaged)?;
        let fits = |run: &Run| {
            let length = usize::try_from(u64::from(run.count) * PAGE).unwrap_or(usize::MAX);
            run.count > 0 && memory.check_range(address(*run), length)
        };
        let copied: u64 = set.copied.iter().map(|run| u64::from(run.count)).sum();
        match set.copied.iter().chain(&set.shared).all(fits) && copied <= MAX_COPIED {
            true => Ok(set),
            false => Err(SnapshotError::Damaged),
        }
    }

    /// Does a part of what there is to do for all of it.
    pub(crate) fn prepare(&self, memory: &GuestMemory, vcpu: &VcpuFd, part: Part) {
        populate(part.share_of(&self.copied), memory);
        map(
            part.share_of(&self.copied)
                .chain(part.share_of(&self.shared)),
            vcpu,
        );
    }
}

/// Gives the guest its copies. What cannot be had now it takes when it gets there.
fn populate<'a>(runs: impl Iterator<Item = &'a Run>, memory: &GuestMemory) {
    for run in runs {
        let length = run.count as usize * PAGE as usize;
        for slice in memory.get_slices(address(*run), length) {
            let Ok(slice) = slice else { return };
            // SAFETY: the range is mapped memory of the guest; its pages are touched, not changed.
            let result = unsafe {
                libc::madvise(
                    slice.ptr_guard_mut().as_ptr().cast(),
                    slice.len(),
                    libc::MADV_POPULATE_WRITE,
                )
            };
            if result != 0 {
                let error = std::io::Error::last_os_error();
                log::debug!("working set: {error}");
                return;
            }
        }
    }
}

/// Maps the pages into the guest, all vCPUs of which share the mapping. Linux before 6.11 cannot.
fn map<'a>(runs: impl Iterator<Item = &'a Run>, vcpu: &VcpuFd) {
    for run in runs {
        let mut range = kvm_pre_fault_memory {
            gpa: address(*run).raw_value(),
            size: u64::from(run.count) * PAGE,
            ..Default::default()
        };
        // SAFETY: the structure is the one that the call takes, and lives until it returns.
        let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
        if result < 0 {
            let error = std::io::Error::last_os_error();
            log::debug!("working set: {:#x}: {error}", range.gpa);
            return;
        }
    }
}

fn address(run: Run) -> GuestAddress {
    GuestAddress(u64::from(run.first) * PAGE)
}

/// Pages come in rising order.
fn push(runs: &mut Vec<Run>, page: u64) {
    // Guest memory ends far below 16 TiB.
    let Ok(page) = u32::try_from(page) else {
        return;
    };
    match runs.last_mut() {
        Some(last) if last.first + last.count == page => last.count += 1,
        _ => runs.push(Run {
            first: page,
            count: 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::arch::boot_params::Range;

    const PAGES: u64 = 64;

    /// Memory of which pages 8 to 24 are those of a file.
    fn memory() -> GuestMemory {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * PAGE) as usize)]);
        let memory = memory.unwrap();
        let name = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(name);
        file.write_all_at(&[7; 16 * PAGE as usize], 0).unwrap();
        let range = Range {
            start: 8 * PAGE,
            size: 16 * PAGE,
        };
        crate::memory::map_file(&memory, range, &file, 0).unwrap();
        memory
    }

    fn used(memory: &GuestMemory) -> WorkingSet {
        WorkingSet::of(memory, &Content::new(None).unwrap()).unwrap()
    }

    #[test]
    fn what_was_written_is_found_and_made_again() {
        let first = memory();
        for page in [3, 4, 9, 40] {
            first.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let set = used(&first);
        let run = |first, count| Run { first, count };
        assert_eq!(set.copied, [run(3, 2), run(9, 1), run(40, 1)]);
        assert!(set.shared.is_empty(), "{set:?}");

        let second = memory();
        let decoded = WorkingSet::decode(&set.encode().unwrap(), &second).unwrap();
        assert_eq!(decoded, set);
        populate(decoded.copied.iter(), &second);
        assert_eq!(used(&second), set);
        let value: u8 = second.read_obj(GuestAddress(9 * PAGE)).unwrap();
        assert_eq!(value, 7, "the file's");
    }

    #[test]
    fn pages_that_were_read_are_the_files() {
        let memory = memory();
        let _: u8 = memory.read_obj(GuestAddress(10 * PAGE)).unwrap();
        let set = used(&memory);
        assert!(set.copied.is_empty(), "{set:?}");
        assert!(
            set.shared
                .iter()
                .any(|run| run.first <= 10 && 10 < run.first + run.count)
        );
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        let memory = memory();
        let whole = |first, count| WorkingSet {
            copied: vec![Run { first, count }],
            shared: Vec::new(),
        };
        let decode = |set: WorkingSet| WorkingSet::decode(&set.encode().unwrap(), &memory);
        assert!(decode(whole(0, 64)).is_ok());
        for set in [
            whole(0, 65),
            whole(63, 2),
            whole(64, 1),
            whole(5, 0),
            whole(u32::MAX, u32::MAX),
        ] {
            assert!(decode(set).is_err());
        }
        let many = WorkingSet {
            copied: vec![
                Run {
                    first: 0,
                    count: 64
                };
                129
            ],
            shared: Vec::new(),
        };
        assert!(decode(many).is_err(), "more than is ever copied");
        let mut bytes = whole(0, 1).encode().unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        assert!(WorkingSet::decode(&bytes, &memory).is_err());
        assert!(WorkingSet::decode(&[], &memory).is_err());
    }
}
