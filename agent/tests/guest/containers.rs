// SPDX-License-Identifier: Apache-2.0
//! Containers made by the real agent, without a virtual machine.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::harness::*;
use agent_protocol::{Clock, ErrorKind, Hook, IdMapping, Reply, Request, Rlimit, Stdio};

macro_rules! guest {
    () => {
        match Guest::start() {
            Some(guest) => guest,
            None => return,
        }
    };
}

#[test]
fn exit_codes() {
    let mut guest = guest!();
    for (command, expected) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("true", 0)] {
        assert_eq!(guest.run("c", plan(command)).0, expected, "{command}");
    }
    // PID 1 of the container cannot signal itself to death; its child can.
    let (status, out, _) = guest.run("c", plan("sh -c 'kill -TERM $$'; echo $?"));
    assert_eq!((status, out.as_str()), (0, "143\n"));
}

#[test]
fn the_world_of_a_container() {
    let mut guest = guest!();
    let (status, out, err) = guest.run(
        "c",
        plan("echo $$ $HOME $(hostname) $(pwd) $(cat /proc/1/cgroup) $(ip -o link show lo | grep -c UP); \
              ls /proc/self/fd | wc -l; ls -la /dev/null /dev/fd /dev/ptmx | awk '{print $1,$3}'; \
              umask; ulimit -n; cat /proc/self/oom_score_adj; grep -E 'SigBlk|SigIgn' /proc/self/status; ls /; \
              cat /sys/fs/cgroup/cgroup.procs | head -1"),
    );
    assert_eq!((status, err.as_str()), (0, ""), "{out}");
    // ls itself has 0, 1, 2 and the directory.
    let expected = "1 /root box / 0::/ 1\n4\nlrwxrwxrwx 0\ncrw-rw-rw- 0\nlrwxrwxrwx 0\n0022\n1024\n0\n\
        SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nbin\ndev\netc\nhome\nproc\nroot\nsys\ntmp\n1\n";
    let tidy = out.replace(" root", " 0");
    assert_eq!(tidy, expected);
}

#[test]
fn missing_and_refused_executables_fail_create() {
    let mut guest = guest!();
    fs::write(guest.rootfs().join("bin/garbage"), "\x7fELF garbage").unwrap();
    let path = guest.rootfs().join("bin/garbage");
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (args, kind, message) in [
        (
            ["nosuch"],
            ErrorKind::ExecutableNotFound,
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            ["/x"],
            ErrorKind::ExecutableNotFound,
            "exec: \"/x\": stat /x: no such file or directory",
        ),
        (
            ["/etc"],
            ErrorKind::ExecutableRefused,
            "exec: \"/etc\": is a directory",
        ),
        (
            ["/etc/passwd"],
            ErrorKind::ExecutableRefused,
            "exec: \"/etc/passwd\": permission denied",
        ),
    ] {
        let mut plan = plan("");
        plan.process.args = process(&args).args;
        let error = guest.create("c", plan, NOTHING).unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (kind, message));
    }
    // The wrong format shows at the exec.
    let mut plan = plan("");
    plan.process.args = process(&["garbage"]).args;
    guest.create("c", plan, NOTHING).unwrap();
    let error = guest.start_container("c").unwrap_err();
    assert_eq!(
        (error.kind, error.message.as_str()),
        (
            ErrorKind::ExecutableRefused,
            "exec /bin/garbage: exec format error"
        )
    );
    assert_eq!(guest.exited("c", 0), 126);
    guest.delete("c").unwrap();
    // Nothing is left of any of them.
    guest.sleeper("c");
    let error = guest
        .exec("c", 1, process(&["nosuch"]), NOTHING)
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::ExecutableNotFound);
    let error = guest
        .exec("c", 1, process(&["garbage"]), NOTHING)
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::ExecutableRefused);
    guest.exec("c", 1, process(&["true"]), NOTHING).unwrap();
    assert_eq!(guest.exited("c", 1), 0);
}

