// SPDX-License-Identifier: Apache-2.0
//! The worst moment for everything that can die, fill up or stall: `state`, `kill` and `delete` are right afterwards
//! without waiting for anybody, the data of volumes is intact, and nothing is left. `FAULT_REPEATS` in the environment
//! says how often each is tried.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use harness::inventory::{leaves_nothing, wait_until_no_process};
use harness::runtime::{finish, new_id};
use harness::{Bundle, BundleBuilder, Container, Outcome, Runtime};
use rustix::process::{Pid, Signal, kill_process};

fn repeats() -> u32 {
    let text = std::env::var("FAULT_REPEATS");
    text.map_or(1, |text| text.parse().expect("FAULT_REPEATS"))
}

fn is_sandbox() -> bool {
    Runtime::new().is_sandbox()
}

/// A directory of the host that containers get, with what must still be in it at the end. Removed on drop.
struct Volume(PathBuf);

impl Volume {
    fn new() -> Volume {
        let path = std::env::temp_dir().join(format!("volume-{}", new_id()));
        fs::create_dir_all(path.join("deep/er")).unwrap();
        for (name, size) in [("small", 10), ("deep/large", 1 << 20), ("deep/er/empty", 0)] {
            fs::write(path.join(name), content(size)).unwrap();
        }
        Volume(path)
    }

    fn check(&self) {
        for (name, size) in [("small", 10), ("deep/large", 1 << 20), ("deep/er/empty", 0)] {
            let found = fs::read(self.0.join(name)).unwrap();
            assert!(found == content(size), "{name} has changed");
        }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn content(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index % 251) as u8).collect()
}

/// A container that works on a volume all the time, once it is started.
fn worker(volume: &Volume) -> BundleBuilder {
    let script = "echo kept > /mnt/volume/kept; sync; echo > /mnt/volume/ready
        while :; do echo line >> /mnt/volume/log; mkdir -p /mnt/volume/d; mv /mnt/volume/d /mnt/volume/e; rmdir /mnt/volume/e; done";
    Bundle::script(script).bind(&volume.0, "/mnt/volume", &["rbind", "rw"])
}

fn monitor(container: &Container) -> Pid {
    let pid = container.state()["pid"].as_i64().unwrap();
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

fn started(runtime: &Runtime, builder: BundleBuilder) -> Container<'_> {
    let container = runtime.create(builder.build());
    container.start();
    container
}

/// What all verbs have to say about a container whose monitor is gone, and its end.
fn check_stopped_and_delete(what: &str, container: &Container) {
    let start = Instant::now();
    container.wait_stopped();
    let known = start.elapsed();
    assert_eq!(container.state()["pid"], 0, "{what}");
    let killed = container.call("kill", &["KILL"]);
    assert_eq!(killed.refusal(), "sandbox: container not running", "{what}");
    for (verb, arguments) in [("exec", &["/bin/true"][..]), ("pause", &[]), ("start", &[])] {
        assert_ne!(container.call(verb, arguments).status, 0, "{what}: {verb}");
    }
    let start = Instant::now();
    container.call("delete", &[]).ok();
    println!(
        "{what}: known after {known:?}, deleted in {:?}",
        start.elapsed()
    );
    let gone = container.call("state", &[]);
    assert!(
        gone.refusal().contains("does not exist"),
        "{what}: {gone:?}"
    );
}

#[test]
fn the_monitor_killed_in_each_state() {
    if !is_sandbox() {
        return;
    }
    for _ in 0..repeats() {
        for state in ["created", "running", "paused"] {
            leaves_nothing(|runtime| {
                let volume = Volume::new();
                let container = runtime.create(worker(&volume).build());
                if state != "created" {
                    container.start();
                    harness::wait_until("work has begun", || volume.0.join("ready").exists());
                }
                if state == "paused" {
                    container.call("pause", &[]).ok();
                }
                assert_eq!(container.status(), state);
                kill_process(monitor(&container), Signal::KILL).unwrap();
                check_stopped_and_delete(state, &container);
                volume.check();
                if state != "created" {
                    assert_eq!(volume.read("kept"), "kept\n", "{state}");
                }
            });
        }
        leaves_nothing(|runtime| {
            let container = started(runtime, Bundle::script("exit 3"));
            check_stopped_and_delete("stopped", &container);
        });
    }
}

