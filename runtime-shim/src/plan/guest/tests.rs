// SPDX-License-Identifier: Apache-2.0
use serde_json::{Value, json};

use super::*;

const NEWNS: u64 = 0x0002_0000;
const NEWUTS: u64 = 0x0400_0000;
const NEWIPC: u64 = 0x0800_0000;
const NEWUSER: u64 = 0x1000_0000;
const NEWPID: u64 = 0x2000_0000;
const NEWNET: u64 = 0x4000_0000;
const NEWTIME: u64 = 0x80;

fn linux(value: Value) -> oci::Linux {
    serde_json::from_value(value).unwrap()
}

fn flags(kinds: &[&str]) -> Result<(u64, usize), PlanError> {
    let list: Vec<Value> = kinds.iter().map(|kind| json!({"type": kind})).collect();
    let linux = linux(json!({"namespaces": list}));
    let mut warnings = Warnings::default();
    namespaces(linux.namespaces().as_ref().unwrap(), &mut warnings)
        .map(|flags| (flags, warnings.0.len()))
}

#[test]
fn namespaces_of_the_guest() {
    let usual = NEWNS | NEWUTS | NEWIPC | NEWPID;
    assert_eq!(
        flags(&["pid", "network", "ipc", "uts", "mount"]),
        Ok((usual, 0))
    );
    assert_eq!(
        flags(&["pid", "ipc", "uts", "mount", "user", "time"]),
        Ok((usual | NEWUSER | NEWTIME | NEWNET, 0))
    );
    assert_eq!(flags(&["mount"]), Ok((NEWNS, 3)));
    for (kinds, expected) in [
        (
            vec!["pid", "network"],
            "linux.namespaces: not supported: no mount namespace",
        ),
        (
            vec!["mount", "pid", "pid"],
            "linux.namespaces: pid occurs twice",
        ),
    ] {
        assert!(flags(&kinds).unwrap_err().to_string().starts_with(expected));
    }
}

#[test]
fn namespaces_of_the_host_cannot_be_joined() {
    for kind in ["pid", "ipc", "uts", "mount", "user", "cgroup"] {
        let linux = linux(json!({"namespaces": [{"type": kind, "path": "/proc/1/ns/x"}]}));
        let error = namespaces(
            linux.namespaces().as_ref().unwrap(),
            &mut Warnings::default(),
        );
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("linux.namespaces[{kind}].path: not supported")),
            "{error}"
        );
    }
    let linux = linux(json!({"namespaces": [
        {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
        {"type": "network", "path": "/run/netns/a"}, {"type": "time", "path": "/proc/1/ns/time"},
    ]}));
    let mut warnings = Warnings::default();
    let flags = namespaces(linux.namespaces().as_ref().unwrap(), &mut warnings).unwrap();
    assert_eq!(flags, NEWNS | NEWPID | NEWIPC | NEWUTS);
    assert_eq!(warnings.0.len(), 1);
}

#[test]
fn names() {
    let name = |value: &str, flags| uts_name("hostname", Some(&value.to_owned()), flags);
    assert_eq!(uts_name("hostname", None, 0), Ok(None));
    assert_eq!(name("", 0), Ok(None));
    assert_eq!(name("box", NEWUTS), Ok(Some("box".into())));
    assert!(
        name("box", 0)
            .unwrap_err()
            .to_string()
            .contains("without a private UTS namespace")
    );
    assert!(name(&"x".repeat(65), NEWUTS).is_err());
}

#[test]
fn id_mappings() {
    let plan = |list: Value, flags| {
        let linux = linux(json!({"uidMappings": list}));
        mappings("linux.uidMappings", linux.uid_mappings().as_ref(), flags)
    };
    assert_eq!(
        plan(
            json!([{"containerID": 0, "hostID": 1000, "size": 5}]),
            NEWUSER
        ),
        Ok(vec![IdMapping {
            inside: 0,
            outside: 1000,
            size: 5
        }])
    );
    assert_eq!(plan(json!([]), 0), Ok(vec![]));
    for (list, flags) in [
        (json!([]), NEWUSER),
        (json!([{"containerID": 0, "hostID": 0, "size": 1}]), 0),
        (json!([{"containerID": 0, "hostID": 0, "size": 0}]), NEWUSER),
        (
            json!([{"containerID": 0, "hostID": u32::MAX, "size": 2}]),
            NEWUSER,
        ),
    ] {
        let error = plan(list, flags).unwrap_err().to_string();
        assert!(error.starts_with("linux.uidMappings"), "{error}");
    }
}

#[test]
fn clocks() {
    let offsets =
        json!({"timeOffsets": {"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 1}}});
    let plan = time_offsets(&linux(offsets.clone()), NEWTIME).unwrap();
    let seen: Vec<_> = plan
        .iter()
        .map(|o| (o.clock.as_str(), o.seconds, o.nanoseconds))
        .collect();
    assert_eq!(seen, [("boottime", 1, 0), ("monotonic", -5, 7)]);
    assert!(time_offsets(&linux(offsets), 0).is_err());
    for offsets in [
        json!({"timeOffsets": {"realtime": {"secs": 1}}}),
        json!({"timeOffsets": {"boottime": {"nanosecs": 1_000_000_000}}}),
    ] {
        assert!(time_offsets(&linux(offsets), NEWTIME).is_err());
    }
}

#[test]
fn system_controls() {
    let plan = |key: &str| {
        let linux = linux(json!({"sysctl": {key: "1"}}));
        sysctls(&linux, NEWUTS).map(|mut list| list.remove(0).0)
    };
    for (key, name) in [
        ("net.ipv4.ip_forward", "net.ipv4.ip_forward"),
        ("kernel.shmmax", "kernel.shmmax"),
        (
            "net/ipv4/conf/eth0.1/forwarding",
            "net.ipv4.conf.eth0/1.forwarding",
        ),
        (
            "net.ipv4.conf.eth0/1.forwarding",
            "net.ipv4.conf.eth0/1.forwarding",
        ),
    ] {
        assert_eq!(plan(key).unwrap(), name);
    }
    for key in [
        "",
        "../../etc/passwd",
        "/etc/passwd",
        "net..x",
        "a//b",
        "net.ipv4 x",
        "kernel.hostname",
        ".x",
    ] {
        let error = plan(key).unwrap_err().to_string();
        assert!(error.starts_with("linux.sysctl["), "{key}: {error}");
    }
}

#[test]
fn what_a_guest_cannot_have() {
    for (value, expected) in [
        (
            json!({"netDevices": {"eth0": {}}}),
            "linux.netDevices: not supported",
        ),
        (
            json!({"intelRdt": {"closID": "x"}}),
            "linux.intelRdt: not supported",
        ),
        (
            json!({"memoryPolicy": {"mode": "MPOL_BIND"}}),
            "linux.memoryPolicy: not supported",
        ),
    ] {
        let error = refuse(&linux(value), &mut Warnings::default())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let mut warnings = Warnings::default();
    refuse(&linux(json!({"mountLabel": "x"})), &mut warnings).unwrap();
    assert_eq!(warnings.0.len(), 1);
    assert!(paths("linux.maskedPaths", &Some(vec!["relative".into()])).is_err());
}
