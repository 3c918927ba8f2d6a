// SPDX-License-Identifier: Apache-2.0
//! Guest memory: the one type through which the host touches it.

/// The memory of a guest: regions mapped into this process.
pub(crate) type GuestMemory = vm_memory::GuestMemoryMmap<()>;