/// A monitor that does not run any more is no reason to wait for it either.
#[test]
fn a_monitor_that_hangs() {
    if !is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let volume = Volume::new();
        let container = started(runtime, worker(&volume));
        harness::wait_until("work has begun", || volume.0.join("ready").exists());
        kill_process(monitor(&container), Signal::STOP).unwrap();
        assert_eq!(container.status(), "running");
        let start = Instant::now();
        let killed = container.call("kill", &["KILL"]);
        println!("kill of a hanging monitor: {:?}", start.elapsed());
        assert_eq!(killed.status, 0, "{killed:?}");
        check_stopped_and_delete("hanging", &container);
        volume.check();
        assert_eq!(volume.read("kept"), "kept\n");
    });
}

#[test]
fn a_guest_without_memory_or_with_a_dead_kernel_keeps_the_volume() {
    if !is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let volume = Volume::new();
        let builder = worker(&volume)
            .set("/linux/resources/memory/limit", 96 << 20)
            .remove("/linux/readonlyPaths");
        let container = started(runtime, builder);
        harness::wait_until("work has begun", || volume.0.join("ready").exists());
        // The victim is in the guest, and the share as usable as before.
        assert_eq!(container.exec(&["/bin/tail", "/dev/zero"]).status, 137);
        let size = "wc -c < /mnt/volume/deep/large; echo more > /mnt/volume/more; sync";
        let after = container.exec(&["/bin/sh", "-c", size]);
        assert_eq!(after.ok(), (1 << 20).to_string());
        // The reason comes to whoever waits; here nobody does.
        let panic = "echo c > /proc/sysrq-trigger; sleep 1000";
        let lost = container.exec(&["/bin/sh", "-c", panic]);
        assert_ne!(lost.status, 0, "{lost:?}");
        check_stopped_and_delete("panic", &container);
        volume.check();
        assert_eq!(volume.read("kept"), "kept\n");
        assert_eq!(volume.read("more"), "more\n");
    });
}

/// Whatever a container may send to PID 1 of the guest: it has no other name for the agent.
#[test]
fn the_agent_cannot_be_killed_from_a_container() {
    if !is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let builder = Bundle::script("exec sleep 1000")
            .capabilities(&[
                "CAP_KILL",
                "CAP_SYS_PTRACE",
                "CAP_SYS_ADMIN",
                "CAP_SYS_BOOT",
            ])
            .set("/process/noNewPrivileges", false)
            .set("/linux/namespaces/0", serde_json::json!({"type": "ipc"}))
            .set("/linux/namespaces/2", serde_json::json!({"type": "uts"}))
            .set("/linux/namespaces/3", serde_json::json!({"type": "mount"}))
            .set("/linux/namespaces/4", serde_json::json!({"type": "cgroup"}));
        let mut builder = builder.remove("/linux/namespaces/5");
        builder = builder.set("/linux/namespaces/5", serde_json::json!({"type": "time"}));
        let container = started(runtime, builder);
        let script = "for signal in KILL STOP TERM SEGV ABRT INT HUP BUS ILL FPE SYS; do kill -$signal 1 2>/dev/null; done
            for signal in $(seq 1 64); do kill -$signal 1 2>/dev/null; done; cat /proc/1/comm";
        let outcome = container.exec(&["/bin/sh", "-c", script]);
        assert!(
            outcome.ok().contains("init"),
            "the agent is PID 1 here: {outcome:?}"
        );
        assert_eq!(container.exec(&["/bin/echo", "alive"]).ok(), "alive");
        assert_eq!(container.status(), "running");
        container.call("kill", &["KILL"]).ok();
        check_stopped_and_delete("agent", &container);
    });
}

/// In MiB: what a process has of its own.
fn own_memory(pid: Pid) -> u64 {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let status = fs::read_to_string(path).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kib >> 10
}

