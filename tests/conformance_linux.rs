// SPDX-License-Identifier: Apache-2.0
//! `linux` of config.json but for mounts and limits, host names, annotations and the sections of platforms, from
//! inside. Runs against runc and crun too.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use harness::fields::{HostDirectory, check_refused, look, probe, probe_program, shown};
use harness::{Bundle, BundleBuilder, Runtime, skip_on};
use serde_json::{Value, json};

const NAMESPACES: &str =
    "{name: os.readlink('/proc/self/ns/' + name) for name in os.listdir('/proc/self/ns')}";

/// guest: linux.namespaces.type hostname linux.sysctl ociVersion annotations
/// host: annotations
#[test]
fn namespaces_and_what_lives_in_them() {
    let runtime = Runtime::new();
    let program = format!(
        "show(namespaces={NAMESPACES}, pid=os.getpid(), host=os.uname().nodename, cgroup=read('/proc/self/cgroup'),
    links=[line.split()[0] for line in open('/proc/net/dev') if ':' in line],
    shm=len(open('/proc/sysvipc/shm').readlines()), port=read('/proc/sys/net/ipv4/ip_unprivileged_port_start'),
    forward=read('/proc/sys/net/ipv4/conf/lo/forwarding'), messages=read('/proc/sys/kernel/msgmax'),
    queues=read('/proc/sys/fs/mqueue/msg_max'))
import time; time.sleep(1000)"
    );
    let bundle = probe(&program)
        .set("/hostname", "some-name.example")
        .set("/annotations", json!({"org.example.key": "value"}))
        .set(
            "/linux/sysctl",
            json!({
                "net.ipv4.ip_unprivileged_port_start": "77",
                "net/ipv4/conf/lo/forwarding": "1",
                "kernel.msgmax": "9000",
                "fs.mqueue.msg_max": "12"
            }),
        )
        .build();
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("output", || container.stdout().ends_with('\n'));
    let seen: Value = serde_json::from_str(&container.stdout()).unwrap();
    assert_eq!(seen["pid"], 1);
    assert_eq!(seen["host"], "some-name.example");
    assert_eq!(seen["cgroup"], "0::/");
    assert_eq!(seen["links"], json!(["lo:"]));
    assert_eq!(seen["shm"], 1, "the heading");
    assert_eq!(seen["port"], "77");
    assert_eq!(seen["forward"], "1");
    assert_eq!(seen["messages"], "9000");
    assert_eq!(seen["queues"], "12");
    assert_eq!(container.state()["annotations"]["org.example.key"], "value");
    // An exec is in the same.
    let program = probe_program(&format!("show(namespaces={NAMESPACES})"));
    let exec = shown(&container.exec(&["python3", "-c", &program]));
    assert_eq!(exec["namespaces"], seen["namespaces"]);
}

/// guest: linux.uidMappings linux.gidMappings linux.namespaces.type
#[test]
fn a_user_namespace_with_mappings() {
    let runtime = Runtime::new();
    let host = HostDirectory::new();
    std::os::unix::fs::chown(host.path(""), Some(100_000), Some(200_000)).unwrap();
    let map = |first: u32| json!([{"containerID": 0, "hostID": first, "size": 1000}]);
    let script = "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '
        touch /mnt/of-root; setsid true; chown 7:8 /mnt/of-root && stat -c %u:%g /mnt/of-root
        hostname inside; hostname; stat -c %u:%g /bin/busybox; echo x > /dev/null && echo null";
    let bundle = Bundle::script(script)
        .set("/linux/namespaces/-", json!({"type": "user"}))
        .set("/linux/uidMappings", map(100_000))
        .set("/linux/gidMappings", map(200_000))
        .capabilities(&["CAP_SYS_ADMIN", "CAP_CHOWN"])
        .bind(&host.path(""), "/mnt", &[])
        .build();
    let outcome = runtime.run(&bundle);
    let expected = "0\n0\n 0 100000 1000\n 0 200000 1000\n7:8\ninside\n65534:65534\nnull";
    assert_eq!(outcome.ok(), expected, "{outcome:?}");
    let file = fs::metadata(host.path("of-root")).unwrap();
    assert_eq!((file.uid(), file.gid()), (100_007, 200_008));
}

