// SPDX-License-Identifier: Apache-2.0
//! `linux.resources` and `linux.cgroupsPath`: exact limits inside, a cgroup for the engine outside. Runs against runc
//! and crun too.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use harness::fields::{check_refused, look, probe};
use harness::{Bundle, BundleBuilder, Container, Runtime, skip_on};
use serde_json::{Map, Value, json};

const MEGABYTE: u64 = 1 << 20;

/// Shows the limits of the own cgroup. A shell: it is done quickly with little of a processor.
const SHOW_LIMITS: &str = "cd /sys/fs/cgroup
for name in memory.max memory.low memory.swap.max memory.high memory.oom.group cpu.weight cpu.max cpu.max.burst \\
    cpu.idle pids.max hugetlb.2MB.max; do echo $name $(cat $name); done
echo end";

/// What it has shown, by the names of the files.
fn limits(text: &str) -> Value {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    let limits: Map<String, Value> = lines
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    limits.into()
}

/// The cgroup of the process that engines see.
fn cgroup(container: &Container) -> PathBuf {
    let pid = container.state()["pid"].to_string();
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap();
    Path::new("/sys/fs/cgroup").join(path)
}

fn read(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    let text =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.trim().to_owned()
}

/// guest: linux.resources.memory.limit linux.resources.memory.reservation linux.resources.memory.swap
/// guest: linux.resources.cpu.shares linux.resources.cpu.quota linux.resources.cpu.period
/// guest: linux.resources.pids.limit linux.resources.unified
/// host: linux.resources.memory.limit linux.resources.cpu.shares linux.resources.cpu.quota linux.cgroupsPath
#[test]
fn limits_inside_and_outside() {
    let runtime = Runtime::new();
    let path = format!("/conformance-{}/inner", std::process::id());
    let bundle = Bundle::script(&format!("{SHOW_LIMITS}; exec sleep 1000"))
        .set("/linux/cgroupsPath", path.as_str())
        .set(
            "/linux/resources",
            json!({
                "memory": {"limit": 200 * MEGABYTE, "reservation": 50 * MEGABYTE, "swap": 300 * MEGABYTE},
                "cpu": {"shares": 512, "quota": 30_000, "period": 60_000},
                "pids": {"limit": 77},
                "unified": {"memory.high": (190 * MEGABYTE).to_string(), "memory.oom.group": "1"}
            }),
        )
        .build();
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("output", || container.stdout().ends_with("end\n"));
    let seen = limits(&container.stdout());
    let megabytes = |number: u64| json!((number * MEGABYTE).to_string());
    assert_eq!(seen["memory.max"], megabytes(200));
    assert_eq!(seen["memory.low"], megabytes(50));
    assert_eq!(seen["memory.swap.max"], megabytes(100));
    assert_eq!(seen["memory.high"], megabytes(190));
    assert_eq!(seen["memory.oom.group"], "1");
    assert_eq!(seen["cpu.weight"], "20");
    assert_eq!(seen["cpu.max"], "30000 60000");
    assert_eq!(seen["pids.max"], "77");

    let outside = cgroup(&container);
    assert_eq!(outside, Path::new("/sys/fs/cgroup").join(&path[1..]));
    assert_eq!(read(&outside, "cpu.weight"), "20");
    let most: u64 = read(&outside, "memory.max").parse().unwrap();
    let quota = read(&outside, "cpu.max");
    if runtime.is_sandbox() {
        // The guest and what its monitor needs.
        assert!(most > 200 * MEGABYTE && most < 400 * MEGABYTE, "{most}");
        assert_eq!(quota, "36000 60000", "a tenth more");
    } else {
        assert_eq!((most, quota.as_str()), (200 * MEGABYTE, "30000 60000"));
    }

    update(&runtime, &container);
    let pid = container.state()["pid"].to_string();
    drop(container);
    assert!(!outside.exists(), "{} is left of {pid}", outside.display());
    let _ = fs::remove_dir(outside.parent().unwrap());
}

