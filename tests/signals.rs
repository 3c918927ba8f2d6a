// SPDX-License-Identifier: Apache-2.0
//! Exit statuses and signals, as a shell in front of `sandbox run` sees them.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use harness::runtime::wait;
use harness::{Bundle, Runtime};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn every_exit_status_comes_through() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    for status in 0..=255 {
        let outcome = container.exec(&["/bin/sh", "-c", &format!("exit {status}")]);
        assert_eq!(outcome.status, status, "{outcome:?}");
    }
}

#[test]
fn exit_statuses_of_the_init_process() {
    let runtime = Runtime::new();
    for status in [0, 1, 2, 127, 255] {
        let bundle = Bundle::script(&format!("exit {status}")).build();
        assert_eq!(runtime.run(&bundle).status, status);
    }
}

#[test]
fn death_by_a_signal_is_128_and_its_number() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    for (name, number) in [("KILL", 9), ("TERM", 15), ("SEGV", 11), ("HUP", 1)] {
        let outcome = container.exec(&["/bin/sh", "-c", &format!("kill -{name} $$")]);
        assert_eq!(outcome.status, 128 + number, "SIG{name}");
    }
    container.call("kill", &["KILL"]).ok();
    container.wait_stopped();
}

/// Runs a bundle that says "ready" when its traps are set.
fn run_until_ready(
    runtime: &Runtime,
    bundle: &Bundle,
) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = runtime
        .run_command(bundle)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, output)
}

#[test]
fn signals_to_run_reach_the_process() {
    let runtime = Runtime::new();
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::WINCH, "WINCH"),
        (Signal::USR1, "USR1"),
    ] {
        if name == "WINCH" && !runtime.is_sandbox() {
            continue;
        }
        let script = format!(
            "trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.1; done"
        );
        let bundle = Bundle::script(&script).build();
        let (child, mut output) = run_until_ready(&runtime, &bundle);
        let pid = Pid::from_child(&child);
        kill_process(pid, signal).unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, format!("got {name}\n"));
        assert_eq!(wait(child), 9, "SIG{name}");
    }
}

#[test]
fn an_orphan_is_reaped_and_gone_with_the_init_process() {
    let script = "(sleep 0.2 &) ; sleep 1; ps | grep -c '[Z]ombie\\|\\[sleep\\]'";
    let outcome = Runtime::new().run(&Bundle::script(script).build());
    // As in any container the init process has to reap; the shell does.
    assert_eq!(outcome.text().trim(), "0");
}