#[test]
fn states_are_kept() {
    let mut guest = guest!();
    let message = |result: Result<Reply, agent_protocol::AgentError>| result.unwrap_err().message;
    assert_eq!(
        message(guest.start_container("c")),
        "container \"c\" does not exist"
    );
    guest.create("c", plan("sleep 1000"), NOTHING).unwrap();
    assert_eq!(
        message(guest.create("c", plan("true"), NOTHING)),
        "container with given ID already exists"
    );
    guest.start_container("c").unwrap();
    assert_eq!(
        message(guest.start_container("c")),
        "cannot start an already running container"
    );
    guest.signal("c", 0, libc::SIGKILL).unwrap();
    assert_eq!(guest.exited("c", 0), 137);
    assert_eq!(
        message(guest.start_container("c")),
        "cannot start a container that has stopped"
    );
    assert_eq!(
        message(guest.exec("c", 1, process(&["true"]), NOTHING)),
        "cannot exec in a stopped container"
    );
    assert_eq!(message(guest.signal("c", 0, 15)), "container not running");
    guest.delete("c").unwrap();
    assert_eq!(message(guest.delete("c")), "container \"c\" does not exist");
    for id in ["", ".", "..", "a/b", "../x"] {
        assert_eq!(
            guest.create(id, plan("true"), NOTHING).unwrap_err().kind,
            ErrorKind::Plan,
            "{id:?}"
        );
    }
}

#[test]
fn created_containers_can_be_killed_and_deleted() {
    let mut guest = guest!();
    guest.create("c", plan("true"), NOTHING).unwrap();
    guest.signal("c", 0, libc::SIGKILL).unwrap();
    assert_eq!(guest.exited("c", 0), 137);
    guest.delete("c").unwrap();
    guest.create("c", plan("true"), NOTHING).unwrap();
    guest.delete("c").unwrap();
    assert_eq!(guest.exited("c", 0), 137);
    assert!(!guest.cgroup.join("c").exists());
}

#[test]
fn exec_joins_the_container() {
    let mut guest = guest!();
    guest.sleeper("c");
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: Some(stdout + 1000),
    };
    // A port where nobody listens.
    assert!(guest.exec("c", 1, process(&["true"]), stdio).is_err());
    drop(out);
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    let mut shell = process(&[
        "sh",
        "-c",
        "for n in pid mnt net ipc uts cgroup; do [ $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) ] && echo -n same; done; cat /proc/self/cgroup; pwd; id -u; echo $HOME; exit 3",
    ]);
    shell.uid = 1000;
    shell.gid = 1000;
    shell.cwd = "/home/user".into();
    // To read the links of a process of root.
    shell.capabilities.inheritable = 1 << 19;
    shell.capabilities.ambient = 1 << 19;
    guest.exec("c", 2, shell, stdio).unwrap();
    assert_eq!(guest.exited("c", 2), 3);
    let out = String::from_utf8(out.join().unwrap()).unwrap();
    assert_eq!(
        out,
        "samesamesamesamesamesame0::/\n/home/user\n1000\n/home/user\n"
    );
    guest.delete("c").unwrap();
    assert_eq!(guest.exited("c", 0), 137);
}

#[test]
fn credentials_capabilities_and_limits() {
    let mut guest = guest!();
    let mut plan = plan(
        "grep -E 'Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:' /proc/self/status | tr '\\t' ' '; umask; ulimit -n; cat /proc/self/oom_score_adj",
    );
    plan.process.uid = 1000;
    plan.process.gid = 1001;
    plan.process.additional_gids = vec![5, 7];
    plan.process.umask = Some(0o077);
    plan.process.oom_score_adj = Some(321);
    plan.process.no_new_privileges = true;
    plan.process.rlimits = vec![Rlimit {
        resource: libc::RLIMIT_NOFILE,
        soft: 100,
        hard: 200,
    }];
    plan.process.capabilities.bounding = 0b1011;
    plan.process.capabilities.permitted = 0b0011;
    plan.process.capabilities.effective = 0b0011;
    plan.process.capabilities.inheritable = 0b0001;
    plan.process.capabilities.ambient = 0b0001;
    let (status, out, err) = guest.run("c", plan);
    assert_eq!((status, err.as_str()), (0, ""));
    let expected = "Uid: 1000 1000 1000 1000\nGid: 1001 1001 1001 1001\nGroups: 5 7 \nCapInh: 0000000000000001\n\
        CapPrm: 0000000000000001\nCapEff: 0000000000000001\nCapBnd: 000000000000000b\nCapAmb: 0000000000000001\n\
        NoNewPrivs: 1\nSeccomp: 0\n0077\n100\n321\n";
    assert_eq!(out, expected);
}

