// SPDX-License-Identifier: Apache-2.0
//! What the agent makes: namespaces, names, paths, system controls. The rest of a [`GuestPlan`] comes
//! from its own modules.

use agent_protocol::{IdMapping, TimeOffset};
use oci_spec::runtime::{self as oci, LinuxNamespaceType};

use super::{PlanError, Warnings, invalid, unsupported};

/// HOST_NAME_MAX and the kernel's limit of domain names.
const MAX_NAME: usize = 64;
/// `/proc/<pid>/uid_map` has at most this many lines.
const MAX_MAPPINGS: usize = 340;
const MAX_PATHS: usize = 4096;

/// The `CLONE_NEW*` of the namespaces that the guest makes.
///
/// Not the network one: the guest's own is this container's alone, and its network cards are there.
/// With a user namespace it has to be made all the same, for the container's root to own it.
pub fn namespaces(
    namespaces: &[oci::LinuxNamespace],
    warnings: &mut Warnings,
) -> Result<u64, PlanError> {
    super::host::check_namespaces(namespaces)?;
    let mut flags = 0;
    for namespace in namespaces {
        let kind = namespace.typ();
        let path = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty());
        match (kind, path) {
            (LinuxNamespaceType::Network, _) => {}
            // Docker gives the host's own time namespace by path.
            (LinuxNamespaceType::Time, Some(_)) => {
                warnings.ignored("linux.namespaces[time].path", "a guest has its own clocks");
            }
            (_, Some(path)) => {
                return Err(unsupported(
                    format!("linux.namespaces[{}].path", name(kind)),
                    format!(
                        "{}: a guest cannot join a namespace of the host",
                        path.display()
                    ),
                ));
            }
            (kind, None) => flags |= clone_flag(kind),
        }
    }
    if flags & clone_flag(LinuxNamespaceType::User) != 0 {
        flags |= clone_flag(LinuxNamespaceType::Network);
    }
    if flags & clone_flag(LinuxNamespaceType::Mount) == 0 {
        return Err(unsupported(
            "linux.namespaces",
            "no mount namespace: a guest cannot have the mounts of the host",
        ));
    }
    for kind in [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
    ] {
        if flags & clone_flag(kind) == 0 {
            warnings.ignored(
                "linux.namespaces",
                format!(
                    "no {} namespace: the container gets that of its guest, not the host's",
                    name(kind)
                ),
            );
        }
    }
    Ok(flags)
}

fn name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

/// The numbers of sched.h, which the enum has for its values.
pub fn clone_flag(kind: LinuxNamespaceType) -> u64 {
    kind as u64
}

fn has(flags: u64, kind: LinuxNamespaceType) -> bool {
    flags & clone_flag(kind) != 0
}

/// `hostname` and `domainname`: both belong to a UTS namespace.
pub fn uts_name(
    field: &str,
    value: Option<&String>,
    namespaces: u64,
) -> Result<Option<String>, PlanError> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    if !has(namespaces, LinuxNamespaceType::Uts) {
        return Err(invalid(
            field,
            format!("unable to set {field} without a private UTS namespace"),
        ));
    }
    if value.len() > MAX_NAME {
        return Err(invalid(field, format!("longer than {MAX_NAME} bytes")));
    }
    Ok(Some(value.clone()))
}

pub fn mappings(
    field: &str,
    mappings: Option<&Vec<oci::LinuxIdMapping>>,
    namespaces: u64,
) -> Result<Vec<IdMapping>, PlanError> {
    let mappings = mappings.map(Vec::as_slice).unwrap_or_default();
    let user = has(namespaces, LinuxNamespaceType::User);
    if mappings.is_empty() && user {
        return Err(invalid(
            field,
            "user namespaces enabled, but no mappings given",
        ));
    }
    if !mappings.is_empty() && !user {
        return Err(invalid(field, "mappings given, but no user namespace"));
    }
    if mappings.len() > MAX_MAPPINGS {
        return Err(invalid(field, format!("more than {MAX_MAPPINGS}")));
    }
    mappings
        .iter()
        .enumerate()
        .map(|(index, mapping)| {
            let fits = |first: u32| first.checked_add(mapping.size()).is_some();
            if mapping.size() == 0 || !fits(mapping.host_id()) || !fits(mapping.container_id()) {
                return Err(invalid(
                    format!("{field}[{index}].size"),
                    format!("{} is not a number of ids", mapping.size()),
                ));
            }
            Ok(IdMapping {
                inside: mapping.container_id(),
                outside: mapping.host_id(),
                size: mapping.size(),
            })
        })
        .collect()
}

