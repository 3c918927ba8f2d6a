// SPDX-License-Identifier: Apache-2.0
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::{Arc, Barrier};

use super::*;
use crate::plan::VmShape;

struct TestStore {
    path: PathBuf,
    store: Store,
}

impl TestStore {
    fn new(name: &str) -> TestStore {
        let path =
            std::env::temp_dir().join(format!("sandbox-store-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let store = Store::new(Some(&path)).unwrap();
        TestStore { path, store }
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn state(id: &str) -> State {
    State {
        version: VERSION,
        oci_version: "1.0.2".into(),
        id: id.into(),
        process: Identity::of(i32::try_from(std::process::id()).unwrap()).unwrap(),
        status: Status::Created,
        bundle: "/b".into(),
        rootfs: "/b/rootfs".into(),
        created: crate::time::now(),
        owner: "root".into(),
        annotations: BTreeMap::from([("a".into(), "b".into())]),
        cgroups: vec!["/sys/fs/cgroup/c".into()],
        vm: VmShape {
            vcpus: 1,
            memory_mib: 96,
        },
        mounts: Vec::new(),
        mounts_added: 0,
        forked_from: None,
    }
}

fn create(store: &Store, id: &str) {
    let mut container = store.claim(id).unwrap();
    container.save_config(b"{}").unwrap();
    container.save(&state(id)).unwrap();
    container.keep();
}

#[test]
fn life_of_a_container() {
    let test = TestStore::new("life");
    create(&test.store, "c");
    let mode = std::fs::metadata(&test.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o700);
    let file = std::fs::metadata(test.path.join("c/state.json")).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    assert!(matches!(test.store.claim("c"), Err(StoreError::Exists)));
    assert_eq!(test.store.load("c").unwrap().annotations["a"], "b");
    assert_eq!(test.store.config("c").unwrap(), b"{}");
    let ids: Vec<String> = test
        .store
        .list()
        .unwrap()
        .into_iter()
        .map(|entry| entry.id)
        .collect();
    assert_eq!(ids, ["c"]);
    test.store.lock("c").unwrap().remove().unwrap();
    assert!(matches!(test.store.load("c"), Err(StoreError::NotFound)));
    assert!(!test.path.join("c").exists());
}

#[test]
fn a_claim_that_is_not_kept_leaves_nothing() {
    let test = TestStore::new("claim");
    let container = test.store.claim("c").unwrap();
    container.save(&state("c")).unwrap();
    std::fs::create_dir_all(test.path.join("c/sub/dir")).unwrap();
    drop(container);
    assert!(!test.path.join("c").exists());
}

#[test]
fn one_of_many_commands_wins() {
    let test = TestStore::new("race");
    let barrier = Arc::new(Barrier::new(32));
    for round in 0..10 {
        let threads: Vec<_> = (0..32)
            .map(|_| {
                let (store, barrier) = (test.store.clone(), barrier.clone());
                std::thread::spawn(move || {
                    barrier.wait();
                    match store.claim("c") {
                        Ok(mut container) => {
                            container.save(&state("c")).unwrap();
                            container.keep();
                            true
                        }
                        Err(StoreError::Exists) => false,
                        Err(error) => panic!("{error}"),
                    }
                })
            })
            .collect();
        let winners = threads.into_iter().map(|t| t.join().unwrap());
        assert_eq!(winners.filter(|won| *won).count(), 1, "round {round}");
        // And of as many deletes.
        let threads: Vec<_> = (0..32)
            .map(|_| {
                let (store, barrier) = (test.store.clone(), barrier.clone());
                std::thread::spawn(move || {
                    barrier.wait();
                    match store.lock("c").and_then(Locked::remove) {
                        Ok(()) => true,
                        Err(StoreError::NotFound) => false,
                        Err(error) => panic!("{error}"),
                    }
                })
            })
            .collect();
        let winners = threads.into_iter().map(|t| t.join().unwrap());
        assert_eq!(winners.filter(|won| *won).count(), 1, "round {round}");
    }
}

#[test]
fn readers_never_see_half_a_state() {
    let test = TestStore::new("atomic");
    create(&test.store, "c");
    let store = test.store.clone();
    let writer = std::thread::spawn(move || {
        let container = store.lock("c").unwrap();
        for number in 0..50 {
            let mut state = state("c");
            state
                .annotations
                .insert("n".into(), "x".repeat(number * 1000));
            container.save(&state).unwrap();
        }
    });
    while !writer.is_finished() {
        test.store.load("c").unwrap();
    }
    writer.join().unwrap();
}

#[test]
fn damaged_states_are_named_and_can_be_deleted() {
    let test = TestStore::new("damaged");
    create(&test.store, "good");
    let newer = serde_json::to_string(&state("c"))
        .unwrap()
        .replace("\"version\":1", "\"version\":9");
    for (content, expected) in [
        ("", "empty or cut off"),
        ("{\"version\":1,", "empty or cut off"),
        ("garbage", "is damaged"),
        ("{\"version\":1}", "is damaged"),
        ("[]", "is damaged"),
        (newer.as_str(), "has version 9, this program knows up to 1"),
        (
            &serde_json::to_string(&state("d")).unwrap(),
            "belongs to container \"d\"",
        ),
    ] {
        create(&test.store, "c");
        std::fs::write(test.path.join("c/state.json"), content).unwrap();
        let error = test.store.load("c").unwrap_err();
        assert!(error.to_string().contains(expected), "{content:?}: {error}");
        // The others are not affected.
        let entries = test.store.list().unwrap();
        assert!(
            entries
                .iter()
                .any(|entry| entry.id == "good" && entry.state.is_ok())
        );
        assert!(
            entries
                .iter()
                .any(|entry| entry.id == "c" && entry.state.is_err())
        );
        test.store.lock("c").unwrap().remove().unwrap();
    }
    std::fs::create_dir(test.path.join("c")).unwrap();
    assert!(matches!(test.store.load("c"), Err(StoreError::NoState)));
    std::fs::create_dir(test.path.join("c/state.json")).unwrap();
    assert!(matches!(test.store.load("c"), Err(StoreError::NotAFile(_))));
    test.store.lock("c").unwrap().remove().unwrap();
}

#[test]
fn links_lead_nowhere() {
    let test = TestStore::new("links");
    create(&test.store, "c");
    let outside = TestStore::new("links-outside");
    create(&outside.store, "victim");
    symlink(outside.path.join("victim"), test.path.join("link")).unwrap();
    assert!(matches!(test.store.load("link"), Err(StoreError::NotFound)));
    assert!(matches!(test.store.lock("link"), Err(StoreError::NotFound)));
    assert!(matches!(test.store.claim("link"), Err(StoreError::Exists)));
    // Removing a container removes its links, not what they lead to.
    symlink(outside.path.join("victim"), test.path.join("c/inside")).unwrap();
    test.store.lock("c").unwrap().remove().unwrap();
    assert!(outside.path.join("victim/state.json").exists());
    // A state file that is a link is not read.
    create(&test.store, "victim");
    std::fs::remove_file(test.path.join("victim/state.json")).unwrap();
    symlink(
        outside.path.join("victim/state.json"),
        test.path.join("victim/state.json"),
    )
    .unwrap();
    assert!(test.store.load("victim").is_err());
}

#[test]
fn unsafe_roots_are_refused() {
    assert!(matches!(
        Store::new(Some(Path::new("/"))),
        Err(StoreError::UnsafeRoot { .. })
    ));
    let test = TestStore::new("writable");
    std::fs::create_dir(&test.path).unwrap();
    std::fs::set_permissions(&test.path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = test.store.claim("c").unwrap_err();
    assert!(
        error.to_string().ends_with("others may write to it"),
        "{error}"
    );
}

#[test]
fn missing_roots() {
    let explicit = TestStore::new("missing");
    assert!(matches!(
        explicit.store.list(),
        Err(StoreError::Root { .. })
    ));
    assert!(matches!(
        explicit.store.load("c"),
        Err(StoreError::NotFound)
    ));
    let default = Store {
        explicit: false,
        ..explicit.store.clone()
    };
    assert!(default.list().unwrap().is_empty());
    assert!(!explicit.path.exists());
}

#[test]
fn ids_are_checked_everywhere() {
    let test = TestStore::new("ids");
    for id in ["..", ".", "a/b", ""] {
        assert!(
            matches!(test.store.claim(id), Err(StoreError::Id(_))),
            "{id:?}"
        );
        assert!(
            matches!(test.store.lock(id), Err(StoreError::Id(_))),
            "{id:?}"
        );
        assert!(
            matches!(test.store.load(id), Err(StoreError::Id(_))),
            "{id:?}"
        );
    }
}

#[test]
fn a_process_that_is_gone_is_a_stopped_container() {
    let mut state = state("c");
    assert_eq!(state.status(), Status::Created);
    assert_eq!(state.oci(state.status()).pid, state.process.pid);
    state.process.start_time += 1;
    assert_eq!(state.status(), Status::Stopped);
    let text = serde_json::to_string(&state.oci(Status::Stopped)).unwrap();
    assert!(text.contains("\"pid\":0,\"status\":\"stopped\""), "{text}");
    state.annotations.clear();
    let text = serde_json::to_string(&state.oci(Status::Stopped)).unwrap();
    assert!(!text.contains("annotations"), "{text}");
}

/// Needs the privilege to mount; where it is missing there is nothing to test.
#[test]
fn deleting_stops_at_mounts() {
    let test = TestStore::new("mounts");
    create(&test.store, "c");
    let source = TestStore::new("mounts-source");
    std::fs::create_dir_all(&source.path).unwrap();
    std::fs::write(source.path.join("precious"), "").unwrap();
    let target = test.path.join("c/mounted");
    std::fs::create_dir(&target).unwrap();
    if rustix::mount::mount_bind(&source.path, &target).is_err() {
        eprintln!("skipped: cannot mount");
        return;
    }
    let result = test.store.lock("c").unwrap().remove();
    let kept = source.path.join("precious").exists();
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(
        matches!(result, Err(StoreError::MountInside { .. })),
        "{result:?}"
    );
    assert!(kept);
    test.store.lock("c").unwrap().remove().unwrap();
}

#[test]
fn a_directory_however_deep_is_removed() {
    let test = TestStore::new("deep");
    let container = test.store.claim("c").unwrap();
    let mut path = test.path.join("c");
    for _ in 0..100 {
        path.push("d");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("file"), "x").unwrap();
    }
    container.remove().unwrap();
    assert!(!test.path.join("c").exists());
}
