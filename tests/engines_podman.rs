// SPDX-License-Identifier: Apache-2.0
//! Podman with `sandbox` as its runtime, driven by its own command line.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use harness::engine;

#[test]
fn run_carries_input_output_and_status() {
    engine::podman().check_run();
}

#[test]
fn what_cannot_be_run_has_the_status_of_a_shell() {
    let forbidden = engine::podman().check_what_cannot_be_run();
    assert!(
        forbidden.stderr.contains("permission denied"),
        "{forbidden:?}"
    );
}

#[test]
fn a_container_lives_its_life() {
    let podman = engine::podman();
    let container = podman.container();
    let script = "trap 'echo bye; exit 5' TERM; echo started; while :; do sleep 0.2; done";
    let name = container.name();
    podman
        .call(&[
            "run",
            "-d",
            "--name",
            name,
            "--network",
            "none",
            "--health-cmd",
            "test -e /healthy",
            // Checks that repeat need systemd.
            "--health-interval=disable",
            "busybox",
            "sh",
            "-c",
            script,
        ])
        .ok();
    harness::wait_until("output", || container.logs() == "started\n");
    assert_eq!(podman.call(&["ps", "--format", "{{.Names}}"]).ok(), name);

    let inside = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 9"]);
    assert_eq!((inside.status, inside.text()), (9, "out\n"));
    assert!(inside.stderr.starts_with("err\n"), "{inside:?}");
    let missing = container.exec(&["nosuch"]);
    assert_eq!(missing.status, 127, "{missing:?}");
    // The size comes a moment after the start.
    let size = "n=0; while [ $n -lt 100 ] && [ \"$(stty size)\" != '33 77' ]; do sleep 0.1; n=$((n+1)); done; \
                stty size; tty; exit 4";
    let terminal = podman.call_on_terminal(&["exec", "-it", name, "sh", "-c", size]);
    assert_eq!(terminal.status, 4, "{terminal:?}");
    assert!(
        terminal.text().contains("33 77\r\n/dev/pts/"),
        "{terminal:?}"
    );

    let sick = container.call(&["healthcheck", "run"], &[]);
    assert_eq!(sick.status, 1, "{sick:?}");
    container.exec(&["touch", "/healthy"]).ok();
    container.call(&["healthcheck", "run"], &[]).ok();

    let processes = container.call(&["top"], &["-o", "pid,args"]);
    assert!(
        processes
            .ok()
            .lines()
            .any(|line| line.trim_start().starts_with("1 sh -c trap")),
        "{processes:?}"
    );
    let stats = container.call(
        &[
            "stats",
            "--no-stream",
            "--format",
            "{{.CPUNano}} {{.MemUsage}} {{.PIDs}}",
        ],
        &[],
    );
    assert!(!stats.ok().contains("0 0B"), "{stats:?}");

    container.call(&["pause"], &[]).ok();
    assert_eq!(container.inspect(".State.Status"), "paused");
    container.call(&["unpause"], &[]).ok();
    assert_eq!(container.inspect(".State.Status"), "running");

    container.call(&["stop", "--time", "60"], &[]).ok();
    let state = container.inspect(".State.Status}} {{.State.ExitCode}} {{.State.OOMKilled");
    assert_eq!(state, "exited 5 false");
    assert_eq!(container.logs(), "started\nbye\n");

    container.call(&["start"], &[]).ok();
    harness::wait_until("output", || container.logs().ends_with("bye\nstarted\n"));
    container.call(&["kill", "--signal", "KILL"], &[]).ok();
    assert_eq!(container.call(&["wait"], &[]).ok(), "137");
    container.call(&["start"], &[]).ok();
    container.call(&["rm", "--force", "--time", "0"], &[]).ok();
    assert_eq!(container.call(&["inspect"], &[]).status, 125);
}

