// SPDX-License-Identifier: Apache-2.0
//! containerd with its stock runc shim and `sandbox` in the place of runc, driven by `ctr`.

use std::fs;
use std::process::Command;

use harness::Bundle;
use harness::engine::{self, Engine};
use harness::runtime::finish;

/// `ctr run OPTIONS` with the runtime under test and a root file system of busybox.
fn run(ctr: &Engine, options: &[&str], id: &str, bundle: &Bundle, arguments: &[&str]) -> Command {
    let runtime = engine::runtime();
    let mut all = vec![
        "run",
        "--runc-binary",
        runtime.to_str().unwrap(),
        "--rootfs",
    ];
    all.extend(options);
    all.extend([bundle.rootfs().to_str().unwrap(), id]);
    all.extend(arguments);
    ctr.command(&all)
}

#[test]
fn run_carries_output_and_status() {
    let ctr = engine::containerd();
    let bundle = Bundle::busybox(&["/bin/sh"]).build();
    let script = "echo out; echo err >&2; exit 7";
    let arguments = ["/bin/sh", "-c", script];
    let outcome = finish(run(ctr, &["--rm"], "ran", &bundle, &arguments));
    assert_eq!(outcome.status, 7, "{outcome:?}\n{}", ctr.logs());
    assert_eq!(
        (outcome.text(), outcome.stderr.as_str()),
        ("out\n", "err\n")
    );
    let missing = finish(run(ctr, &["--rm"], "missing", &bundle, &["/bin/nosuch"]));
    assert_ne!(missing.status, 0, "{missing:?}");
    assert!(
        missing.stderr.contains("OCI runtime create failed")
            && missing.stderr.contains("no such file or directory"),
        "{missing:?}"
    );
    assert_eq!(ctr.call(&["tasks", "list", "--quiet"]).ok(), "");
}

#[test]
fn a_task_lives_its_life() {
    let ctr = engine::containerd();
    let bundle = Bundle::busybox(&["/bin/sh"]).build();
    let log = ctr.write("task.log", "");
    let script = "trap 'echo bye; exit 5' TERM; echo started; while :; do sleep 0.2; done";
    let options = [
        "--detach",
        "--memory-limit",
        "100000000",
        "--log-uri",
        &format!("file://{log}"),
    ];
    let arguments = ["/bin/sh", "-c", script];
    finish(run(ctr, &options, "task", &bundle, &arguments)).ok();
    let output = || fs::read_to_string(&log).unwrap();
    harness::wait_until("output", || output() == "started\n");
    let status = || {
        let list = ctr.call(&["tasks", "list"]);
        let line = list.text().lines().find(|line| line.starts_with("task "));
        let status = line.and_then(|line| line.split_whitespace().last());
        status.unwrap_or_default().to_owned()
    };
    assert_eq!(status(), "RUNNING");

    let exec = |id: &str, arguments: &[&str]| {
        let mut all = vec!["tasks", "exec", "--exec-id", id, "task"];
        all.extend(arguments);
        ctr.call(&all)
    };
    let inside = exec("one", &["/bin/sh", "-c", "echo in; exit 9"]);
    assert_eq!(inside.status, 9, "{inside:?}");
    assert_eq!(inside.text(), "in\n", "{inside:?}");
    let missing = exec("two", &["/bin/nosuch"]);
    assert_ne!(missing.status, 0, "{missing:?}");
    assert!(
        missing.stderr.contains("no such file or directory"),
        "{missing:?}"
    );
    let size = "n=0; while [ $n -lt 100 ] && [ \"$(stty size)\" != '33 77' ]; do sleep 0.1; n=$((n+1)); done; \
                stty size; exit 4";
    let exec = [
        "tasks",
        "exec",
        "--tty",
        "--exec-id",
        "three",
        "task",
        "/bin/sh",
        "-c",
        size,
    ];
    let terminal = ctr.call_on_terminal(&exec);
    assert_eq!(terminal.status, 4, "{terminal:?}");
    // ctr leaves its own terminal as it is, so line ends are made twice.
    assert!(terminal.text().contains("33 77\r"), "{terminal:?}");

    let processes = ctr.call(&["tasks", "ps", "task"]);
    assert!(processes.ok().lines().count() >= 2, "{processes:?}");
    let metrics = ctr.call(&["tasks", "metrics", "task"]);
    assert!(metrics.ok().contains("memory.usage"), "{metrics:?}");
    ctr.call(&["tasks", "pause", "task"]).ok();
    assert_eq!(status(), "PAUSED");
    ctr.call(&["tasks", "resume", "task"]).ok();
    assert_eq!(status(), "RUNNING");

    ctr.call(&["tasks", "kill", "--signal", "SIGTERM", "task"])
        .ok();
    harness::wait_until("the task ends", || status() == "STOPPED");
    assert_eq!(output(), "started\nbye\n");
    let deleted = ctr.call(&["tasks", "delete", "task"]);
    assert!(deleted.stderr.contains("exit code 5"), "{deleted:?}");
    ctr.call(&["containers", "delete", "task"]).ok();
    assert_eq!(ctr.call(&["containers", "list", "--quiet"]).ok(), "");
}
