// SPDX-License-Identifier: Apache-2.0
//! From what a bundle asks for to what will be done: in the VM's shape, in the guest, on the host.
//!
//! Pure: what needs a look at the host comes in as [`HostFacts`]. Every field of the runtime
//! specification has one of four fates here: applied in the guest, applied on the host, refused by
//! name, or left out with a warning where engines send it regardless.

mod devices;
mod guest;
mod host;
mod mounts;
mod process;
mod resources;
mod seccomp;
mod vm;

use std::collections::BTreeMap;
use std::path::PathBuf;

use agent_protocol::{CgroupPlan, GuestPlan, Hook, Mount, Process};
use oci_spec::runtime as oci;
use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::cli::CgroupManager;

pub use host::{cgroup as cgroup_location, hooks, joins_links, network};
pub use mounts::{OPTIONS as MOUNT_OPTIONS, Source as MountSource, is_bind};
pub use process::{capability, capability_names};
pub use resources::{io_weight, weight_of_shares};
pub use vm::ANNOTATION_PREFIX;

/// The name of the root file system's share.
pub const ROOTFS_SHARE: &str = "rootfs";

/// What a command adds to the bundle.
#[derive(Debug, Clone)]
pub struct Options {
    pub id: String,
    pub cgroup_manager: CgroupManager,
}

/// What planning needs to know of the host, gathered before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub cpus: u32,
    pub memory_mib: u64,
    /// For each entry of `mounts`: what its source is. None: not a bind mount.
    pub bind_sources: Vec<Option<SourceKind>>,
}

/// What the source of a bind mount is, symbolic links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    Directory,
    File,
    Socket,
    Fifo,
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice,
    Missing,
    /// Not to be looked at: permission, a loop of links.
    Unreadable,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub vm: VmShape,
    /// `state` and `cards` are left empty: the pid of the monitor and what is found in its namespace are known only then.
    pub guest: GuestPlan,
    pub host: HostPlan,
    /// One line each, naming the field.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmShape {
    pub vcpus: u8,
    pub memory_mib: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HostPlan {
    /// What the guest may see of the host's files. The first is the root file system.
    pub shares: Vec<Share>,
    /// To be made in the root file system, inside of it, before it is shared: the guest cannot if the
    /// root is read-only.
    pub mount_points: Vec<MountPoint>,
    pub cgroup: CgroupLocation,
    pub limits: HostLimits,
    pub hooks: HostHooks,
    pub network: Network,
    /// The links of the network namespace are for the guest.
    pub joins_links: bool,
    pub oom_score_adj: Option<i32>,
    /// Open files that the container may have, so that the file server can serve them.
    pub open_files: Option<u64>,
    pub annotations: BTreeMap<String, String>,
}

/// A file or directory that appears below the root of the virtio-fs share under `name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    pub name: String,
    /// Absolute.
    pub source: PathBuf,
    pub kind: ShareKind,
    pub readonly: bool,
    /// With the mounts below the source.
    pub recursive: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShareKind {
    Directory,
    File,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Absolute path in the container, to be resolved inside the root file system.
    pub path: String,
    pub kind: ShareKind,
    /// Of a directory: a file system without a mode of its own takes over this one.
    pub mode: u32,
}

/// Where the monitor goes in the host's cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupLocation {
    /// Left where the command runs.
    Unchanged,
    /// `cgroupsPath` or a path made from the id. Absolute ones start at the mount point of the
    /// hierarchy, relative ones at the parent of the command's own cgroup.
    Path(PathBuf),
    /// `cgroupsPath` in systemd's form. An empty slice is the default one.
    Systemd {
        slice: String,
        prefix: String,
        name: String,
    },
}

/// Limits of the monitor and so of the VM. In the units of cgroup v2.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Bytes: guest memory and overhead.
    pub memory_max: Option<Limit>,
    pub memory_low: Option<u64>,
    /// Swap alone.
    pub memory_swap_max: Option<Limit>,
    /// 2 to 262144.
    pub cpu_shares: Option<u64>,
    pub cpu_quota: Option<CpuQuota>,
    pub cpu_idle: bool,
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    /// blkio weight, 10 to 1000.
    pub io_weight: Option<u16>,
    pub io_throttle: Vec<IoThrottle>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Unlimited,
    Value(u64),
}

/// Microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuQuota {
    pub quota: Limit,
    pub period: u64,
    pub burst: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoThrottle {
    pub major: u32,
    pub minor: u32,
    pub kind: ThrottleKind,
    pub rate: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThrottleKind {
    ReadBytes,
    WriteBytes,
    ReadOperations,
    WriteOperations,
}

/// Hooks that run on the host. Those of `startContainer` are in the guest's plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostHooks {
    pub prestart: Vec<Hook>,
    pub create_runtime: Vec<Hook>,
    /// In the network namespace of the container: its mount namespace is out of reach.
    pub create_container: Vec<Hook>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

/// The network namespace that the monitor lives in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    New,
    Path(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The configuration contradicts the specification or itself.
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// Well-formed, but not something that a microVM can have.
    #[error("{field}: not supported: {reason}")]
    Unsupported { field: String, reason: String },
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> PlanError {
    PlanError::Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> PlanError {
    PlanError::Unsupported {
        field: field.into(),
        reason: reason.into(),
    }
}

/// Fields that are left out, for the log.
#[derive(Debug, Default)]
struct Warnings(Vec<String>);

impl Warnings {
    fn ignored(&mut self, field: impl AsRef<str>, why: impl AsRef<str>) {
        self.0
            .push(format!("{}: ignored: {}", field.as_ref(), why.as_ref()));
    }
}

/// Plans a container. Whatever a user can have got wrong in a bundle is found here or on loading it.
pub fn plan(bundle: &Bundle, options: &Options, facts: &HostFacts) -> Result<Plan, PlanError> {
    let mut warnings = Warnings(bundle.warnings.clone());
    let spec = &bundle.spec;
    let nothing = no_linux();
    let linux = spec.linux().as_ref().unwrap_or(&nothing);
    let resources = linux.resources().as_ref();
    let vm = vm::shape(spec, &bundle.platforms, facts, &mut warnings)?;
    guest::refuse(linux, &mut warnings)?;
    let network = host::network(spec)?;
    let namespaces = guest::namespaces(
        linux.namespaces().as_deref().unwrap_or_default(),
        &mut warnings,
    )?;
    let oci_process = spec
        .process()
        .as_ref()
        .ok_or_else(|| invalid("process", "is missing"))?;
    let process = process::process(
        oci_process,
        Some(linux),
        process::Role::Init,
        Some(vm.vcpus),
        &mut warnings,
    )?;
    let cgroup = resources::guest(resources, &mut warnings)?;
    let mounts = mounts::mounts(
        spec.mounts().as_deref().unwrap_or_default(),
        &facts.bind_sources,
        &bundle.directory,
        &mut warnings,
    )?;
    let (hooks, start_hooks) = host::hooks(spec.hooks().as_ref())?;
    let root_readonly = spec
        .root()
        .as_ref()
        .is_some_and(|root| root.readonly() == Some(true));
    let devices = devices::nodes(
        linux.devices().as_deref().unwrap_or_default(),
        cgroup.device_program.is_none(),
        &mut warnings,
    )?;
    let open_files = process
        .rlimits
        .iter()
        .find(|limit| limit.resource == process::resource(oci::PosixRlimitType::RlimitNofile))
        .map(|limit| limit.hard);
    let host = HostPlan {
        shares: [root_share(bundle, root_readonly)]
            .into_iter()
            .chain(mounts.shares)
            .collect(),
        mount_points: mounts.mount_points,
        cgroup: host::cgroup(
            linux.cgroups_path().as_deref(),
            &options.id,
            options.cgroup_manager,
        )?,
        limits: resources::host(resources, vm, &mut warnings)?,
        hooks,
        network,
        joins_links: host::joins_links(spec),
        oom_score_adj: process.oom_score_adj,
        open_files,
        annotations: spec
            .annotations()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
    };
    let guest = GuestPlan {
        rootfs: ROOTFS_SHARE.to_owned(),
        rootfs_readonly: root_readonly,
        rootfs_propagation: mounts::rootfs_propagation(linux.rootfs_propagation().as_deref())?,
        namespaces,
        uid_mappings: guest::mappings(
            "linux.uidMappings",
            linux.uid_mappings().as_ref(),
            namespaces,
        )?,
        gid_mappings: guest::mappings(
            "linux.gidMappings",
            linux.gid_mappings().as_ref(),
            namespaces,
        )?,
        time_offsets: guest::time_offsets(linux, namespaces)?,
        hostname: guest::uts_name("hostname", spec.hostname().as_ref(), namespaces)?,
        domainname: guest::uts_name("domainname", spec.domainname().as_ref(), namespaces)?,
        mounts: mounts.guest,
        devices,
        default_devices: !mounts.own_dev,
        masked_paths: guest::paths("linux.maskedPaths", linux.masked_paths())?,
        readonly_paths: guest::paths("linux.readonlyPaths", linux.readonly_paths())?,
        sysctls: guest::sysctls(linux, namespaces)?,
        cgroup,
        cards: Vec::new(),
        process,
        start_hooks,
        state: String::new(),
    };
    Ok(Plan {
        vm,
        guest,
        host,
        warnings: warnings.0,
    })
}

/// Plans a further process for a container. Its filter and personality are those of the container's
/// configuration. `vcpus` bounds the CPU affinity, where known.
pub fn plan_exec(
    spec: &oci::Spec,
    process: &oci::Process,
    vcpus: Option<u8>,
) -> Result<(Process, Vec<String>), PlanError> {
    let mut warnings = Warnings::default();
    let process = process::process(
        process,
        spec.linux().as_ref(),
        process::Role::Exec,
        vcpus,
        &mut warnings,
    )?;
    Ok((process, warnings.0))
}

/// Plans new limits for a running container, in the guest and on the host. The VM keeps its size.
pub fn plan_update(
    resources: &oci::LinuxResources,
    vm: VmShape,
) -> Result<(CgroupPlan, HostLimits, Vec<String>), PlanError> {
    let mut warnings = Warnings::default();
    let guest = resources::guest(Some(resources), &mut warnings)?;
    let host = resources::host(Some(resources), vm, &mut warnings)?;
    Ok((guest, host, warnings.0))
}

/// Plans a mount that is added to a running container.
pub fn plan_mount(
    field: &str,
    mount: &oci::Mount,
    source: &MountSource,
) -> Result<(Mount, Option<Share>, Vec<String>), PlanError> {
    let mut warnings = Warnings::default();
    let (guest, share) = mounts::one(field, mount, source, &mut warnings)?;
    Ok((guest, share, warnings.0))
}

/// A missing `linux` section says nothing: its type's default would say a lot.
fn no_linux() -> oci::Linux {
    let mut linux = oci::Linux::default();
    linux
        .set_namespaces(None)
        .set_resources(None)
        .set_masked_paths(None)
        .set_readonly_paths(None);
    linux
}

fn root_share(bundle: &Bundle, readonly: bool) -> Share {
    Share {
        name: ROOTFS_SHARE.to_owned(),
        source: bundle.rootfs.clone(),
        kind: ShareKind::Directory,
        readonly,
        // Engines mount volumes and overlays below the root file system they prepare.
        recursive: true,
    }
}

#[cfg(test)]
mod tests;