/// By options and by a document, as engines do it.
fn update(runtime: &Runtime, container: &Container) {
    let id = container.id();
    let options = [
        "update",
        "--memory",
        "150m",
        "--memory-swap",
        "250m",
        "--cpu-share",
        "1024",
        "--cpu-quota",
        "20000",
        "--pids-limit",
        "55",
        id,
    ];
    // Of the order of runc's: the id may come first or last.
    runtime.call(&options).ok();
    let now = || limits(container.exec(&["/bin/sh", "-c", SHOW_LIMITS]).ok());
    let seen = now();
    assert_eq!(seen["memory.max"], json!((150 * MEGABYTE).to_string()));
    assert_eq!(seen["memory.swap.max"], json!((100 * MEGABYTE).to_string()));
    assert_eq!(seen["cpu.weight"], "39");
    assert_eq!(seen["cpu.max"], "20000 60000", "the period stays");
    assert_eq!(seen["pids.max"], "55");

    let resources = json!({"pids": {"limit": 66}, "cpu": {"shares": 2048}});
    let mut command = runtime.command();
    let mut child = command
        .args(["update", "--resources", "-", id])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(resources.to_string().as_bytes())
        .unwrap();
    assert_eq!(harness::runtime::wait(child), 0);
    let seen = now();
    assert_eq!(seen["pids.max"], "66");
    assert_eq!(seen["cpu.weight"], "79");
    assert_eq!(
        seen["memory.max"],
        json!((150 * MEGABYTE).to_string()),
        "what is not named stays"
    );
    assert_eq!(read(&cgroup(container), "cpu.weight"), "79");
}

/// guest: linux.resources.cpu.burst linux.resources.cpu.idle linux.resources.hugepageLimits.pageSize
/// guest: linux.resources.hugepageLimits.limit linux.resources.memory.checkBeforeUpdate
/// host: linux.resources.cpu.idle linux.resources.cpu.burst linux.resources.memory.reservation
/// host: linux.resources.memory.swap process.oomScoreAdj process.rlimits
#[test]
fn limits_that_came_later() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "their versions in Debian 12 do not know burst, idle or checkBeforeUpdate"
    );
    let bundle = Bundle::script(&format!("{SHOW_LIMITS}; exec sleep 1000"))
        .set("/process/oomScoreAdj", 321)
        .set(
            "/linux/resources",
            json!({
                "memory": {"reservation": 50 * MEGABYTE, "limit": 200 * MEGABYTE, "swap": 200 * MEGABYTE},
                "cpu": {"idle": 1, "quota": 30_000, "period": 60_000, "burst": 10_000, "shares": 512},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MEGABYTE}]
            }),
        )
        .build();
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("output", || container.stdout().ends_with("end\n"));
    let seen = limits(&container.stdout());
    assert_eq!(seen["cpu.idle"], "1");
    assert_eq!(seen["cpu.max.burst"], "10000");
    assert_eq!(seen["memory.swap.max"], "0");
    assert_eq!(seen["hugetlb.2MB.max"], json!((4 * MEGABYTE).to_string()));

    let outside = cgroup(&container);
    assert_eq!(read(&outside, "cpu.idle"), "1");
    assert_eq!(read(&outside, "cpu.max.burst"), "10000");
    assert_ne!(read(&outside, "memory.low"), "0");
    assert_eq!(read(&outside, "memory.swap.max"), "0");
    let pid = container.state()["pid"].to_string();
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert_eq!(score.trim(), "321");
    let files = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = files
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let most: u64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
    assert!(most >= 1024, "{line}");

    let resources = json!({"memory": {"limit": 65_536, "checkBeforeUpdate": true}});
    let file = container.bundle().path().join("resources.json");
    fs::write(&file, resources.to_string()).unwrap();
    let outcome = runtime.call(&[
        "update",
        "--resources",
        file.to_str().unwrap(),
        container.id(),
    ]);
    assert!(
        outcome.refusal().contains("rejecting memory limit"),
        "{outcome:?}"
    );
    assert_eq!(
        container
            .exec(&["/bin/cat", "/sys/fs/cgroup/memory.max"])
            .ok(),
        (200 * MEGABYTE).to_string()
    );
}