/// guest: linux.timeOffsets domainname
#[test]
fn clocks_and_domain_of_its_own() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "their versions in Debian 12 have no time namespaces or domain names"
    );
    let bundle = probe(
        "import time
show(monotonic=time.clock_gettime(time.CLOCK_MONOTONIC), boot=time.clock_gettime(time.CLOCK_BOOTTIME),
    domain=read('/proc/sys/kernel/domainname'))",
    )
    .set("/linux/namespaces/-", json!({"type": "time"}))
    .set("/linux/timeOffsets", json!({"monotonic": {"secs": 1_000_000}, "boottime": {"secs": 2_000_000, "nanosecs": 5}}))
    .set("/domainname", "example.org")
    .build();
    let seen = look(&runtime, &bundle);
    let monotonic = seen["monotonic"].as_f64().unwrap();
    assert!((1_000_000.0..1_001_000.0).contains(&monotonic), "{seen}");
    let boot = seen["boot"].as_f64().unwrap();
    assert!((2_000_000.0..2_001_000.0).contains(&boot), "{seen}");
    assert_eq!(seen["domain"], "example.org");
}

/// host: linux.namespaces.path
#[test]
fn the_network_namespace_of_an_engine() {
    let runtime = Runtime::new();
    let name = format!("conformance-{}", std::process::id());
    let ip = |verb: &str| {
        Command::new("ip")
            .args(["netns", verb, &name])
            .status()
            .unwrap()
    };
    assert!(ip("add").success());
    let path = format!("/var/run/netns/{name}");
    let bundle = Bundle::busybox(&["/bin/sleep", "1000"])
        .set(
            "/linux/namespaces/1",
            json!({"type": "network", "path": path}),
        )
        .build();
    let container = runtime.create(bundle);
    let pid = container.state()["pid"].to_string();
    let of_container = File::open(format!("/proc/{pid}/ns/net"))
        .unwrap()
        .metadata()
        .unwrap();
    let given = File::open(&path).unwrap().metadata().unwrap();
    assert_eq!(
        (of_container.dev(), of_container.ino()),
        (given.dev(), given.ino())
    );
    drop(container);
    assert!(ip("delete").success());
}

