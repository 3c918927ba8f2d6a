// SPDX-License-Identifier: Apache-2.0
//! The one door to the bytes of a request: a descriptor chain, checked once, as a [`Reader`] over what the driver
//! wrote and a [`Writer`] over what it wants filled.
//!
//! Every descriptor is read once and checked against guest memory before the first byte moves; after that nothing
//! here can fail because of an address. The bytes themselves may change at any time (another vCPU), so a reader
//! copies each of them out at most once. Readable and writable parts may overlap: nothing depends on it.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory as _, VolatileSlice};

use super::GuestFault;
use crate::memory::GuestMemory;

/// The largest number of pieces of guest memory in one chain, and IOV_MAX of the host.
pub(crate) const SEGMENTS: usize = 1024;

/// A chain as [`pop`] returns it.
pub(crate) type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// The next available chain of virtqueue number `index`, `None` when there is none.
pub(crate) fn pop<'m>(
    index: usize,
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<Chain<'m>>, GuestFault> {
    match queue.iter(memory) {
        Ok(mut available) => Ok(available.next()),
        Err(source) => Err(GuestFault::Queue {
            queue: index,
            source,
        }),
    }
}

/// Puts chains (head, bytes written) on the used ring so that the driver sees all of them at once: it takes the buffers
/// of one packet together (virtio 1.2, 5.1.6.4).
pub(crate) fn publish(
    index: usize,
    queue: &mut Queue,
    memory: &GuestMemory,
    used: &[(u16, u32)],
) -> Result<(), GuestFault> {
    let fault = |source| GuestFault::Queue {
        queue: index,
        source,
    };
    let Some(((head, length), others)) = used.split_last() else {
        return Ok(());
    };
    let first = queue.next_used();
    for (position, (head, length)) in (0u16..).zip(others) {
        // virtio 1.2, 2.7.8: flags and idx, then elements of eight bytes.
        let slot = u64::from(first.wrapping_add(position) % queue.size());
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
        element[4..].copy_from_slice(&length.to_le_bytes());
        memory
            .write_slice(&element, GuestAddress(queue.used_ring() + 4 + 8 * slot))
            .map_err(|error| fault(virtio_queue::Error::GuestMemory(error)))?;
    }
    // No more than the queue has descriptors.
    queue.set_next_used(first.wrapping_add(others.len() as u16));
    queue.add_used(memory, *head, *length).map_err(fault)
}

/// Whether the driver wants to hear of what has been put on the used ring since `before` (virtio 1.2, 2.7.10).
pub(crate) fn wants_interrupt(
    index: usize,
    queue: &Queue,
    memory: &GuestMemory,
    before: u16,
) -> Result<bool, GuestFault> {
    let new = queue.next_used().wrapping_sub(before);
    if new == 0 || !queue.event_idx_enabled() {
        return Ok(new != 0);
    }
    // The used ring is written before the event is read: the driver does it the other way round.
    fence(Ordering::SeqCst);
    let used_event = GuestAddress(queue.avail_ring() + 4 + 2 * u64::from(queue.size()));
    let event: u16 = memory
        .read_obj(used_event)
        .map_err(|error| GuestFault::Queue {
            queue: index,
            source: virtio_queue::Error::GuestMemory(error),
        })?;
    Ok(queue
        .next_used()
        .wrapping_sub(u16::from_le(event))
        .wrapping_sub(1)
        < new)
}