/// A block device to throttle.
struct Loop(String, PathBuf);

impl Loop {
    fn new() -> Option<Loop> {
        let image = std::env::temp_dir().join(format!("throttled-{}", std::process::id()));
        fs::File::create(&image).unwrap().set_len(MEGABYTE).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image)
            .output()
            .ok()?;
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        (output.status.success() && !device.is_empty()).then_some(Loop(device, image))
    }

    fn minor(&self) -> u32 {
        use std::os::unix::fs::MetadataExt;
        rustix::fs::minor(fs::metadata(&self.0).unwrap().rdev())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
        let _ = fs::remove_file(&self.1);
    }
}

/// host: linux.resources.cpu.cpus linux.resources.cpu.mems linux.resources.blockIO.throttleReadBpsDevice
/// host: linux.resources.blockIO.throttleWriteBpsDevice linux.resources.blockIO.throttleReadIOPSDevice
/// host: linux.resources.blockIO.throttleWriteIOPSDevice linux.resources.blockIO.weight
#[test]
fn processors_and_devices_of_the_host() {
    let runtime = Runtime::new();
    let device = Loop::new().expect("losetup");
    let throttle = |rate: u64| json!([{"major": 7, "minor": device.minor(), "rate": rate}]);
    let bundle = Bundle::busybox(&["/bin/sleep", "1000"])
        .set(
            "/linux/resources",
            json!({
                "cpu": {"cpus": "1", "mems": "0"},
                "blockIO": {
                    "weight": 500,
                    "throttleReadBpsDevice": throttle(10 * MEGABYTE),
                    "throttleWriteBpsDevice": throttle(20 * MEGABYTE),
                    "throttleReadIOPSDevice": throttle(300),
                    "throttleWriteIOPSDevice": throttle(400)
                }
            }),
        )
        .build();
    let container = runtime.create(bundle);
    let outside = cgroup(&container);
    assert_eq!(read(&outside, "cpuset.cpus"), "1");
    assert_eq!(read(&outside, "cpuset.mems"), "0");
    let expected = format!(
        "7:{} rbps=10485760 wbps=20971520 riops=300 wiops=400",
        device.minor()
    );
    assert_eq!(read(&outside, "io.max"), expected);
    if runtime.is_sandbox() {
        container.start();
        assert_eq!(
            container.exec(&["/bin/nproc"]).ok(),
            "1",
            "as many as it is pinned to"
        );
    }
}

fn with(resources: Value) -> BundleBuilder {
    Bundle::busybox(&["/bin/true"]).set("/linux/resources", resources)
}

/// refused: linux.resources.memory.swap linux.resources.unified
#[test]
fn limits_that_cannot_be() {
    let runtime = Runtime::new();
    let refused = |resources, words: &[&str]| check_refused(&runtime, with(resources), words);
    refused(
        json!({"memory": {"limit": 200 * MEGABYTE, "swap": 100 * MEGABYTE}}),
        &["swap"],
    );
    refused(json!({"unified": {"nosuch.file": "1"}}), &["nosuch.file"]);
    refused(json!({"unified": {"pids.max": "many"}}), &["pids.max"]);
}