pub fn time_offsets(linux: &oci::Linux, namespaces: u64) -> Result<Vec<TimeOffset>, PlanError> {
    let mut offsets = Vec::new();
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(invalid(
                "linux.timeOffsets",
                format!("{clock:?} is neither monotonic nor boottime"),
            ));
        }
        let nanoseconds = offset.nanosecs().unwrap_or(0);
        if nanoseconds > 999_999_999 {
            return Err(invalid(
                format!("linux.timeOffsets.{clock}.nanosecs"),
                format!("{nanoseconds} is more than a second"),
            ));
        }
        offsets.push(TimeOffset {
            clock: clock.clone(),
            seconds: offset.secs().unwrap_or(0),
            nanoseconds,
        });
    }
    if !offsets.is_empty() && !has(namespaces, LinuxNamespaceType::Time) {
        return Err(invalid("linux.timeOffsets", "given, but no time namespace"));
    }
    offsets.sort_by(|a, b| a.clock.cmp(&b.clock));
    Ok(offsets)
}

/// The kernel is the container's alone, so any may be set. Names with dots, as sysctl(8) has them.
pub fn sysctls(linux: &oci::Linux, namespaces: u64) -> Result<Vec<(String, String)>, PlanError> {
    let mut sysctls = Vec::new();
    for (key, value) in linux.sysctl().iter().flatten() {
        let field = format!("linux.sysctl[{}]", key.escape_debug());
        let name = dotted(key);
        let well_formed = !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
            && !name.starts_with(['.', '/'])
            && !name.contains("..")
            && !name.contains("//");
        if !well_formed {
            return Err(invalid(field, "is not the name of a system control"));
        }
        if name == "kernel.hostname" {
            return Err(invalid(field, "use hostname instead"));
        }
        if name == "kernel.domainname" && !has(namespaces, LinuxNamespaceType::Uts) {
            return Err(invalid(field, "needs a private UTS namespace"));
        }
        sysctls.push((name, value.clone()));
    }
    sysctls.sort();
    Ok(sysctls)
}

/// `net/ipv4/conf/eth0.1/forwarding` and `net.ipv4.conf.eth0/1.forwarding` are the same.
fn dotted(key: &str) -> String {
    let slashed = key
        .find(['.', '/'])
        .is_some_and(|first| key[first..].starts_with('/'));
    if !slashed {
        return key.to_owned();
    }
    key.chars()
        .map(|c| match c {
            '/' => '.',
            '.' => '/',
            c => c,
        })
        .collect()
}

pub fn paths(field: &str, paths: &Option<Vec<String>>) -> Result<Vec<String>, PlanError> {
    let paths = paths.as_deref().unwrap_or_default();
    if paths.len() > MAX_PATHS {
        return Err(invalid(field, format!("more than {MAX_PATHS}")));
    }
    match paths.iter().find(|path| !path.starts_with('/')) {
        Some(path) => Err(invalid(field, format!("{path:?} is not absolute"))),
        None => Ok(paths.to_vec()),
    }
}

/// What has no counterpart in a guest.
pub fn refuse(linux: &oci::Linux, warnings: &mut Warnings) -> Result<(), PlanError> {
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Err(unsupported(
            "linux.netDevices",
            "network devices of the host are not moved to guests",
        ));
    }
    if linux.intel_rdt().is_some() {
        return Err(unsupported(
            "linux.intelRdt",
            "cache and bandwidth are not allotted",
        ));
    }
    if linux.memory_policy().is_some() {
        return Err(unsupported(
            "linux.memoryPolicy",
            "a guest has one memory node",
        ));
    }
    if linux
        .mount_label()
        .as_ref()
        .is_some_and(|label| !label.is_empty())
    {
        warnings.ignored("linux.mountLabel", "the guest kernel has no SELinux");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