/// guest: linux.devices.path linux.devices.type linux.devices.major linux.devices.minor linux.devices.fileMode
/// guest: linux.devices.uid linux.devices.gid linux.resources.devices.allow linux.resources.devices.type
/// guest: linux.resources.devices.major linux.resources.devices.minor linux.resources.devices.access
#[test]
fn devices_and_their_rules() {
    let runtime = Runtime::new();
    let node = |path: &str, minor: u32, mode: u32| json!({"path": path, "type": "c", "major": 10, "minor": minor, "fileMode": mode, "uid": 7, "gid": 8});
    let rule = |minor: u32, access: &str| json!({"allow": true, "type": "c", "major": 10, "minor": minor, "access": access});
    let bundle = probe(
        r"
def opened(path, flags): return tried(lambda: os.close(os.open(path, flags)))
import stat
show(nodes={name: node('/dev/' + name) for name in
        ('null', 'zero', 'full', 'random', 'urandom', 'tty', 'net/tun', 'fuse', 'fifo')},
    links={name: os.readlink('/dev/' + name) for name in ('fd', 'stdin', 'stdout', 'stderr', 'ptmx')},
    tun=opened('/dev/net/tun', os.O_RDWR), fuse=opened('/dev/fuse', os.O_RDWR), half=opened('/dev/fuse', os.O_RDONLY),
    made=tried(os.mknod, '/dev/made', 0o600 | stat.S_IFCHR, os.makedev(1, 11)), used=opened('/dev/made', os.O_RDONLY),
    block=tried(os.mknod, '/dev/block', 0o600 | stat.S_IFBLK, os.makedev(7, 0)), blocked=opened('/dev/block', os.O_RDONLY),
    null=written('/dev/null', 'x'), full=written('/dev/full', 'x'), zero=list(open('/dev/zero', 'rb', 0).read(2)))",
    )
    .set(
        "/linux/devices",
        // Docker's file modes have the type of the file in them.
        json!([node("/dev/net/tun", 200, 0o20666), node("/dev/fuse", 229, 0o640),
            {"path": "/dev/fifo", "type": "p", "fileMode": 0o600}]),
    )
    .set(
        "/linux/resources/devices",
        json!([{"allow": true, "access": "rwm"}, {"allow": false, "access": "rwm"}, rule(200, "rwm"), rule(229, "r"),
            {"allow": true, "type": "b", "major": 7, "access": "m"}]),
    )
    .capabilities(&["CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN"])
    .build();
    let seen = look(&runtime, &bundle);
    for (name, minor) in [
        ("null", 3),
        ("zero", 5),
        ("full", 7),
        ("random", 8),
        ("urandom", 9),
    ] {
        assert_eq!(
            seen["nodes"][name],
            json!(["crw-rw-rw-", [1, minor], [0, 0]]),
            "{name}"
        );
    }
    assert_eq!(seen["nodes"]["tty"], json!(["crw-rw-rw-", [5, 0], [0, 0]]));
    assert_eq!(
        seen["nodes"]["net/tun"],
        json!(["crw-rw-rw-", [10, 200], [7, 8]])
    );
    assert_eq!(
        seen["nodes"]["fuse"],
        json!(["crw-r-----", [10, 229], [7, 8]])
    );
    assert_eq!(seen["nodes"]["fifo"][0], "prw-------");
    let links = json!({
        "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"
    });
    assert_eq!(seen["links"], links);
    assert_eq!(seen["tun"], "ok");
    assert_eq!(
        seen["fuse"], "Operation not permitted",
        "it may be read only"
    );
    assert_eq!(seen["half"], "ok");
    assert_eq!(seen["made"], "ok", "any node may be made");
    assert_eq!(seen["used"], "Operation not permitted", "but not used");
    assert_eq!(seen["block"], "ok");
    assert_eq!(seen["blocked"], "Operation not permitted");
    assert_eq!(seen["null"], "ok");
    assert_eq!(seen["full"], "No space left on device");
    assert_eq!(seen["zero"], json!([0, 0]));
}

/// System calls that Python does not need, to be filtered. The program forks for each.
const FILTERED: &str = r"
import ctypes, errno, mmap
libc = ctypes.CDLL(None, use_errno=True)
def called(*arguments):
    pid = os.fork()
    if pid == 0:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.set_errno(0)
        libc.syscall(*[ctypes.c_long(argument) for argument in arguments])
        os._exit(ctypes.get_errno())
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
def called_32():
    # mov eax, 20 (getpid); int 0x80; ret
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))
    function = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    pid = os.fork()
    if pid == 0: os._exit(0 if function() == os.getpid() else 1)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
";

