// SPDX-License-Identifier: Apache-2.0
use std::os::unix::fs::symlink;
use std::time::Instant;

use serde_json::json;

use super::*;

/// A bundle in a directory of its own, removed at the end.
struct TestBundle(PathBuf);

impl TestBundle {
    fn new(name: &str, config: &[u8]) -> TestBundle {
        let path =
            std::env::temp_dir().join(format!("sandbox-bundle-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("rootfs")).unwrap();
        std::fs::write(path.join("config.json"), config).unwrap();
        TestBundle(path)
    }

    fn load(&self) -> Result<Bundle, BundleError> {
        Bundle::load(&self.0, None)
    }

    /// With the sources, as it is printed.
    fn error(&self) -> String {
        let error = self.load().unwrap_err();
        crate::commands::chain(&error)
    }
}

impl Drop for TestBundle {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn config(changes: Value) -> Vec<u8> {
    let mut config = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": { "user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/" },
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    serde_json::to_vec(&config).unwrap()
}

#[test]
fn ids_as_in_runc() {
    for id in ["a", "A-b_c+d.e", "...", "-x", "0", &"x".repeat(1024)] {
        assert_eq!(validate_id(id), Ok(()), "{id}");
    }
    for id in [
        ".", "..", "a/b", "../a", "a b", "a\0", "é", "a\n", "a:b", "*",
    ] {
        let error = validate_id(id).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("invalid container ID format: "),
            "{error}"
        );
    }
    assert_eq!(validate_id(""), Err(IdError::Empty));
    assert_eq!(validate_id(&"x".repeat(1025)), Err(IdError::TooLong));
}

#[test]
fn a_good_one() {
    let bundle = TestBundle::new("good", &config(json!({"annotations": {"a": "b"}})));
    let loaded = bundle.load().unwrap();
    assert_eq!(
        loaded.rootfs,
        bundle.0.canonicalize().unwrap().join("rootfs")
    );
    assert_eq!(loaded.warnings, [""; 0]);
    assert_eq!(
        loaded.config,
        std::fs::read(bundle.0.join("config.json")).unwrap()
    );
}

#[test]
fn the_configuration_can_be_elsewhere() {
    let bundle = TestBundle::new("elsewhere", b"not this one");
    let other = bundle.0.join("other.json");
    std::fs::write(&other, config(json!({}))).unwrap();
    assert!(Bundle::load(&bundle.0, Some(&other)).is_ok());
}

#[test]
fn files_that_are_not_there_or_not_files() {
    let error = crate::commands::chain(&Bundle::load(Path::new("/nonexistent"), None).unwrap_err());
    assert!(
        error.starts_with("bundle /nonexistent: No such file"),
        "{error}"
    );
    let bundle = TestBundle::new("files", b"");
    let path = bundle.0.join("config.json");
    std::fs::remove_file(&path).unwrap();
    assert!(
        bundle.error().contains("config.json: No such file"),
        "{}",
        bundle.error()
    );
    std::fs::create_dir(&path).unwrap();
    assert!(
        bundle.error().ends_with("config.json: not a regular file"),
        "{}",
        bundle.error()
    );
    std::fs::remove_dir(&path).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(
        bundle.error().ends_with("config.json: not a regular file"),
        "{}",
        bundle.error()
    );
}

#[test]
fn documents_of_an_attacker() {
    let nested = |depth: usize| {
        [
            b"{\"annotations\":".to_vec(),
            vec![b'['; depth],
            vec![b']'; depth],
            b"}".to_vec(),
        ]
        .concat()
    };
    let wide = [
        b"[0".to_vec(),
        b",0".repeat((4 << 20) / 2 - 4),
        b"]".to_vec(),
    ]
    .concat();
    for (name, document, expected) in [
        (
            "empty",
            b"".to_vec(),
            "EOF while parsing a value at line 1 column 0",
        ),
        (
            "cut",
            b"{\n \"root\": {".to_vec(),
            "EOF while parsing an object at line 2",
        ),
        (
            "garbage",
            vec![0xff; 4096],
            "expected value at line 1 column 1",
        ),
        (
            "utf8",
            b"{\"hostname\": \"\xff\"}".to_vec(),
            "invalid unicode code point at line 1",
        ),
        ("nested", nested(200), "recursion limit exceeded at line 1"),
        (
            "very-nested",
            nested(1_000_000),
            "recursion limit exceeded at line 1",
        ),
        ("huge", vec![b' '; (4 << 20) + 1], "larger than 4 MiB"),
        ("wide", wide, "invalid type: integer `0`"),
        (
            "trailing",
            [config(json!({})), b"{}".to_vec()].concat(),
            "trailing characters at line 1",
        ),
        (
            "twice",
            b"{\"ociVersion\": \"1.0.0\",\n\"ociVersion\": \"1.0.1\"}".to_vec(),
            "duplicate field `ociVersion` at line 2",
        ),
        (
            "type",
            config(json!({"process": {"user": {"uid": -1}, "cwd": "/"}})),
            "expected u32",
        ),
        (
            "enum",
            config(json!({"linux": {"namespaces": [{"type": "nope"}]}})),
            "unknown variant `nope`",
        ),
        (
            "nul",
            config(json!({"process": {"user": {}, "cwd": "/", "args": ["sh", "a\u{0}b"]}})),
            "process.args[1]: contains a NUL character",
        ),
        (
            "nul-key",
            config(json!({"annotations": {"a\u{0}": ""}})),
            "annotations.a\\0: contains a NUL character",
        ),
    ] {
        let begun = Instant::now();
        let bundle = TestBundle::new(name, &document);
        let error = bundle.error();
        assert!(error.contains(expected), "{name}: {error}");
        assert!(error.contains("config.json"), "{name}: {error}");
        assert!(!error.contains('\n'), "{name}: {error}");
        assert!(begun.elapsed().as_secs() < 10, "{name}");
    }
}

#[test]
fn versions() {
    for (version, fine, warned) in [
        ("1.0.0", true, false),
        ("1.0.2-dev", true, false),
        ("1.2.1+dev", true, false),
        ("1.3.0", true, false),
        ("1.4.0", true, true),
        ("2.0.0", false, false),
        ("0.9.0", false, false),
        ("1.0", false, false),
        ("1.0.x", false, false),
        ("one", false, false),
        ("", false, false),
    ] {
        let bundle = TestBundle::new("version", &config(json!({"ociVersion": version})));
        match bundle.load() {
            Ok(bundle) => {
                assert!(fine, "{version}");
                assert_eq!(!bundle.warnings.is_empty(), warned, "{version}");
            }
            Err(error) => {
                assert!(!fine, "{version}: {error}");
                assert!(error.to_string().contains("ociVersion: "), "{error}");
            }
        }
    }
}

#[test]
fn root_file_systems() {
    let bundle = TestBundle::new("rootfs", b"");
    let file = bundle.0.join("file");
    std::fs::write(&file, "").unwrap();
    symlink("rootfs", bundle.0.join("link")).unwrap();
    symlink("loop", bundle.0.join("loop")).unwrap();
    let real = bundle.0.canonicalize().unwrap().join("rootfs");
    for (root, expected) in [
        (json!({"path": "rootfs"}), Ok(())),
        (json!({"path": "./rootfs/"}), Ok(())),
        (json!({"path": "link"}), Ok(())),
        (json!({"path": real}), Ok(())),
        (json!({"path": ""}), Err("root.path is missing")),
        (json!({}), Err("root.path is missing")),
        (json!(null), Err("root is missing")),
        (json!({"path": "nope"}), Err("No such file or directory")),
        (json!({"path": "file"}), Err("file: not a directory")),
        (
            json!({"path": "loop"}),
            Err("Too many levels of symbolic links"),
        ),
        (
            json!({"path": "/dev/null"}),
            Err("/dev/null: not a directory"),
        ),
    ] {
        std::fs::write(bundle.0.join("config.json"), config(json!({"root": root}))).unwrap();
        match (bundle.load(), expected) {
            (Ok(loaded), Ok(())) => assert_eq!(loaded.rootfs, real),
            (Err(error), Err(expected)) => {
                let error = crate::commands::chain(&error);
                assert!(error.contains(expected), "{root}: {error}");
            }
            (result, _) => panic!("{root}: {result:?}"),
        }
    }
}

#[test]
fn unknown_capabilities_are_left_out_with_a_warning() {
    let process = json!({
        "user": {}, "cwd": "/", "args": ["sh"],
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_FUTURE"],
            "ambient": ["CAP_CHOWN"],
        },
        "scheduler": {"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_DL_OVERRUN"]},
    });
    let bundle = TestBundle::new("capabilities", &config(json!({"process": process})));
    let loaded = bundle.load().unwrap();
    assert_eq!(
        loaded.warnings,
        ["process.capabilities.bounding: unknown capability \"CAP_FUTURE\" left out"]
    );
    // The same in a file of `exec --process`.
    let path = bundle.0.join("process.json");
    std::fs::write(&path, serde_json::to_vec(&process).unwrap()).unwrap();
    let (process, warnings) = load_process(&path).unwrap();
    assert_eq!(warnings.len(), 1);
    let capabilities = process.capabilities().as_ref().unwrap();
    assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 1);
}

#[test]
fn sections_of_other_platforms_are_kept_apart() {
    let changes = json!({"vm": {"hwConfig": {"vcpus": 2}}, "windows": {}, "freebsd": null});
    let bundle = TestBundle::new("platforms", &config(changes));
    let platforms = bundle.load().unwrap().platforms;
    assert_eq!(platforms.keys().collect::<Vec<_>>(), ["vm", "windows"]);
}
