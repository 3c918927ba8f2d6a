// SPDX-License-Identifier: Apache-2.0
//! Configurations changed at random go through reading and planning: whatever comes out, it is a plan or an error that can
//! be shown, and never a panic. `MUTATIONS` in the environment says how many, `SEED` which.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use runtime_shim::bundle::Bundle;
use runtime_shim::cli::CgroupManager;
use runtime_shim::commands::chain;
use runtime_shim::plan::{HostFacts, Options, plan};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Map, Value, json};

const MUTATIONS: u64 = 10_000;

/// A bundle directory, removed on drop.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(path.join("rootfs")).unwrap();
        Directory(path)
    }

    /// Reads and plans as `create` does. The error as it is shown.
    fn plan(&self, config: &[u8]) -> Result<(), String> {
        // In memory: thousands of files are slow on a busy disk.
        let flags = MemfdFlags::CLOEXEC;
        let mut file = File::from(memfd_create("config", flags).unwrap());
        file.write_all(config).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let bundle = Bundle::load(&self.0, Some(&path)).map_err(|error| chain(&error))?;
        let planned = |cgroup_manager| {
            let id = "c1".to_owned();
            let options = Options { id, cgroup_manager };
            let planned = plan(&bundle, &options, &HostFacts::gather(&bundle));
            planned.map(drop).map_err(|error| chain(&error))
        };
        // Its paths have another form; here only panics count.
        let _ = planned(CgroupManager::Systemd);
        planned(CgroupManager::Cgroupfs)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// xorshift64*: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// A configuration with a value in each field of the specification.
fn full_config() -> Value {
    let hook = json!([{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 5}]);
    let sets = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "box",
        "domainname": "example",
        "annotations": {"a": "b", "io.sandbox.network": "none"},
        "process": {
            "terminal": true,
            "consoleSize": {"height": 25, "width": 80},
            "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3, 4]},
            "args": ["sh", "-c", "true"],
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": sets, "effective": sets, "inheritable": sets, "permitted": sets, "ambient": sets
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
            "noNewPrivileges": true,
            "apparmorProfile": "",
            "selinuxLabel": "",
            "oomScoreAdj": 100,
            "scheduler": {"policy": "SCHED_BATCH", "nice": 5},
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
            "execCPUAffinity": {"initial": "0", "final": "0-1"}
        },
        "hooks": {
            "prestart": hook, "createRuntime": hook, "createContainer": hook, "startContainer": hook,
            "poststart": hook, "poststop": hook
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/mnt", "type": "bind", "source": "/tmp", "options": ["rbind", "ro", "rprivate"]},
            {"destination": "/x/../y", "type": "bind", "source": "rootfs", "options": ["bind"]},
            {"destination": "/cg", "type": "cgroup", "source": "cgroup", "options": ["ro"]}
        ],
        "linux": {
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
            "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
            "sysctl": {"net.core.somaxconn": "256"},
            "cgroupsPath": "/x/y",
            "rootfsPropagation": "rslave",
            "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}},
            "personality": {"domain": "LINUX32"},
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438,
                         "uid": 0, "gid": 0}],
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}, {"type": "user"}, {"type": "time"}
            ],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [
                    {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                    {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "args": [
                        {"index": 0, "value": 2_114_060_288, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}]}
                ]
            },
            "resources": {
                "devices": [{"allow": false, "access": "rwm"},
                            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}],
                "memory": {"limit": 268_435_456, "reservation": 1_048_576, "swap": 536_870_912,
                           "swappiness": 10, "disableOOMKiller": false},
                "cpu": {"shares": 512, "quota": 50000, "period": 100_000, "burst": 1000, "idle": 0,
                        "cpus": "0-1", "mems": "0"},
                "pids": {"limit": 100},
                "blockIO": {"weight": 100,
                            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 2_097_152}],
                "unified": {"memory.high": "1000000"}
            }
        }
    })
}

/// One that is a plan, so that what is changed in it meets all checks.
fn small_config() -> Value {
    let mut config = full_config();
    let linux = config["linux"].as_object_mut().unwrap();
    linux.remove("uidMappings");
    linux.remove("gidMappings");
    let kept = |namespace: &Value| namespace["type"] != "user";
    linux["namespaces"].as_array_mut().unwrap().retain(kept);
    config
}

/// Values that programs trip over.
fn strange_values() -> Vec<Value> {
    let nested = (0..40).fold(json!(0), |inner, _| json!([inner]));
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(u32::MAX),
        json!(4_294_967_296_u64),
        json!(1.5),
        json!(1e300),
        json!(""),
        json!("/"),
        json!(".."),
        json!("../../../../etc/passwd"),
        json!("/proc/self/fd/3"),
        json!("a\nb\u{1b}[2J"),
        json!("a\0b"),
        json!("\u{202e}\u{1f600}\u{ffff}"),
        json!("x".repeat(70_000)),
        json!("/a".repeat(3000)),
        json!("0-4294967295"),
        json!("1-0,,-"),
        json!("99999999999999999999"),
        json!("="),
        json!([]),
        json!([[]]),
        json!([null]),
        json!({}),
        json!({"": ""}),
        nested,
    ]
}