/// guest: linux.seccomp.defaultAction linux.seccomp.architectures linux.seccomp.flags linux.seccomp.syscalls.names
/// guest: linux.seccomp.syscalls.action linux.seccomp.syscalls.errnoRet linux.seccomp.syscalls.args
#[test]
fn seccomp_actions_arguments_and_architectures() {
    let runtime = Runtime::new();
    let rule = |name: &str, action: &str| json!({"names": [name, "not_a_call"], "action": action});
    let errno = |name: &str, operator: &str, value: u64, two: u64, errno: u32| {
        json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
            "args": [{"index": 0, "value": value, "valueTwo": two, "op": operator}]})
    };
    let program = format!(
        "{FILTERED}
show(kill=called(139), thread=called(153), trap=called(163), trace=called(136), log=called(121, 0), errno=called(38, 0, 0, 0),
    equal=[called(36, which, 0) for which in (100, 101)], greater=[called(145, pid) for pid in (1 << 20, (1 << 20) + 1)],
    masked=[called(148, pid, 0) for pid in (0x123, 0x133)], less=[called(255, 9999, 5) for _ in (0,)],
    both=[called(254, first, second, 2) for first, second in ((9000, 7), (9000, 8), (9001, 7))],
    mode=status('Seccomp'), filters=int(status('Seccomp_filters')), compat=called_32())"
    );
    // runc of Debian 12 knows no flags.
    let flags = match runtime.name() {
        "runc" => json!([]),
        _ => json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]),
    };
    let profile = |architectures: Value| {
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": architectures,
            "flags": flags,
            "syscalls": [
                rule("sysfs", "SCMP_ACT_KILL_PROCESS"),
                rule("vhangup", "SCMP_ACT_KILL"),
                rule("acct", "SCMP_ACT_TRAP"),
                rule("ustat", "SCMP_ACT_TRACE"),
                rule("getpgid", "SCMP_ACT_LOG"),
                {"names": ["setitimer"], "action": "SCMP_ACT_ERRNO"},
                errno("getitimer", "SCMP_CMP_EQ", 100, 0, 101),
                errno("sched_getscheduler", "SCMP_CMP_GT", 1 << 20, 0, 102),
                errno("sched_rr_get_interval", "SCMP_CMP_MASKED_EQ", 0xf0, 0x20, 103),
                errno("inotify_rm_watch", "SCMP_CMP_LE", 9999, 0, 104),
                {"names": ["inotify_add_watch"], "action": "SCMP_ACT_ERRNO", "errnoRet": 105, "args": [
                    {"index": 0, "value": 9000, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 8, "op": "SCMP_CMP_LT"}
                ]}
            ]
        })
    };
    let both = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"]);
    let seen = look(
        &runtime,
        &probe(&program).set("/linux/seccomp", profile(both)).build(),
    );
    assert_eq!(seen["kill"], -libc::SIGSYS);
    assert_eq!(seen["thread"], -libc::SIGSYS);
    assert_eq!(seen["trap"], -libc::SIGSYS);
    assert_eq!(seen["trace"], libc::ENOSYS, "nobody traces");
    assert_eq!(seen["log"], 0, "and it goes on");
    assert_eq!(seen["errno"], libc::EPERM, "the default");
    assert_eq!(seen["equal"], json!([101, libc::EINVAL]));
    assert_eq!(seen["greater"], json!([libc::ESRCH, 102]));
    assert_eq!(seen["masked"], json!([103, libc::ESRCH]));
    assert_eq!(seen["less"], json!([104]));
    assert_eq!(seen["both"], json!([105, libc::EBADF, libc::EBADF]));
    assert_eq!(seen["mode"], "2");
    assert_eq!(seen["compat"], 0, "32-bit calls are let through");

    let program = format!(
        "{FILTERED}\nshow(compat=called_32(), errno=called(38, 0, 0, 0))\nimport time; time.sleep(1000)"
    );
    let bundle = probe(&program)
        .set("/linux/seccomp", profile(json!(["SCMP_ARCH_X86_64"])))
        .build();
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("output", || container.stdout().ends_with('\n'));
    let seen: Value = serde_json::from_str(&container.stdout()).unwrap();
    assert_eq!(
        seen["compat"],
        -libc::SIGSYS,
        "of an architecture that is not listed"
    );
    // The filter is an exec's too.
    let program = probe_program(&format!("{FILTERED}\nshow(errno=called(38, 0, 0, 0))"));
    assert_eq!(
        shown(&container.exec(&["python3", "-c", &program]))["errno"],
        libc::EPERM
    );
}

