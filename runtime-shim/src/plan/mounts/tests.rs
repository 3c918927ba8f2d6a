// SPDX-License-Identifier: Apache-2.0
use serde_json::{Value, json};

use super::*;

const FILE: Option<SourceKind> = Some(SourceKind::File);
const DIRECTORY: Option<SourceKind> = Some(SourceKind::Directory);

fn all(list: Value, sources: &[Option<SourceKind>]) -> Result<(Mounts, Vec<String>), PlanError> {
    let list: Vec<oci::Mount> = serde_json::from_value(list).unwrap();
    let mut warnings = Warnings::default();
    mounts(&list, sources, Path::new("/bundle"), &mut warnings).map(|plan| (plan, warnings.0))
}

fn single(mount: Value, source: Option<SourceKind>) -> (Mount, Option<Share>) {
    let (mut plan, warnings) = all(json!([mount]), &[source]).unwrap();
    assert_eq!(warnings, [""; 0]);
    (plan.guest.remove(0), plan.shares.pop())
}

fn error(mount: Value, source: Option<SourceKind>) -> String {
    all(json!([mount]), &[source]).unwrap_err().to_string()
}

fn bind(options: Value) -> Value {
    json!({"destination": "/d", "type": "bind", "source": "/s", "options": options})
}

#[test]
fn file_systems_of_the_guest() {
    let (mount, share) = single(
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
               "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k", "tmpcopyup"]}),
        None,
    );
    assert_eq!(share, None);
    assert_eq!(mount.source, MountSource::Kernel("shm".into()));
    assert_eq!(mount.kind, "tmpfs");
    assert_eq!(
        mount.flags,
        libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV
    );
    assert_eq!(mount.data, "mode=1777,size=65536k");
    assert!(mount.copy_up);
    let (mount, _) = single(
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
               "options": ["ro", "relatime", "nsdelegate"]}),
        None,
    );
    assert_eq!(mount.source, MountSource::Cgroup);
    assert_eq!(mount.flags, libc::MS_RDONLY | libc::MS_RELATIME);
    assert_eq!(mount.data, "");
    let (mount, _) = single(json!({"destination": "/proc", "type": "proc"}), None);
    assert_eq!(mount.source, MountSource::Kernel("proc".into()));
}

#[test]
fn directories_and_files_of_the_host() {
    let (mount, share) = single(bind(json!(["rbind", "ro", "rprivate"])), DIRECTORY);
    let from = MountSource::Share {
        path: "m0".into(),
        recursive: true,
    };
    assert_eq!(mount.source, from);
    assert_eq!(mount.flags, libc::MS_RDONLY);
    assert_eq!(mount.propagation, [libc::MS_PRIVATE | libc::MS_REC]);
    assert_eq!(
        share.unwrap(),
        Share {
            name: "m0".into(),
            source: "/s".into(),
            kind: ShareKind::Directory,
            readonly: true,
            recursive: true,
        }
    );
    // A source without a slash in front belongs to the bundle; the type alone is enough.
    let (_, share) = single(
        json!({"destination": "/etc/hosts", "type": "bind", "source": "hosts"}),
        FILE,
    );
    let share = share.unwrap();
    assert_eq!(share.source, Path::new("/bundle/hosts"));
    assert_eq!(
        (share.kind, share.readonly, share.recursive),
        (ShareKind::File, false, false)
    );
    // So is the option.
    let (_, share) = single(
        json!({"destination": "/d", "type": "none", "source": "/s", "options": ["bind", "rro"]}),
        DIRECTORY,
    );
    assert!(share.unwrap().readonly);
}

