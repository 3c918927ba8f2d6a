// SPDX-License-Identifier: Apache-2.0
//! `check`: whether this host can run containers in microVMs, and what to do if not.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use serde::Serialize;

use super::{Error, chain, print};
use crate::cgroup::{Hierarchies, Mode};
use crate::cli::{Check, TextFormat};
use crate::guest_files::GuestFiles;
use crate::store::{self, Store};

const KVM: &str = "/dev/kvm";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Something will not work, but containers run.
    Warning,
    Failed,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Item {
    name: &'static str,
    verdict: Verdict,
    message: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Report {
    usable: bool,
    items: Vec<Item>,
}

pub fn run(arguments: &Check, store: &Store) -> Result<u8, Error> {
    if let Some(id) = &arguments.jail {
        return super::jail::run(id, arguments.format, store);
    }
    let report = Report::new(items(store));
    let text = match arguments.format {
        TextFormat::Text => report.text(),
        TextFormat::Json => super::json(&report)?,
    };
    print(&text)?;
    Ok(u8::from(!report.usable))
}

fn items(store: &Store) -> Vec<Item> {
    let mut items = vec![platform()];
    items.extend(kvm(Path::new(KVM)));
    items.extend([
        guest_files(),
        user_namespaces(),
        cgroups(),
        state_directory(store.root()),
    ]);
    items
}

impl Item {
    fn ok(name: &'static str, message: impl Into<String>) -> Item {
        Item {
            name,
            verdict: Verdict::Ok,
            message: message.into(),
            advice: None,
        }
    }

    fn failed(name: &'static str, message: impl Into<String>, advice: &'static str) -> Item {
        Item {
            name,
            verdict: Verdict::Failed,
            message: message.into(),
            advice: Some(advice),
        }
    }

    fn warning(name: &'static str, message: impl Into<String>, advice: &'static str) -> Item {
        Item {
            verdict: Verdict::Warning,
            ..Item::failed(name, message, advice)
        }
    }
}

impl Report {
    fn new(items: Vec<Item>) -> Report {
        Report {
            usable: items.iter().all(|item| item.verdict != Verdict::Failed),
            items,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for item in &self.items {
            let verdict = match item.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Failed => "FAILED",
            };
            text.push_str(&format!(
                "{:<16} {verdict:<8} {}\n",
                item.name, item.message
            ));
            if let Some(advice) = item.advice {
                text.push_str(&format!("{:<25} {advice}\n", ""));
            }
        }
        text.push_str(if self.usable {
            "This host can run containers in microVMs.\n"
        } else {
            "This host cannot run containers in microVMs.\n"
        });
        text
    }
}

fn platform() -> Item {
    let name = "platform";
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        Item::ok(name, format!("Linux {release} on x86-64"))
    } else {
        Item::failed(name, "not Linux on x86-64", "use such a host")
    }
}

/// Opening it, and then running a guest: a device that opens may still not work.
fn kvm(path: &Path) -> Vec<Item> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) => return vec![unopened(path, &error)],
    };
    let opened = Item::ok("kvm device", format!("{} opens", path.display()));
    let guest = match vmm::probe(&file) {
        Ok(()) => Item::ok("kvm guest", "a guest runs in ring 0 and ring 3"),
        Err(error) => Item::failed("kvm guest", chain(&error), advice(&error)),
    };
    vec![opened, guest]
}

fn unopened(path: &Path, error: &io::Error) -> Item {
    let advice = match error.kind() {
        io::ErrorKind::NotFound if has_virtualization() => {
            "load the module kvm_intel or kvm_amd; in a container, pass the device"
        }
        io::ErrorKind::NotFound => {
            "turn on virtualization in the firmware; in a VM, have its host allow nested virtualization"
        }
        io::ErrorKind::PermissionDenied => {
            "run as root, or add the user to the group of the device, often: usermod -aG kvm USER"
        }
        _ => "see the kernel log",
    };
    Item::failed("kvm device", format!("{}: {error}", path.display()), advice)
}

fn has_virtualization() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|info| {
        info.lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
    })
}

