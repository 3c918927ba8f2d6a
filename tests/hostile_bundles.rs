// SPDX-License-Identifier: Apache-2.0
//! Bundles by somebody who means ill, through the command itself: one line and status 1, or a container; nothing left of
//! either, and nothing outside of the bundle touched. What only reading and planning see is in
//! `runtime-shim/tests/mutated_configs.rs`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::inventory::leaves_nothing;
use harness::runtime::{new_id, wait};
use harness::{Bundle, Outcome, Runtime};
use serde_json::{Value, json};

/// `create`, whose container would hold on to streams that somebody reads.
fn create(runtime: &Runtime, bundle: &Path, id: &str) -> Outcome {
    let errors = std::env::temp_dir().join(new_id());
    let mut command: Command = runtime.command();
    command.args(["create", "-b"]).arg(bundle).args(["--", id]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(&errors).unwrap());
    let status = wait(command.spawn().unwrap());
    let stderr = fs::read_to_string(&errors).unwrap();
    fs::remove_file(errors).unwrap();
    Outcome {
        status,
        stdout: Vec::new(),
        stderr,
    }
}

#[test]
fn strange_values_in_each_place() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    let pointers = [
        "/ociVersion",
        "/hostname",
        "/root/path",
        "/process/args",
        "/process/cwd",
        "/process/env",
        "/process/user/uid",
        "/process/rlimits/0/hard",
        "/process/capabilities/bounding",
        "/mounts/0/destination",
        "/mounts/1/options",
        "/mounts/2/type",
        "/linux/namespaces/0/type",
        "/linux/maskedPaths",
        "/linux/cgroupsPath",
        "/linux/resources/devices",
        "/linux/resources/memory/limit",
        "/hooks",
    ];
    let values = [
        json!(-1),
        json!(u64::MAX),
        json!("../../../../etc"),
        json!([null]),
        json!("a\n\u{1b}[2J"),
        json!({"": []}),
        json!("a\u{0}"),
        json!("/".repeat(5000)),
    ];
    leaves_nothing(|runtime| {
        let mut refused = 0;
        for (index, pointer) in pointers.iter().enumerate() {
            for step in [0, 3] {
                let value: Value = values[(index + step) % values.len()].clone();
                let bundle = Bundle::script("true").set(pointer, value.clone()).build();
                let id = new_id();
                let outcome = create(runtime, bundle.path(), &id);
                if outcome.status == 0 {
                    runtime.call(&["delete", "--force", &id]).ok();
                } else {
                    let line = outcome.refusal();
                    assert!(!line.contains(char::is_control), "{pointer}: {line:?}");
                    assert!(!line.contains("panicked"), "{pointer}: {line:?}");
                    refused += 1;
                }
                let left = fs::read_dir(runtime.root()).unwrap().count();
                assert_eq!(left, 0, "{pointer} {value}");
            }
        }
        println!("{refused} of {} refused", 2 * pointers.len());
        assert!(refused > pointers.len());
    });
}

#[test]
fn ids_and_files_that_lead_elsewhere() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("true").build();
        let long = "x".repeat(1025);
        for id in [
            "", ".", "..", "../x", "a/b", "/", "a\nb", "é", "-x/..", "*", &long,
        ] {
            for verb in ["state", "kill", "delete"] {
                let outcome = runtime.call(&[verb, "--", id]);
                assert!(!outcome.refusal().contains(char::is_control), "{id:?}");
            }
            let outcome = create(runtime, bundle.path(), id);
            assert!(!outcome.refusal().contains(char::is_control), "{id:?}");
        }
        let config = bundle.path().join("config.json");
        fs::File::create(&config)
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
        let outcome = create(runtime, bundle.path(), "large");
        assert!(outcome.refusal().contains("larger than"), "{outcome:?}");
        assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
    });
}

/// Links of a root file system are followed inside of it, by the host and by the guest.
#[test]
fn links_that_leave_the_root_file_system() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let canary = Bundle::script("true").build();
        fs::write(canary.path().join("secret"), "secret").unwrap();
        let before = names(canary.path());
        for target in ["absolute", "relative"] {
            let bundle = Bundle::script(
                "ls /out/ /mnt/ 2>&1; cat /out/secret 2>&1; echo x > /out/new; true",
            )
            .mount("/out/deep/er", "tmpfs", "tmpfs", &[])
            .mount("/mnt/file", "bind", "/etc/hostname", &["bind", "ro"])
            .build();
            let away = canary.path();
            let up = format!("../../../../../../..{}", away.display());
            let link = if target == "absolute" {
                away
            } else {
                Path::new(&up)
            };
            symlink(link, bundle.rootfs().join("out")).unwrap();
            fs::remove_dir(bundle.rootfs().join("mnt")).unwrap();
            symlink(link, bundle.rootfs().join("mnt")).unwrap();
            let outcome = runtime.run(&bundle);
            println!("{target}: {outcome:?}");
            assert!(!outcome.text().contains("secret\n"), "{outcome:?}");
            assert!(
                outcome.status == 0 || outcome.refusal().contains("mount"),
                "{outcome:?}"
            );
            assert_eq!(names(canary.path()), before, "{target}");
        }
    });
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.path().display().to_string())
        .collect();
    names.sort();
    names
}