#[test]
fn a_reader_of_stdout_that_stalls() {
    if !is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("yes | head -c 300000000").build();
        let id = new_id();
        let mut command = runtime.command();
        command
            .args(["run", "--detach", "-b"])
            .arg(bundle.path())
            .arg(&id);
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The write end that the command has here would keep the pipe open.
        drop(command);
        assert!(child.wait().unwrap().success());
        harness::wait_until("the pipe is full", || {
            rustix::io::ioctl_fionread(&reader).unwrap() >= 65_536
        });
        let state: serde_json::Value =
            serde_json::from_str(runtime.call(&["state", &id]).ok()).unwrap();
        let monitor = i32::try_from(state["pid"].as_i64().unwrap()).unwrap();
        let monitor = Pid::from_raw(monitor).unwrap();
        // Others are not held up, and nothing piles up on the host meanwhile.
        let before = own_memory(monitor);
        for _ in 0..3 {
            let outcome = runtime.call(&[
                "exec",
                &id,
                "/bin/sh",
                "-c",
                "yes | head -c 1000000 | wc -c",
            ]);
            assert_eq!(outcome.ok(), "1000000");
        }
        let after = own_memory(monitor);
        println!("monitor with a stalled reader: {before} MiB, then {after} MiB");
        assert!(after <= before + 16, "{before} MiB, then {after} MiB");
        let start = Instant::now();
        runtime.call(&["kill", &id, "KILL"]).ok();
        runtime.call(&["delete", "--force", &id]).ok();
        println!(
            "kill and delete with a stalled reader: {:?}",
            start.elapsed()
        );
        drop(reader);
    });
}

/// Runs the verb with at most so many open files.
fn with_files(limit: u32, command: &Command) -> Outcome {
    let mut all = Command::new("sh");
    all.arg("-c")
        .arg(format!("ulimit -n {limit} && exec \"$@\""))
        .arg("sh");
    all.arg(command.get_program()).args(command.get_args());
    all.stdin(Stdio::null());
    finish(all)
}

#[test]
fn few_open_files() {
    if !is_sandbox() {
        return;
    }
    let mut worked = Vec::new();
    leaves_nothing(|runtime| {
        for limit in [8, 10, 12, 14, 16, 20, 24, 32, 64, 256] {
            let bundle = Bundle::script("echo hello").build();
            let outcome = with_files(limit, &runtime.run_command(&bundle));
            if outcome.status == 0 {
                assert_eq!(outcome.ok(), "hello", "{limit}");
                worked.push(limit);
                if worked.len() > 2 {
                    break;
                }
            } else {
                println!("{limit} files: {}", outcome.refusal());
                assert!(
                    outcome.refusal().contains("open files"),
                    "{limit}: {outcome:?}"
                );
            }
            let left = fs::read_dir(runtime.root()).unwrap().count();
            assert_eq!(left, 0, "{limit}");
        }
    });
    println!("works with {worked:?} files");
    assert!(!worked.is_empty());
}

/// A directory of the unified hierarchy with a limit, removed on drop.
struct TightCgroup(PathBuf);

impl TightCgroup {
    fn new(bytes: u64) -> TightCgroup {
        let path = Path::new("/sys/fs/cgroup").join(format!("tight-{}", new_id()));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("memory.max"), bytes.to_string()).unwrap();
        TightCgroup(path)
    }
}

impl Drop for TightCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_host_cgroup_with_too_little_memory() {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control");
    if !is_sandbox() || !controllers.is_ok_and(|names| names.contains("memory")) {
        return;
    }
    leaves_nothing(|runtime| {
        for mebibytes in [2, 24] {
            let tight = TightCgroup::new(mebibytes << 20);
            let name = tight.0.file_name().unwrap().to_str().unwrap();
            let bundle = Bundle::script("echo hello")
                .set("/linux/cgroupsPath", format!("/{name}/inner"))
                .build();
            let outcome = runtime.run(&bundle);
            // More than it needs is not known here: it works or it says so.
            match outcome.status {
                0 => assert_eq!(outcome.ok(), "hello"),
                _ => assert!(outcome.refusal().contains("lack of memory"), "{outcome:?}"),
            }
            assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
        }
        // Enough to begin with, then hardly any.
        let tight = TightCgroup::new(2 << 30);
        let name = tight.0.file_name().unwrap().to_str().unwrap();
        let volume = Volume::new();
        let path = format!("/{name}/inner");
        let container = started(runtime, worker(&volume).set("/linux/cgroupsPath", path));
        harness::wait_until("work has begun", || volume.0.join("ready").exists());
        fs::write(tight.0.join("memory.max"), "1048576").unwrap();
        check_stopped_and_delete("out of memory on the host", &container);
        volume.check();
        assert_eq!(volume.read("kept"), "kept\n");
    });
}

