// SPDX-License-Identifier: Apache-2.0
//! OCI bundles for tests: a root file system in a temporary directory and a config.json changed step by step.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// A bundle directory, removed on drop.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    rootfs: PathBuf,
}

#[derive(Debug)]
pub struct BundleBuilder {
    config: Value,
    rootfs: Rootfs,
}

#[derive(Debug)]
enum Rootfs {
    /// A static busybox with its applets, own and writable.
    Busybox,
    /// The shared Debian tree.
    Debian,
}

impl Bundle {
    /// A bundle with busybox that runs `args`.
    pub fn busybox(args: &[&str]) -> BundleBuilder {
        BundleBuilder::new(args, Rootfs::Busybox)
    }

    /// Runs `script` with busybox's shell.
    pub fn script(script: &str) -> BundleBuilder {
        Bundle::busybox(&["/bin/sh", "-c", script])
    }

    /// A bundle with the Debian root file system that runs `args`.
    pub fn debian(args: &[&str]) -> BundleBuilder {
        BundleBuilder::new(args, Rootfs::Debian)
    }

    /// Runs a Python program in the Debian root file system.
    pub fn python(program: &str) -> BundleBuilder {
        Bundle::debian(&["/usr/bin/python3", "-c", program])
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl BundleBuilder {
    fn new(args: &[&str], rootfs: Rootfs) -> BundleBuilder {
        let shared = matches!(rootfs, Rootfs::Debian);
        let config = default_config(args);
        let builder = BundleBuilder { config, rootfs };
        if shared {
            let builder = builder.set("/root/readonly", true);
            builder.mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"])
        } else {
            builder
        }
    }

    /// Sets the value at a JSON pointer, making objects on the way. `-` as last part appends to an array.
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let mut at = &mut self.config;
        for part in pointer.trim_start_matches('/').split('/') {
            if at.is_null() {
                *at = if part == "-" { json!([]) } else { json!({}) };
            }
            at = match at {
                Value::Array(items) => {
                    let index = part.parse().unwrap_or(items.len());
                    if index == items.len() {
                        items.push(Value::Null);
                    }
                    &mut items[index]
                }
                other => &mut other[part],
            };
        }
        *at = value.into();
        self
    }

    /// Removes a member of an object.
    pub fn remove(mut self, pointer: &str) -> Self {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        if let Some(Value::Object(object)) = self.config.pointer_mut(parent) {
            object.remove(name);
        }
        self
    }

    pub fn mount(self, destination: &str, kind: &str, source: &str, options: &[&str]) -> Self {
        let mount = json!({
            "destination": destination, "type": kind, "source": source, "options": options
        });
        self.set("/mounts/-", mount)
    }

    pub fn bind(self, source: &Path, destination: &str, options: &[&str]) -> Self {
        let source = source.to_str().unwrap().to_owned();
        let mut all = vec!["bind"];
        all.extend(options);
        self.mount(destination, "bind", &source, &all)
    }

    pub fn env(self, variable: &str) -> Self {
        self.set("/process/env/-", variable)
    }

    /// Grants `names` in all five capability sets, nothing else.
    pub fn capabilities(mut self, names: &[&str]) -> Self {
        for set in [
            "bounding",
            "effective",
            "permitted",
            "inheritable",
            "ambient",
        ] {
            self = self.set(&format!("/process/capabilities/{set}"), json!(names));
        }
        self
    }

    pub fn build(self) -> Bundle {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("bundle-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let rootfs = match self.rootfs {
            Rootfs::Busybox => busybox_rootfs(&path.join("rootfs")),
            Rootfs::Debian => super::debian(),
        };
        let mut config = self.config;
        if config["root"]["path"].is_null() {
            config["root"]["path"] = json!(rootfs);
        }
        fs::write(path.join("config.json"), config.to_string()).unwrap();
        Bundle { path, rootfs }
    }
}

/// A root file system of one static busybox and links to it.
fn busybox_rootfs(path: &Path) -> PathBuf {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "mnt"] {
        fs::create_dir_all(path.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", path.join("bin/busybox")).expect("needs the package busybox-static");
    for applet in APPLETS {
        symlink("busybox", path.join("bin").join(applet)).unwrap();
    }
    fs::write(path.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(path.join("etc/group"), "root:x:0:\n").unwrap();
    path.to_owned()
}

const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "ls",
    "echo",
    "true",
    "false",
    "sleep",
    "id",
    "hostname",
    "mount",
    "umount",
    "ps",
    "kill",
    "dd",
    "wc",
    "head",
    "tail",
    "grep",
    "sed",
    "awk",
    "stat",
    "touch",
    "mkdir",
    "rm",
    "rmdir",
    "ln",
    "mv",
    "cp",
    "chmod",
    "chown",
    "mknod",
    "chroot",
    "env",
    "printf",
    "test",
    "ulimit",
    "uname",
    "seq",
    "tr",
    "sync",
    "md5sum",
    "sha256sum",
    "nc",
    "ip",
    "stty",
    "tty",
    "pwd",
    "readlink",
    "sort",
    "cut",
    "find",
    "df",
    "free",
    "nproc",
    "date",
    "setsid",
    "yes",
    "od",
    "tee",
    "xargs",
    "dmesg",
    "mountpoint",
    "trap",
    "wget",
    "ping",
    "nice",
    "ionice",
    "renice",
    "time",
    "timeout",
];

/// What `runc spec` writes, without a terminal and with a writable root.
fn default_config(args: &[&str]) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "ambient": capabilities
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"readonly": false},
        "hostname": "test-container",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
