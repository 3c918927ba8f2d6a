// SPDX-License-Identifier: Apache-2.0
//! `hooks`: when they run, what they get, and what becomes of a container whose hook fails. Runs against runc and crun
//! too.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use harness::fields::HostDirectory;
use harness::{Bundle, BundleBuilder, Runtime, skip_on};
use serde_json::{Value, json};

const KINDS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// Writes a line to the host's `log`: name, arguments, environment, working directory; the state to a file.
const HOOK: &str = "#!/bin/sh
cat > \"$LOG.$1\"
echo \"$1 $# $A\" >> \"$LOG\"
";

fn make(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn state(log: &Path, kind: &str) -> Value {
    let text = fs::read_to_string(format!("{}.{kind}", log.display())).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{kind}: {error}: {text}"))
}

fn lines(log: &Path) -> Vec<String> {
    fs::read_to_string(log)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// host: hooks.prestart hooks.createRuntime hooks.createContainer hooks.poststart hooks.poststop hooks.path
/// host: hooks.args hooks.env
/// guest: hooks.startContainer
#[test]
fn each_runs_at_its_time_with_the_state() {
    let runtime = Runtime::new();
    let host = HostDirectory::new();
    let script = host.path("hook");
    make(&script, HOOK);
    let log = host.path("log");
    let mut hooks = json!({});
    for kind in KINDS {
        // That of the container finds the same directory inside.
        let inside = kind == "startContainer";
        let base = if inside {
            PathBuf::from("/mnt")
        } else {
            host.path("")
        };
        let environment = format!("LOG={}", base.join("log").display());
        hooks[kind] = json!([
            {"path": base.join("hook"), "args": ["hook", kind, "x y"], "env": [environment, "A=b c", "PATH=/bin:/usr/bin"]}
        ]);
    }
    let bundle = Bundle::script("echo process >> /mnt/log; read line")
        .bind(&host.path(""), "/mnt", &[])
        .set("/hooks", hooks)
        .set("/annotations", json!({"some": "thing"}))
        .build();
    let container = runtime.create(bundle);
    let created = [
        "prestart 2 b c",
        "createRuntime 2 b c",
        "createContainer 2 b c",
    ];
    let mut seen = lines(&log);
    // runc has these run before the start already.
    seen.retain(|line| !line.starts_with("poststart"));
    assert_eq!(seen, created);
    let pid = container.state()["pid"].clone();
    for kind in &KINDS[..3] {
        let seen = state(&log, kind);
        assert_eq!(seen["id"], container.id(), "{kind}");
        assert_eq!(seen["bundle"], container.bundle().path().to_str().unwrap());
        assert_eq!(seen["annotations"]["some"], "thing");
        assert!(seen["ociVersion"].is_string());
        let status = seen["status"].as_str().unwrap();
        assert!(
            ["creating", "created"].contains(&status),
            "{kind}: {status}"
        );
        if *kind != "createContainer" || runtime.is_sandbox() {
            assert_eq!(seen["pid"], pid, "{kind}");
        }
    }
    container.start();
    harness::wait_until("the process ends", || container.status() == "stopped");
    let started = state(&log, "poststart");
    assert_eq!(started["status"], "running");
    assert_eq!(started["pid"], pid);
    let inside = state(&log, "startContainer")["status"].clone();
    // crun has a word of its own.
    assert!(inside == "created" || inside == "starting", "{inside}");
    container.call("delete", &[]).ok();
    assert_eq!(state(&log, "poststop")["status"], "stopped");
    // The process itself and the hooks after its start do not wait for each other.
    let (after, others): (Vec<_>, Vec<_>) = lines(&log)
        .into_iter()
        .partition(|line| line.starts_with("poststart"));
    assert_eq!(after, ["poststart 2 b c"]);
    assert_eq!(
        others[3..],
        ["startContainer 2 b c", "process", "poststop 2 b c"]
    );
}

fn with(kind: &str, script: &Path, more: Value) -> BundleBuilder {
    let mut hook = json!({"path": script});
    hook.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    Bundle::script("echo never").set(&format!("/hooks/{kind}"), json!([hook]))
}

/// host: hooks.timeout hooks.prestart hooks.createRuntime hooks.createContainer hooks.poststop
/// guest: hooks.startContainer hooks.timeout
#[test]
fn one_that_fails_fails_the_container() {
    let runtime = Runtime::new();
    let host = HostDirectory::new();
    let fails = host.path("fails");
    make(&fails, "#!/bin/sh\necho some reason >&2\nexit 3\n");
    let hangs = host.path("hangs");
    make(&hangs, "#!/bin/sh\nexec sleep 1000\n");
    for kind in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
    ] {
        let script = if kind == "startContainer" {
            Path::new("/bin/false")
        } else {
            &fails
        };
        let outcome = runtime.run(&with(kind, script, json!({})).build());
        assert_ne!(outcome.status, 0, "{kind}: {outcome:?}");
        assert_eq!(outcome.text(), "", "{kind}: the process must not run");
        if runtime.is_sandbox() {
            let words = format!("error running {kind} hook #0");
            assert!(outcome.stderr.contains(&words), "{kind}: {outcome:?}");
        }
        assert_eq!(
            fs::read_dir(runtime.root()).unwrap().count(),
            0,
            "{kind}: left behind"
        );
    }
    for (kind, script, args) in [
        ("createRuntime", hangs.as_path(), json!({})),
        (
            "startContainer",
            Path::new("/bin/sleep"),
            json!({"args": ["sleep", "1000"]}),
        ),
    ] {
        let mut more = json!({"timeout": 1});
        more.as_object_mut()
            .unwrap()
            .extend(args.as_object().unwrap().clone());
        let outcome = runtime.run(&with(kind, script, more).build());
        assert_ne!(outcome.status, 0, "{kind}: {outcome:?}");
        assert_eq!(outcome.text(), "", "{kind}");
        assert_eq!(
            fs::read_dir(runtime.root()).unwrap().count(),
            0,
            "{kind}: left behind"
        );
    }
    // The container has had its time: it only warns.
    let outcome = runtime.run(&with("poststop", &fails, json!({})).build());
    assert_eq!(outcome.ok(), "never");
    assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
}

/// host: hooks.poststart
#[test]
fn a_poststart_hook_that_fails_fails_the_start() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["crun"],
        "it only warns, as the specification had it before 1.3"
    );
    let bundle = with("poststart", Path::new("/bin/false"), json!({}))
        .set("/process/args", json!(["/bin/sleep", "1000"]));
    let outcome = runtime.run(&bundle.build());
    assert_ne!(outcome.status, 0, "{outcome:?}");
    assert!(outcome.stderr.contains("poststart hook"), "{outcome:?}");
    assert_eq!(
        fs::read_dir(runtime.root()).unwrap().count(),
        0,
        "left behind"
    );
}

/// refused: hooks.path hooks.timeout
#[test]
fn hooks_that_cannot_be() {
    let runtime = Runtime::new();
    skip_on!(runtime, ["runc", "crun"], "they try");
    let refused = harness::fields::check_refused;
    refused(
        &runtime,
        with("prestart", Path::new("bin/true"), json!({})),
        &["hooks.prestart[0].path", "not absolute"],
    );
    refused(
        &runtime,
        with("poststop", Path::new("/bin/true"), json!({"timeout": 0})),
        &["hooks.poststop[0].timeout"],
    );
    refused(
        &runtime,
        with("createRuntime", Path::new("/no/such"), json!({})),
        &["createRuntime hook #0", "/no/such"],
    );
}
