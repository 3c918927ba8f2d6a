// SPDX-License-Identifier: Apache-2.0
//! Limits and control of containers made by the real agent.

use crate::harness::*;
use agent_protocol::{CgroupPlan, ErrorKind, Event, Reply, Request, Stdio};

macro_rules! guest {
    ($($controller:literal),*) => {{
        let Some(guest) = Guest::start() else { return };
        for controller in [$($controller),*] as [&str; _] {
            if !guest.has_controller(controller) {
                return skip(&format!("needs the {controller} controller of cgroup v2"));
            }
        }
        guest
    }};
}

fn files(files: &[(&str, &str)]) -> CgroupPlan {
    CgroupPlan {
        files: files
            .iter()
            .map(|&(name, value)| (name.into(), value.into()))
            .collect(),
        device_program: None,
    }
}

#[test]
fn out_of_memory_ends_the_container_and_not_the_agent() {
    let mut guest = guest!("memory");
    let mut plan = plan("exec tail /dev/zero");
    plan.cgroup = files(&[("memory.max", "20000000"), ("memory.swap.max", "0")]);
    guest.create("c", plan, NOTHING).unwrap();
    guest.start_container("c").unwrap();
    assert_eq!(
        guest.event(),
        Event::OutOfMemory {
            container: "c".into()
        }
    );
    assert_eq!(guest.exited("c", 0), 137);
    guest.delete("c").unwrap();
    assert_eq!(guest.run("c", self::plan("exit 3")).0, 3);
}

#[test]
fn the_number_of_processes_is_limited() {
    let mut guest = guest!("pids");
    let mut plan = plan("sleep 1000 & sleep 1000 & sleep 1000 & sleep 1000 & wait");
    plan.cgroup = files(&[("pids.max", "3")]);
    let (status, _, err) = guest.run("c", plan.clone());
    assert_eq!(status, 2, "{err}");
    assert!(err.contains("can't fork"), "{err}");
    plan.process.args = process(&["sleep", "1000"]).args;
    plan.cgroup = files(&[("pids.max", "1")]);
    guest.create("c", plan, NOTHING).unwrap();
    guest.start_container("c").unwrap();
    let error = guest.exec("c", 1, process(&["true"]), NOTHING).unwrap_err();
    assert_eq!(error.message, "clone: the limit of processes is reached");
    guest
        .ask(Request::Update {
            container: "c".into(),
            cgroup: files(&[("pids.max", "2")]),
        })
        .unwrap();
    guest.exec("c", 1, process(&["true"]), NOTHING).unwrap();
    assert_eq!(guest.exited("c", 1), 0);
}

#[test]
fn missing_files_are_named() {
    let mut guest = guest!();
    for (file, message) in [
        (
            "memory.nosuch",
            "cgroup: memory.nosuch: no such file or directory",
        ),
        ("../x", "cgroup: \"../x\": invalid file name"),
    ] {
        let mut plan = plan("true");
        plan.cgroup = files(&[(file, "1")]);
        let error = guest.create("c", plan, NOTHING).unwrap_err();
        assert_eq!(
            (error.kind, error.message.as_str()),
            (ErrorKind::Plan, message)
        );
    }
    let mut plan = plan("true");
    plan.cgroup = files(&[("cgroup.max.depth", "many")]);
    let error = guest.create("c", plan, NOTHING).unwrap_err();
    assert_eq!(
        error.message,
        "cgroup: cgroup.max.depth: write \"many\": invalid argument"
    );
    assert!(!guest.cgroup.join("c").exists());
}

#[test]
fn pause_and_resume() {
    let mut guest = guest!();
    guest.sleeper("c");
    guest
        .ask(Request::Pause {
            container: "c".into(),
        })
        .unwrap();
    let events = std::fs::read_to_string(guest.cgroup.join("c/cgroup.events")).unwrap();
    assert!(events.contains("frozen 1"), "{events}");
    let error = guest.exec("c", 1, process(&["true"]), NOTHING).unwrap_err();
    assert_eq!(
        error.message,
        "cannot exec in a paused container (use --ignore-paused to override)"
    );
    assert!(
        guest
            .ask(Request::Pause {
                container: "c".into()
            })
            .is_err()
    );
    let number = guest.send(Request::Exec {
        container: "c".into(),
        process: 1,
        plan: Box::new(process(&["true"])),
        stdio: NOTHING,
        ignore_paused: true,
    });
    guest
        .ask(Request::Resume {
            container: "c".into(),
        })
        .unwrap();
    guest.reply(number).unwrap();
    assert_eq!(guest.exited("c", 1), 0);
    // Frozen processes can be killed.
    guest
        .ask(Request::Pause {
            container: "c".into(),
        })
        .unwrap();
    guest.signal("c", 0, libc::SIGKILL).unwrap();
    assert_eq!(guest.exited("c", 0), 137);
    guest.delete("c").unwrap();
    guest.sleeper("c");
    guest
        .ask(Request::Pause {
            container: "c".into(),
        })
        .unwrap();
    guest.delete("c").unwrap();
}

