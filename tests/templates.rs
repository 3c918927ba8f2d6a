// SPDX-License-Identifier: Apache-2.0
//! Starts from a template: as good as a boot, and no two of them alike.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use harness::runtime::finish;
use harness::{Bundle, Outcome, Runtime};

/// A template directory of its own, removed on drop.
struct Templates(PathBuf);

impl Templates {
    fn new(name: &str) -> Templates {
        let path = std::env::temp_dir().join(format!("templates-{name}-{}", std::process::id()));
        Templates(path)
    }

    fn run(&self, runtime: &Runtime, script: &str) -> Outcome {
        let bundle = Bundle::script(script).build();
        let mut command = runtime.run_command(&bundle);
        command.env("SANDBOX_TEMPLATES", &self.0);
        finish(command)
    }

    /// The one file whose name ends so.
    fn file(&self, ending: &str) -> PathBuf {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        let is_it = |path: &PathBuf| path.extension().is_some_and(|kind| kind == ending);
        paths.find(is_it).expect("a template is there")
    }
}

impl Drop for Templates {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn clones_of_a_template_differ() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = Templates::new("clones");
    let script =
        "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; date +%s";
    let mut seen = Vec::new();
    for round in 0..4 {
        let outcome = templates.run(&runtime, script);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let lines: Vec<String> = outcome.ok().lines().map(str::to_owned).collect();
        let [boot, random, clock] = lines.try_into().unwrap();
        let clock: u64 = clock.parse().unwrap();
        assert!(
            now.abs_diff(clock) <= 10,
            "round {round}: {clock}, {now} here"
        );
        for value in [boot, random] {
            assert!(!seen.contains(&value), "round {round}: {value} again");
            seen.push(value);
        }
    }
    assert_eq!(fs::read_dir(&templates.0).unwrap().count(), 2, "made once");
}

#[test]
fn a_template_is_not_written_to() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = Templates::new("constant");
    templates.run(&runtime, "true").ok();
    let before = fs::read(templates.file("memory")).unwrap();
    templates
        .run(&runtime, "dd if=/dev/zero of=/dev/shm/x bs=1M count=20")
        .ok();
    assert!(fs::read(templates.file("memory")).unwrap() == before);
}

#[test]
fn a_damaged_template_is_replaced() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = Templates::new("damaged");
    templates.run(&runtime, "true").ok();
    let state = fs::OpenOptions::new()
        .write(true)
        .open(templates.file("state"))
        .unwrap();
    state.write_all_at(b"x", 100).unwrap();
    assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
    fs::OpenOptions::new()
        .write(true)
        .open(templates.file("memory"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
    // One that others could have written is not used either.
    let memory = templates.file("memory");
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
}

#[test]
fn several_cpus_go_on() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = Templates::new("cpus");
    for _ in 0..3 {
        let script = "nproc; for i in 1 2 3 4; do (seq 20000 | tail -1) & done; wait";
        let bundle = Bundle::script(script)
            .set("/linux/resources/cpu/quota", 200_000)
            .set("/linux/resources/cpu/period", 100_000)
            .build();
        let mut command = runtime.run_command(&bundle);
        command.env("SANDBOX_TEMPLATES", &templates.0);
        let outcome = finish(command);
        assert_eq!(outcome.ok(), "2\n20000\n20000\n20000\n20000");
    }
}