/// A small file system, unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(size: &str) -> SmallDisk {
        let path = std::env::temp_dir().join(format!("disk-{}", new_id()));
        fs::create_dir(&path).unwrap();
        let options = format!("mode=700,size={size}");
        let mut mount = Command::new("busybox");
        mount
            .args(["mount", "-t", "tmpfs", "-o", &options, "none"])
            .arg(&path);
        assert!(mount.status().unwrap().success());
        SmallDisk(path)
    }

    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).unwrap();
        while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("busybox").arg("umount").arg(&self.0).status();
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_disk_that_fills_up() {
    if !is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        // That of a volume: the container hears of it, and goes on when there is space again.
        let disk = SmallDisk::new("2m");
        let builder =
            Bundle::script("exec sleep 1000").bind(&disk.0, "/mnt/volume", &["rbind", "rw"]);
        let container = started(runtime, builder);
        let fill = "dd if=/dev/zero of=/mnt/volume/file bs=65536 count=64; echo $?; sync";
        let full = container.exec(&["/bin/sh", "-c", fill]);
        assert!(full.stderr.contains("No space left on device"), "{full:?}");
        let free = "rm /mnt/volume/file; echo fits > /mnt/volume/file; sync; cat /mnt/volume/file";
        assert_eq!(container.exec(&["/bin/sh", "-c", free]).ok(), "fits");
        container.call("delete", &["--force"]).ok();
        drop(container);
    });
    leaves_nothing(|_| {
        // That of the state directory: what runs is not disturbed, and ends as it should.
        let disk = SmallDisk::new("256k");
        let call = |arguments: &[&str]| {
            let mut command = Command::new(harness::top().join("target/release/sandbox"));
            command
                .arg("--root")
                .arg(disk.0.join("root"))
                .args(arguments);
            finish_quiet(command)
        };
        let bundles = [sleeper().build(), sleeper().build()];
        let path = |index: usize| bundles[index].path().to_str().unwrap();
        let ids = [new_id(), new_id()];
        call(&["run", "--detach", "-b", path(0), &ids[0]]).ok();
        call(&["create", "-b", path(1), &ids[1]]).ok();
        disk.fill();
        let state = |id: &str| {
            let outcome = call(&["state", id]);
            let state: serde_json::Value = serde_json::from_str(outcome.ok()).unwrap();
            state["status"].as_str().unwrap().to_owned()
        };
        assert_eq!(call(&["exec", &ids[0], "/bin/echo", "alive"]).ok(), "alive");
        assert_eq!(state(&ids[0]), "running");
        // What cannot be written down is not done.
        let paused = call(&["pause", &ids[0]]);
        assert!(
            paused.refusal().to_lowercase().contains("no space left"),
            "{paused:?}"
        );
        assert_eq!(call(&["exec", &ids[0], "/bin/echo", "alive"]).ok(), "alive");
        let start = call(&["start", &ids[1]]);
        assert!(
            start.refusal().to_lowercase().contains("no space left"),
            "{start:?}"
        );
        assert_eq!(state(&ids[1]), "stopped");
        call(&["kill", &ids[0], "KILL"]).ok();
        harness::wait_until("the container stops", || state(&ids[0]) == "stopped");
        for id in &ids {
            call(&["delete", id]).ok();
            wait_until_no_process(id);
        }
    });
}

fn sleeper() -> BundleBuilder {
    Bundle::busybox(&["/bin/sleep", "1000"])
}

/// For commands that leave a container which holds on to its streams.
fn finish_quiet(mut command: Command) -> Outcome {
    let files = std::env::temp_dir().join(new_id());
    fs::create_dir(&files).unwrap();
    let open = |name: &str| fs::File::create(files.join(name)).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(open("out"))
        .stderr(open("err"));
    let status = harness::runtime::wait(command.spawn().unwrap());
    let outcome = Outcome {
        status,
        stdout: fs::read(files.join("out")).unwrap(),
        stderr: fs::read_to_string(files.join("err")).unwrap(),
    };
    fs::remove_dir_all(files).unwrap();
    outcome
}
