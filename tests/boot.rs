// SPDX-License-Identifier: Apache-2.0
//! The main job: a bundle with a real root file system runs in a machine of its own.

use harness::{Bundle, Runtime};

#[test]
fn a_debian_root_file_system_runs_python() {
    let program = r#"
import os, platform, socket, sys
print(platform.release())
print(socket.gethostname())
print(os.getpid())
print(sum(range(1000)))
print(open("/etc/os-release").readline().strip())
"#;
    let outcome = Runtime::new().run(&Bundle::python(program).build());
    let lines: Vec<&str> = outcome.ok().lines().collect();
    let host = rustix::system::uname();
    assert_ne!(
        lines[0],
        host.release().to_str().unwrap(),
        "a kernel of its own"
    );
    assert_eq!(lines[1], "test-container");
    assert_eq!(lines[2], "1");
    assert_eq!(lines[3], "499500");
    assert!(lines[4].contains("Debian"), "{lines:?}");
}

#[test]
fn a_bundle_path_is_enough() {
    let runtime = Runtime::new();
    let bundle = Bundle::script("hostname").build();
    let outcome = runtime.call(&["run", bundle.path().to_str().unwrap()]);
    assert_eq!(outcome.ok(), "test-container");
    assert_eq!(
        std::fs::read_dir(runtime.root()).unwrap().count(),
        0,
        "nothing is left"
    );
}

#[test]
fn two_run_at_once() {
    let runtime = Runtime::new();
    std::thread::scope(|scope| {
        for number in 0..2 {
            let runtime = &runtime;
            scope.spawn(move || {
                let bundle = Bundle::script(&format!("echo {number}; sleep 1; echo done")).build();
                assert_eq!(runtime.run(&bundle).ok(), format!("{number}\ndone"));
            });
        }
    });
}

#[test]
fn several_cpus_and_the_memory_asked_for() {
    let bundle =
        Bundle::script("nproc; grep MemTotal /proc/meminfo; cat /sys/fs/cgroup/memory.max")
            .set("/linux/resources/cpu/quota", 200_000)
            .set("/linux/resources/cpu/period", 100_000)
            .set("/linux/resources/memory/limit", 256 << 20)
            .build();
    let outcome = Runtime::new().run(&bundle);
    let lines: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(lines[0], "2");
    let total: u64 = lines[1].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((256 << 10..512 << 10).contains(&total), "{total} KiB");
    assert_eq!(lines[2], (256 << 20).to_string());
}
