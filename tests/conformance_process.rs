// SPDX-License-Identifier: Apache-2.0
//! `process` of config.json and of exec, as the process itself finds it. Runs against runc and crun too.

use std::fs;

use harness::fields::{check_refused, look, probe, probe_program, shown};
use harness::{Bundle, BundleBuilder, Runtime, skip_on};
use serde_json::{Value, json};

/// Their numbers, linux/capability.h.
const CHOWN: u8 = 0;
const KILL: u8 = 5;
const NET_BIND_SERVICE: u8 = 10;
const SYS_CHROOT: u8 = 18;

/// Shows what `process` sets, for init processes and execs alike.
const SHOW_PROCESS: &str = r"
import resource
mask = os.umask(0)
show(
    args=sys.argv[1:], env=os.environ.get('GREETING'), home=os.environ.get('HOME'), cwd=os.getcwd(),
    uid=os.getresuid(), gid=os.getresgid(), groups=sorted(os.getgroups()), umask=mask,
    caps=capabilities(), nnp=status('NoNewPrivs'), oom=read('/proc/self/oom_score_adj'),
    nofile=resource.getrlimit(resource.RLIMIT_NOFILE), core=resource.getrlimit(resource.RLIMIT_CORE),
    cpu=resource.getrlimit(resource.RLIMIT_CPU), stack=resource.getrlimit(resource.RLIMIT_STACK),
    terminal=os.isatty(0))
";

fn process(program: &str) -> Value {
    json!({
        "args": ["/usr/bin/python3", "-c", probe_program(program), "one", "two words", ""],
        "env": ["PATH=/usr/bin:/bin", "GREETING=hello = world"],
        "cwd": "/tmp",
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 1002], "umask": 0o027},
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT"],
            "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "ambient": ["CAP_NET_BIND_SERVICE"]
        },
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096},
            {"type": "RLIMIT_CPU", "soft": 60, "hard": 120},
            {"type": "RLIMIT_STACK", "soft": 8 << 20, "hard": 16 << 20}
        ],
        "noNewPrivileges": true,
        "oomScoreAdj": 345
    })
}

fn check_process(seen: &Value, umask: u32, oom_score_adj: &str, files: u32) {
    assert_eq!(seen["args"], json!(["one", "two words", ""]));
    assert_eq!(seen["env"], "hello = world");
    assert_eq!(seen["cwd"], "/tmp");
    assert_eq!(seen["uid"], json!([1000, 1000, 1000]));
    assert_eq!(seen["gid"], json!([1001, 1001, 1001]));
    assert_eq!(seen["groups"], json!([5, 1002]));
    assert_eq!(seen["umask"], umask);
    // An unprivileged program that is executed keeps the ambient ones only.
    assert_eq!(
        seen["caps"],
        json!({
            "Bnd": [CHOWN, KILL, NET_BIND_SERVICE, SYS_CHROOT],
            "Inh": [KILL, NET_BIND_SERVICE],
            "Prm": [NET_BIND_SERVICE],
            "Eff": [NET_BIND_SERVICE],
            "Amb": [NET_BIND_SERVICE]
        })
    );
    assert_eq!(seen["nnp"], "1");
    assert_eq!(seen["oom"], oom_score_adj);
    assert_eq!(seen["nofile"], json!([files, 200]));
    assert_eq!(seen["core"], json!([0, 4096]));
    assert_eq!(seen["cpu"], json!([60, 120]));
    assert_eq!(seen["stack"], json!([8 << 20, 16 << 20]));
    assert_eq!(seen["terminal"], false);
}

