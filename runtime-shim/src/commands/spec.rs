// SPDX-License-Identifier: Apache-2.0
//! `spec`: a config.json to start from, with the content of runc's.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use super::Error;
use crate::cli::{OCI_VERSION, Spec};

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("{path}: File exists. Remove it first", path = .0.display())]
    Exists(PathBuf),
    #[error("{path}", path = .path.display())]
    Write { path: PathBuf, source: io::Error },
}

pub fn run(arguments: &Spec) -> Result<u8, Error> {
    let path = arguments.bundle.join("config.json");
    let rootless = arguments.rootless.then(|| {
        (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        )
    });
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => SpecError::Exists(path.clone()),
        _ => SpecError::Write {
            path: path.clone(),
            source,
        },
    };
    let mut file = File::create_new(&path).map_err(fail)?;
    file.write_all(config(rootless).as_bytes()).map_err(fail)?;
    Ok(0)
}

/// With a user and a group, these become root of the container.
fn config(rootless: Option<(u32, u32)>) -> String {
    let (namespace, mappings) = match rootless {
        None => (String::new(), String::new()),
        Some((uid, gid)) => (
            ",\n\t\t\t{\n\t\t\t\t\"type\": \"user\"\n\t\t\t}".to_owned(),
            format!(
                "{}{}",
                mapping("uidMappings", uid),
                mapping("gidMappings", gid)
            ),
        ),
    };
    TEMPLATE
        .replace("@OCI_VERSION@", OCI_VERSION)
        .replace("@USER_NAMESPACE@", &namespace)
        .replace("@MAPPINGS@", &mappings)
}

fn mapping(name: &str, id: u32) -> String {
    format!(
        "\n\t\t\"{name}\": [\n\t\t\t{{\n\t\t\t\t\"containerID\": 0,\n\t\t\t\t\"hostID\": {id},\n\
         \t\t\t\t\"size\": 1\n\t\t\t}}\n\t\t],"
    )
}

const TEMPLATE: &str = r#"{
	"ociVersion": "@OCI_VERSION@",
	"process": {
		"terminal": true,
		"user": {
			"uid": 0,
			"gid": 0
		},
		"args": [
			"sh"
		],
		"env": [
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"TERM=xterm"
		],
		"cwd": "/",
		"capabilities": {
			"bounding": [
				"CAP_AUDIT_WRITE",
				"CAP_KILL",
				"CAP_NET_BIND_SERVICE"
			],
			"effective": [
				"CAP_AUDIT_WRITE",
				"CAP_KILL",
				"CAP_NET_BIND_SERVICE"
			],
			"permitted": [
				"CAP_AUDIT_WRITE",
				"CAP_KILL",
				"CAP_NET_BIND_SERVICE"
			],
			"ambient": [
				"CAP_AUDIT_WRITE",
				"CAP_KILL",
				"CAP_NET_BIND_SERVICE"
			]
		},
		"rlimits": [
			{
				"type": "RLIMIT_NOFILE",
				"hard": 1024,
				"soft": 1024
			}
		],
		"noNewPrivileges": true
	},
	"root": {
		"path": "rootfs",
		"readonly": true
	},
	"hostname": "sandbox",
	"mounts": [
		{
			"destination": "/proc",
			"type": "proc",
			"source": "proc"
		},
		{
			"destination": "/dev",
			"type": "tmpfs",
			"source": "tmpfs",
			"options": [
				"nosuid",
				"strictatime",
				"mode=755",
				"size=65536k"
			]
		},
		{
			"destination": "/dev/pts",
			"type": "devpts",
			"source": "devpts",
			"options": [
				"nosuid",
				"noexec",
				"newinstance",
				"ptmxmode=0666",
				"mode=0620",
				"gid=5"
			]
		},
		{
			"destination": "/dev/shm",
			"type": "tmpfs",
			"source": "shm",
			"options": [
				"nosuid",
				"noexec",
				"nodev",
				"mode=1777",
				"size=65536k"
			]
		},
		{
			"destination": "/dev/mqueue",
			"type": "mqueue",
			"source": "mqueue",
			"options": [
				"nosuid",
				"noexec",
				"nodev"
			]
		},
		{
			"destination": "/sys",
			"type": "sysfs",
			"source": "sysfs",
			"options": [
				"nosuid",
				"noexec",
				"nodev",
				"ro"
			]
		},
		{
			"destination": "/sys/fs/cgroup",
			"type": "cgroup",
			"source": "cgroup",
			"options": [
				"nosuid",
				"noexec",
				"nodev",
				"relatime",
				"ro"
			]
		}
	],
	"linux": {@MAPPINGS@
		"resources": {
			"devices": [
				{
					"allow": false,
					"access": "rwm"
				}
			]
		},
		"namespaces": [
			{
				"type": "pid"
			},
			{
				"type": "network"
			},
			{
				"type": "ipc"
			},
			{
				"type": "uts"
			},
			{
				"type": "mount"
			},
			{
				"type": "cgroup"
			}@USER_NAMESPACE@
		],
		"maskedPaths": [
			"/proc/acpi",
			"/proc/asound",
			"/proc/kcore",
			"/proc/keys",
			"/proc/latency_stats",
			"/proc/timer_list",
			"/proc/timer_stats",
			"/proc/sched_debug",
			"/sys/firmware",
			"/proc/scsi"
		],
		"readonlyPaths": [
			"/proc/bus",
			"/proc/fs",
			"/proc/irq",
			"/proc/sys",
			"/proc/sysrq-trigger"
		]
	}
}
"#;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::bundle::Bundle;
    use crate::cli::CgroupManager;
    use crate::plan::{self, HostFacts, Options};

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("sandbox-spec-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("rootfs")).unwrap();
        path
    }

    #[test]
    fn what_is_written_can_be_run() {
        for rootless in [false, true] {
            let bundle = directory(&format!("run-{rootless}"));
            let arguments = Spec {
                bundle: bundle.clone(),
                rootless,
            };
            run(&arguments).unwrap();
            assert!(matches!(
                run(&arguments),
                Err(Error::Spec(SpecError::Exists(_)))
            ));
            let loaded = Bundle::load(&bundle, None).unwrap();
            let options = Options {
                id: "c".into(),
                cgroup_manager: CgroupManager::Cgroupfs,
            };
            let plan = plan::plan(&loaded, &options, &HostFacts::gather(&loaded)).unwrap();
            assert_eq!(plan.warnings, [""; 0]);
            assert!(plan.guest.rootfs_readonly);
            assert_eq!(plan.guest.uid_mappings.len(), usize::from(rootless));
            std::fs::remove_dir_all(&bundle).unwrap();
        }
    }

    /// Where runc is installed, its own is compared.
    #[test]
    fn same_as_runc() {
        let bundle = directory("runc");
        let made = std::process::Command::new("runc")
            .arg("spec")
            .current_dir(&bundle)
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: no runc");
            return;
        }
        let theirs = std::fs::read(bundle.join("config.json")).unwrap();
        std::fs::remove_dir_all(&bundle).unwrap();
        let mut theirs: Value = serde_json::from_slice(&theirs).unwrap();
        let mut ours: Value = serde_json::from_str(&config(None)).unwrap();
        for config in [&mut theirs, &mut ours] {
            config["ociVersion"] = json!(null);
            config["hostname"] = json!(null);
            // runc looks at the host's cgroup version, the guest's is always 2.
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "cgroup");
        }
        assert_eq!(ours, theirs);
    }
}
