// SPDX-License-Identifier: Apache-2.0
//! The look at the host that planning needs.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::Mount;

use crate::bundle::Bundle;
use crate::plan::{self, HostFacts, SourceKind};

impl HostFacts {
    pub fn gather(bundle: &Bundle) -> HostFacts {
        let mounts = bundle.spec.mounts().as_deref().unwrap_or_default();
        HostFacts {
            bind_sources: mounts
                .iter()
                .map(|mount| bind_source(&bundle.directory, mount))
                .collect(),
            ..HostFacts::of_machine()
        }
    }

    /// Without any bundle.
    pub fn of_machine() -> HostFacts {
        HostFacts {
            cpus: std::thread::available_parallelism()
                .ok()
                .and_then(|cpus| u32::try_from(cpus.get()).ok())
                .unwrap_or(1),
            memory_mib: memory_mib(),
            bind_sources: Vec::new(),
        }
    }
}

fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit.max(1))) >> 20
}

fn bind_source(bundle: &Path, mount: &Mount) -> Option<SourceKind> {
    if !plan::is_bind(mount) {
        return None;
    }
    let source = mount.source().as_ref()?;
    Some(kind(std::fs::metadata(bundle.join(source))))
}

/// Also used for mounts that are added to a running container.
pub fn kind(metadata: io::Result<Metadata>) -> SourceKind {
    let metadata = match metadata {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return SourceKind::Missing,
        Err(_) => return SourceKind::Unreadable,
    };
    let kind = metadata.file_type();
    if kind.is_dir() {
        SourceKind::Directory
    } else if kind.is_socket() {
        SourceKind::Socket
    } else if kind.is_fifo() {
        SourceKind::Fifo
    } else if kind.is_block_device() {
        SourceKind::BlockDevice
    } else if kind.is_char_device() {
        let device = metadata.rdev();
        SourceKind::CharacterDevice {
            major: rustix::fs::major(device),
            minor: rustix::fs::minor(device),
        }
    } else {
        SourceKind::File
    }
}