/// guest: process.args process.env process.cwd process.user.uid process.user.gid process.user.additionalGids
/// guest: process.user.umask process.capabilities.bounding process.capabilities.effective
/// guest: process.capabilities.inheritable process.capabilities.permitted process.capabilities.ambient
/// guest: process.rlimits process.noNewPrivileges process.oomScoreAdj process.terminal
#[test]
fn the_init_process_and_an_exec_are_as_asked() {
    let runtime = Runtime::new();
    let bundle = probe("").set("/process", process(SHOW_PROCESS)).build();
    check_process(&look(&runtime, &bundle), 0o027, "345", 100);

    // The same for an exec into a container of somebody else.
    let container = runtime.create(Bundle::debian(&["/bin/sleep", "1000"]).build());
    container.start();
    let file = container.bundle().path().join("process.json");
    fs::write(&file, process(SHOW_PROCESS).to_string()).unwrap();
    let file = file.to_str().unwrap();
    let id = container.id();
    let outcome = runtime.call(&["exec", "--process", file, id]);
    // runc and crun take two of these from the container, and runc's own runtime raises a limit.
    let (umask, score, files) = match runtime.name() {
        "runc" => (0o022, "0", 200),
        "crun" => (0o027, "0", 100),
        _ => (0o027, "345", 100),
    };
    check_process(&shown(&outcome), umask, score, files);

    if runtime.name() == "crun" {
        // That of Debian 12 has no option for groups.
        return;
    }
    // And by options.
    let program = probe_program(
        "show(uid=os.getuid(), gid=os.getgid(), groups=sorted(os.getgroups()), cwd=os.getcwd(),
            env=os.environ.get('A'), home=os.environ.get('HOME'), caps=capabilities(), terminal=os.isatty(0),
            oom=read('/proc/self/oom_score_adj'))",
    );
    let options = [
        "exec",
        "--user",
        "1000:7",
        "--additional-gids",
        "8",
        "--cwd",
        "/usr",
        "--env",
        "A=b",
        "--cap",
        "CAP_SYS_CHROOT",
        id,
        "python3",
        "-c",
        &program,
    ];
    let seen = shown(&runtime.call(&options));
    assert_eq!(seen["uid"], 1000);
    assert_eq!(seen["gid"], 7);
    assert_eq!(seen["groups"], json!([8]));
    assert_eq!(seen["cwd"], "/usr");
    assert_eq!(seen["env"], "b");
    assert_eq!(seen["home"], "/home/user", "of the passwd of the image");
    assert_eq!(seen["terminal"], false);
    let bounding = seen["caps"]["Bnd"].as_array().unwrap();
    assert!(bounding.contains(&json!(SYS_CHROOT)), "{seen}");
}

/// guest: process.capabilities
#[test]
fn without_capabilities_there_are_none() {
    let runtime = Runtime::new();
    let bundle = probe("show(caps=capabilities(), mask=os.umask(0), home=os.environ['HOME'])")
        .remove("/process/capabilities")
        .build();
    let seen = look(&runtime, &bundle);
    for set in ["Eff", "Prm", "Inh", "Amb"] {
        assert_eq!(seen["caps"][set], json!([]), "{set}");
    }
    assert_eq!(seen["mask"], 0o022, "the default of other runtimes");
    assert_eq!(seen["home"], "/root");
}

/// guest: process.scheduler process.ioPriority linux.personality.domain process.execCPUAffinity
#[test]
fn scheduling_personality_and_affinity() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "Debian 12 has versions from before these fields"
    );
    let show = "show(policy=os.sched_getscheduler(0), nice=os.getpriority(os.PRIO_PROCESS, 0),
        priority=os.sched_getparam(0).sched_priority, io=system_call(252, 1, 0),
        machine=os.uname().machine, personality=read('/proc/self/personality'),
        cpus=sorted(os.sched_getaffinity(0)))";
    let bundle = probe(&format!("{show}\nimport time; time.sleep(1000)"))
        .set(
            "/process/scheduler",
            json!({"policy": "SCHED_BATCH", "nice": 7}),
        )
        .set(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_IDLE", "priority": 3}),
        )
        .set(
            "/process/execCPUAffinity",
            json!({"initial": "0", "final": "1"}),
        )
        .set("/annotations", json!({"io.sandbox.vm.vcpus": "2"}))
        .set("/linux/personality", json!({"domain": "LINUX32"}))
        .build();
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("output", || container.stdout().ends_with('\n'));
    let seen: Value = serde_json::from_str(&container.stdout()).unwrap();
    assert_eq!(seen["policy"], 3, "SCHED_BATCH");
    assert_eq!(seen["nice"], 7);
    assert_eq!(seen["io"], 3 << 13 | 3);
    assert_eq!(seen["machine"], "i686");
    assert_eq!(seen["cpus"], json!([0, 1]), "affinity is for execs");

    let seen = shown(&container.exec(&["python3", "-c", &probe_program(show)]));
    assert_eq!(seen["cpus"], json!([1]));
    assert_eq!(seen["machine"], "i686", "as the container's");
    let mut process = process(show);
    process["scheduler"] =
        json!({"policy": "SCHED_FIFO", "priority": 10, "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    process["execCPUAffinity"] = json!({"initial": "0"});
    process["rlimits"] = json!([]);
    let file = container.bundle().path().join("process.json");
    fs::write(&file, process.to_string()).unwrap();
    let seen = shown(&runtime.call(&["exec", "-p", file.to_str().unwrap(), container.id()]));
    // SCHED_RESET_ON_FORK shows in the policy.
    assert_eq!(seen["policy"], 1 | 0x4000_0000, "SCHED_FIFO");
    assert_eq!(seen["priority"], 10);
    assert_eq!(seen["io"], 2 << 13 | 6);
    assert_eq!(seen["cpus"], json!([0]));
}

fn with(pointer: &str, value: impl Into<Value>) -> BundleBuilder {
    Bundle::busybox(&["/bin/true"]).set(pointer, value)
}

/// refused: process.cwd process.rlimits
#[test]
fn processes_that_cannot_be() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["crun"],
        "it takes what is not a directory for one"
    );
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    refused(with("/process/cwd", "tmp"), &["cwd"]);
    refused(with("/process/cwd", "/etc/passwd"), &["not a directory"]);
    refused(
        with("/process/rlimits/0/type", "RLIMIT_NOSUCH"),
        &["RLIMIT_NOSUCH"],
    );
}

