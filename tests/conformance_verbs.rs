// SPDX-License-Identifier: Apache-2.0
//! Verbs beside those of `lifecycle.rs`: their output and what they do. Runs against runc and crun too, but for what
//! only one of them has.

use std::fs;
use std::path::Path;

use harness::fields::HostDirectory;
use harness::{Bundle, Runtime, skip_on};
use serde_json::{Value, json};

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn documents_of_verbs_have_the_shapes_that_engines_read() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    let pid = container.state()["pid"].clone();
    let list = json_of(runtime.call(&["list", "--format", "json"]).ok());
    assert_eq!(list[0]["id"], container.id());
    assert_eq!(list[0]["status"], "running");
    assert_eq!(list[0]["pid"], pid);
    let table = runtime.call(&["list"]);
    let heading = table.ok().lines().next().unwrap();
    let heading: Vec<&str> = heading.split_whitespace().collect();
    let expected = match runtime.name() {
        "crun" => ["NAME", "PID", "STATUS", "BUNDLE", "PATH"],
        _ => ["ID", "PID", "STATUS", "BUNDLE", "CREATED"],
    };
    assert_eq!(heading[..5], expected);
    let processes = json_of(
        runtime
            .call(&["ps", "--format", "json", container.id()])
            .ok(),
    );
    assert!(processes.as_array().unwrap().contains(&pid), "{processes}");
    if runtime.name() != "crun" {
        let stats = json_of(runtime.call(&["events", "--stats", container.id()]).ok());
        assert_eq!(stats["type"], "stats");
        assert_eq!(stats["id"], container.id());
        let data = &stats["data"];
        assert!(data["pids"]["current"].as_u64().unwrap() >= 1, "{stats}");
        assert!(
            data["memory"]["usage"]["usage"].as_u64().unwrap() > 0,
            "{stats}"
        );
        assert!(
            data["cpu"]["usage"]["total"].as_u64().unwrap() > 0,
            "{stats}"
        );
    }
    container.call("kill", &["KILL"]).ok();
    container.wait_stopped();
    if runtime.name() != "crun" {
        // Nothing to signal any more, but nothing wrong either.
        runtime
            .call(&["kill", "--all", container.id(), "KILL"])
            .ok();
    }
    let version = runtime.call(&["--version"]);
    assert!(version.ok().contains("spec: 1."), "{version:?}");
    let directory = HostDirectory::new();
    let mut command = runtime.command();
    command.arg("spec").current_dir(directory.path(""));
    assert!(command.status().unwrap().success());
    let config = json_of(&fs::read_to_string(directory.path("config.json")).unwrap());
    assert_eq!(config["process"]["args"], json!(["sh"]));
}

#[test]
fn features_tell_what_there_is() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "their versions in Debian 12 do not have the verb"
    );
    let features = json_of(runtime.call(&["features"]).ok());
    assert_eq!(features["ociVersionMin"], "1.0.0");
    assert_eq!(features["hooks"].as_array().unwrap().len(), 6);
    let options = features["mountOptions"].as_array().unwrap();
    for option in ["rbind", "rro", "tmpcopyup", "nosymfollow"] {
        assert!(options.contains(&json!(option)), "{option}");
    }
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
}

fn mounts(directory: &Path, list: &Value) -> String {
    let file = directory.join("mounts.json");
    fs::write(&file, list.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn mounts_are_added_and_removed_while_a_container_runs() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "runc has no such verb, and crun of Debian 12 neither"
    );
    let mut host = HostDirectory::new();
    host.write("file", "first");
    let below = host.mount("below");
    fs::write(below.join("deep"), "deep").unwrap();
    let bundle = Bundle::busybox(&["/bin/sleep", "1000"]);
    let container = runtime.create(bundle.capabilities(&["CAP_DAC_OVERRIDE"]).build());
    container.start();
    let shell = |script: &str| {
        let outcome = container.exec(&["/bin/sh", "-c", script]);
        outcome.text().to_owned()
    };
    let bind = |destination: &str, source: &Path, options: &[&str]| json!({"destination": destination, "type": "bind", "source": source, "options": options});
    let list = json!([
        bind("/mnt/added", &host.path(""), &["rbind"]),
        bind("/mnt/kept", &host.path(""), &["rbind", "rro"]),
        bind("/etc/file", &host.path("file"), &["bind", "ro"]),
        {"destination": "/tmp/memory", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}
    ]);
    let file = mounts(container.bundle().path(), &list);
    runtime.call(&["mounts", "add", container.id(), &file]).ok();
    let seen = shell(
        "cat /mnt/added/file /mnt/added/below/deep /etc/file; echo
echo x > /mnt/added/new && echo written; echo x > /mnt/kept/new || echo refused
echo x > /mnt/kept/below/new || echo refused below; echo x > /etc/file || echo kept
grep -c ' /tmp/memory .* tmpfs ' /proc/self/mountinfo",
    );
    let expected = "firstdeepfirst\nwritten\nrefused\nrefused below\nkept\n1\n";
    assert_eq!(seen, expected);
    assert_eq!(fs::read_to_string(host.path("new")).unwrap(), "x\n");
    host.write("file", "second");
    assert_eq!(shell("cat /etc/file"), "second");

    let gone = json!([{"destination": "/mnt/added"}, {"destination": "/etc/file"}]);
    let file = mounts(container.bundle().path(), &gone);
    let remove = ["mounts", "remove", container.id(), &file];
    runtime.call(&remove).ok();
    let seen = shell("ls /mnt/added; ls /mnt/kept/file; cat /etc/file");
    assert_eq!(seen, "/mnt/kept/file\n");
    assert!(below.join("deep").exists(), "the host keeps its mounts");
    let again = runtime.call(&remove);
    assert!(
        again.refusal().contains("mounts[0] (/mnt/added)"),
        "{again:?}"
    );
    // A place that was given up is taken again.
    let within = json!({"mounts": [bind("/mnt/added", &host.path("below"), &[])]});
    let file = mounts(container.bundle().path(), &within);
    runtime.call(&["mounts", "add", container.id(), &file]).ok();
    assert_eq!(shell("cat /mnt/added/deep"), "deep");

    for (mount, words) in [
        (
            bind("/mnt/x", Path::new("/no/such"), &[]),
            "no such file or directory",
        ),
        (bind("/mnt/x", &host.path(""), &["rshared"]), "propagate"),
        (
            json!({"destination": "/mnt/x", "type": "ext4", "source": "/dev/vda"}),
            "ext4",
        ),
        // The guest's to refuse.
        (bind("/etc/passwd/x", &host.path(""), &[]), "/etc/passwd/x"),
    ] {
        let file = mounts(container.bundle().path(), &json!([mount]));
        let outcome = runtime.call(&["mounts", "add", container.id(), &file]);
        assert!(outcome.refusal().contains(words), "{words}: {outcome:?}");
    }
    assert_eq!(container.status(), "running");
    drop(container);
    assert_eq!(fs::read_to_string(host.path("below/deep")).unwrap(), "deep");
    let nobody = runtime.call(&["mounts", "add", "nosuch", "/dev/null"]);
    assert!(nobody.stderr.contains("does not exist"), "{nobody:?}");
}
