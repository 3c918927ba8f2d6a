// SPDX-License-Identifier: Apache-2.0
//! Limits hold inside the guest: the process that breaks one pays, not the machine.

use harness::{Bundle, Runtime};

#[test]
fn a_process_that_eats_memory_is_killed_alone() {
    let script =
        "tail /dev/zero; echo status $?; echo alive; grep oom_kill /sys/fs/cgroup/memory.events";
    let bundle = Bundle::script(script)
        .set("/linux/resources/memory/limit", 64 << 20)
        .build();
    let outcome = Runtime::new().run(&bundle);
    let lines: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(lines[..2], ["status 137", "alive"], "{outcome:?}");
    assert_eq!(lines[2], "oom_kill 1");
}

#[test]
fn an_init_process_out_of_memory_gives_137() {
    let program = "data = []\nwhile True: data.append(bytearray(10 << 20))";
    let bundle = Bundle::python(program)
        .set("/linux/resources/memory/limit", 100 << 20)
        .build();
    assert_eq!(Runtime::new().run(&bundle).status, 137);
}

#[test]
fn the_pids_limit_stops_a_fork_bomb() {
    let script = "i=0; while [ $i -lt 50 ]; do sleep 5 & i=$((i+1)); done 2>/dev/null; cat /sys/fs/cgroup/pids.max";
    let bundle = Bundle::script(script)
        .set("/linux/resources/pids/limit", 10)
        .build();
    let runtime = Runtime::new();
    let outcome = runtime.run(&bundle);
    // The shell itself gives up when it cannot fork: what counts is that it did not get fifty.
    assert_ne!(outcome.text().trim(), "max");
    let container = runtime.create(
        Bundle::busybox(&["/bin/sleep", "1000"])
            .set("/linux/resources/pids/limit", 30)
            .build(),
    );
    container.start();
    let outcome = container.exec(&[
        "/bin/sh",
        "-c",
        "for i in $(seq 40); do sleep 3 & done; wait",
    ]);
    assert!(outcome.stderr.contains("can't fork"), "{outcome:?}");
    assert_eq!(
        container
            .exec(&["/bin/cat", "/sys/fs/cgroup/pids.max"])
            .ok(),
        "30"
    );
}

#[test]
fn the_cpu_quota_holds() {
    // CPU time used within three seconds of wall time at half a CPU.
    let program = r"
import time
start, used = time.monotonic(), time.process_time()
while time.monotonic() - start < 3: pass
print((time.process_time() - used) / (time.monotonic() - start))
";
    let bundle = Bundle::python(program)
        .set("/linux/resources/cpu/quota", 50_000)
        .set("/linux/resources/cpu/period", 100_000)
        .build();
    let outcome = Runtime::new().run(&bundle);
    let share: f64 = outcome.ok().parse().unwrap();
    assert!((0.4..=0.55).contains(&share), "{share}");
}
