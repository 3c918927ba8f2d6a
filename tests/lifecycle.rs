// SPDX-License-Identifier: Apache-2.0
//! create, start, state, exec, kill, delete, list: as an engine calls them. Runs against runc and crun too.

use std::fs;

use harness::{Bundle, Runtime};

#[test]
fn a_container_lives_its_life() {
    let runtime = Runtime::new();
    let bundle = Bundle::script("echo hello; sleep 1000").build();
    let container = runtime.create(bundle);
    let state = container.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], container.id());
    assert_eq!(state["bundle"], container.bundle().path().to_str().unwrap());
    let pid = fs::read_to_string(container.bundle().path().join("pid")).unwrap();
    assert_eq!(state["pid"].to_string(), pid.trim());
    assert!(fs::exists(format!("/proc/{}", pid.trim())).unwrap());
    assert_eq!(container.stdout(), "", "nothing runs before start");
    container.start();
    harness::wait_until("output", || container.stdout() == "hello\n");
    assert_eq!(container.status(), "running");
    let listed = runtime.call(&["list", "--quiet"]);
    assert_eq!(listed.ok(), container.id());
    container.call("kill", &["KILL"]).ok();
    container.wait_stopped();
    assert_eq!(container.state()["pid"], 0);
    container.call("delete", &[]).ok();
    let gone = container.call("state", &[]);
    assert_eq!(gone.status, 1);
    assert!(gone.stderr.contains("does not exist"), "{gone:?}");
}

#[test]
fn what_the_state_forbids_is_refused() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    let again = container.call("start", &[]);
    assert_eq!(again.status, 1);
    assert!(
        again
            .stderr
            .contains("cannot start an already running container"),
        "{again:?}"
    );
    let delete = container.call("delete", &[]);
    assert_eq!(delete.status, 1);
    assert!(delete.stderr.contains("not stopped"), "{delete:?}");
    container.call("kill", &["9"]).ok();
    container.wait_stopped();
    let kill = container.call("kill", &["TERM"]);
    assert_eq!(kill.status, 1);
    assert!(kill.stderr.contains("not running"), "{kill:?}");
    let exec = container.exec(&["/bin/true"]);
    assert_ne!(exec.status, 0);
}

#[test]
fn delete_force_ends_a_running_container() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    let pid = container.state()["pid"].to_string();
    container.call("delete", &["--force"]).ok();
    harness::wait_until("the process is gone", || {
        !fs::exists(format!("/proc/{pid}/exe")).unwrap()
    });
    runtime.call(&["delete", "--force", "nosuch"]).ok();
    assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
}

#[test]
fn an_id_is_taken_once() {
    let runtime = Runtime::new();
    let bundle = Bundle::busybox(&["/bin/sleep", "1000"]).build();
    let container = runtime.create(bundle);
    let path = container.bundle().path().to_str().unwrap();
    let second = runtime.call(&["create", "-b", path, container.id()]);
    assert!(second.refusal().contains("exists"), "{second:?}");
    assert_eq!(container.status(), "created");
}

#[test]
fn exec_runs_beside_the_init_process() {
    let runtime = Runtime::new();
    let bundle = Bundle::busybox(&["/bin/sleep", "1000"]).build();
    let container = runtime.create(bundle);
    container.start();
    assert_eq!(container.exec(&["/bin/hostname"]).ok(), "test-container");
    let processes = container.exec(&["/bin/ps"]);
    assert!(processes.ok().contains("sleep 1000"), "{processes:?}");
    let id = container.id().to_owned();
    let as_user = runtime.call(&[
        "exec",
        "--user",
        "1000:1001",
        "--cwd",
        "/tmp",
        "--env",
        "WHO=me",
        &id,
        "/bin/sh",
        "-c",
        "id -u; id -g; pwd; echo $WHO",
    ]);
    assert_eq!(as_user.ok(), "1000\n1001\n/tmp\nme");
    let missing = container.exec(&["/bin/nosuch"]);
    assert_ne!(missing.status, 0);
    assert!(
        missing.stderr.contains("no such file or directory"),
        "{missing:?}"
    );
}

#[test]
fn a_detached_exec_has_a_pid_of_its_own() {
    let runtime = Runtime::new();
    let bundle = Bundle::busybox(&["/bin/sleep", "1000"]).build();
    let container = runtime.create(bundle);
    container.start();
    let pid_file = container.bundle().path().join("exec.pid");
    let id = container.id().to_owned();
    let mut command = runtime.command();
    command.args(["exec", "--detach", "--pid-file"]);
    command
        .arg(&pid_file)
        .args([&id, "/bin/sh", "-c", "echo $$ > /tmp/ran; sleep 1000"]);
    let status = command.stdin(std::process::Stdio::null()).status().unwrap();
    assert!(status.success());
    let pid: i32 = fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    harness::wait_until("the exec runs", || {
        container.bundle().rootfs().join("tmp/ran").exists()
    });
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    harness::wait_until("the exec ends", || {
        !container.exec(&["/bin/ps"]).text().contains("/tmp/ran")
    });
    assert_eq!(container.status(), "running");
}

#[test]
fn pause_stops_the_clock_of_a_container() {
    let runtime = Runtime::new();
    let bundle = Bundle::script("while :; do echo tick; sleep 0.1; done").build();
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("ticks", || container.stdout().lines().count() > 2);
    container.call("pause", &[]).ok();
    assert_eq!(container.status(), "paused");
    // What is under way arrives; then it is still.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = container.stdout().len();
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert_eq!(container.stdout().len(), before);
    container.call("resume", &[]).ok();
    assert_eq!(container.status(), "running");
    harness::wait_until("more ticks", || container.stdout().len() > before);
}

#[test]
fn a_killed_monitor_leaves_a_stopped_container() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    let pid = i32::try_from(container.state()["pid"].as_i64().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    container.wait_stopped();
    container.call("delete", &[]).ok();
}