#[test]
fn options_hold_inside() {
    let podman = engine::podman();
    let volume = podman.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(volume.join("file"), "volume\n").unwrap();
    let single = podman.write("single", "single\n");
    let profile = podman.write(
        "seccomp.json",
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}"#,
    );
    let script = r"
        id -u; id -g; hostname; pwd; echo $WHO
        cat /volume/file /single
        echo new > /volume/new
        (echo x > /single) 2>/dev/null || echo single is read-only
        (echo x > /readonly/y) 2>/dev/null || echo volume is read-only
        (echo x > /x) 2>/dev/null || echo root is read-only
        echo x > /scratch/x && df -k /scratch | grep -o ' 1024 '
        mkdir /scratch/d 2>/dev/null || echo no mkdir
        cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max
        grep CapBnd /proc/self/status
        ulimit -n
        grep -c other.name /etc/hosts
        head -c 17 /proc/1/cmdline | tr '\0' ' '; echo
        exit 3";
    let bind = |source: &str, rest: &str| format!("{source}:{rest}");
    let outcome = podman.call(&[
        "run",
        "--rm",
        "--network",
        "none",
        "--init",
        "--read-only",
        "--volume",
        &bind(volume.to_str().unwrap(), "/volume"),
        "--volume",
        &bind(volume.to_str().unwrap(), "/readonly:ro"),
        "--volume",
        &bind(&single, "/single:ro"),
        "--tmpfs",
        "/scratch:size=1m",
        "--user",
        "1000:1001",
        "--memory",
        "64m",
        "--pids-limit",
        "33",
        "--cpus",
        "0.5",
        "--cap-drop",
        "ALL",
        "--security-opt",
        &format!("seccomp={profile}"),
        "--ulimit",
        "nofile=100:200",
        "--hostname",
        "inside",
        "--workdir",
        "/volume",
        "--env",
        "WHO=me",
        "--add-host",
        "other.name:192.0.2.1",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(outcome.status, 3, "{outcome:?}");
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(
        lines,
        [
            "1000",
            "1001",
            "inside",
            "/volume",
            "me",
            "volume",
            "single",
            "single is read-only",
            "volume is read-only",
            "root is read-only",
            " 1024 ",
            "no mkdir",
            "67108864",
            "33",
            "50000 100000",
            "CapBnd:\t0000000000000000",
            "100",
            "1",
            "/run/podman-init ",
        ],
        "{outcome:?}"
    );
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "new\n");
}

#[test]
fn an_image_is_built_in_containers() {
    let podman = engine::podman();
    podman.write("build/file", "copied\n");
    podman.write(
        "build/Containerfile",
        "FROM localhost/busybox\n\
         COPY file /file\n\
         RUN cat /file > /built && id -u >> /built && uname -r >> /built\n\
         CMD [\"cat\", \"/built\"]\n",
    );
    let directory = podman.path("build");
    let runtime = engine::runtime();
    podman
        .call(&[
            "build",
            // It does not take the configured one.
            "--runtime",
            runtime.to_str().unwrap(),
            "--isolation",
            "oci",
            "--network",
            "none",
            "--layers=false",
            "--tag",
            "built",
            directory.to_str().unwrap(),
        ])
        .ok();
    let outcome = podman.call(&["run", "--rm", "--network", "none", "built"]);
    let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let [copied, user, kernel] = outcome.ok().lines().collect::<Vec<_>>()[..] else {
        panic!("{outcome:?}");
    };
    assert_eq!((copied, user), ("copied", "0"));
    assert_eq!(kernel != own.trim(), engine::is_sandbox(), "{outcome:?}");
}

#[test]
fn a_container_outlives_the_client_that_ran_it() {
    let podman = engine::podman();
    let container = podman.container();
    let mut client = podman
        .command(&[
            "run",
            "--name",
            container.name(),
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            "trap 'exit 6' TERM; while :; do sleep 0.2; done",
        ])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    harness::wait_until("the container runs", || {
        let state = container.call(&["inspect", "--format", "{{.State.Status}}"], &[]);
        state.text().trim() == "running"
    });
    client.kill().unwrap();
    client.wait().unwrap();
    container.exec(&["true"]).ok();
    container.call(&["stop", "--time", "60"], &[]).ok();
    assert_eq!(container.inspect(".State.ExitCode"), "6");
    for status in ["1", "2", "3"] {
        let outcome = podman.call(&[
            "run",
            "--rm",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            &format!("exit {status}"),
        ]);
        assert_eq!(outcome.status.to_string(), status, "{outcome:?}");
    }
}