/// guest: linux.seccomp.defaultAction linux.seccomp.defaultErrnoRet
#[test]
fn seccomp_that_forbids_by_default() {
    let runtime = Runtime::new();
    // What busybox and the runtimes need, not mkdir.
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": [
            "access", "arch_prctl", "brk", "capget", "capset", "chdir", "clone", "close", "dup", "dup2", "dup3",
            "epoll_pwait", "execve", "exit", "exit_group", "faccessat2", "fchdir", "fchown", "fcntl", "fstat", "fstatfs",
            "futex", "getcwd", "getdents64", "getegid", "geteuid", "getgid", "getpgrp", "getpid", "getppid", "gettid",
            "getuid", "ioctl", "lseek", "lstat", "mmap", "mprotect", "munmap", "nanosleep", "newfstatat", "open",
            "openat", "openat2", "poll", "prctl", "prlimit64", "read", "readlink", "rseq", "rt_sigaction",
            "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield", "set_robust_list", "set_tid_address",
            "setgid", "setgroups", "setresgid", "setresuid", "setsid", "setuid", "sigaltstack", "stat", "statfs",
            "statx", "tgkill", "umask", "wait4", "write", "writev", "epoll_ctl", "close_range"
        ]}]
    });
    let bundle = Bundle::script("echo runs; mkdir /tmp/x || echo refused")
        .set("/linux/seccomp", profile)
        .build();
    let outcome = runtime.run(&bundle);
    assert_eq!(outcome.text(), "runs\nrefused\n", "{outcome:?}");
    assert!(
        outcome.stderr.contains("Function not implemented"),
        "{outcome:?}"
    );
}

fn with(pointer: &str, value: impl Into<Value>) -> BundleBuilder {
    Bundle::busybox(&["/bin/true"]).set(pointer, value)
}

/// refused: linux.seccomp linux.uidMappings linux.namespaces.type linux.sysctl hostname ociVersion
#[test]
fn what_contradicts_itself() {
    let runtime = Runtime::new();
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    let seccomp = json!({"defaultAction": "SCMP_ACT_NOSUCH"});
    refused(with("/linux/seccomp", seccomp), &["SCMP_ACT_NOSUCH"]);
    refused(
        with("/linux/sysctl", json!({"net.no.such": "1"})),
        &["net", "no", "such"],
    );
    if !runtime.is_sandbox() {
        // The others let some of these pass, or say no more than that an argument is invalid.
        return;
    }
    refused(with("/ociVersion", "2.0.0"), &["ociVersion", "2.0.0"]);
    let namespace = |kind: &str| json!({"type": kind});
    refused(
        with("/linux/namespaces/-", namespace("nosuch")),
        &["nosuch"],
    );
    let without_uts = json!([namespace("mount"), namespace("pid"), namespace("network")]);
    refused(with("/linux/namespaces", without_uts), &["hostname", "UTS"]);
    refused(
        with("/linux/namespaces/-", namespace("user")),
        &["linux.uidMappings", "no mappings"],
    );
}