#[test]
fn special_files_of_the_host() {
    let (mount, share) = single(
        bind(json!([])),
        Some(SourceKind::CharacterDevice { major: 1, minor: 3 }),
    );
    assert_eq!(
        mount.source,
        MountSource::Guest {
            path: "/dev/null".into(),
            recursive: false
        }
    );
    assert_eq!(share, None);
    for (kind, expected) in [
        (SourceKind::Socket, "not supported: /s: a Unix socket"),
        (SourceKind::Fifo, "not supported: /s: a FIFO"),
        (SourceKind::BlockDevice, "not supported: /s: a block device"),
        (
            SourceKind::CharacterDevice {
                major: 226,
                minor: 0,
            },
            "not supported: /s: a character device",
        ),
        (SourceKind::Missing, "/s: no such file or directory"),
        (SourceKind::Unreadable, "/s: cannot be looked at"),
    ] {
        let error = error(bind(json!([])), Some(kind));
        assert_eq!(error.find("mounts[0] (/d).source: "), Some(0), "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn directories_of_the_kernel_are_the_guest_s() {
    let (plan, warnings) = all(
        json!([{"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]}]),
        &[DIRECTORY],
    )
    .unwrap();
    assert_eq!(
        plan.guest[0].source,
        MountSource::Guest {
            path: "/sys".into(),
            recursive: true
        }
    );
    assert!(plan.shares.is_empty());
    assert_eq!(warnings.len(), 1);
    // Elsewhere the host's is what is asked for.
    let (mount, _) = single(
        json!({"destination": "/host/sys", "type": "bind", "source": "/sys"}),
        DIRECTORY,
    );
    assert!(matches!(mount.source, MountSource::Share { .. }));
}

#[test]
fn propagation() {
    let refused = error(bind(json!(["rshared"])), DIRECTORY);
    assert!(
        refused.contains("mounts[0] (/d).options: not supported: shared"),
        "{refused}"
    );
    let (plan, warnings) = all(json!([bind(json!(["rslave"]))]), &[DIRECTORY]).unwrap();
    assert_eq!(plan.guest[0].propagation, [libc::MS_SLAVE | libc::MS_REC]);
    assert_eq!(warnings.len(), 1);
    // Inside of the guest it works.
    let (mount, _) = single(
        json!({"destination": "/t", "type": "tmpfs", "options": ["shared"]}),
        None,
    );
    assert_eq!(mount.propagation, [libc::MS_SHARED]);
    for (text, flags) in [
        (None, 0),
        (Some(""), 0),
        (Some("rslave"), libc::MS_SLAVE | libc::MS_REC),
        (Some("shared"), libc::MS_SHARED),
        (Some("unbindable"), libc::MS_UNBINDABLE),
    ] {
        assert_eq!(rootfs_propagation(text), Ok(flags));
    }
    assert!(rootfs_propagation(Some("ro")).is_err());
    assert!(rootfs_propagation(Some("nope")).is_err());
}

#[test]
fn recursive_attributes() {
    for (options, set, clear) in [
        (json!(["rro"]), ATTR_RDONLY, 0),
        (json!(["rro", "rrw"]), 0, ATTR_RDONLY),
        (
            json!(["rnosuid", "rnodev", "rnoexec"]),
            ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC,
            0,
        ),
        (json!(["rnoatime"]), ATTR_NOATIME, ATTR_ATIME),
        (json!(["rnoatime", "rrelatime"]), ATTR_RELATIME, ATTR_ATIME),
        (
            json!(["rstrictatime", "rdiratime"]),
            ATTR_STRICTATIME,
            ATTR_ATIME | ATTR_NODIRATIME,
        ),
        (json!(["rnosymfollow"]), ATTR_NOSYMFOLLOW, 0),
    ] {
        let (mount, _) = single(bind(options.clone()), DIRECTORY);
        // What is set is set after the field has been cleared.
        assert_eq!(mount.recursive_set, set, "{options}");
        assert_eq!(mount.recursive_clear & !set, clear & !set, "{options}");
        assert_eq!(
            mount.recursive_clear & ATTR_ATIME,
            clear & ATTR_ATIME,
            "{options}"
        );
    }
}

#[test]
fn later_options_win() {
    for (options, flags) in [
        (json!(["ro", "rw"]), 0),
        (json!(["rw", "ro"]), libc::MS_RDONLY),
        (json!(["nosuid", "suid", "nodev"]), libc::MS_NODEV),
        (json!(["noatime", "atime"]), 0),
        (json!(["defaults", "sync"]), libc::MS_SYNCHRONOUS),
        (json!(["nosymfollow"]), libc::MS_NOSYMFOLLOW),
    ] {
        let (mount, _) = single(
            json!({"destination": "/t", "type": "tmpfs", "options": options}),
            None,
        );
        assert_eq!(mount.flags, flags);
    }
}

#[test]
fn every_option_listed_is_understood() {
    for option in OPTIONS {
        assert!(action(option).is_some(), "{option}");
    }
    let mut sorted = OPTIONS.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), OPTIONS.len());
}

#[test]
fn refusals_name_the_mount() {
    let mappings = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    for (mount, expected) in [
        (
            json!({"destination": "", "type": "tmpfs"}),
            "mounts[0].destination: is missing",
        ),
        (
            json!({"destination": "/d"}),
            "mounts[0] (/d).type: is missing",
        ),
        (
            json!({"destination": "/d", "type": "ext4", "source": "/dev/sda"}),
            "(/d).type: not supported: ext4",
        ),
        (
            json!({"destination": "/d", "type": "overlay"}),
            "(/d).type: not supported: overlay",
        ),
        (
            json!({"destination": "/d", "type": "bind"}),
            "(/d).source: is missing",
        ),
        (
            json!({"destination": "/d", "type": "bind", "source": ""}),
            "(/d).source: is missing",
        ),
        (
            bind(json!(["size=1"])),
            "(/d).options: a bind mount cannot have the file system option \"size=1\"",
        ),
        (
            bind(json!(["tmpcopyup"])),
            "(/d).options: tmpcopyup is for tmpfs only",
        ),
        (
            json!({"destination": "/d", "type": "proc", "options": ["tmpcopyup"]}),
            "tmpcopyup",
        ),
        (bind(json!(["idmap"])), "(/d).options: not supported: idmap"),
        (
            bind(json!(["src-nofollow"])),
            "(/d).options: not supported: src-nofollow",
        ),
        (
            json!({"destination": "/d", "type": "bind", "source": "/s", "uidMappings": mappings}),
            "(/d).uidMappings: not supported",
        ),
    ] {
        let error = error(mount, DIRECTORY);
        assert!(error.contains(expected), "{error}");
    }
    let many = vec![json!({"destination": "/d", "type": "tmpfs"}); MAX_MOUNTS + 1];
    assert!(all(Value::from(many), &[]).is_err());
}

#[test]
fn destinations_stay_inside() {
    for (given, expected) in [
        ("/a/b", "/a/b"),
        ("a", "/a"),
        ("/../../etc", "/etc"),
        ("/a/../../b/./c//", "/b/c"),
        ("/", "/"),
        ("..", "/"),
    ] {
        let (mount, _) = single(json!({"destination": given, "type": "tmpfs"}), None);
        assert_eq!(mount.destination, expected);
    }
}

#[test]
fn mount_points_are_those_not_below_other_mounts() {
    let (plan, _) = all(
        json!([
            {"destination": "/dev", "type": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts"},
            {"destination": "/devices", "type": "tmpfs"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/h"},
            {"destination": "/data", "type": "bind", "source": "/data"},
            {"destination": "/data/sub", "type": "tmpfs"},
        ]),
        &[None, None, None, FILE, DIRECTORY, None],
    )
    .unwrap();
    let points: Vec<_> = plan
        .mount_points
        .iter()
        .map(|p| (p.path.as_str(), p.kind, p.mode))
        .collect();
    assert_eq!(
        points,
        [
            ("/dev", ShareKind::Directory, 0o1777),
            ("/devices", ShareKind::Directory, 0o1777),
            ("/etc/hosts", ShareKind::File, 0o755),
            ("/data", ShareKind::Directory, 0o755),
        ]
    );
    let names: Vec<_> = plan
        .shares
        .iter()
        .map(|share| share.name.as_str())
        .collect();
    assert_eq!(names, ["m0", "m1"]);
    assert!(!plan.own_dev);
    let (plan, _) = all(
        json!([{"destination": "/dev", "type": "bind", "source": "/d"}]),
        &[DIRECTORY],
    )
    .unwrap();
    assert!(plan.own_dev);
}
