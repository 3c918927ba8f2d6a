// SPDX-License-Identifier: Apache-2.0
//! `linux.resources`: exact limits in the guest, limits with room for the VM itself on the host.

use agent_protocol::CgroupPlan;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::{
    CpuQuota, HostLimits, IoThrottle, Limit, PlanError, ThrottleKind, VmShape, Warnings, devices,
    invalid, unsupported,
};

/// What the monitor needs beside the guest's memory. Its own heap is some MiB; page cache that the
/// file server fills is charged to the same cgroup, but reclaimed before anything is killed.
const MONITOR_MEMORY: u64 = 64 << 20;

/// `cpu.max` has no shorter period.
const DEFAULT_PERIOD: u64 = 100_000;

/// The container's cgroup in the guest.
pub fn guest(
    resources: Option<&LinuxResources>,
    warnings: &mut Warnings,
) -> Result<CgroupPlan, PlanError> {
    let mut files = Files::default();
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    if let Some(resources) = resources {
        if let Some(memory) = resources.memory() {
            guest_memory(memory, &mut files, warnings)?;
        }
        if let Some(cpu) = resources.cpu() {
            guest_cpu(cpu, &mut files)?;
        }
        if let Some(pids) = resources.pids() {
            match pids.limit() {
                0 => {}
                limit => files.add("pids.max", limit_text(limit)),
            }
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            files.add(
                &format!("hugetlb.{}.max", page_size(limit.page_size())?),
                limit_text(limit.limit()),
            );
        }
        if resources
            .rdma()
            .as_ref()
            .is_some_and(|rdma| !rdma.is_empty())
        {
            return Err(unsupported(
                "linux.resources.rdma",
                "a guest has no RDMA devices",
            ));
        }
        if let Some(network) = resources.network()
            && (network.class_id().unwrap_or(0) != 0
                || network
                    .priorities()
                    .as_ref()
                    .is_some_and(|list| !list.is_empty()))
        {
            warnings.ignored(
                "linux.resources.network",
                "cgroup v2 has no such controller",
            );
        }
        unified(resources, &mut files)?;
    }
    Ok(CgroupPlan {
        files: files.0,
        device_program: devices::program(rules.unwrap_or_default())?,
    })
}

/// The cgroup of the monitor.
pub fn host(
    resources: Option<&LinuxResources>,
    vm: VmShape,
    warnings: &mut Warnings,
) -> Result<HostLimits, PlanError> {
    let mut limits = HostLimits::default();
    let Some(resources) = resources else {
        return Ok(limits);
    };
    if let Some(memory) = resources.memory() {
        host_memory(memory, vm, &mut limits);
    }
    if let Some(cpu) = resources.cpu() {
        limits.cpu_shares = cpu.shares().filter(|shares| *shares != 0);
        limits.cpu_idle = cpu.idle().unwrap_or(0) == 1;
        limits.cpu_quota = host_quota(cpu);
        limits.cpuset_cpus = list(cpu.cpus());
        limits.cpuset_mems = list(cpu.mems());
    }
    if let Some(block_io) = resources.block_io() {
        host_block_io(block_io, &mut limits, warnings)?;
    }
    Ok(limits)
}

/// File names and contents, in order.
#[derive(Default)]
struct Files(Vec<(String, String)>);

impl Files {
    fn add(&mut self, name: &str, content: impl ToString) {
        self.0.push((name.to_owned(), content.to_string()));
    }
}

