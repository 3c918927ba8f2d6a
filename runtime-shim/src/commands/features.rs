// SPDX-License-Identifier: Apache-2.0
//! `features`: what is supported, as runtime-spec's features.md has it. It tells of this program, not of
//! the host it runs on.

use libseccomp::ScmpVersion;
use serde_json::{Value, json};

use super::{Error, print};
use crate::cli::OCI_VERSION;
use crate::plan;

pub fn run() -> Result<u8, Error> {
    print(&super::json(&features())?)?;
    Ok(0)
}

fn features() -> Value {
    let mut mount_options = plan::MOUNT_OPTIONS.to_vec();
    mount_options.sort_unstable();
    let capabilities: Vec<String> = plan::capability_names().collect();
    let seccomp = ScmpVersion::current()
        .map(|version| version.to_string())
        .unwrap_or_default();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ],
        "mountOptions": mount_options,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": capabilities,
            "cgroup": {
                "v1": true,
                "v2": true,
                "systemd": true,
                "systemdUser": true,
                "rdma": false,
            },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW",
                    "SCMP_ACT_ERRNO",
                    "SCMP_ACT_KILL",
                    "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG",
                    "SCMP_ACT_TRACE",
                    "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ",
                    "SCMP_CMP_GE",
                    "SCMP_CMP_GT",
                    "SCMP_CMP_LE",
                    "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": SECCOMP_FLAGS,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
            "netDevices": { "enabled": false },
        },
        "annotations": {
            "io.github.seccomp.libseccomp.version": seccomp,
            "io.sandbox.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.runc.checkpoint.enabled": "true",
        },
        "potentiallyUnsafeConfigAnnotations": [plan::ANNOTATION_PREFIX],
    })
}

const SECCOMP_FLAGS: [&str; 4] = [
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Features;

    use super::*;

    #[test]
    fn the_document_is_well_formed() {
        let parsed: Features = serde_json::from_value(features()).unwrap();
        assert_eq!(parsed.oci_version_max().to_string(), OCI_VERSION);
    }
}
