// SPDX-License-Identifier: Apache-2.0
//! The devices of a VM. They know guest memory, event fds and files; nothing of KVM.

pub(crate) mod ioapic;
pub(crate) mod uart;
pub(crate) mod virtio;