#[test]
fn usage_and_signals_to_all() {
    let mut guest = guest!();
    // The shell tells of each signal; its child ends by it.
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    guest
        .create(
            "c",
            plan("trap 'echo usr1' USR1; sleep 1000; wait; exit 6"),
            stdio,
        )
        .unwrap();
    guest.start_container("c").unwrap();
    let pids = loop {
        let reply = guest
            .ask(Request::Processes {
                container: "c".into(),
            })
            .unwrap();
        let Reply::Processes(pids) = reply else {
            panic!("{reply:?}")
        };
        if pids.len() == 2 {
            break pids;
        }
    };
    assert!(!pids.contains(&0));
    let Reply::Usage(usage) = guest
        .ask(Request::Usage {
            container: "c".into(),
        })
        .unwrap()
    else {
        panic!("expected usage");
    };
    let names: Vec<_> = usage.files.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"cpu.stat"), "{names:?}");
    assert!(usage.network.contains("lo:"), "{}", usage.network);
    // The trap may not be set yet when there are two processes, but by then it is: sleep comes after.
    guest
        .ask(Request::Signal {
            container: "c".into(),
            process: 0,
            signal: libc::SIGUSR1,
            all: true,
        })
        .unwrap();
    assert_eq!(guest.exited("c", 0), 6);
    assert_eq!(out.join().unwrap(), b"usr1\n");
}

#[test]
fn device_programs() {
    let mut guest = guest!();
    // BPF_MOV64_IMM r0, VALUE; BPF_EXIT_INSN
    let constant = |value: u8| vec![0xb7, 0, 0, 0, value, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    let command = "sleep 0.3; echo x 2>/dev/null > /dev/zero && echo allowed || echo denied";
    for (value, expected) in [(1, "allowed\n"), (0, "denied\n")] {
        let mut plan = plan(command);
        plan.cgroup.device_program = Some(constant(value));
        assert_eq!(guest.run("c", plan).1, expected);
    }
    // A later one takes the place of the first.
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    let mut plan = plan(command);
    plan.cgroup.device_program = Some(constant(0));
    guest.create("c", plan, stdio).unwrap();
    let cgroup = CgroupPlan {
        files: vec![],
        device_program: Some(constant(1)),
    };
    guest
        .ask(Request::Update {
            container: "c".into(),
            cgroup,
        })
        .unwrap();
    guest.start_container("c").unwrap();
    assert_eq!(guest.exited("c", 0), 0);
    assert_eq!(out.join().unwrap(), b"allowed\n");
    let mut plan = self::plan("true");
    plan.cgroup.device_program = Some(vec![0; 16]);
    guest.delete("c").unwrap();
    assert_eq!(
        guest.create("c", plan, NOTHING).unwrap_err().kind,
        ErrorKind::Plan
    );
}

#[test]
fn a_divided_cgroup_takes_further_processes_and_is_removed() {
    let mut guest = guest!("pids");
    let mut plan = plan(
        "mkdir /sys/fs/cgroup/init && echo 1 > /sys/fs/cgroup/init/cgroup.procs && \
        echo +memory > /sys/fs/cgroup/cgroup.subtree_control && echo done; exec sleep 1000",
    );
    if let Some(mount) = plan.mounts.last_mut() {
        mount.flags &= !libc::MS_RDONLY;
    }
    let (stdout, listener) = guest.listen();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    guest.create("c", plan, stdio).unwrap();
    let mut output = accept(&listener);
    guest.start_container("c").unwrap();
    let mut line = [0; 5];
    std::io::Read::read_exact(&mut output, &mut line).unwrap();
    assert_eq!(&line, b"done\n");
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    guest
        .exec("c", 1, process(&["cat", "/proc/self/cgroup"]), stdio)
        .unwrap();
    assert_eq!(guest.exited("c", 1), 0);
    assert_eq!(out.join().unwrap(), b"0::/init\n");
    guest.delete("c").unwrap();
    assert_eq!(guest.exited("c", 0), 137);
    assert!(!guest.cgroup.join("c").exists());
}
