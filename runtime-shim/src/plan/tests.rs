// SPDX-License-Identifier: Apache-2.0
//! Whole plans, and those of processes.

use std::path::Path;

use agent_protocol::{Capabilities, IoPriority, Rlimit, Scheduler, WindowSize};
use serde_json::{Map, Value, json};

use super::*;

const FACTS: HostFacts = HostFacts {
    cpus: 8,
    memory_mib: 16_000,
    bind_sources: Vec::new(),
};

fn config() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "box",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        ]},
    })
}

/// Sets what a JSON pointer leads to.
fn with(pointer: &str, value: Value) -> Value {
    let mut config = config();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    config.pointer_mut(parent).unwrap()[key] = value;
    config
}

fn bundle(config: Value) -> Bundle {
    Bundle {
        directory: "/bundle".into(),
        rootfs: "/bundle/rootfs".into(),
        spec: serde_json::from_value(config).unwrap(),
        platforms: Map::new(),
        config: Vec::new(),
        warnings: Vec::new(),
    }
}

fn planned(config: Value) -> Result<Plan, PlanError> {
    let options = Options {
        id: "c1".into(),
        cgroup_manager: CgroupManager::Cgroupfs,
    };
    plan(&bundle(config), &options, &FACTS)
}

fn error(config: Value) -> String {
    planned(config).unwrap_err().to_string()
}

#[test]
fn a_small_container() {
    let plan = planned(config()).unwrap();
    assert_eq!(plan.warnings, [""; 0]);
    assert_eq!(
        plan.vm,
        VmShape {
            vcpus: 4,
            memory_mib: 1024
        }
    );
    assert_eq!(plan.guest.rootfs, "rootfs");
    assert!(plan.guest.rootfs_readonly);
    assert!(plan.guest.default_devices);
    assert_eq!(plan.guest.hostname.as_deref(), Some("box"));
    assert!(plan.guest.cgroup.device_program.is_some());
    assert_eq!(plan.host.network, Network::New);
    assert_eq!(plan.host.cgroup, CgroupLocation::Path("/sandbox-c1".into()));
    let root = &plan.host.shares[0];
    assert_eq!(
        (root.name.as_str(), root.source.as_path()),
        ("rootfs", Path::new("/bundle/rootfs"))
    );
    assert!(root.readonly == ReadOnly::Recursive && root.recursive);
}

#[test]
fn the_same_configuration_gives_the_same_plan() {
    let config = with(
        "/linux/sysctl",
        json!({"net.a": "1", "net.b": "2", "net.c": "3", "net.d": "4"}),
    );
    assert_eq!(planned(config.clone()), planned(config));
}

#[test]
fn no_linux_section_is_no_namespaces() {
    let mut config = config();
    config.as_object_mut().unwrap().remove("linux");
    assert!(error(config).starts_with("linux.namespaces: not supported: no network namespace"));
}

#[test]
fn no_process() {
    let mut config = config();
    config.as_object_mut().unwrap().remove("process");
    assert_eq!(error(config), "process: is missing");
}