/// The pointers to all values.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let name = name.replace('~', "~0").replace('/', "~1");
                pointers(field, &format!("{at}/{name}"), all);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                pointers(item, &format!("{at}/{index}"), all);
            }
        }
        _ => {}
    }
}

fn any_value<'a>(config: &'a mut Value, random: &mut Random) -> &'a mut Value {
    let mut all = Vec::new();
    pointers(config, "", &mut all);
    let chosen = random.pick(&all).as_str();
    config.pointer_mut(chosen).unwrap()
}

fn mutate_value(config: &mut Value, strange: &[Value], random: &mut Random) {
    let kind = random.below(6);
    let other = any_value(config, random).clone();
    let value = any_value(config, random);
    match (kind, value) {
        (0, value) => *value = other,
        (1, Value::Object(fields)) => {
            let names: Vec<_> = fields.keys().cloned().collect();
            if !names.is_empty() {
                fields.remove(random.pick(&names));
            }
        }
        (2, Value::Array(items)) if !items.is_empty() => {
            let item = random.pick(items).clone();
            let times = *random.pick(&[1, 2, 100]);
            items.extend(std::iter::repeat_n(item, times));
        }
        (3, Value::Array(items)) => items.push(other),
        (3, Value::Object(fields)) => drop(fields.insert("unknown\n".into(), other)),
        (4, Value::String(text)) => {
            let at = random.below(text.chars().count() + 1);
            let odd = *random.pick(&['/', '.', ':', '=', '\0', '\n', '-', '9', '\u{7f}', 'é']);
            *text = text
                .chars()
                .take(at)
                .chain([odd])
                .chain(text.chars().skip(at))
                .collect();
        }
        (4, Value::Number(number)) => {
            let old = number.as_i64().unwrap_or(0);
            let shifted = old.wrapping_shl(u32::try_from(random.below(64)).unwrap());
            *number = random
                .pick(&[shifted, old.wrapping_neg(), old.wrapping_add(1)])
                .to_owned()
                .into();
        }
        (_, value) => *value = random.pick(strange).clone(),
    }
}

fn mutate_bytes(config: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(config.len());
    match random.below(5) {
        0 => config[at] = u8::try_from(random.below(256)).unwrap(),
        1 => config.truncate(at),
        2 => drop(config.drain(at..(at + random.below(50)).min(config.len()))),
        3 => {
            let piece = config[at..(at + random.below(200)).min(config.len())].to_vec();
            config.splice(at..at, piece);
        }
        _ => config.insert(at, *random.pick(b"{}[]\",:\\-9e\0\xff")),
    }
}

fn mutated(base: &Value, strange: &[Value], random: &mut Random) -> Vec<u8> {
    let mut config = base.clone();
    let bytes = random.below(4) == 0;
    if !bytes {
        for _ in 0..=random.below(3) {
            mutate_value(&mut config, strange, random);
        }
    }
    let mut config = config.to_string().into_bytes();
    if bytes {
        for _ in 0..=random.below(3) {
            if !config.is_empty() {
                mutate_bytes(&mut config, random);
            }
        }
    }
    config
}

fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{variable}"))
    })
}

#[test]
fn no_mutation_panics() {
    let directory = Directory::new("mutated");
    let seed = number("SEED", 1).max(1);
    let mut random = Random(seed);
    let (full, small) = (full_config(), small_config());
    directory.plan(small.to_string().as_bytes()).unwrap();
    let strange = strange_values();
    let (mut plans, mut errors) = (0, 0);
    for round in 0..number("MUTATIONS", MUTATIONS) {
        let base = if round % 4 == 0 { &full } else { &small };
        let config = mutated(base, &strange, &mut random);
        let result = catch_unwind(AssertUnwindSafe(|| directory.plan(&config)));
        let text = String::from_utf8_lossy(&config);
        match result {
            Ok(Ok(())) => plans += 1,
            Ok(Err(error)) => {
                assert!(
                    !error.is_empty() && error.len() < 200_000,
                    "{round}: {error}"
                );
                errors += 1;
            }
            Err(_) => panic!("seed {seed}, round {round} panics: {text}"),
        }
    }
    println!("{plans} plans, {errors} errors");
    assert!(plans > 0 && errors > 0);
}

