// SPDX-License-Identifier: Apache-2.0
//! Starts from a template: as good as a boot, and no two of them alike.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
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
    // State, memory, and the list of pages that the second start has made.
    assert_eq!(fs::read_dir(&templates.0).unwrap().count(), 3, "made once");
}

#[test]
fn the_pages_of_a_start_are_noted_once_and_nothing_else_is_believed() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = Templates::new("pages");
    templates.run(&runtime, "true").ok();
    templates.run(&runtime, "true").ok();
    let pages = templates.file("pages");
    let noted = fs::read(&pages).unwrap();
    assert!(noted.len() > 100, "{} bytes", noted.len());
    assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
    assert_eq!(fs::read(&pages).unwrap(), noted);
    let mut damaged = noted.clone();
    damaged[40] ^= 0xff;
    for content in [&b"pages"[..], &damaged, &noted[..noted.len() / 2]] {
        fs::write(&pages, content).unwrap();
        assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
    }
    // Emptied, as by a monitor that came to nothing before it wrote.
    fs::write(&pages, "").unwrap();
    assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
    assert!(fs::metadata(&pages).unwrap().len() > 100);
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

impl Templates {
    fn call(&self, runtime: &Runtime, arguments: &[&str]) -> Outcome {
        let mut command = runtime.command();
        command.arg("template").args(arguments);
        command.env("SANDBOX_TEMPLATES", &self.0);
        finish(command)
    }

    /// Names, and whether they can be used.
    fn list(&self, runtime: &Runtime) -> Vec<(String, bool)> {
        let listed = self.call(runtime, &["list", "--format", "json"]);
        let listed: serde_json::Value = serde_json::from_str(listed.ok()).unwrap();
        let entries = listed.as_array().unwrap().iter();
        entries
            .map(|entry| {
                let name = entry["name"].as_str().unwrap().to_owned();
                (name, entry["usable"].as_bool().unwrap())
            })
            .collect()
    }
}

#[test]
fn templates_are_made_listed_and_removed() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = Templates::new("verbs");
    assert_eq!(templates.list(&runtime), []);
    templates.call(&runtime, &["create"]).ok();
    let made = templates.list(&runtime);
    let [(name, true)] = made.as_slice() else {
        panic!("{made:?}");
    };
    let before = fs::metadata(templates.file("state")).unwrap();
    templates.call(&runtime, &["create"]).ok();
    assert_eq!(templates.run(&runtime, "echo up").ok(), "up");
    let after = fs::metadata(templates.file("state")).unwrap();
    assert_eq!(before.ino(), after.ino(), "the container used it");
    let missing = templates.call(&runtime, &["remove", "0-1-1"]);
    assert!(missing.refusal().contains("does not exist"), "{missing:?}");
    let outside = templates.call(&runtime, &["remove", "../x"]);
    assert!(outside.refusal().contains("does not exist"), "{outside:?}");

    // Gone under a container that runs from it.
    let script = "touch /tmp/up; while [ ! -e /tmp/go ]; do :; done; ls / | wc -l; echo done";
    let bundle = Bundle::script(script).build();
    let mut command = runtime.run_command(&bundle);
    command.env("SANDBOX_TEMPLATES", &templates.0);
    let running = std::thread::spawn(move || finish(command));
    harness::wait_until("it runs", || bundle.rootfs().join("tmp/up").exists());
    templates.call(&runtime, &["remove", name]).ok();
    assert_eq!(templates.list(&runtime), []);
    fs::write(bundle.rootfs().join("tmp/go"), "").unwrap();
    assert!(running.join().unwrap().ok().ends_with("done"));

    // What cannot be used, and what an interrupted process has left.
    fs::write(templates.0.join("0123-4567-1-512.memory"), "").unwrap();
    fs::write(templates.0.join("draft-0123-4567-1-512-99999999.state"), "").unwrap();
    let stale = ("0123-4567-1-512".to_owned(), false);
    assert_eq!(templates.list(&runtime), [stale]);
    templates.call(&runtime, &["prune"]).ok();
    assert_eq!(fs::read_dir(&templates.0).unwrap().count(), 0);

    // Without one, and where the directory is not fit to hold any.
    let bundle = Bundle::script("echo up").build();
    let mut command = runtime.command();
    command
        .args(["run", "--no-template", "-b"])
        .arg(bundle.path())
        .arg(harness::runtime::new_id())
        .env("SANDBOX_TEMPLATES", &templates.0);
    assert_eq!(finish(command).ok(), "up");
    assert_eq!(fs::read_dir(&templates.0).unwrap().count(), 0);
    fs::set_permissions(&templates.0, fs::Permissions::from_mode(0o755)).unwrap();
    let open = templates.call(&runtime, &["list"]);
    assert!(open.refusal().contains("closed to others"), "{open:?}");
}