/// refused: linux.resources.memory.limit linux.resources.cpu.realtimeRuntime linux.resources.cpu.realtimePeriod
/// refused: linux.resources.cpu.idle linux.resources.cpu.cpus linux.resources.rdma linux.resources.unified
/// refused: linux.resources.hugepageLimits.pageSize linux.resources.blockIO.weight linux.resources.blockIO.weightDevice
/// refused: linux.resources.memory.swap linux.resources.hugepageLimits
#[test]
fn limits_that_a_guest_cannot_have() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "they can, overlook them, or say it in other words"
    );
    let refused = |resources, words: &[&str]| check_refused(&runtime, with(resources), words);
    let cpu = |value: Value| json!({"cpu": value});
    refused(
        json!({"memory": {"limit": MEGABYTE}}),
        &["linux.resources.memory.limit"],
    );
    refused(
        json!({"memory": {"swap": MEGABYTE}}),
        &["linux.resources.memory.swap", "memory limit"],
    );
    refused(
        cpu(json!({"realtimeRuntime": 1})),
        &["linux.resources.cpu.realtimeRuntime"],
    );
    refused(
        cpu(json!({"realtimePeriod": 1})),
        &["linux.resources.cpu.realtimePeriod"],
    );
    refused(cpu(json!({"idle": 2})), &["linux.resources.cpu.idle"]);
    refused(cpu(json!({"cpus": "one"})), &["linux.resources.cpu.cpus"]);
    refused(cpu(json!({"cpus": "500"})), &["cpuset.cpus"]);
    refused(
        json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}),
        &["linux.resources.rdma"],
    );
    refused(
        json!({"unified": {"cgroup.procs": "1"}}),
        &["linux.resources.unified", "cgroup.procs"],
    );
    refused(
        json!({"unified": {"../x": "1"}}),
        &["linux.resources.unified", "../x"],
    );
    refused(
        json!({"hugepageLimits": [{"pageSize": "huge", "limit": 1}]}),
        &["linux.resources.hugepageLimits.pageSize"],
    );
    refused(
        json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}),
        &["hugetlb.3MB.max"],
    );
    refused(
        json!({"blockIO": {"weight": 5}}),
        &["linux.resources.blockIO.weight"],
    );
    let weights = json!({"blockIO": {"weightDevice": [{"major": 7, "minor": 0, "weight": 300}]}});
    refused(weights, &["linux.resources.blockIO.weightDevice"]);
}

/// ignored: linux.resources.memory.kernel linux.resources.memory.kernelTCP linux.resources.memory.swappiness
/// ignored: linux.resources.memory.disableOOMKiller linux.resources.memory.useHierarchy linux.resources.network.classID
/// ignored: linux.resources.network.priorities linux.resources.blockIO.leafWeight
#[test]
fn limits_of_the_first_version_of_cgroups() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "some of them refuse these, without a word of warning for the others"
    );
    let outcome = runtime.run(
        &Bundle::script("echo runs")
            .set(
                "/linux/resources",
                json!({
                    "memory": {"kernel": MEGABYTE, "kernelTCP": MEGABYTE, "swappiness": 10, "disableOOMKiller": true,
                        "useHierarchy": false},
                    "network": {"classID": 5, "priorities": [{"name": "lo", "priority": 5}]},
                    "blockIO": {"leafWeight": 300}
                }),
            )
            .build(),
    );
    assert_eq!(outcome.ok(), "runs");
    for field in [
        "memory.kernel:",
        "memory.kernelTCP",
        "memory.swappiness",
        "memory.disableOOMKiller",
        "memory.useHierarchy",
        "linux.resources.network",
        "blockIO.leafWeight",
    ] {
        assert!(outcome.stderr.contains(field), "{field}: {outcome:?}");
    }
}

/// guest: linux.resources.cpu.quota
#[test]
fn as_many_processors_as_a_quota_takes() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "their containers see the processors of the host"
    );
    for (quota, expected) in [(50_000, 1), (150_000, 2)] {
        let bundle = probe("show(cpus=len(os.sched_getaffinity(0)))")
            .set(
                "/linux/resources/cpu",
                json!({"quota": quota, "period": 100_000}),
            )
            .build();
        assert_eq!(look(&runtime, &bundle)["cpus"], expected, "{quota}");
    }
}
