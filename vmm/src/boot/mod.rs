// SPDX-License-Identifier: Apache-2.0
//! Brings kernel and initramfs into guest memory.

pub(crate) mod initramfs;
pub(crate) mod kernel;
