// SPDX-License-Identifier: Apache-2.0
use serde_json::{Value, json};

use super::*;

const VM: VmShape = VmShape {
    vcpus: 2,
    memory_mib: 576,
};

fn parse(resources: Value) -> LinuxResources {
    serde_json::from_value(resources).unwrap()
}

fn guest_files(resources: Value) -> (Vec<String>, Vec<String>) {
    let mut warnings = Warnings::default();
    let plan = guest(Some(&parse(resources)), &mut warnings).unwrap();
    let files = plan
        .files
        .iter()
        .map(|(file, value)| format!("{file}={value}"))
        .collect();
    (files, warnings.0)
}

fn host_limits(resources: Value) -> HostLimits {
    host(Some(&parse(resources)), VM, &mut Warnings::default()).unwrap()
}

#[test]
fn files_of_the_guest() {
    for (resources, expected) in [
        (json!({}), vec![]),
        (
            json!({"memory": {"limit": 536_870_912}}),
            vec!["memory.max=536870912"],
        ),
        (
            json!({"memory": {"limit": -1, "swap": -1}}),
            vec!["memory.max=max", "memory.swap.max=max"],
        ),
        (
            json!({"memory": {"limit": 1000, "swap": 3000, "reservation": 500}}),
            vec!["memory.max=1000", "memory.low=500", "memory.swap.max=2000"],
        ),
        (
            json!({"memory": {"limit": 0, "swap": 0, "reservation": 0}}),
            vec![],
        ),
        (json!({"cpu": {"shares": 1024}}), vec!["cpu.weight=39"]),
        (json!({"cpu": {"shares": 2}}), vec!["cpu.weight=1"]),
        (
            json!({"cpu": {"shares": 262_144}}),
            vec!["cpu.weight=10000"],
        ),
        (
            json!({"cpu": {"shares": 0, "quota": 0, "period": 0}}),
            vec![],
        ),
        (
            json!({"cpu": {"quota": 50_000, "period": 20_000}}),
            vec!["cpu.max=50000 20000"],
        ),
        (
            json!({"cpu": {"quota": 50_000}}),
            vec!["cpu.max=50000 100000"],
        ),
        (json!({"cpu": {"quota": -1}}), vec!["cpu.max=max 100000"]),
        (
            json!({"cpu": {"period": 50_000}}),
            vec!["cpu.max=max 50000"],
        ),
        (
            json!({"cpu": {"quota": 50_000, "burst": 9}}),
            vec!["cpu.max=50000 100000", "cpu.max.burst=9"],
        ),
        (
            json!({"cpu": {"idle": 1, "shares": 1024}}),
            vec!["cpu.idle=1"],
        ),
        (json!({"cpu": {"cpus": "0-1", "mems": "0"}}), vec![]),
        (json!({"pids": {"limit": 100}}), vec!["pids.max=100"]),
        (json!({"pids": {"limit": -1}}), vec!["pids.max=max"]),
        (json!({"pids": {"limit": 0}}), vec![]),
        (
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}),
            vec!["hugetlb.2MB.max=0"],
        ),
        (
            json!({"memory": {"limit": 1000}, "unified": {"memory.max": "5", "cpu.weight": "7"}}),
            vec!["memory.max=1000", "cpu.weight=7", "memory.max=5"],
        ),
    ] {
        let (files, warnings) = guest_files(resources.clone());
        assert_eq!(files, expected, "{resources}");
        assert_eq!(warnings, [""; 0], "{resources}");
    }
}

#[test]
fn obsolete_settings_are_warned_about() {
    for (resources, field) in [
        (
            json!({"memory": {"swappiness": 60}}),
            "linux.resources.memory.swappiness",
        ),
        (
            json!({"memory": {"kernel": 5}}),
            "linux.resources.memory.kernel",
        ),
        (
            json!({"memory": {"kernelTCP": 5}}),
            "linux.resources.memory.kernelTCP",
        ),
        (
            json!({"memory": {"disableOOMKiller": true}}),
            "linux.resources.memory.disableOOMKiller",
        ),
        (
            json!({"memory": {"useHierarchy": false}}),
            "linux.resources.memory.useHierarchy",
        ),
        (
            json!({"network": {"classID": 7}}),
            "linux.resources.network",
        ),
    ] {
        let (files, warnings) = guest_files(resources);
        assert!(files.is_empty());
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with(field), "{warnings:?}");
    }
    // Docker sends these defaults.
    let (_, warnings) = guest_files(json!({
        "memory": {"disableOOMKiller": false, "useHierarchy": true, "kernel": 0},
        "network": {},
    }));
    assert_eq!(warnings, [""; 0]);
}

