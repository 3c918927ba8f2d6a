// SPDX-License-Identifier: Apache-2.0
use serde_json::{Value, json};

use super::*;

fn spec(namespaces: Value, annotations: Value) -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.0.0",
        "linux": {"namespaces": namespaces},
        "annotations": annotations,
    }))
    .unwrap()
}

#[test]
fn networks() {
    let net = |path: Value| json!([{"type": "mount"}, {"type": "network", "path": path}]);
    let isolated = json!({"io.sandbox.network": "none"});
    for (namespaces, annotations, expected) in [
        (net(Value::Null), json!({}), Network::New),
        (net(json!("")), json!({}), Network::New),
        (
            net(json!("/run/netns/a")),
            json!({}),
            Network::Path("/run/netns/a".into()),
        ),
        (json!([]), isolated.clone(), Network::New),
        (net(json!("/run/netns/a")), isolated, Network::New),
    ] {
        assert_eq!(network(&spec(namespaces, annotations)), Ok(expected));
    }
    let error = network(&spec(json!([{"type": "mount"}]), json!({})))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("linux.namespaces: not supported: no network namespace"),
        "{error}"
    );
    assert!(network(&spec(net(json!("relative")), json!({}))).is_err());
    assert!(
        network(&spec(
            net(Value::Null),
            json!({"io.sandbox.network": "host"})
        ))
        .is_err()
    );
}

#[test]
fn links_go_to_those_that_work() {
    for (annotations, expected) in [
        (json!({}), true),
        (
            json!({"io.kubernetes.cri.container-type": "container"}),
            true,
        ),
        (
            json!({"io.kubernetes.cri.container-type": "sandbox"}),
            false,
        ),
        (json!({"io.sandbox.network": "none"}), false),
    ] {
        assert_eq!(joins_links(&spec(json!([]), annotations)), expected);
    }
}

#[test]
fn cgroup_paths() {
    use CgroupManager::{Cgroupfs, Disabled, Systemd};
    let path = |path: &str| CgroupLocation::Path(path.into());
    let unit = |slice: &str, prefix: &str, name: &str| CgroupLocation::Systemd {
        slice: slice.into(),
        prefix: prefix.into(),
        name: name.into(),
    };
    for (given, manager, expected) in [
        (None, Cgroupfs, path("/sandbox-id")),
        (Some(""), Cgroupfs, path("/sandbox-id")),
        (Some("/a/./b/"), Cgroupfs, path("/a/b")),
        (Some("a/b"), Cgroupfs, path("a/b")),
        (Some("/a"), Disabled, CgroupLocation::Unchanged),
        (None, Systemd, unit("", "sandbox", "id")),
        (
            Some("machine.slice:libpod:x"),
            Systemd,
            unit("machine.slice", "libpod", "x"),
        ),
        (Some("::x"), Systemd, unit("", "", "x")),
        (Some("-.slice:p:x"), Systemd, unit("-.slice", "p", "x")),
    ] {
        assert_eq!(
            cgroup(given.map(Path::new), "id", manager),
            Ok(expected),
            "{given:?}"
        );
    }
    for (given, manager) in [
        ("/a/../../b", Cgroupfs),
        ("..", Cgroupfs),
        ("/", Cgroupfs),
        ("/a/b", Systemd),
        ("a:b", Systemd),
        ("a.slice:b:", Systemd),
        ("a.slice:b:../c", Systemd),
        ("a.slice:..:c", Systemd),
        ("nope:b:c", Systemd),
        ("a--b.slice:p:c", Systemd),
        (".slice:p:c", Systemd),
    ] {
        let error = cgroup(Some(Path::new(given)), "id", manager).unwrap_err();
        assert!(
            error.to_string().starts_with("linux.cgroupsPath: "),
            "{error}"
        );
    }
}

fn parse(text: Value) -> Result<(HostHooks, Vec<Hook>), PlanError> {
    hooks(Some(&serde_json::from_value(text).unwrap()))
}

#[test]
fn hooks_are_split() {
    let hook = |path: &str| json!([{"path": path, "args": ["a"], "env": ["A=B"], "timeout": 5}]);
    let (host, guest) = parse(json!({
        "prestart": hook("/1"),
        "createRuntime": hook("/2"),
        "createContainer": hook("/3"),
        "startContainer": hook("/4"),
        "poststart": hook("/5"),
        "poststop": [{"path": "/6"}],
    }))
    .unwrap();
    assert_eq!(host.prestart[0].path, "/1");
    assert_eq!(host.create_runtime[0].path, "/2");
    assert_eq!(host.create_container[0].path, "/3");
    assert_eq!(guest[0].path, "/4");
    assert_eq!(host.poststart[0].timeout, Some(5));
    assert_eq!(host.poststop[0].timeout, None);
    assert_eq!(hooks(None), Ok((HostHooks::default(), Vec::new())));
}

#[test]
fn malformed_hooks_are_named() {
    for (hook, expected) in [
        (json!({"path": "relative"}), "hooks.poststop[0].path: "),
        (json!({"path": ""}), "hooks.poststop[0].path: "),
        (
            json!({"path": "/h", "timeout": 0}),
            "hooks.poststop[0].timeout: 0",
        ),
        (
            json!({"path": "/h", "timeout": -3}),
            "hooks.poststop[0].timeout: -3",
        ),
    ] {
        let error = parse(json!({"poststop": [hook]})).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