/// The readable part of a chain of virtqueue number `queue`, then its writable part (virtio 1.2, 2.7.4.2: the
/// driver puts all readable descriptors first).
pub(crate) fn split<'m>(
    queue: usize,
    mut chain: Chain<'m>,
    memory: &'m GuestMemory,
) -> Result<(Reader<'m>, Writer<'m>), GuestFault> {
    let fault = GuestFault::Chain { queue };
    let mut readable = Segments::default();
    let mut writable = Segments::default();
    let mut last: Option<Descriptor> = None;
    for descriptor in chain.by_ref() {
        last = Some(descriptor);
        let part = if descriptor.is_write_only() {
            &mut writable
        } else if writable.slices.is_empty() {
            &mut readable
        } else {
            return Err(fault);
        };
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let Ok(slice) = slice else {
                return Err(fault);
            };
            part.push(slice);
        }
        if readable.slices.len() + writable.slices.len() > SEGMENTS {
            return Err(fault);
        }
    }
    // The iterator ends in silence at a descriptor that it cannot follow.
    if last.is_none_or(|descriptor| descriptor.has_next()) {
        return Err(fault);
    }
    Ok((Reader(readable), Writer(writable)))
}

/// A chain is shorter than what was asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("descriptor chain too short")]
pub(crate) struct TooShort;

/// Pieces of guest memory, consumed from the front.
#[derive(Debug, Default)]
struct Segments<'m> {
    slices: Vec<VolatileSlice<'m>>,
    /// Index of the first slice that is not consumed.
    first: usize,
    /// Consumed bytes of that slice.
    offset: usize,
    /// Bytes that are left.
    left: usize,
}

impl<'m> Segments<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        // The lengths of a chain add up to less than 4 GiB: the queue's iterator enforces it.
        self.left += slice.len();
        self.slices.push(slice);
    }

    /// The rest of the first slice that is not consumed; never empty.
    fn front(&mut self) -> Option<VolatileSlice<'m>> {
        while let Some(slice) = self.slices.get(self.first) {
            match slice.offset(self.offset) {
                Ok(rest) if !rest.is_empty() => return Some(rest),
                _ => {
                    self.first += 1;
                    self.offset = 0;
                }
            }
        }
        None
    }

    fn consume(&mut self, count: usize) {
        self.left -= count;
        self.offset += count;
    }

    fn skip(&mut self, mut count: usize) -> Result<(), TooShort> {
        if count > self.left {
            return Err(TooShort);
        }
        while count > 0 {
            let Some(front) = self.front() else {
                return Err(TooShort);
            };
            let step = front.len().min(count);
            self.consume(step);
            count -= step;
        }
        Ok(())
    }

    fn split_at(&mut self, count: usize) -> Result<Segments<'m>, TooShort> {
        if count > self.left {
            return Err(TooShort);
        }
        let mut tail = Segments {
            slices: self.slices.clone(),
            first: self.first,
            offset: self.offset,
            left: self.left,
        };
        tail.skip(count)?;
        self.left = count;
        Ok(tail)
    }

    fn iovecs(&self, limit: usize) -> Iovecs<'m> {
        let mut left = self.left.min(limit);
        let mut offset = self.offset;
        let mut vectors = Vec::with_capacity(self.slices.len() - self.first.min(self.slices.len()));
        for slice in self.slices.iter().skip(self.first) {
            if left == 0 {
                break;
            }
            let Ok(rest) = slice.offset(offset) else {
                break;
            };
            offset = 0;
            let length = rest.len().min(left);
            if length == 0 {
                continue;
            }
            left -= length;
            vectors.push(libc::iovec {
                iov_base: rest.ptr_guard_mut().as_ptr().cast(),
                iov_len: length,
            });
        }
        Iovecs {
            vectors,
            memory: PhantomData,
        }
    }
}

/// Pieces of guest memory as the vectored system calls want them. Each vector lies in guest memory that stays
/// mapped for `'m`; their number is at most IOV_MAX. The guest may change the bytes at any time, so only the host
/// kernel may be given these pointers.
#[derive(Debug)]
pub(crate) struct Iovecs<'m> {
    vectors: Vec<libc::iovec>,
    memory: PhantomData<VolatileSlice<'m>>,
}

impl Deref for Iovecs<'_> {
    type Target = [libc::iovec];

    fn deref(&self) -> &[libc::iovec] {
        &self.vectors
    }
}