#[test]
fn the_whole_process() {
    let mut config = config();
    config["process"] = json!({
        "terminal": true,
        "consoleSize": {"height": 24, "width": 70_000},
        "user": {"uid": 1, "gid": 2, "umask": 0o27, "additionalGids": [5, 6]},
        "args": ["sh", "-c", "true"],
        "env": ["A=B"],
        "cwd": "/work",
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"],
            "effective": ["CAP_CHOWN"],
            "inheritable": ["CAP_KILL"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "ambient": ["CAP_KILL"],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
        "noNewPrivileges": true,
        "oomScoreAdj": -500,
        "scheduler": {"policy": "SCHED_FIFO", "priority": 7, "flags": ["SCHED_RESET_ON_FORK"]},
        "ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 3},
        "execCPUAffinity": {"initial": "0-3", "final": "0"},
    });
    config["linux"]["personality"] = json!({"domain": "LINUX32"});
    let plan = planned(config).unwrap();
    let process = plan.guest.process;
    assert_eq!(process.args, ["sh", "-c", "true"]);
    assert_eq!(process.env, ["A=B"]);
    assert_eq!(process.cwd, "/work");
    assert_eq!(
        process.terminal,
        Some(WindowSize {
            rows: 24,
            columns: u16::MAX
        })
    );
    assert_eq!(
        (process.uid, process.gid, process.umask),
        (1, 2, Some(0o27))
    );
    assert_eq!(process.additional_gids, [5, 6]);
    let expected = Capabilities {
        bounding: 1 | 1 << 40,
        effective: 1,
        inheritable: 1 << 5,
        permitted: 1 | 1 << 5,
        ambient: 1 << 5,
    };
    assert_eq!(process.capabilities, expected);
    assert_eq!(
        process.rlimits,
        [Rlimit {
            resource: libc::RLIMIT_NOFILE,
            soft: 10,
            hard: 20
        }]
    );
    assert!(process.no_new_privileges);
    assert_eq!(process.oom_score_adj, Some(-500));
    let expected = Scheduler {
        policy: 1,
        flags: 1,
        nice: 0,
        priority: 7,
        runtime: 0,
        deadline: 0,
        period: 0,
    };
    assert_eq!(process.scheduler, Some(expected));
    assert_eq!(process.io_priority, Some(IoPriority { class: 1, level: 3 }));
    assert_eq!(process.personality, Some(8));
    // Only for execs.
    assert_eq!(
        (process.affinity_initial, process.affinity_final),
        (None, None)
    );
    assert_eq!(plan.host.oom_score_adj, Some(-500));
    assert_eq!(plan.host.open_files, Some(20));
}

#[test]
fn an_exec() {
    let process = json!({
        "user": {"uid": 0, "gid": 0}, "args": ["ls"], "cwd": "/",
        "execCPUAffinity": {"initial": "0-1", "final": "1"},
    });
    let spec: oci::Spec = serde_json::from_value(config()).unwrap();
    let process: oci::Process = serde_json::from_value(process).unwrap();
    let (plan, _) = plan_exec(&spec, &process, Some(2)).unwrap();
    assert_eq!(plan.affinity_initial.as_deref(), Some("0-1"));
    assert_eq!(plan.affinity_final.as_deref(), Some("1"));
    assert_eq!(plan.capabilities, Capabilities::default());
    let error = plan_exec(&spec, &process, Some(1)).unwrap_err().to_string();
    assert_eq!(
        error,
        "process.execCPUAffinity.initial: there is no CPU 1, the VM has 1"
    );
    assert!(plan_exec(&spec, &process, None).is_ok());
}

#[test]
fn refusals_of_a_process() {
    let limit = |soft: u64| json!({"type": "RLIMIT_CORE", "soft": soft, "hard": 1});
    for (pointer, value, expected) in [
        (
            "/process/args",
            json!([]),
            "process.args: must not be empty",
        ),
        (
            "/process/args",
            json!([""]),
            "process.args: must not be empty",
        ),
        (
            "/process/args",
            json!(null),
            "process.args: must not be empty",
        ),
        (
            "/process/args",
            json!(["x".repeat(3 << 20)]),
            "process.args, process.env: longer than",
        ),
        (
            "/process/cwd",
            json!("relative"),
            "process.cwd: Cwd property must be an absolute path",
        ),
        (
            "/process/cwd",
            json!(""),
            "process.cwd: Cwd property must be an absolute path",
        ),
        (
            "/process/user/umask",
            json!(0o1000),
            "process.user.umask: 0o1000",
        ),
        (
            "/process/rlimits",
            json!([limit(0), limit(1)]),
            "process.rlimits: RLIMIT_CORE occurs twice",
        ),
        (
            "/process/rlimits",
            json!([limit(2)]),
            "process.rlimits: RLIMIT_CORE: soft limit 2 is above",
        ),
        (
            "/process/oomScoreAdj",
            json!(1001),
            "process.oomScoreAdj: 1001",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_ISO"}),
            "process.scheduler.policy: not supported",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_RR", "priority": 100}),
            "process.scheduler.priority: ",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "nice": 20}),
            "process.scheduler.nice: 20",
        ),
        (
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
            "process.ioPriority.priority: 8",
        ),
        (
            "/linux/personality",
            json!({"domain": "LINUX", "flags": ["X"]}),
            "linux.personality.flags: not supported",
        ),
    ] {
        let error = error(with(pointer, value));
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn what_engines_send_regardless_is_warned_about() {
    for (pointer, value, field) in [
        (
            "/process/apparmorProfile",
            json!("docker-default"),
            "process.apparmorProfile: ignored",
        ),
        (
            "/process/selinuxLabel",
            json!("a:b:c"),
            "process.selinuxLabel: ignored",
        ),
        (
            "/linux/mountLabel",
            json!("a:b:c"),
            "linux.mountLabel: ignored",
        ),
    ] {
        let plan = planned(with(pointer, value)).unwrap();
        assert_eq!(plan.warnings.len(), 1, "{:?}", plan.warnings);
        assert!(plan.warnings[0].starts_with(field), "{:?}", plan.warnings);
    }
}

#[test]
fn a_privileged_container_gets_what_a_guest_has() {
    let mut config = with(
        "/linux/resources",
        json!({"devices": [{"allow": true, "access": "rwm"}]}),
    );
    config["linux"]["devices"] = json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
    ]);
    let plan = planned(config.clone()).unwrap();
    assert_eq!(plan.guest.cgroup.device_program, None);
    assert_eq!(plan.guest.devices.len(), 1);
    assert_eq!(plan.warnings.len(), 1);
    config["linux"]["resources"] = json!({});
    assert!(error(config).starts_with("linux.devices[1]: not supported: /dev/sda"));
}

#[test]
fn capability_names_and_numbers() {
    assert_eq!(capability("CAP_CHOWN"), Some(0));
    assert_eq!(capability("checkpoint_restore"), Some(40));
    assert_eq!(capability("CAP_NOPE"), None);
    assert_eq!(capability(""), None);
    // Each that the types know has a number.
    for name in capability_names() {
        let parsed: oci::Capability = serde_json::from_value(json!(name)).unwrap();
        assert_eq!(capability(&parsed.to_string()), capability(&name), "{name}");
    }
}

#[test]
fn lists_of_cpus() {
    for (list, last, count) in [
        ("0", Some(0), Some(1)),
        ("0-3,8", Some(8), Some(5)),
        ("1,1-2", Some(2), Some(2)),
        ("0-4294967295", Some(u32::MAX), None),
        ("", None, None),
        ("3-1", None, None),
        ("a", None, None),
        ("1,,2", None, None),
        ("-1", None, None),
    ] {
        assert_eq!(process::last_cpu(list), last, "{list}");
        assert_eq!(process::count_cpus(list), count, "{list}");
    }
}

#[test]
fn updates() {
    let vm = VmShape {
        vcpus: 1,
        memory_mib: 256,
    };
    let resources =
        serde_json::from_value(json!({"memory": {"limit": 128 << 20}, "pids": {"limit": 5}}));
    let (guest, host, warnings) = plan_update(&resources.unwrap(), vm).unwrap();
    assert_eq!(guest.files.len(), 2);
    assert_eq!(host.memory_max, Some(Limit::Value((256 + 64) << 20)));
    assert!(warnings.is_empty());
}