fn advice(error: &vmm::ProbeError) -> &'static str {
    use vmm::ProbeError;
    match error {
        ProbeError::Ring | ProbeError::Instruction(_) => {
            "this KVM is an emulation in software; use a host with hardware virtualization"
        }
        ProbeError::ApiVersion(_) | ProbeError::Capability(_) => "use a newer kernel",
        ProbeError::Deadline => "the host is overloaded, or its KVM does not work",
        _ => "see the kernel log",
    }
}

fn guest_files() -> Item {
    let name = "guest files";
    match GuestFiles::find() {
        Ok(files) => {
            for path in [&files.kernel, &files.initramfs] {
                if let Err(error) = File::open(path) {
                    let message = format!("{}: {error}", path.display());
                    return Item::failed(name, message, "make the file readable");
                }
            }
            let directory = files
                .kernel
                .parent()
                .map(Path::to_owned)
                .unwrap_or_default();
            Item::ok(
                name,
                format!("kernel and initramfs in {}", directory.display()),
            )
        }
        Err(error) => Item::failed(
            name,
            chain(&error),
            "build or install the guest's kernel and initramfs",
        ),
    }
}

/// The monitor gives up its privileges in one.
fn user_namespaces() -> Item {
    let name = "user namespaces";
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces");
    match limit.as_deref().map(str::trim) {
        Ok("0") => Item::failed(
            name,
            "turned off",
            "sysctl user.max_user_namespaces=1024 (or more)",
        ),
        Ok(_) => Item::ok(name, "available"),
        Err(_) => Item::failed(
            name,
            "not in this kernel",
            "use a kernel with CONFIG_USER_NS",
        ),
    }
}

fn cgroups() -> Item {
    let name = "cgroups";
    let hierarchies = match Hierarchies::detect() {
        Ok(hierarchies) => hierarchies,
        Err(error) => {
            return Item::warning(
                name,
                chain(&error),
                "limits and statistics on the host need cgroups; without: --cgroup-manager disabled",
            );
        }
    };
    let mode = match hierarchies.mode() {
        Mode::Unified => "v2",
        Mode::Hybrid => "v1 and v2",
        Mode::Legacy => "v1",
    };
    match hierarchies.mount_point() {
        Some(mount) if !writable(mount) => Item::warning(
            name,
            format!("{mode}, not writable"),
            "limits on the host need a delegated cgroup; without: --cgroup-manager disabled",
        ),
        _ => Item::ok(name, mode),
    }
}

fn state_directory(root: &Path) -> Item {
    let name = "state directory";
    let existing = root.ancestors().find(|path| path.exists());
    match existing {
        Some(path) if writable(path) => Item::ok(name, root.display().to_string()),
        existing => {
            let place = existing
                .map(Path::to_owned)
                .unwrap_or_else(|| PathBuf::from("/"));
            let advice = if store::is_host_root() {
                "choose another directory with --root"
            } else {
                "set XDG_RUNTIME_DIR, or choose a directory with --root"
            };
            Item::failed(
                name,
                format!("{}: {} is not writable", root.display(), place.display()),
                advice,
            )
        }
    }
}

fn writable(path: &Path) -> bool {
    rustix::fs::access(path, Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_and_a_wrong_one() {
        let items = kvm(Path::new("/nonexistent/kvm"));
        assert_eq!(items.len(), 1);
        assert_eq!(items[0].verdict, Verdict::Failed);
        assert!(items[0].advice.is_some());
        let items = kvm(Path::new("/dev/null"));
        assert_eq!(items[1].verdict, Verdict::Failed);
    }

    #[test]
    fn one_failure_is_enough() {
        let report = Report::new(vec![
            Item::ok("a", "fine"),
            Item::warning("b", "so so", "do this"),
        ]);
        assert!(report.usable);
        let report = Report::new(vec![Item::failed("c", "bad", "do that")]);
        assert!(!report.usable);
        assert_eq!(
            report.text(),
            "c                FAILED   bad\n                          do that\n\
             This host cannot run containers in microVMs.\n"
        );
    }
}
