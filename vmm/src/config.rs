// SPDX-License-Identifier: Apache-2.0
//! What the caller wants.

use std::fs::File;

/// A VM as the caller wants it. All files are opened by the caller: the monitor's jail has no paths for them.
#[derive(Debug)]
pub struct VmConfig {
    /// `/dev/kvm`.
    pub kvm: File,
    /// An uncompressed ELF `vmlinux` with a PVH entry note.
    pub kernel: File,
    pub initramfs: File,
    /// 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 32.
    pub memory_mib: u64,
    /// Kernel parameters beyond those that the machine needs.
    pub command_line: Vec<String>,
}

pub(crate) const MAX_VCPUS: u8 = 32;
pub(crate) const MIN_MEMORY_MIB: u64 = 32;

/// What is wrong with a [`VmConfig`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{0} vCPUs: must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    #[error("{0} MiB of guest memory: must be at least {MIN_MEMORY_MIB}")]
    Memory(u64),
    #[error("kernel command line of {0} bytes is too long")]
    CommandLine(usize),
}