#[test]
fn masked_and_read_only_paths() {
    let mut guest = guest!();
    fs::create_dir(guest.rootfs().join("secret")).unwrap();
    fs::write(guest.rootfs().join("secret/key"), "x").unwrap();
    fs::write(guest.rootfs().join("hidden"), "x").unwrap();
    let mut plan = plan(
        "ls /secret; cat /hidden; touch /secret/x 2>&1; touch /etc/x 2>&1; touch /y 2>&1; touch /tmp/z && echo ok; echo 1 > /proc/sys/kernel/x",
    );
    plan.masked_paths = vec![
        "/secret".into(),
        "/hidden".into(),
        "/nosuch/thing".into(),
        "/hidden/x".into(),
    ];
    plan.readonly_paths = vec!["/proc/sys".into(), "/etc".into(), "/nosuch".into()];
    plan.rootfs_readonly = true;
    plan.mounts.push(kernel("/tmp", "tmpfs", 0, ""));
    let (_, out, err) = guest.run("c", plan);
    let expected = "touch: /secret/x: Read-only file system\ntouch: /etc/x: Read-only file system\n\
        touch: /y: Read-only file system\nok\n";
    assert_eq!(out, expected);
    assert!(err.contains("/proc/sys/kernel/x"), "{err}");
}

#[test]
fn mounts_cannot_lead_out() {
    let mut guest = guest!();
    let canary = guest.directory.join("canary");
    fs::create_dir(&canary).unwrap();
    let rootfs = guest.rootfs();
    symlink("../../canary", rootfs.join("up")).unwrap();
    symlink(&canary, rootfs.join("absolute")).unwrap();
    fs::create_dir(guest.directory.join("share/volume")).unwrap();
    fs::write(guest.directory.join("share/volume/file"), "volume\n").unwrap();
    let mut asked =
        plan("cat /up/v/file /absolute/v/file /single /ro/file; touch /ro/x; ls /filled");
    fs::create_dir(rootfs.join("filled")).unwrap();
    fs::write(rootfs.join("filled/a"), "").unwrap();
    let mut read_only = share("/ro", "volume");
    read_only.flags = libc::MS_RDONLY;
    let mut filled = kernel("/filled", "tmpfs", libc::MS_RDONLY, "size=1m");
    filled.copy_up = true;
    asked.mounts.extend([
        share("/up/v", "volume"),
        share("/absolute/v", "volume"),
        share("/single", "volume/file"),
        read_only,
        filled,
    ]);
    let (_, out, err) = guest.run("c", asked);
    assert_eq!(out, "volume\n".repeat(4) + "a\n");
    assert_eq!(err, "touch: /ro/x: Read-only file system\n");
    assert_eq!(fs::read_dir(&canary).unwrap().count(), 0);

    // The standard places being links.
    for name in ["dev", "proc", "sys"] {
        let place = rootfs.join(name);
        let kept = rootfs.join(format!("{name}.kept"));
        fs::rename(&place, &kept).unwrap();
        symlink("../../canary", &place).unwrap();
        let result = guest.create("c", plan("true"), NOTHING);
        if result.is_ok() {
            guest.delete("c").unwrap();
            assert_eq!(guest.exited("c", 0), 137);
        }
        assert_eq!(result.is_ok(), name == "dev", "{name}: {result:?}");
        assert_eq!(fs::read_dir(&canary).unwrap().count(), 0, "{name}");
        fs::remove_file(&place).unwrap();
        fs::rename(&kept, &place).unwrap();
    }

    // Errors name the mount.
    let mut broken = plan("true");
    broken.mounts.push(kernel("/x", "nosuchfs", 0, ""));
    let error = guest.create("c", broken, NOTHING).unwrap_err();
    assert_eq!(error.message, "mounts[7] /x: mount: no such device");
    let mut broken = plan("true");
    broken.mounts.push(share("/x", "../canary"));
    let error = guest.create("c", broken, NOTHING).unwrap_err();
    assert_eq!(
        error.message,
        "mounts[7] /x: source: no such file or directory"
    );
}

