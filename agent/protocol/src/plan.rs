// SPDX-License-Identifier: Apache-2.0
//! A container as the agent is to make it: resolved data, no OCI types. Flags and numbers are those
//! of the Linux system calls named at each field.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestPlan {
    /// The root file system: a path below the virtio-fs share.
    pub rootfs: String,
    pub rootfs_readonly: bool,
    /// mount(2) propagation flag for the root mount (`MS_PRIVATE`, `MS_SLAVE`, …), 0 for the default.
    pub rootfs_propagation: u64,
    /// `CLONE_NEW*` of the namespaces to create. Those not named are the agent's own.
    pub namespaces: u64,
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
    pub time_offsets: Vec<TimeOffset>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    /// In this order.
    pub mounts: Vec<Mount>,
    /// Nodes to make in the container's `/dev`, beside the standard ones.
    pub devices: Vec<Device>,
    /// Make the standard nodes (null, zero, full, random, urandom, tty) and links (fd, stdin, …, ptmx).
    pub default_devices: bool,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    /// Names with dots.
    pub sysctls: Vec<(String, String)>,
    pub cgroup: CgroupPlan,
    /// In the container's network namespace, or in the machine's if it has none of its own.
    pub cards: Vec<Card>,
    pub process: Process,
    /// Run in the container's namespaces before the exec of the init process.
    pub start_hooks: Vec<Hook>,
    /// The OCI state, for the stdin of the hooks.
    pub state: String,
}

/// One line of `/proc/<pid>/uid_map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    pub inside: u32,
    pub outside: u32,
    pub size: u32,
}

/// One line of `/proc/<pid>/timens_offsets`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeOffset {
    /// `monotonic` or `boottime`.
    pub clock: String,
    pub seconds: i64,
    pub nanoseconds: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path in the container. Resolved by the agent inside the root file system.
    pub destination: String,
    pub source: MountSource,
    /// File system type; ignored for [`MountSource::Share`].
    pub kind: String,
    /// `MS_*` without propagation.
    pub flags: u64,
    /// Propagation flags, each applied by a mount(2) of its own.
    pub propagation: Vec<u64>,
    /// `MOUNT_ATTR_*` to set and to clear on the whole tree, mount_setattr(2) with `AT_RECURSIVE`.
    pub recursive_set: u64,
    pub recursive_clear: u64,
    /// File system options.
    pub data: String,
    /// Fill the new tmpfs with what the destination held.
    pub copy_up: bool,
    /// For an id-mapped mount.
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A directory or file below the virtio-fs share, bind mounted, with `recursive` as `rbind`.
    Share { path: String, recursive: bool },
    /// A bind mount whose source is a path of the guest.
    Guest { path: String, recursive: bool },
    /// Given to mount(2) as it is: `proc`, `tmpfs`, …
    Kernel(String),
    /// The container's own cgroup tree.
    Cgroup,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    Character,
    Block,
    Fifo,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub path: String,
    pub kind: DeviceKind,
    pub major: u32,
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// cgroup v2 of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPlan {
    /// File name (`memory.max`) and what to write, in order. A file that does not exist is an error
    /// that names it.
    pub files: Vec<(String, String)>,
    /// eBPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE`: raw 8-byte instructions. None: everything allowed.
    pub device_program: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Process {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    /// Present if the process has a terminal.
    pub terminal: Option<WindowSize>,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub umask: Option<u32>,
    pub capabilities: Capabilities,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub oom_score_adj: Option<i32>,
    pub seccomp: Option<Seccomp>,
    pub scheduler: Option<Scheduler>,
    pub io_priority: Option<IoPriority>,
    /// personality(2).
    pub personality: Option<u64>,
    /// CPU lists (`0-2,4`) to pin to before and after the exec's move into its cgroup.
    pub affinity_initial: Option<String>,
    pub affinity_final: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

/// Bit n is capability n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

/// setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// seccomp(2): a classic BPF program, raw 8-byte instructions, and `SECCOMP_FILTER_FLAG_*`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    pub program: Vec<u8>,
    pub flags: u64,
}

/// sched_setattr(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// ioprio_set(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoPriority {
    pub class: u8,
    /// 0 to 7.
    pub level: u8,
}

/// An OCI hook that runs in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    pub path: String,
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// Seconds; none: no limit.
    pub timeout: Option<u32>,
}

/// A network card that the host has plugged. Its hardware address and MTU come with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The number of its slot: `virtio-mmio.N` on the platform bus.
    pub slot: u8,
    pub name: String,
    pub up: bool,
    pub ipv6: bool,
    pub addresses: Vec<Address>,
    /// In this order: a gateway has to be reachable when it is named.
    pub routes: Vec<Route>,
    /// Permanent ones.
    pub neighbours: Vec<Neighbour>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    pub address: IpAddr,
    pub prefix: u8,
    /// The other end, of a point-to-point address.
    pub peer: Option<IpAddr>,
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub destination: IpAddr,
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    pub metric: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// The gateway is taken to be on the link.
    pub on_link: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    pub address: IpAddr,
    pub mac: [u8; 6],
}