/// refused: linux.namespaces.path linux.namespaces.type linux.devices linux.netDevices linux.intelRdt
/// refused: linux.memoryPolicy linux.seccomp.listenerPath linux.seccomp.listenerMetadata linux.seccomp.syscalls
/// refused: linux.timeOffsets linux.uidMappings linux.gidMappings domainname linux.sysctl linux.resources.devices
/// refused: linux.cgroupsPath annotations
#[test]
fn what_a_guest_cannot_have() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "they can, or do not know these fields"
    );
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    let namespaces = |value: Value| with("/linux/namespaces", value);
    for kind in ["pid", "ipc", "uts", "mount", "user", "cgroup"] {
        let mut all: Vec<Value> = ["mount", "network"]
            .iter()
            .map(|kind| json!({"type": kind}))
            .collect();
        all.retain(|namespace| namespace["type"] != kind);
        all.push(json!({"type": kind, "path": "/proc/1/ns/any"}));
        let field = format!("linux.namespaces[{kind}].path");
        refused(namespaces(json!(all)), &[&field, "/proc/1/ns/any"]);
    }
    refused(
        namespaces(json!([{"type": "network"}])),
        &["linux.namespaces", "no mount namespace"],
    );
    refused(
        namespaces(json!([{"type": "mount"}])),
        &["linux.namespaces", "no network namespace"],
    );
    refused(
        namespaces(json!([{"type": "mount"}, {"type": "network", "path": "relative"}])),
        &["linux.namespaces", "relative"],
    );
    refused(
        namespaces(json!([{"type": "mount"}, {"type": "network"}, {"type": "mount"}])),
        &["linux.namespaces", "twice"],
    );

    let device = |value: Value| with("/linux/devices", json!([value]));
    refused(
        device(json!({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0})),
        &["linux.devices[0]", "/dev/sda"],
    );
    refused(
        device(json!({"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0})),
        &["linux.devices[0]", "195:0"],
    );
    refused(
        device(json!({"path": "dev/x", "type": "c", "major": 1, "minor": 3})),
        &["linux.devices[0].path"],
    );
    refused(
        device(json!({"path": "/dev/x", "type": "c", "major": -5, "minor": 3})),
        &["linux.devices[0].major"],
    );
    refused(
        device(json!({"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 1 << 20})),
        &["linux.devices[0].fileMode"],
    );
    refused(
        with(
            "/linux/resources/devices",
            json!([{"allow": true, "access": "rwx"}]),
        ),
        &["linux.resources.devices[0].access"],
    );

    refused(
        with("/linux/netDevices", json!({"eth0": {"name": "net0"}})),
        &["linux.netDevices"],
    );
    refused(
        with("/linux/intelRdt", json!({"closID": "x"})),
        &["linux.intelRdt"],
    );
    refused(
        with(
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
        ),
        &["linux.memoryPolicy"],
    );

    let profile = |value: Value| with("/linux/seccomp", value);
    let allow = |more: Value| {
        let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW"});
        profile
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        profile
    };
    refused(
        profile(allow(json!({"listenerPath": "/run/x"}))),
        &["linux.seccomp.listenerPath"],
    );
    refused(
        profile(allow(json!({"listenerMetadata": "x"}))),
        &["linux.seccomp.listenerMetadata"],
    );
    refused(
        profile(json!({"defaultAction": "SCMP_ACT_NOTIFY"})),
        &["linux.seccomp.defaultAction", "NOTIFY"],
    );
    let rule = |value: Value| profile(allow(json!({"syscalls": [value]})));
    refused(
        rule(json!({"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"})),
        &["linux.seccomp.syscalls[0]", "NOTIFY"],
    );
    refused(
        rule(json!({"names": [], "action": "SCMP_ACT_ERRNO"})),
        &["linux.seccomp.syscalls[0].names"],
    );
    refused(
        rule(json!({"names": ["mkdir"], "action": "SCMP_ACT_KILL", "errnoRet": 5})),
        &["linux.seccomp.syscalls[0]", "errnoRet"],
    );
    let seventh = json!([{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]);
    refused(
        rule(json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": seventh})),
        &["linux.seccomp.syscalls[0].args"],
    );

    refused(
        with("/linux/timeOffsets", json!({"monotonic": {"secs": 1}})),
        &["linux.timeOffsets", "no time namespace"],
    );
    refused(
        with("/linux/timeOffsets", json!({"realtime": {"secs": 1}})),
        &["linux.timeOffsets", "realtime"],
    );
    let map = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    refused(
        with("/linux/uidMappings", map.clone()),
        &["linux.uidMappings", "no user namespace"],
    );
    refused(
        with("/linux/gidMappings", map),
        &["linux.gidMappings", "no user namespace"],
    );
    refused(with("/domainname", "x".repeat(65)), &["domainname"]);
    refused(
        with("/linux/sysctl", json!({"a..b": "1"})),
        &["linux.sysctl[a..b]"],
    );
    refused(
        with("/linux/sysctl", json!({"kernel.hostname": "x"})),
        &["linux.sysctl[kernel.hostname]"],
    );
    refused(
        with("/linux/cgroupsPath", "/a/../../b"),
        &["linux.cgroupsPath"],
    );
    refused(
        with("/annotations", json!({"io.sandbox.vm.color": "red"})),
        &["annotations[io.sandbox.vm.color]"],
    );
}

/// ignored: linux.namespaces.path linux.namespaces.type linux.devices windows solaris zos freebsd ociVersion
/// guest: vm.hwConfig.vcpus vm.hwConfig.memory
#[test]
fn sections_of_others_and_namespaces_that_are_left_out() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "they share the kernel of the host"
    );
    let bundle = Bundle::script("nproc; awk '/MemTotal/ {print ($2 < 400000)}' /proc/meminfo; ls /dev/sda 2>&1")
        .set("/ociVersion", "1.9.0")
        .set(
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "network"}, {"type": "uts"}, {"type": "time", "path": "/proc/1/ns/time"}]),
        )
        .set("/linux/resources/devices", json!([{"allow": true, "access": "rwm"}]))
        .set("/linux/devices", json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]))
        .set("/vm", json!({"hwConfig": {"vcpus": 2, "memory": 384 << 20}, "hypervisor": {"path": ""}}))
        .set("/windows", json!({"layerFolders": ["x"]}))
        .set("/solaris", json!({"milestone": "x"}))
        .set("/zos", json!({"x": "y"}))
        .set("/freebsd", json!({"x": "y"}))
        .build();
    let outcome = runtime.run(&bundle);
    assert_eq!(
        outcome.text(),
        "2\n1\nls: /dev/sda: No such file or directory\n",
        "{outcome:?}"
    );
    for words in [
        "no pid namespace",
        "no ipc namespace",
        "linux.namespaces[time].path",
        "linux.devices",
        "windows",
        "solaris",
        "zos",
        "freebsd",
        "ociVersion",
    ] {
        assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
    }
}