#[test]
fn mounts_come_and_go_while_running() {
    let mut guest = guest!();
    fs::create_dir(guest.directory.join("share/volume")).unwrap();
    fs::write(guest.directory.join("share/volume/file"), "volume\n").unwrap();
    guest.sleeper("c");
    let cat = |guest: &mut Guest, number| {
        let (stdout, out) = guest.collect();
        let stdio = Stdio::Streams {
            stdin: None,
            stdout: Some(stdout),
            stderr: None,
        };
        guest
            .exec(
                "c",
                number,
                process(&["sh", "-c", "cat /late/file; stat -f -c %T /late/tmp"]),
                stdio,
            )
            .unwrap();
        guest.exited("c", number);
        String::from_utf8(out.join().unwrap()).unwrap()
    };
    let attach = |mount| Request::Mount {
        container: "c".into(),
        mount: Box::new(mount),
    };
    guest.ask(attach(share("/late", "volume"))).unwrap();
    guest
        .ask(attach(kernel("/late/tmp", "tmpfs", 0, "")))
        .unwrap();
    assert_eq!(cat(&mut guest, 1), "volume\ntmpfs\n");
    let detach = |destination: &str| Request::Unmount {
        container: "c".into(),
        destination: destination.into(),
    };
    guest.ask(detach("/late")).unwrap();
    assert_eq!(cat(&mut guest, 2), "");
    let error = guest.ask(detach("/late")).unwrap_err();
    assert_eq!(error.message, "unmount /late: invalid argument");
    assert!(
        guest
            .ask(attach(kernel("/late", "nosuchfs", 0, "")))
            .is_err()
    );
}

#[test]
fn two_containers_at_once() {
    let mut guest = guest!();
    guest.sleeper("one");
    guest.sleeper("two");
    guest
        .ask(Request::Signal {
            container: "one".into(),
            process: 0,
            signal: libc::SIGKILL,
            all: true,
        })
        .unwrap();
    assert_eq!(guest.exited("one", 0), 137);
    let Reply::Processes(pids) = guest
        .ask(Request::Processes {
            container: "two".into(),
        })
        .unwrap()
    else {
        panic!("expected processes");
    };
    assert_eq!(pids.len(), 1);
    guest.exec("two", 1, process(&["true"]), NOTHING).unwrap();
    assert_eq!(guest.exited("two", 1), 0);
    guest.ask(Request::Shutdown).unwrap();
    assert_eq!(guest.exited("two", 0), 137);
}

#[test]
fn orphans_are_reaped_and_end_with_their_container() {
    let mut guest = guest!();
    let mut shared =
        plan("for i in 1 2 3; do (sh -c 'sleep 0.01' &) ; done; (sleep 1000 &); sleep 0.1; exit 4");
    // Orphans come to the agent.
    shared.namespaces &= !(libc::CLONE_NEWPID as u64);
    let (status, _, err) = guest.run("c", shared);
    assert_eq!((status, err.as_str()), (4, ""));
    // Orphans of an exec stay when it ends, and do not keep its end from being told.
    guest.sleeper("c");
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    guest
        .exec(
            "c",
            1,
            process(&["sh", "-c", "echo before; sleep 1000 & exit 5"]),
            stdio,
        )
        .unwrap();
    assert_eq!(guest.exited("c", 1), 5);
    assert_eq!(out.join().unwrap(), b"before\n");
    let Reply::Processes(pids) = guest
        .ask(Request::Processes {
            container: "c".into(),
        })
        .unwrap()
    else {
        panic!("expected processes");
    };
    assert_eq!(pids.len(), 2);
    guest.delete("c").unwrap();
}

