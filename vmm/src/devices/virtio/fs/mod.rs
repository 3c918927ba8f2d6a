// SPDX-License-Identifier: Apache-2.0
//! virtio-fs: virtio 1.2, 5.11. A tree of the host as a file system of the guest, served in this process.
//!
//! A request goes from `worker` (virtqueues) through `server` and `request` (the FUSE protocol) to `passthrough`, `file`,
//! `directory` and `xattr` (what it does), which find host files by `inodes` and `handles`.

mod abi;
mod credentials;
mod directory;
mod file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handles;
mod inert;
mod inodes;
mod name;
mod passthrough;
mod request;
mod saved;
mod self_fd;
mod server;
#[cfg(any(test, fuzzing))]
mod test_support;
#[cfg(test)]
mod tests;
mod worker;
mod xattr;

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::process::{Resource, getrlimit};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueState;

use super::{ActivateError, Activation, GuestFault, Kicks, VirtioDevice};
use passthrough::Budget;
pub(crate) use saved::{SavedFiles, SavedFilesError};
use server::Server;
use worker::Workers;

/// virtio 1.2, 5.11.1.
const DEVICE_TYPE: u32 = 26;
/// The high-priority queue, then one request queue. A request of 1 MiB takes 260 descriptors at most.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const REQUEST_QUEUES: u32 = 1;
/// virtio 1.2, 5.11.4: `tag`, padded with zeroes, then `num_request_queues`.
const TAG_SIZE: usize = 36;
const CONFIG_SIZE: usize = TAG_SIZE + size_of::<u32>();
/// One that serves, and two that take over while others wait for a disk.
const THREADS: usize = 3;

/// The file system device.
#[derive(Debug)]
pub(crate) struct Fs {
    config: [u8; CONFIG_SIZE],
    server: Arc<Server>,
    memory_size: u64,
    workers: Option<Workers>,
}

impl Fs {
    /// A device that the guest mounts as `tag`, for a guest with `memory_size` bytes of memory. To be made in the process
    /// that serves it, while `/proc` is there; after that no path of the host is looked up any more.
    pub(crate) fn new(tag: &str, memory_size: u64) -> io::Result<Fs> {
        if tag.is_empty() || tag.len() > TAG_SIZE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut config = [0; CONFIG_SIZE];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_SIZE..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Ok(Fs {
            config,
            server: Arc::new(Server::new()?),
            memory_size,
            workers: None,
        })
    }

    /// Makes the directory `root` the root of the share. Below the names in `private` nobody but the guest is expected to
    /// change files, so that the guest may cache them for long. To be called when the limit of open files is final.
    pub(crate) fn plug(&mut self, root: OwnedFd, private: &[&str]) -> io::Result<()> {
        let private = private.iter().copied().map(CString::new);
        let private = private.collect::<Result<Vec<CString>, _>>()?;
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let budget = Budget::new(descriptors, self.memory_size);
        self.server.plug(root, private, budget)
    }

    /// Starts the threads, which then wait for the driver. To be called in the jail, since threads keep the namespaces
    /// they were started in, and before the guest runs.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        self.workers = Some(Workers::start(THREADS, &self.server)?);
        Ok(())
    }

    /// From now on SYNCFS brings nothing to the disks of the host.
    pub(crate) fn leave_disks_to_host(&self) {
        self.server.leave_disks_to_host();
    }

    /// Returns when nothing is being done for the guest, and nothing is until [`release`](Self::release).
    pub(crate) fn hold(&self) {
        if let Some(workers) = &self.workers {
            workers.hold();
        }
    }

    pub(crate) fn release(&self) {
        if let Some(workers) = &self.workers {
            workers.release();
        }
    }

    /// What the guest knows and has open, while the device is held.
    pub(crate) fn save_files(&self) -> Result<SavedFiles, SavedFilesError> {
        self.server.save()
    }

    /// Opens again, below the root that was plugged, what the guest had open.
    pub(crate) fn restore_files(&self, saved: &SavedFiles) -> Result<(), SavedFilesError> {
        self.server.restore(saved)
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn kicks(&self) -> Kicks {
        Kicks::Device
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = usize::try_from(offset).ok();
        let rest = rest.and_then(|offset| self.config.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let workers = self.workers.as_ref().ok_or(ActivateError::NotStarted)?;
        workers.serve(activation);
        Ok(())
    }

    fn process_queue(&mut self, _index: usize) -> Result<(), GuestFault> {
        Ok(())
    }

    fn queues(&self) -> Option<Vec<QueueState>> {
        self.workers.as_ref()?.queues()
    }

    fn reset(&mut self) {
        if let Some(workers) = &self.workers {
            workers.leave();
        }
    }
}