#[test]
fn refusals_name_the_field() {
    for (resources, expected) in [
        (
            json!({"memory": {"swap": 5}}),
            "memory.swap: unable to set swap limit without memory limit",
        ),
        (
            json!({"memory": {"limit": 6, "swap": 5}}),
            "memory.swap: memory+swap limit should be >= memory limit",
        ),
        (
            json!({"cpu": {"realtimeRuntime": 1}}),
            "cpu.realtimeRuntime: not supported",
        ),
        (
            json!({"cpu": {"realtimePeriod": 1}}),
            "cpu.realtimePeriod: not supported",
        ),
        (json!({"cpu": {"idle": 2}}), "cpu.idle: 2 is neither"),
        (json!({"cpu": {"cpus": "0-"}}), "cpu.cpus: "),
        (json!({"cpu": {"mems": "x"}}), "cpu.mems: "),
        (
            json!({"rdma": {"mlx": {"hcaHandles": 1}}}),
            "rdma: not supported",
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}),
            "hugepageLimits.pageSize: ",
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "MB", "limit": 1}]}),
            "hugepageLimits.pageSize: ",
        ),
        (json!({"unified": {"../x": "1"}}), "unified: "),
        (json!({"unified": {"a/b.c": "1"}}), "unified: "),
        (json!({"unified": {"memory": "1"}}), "unified: "),
        (json!({"unified": {"cgroup.procs": "1"}}), "unified: "),
    ] {
        let error = guest(Some(&parse(resources)), &mut Warnings::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("linux.resources.{expected}")),
            "{error}"
        );
    }
}

#[test]
fn limits_of_the_host() {
    assert_eq!(
        host(None, VM, &mut Warnings::default()),
        Ok(HostLimits::default())
    );
    assert_eq!(
        host_limits(json!({"memory": {"limit": 0}})),
        HostLimits::default()
    );
    // The VM's memory and the monitor's, not the container's.
    let limits = host_limits(
        json!({"memory": {"limit": 512 << 20, "swap": 600 << 20, "reservation": 1 << 20}}),
    );
    assert_eq!(
        limits.memory_max,
        Some(Limit::Value((576 << 20) + MONITOR_MEMORY))
    );
    assert_eq!(limits.memory_low, Some((1 << 20) + MONITOR_MEMORY));
    assert_eq!(limits.memory_swap_max, Some(Limit::Value(88 << 20)));
    let limits = host_limits(json!({"memory": {"limit": -1}}));
    assert_eq!(limits.memory_max, Some(Limit::Unlimited));
    // A tenth of a CPU for the monitor.
    let limits =
        host_limits(json!({"cpu": {"quota": 50_000, "shares": 512, "cpus": "0-3", "mems": "0"}}));
    let quota = CpuQuota {
        quota: Limit::Value(60_000),
        period: 100_000,
        burst: None,
    };
    assert_eq!(limits.cpu_quota, Some(quota));
    assert_eq!(limits.cpu_shares, Some(512));
    assert_eq!(limits.cpuset_cpus.as_deref(), Some("0-3"));
    assert_eq!(limits.cpuset_mems.as_deref(), Some("0"));
}

#[test]
fn block_io_of_the_host() {
    let limits = host_limits(json!({"blockIO": {
        "weight": 100,
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 1, "rate": 6}],
    }}));
    assert_eq!(limits.io_weight, Some(100));
    let throttle = |minor, kind, rate| IoThrottle {
        major: 8,
        minor,
        kind,
        rate,
    };
    assert_eq!(
        limits.io_throttle,
        [
            throttle(0, ThrottleKind::ReadBytes, 5),
            throttle(1, ThrottleKind::WriteOperations, 6),
        ]
    );
    for (block_io, expected) in [
        (json!({"weight": 5}), "weight: 5"),
        (
            json!({"weightDevice": [{"major": 8, "minor": 0, "weight": 5}]}),
            "weightDevice: not supported",
        ),
        (
            json!({"throttleReadBpsDevice": [{"major": -8, "minor": 0, "rate": 5}]}),
            "throttleReadBpsDevice: ",
        ),
    ] {
        let resources = parse(json!({"blockIO": block_io}));
        let error = host(Some(&resources), VM, &mut Warnings::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("linux.resources.blockIO.{expected}")),
            "{error}"
        );
    }
    assert_eq!(
        (io_weight(10), io_weight(500), io_weight(1000)),
        (1, 4950, 10_000)
    );
}
