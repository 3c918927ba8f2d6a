// SPDX-License-Identifier: Apache-2.0
//! Docker with `sandbox` as its runtime, driven by its own command line.

use harness::engine;

#[test]
fn run_carries_input_output_and_status() {
    engine::docker().check_run();
}

#[test]
fn what_cannot_be_run_has_the_status_of_a_shell() {
    engine::docker().check_what_cannot_be_run();
}

#[test]
fn a_container_lives_its_life() {
    let docker = engine::docker();
    let container = docker.container();
    let script = "trap 'echo bye; exit 5' TERM; echo started; while :; do sleep 0.2; done";
    let name = container.name();
    docker
        .call(&[
            "run",
            "-d",
            "--name",
            name,
            "--network",
            "none",
            "--health-cmd",
            "test -e /healthy",
            "--health-interval",
            "1s",
            "busybox",
            "sh",
            "-c",
            script,
        ])
        .ok();
    harness::wait_until("output", || container.logs() == "started\n");
    assert_eq!(docker.call(&["ps", "--format", "{{.Names}}"]).ok(), name);

    let inside = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 9"]);
    assert_eq!((inside.status, inside.text()), (9, "out\n"));
    assert_eq!(inside.stderr, "err\n");
    let missing = container.exec(&["nosuch"]);
    assert_ne!(missing.status, 0, "{missing:?}");
    // The size comes a moment after the start.
    let size = "n=0; while [ $n -lt 100 ] && [ \"$(stty size)\" != '33 77' ]; do sleep 0.1; n=$((n+1)); done; \
                stty size; tty; exit 4";
    let terminal = docker.call_on_terminal(&["exec", "-it", name, "sh", "-c", size]);
    assert_eq!(terminal.status, 4, "{terminal:?}");
    assert!(
        terminal.text().contains("33 77\r\n/dev/pts/"),
        "{terminal:?}"
    );

    container.exec(&["touch", "/healthy"]).ok();
    harness::wait_until("it is healthy", || {
        container.inspect(".State.Health.Status") == "healthy"
    });
    let processes = container.call(&["top"], &[]);
    assert!(processes.ok().lines().count() >= 2, "{processes:?}");
    let stats = container.call(
        &[
            "stats",
            "--no-stream",
            "--format",
            "{{.MemUsage}} {{.PIDs}}",
        ],
        &[],
    );
    assert!(!stats.ok().starts_with("0B"), "{stats:?}");

    let file = docker.write("copied", "copied\n");
    docker.call(&["cp", &file, &format!("{name}:/copy")]).ok();
    assert_eq!(container.exec(&["cat", "/copy"]).ok(), "copied");
    container
        .call(
            &["update", "--memory", "100m", "--memory-swap", "100m"],
            &[],
        )
        .ok();
    let limit = container.exec(&["cat", "/sys/fs/cgroup/memory.max"]);
    if engine::is_sandbox() {
        assert_eq!(limit.ok(), (100 << 20).to_string());
    }

    container.call(&["pause"], &[]).ok();
    assert_eq!(container.inspect(".State.Status"), "paused");
    container.call(&["unpause"], &[]).ok();
    assert_eq!(container.inspect(".State.Status"), "running");

    // The engine dies and comes back; the container does not notice.
    docker.kill_daemon();
    docker.start_dockerd();
    assert_eq!(container.exec(&["cat", "/copy"]).ok(), "copied");

    container.call(&["stop", "--time", "60"], &[]).ok();
    let state = container.inspect(".State.Status}} {{.State.ExitCode}} {{.State.OOMKilled");
    assert_eq!(state, "exited 5 false");
    assert_eq!(container.logs(), "started\nbye\n");

    container.call(&["start"], &[]).ok();
    container.call(&["kill", "--signal", "KILL"], &[]).ok();
    assert_eq!(container.call(&["wait"], &[]).ok(), "137");
    container.call(&["start"], &[]).ok();
    container.call(&["rm", "--force"], &[]).ok();
    assert_ne!(container.call(&["inspect"], &[]).status, 0);
}

#[test]
fn a_failing_container_is_restarted_as_often_as_asked() {
    let docker = engine::docker();
    let container = docker.container();
    docker
        .call(&[
            "run",
            "-d",
            "--name",
            container.name(),
            "--network",
            "none",
            "--restart",
            "on-failure:2",
            "busybox",
            "sh",
            "-c",
            "echo run; exit 3",
        ])
        .ok();
    harness::wait_until("the last try has failed", || {
        container.inspect(".RestartCount}} {{.State.Status}} {{.State.ExitCode") == "2 exited 3"
    });
    assert_eq!(container.logs(), "run\nrun\nrun\n");
}
