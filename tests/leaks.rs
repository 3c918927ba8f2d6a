// SPDX-License-Identifier: Apache-2.0
//! Whatever happens to a container, when it is deleted the host is as it was: no process, mount, cgroup, socket, file,
//! terminal or network link is left.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::inventory::{leaves_nothing, wait_until_no_process};
use harness::runtime::{new_id, wait};
use harness::{Bundle, BundleBuilder, Runtime};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

fn sleeper() -> BundleBuilder {
    Bundle::busybox(&["/bin/sleep", "1000"])
}

fn kill(pid: &serde_json::Value) {
    let pid = i32::try_from(pid.as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn a_run() {
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("echo hello; (sleep 1000 &); exit 3").build();
        assert_eq!(runtime.run(&bundle).status, 3);
    });
}

#[test]
fn a_run_with_memory_limit_volume_and_hooks() {
    leaves_nothing(|runtime| {
        let volume = Bundle::script("true").build();
        let hook = json!([{"path": "/bin/true"}]);
        let bundle = Bundle::script("echo hello > /mnt/volume/file")
            .bind(volume.path(), "/mnt/volume", &["rbind", "rw"])
            .set("/linux/resources/memory/limit", 128 << 20)
            .set("/linux/cgroupsPath", format!("/leaks/{}", new_id()))
            .set("/hooks/createRuntime", hook.clone())
            .set("/hooks/poststop", hook)
            .build();
        runtime.run(&bundle).ok();
        assert!(volume.path().join("file").exists());
        // The directory above the container's own is the engine's.
        let _ = fs::remove_dir("/sys/fs/cgroup/leaks");
    });
}

#[test]
fn twenty_lives() {
    leaves_nothing(|runtime| {
        for _ in 0..20 {
            let container = runtime.create(sleeper().build());
            container.start();
            container.exec(&["/bin/true"]).ok();
            container.call("kill", &["KILL"]).ok();
            container.wait_stopped();
            container.call("delete", &[]).ok();
        }
    });
}

#[test]
fn deleted_by_force_with_execs() {
    leaves_nothing(|runtime| {
        let container = runtime.create(sleeper().build());
        container.start();
        for _ in 0..3 {
            let mut command = runtime.command();
            command.args(["exec", "--detach", container.id(), "/bin/sleep", "1000"]);
            let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
            assert_eq!(wait(quiet.spawn().unwrap()), 0);
        }
        container.call("delete", &["--force"]).ok();
        // Nobody waits for the stubs, which hear of the end at the same moment.
        wait_until_no_process(container.id());
    });
}

#[test]
fn created_and_never_started() {
    leaves_nothing(|runtime| {
        let container = runtime.create(sleeper().build());
        container.call("delete", &["--force"]).ok();
    });
}

#[test]
fn creates_that_fail() {
    let hook = json!([{"path": "/bin/false"}]);
    let failing = [
        Bundle::busybox(&["/bin/nosuch"]),
        Bundle::busybox(&["/etc/passwd"]),
        sleeper().set("/process/cwd", "relative"),
        sleeper().set("/root/path", "nosuch"),
        sleeper().mount("/mnt", "bind", "/nonexistent", &["bind"]),
        sleeper().mount("/mnt/x", "nosuchtype", "none", &[]),
        sleeper().set("/process/user/uid", "root"),
        sleeper().set("/hooks/createRuntime", hook),
        sleeper().set("/linux/namespaces/1/path", "/proc/self/ns/uts"),
        sleeper().set("/process/terminal", true),
    ];
    for bundle in failing {
        leaves_nothing(|runtime| {
            let shown = format!("{bundle:?}");
            let outcome = runtime.try_create(bundle.build());
            let outcome = outcome.expect_err(&shown);
            assert_eq!(outcome.status, 1, "{shown}: {outcome:?}");
        });
    }
}

#[test]
fn creates_that_fail_at_the_very_end() {
    for option in ["--pid-file", "--pidfd-socket"] {
        leaves_nothing(|runtime| {
            let bundle = sleeper().build();
            let path = bundle.path().to_str().unwrap();
            let id = new_id();
            let all = ["create", "-b", path, option, "/nonexistent/file", &id];
            let outcome = runtime.call(&all);
            assert!(outcome.refusal().contains("/nonexistent"), "{outcome:?}");
        });
    }
}

#[test]
fn runs_that_fail_to_start() {
    leaves_nothing(|runtime| {
        let hook = json!([{"path": "/bin/false"}]);
        let bundle = sleeper().set("/hooks/poststart", hook.clone()).build();
        let _ = runtime.run(&bundle);
        let bundle = sleeper().set("/hooks/startContainer", hook).build();
        assert_ne!(runtime.run(&bundle).status, 0);
    });
}

#[test]
fn a_monitor_killed_when_created() {
    leaves_nothing(|runtime| {
        let container = runtime.create(sleeper().build());
        kill(&container.state()["pid"]);
        container.wait_stopped();
        container.call("delete", &[]).ok();
    });
}

#[test]
fn a_monitor_killed_when_running() {
    leaves_nothing(|runtime| {
        let container = runtime.create(sleeper().build());
        container.start();
        kill(&container.state()["pid"]);
        container.wait_stopped();
        container.call("delete", &[]).ok();
    });
}

#[test]
fn a_monitor_killed_below_a_run() {
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("echo ready > /tmp/ready; exec sleep 1000").build();
        let child = runtime
            .run_command(&bundle)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ready = bundle.rootfs().join("tmp/ready");
        harness::wait_until("the container runs", || ready.exists());
        let listed = runtime.call(&["list", "--format", "json"]);
        let listed: serde_json::Value = serde_json::from_str(listed.ok()).unwrap();
        kill(&listed[0]["pid"]);
        assert_eq!(wait(child), 137);
    });
}

/// Starts `run`, kills it at a moment, and deletes what there is of the container.
fn kill_and_delete(runtime: &Runtime, mut command: Command, id: &str, moment: impl FnOnce()) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    moment();
    child.kill().unwrap();
    child.wait().unwrap();
    runtime.call(&["delete", "--force", id]).ok();
    // A monitor that has not created its container yet learns from its broken connection that nobody wants it.
    wait_until_no_process(id);
    assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
}

fn command(runtime: &Runtime, verb: &str, bundle: &Bundle, id: &str) -> Command {
    let mut command = runtime.command();
    command.arg(verb).arg("-b").arg(bundle.path()).arg(id);
    command
}

#[test]
fn a_run_that_is_killed() {
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("echo ready > /tmp/ready; exec sleep 1000").build();
        let ready = bundle.rootfs().join("tmp/ready");
        let id = new_id();
        kill_and_delete(runtime, command(runtime, "run", &bundle, &id), &id, || {
            harness::wait_until("the container runs", || ready.exists());
        });
    });
}

#[test]
fn a_create_that_is_killed_at_any_moment() {
    for moment in 0..16 {
        leaves_nothing(|runtime| {
            let bundle = sleeper().build();
            let id = new_id();
            let command = command(runtime, "create", &bundle, &id);
            // There is no event to wait for: the moments themselves are what is tried.
            kill_and_delete(runtime, command, &id, || {
                std::thread::sleep(Duration::from_millis(5 * moment * moment));
            });
        });
    }
}
