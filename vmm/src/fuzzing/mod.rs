// SPDX-License-Identifier: Apache-2.0
//! What the fuzzer (`tests/fuzz`) drives: one function for each parser of guest bytes. Bytes in, no panic out; each
//! asserts besides what has to hold whatever the guest does. Only in builds for tests and for the fuzzer.

mod driver;
mod input;
mod targets;
#[cfg(test)]
mod tests;

pub(crate) use driver::Driver;
pub(crate) use input::Input;
pub use targets::{
    balloon, descriptor_chains, file_system_device, file_system_requests, ioapic, registers, rng,
    snapshot, uart, vsock,
};