#[test]
fn user_namespaces() {
    let mut guest = guest!();
    let mut plan = plan(
        "id -u; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null; ls -la /dev/null | cut -c 1; touch /tmp/x && stat -c %u /tmp/x; cat /proc/self/timens_offsets | tr -s ' '; ls /sys/fs/cgroup/cgroup.procs",
    );
    plan.namespaces |= (libc::CLONE_NEWUSER | libc::CLONE_NEWTIME) as u64;
    let mappings = vec![IdMapping {
        inside: 0,
        outside: 100_000,
        size: 65536,
    }];
    plan.uid_mappings = mappings.clone();
    plan.gid_mappings = mappings;
    plan.time_offsets = vec![agent_protocol::TimeOffset {
        clock: "boottime".into(),
        seconds: 86400,
        nanoseconds: 7,
    }];
    plan.mounts.push(kernel("/tmp", "tmpfs", 0, ""));
    let (status, out, err) = guest.run("c", plan);
    assert_eq!((status, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "0\n 0 100000 65536\nc\n0\nmonotonic 0 0\nboottime 86400 7\n/sys/fs/cgroup/cgroup.procs\n"
    );
}

#[test]
fn id_mapped_mounts() {
    let mut guest = guest!();
    let volume = guest.directory.join("share/volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    let mut plan = plan("stat -c %u /v/file");
    let mut mount = share("/v", "volume");
    mount.uid_mappings = vec![IdMapping {
        inside: 0,
        outside: 5000,
        size: 10,
    }];
    mount.gid_mappings = mount.uid_mappings.clone();
    plan.mounts.push(mount);
    assert_eq!(guest.run("c", plan).1, "5000\n");
    let mut plan = self::plan("true");
    let mut mount = kernel("/v", "tmpfs", 0, "");
    mount.uid_mappings = vec![IdMapping {
        inside: 0,
        outside: 5000,
        size: 10,
    }];
    plan.mounts.push(mount);
    let error = guest.create("c", plan, NOTHING).unwrap_err();
    assert_eq!(
        error.message,
        "mounts[7] /v: id mappings: only for bind mounts"
    );
}

#[test]
fn start_hooks() {
    let mut guest = guest!();
    let hook = |script: &str, timeout| Hook {
        path: "/bin/sh".into(),
        args: vec!["sh".into(), "-c".into(), script.into()],
        env: vec!["PATH=/bin".into(), "A=b".into()],
        timeout,
    };
    let mut plan = plan("cat /tmp/hook");
    plan.state = "{\"id\":\"c\"}".into();
    plan.start_hooks = vec![hook("cat > /tmp/hook; echo $A $0 >> /tmp/hook", None)];
    assert_eq!(guest.run("c", plan.clone()).1, "{\"id\":\"c\"}b sh\n");
    for (hook, expected) in [
        (
            hook("echo why >&2; exit 3", None),
            "error running startContainer hook #0: exit status 3, stderr: why",
        ),
        (
            hook("sleep 1000", Some(1)),
            "error running startContainer hook #0: /bin/sh: no end after 1 s",
        ),
        (
            Hook {
                path: "/nosuch".into(),
                args: vec![],
                env: vec![],
                timeout: None,
            },
            "error running startContainer hook #0: /nosuch: no such file or directory",
        ),
    ] {
        plan.start_hooks = vec![hook];
        guest.create("c", plan.clone(), NOTHING).unwrap();
        assert_eq!(guest.start_container("c").unwrap_err().message, expected);
        assert_eq!(guest.exited("c", 0), 1);
        guest.delete("c").unwrap();
    }
}

#[test]
fn seccomp() {
    let mut guest = guest!();
    // mkdir(2), 83, fails with EXDEV, everything else is allowed.
    let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
        let mut bytes = code.to_ne_bytes().to_vec();
        bytes.extend([jt, jf]);
        bytes.extend(k.to_ne_bytes());
        bytes
    };
    let program = [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, 83),
        instruction(0x06, 0, 0, 0x0005_0000 | 18),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat();
    for no_new_privileges in [true, false] {
        let mut plan = plan("mkdir /tmp/x; grep Seccomp: /proc/self/status");
        plan.process.no_new_privileges = no_new_privileges;
        plan.process.seccomp = Some(agent_protocol::Seccomp {
            program: program.clone(),
            flags: 0,
        });
        let (_, out, err) = guest.run("c", plan);
        assert!(err.contains("Invalid cross-device link"), "{err}");
        assert_eq!(out, "Seccomp:\t2\n");
    }
    let mut plan = plan("true");
    plan.process.no_new_privileges = true;
    plan.process.seccomp = Some(agent_protocol::Seccomp {
        program: vec![0; 7],
        flags: 0,
    });
    guest.create("c", plan, NOTHING).unwrap();
    assert_eq!(
        guest.start_container("c").unwrap_err().message,
        "seccomp: invalid argument"
    );
}

#[test]
fn settings_of_the_container() {
    let mut guest = guest!();
    let mut plan = plan(
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/domainname; pwd; stat -c %t:%T:%a:%u /dev/mine; cut -d ' ' -f 19 /proc/self/stat",
    );
    plan.domainname = Some("example.org".into());
    plan.sysctls = vec![("net.ipv4.ip_forward".into(), "1".into())];
    plan.process.cwd = "/made/for/me".into();
    plan.process.scheduler = Some(agent_protocol::Scheduler {
        policy: 0,
        flags: 0,
        nice: 5,
        priority: 0,
        runtime: 0,
        deadline: 0,
        period: 0,
    });
    plan.process.io_priority = Some(agent_protocol::IoPriority { class: 2, level: 7 });
    plan.devices = vec![agent_protocol::Device {
        path: "/dev/mine".into(),
        kind: agent_protocol::DeviceKind::Character,
        major: 1,
        minor: 3,
        mode: 0o640,
        uid: 7,
        gid: 8,
    }];
    let (status, out, err) = guest.run("c", plan.clone());
    assert_eq!((status, err.as_str()), (0, ""));
    assert_eq!(out, "1\nexample.org\n/made/for/me\n1:3:640:7\n5\n");
    plan.process.cwd = "/proc/self/fd/9".into();
    let error = guest.create("c", plan.clone(), NOTHING).unwrap_err();
    assert_eq!(
        error.message,
        "chdir to cwd (\"/proc/self/fd/9\") set in config.json failed: no such file or directory"
    );
    plan.process.cwd = "/".into();
    plan.sysctls = vec![("net.nosuch".into(), "1".into())];
    let error = guest.create("c", plan, NOTHING).unwrap_err();
    assert_eq!(
        error.message,
        "sysctl net.nosuch: no such file or directory"
    );
}

#[test]
fn the_end_of_the_host_is_the_end_of_the_machine() {
    let mut guest = guest!();
    guest.sleeper("c");
    guest.hang_up();
}

#[test]
fn the_machine_is_prepared() {
    let mut guest = guest!();
    // The real time, since the clock is that of the machine the test runs on.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let clock = Clock {
        seconds: now.as_secs().cast_signed(),
        nanoseconds: now.subsec_nanos(),
    };
    let prepare = |length| Request::Prepare {
        clock,
        entropy: vec![7; length],
    };
    assert_eq!(
        guest.ask(prepare(5000)).unwrap_err().message,
        "entropy: too long"
    );
    for length in [0, 1, 256] {
        guest.ask(prepare(length)).unwrap();
    }
}