/// What the driver wrote.
#[derive(Debug)]
pub(crate) struct Reader<'m>(Segments<'m>);

impl<'m> Reader<'m> {
    /// Bytes not read yet.
    pub(crate) fn remaining(&self) -> usize {
        self.0.left
    }

    /// Fills `data` or reads nothing.
    pub(crate) fn read_exact(&mut self, data: &mut [u8]) -> Result<(), TooShort> {
        if data.len() > self.0.left {
            return Err(TooShort);
        }
        let mut done = 0;
        while done < data.len() {
            let Some(front) = self.0.front() else {
                return Err(TooShort);
            };
            let step = front.copy_to(&mut data[done..]);
            self.0.consume(step);
            done += step;
        }
        Ok(())
    }

    pub(crate) fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, TooShort> {
        let mut value = T::default();
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    pub(crate) fn skip(&mut self, count: usize) -> Result<(), TooShort> {
        self.0.skip(count)
    }

    /// The next `limit` bytes, or all if there are fewer, without consuming them.
    pub(crate) fn iovecs(&self, limit: usize) -> Iovecs<'m> {
        self.0.iovecs(limit)
    }
}

/// What the driver wants filled.
#[derive(Debug)]
pub(crate) struct Writer<'m>(Segments<'m>);

impl<'m> Writer<'m> {
    /// Bytes that still fit.
    pub(crate) fn available(&self) -> usize {
        self.0.left
    }

    /// Writes all of `data` or nothing.
    pub(crate) fn write_all(&mut self, data: &[u8]) -> Result<(), TooShort> {
        if data.len() > self.0.left {
            return Err(TooShort);
        }
        let mut done = 0;
        while done < data.len() {
            let Some(front) = self.0.front() else {
                return Err(TooShort);
            };
            let step = front.len().min(data.len() - done);
            front.copy_from(&data[done..done + step]);
            self.0.consume(step);
            done += step;
        }
        Ok(())
    }

    pub(crate) fn write_obj<T: ByteValued>(&mut self, value: &T) -> Result<(), TooShort> {
        self.write_all(value.as_slice())
    }

