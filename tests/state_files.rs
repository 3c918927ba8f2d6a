// SPDX-License-Identifier: Apache-2.0
//! State files that are cut short, emptied, filled with garbage or written by a newer version: a clear error, others are
//! not affected, and `delete --force` ends and removes what there is of the container.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use harness::inventory::{leaves_nothing, wait_until_no_process};
use harness::{Bundle, BundleBuilder, Container, Runtime};

fn sleeper() -> BundleBuilder {
    Bundle::busybox(&["/bin/sleep", "1000"])
}

fn state_file(runtime: &Runtime, container: &Container) -> PathBuf {
    runtime.root().join(container.id()).join("state.json")
}

/// What a state file can have become, and what the error says then.
fn damages(state: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let text = String::from_utf8(state.to_vec()).unwrap();
    let newer = text.replacen("\"version\":1", "\"version\":2", 1);
    let far_newer = "{\"version\": 18446744073709551615, \"new\": {}}".into();
    assert_ne!(newer, text);
    let foreign = text.replacen("\"id\":\"", "\"id\":\"x", 1);
    vec![
        ("cut short", state[..state.len() / 2].to_vec(), "cut off"),
        (
            "one byte short",
            state[..state.len() - 2].to_vec(),
            "cut off",
        ),
        ("emptied", Vec::new(), "empty"),
        (
            "random",
            b"\x7fELF\0\x01\xff\n\x1b[2J".repeat(50),
            "damaged",
        ),
        ("other JSON", b"[1, 2, 3]".to_vec(), "damaged"),
        ("deep", b"[".repeat(1 << 20), "damaged"),
        ("no fields", b"{\"version\": 1}".to_vec(), "damaged"),
        ("newer", newer.into_bytes(), "version 2"),
        ("far newer", far_newer, "version 18446744073709551615"),
        ("of another", foreign.into_bytes(), "belongs to container"),
    ]
}

#[test]
fn a_damaged_state_is_a_clear_error_and_hurts_nobody_else() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let other = runtime.create(sleeper().build());
        let container = runtime.create(sleeper().build());
        container.start();
        let file = state_file(runtime, &container);
        let state = fs::read(&file).unwrap();
        for (what, content, expected) in damages(&state) {
            fs::write(&file, content).unwrap();
            for verb in ["state", "start", "kill", "delete", "pause"] {
                let outcome = container.call(verb, &[]);
                let line = outcome.refusal();
                println!("{what}: {verb}: {line}");
                assert!(line.contains(expected), "{what}: {line}");
                assert!(line.contains(container.id()), "{what}: {line}");
                assert!(line.contains("delete --force"), "{what}: {line}");
                assert!(!line.contains(char::is_control), "{what}: {line:?}");
            }
            let listed = runtime.call(&["list", "-q"]);
            assert_eq!(listed.ok(), other.id(), "{what}");
            assert!(listed.stderr.contains(expected), "{what}: {listed:?}");
        }
        other.start();
        assert_eq!(other.exec(&["/bin/echo", "alive"]).ok(), "alive");
        other.call("delete", &["--force"]).ok();
        // Nothing has become of the container meanwhile.
        fs::write(&file, state).unwrap();
        assert_eq!(container.status(), "running");
        assert_eq!(container.exec(&["/bin/echo", "alive"]).ok(), "alive");
        container.call("delete", &["--force"]).ok();
    });
}

#[test]
fn a_container_with_a_damaged_state_can_be_deleted() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    for (index, running) in [(0, false), (2, true), (3, true), (7, true), (9, false)] {
        leaves_nothing(|runtime| {
            let container = runtime.create(sleeper().build());
            if running {
                container.start();
            }
            let file = state_file(runtime, &container);
            let state = fs::read(&file).unwrap();
            let (what, content, _) = damages(&state).swap_remove(index);
            fs::write(&file, content).unwrap();
            container.call("delete", &["--force"]).ok();
            wait_until_no_process(container.id());
            let left = fs::read_dir(runtime.root()).unwrap().count();
            assert_eq!(left, 0, "{what}");
            let gone = container.call("state", &[]);
            assert!(
                gone.refusal().contains("does not exist"),
                "{what}: {gone:?}"
            );
        });
    }
}

/// As an attacker with the rights of the state directory's owner could leave it, or a crash.
#[test]
fn a_state_directory_with_odd_entries() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let root = runtime.root();
        let canary = Bundle::script("true").build();
        let precious = canary.path().join("config.json");
        let before = fs::read(&precious).unwrap();
        // A file, a link out of the directory, an empty directory, a state file that is a link, and one that is a FIFO.
        fs::write(root.join("file"), "x").unwrap();
        symlink(canary.path(), root.join("link")).unwrap();
        for name in ["empty", "linked", "fifo"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        symlink(&precious, root.join("linked/state.json")).unwrap();
        let fifo = root.join("fifo/state.json");
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(runtime.call(&["list", "-q"]).ok(), "");
        for id in ["file", "link", "empty", "linked", "fifo"] {
            let outcome = runtime.call(&["state", id]);
            assert!(!outcome.refusal().is_empty(), "{id}");
            let claimed = runtime.call(&["create", "-b", canary.path().to_str().unwrap(), id]);
            assert!(
                claimed.refusal().contains("already exists"),
                "{id}: {claimed:?}"
            );
        }
        for id in ["empty", "linked", "fifo"] {
            runtime.call(&["delete", "--force", id]).ok();
            assert!(!root.join(id).exists(), "{id}");
        }
        runtime.call(&["delete", "--force", "link"]).ok();
        assert_eq!(fs::read(&precious).unwrap(), before);
        fs::remove_file(root.join("link")).unwrap();
        fs::remove_file(root.join("file")).unwrap();

        // Others may write to it: nobody's state is safe there.
        fs::set_permissions(root, fs::Permissions::from_mode(0o777)).unwrap();
        let path = canary.path().to_str().unwrap();
        let outcome = runtime.call(&["create", "-b", path, "x"]);
        assert!(
            outcome.refusal().contains("others may write"),
            "{outcome:?}"
        );
        fs::set_permissions(root, fs::Permissions::from_mode(0o700)).unwrap();
        // A stale entry whose pid belongs to a stranger now: this test.
        let container = runtime.create(sleeper().build());
        let file = state_file(runtime, &container);
        let text = fs::read_to_string(&file).unwrap();
        let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
        container.call("kill", &["KILL"]).ok();
        container.wait_stopped();
        state["process"]["pid"] = std::process::id().into();
        fs::write(&file, state.to_string()).unwrap();
        assert_eq!(container.status(), "stopped");
        container.call("delete", &["--force"]).ok();
    });
}