fn limit_text(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn list(text: &Option<String>) -> Option<String> {
    text.clone().filter(|text| !text.is_empty())
}

fn guest_memory(
    memory: &LinuxMemory,
    files: &mut Files,
    warnings: &mut Warnings,
) -> Result<(), PlanError> {
    // 0 is how Go says nothing.
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    let limit = given(memory.limit());
    if let Some(limit) = limit {
        files.add("memory.max", limit_text(limit));
    }
    if let Some(reservation) = given(memory.reservation()) {
        files.add("memory.low", limit_text(reservation));
    }
    if let Some(swap) = swap(memory)? {
        files.add(
            "memory.swap.max",
            match swap {
                Limit::Unlimited => "max".to_owned(),
                Limit::Value(bytes) => bytes.to_string(),
            },
        );
    }
    let field = |name: &str| format!("linux.resources.memory.{name}");
    // Obsolete or without counterpart in cgroup v2; engines send them regardless.
    #[allow(deprecated)]
    let kernel = memory.kernel();
    for (name, value) in [("kernel", kernel), ("kernelTCP", memory.kernel_tcp())] {
        if given(value).is_some_and(|value| value > 0) {
            warnings.ignored(field(name), "cgroup v2 has no such limit");
        }
    }
    if memory.swappiness().is_some() {
        warnings.ignored(field("swappiness"), "cgroup v2 has no such setting");
    }
    if memory.disable_oom_killer() == Some(true) {
        warnings.ignored(field("disableOOMKiller"), "cgroup v2 has no such setting");
    }
    if memory.use_hierarchy() == Some(false) {
        warnings.ignored(field("useHierarchy"), "cgroup v2 is always hierarchical");
    }
    Ok(())
}

/// Swap alone, out of memory and swap together. None: nothing is said.
fn swap(memory: &LinuxMemory) -> Result<Option<Limit>, PlanError> {
    let limit = memory.limit().unwrap_or(0);
    match memory.swap().unwrap_or(0) {
        0 => Ok(None),
        swap if swap < 0 => Ok(Some(Limit::Unlimited)),
        _ if limit <= 0 => Err(invalid(
            "linux.resources.memory.swap",
            "unable to set swap limit without memory limit",
        )),
        swap if swap < limit => Err(invalid(
            "linux.resources.memory.swap",
            "memory+swap limit should be >= memory limit",
        )),
        swap => Ok(Some(Limit::Value(swap.abs_diff(limit)))),
    }
}

fn guest_cpu(cpu: &LinuxCpu, files: &mut Files) -> Result<(), PlanError> {
    let realtime = [
        ("realtimeRuntime", cpu.realtime_runtime().unwrap_or(0)),
        (
            "realtimePeriod",
            i64::from(cpu.realtime_period().unwrap_or(0) != 0),
        ),
    ];
    if let Some((name, _)) = realtime.iter().find(|(_, value)| *value != 0) {
        return Err(unsupported(
            format!("linux.resources.cpu.{name}"),
            "cgroup v2 has no limit of real-time scheduling",
        ));
    }
    let idle = match cpu.idle() {
        None | Some(0) => false,
        Some(1) => true,
        Some(other) => {
            return Err(invalid(
                "linux.resources.cpu.idle",
                format!("{other} is neither 0 nor 1"),
            ));
        }
    };
    if idle {
        // An idle cgroup has no weight.
        files.add("cpu.idle", 1);
    } else if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        files.add("cpu.weight", weight_of_shares(shares));
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        files.add(
            "cpu.max",
            format!(
                "{} {}",
                quota.map_or("max".to_owned(), limit_text),
                period.unwrap_or(DEFAULT_PERIOD)
            ),
        );
    }
    if let Some(burst) = cpu.burst() {
        files.add("cpu.max.burst", burst);
    }
    for (name, cpus) in [("cpus", cpu.cpus()), ("mems", cpu.mems())] {
        if let Some(cpus) = list(cpus)
            && super::process::last_cpu(&cpus).is_none()
        {
            return Err(invalid(
                format!("linux.resources.cpu.{name}"),
                format!("{cpus:?} is not a list of numbers"),
            ));
        }
    }
    Ok(())
}

/// Shares of cgroup v1, 2 to 262144, on the scale of `cpu.weight`, 1 to 10000.
pub fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// blkio weights, 10 to 1000, on the scale of `io.weight`, 1 to 10000.
pub fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

fn page_size(size: &str) -> Result<&str, PlanError> {
    let digits = size
        .trim_end_matches("KB")
        .trim_end_matches("MB")
        .trim_end_matches("GB");
    if digits.is_empty() || digits == size || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid(
            "linux.resources.hugepageLimits.pageSize",
            format!("{size:?} is not a size such as 2MB"),
        ));
    }
    Ok(size)
}