/// refused: vm.hypervisor vm.kernel vm.image vm.hwConfig.vcpus vm.hwConfig.memory vm.hwConfig.deviceTree
/// refused: vm.hwConfig.dtdevs vm.hwConfig.iomems vm.hwConfig.irqs windows
#[test]
fn virtual_machines_that_are_not_the_bundle_s_to_choose() {
    let runtime = Runtime::new();
    skip_on!(runtime, ["runc", "crun"], "they have no virtual machines");
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    refused(
        with("/vm", json!({"hypervisor": {"path": "/usr/bin/qemu"}})),
        &["vm.hypervisor"],
    );
    refused(
        with("/vm", json!({"kernel": {"path": "/vmlinux"}})),
        &["vm.kernel"],
    );
    refused(
        with("/vm", json!({"image": {"path": "/disk", "format": "raw"}})),
        &["vm.image"],
    );
    for (name, value) in [
        ("vcpus", json!(4000)),
        ("memory", json!(1 << 20)),
        ("deviceTree", json!("/x")),
        ("dtdevs", json!(["x"])),
        (
            "iomems",
            json!([{"firstGFN": 1, "firstMFN": 2, "nrMFNs": 3}]),
        ),
        ("irqs", json!([5])),
    ] {
        let hardware = with("/vm", json!({"hwConfig": {name: value}}));
        let field = if name == "memory" { "memory_mib" } else { name };
        refused(hardware, &[field]);
    }
    let windows = Bundle::busybox(&["/bin/true"])
        .remove("/linux")
        .set("/windows", json!({"layerFolders": ["x"]}));
    refused(windows, &["windows"]);
}
