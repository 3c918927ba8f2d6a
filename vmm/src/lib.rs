// SPDX-License-Identifier: Apache-2.0
//! A small virtual machine monitor on KVM.

mod devices;
mod memory;