/// Last, so that it overrides. The agent refuses what the guest does not have, by name.
fn unified(resources: &LinuxResources, files: &mut Files) -> Result<(), PlanError> {
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (name, value) in unified {
        let well_formed = name.contains('.')
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !well_formed || name.starts_with("cgroup.") {
            return Err(invalid(
                "linux.resources.unified",
                format!("{name:?} is not the name of a controller's file"),
            ));
        }
        files.add(name, value);
    }
    Ok(())
}

fn host_memory(memory: &LinuxMemory, vm: VmShape, limits: &mut HostLimits) {
    let guest = vm.memory_mib << 20;
    limits.memory_max = match memory.limit() {
        None | Some(0) => None,
        Some(limit) if limit < 0 => Some(Limit::Unlimited),
        Some(_) => Some(Limit::Value(guest + MONITOR_MEMORY)),
    };
    limits.memory_low = memory
        .reservation()
        .and_then(|bytes| u64::try_from(bytes).ok())
        .filter(|bytes| *bytes != 0)
        .map(|bytes| {
            bytes
                .saturating_add(MONITOR_MEMORY)
                .min(guest + MONITOR_MEMORY)
        });
    // Errors were found when planning the guest.
    limits.memory_swap_max = swap(memory).unwrap_or(None);
}

/// A tenth of a CPU more than the guest may use: the monitor works for it too.
fn host_quota(cpu: &LinuxCpu) -> Option<CpuQuota> {
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_none() && period.is_none() {
        return None;
    }
    let period = period.unwrap_or(DEFAULT_PERIOD);
    let quota = match quota.and_then(|quota| u64::try_from(quota).ok()) {
        Some(quota) => Limit::Value(quota.saturating_add(period / 10)),
        None => Limit::Unlimited,
    };
    Some(CpuQuota {
        quota,
        period,
        burst: cpu.burst(),
    })
}

fn host_block_io(
    block_io: &LinuxBlockIo,
    limits: &mut HostLimits,
    warnings: &mut Warnings,
) -> Result<(), PlanError> {
    let field = |name: &str| format!("linux.resources.blockIO.{name}");
    limits.io_weight = match block_io.weight() {
        None | Some(0) => None,
        Some(weight) if (10..=1000).contains(&weight) => Some(weight),
        Some(weight) => {
            return Err(invalid(
                field("weight"),
                format!("{weight} is not in 10 to 1000"),
            ));
        }
    };
    if block_io.leaf_weight().unwrap_or(0) != 0 {
        warnings.ignored(field("leafWeight"), "cgroup v2 has no such setting");
    }
    if block_io
        .weight_device()
        .as_ref()
        .is_some_and(|list| !list.is_empty())
    {
        return Err(unsupported(
            field("weightDevice"),
            "the files of a container share one weight",
        ));
    }
    let kinds: [(&str, ThrottleKind, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        (
            "throttleReadBpsDevice",
            ThrottleKind::ReadBytes,
            block_io.throttle_read_bps_device(),
        ),
        (
            "throttleWriteBpsDevice",
            ThrottleKind::WriteBytes,
            block_io.throttle_write_bps_device(),
        ),
        (
            "throttleReadIOPSDevice",
            ThrottleKind::ReadOperations,
            block_io.throttle_read_iops_device(),
        ),
        (
            "throttleWriteIOPSDevice",
            ThrottleKind::WriteOperations,
            block_io.throttle_write_iops_device(),
        ),
    ];
    for (name, kind, devices) in kinds {
        for device in devices.iter().flatten() {
            let (Ok(major), Ok(minor)) =
                (u32::try_from(device.major()), u32::try_from(device.minor()))
            else {
                return Err(invalid(
                    field(name),
                    format!("{}:{} is not a device", device.major(), device.minor()),
                ));
            };
            limits.io_throttle.push(IoThrottle {
                major,
                minor,
                kind,
                rate: device.rate(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