/// refused: process process.args process.rlimits process.user.umask process.oomScoreAdj process.scheduler process.ioPriority
/// refused: process.execCPUAffinity process.env linux.personality.flags linux.personality.domain
#[test]
fn processes_that_only_a_strict_runtime_refuses() {
    let runtime = Runtime::new();
    skip_on!(runtime, ["runc", "crun"], "they take or overlook these");
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    let limit = json!({"type": "RLIMIT_CORE", "soft": 1, "hard": 1});
    refused(with("/process/args", json!([])), &["process.args"]);
    refused(
        Bundle::busybox(&["/bin/true"]).remove("/process"),
        &["process"],
    );
    refused(
        with("/process/rlimits", json!([limit, limit])),
        &["process.rlimits", "RLIMIT_CORE", "twice"],
    );
    let limit = json!([{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]);
    refused(
        with("/process/rlimits", limit),
        &["process.rlimits", "above"],
    );
    refused(with("/process/user/umask", 0o1777), &["process.user.umask"]);
    refused(with("/process/oomScoreAdj", 1001), &["process.oomScoreAdj"]);
    refused(
        with("/process/scheduler", json!({"policy": "SCHED_ISO"})),
        &["process.scheduler.policy"],
    );
    refused(
        with(
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "nice": 20}),
        ),
        &["process.scheduler.nice"],
    );
    refused(
        with(
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO", "priority": 100}),
        ),
        &["process.scheduler.priority"],
    );
    // Well-formed, but the kernel has no such priority.
    refused(
        with("/process/scheduler", json!({"policy": "SCHED_FIFO"})),
        &["process.scheduler", "invalid argument"],
    );
    refused(
        with(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
        ),
        &["process.ioPriority.priority"],
    );
    refused(
        with(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_NONE", "priority": 0}),
        ),
        &["IOPRIO_CLASS_NONE"],
    );
    refused(
        with("/process/execCPUAffinity", json!({"initial": "x"})),
        &["execCPUAffinity"],
    );
    refused(
        with("/process/env", json!(["A=b\u{0}c"])),
        &["process.env", "NUL"],
    );
    refused(
        with(
            "/linux/personality",
            json!({"domain": "LINUX", "flags": ["X"]}),
        ),
        &["linux.personality.flags"],
    );
    refused(
        with("/linux/personality", json!({"domain": "BSD"})),
        &["BSD"],
    );
}

/// ignored: process.apparmorProfile process.selinuxLabel linux.mountLabel process.capabilities process.commandLine
/// ignored: process.user.username
#[test]
fn what_the_guest_kernel_does_not_have_is_ignored_with_a_warning() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "they refuse what their host's kernel does not have"
    );
    let outcome = runtime.run(
        &Bundle::script("echo runs")
            .set("/process/apparmorProfile", "docker-default")
            .set("/process/selinuxLabel", "system_u:system_r:container_t:s0")
            .set("/linux/mountLabel", "system_u:object_r:container_file_t:s0")
            .set("/process/capabilities/bounding/-", "CAP_NOT_YET")
            .set("/process/commandLine", "echo")
            .set("/process/user/username", "root")
            .build(),
    );
    assert_eq!(outcome.ok(), "runs");
    for field in [
        "process.apparmorProfile",
        "process.selinuxLabel",
        "linux.mountLabel",
        "process.commandLine",
        "process.capabilities.bounding",
        "process.user.username",
    ] {
        assert!(outcome.stderr.contains(field), "{field}: {outcome:?}");
    }
}

/// guest: process.consoleSize process.terminal
#[test]
fn a_terminal_has_the_size_that_is_asked_for() {
    let runtime = Runtime::new();
    let bundle = Bundle::script("stty size; test -t 2 && echo terminal")
        .set("/process/terminal", true)
        .set("/process/consoleSize", json!({"height": 33, "width": 77}))
        .build();
    // A foreground run without a terminal of its own bridges to a new one.
    let outcome = runtime.run(&bundle);
    if runtime.is_sandbox() {
        assert_eq!(outcome.ok().replace('\r', ""), "33 77\nterminal");
    } else {
        assert_ne!(outcome.status, 0, "{outcome:?}");
    }
}
