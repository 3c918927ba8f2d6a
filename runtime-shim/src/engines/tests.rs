// SPDX-License-Identifier: Apache-2.0

use super::*;

const PROGRAM: &str = "/usr/local/bin/sandbox";

fn add(engine: Engine, before: Option<&str>) -> String {
    with(engine, before, Path::new(PROGRAM)).unwrap().unwrap()
}

/// What was there before is there afterwards, to the byte.
fn round_trip(engine: Engine, before: Option<&str>) -> String {
    let text = add(engine, before);
    assert_eq!(add(engine, Some(&text)), text, "twice is once");
    let after = without(engine, Some(&text)).unwrap();
    assert_eq!(after.as_deref(), before, "{text}");
    assert_eq!(without(engine, before).unwrap().as_deref(), before);
    text
}

#[test]
fn podman_has_a_file_for_it() {
    let text = add(Engine::Podman, None);
    assert!(text.contains("[engine.runtimes]\nsandbox = [\"/usr/local/bin/sandbox\"]\n"));
    assert_eq!(without(Engine::Podman, Some(&text)).unwrap(), None);
    let user = file(Engine::Podman, Some(Path::new("/home/u/.config")));
    assert_eq!(
        user,
        Path::new("/home/u/.config/containers/containers.conf.d/sandbox.conf")
    );
}

#[test]
fn docker_keeps_what_others_wrote() {
    let others = [
        "{\n  \"debug\": true\n}\n",
        "{\"debug\":true,\"hosts\":[\"a,b}\",\"c\"]}",
        "{\n\t\"runtimes\": {\n\t\t\"x\": {\"path\": \"/x\"}\n\t},\n\t\"debug\": false\n}",
        "{ \"a\\\"{\": {\"b\": [1, {\"c\": \"]\"}]}, \"runtimes\" : { \"x\": {}, \"y\": {} } }",
    ];
    for before in [None].into_iter().chain(others.map(Some)) {
        let text = round_trip(Engine::Docker, before);
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["runtimes"]["sandbox"]["path"], PROGRAM, "{text}");
        if let Some(before) = before {
            let mut expected: serde_json::Value = serde_json::from_str(before).unwrap();
            expected["runtimes"]["sandbox"] = serde_json::json!({ "path": PROGRAM });
            assert_eq!(document, expected);
        }
    }
    let empty = add(Engine::Docker, Some("{}"));
    assert_eq!(without(Engine::Docker, Some(&empty)).unwrap(), None);
}

#[test]
fn docker_runtimes_are_replaced_and_removed_where_they_are() {
    let before = r#"{"runtimes": {"x": {}, "sandbox": {"path": "/opt/bin/sandbox"}, "y": {}}}"#;
    assert_eq!(
        add(Engine::Docker, Some(before)),
        r#"{"runtimes": {"x": {}, "sandbox": { "path": "/usr/local/bin/sandbox" }, "y": {}}}"#
    );
    assert_eq!(
        without(Engine::Docker, Some(before)).unwrap().unwrap(),
        r#"{"runtimes": {"x": {}, "y": {}}}"#
    );
    let foreign = r#"{"runtimes": {"sandbox": {"path": "/bin/other"}}}"#;
    let refused = with(Engine::Docker, Some(foreign), Path::new(PROGRAM));
    assert_eq!(refused, Err(EngineError::Foreign));
    assert_eq!(
        without(Engine::Docker, Some(foreign)).unwrap().as_deref(),
        Some(foreign)
    );
}

#[test]
fn what_docker_would_not_read_is_refused() {
    for text in ["{", "[]", "{\"a\": 1,}", "{\"runtimes\": 3}"] {
        assert!(
            with(Engine::Docker, Some(text), Path::new(PROGRAM)).is_err(),
            "{text}"
        );
    }
}

#[test]
fn containerd_gets_a_table_of_its_version() {
    let text = round_trip(Engine::Containerd, None);
    assert!(text.contains("\nversion = 2\n"), "{text}");
    let text = round_trip(
        Engine::Containerd,
        Some("version = 2 # two\n[debug]\n  level = \"info\"\n"),
    );
    assert!(text.contains("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.sandbox.options]\n    BinaryName = \"/usr/local/bin/sandbox\"\n"));
    let text = round_trip(Engine::Containerd, Some("root = \"/x\"\nversion=3\n"));
    assert!(
        text.contains("[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.sandbox]")
    );
    for version in [
        "disabled_plugins = []\n",
        "version = 1\n",
        "[debug]\nversion = 2\n",
    ] {
        let refused = with(Engine::Containerd, Some(version), Path::new(PROGRAM));
        assert_eq!(refused, Err(EngineError::Version("1".to_owned())));
    }
    let half = text.replace("# End", "# The end");
    assert!(without(Engine::Containerd, Some(&half)).is_err());
    let foreign =
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.sandbox]\n";
    let refused = with(Engine::Containerd, Some(foreign), Path::new(PROGRAM));
    assert_eq!(refused, Err(EngineError::Foreign));
}

#[test]
fn paths_that_would_need_escapes_are_refused() {
    for path in ["/a\"b", "/a\\b", "/a\nb", "relative"] {
        let refused = with(Engine::Podman, None, Path::new(path));
        assert_eq!(refused, Err(EngineError::Program(path.into())));
    }
}