/// What a hostile writer of bundles tries: the error in few words, or that it is a plan.
#[test]
fn hostile_configs_by_hand() {
    let directory = Directory::new("hostile");
    let refused = |config: &[u8], expected: &str| {
        let error = directory.plan(config).unwrap_err();
        assert!(error.contains(expected), "{expected:?} in {error:?}");
    };
    for depth in [200, 100_000] {
        refused("[".repeat(depth).as_bytes(), "recursion limit");
        let objects = format!("{}0{}", "{\"a\":".repeat(depth), "}".repeat(depth));
        refused(objects.as_bytes(), "recursion limit");
    }
    refused(b"", "EOF");
    refused(b"\xff\xfe{\0}\0", "expected value");
    refused(b"null", "invalid type");
    refused(
        b"{\"ociVersion\": \"1.0.0\", \"hostname\": \"\xff\xff\"}",
        "invalid unicode",
    );
    let text = full_config().to_string();
    let twice = text.replacen('{', "{\"hostname\": \"other\",", 1);
    refused(twice.as_bytes(), "duplicate field `hostname`");

    let with = |pointer: &str, value: Value| {
        let mut config = full_config();
        *config
            .pointer_mut(pointer)
            .unwrap_or_else(|| panic!("{pointer}")) = value;
        config.to_string()
    };
    for (pointer, value, expected) in [
        (
            "/root/path",
            json!("../../../../../nonexistent"),
            "root.path",
        ),
        ("/root/path", json!("/dev/null"), "not a directory"),
        ("/root/path", json!(""), "root.path is missing"),
        ("/process/cwd", json!("proc/self/fd/3"), "process.cwd"),
        ("/process/args", json!([]), "process.args"),
        (
            "/hooks/prestart/0/path",
            json!("bin/true"),
            "hooks.prestart",
        ),
        ("/linux/cgroupsPath", json!("../../.."), "linux.cgroupsPath"),
        (
            "/mounts/0/destination",
            json!("proc\0x"),
            "mounts[0].destination",
        ),
    ] {
        refused(with(pointer, value).as_bytes(), expected);
    }
    let mut kernel = full_config();
    kernel["vm"] = json!({"kernel": {"path": "/etc/passwd"}, "hypervisor": {"path": "/bin/sh"}});
    refused(kernel.to_string().as_bytes(), "vm");
}

#[test]
fn files_that_are_no_config() {
    let directory = Directory::new("files");
    let path = directory.0.join("config.json");
    let error = || chain(&Bundle::load(&directory.0, None).unwrap_err());
    let large = fs::File::create(&path).unwrap();
    large.set_len(256 << 20).unwrap();
    assert!(error().contains("larger than 4 MiB"), "{}", error());
    for odd in ["/dev/zero", "/proc/self/mem", "."] {
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(odd, &path).unwrap();
        assert!(error().contains("config.json"), "{odd}: {}", error());
    }
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("config.json", &path).unwrap();
    assert!(error().contains("config.json"), "{}", error());
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(error().contains("not a regular file"), "{}", error());
}

/// More of everything than anyone needs is planned or refused by name.
#[test]
fn many_of_a_kind() {
    let directory = Directory::new("many");
    let config = small_config();
    let many = |make: &dyn Fn(usize) -> Value| Value::Array((0..10_000).map(make).collect());
    let mount = |n| json!({"destination": format!("/m/{n}"), "type": "tmpfs", "source": "x"});
    let node = |n| json!({"path": format!("/dev/d{n}"), "type": "c", "major": 1, "minor": 3});
    let rule = |n| json!({"allow": true, "type": "c", "major": n, "minor": n, "access": "rw"});
    let annotations: Map<_, _> = (0..10_000).map(|n| (format!("a{n}"), json!("x"))).collect();
    for (pointer, value, refused) in [
        ("/mounts", many(&mount), true),
        ("/process/env", many(&|n| json!(format!("V{n}={n}"))), false),
        ("/process/user/additionalGids", many(&|n| json!(n)), false),
        (
            "/linux/maskedPaths",
            many(&|n| json!(format!("/p/{n}"))),
            true,
        ),
        ("/linux/devices", many(&node), true),
        ("/linux/resources/devices", many(&rule), true),
        ("/annotations", Value::Object(annotations), false),
    ] {
        let mut changed = config.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        let result = directory.plan(changed.to_string().as_bytes());
        assert_eq!(result.is_err(), refused, "{pointer}: {result:?}");
        if let Err(error) = result {
            let field = pointer.trim_start_matches('/').replace('/', ".");
            assert!(error.starts_with(&format!("{field}: more than")), "{error}");
        }
    }
}

#[test]
fn links_lead_no_further_than_the_bundle_says() {
    let directory = Directory::new("links");
    // The bundle names its root file system, and may name any directory of the host: but no file, and no loop.
    let link = |target: &str| {
        let path = directory.0.join("link");
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(target, path).unwrap();
        let mut config = full_config();
        config["root"]["path"] = json!("link");
        directory.plan(config.to_string().as_bytes())
    };
    for target in ["link", "nosuch", "/dev/null"] {
        let error = link(target).unwrap_err();
        assert!(error.contains("root.path"), "{target}: {error}");
    }
}