    /// Keeps the first `count` bytes and returns the rest, so that a header can be written after its body.
    pub(crate) fn split_at(&mut self, count: usize) -> Result<Writer<'m>, TooShort> {
        self.0.split_at(count).map(Writer)
    }

    /// Room for `limit` bytes, or all if there are fewer, without consuming it.
    pub(crate) fn iovecs(&self, limit: usize) -> Iovecs<'m> {
        self.0.iovecs(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: u16 = 2;
    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    const AVAILABLE: u32 = 0x1000;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)])
            .expect("guest memory")
    }

    /// A queue of 16 whose driver made chain 0 of `descriptors` (address, length, flags, next) available.
    fn queue(memory: &GuestMemory, descriptors: &[(u64, u32, u16, u16)]) -> Queue {
        let mut queue = Queue::new(16).expect("queue");
        queue.set_desc_table_address(Some(0), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE), Some(0));
        queue.set_used_ring_address(Some(0x2000), Some(0));
        queue.set_ready(true);
        for (slot, (address, length, flags, next)) in (0u64..).zip(descriptors) {
            let descriptor = Descriptor::new(*address, *length, *flags, *next);
            memory
                .write_obj(descriptor, GuestAddress(slot * 16))
                .expect("descriptor");
        }
        memory
            .write_obj(1u16, GuestAddress(u64::from(AVAILABLE) + 2))
            .expect("index");
        queue
    }

    fn one<'m>(
        memory: &'m GuestMemory,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> Result<(Reader<'m>, Writer<'m>), GuestFault> {
        let chain = pop(0, &mut queue(memory, descriptors), memory)?.expect("a chain");
        split(0, chain, memory)
    }

    #[test]
    fn reads_then_writes_across_descriptors_and_regions() {
        let memory = memory();
        memory
            .write_slice(b"hello, ", GuestAddress(0xfffc))
            .expect("write");
        memory
            .write_slice(b"guest", GuestAddress(0x8000))
            .expect("write");
        let (mut reader, mut writer) = one(
            &memory,
            &[
                (0xfffc, 7, NEXT, 1),
                (0x8000, 5, NEXT, 2),
                (0x9000, 3, NEXT | WRITE, 3),
                (0xa000, 8, WRITE, 0),
            ],
        )
        .expect("chain");
        assert_eq!(reader.remaining(), 12);
        assert_eq!(reader.iovecs(usize::MAX).len(), 3);
        assert_eq!(reader.iovecs(5).len(), 2);
        let mut text = [0; 9];
        reader.read_exact(&mut text).expect("read");
        assert_eq!(&text, b"hello, gu");
        assert_eq!(reader.read_obj::<u32>(), Err(TooShort));
        assert_eq!(reader.remaining(), 3);
        reader.skip(3).expect("skip");
        assert_eq!(reader.iovecs(usize::MAX).len(), 0);

        assert_eq!(writer.available(), 11);
        let mut body = writer.split_at(4).expect("split");
        assert_eq!((writer.available(), body.available()), (4, 7));
        body.write_all(b"body").expect("write");
        assert_eq!(body.write_all(b"toolong"), Err(TooShort));
        writer.write_all(b"head").expect("write");
        assert_eq!(writer.write_all(b"x"), Err(TooShort));
        let mut out = [0; 5];
        memory
            .read_slice(&mut out, GuestAddress(0xa000))
            .expect("read");
        assert_eq!(&out, b"dbody");
    }

    #[test]
    fn malformed_chains_are_faults() {
        let memory = memory();
        for (what, descriptors) in [
            ("outside", &[(0x20000, 1, 0, 0)][..]),
            ("straddles the end", &[(0x1fff0, 0x20, 0, 0)]),
            ("wraps", &[(u64::MAX - 3, 8, 0, 0)]),
            ("next out of range", &[(0x8000, 8, NEXT, 16)]),
            ("loop", &[(0x8000, 8, NEXT, 1), (0x8000, 8, NEXT, 0)]),
            (
                "readable after writable",
                &[(0x8000, 8, NEXT | WRITE, 1), (0x8000, 8, 0, 0)],
            ),
            ("too long", &[(0x8000, u32::MAX, 0, 0)]),
            ("indirect table of odd size", &[(0x8000, 17, INDIRECT, 0)]),
            ("indirect table outside", &[(0x20000, 16, INDIRECT, 0)]),
        ] {
            assert!(
                matches!(one(&memory, descriptors), Err(GuestFault::Chain { .. })),
                "{what}"
            );
        }
    }

    #[test]
    fn an_indirect_table_is_bounded() {
        let memory = memory();
        for (entries, fits) in [(1024u16, true), (1025, false)] {
            for entry in 0..entries {
                let flags = if entry + 1 == entries { 0 } else { NEXT };
                memory
                    .write_obj(
                        Descriptor::new(0x3000, 1, flags, entry + 1),
                        GuestAddress(0x8000 + u64::from(entry) * 16),
                    )
                    .expect("descriptor");
            }
            let table = (0x8000, u32::from(entries) * 16, INDIRECT, 0);
            assert_eq!(one(&memory, &[table]).is_ok(), fits, "{entries}");
        }
    }

    #[test]
    fn a_wild_available_index_is_a_fault() {
        let memory = memory();
        let mut queue = queue(&memory, &[(0x8000, 8, 0, 0)]);
        memory
            .write_obj(17u16, GuestAddress(u64::from(AVAILABLE) + 2))
            .expect("index");
        assert!(matches!(
            pop(3, &mut queue, &memory),
            Err(GuestFault::Queue { queue: 3, .. })
        ));
    }
}
