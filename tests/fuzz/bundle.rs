// SPDX-License-Identifier: Apache-2.0
//! config.json and process.json, from file to plan.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use runtime_shim::bundle::{self, Bundle};
use runtime_shim::cli::CgroupManager;
use runtime_shim::plan::{self, HostFacts, Options, SourceKind};

/// A bundle of this process, in the directory for temporary files.
static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("bundle-{}", std::process::id()));
    fs::create_dir_all(path.join("rootfs")).expect("a directory for the bundle");
    path
});

/// What may be at the source of a bind mount.
const KINDS: [SourceKind; 8] = [
    SourceKind::Directory,
    SourceKind::File,
    SourceKind::Socket,
    SourceKind::Fifo,
    SourceKind::CharacterDevice { major: 1, minor: 3 },
    SourceKind::BlockDevice,
    SourceKind::Missing,
    SourceKind::Unreadable,
];

pub fn config(data: &[u8]) {
    fs::write(DIRECTORY.join("config.json"), data).expect("a bundle");
    let Ok(bundle) = Bundle::load(&DIRECTORY, None) else {
        return;
    };
    let mounts = bundle.spec.mounts().as_deref().unwrap_or_default();
    let bind_sources = mounts
        .iter()
        .map(|mount| {
            // The kind follows from something that the fuzzer can change.
            let length = mount.destination().as_os_str().len();
            plan::is_bind(mount).then(|| KINDS[length % KINDS.len()])
        })
        .collect();
    let facts = HostFacts {
        cpus: 4,
        memory_mib: 4096,
        bind_sources,
    };
    let options = Options {
        id: "fuzz".to_owned(),
        cgroup_manager: match data.len() % 3 {
            0 => CgroupManager::Systemd,
            _ => CgroupManager::Cgroupfs,
        },
    };
    let Ok(plan) = plan::plan(&bundle, &options, &facts) else {
        return;
    };
    assert!(plan.vm.vcpus > 0 && plan.vm.memory_mib > 0);
    for share in &plan.host.shares {
        assert!(share.source.is_absolute(), "{share:?}");
        assert!(!share.name.contains('/') && share.name != "..", "{share:?}");
    }
    for point in &plan.host.mount_points {
        assert!(point.path.starts_with('/'), "{point:?}");
    }
    let message = agent_protocol::Request::Create {
        container: "fuzz".to_owned(),
        plan: Box::new(plan.guest),
        stdio: agent_protocol::Stdio::Terminal { port: 1 },
    };
    // Too large is an answer; anything else goes to the agent and has to arrive as it was.
    if let Ok(frame) = agent_protocol::encode(&message) {
        let again: agent_protocol::Request =
            agent_protocol::decode(&frame[4..]).expect("the agent can read it");
        assert_eq!(again, message);
    }
}

/// The file of `exec --process`, for a container of the smallest configuration.
pub fn process(data: &[u8]) {
    static SPEC: &[u8] =
        br#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"process":{"cwd":"/","args":["x"],"user":{"uid":0,"gid":0}},"linux":{}}"#;
    let path = DIRECTORY.join("process.json");
    fs::write(&path, data).expect("a process file");
    let Ok((process, _)) = bundle::load_process(&path) else {
        return;
    };
    let spec = bundle::parse_spec(&path, SPEC).expect("a configuration");
    let _ = plan::plan_exec(&spec, &process, None);
}
