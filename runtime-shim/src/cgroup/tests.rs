// SPDX-License-Identifier: Apache-2.0
use super::*;

const V2_MOUNTS: &str = "\
29 22 0:25 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
30 22 0:26 / /proc rw - proc proc rw
";

const HYBRID_MOUNTS: &str = "\
30 22 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 /part /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
35 30 0:30 /part /elsewhere rw - cgroup cgroup rw,memory
";

const HYBRID_OWN: &str = "\
5:name=systemd:/init.scope
4:memory:/part/mine
3:cpu,cpuacct:/a/b
0::/u
";

fn path(location: &str) -> CgroupLocation {
    CgroupLocation::Path(location.into())
}

fn systemd(slice: &str, prefix: &str, name: &str) -> CgroupLocation {
    CgroupLocation::Systemd {
        slice: slice.into(),
        prefix: prefix.into(),
        name: name.into(),
    }
}

#[test]
fn unified_directories() {
    let own = "0::/user.slice/user-7.slice/user@7.service/app.slice/shell.scope\n";
    let found = Hierarchies::parse(V2_MOUNTS, own);
    assert_eq!(found.mode(), Mode::Unified);
    let service = "/sys/fs/cgroup/user.slice/user-7.slice/user@7.service";
    for (location, user, expected) in [
        (path("/a/b"), false, "/sys/fs/cgroup/a/b".to_owned()),
        (path("c"), false, format!("{service}/app.slice/c")),
        (
            systemd("a-b.slice", "libpod", "id"),
            false,
            "/sys/fs/cgroup/a.slice/a-b.slice/libpod-id.scope".to_owned(),
        ),
        (
            systemd("", "", "id"),
            false,
            "/sys/fs/cgroup/system.slice/id.scope".to_owned(),
        ),
        (
            systemd("-.slice", "p", "id"),
            false,
            "/sys/fs/cgroup/p-id.scope".to_owned(),
        ),
        (
            systemd("", "p", "x.slice"),
            false,
            "/sys/fs/cgroup/system.slice/x.slice".to_owned(),
        ),
        (
            systemd("", "p", "id"),
            true,
            format!("{service}/user.slice/p-id.scope"),
        ),
    ] {
        assert_eq!(
            found.directories(&location, user),
            [PathBuf::from(expected)]
        );
    }
    assert!(
        found
            .directories(&CgroupLocation::Unchanged, false)
            .is_empty()
    );
}

#[test]
fn hybrid_directories() {
    let found = Hierarchies::parse(HYBRID_MOUNTS, HYBRID_OWN);
    assert_eq!(found.mode(), Mode::Hybrid);
    let expected = [
        "/sys/fs/cgroup/unified/x",
        "/sys/fs/cgroup/systemd/x",
        "/sys/fs/cgroup/cpu,cpuacct/a/x",
        "/sys/fs/cgroup/memory/x",
    ];
    assert_eq!(
        found.directories(&path("x"), false),
        expected.map(PathBuf::from)
    );
}

fn limits() -> HostLimits {
    HostLimits {
        memory_max: Some(Limit::Value(200 << 20)),
        memory_low: Some(1 << 20),
        memory_swap_max: Some(Limit::Value(1 << 20)),
        cpu_shares: Some(1024),
        cpu_quota: Some(CpuQuota {
            quota: Limit::Value(110_000),
            period: 100_000,
            burst: Some(5000),
        }),
        cpu_idle: false,
        cpuset_cpus: Some("0-1".into()),
        cpuset_mems: Some("0".into()),
        io_weight: Some(500),
        io_throttle: vec![IoThrottle {
            major: 8,
            minor: 16,
            kind: ThrottleKind::WriteBytes,
            rate: 1_000_000,
        }],
    }
}

fn flat(settings: &[Setting]) -> Vec<String> {
    settings
        .iter()
        .flatten()
        .map(|(file, value)| format!("{file}={value}"))
        .collect()
}

#[test]
fn unified_files() {
    assert_eq!(
        flat(&unified_settings(&limits())),
        [
            "memory.max=209715200",
            "memory.low=1048576",
            "memory.swap.max=1048576",
            "cpu.weight=39",
            "cpu.max=110000 100000",
            "cpu.max.burst=5000",
            "cpuset.cpus=0-1",
            "cpuset.mems=0",
            "io.max=8:16 wbps=1000000",
            "io.bfq.weight=500",
            "io.weight=default 4950",
        ]
    );
    let unlimited = HostLimits {
        memory_max: Some(Limit::Unlimited),
        cpu_idle: true,
        cpu_shares: Some(2),
        ..HostLimits::default()
    };
    assert_eq!(
        flat(&unified_settings(&unlimited)),
        ["memory.max=max", "cpu.idle=1"]
    );
}

#[test]
fn legacy_files() {
    assert_eq!(
        flat(&legacy_settings(&limits())),
        [
            "memory.limit_in_bytes=209715200",
            "memory.soft_limit_in_bytes=1048576",
            "memory.memsw.limit_in_bytes=210763776",
            "cpu.shares=1024",
            "cpu.cfs_period_us=100000",
            "cpu.cfs_quota_us=110000",
            "cpu.cfs_burst_us=5000",
            "cpuset.cpus=0-1",
            "cpuset.mems=0",
            "blkio.throttle.write_bps_device=8:16 1000000",
            "blkio.bfq.weight=500",
            "blkio.weight=500",
        ]
    );
}

/// With real cgroups, where this test may make some.
#[test]
fn life_of_a_cgroup() {
    let Ok(hierarchies) = Hierarchies::detect() else {
        eprintln!("skipped: no cgroup file system");
        return;
    };
    let location = path(&format!("/sandbox-test-{}/c", std::process::id()));
    let cgroup = match Cgroup::create(&hierarchies, &location) {
        Ok(cgroup) => cgroup,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    let paths = cgroup.paths().to_vec();
    assert!(paths.iter().all(|path| path.is_dir()));
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    cgroup.add(i32::try_from(child.id()).unwrap()).unwrap();
    let mine = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
    assert!(mine.contains("/sandbox-test-"), "{mine}");

    let deadline = Instant::now() + Duration::from_secs(20);
    // What a container might nest.
    let nested = paths[0].join("nested");
    fs::create_dir(&nested).unwrap();
    let opened = Cgroup::open(paths.clone());
    opened.kill(deadline).unwrap();
    child.wait().unwrap();
    opened.delete(deadline).unwrap();
    assert!(paths.iter().all(|path| !path.exists()));
    // Its parents are those that creating it made.
    drop(cgroup);
    let parents: Vec<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    assert!(parents.iter().all(|path| !path.exists()));
}

#[test]
fn a_missing_limit_is_named() {
    let directory = std::env::temp_dir().join(format!("sandbox-cgroup-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("cgroup.controllers"), "").unwrap();
    let cgroup = Cgroup::open(vec![directory.clone()]);
    let error = cgroup.set(&limits()).unwrap_err();
    fs::remove_dir_all(&directory).unwrap();
    assert!(matches!(error, CgroupError::NoLimit { file, .. } if file == "memory.max"));
}
