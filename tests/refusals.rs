// SPDX-License-Identifier: Apache-2.0
//! Bad input gets one clear line, status 1, and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use harness::inventory::leaves_nothing;
use harness::{Bundle, Runtime};

/// What the refused command says; checks that nothing is left afterwards.
fn refused(bundle: &Path) -> String {
    let mut line = String::new();
    leaves_nothing(|runtime| {
        let outcome = runtime.call(&["run", "-b", bundle.to_str().unwrap(), "refused"]);
        line = outcome.refusal().to_owned();
        let left = fs::read_dir(runtime.root()).unwrap().count();
        assert_eq!(left, 0, "left behind after: {line}");
    });
    line
}

fn check(bundle: &Bundle, expected: &str) {
    let line = refused(bundle.path());
    assert!(line.contains(expected), "expected {expected:?} in {line:?}");
}

#[test]
fn a_bundle_that_is_not_there() {
    let line = refused(Path::new("/nonexistent"));
    let lower = line.to_lowercase();
    assert!(
        line.contains("/nonexistent") && lower.contains("no such file or directory"),
        "{line}"
    );
}

#[test]
fn a_config_that_is_missing_or_not_json() {
    let bundle = Bundle::script("true").build();
    fs::write(
        bundle.path().join("config.json"),
        "{\n  \"ociVersion\": 1.0.2\n}",
    )
    .unwrap();
    if Runtime::new().is_sandbox() {
        check(&bundle, "line 2 column");
    }
    fs::remove_file(bundle.path().join("config.json")).unwrap();
    check(&bundle, "config.json");
}

#[test]
fn fields_are_named() {
    let nested = Bundle::script("true").build();
    fs::write(nested.path().join("config.json"), "[".repeat(100_000)).unwrap();
    if Runtime::new().is_sandbox() {
        check(&nested, "config.json");
    }
    check(
        &Bundle::script("true").set("/ociVersion", "9.0.0").build(),
        "ociVersion",
    );
    check(
        &Bundle::script("true").set("/root/path", "nosuch").build(),
        "root",
    );
    check(
        &Bundle::script("true")
            .set("/root/path", "config.json")
            .build(),
        "root",
    );
    check(
        &Bundle::script("true")
            .set("/process/cwd", "relative")
            .build(),
        "cwd",
    );
    check(
        &Bundle::script("true")
            .set("/linux/resources/memory/limit", 1 << 20)
            .build(),
        "memory",
    );
}

#[test]
fn an_executable_that_is_missing_or_cannot_run() {
    check(
        &Bundle::busybox(&["nosuch"]).build(),
        "executable file not found in $PATH",
    );
    check(
        &Bundle::busybox(&["/bin/nosuch"]).build(),
        "no such file or directory",
    );
    check(
        &Bundle::busybox(&["/etc/passwd"]).build(),
        "permission denied",
    );
    let wrong = Bundle::busybox(&["/wrong"]).build();
    // A whole program, but of EM_AARCH64: e_machine is at 18.
    let mut program = fs::read(harness::top().join("target/release/sandbox")).unwrap();
    program[18..20].copy_from_slice(&183u16.to_le_bytes());
    fs::write(wrong.rootfs().join("wrong"), program).unwrap();
    fs::set_permissions(
        wrong.rootfs().join("wrong"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    check(&wrong, "exec format error");
}

#[test]
fn a_kernel_that_is_missing_or_damaged() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let files = std::env::temp_dir().join(format!("install-{}", std::process::id()));
    fs::create_dir_all(files.join("bin")).unwrap();
    fs::create_dir_all(files.join("lib/sandbox")).unwrap();
    let program = files.join("bin/sandbox");
    fs::copy(harness::top().join("target/release/sandbox"), &program).unwrap();
    let guest = harness::top().join("target/lib/sandbox");
    fs::copy(
        guest.join("initramfs.cpio"),
        files.join("lib/sandbox/initramfs.cpio"),
    )
    .unwrap();
    let bundle = Bundle::script("true").build();
    let run = || {
        let mut command = std::process::Command::new(&program);
        command
            .arg("--root")
            .arg(runtime.root())
            .arg("run")
            .arg("-b")
            .arg(bundle.path())
            .arg("x");
        harness::runtime::finish(command).refusal().to_owned()
    };
    assert!(run().contains("vmlinux"), "{}", run());
    fs::write(files.join("lib/sandbox/vmlinux"), b"not a kernel").unwrap();
    assert!(run().contains("kernel"), "{}", run());
    let mut kernel = fs::read(guest.join("vmlinux")).unwrap();
    kernel.truncate(kernel.len() / 4);
    fs::write(files.join("lib/sandbox/vmlinux"), kernel).unwrap();
    assert!(run().contains("kernel"), "{}", run());
    fs::remove_dir_all(&files).unwrap();
}

#[test]
fn a_user_that_is_no_number() {
    let bundle = Bundle::script("true").set("/process/user/uid", "nosuch");
    let line = refused(bundle.build().path());
    assert!(
        line.contains("config.json") || line.contains("uid"),
        "{line}"
    );
    assert!(line.contains("nosuch") || line.contains("string"), "{line}");
}

#[test]
fn an_id_that_is_taken_and_a_user_that_is_unknown() {
    leaves_nothing(|runtime| {
        let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
        let other = Bundle::script("true").build();
        let path = other.path().to_str().unwrap();
        for verb in ["create", "run"] {
            let outcome = runtime.call(&[verb, "-b", path, container.id()]);
            assert!(
                outcome
                    .refusal()
                    .contains("container with given ID already exists"),
                "{outcome:?}"
            );
        }
        // Whose it is has not heard of it.
        assert_eq!(container.status(), "created");
        container.start();
        let outcome = runtime.call(&["exec", "--user", "nosuch", container.id(), "/bin/true"]);
        assert_ne!(outcome.status, 0);
        assert!(outcome.stderr.contains("nosuch"), "{outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
        container.call("delete", &["--force"]).ok();
    });
}

#[test]
fn unknown_containers_and_verbs() {
    let runtime = Runtime::new();
    for verb in ["state", "start", "kill", "delete"] {
        let outcome = runtime.call(&[verb, "nosuch"]);
        assert_eq!(outcome.status, 1);
        assert!(
            outcome.stderr.contains("does not exist"),
            "{verb}: {outcome:?}"
        );
    }
    assert_ne!(runtime.call(&["frobnicate"]).status, 0);
    for id in ["..", "a/b", "", &"x".repeat(2000)] {
        let outcome = runtime.call(&["create", "-b", "/", id]);
        assert_ne!(outcome.status, 0, "{id:?}");
    }
}
