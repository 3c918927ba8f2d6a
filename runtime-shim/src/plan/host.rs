// SPDX-License-Identifier: Apache-2.0
//! What is done on the host: cgroup, network namespace, hooks.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use agent_protocol::Hook;
use oci_spec::runtime::{self as oci, LinuxNamespaceType, Spec};

use super::{CgroupLocation, HostHooks, Network, PlanError, invalid, unsupported};
use crate::cli::CgroupManager;

/// `none`: a container that asks for the host's network gets one with a loopback device only.
pub const NETWORK_ANNOTATION: &str = "io.sandbox.network";

pub fn network(spec: &Spec) -> Result<Network, PlanError> {
    let annotation = spec
        .annotations()
        .as_ref()
        .and_then(|annotations| annotations.get(NETWORK_ANNOTATION));
    let isolated = match annotation.map(String::as_str) {
        None => false,
        Some("none") => true,
        Some(other) => {
            return Err(invalid(
                format!("annotations[{NETWORK_ANNOTATION}]"),
                format!("{other:?} is not \"none\""),
            ));
        }
    };
    let namespace = spec
        .linux()
        .iter()
        .filter_map(|linux| linux.namespaces().as_ref())
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match namespace {
        _ if isolated => Ok(Network::New),
        None => Err(unsupported(
            "linux.namespaces",
            format!(
                "no network namespace: a guest cannot have the network of the host \
                 (annotation {NETWORK_ANNOTATION}=none runs it with a loopback device only)"
            ),
        )),
        Some(namespace) => match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => {
                if !path.is_absolute() {
                    return Err(invalid(
                        "linux.namespaces",
                        format!("{}: is not absolute", path.display()),
                    ));
                }
                Ok(Network::Path(path.clone()))
            }
            _ => Ok(Network::New),
        },
    }
}

/// What says that a container only holds namespaces for others, by container manager.
const POD_SANDBOX: [(&str, &str); 3] = [
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox"),
    ("io.podman.annotations.infra", "TRUE"),
];

/// Whether the guest gets the links of the network namespace. The holder of a pod's namespaces leaves them to those that
/// do the work: a link goes to one guest.
pub fn joins_links(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    let says = |(key, value): &(&str, &str)| {
        annotations
            .and_then(|annotations| annotations.get(*key))
            .is_some_and(|found| found.eq_ignore_ascii_case(value))
    };
    let none = (NETWORK_ANNOTATION, "none");
    !POD_SANDBOX.iter().chain([&none]).any(says)
}

pub fn cgroup(
    path: Option<&Path>,
    id: &str,
    manager: CgroupManager,
) -> Result<CgroupLocation, PlanError> {
    let path = path.filter(|path| !path.as_os_str().is_empty());
    match manager {
        CgroupManager::Disabled => Ok(CgroupLocation::Unchanged),
        CgroupManager::Systemd => systemd(path, id),
        CgroupManager::Cgroupfs => match path {
            // Not in a directory of all of them, which would be left over.
            None => Ok(CgroupLocation::Path(PathBuf::from(format!(
                "/sandbox-{id}"
            )))),
            Some(path) => {
                let mut clean = PathBuf::new();
                for component in path.components() {
                    match component {
                        Component::ParentDir => {
                            return Err(invalid(
                                "linux.cgroupsPath",
                                format!("{}: must not contain ..", path.display()),
                            ));
                        }
                        Component::CurDir => {}
                        component => clean.push(component),
                    }
                }
                if clean.parent().is_none() {
                    return Err(invalid(
                        "linux.cgroupsPath",
                        format!("{}: is the root of the hierarchy", path.display()),
                    ));
                }
                Ok(CgroupLocation::Path(clean))
            }
        },
    }
}

fn systemd(path: Option<&Path>, id: &str) -> Result<CgroupLocation, PlanError> {
    let Some(path) = path else {
        return Ok(CgroupLocation::Systemd {
            slice: String::new(),
            prefix: "sandbox".to_owned(),
            name: id.to_owned(),
        });
    };
    let text = path.to_str().unwrap_or_default();
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts.as_slice() else {
        return Err(invalid(
            "linux.cgroupsPath",
            format!(
                "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, \
                 got {text:?} instead"
            ),
        ));
    };
    let well_formed = |part: &str| !part.contains('/') && part != ".." && part != ".";
    if name.is_empty()
        || ![slice, prefix, name]
            .into_iter()
            .all(|part| well_formed(part))
    {
        return Err(invalid(
            "linux.cgroupsPath",
            format!("{text:?} has an empty or malformed part"),
        ));
    }
    if !slice.is_empty() && *slice != "-.slice" {
        let stem = slice.strip_suffix(".slice").unwrap_or_default();
        if stem.is_empty() || stem.split('-').any(str::is_empty) {
            return Err(invalid(
                "linux.cgroupsPath",
                format!("invalid slice name: {slice}"),
            ));
        }
    }
    Ok(CgroupLocation::Systemd {
        slice: (*slice).to_owned(),
        prefix: (*prefix).to_owned(),
        name: (*name).to_owned(),
    })
}

/// The hooks of the host, and those that run in the guest.
pub fn hooks(hooks: Option<&oci::Hooks>) -> Result<(HostHooks, Vec<Hook>), PlanError> {
    let Some(hooks) = hooks else {
        return Ok((HostHooks::default(), Vec::new()));
    };
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    let host = HostHooks {
        prestart: list("prestart", prestart)?,
        create_runtime: list("createRuntime", hooks.create_runtime())?,
        create_container: list("createContainer", hooks.create_container())?,
        poststart: list("poststart", hooks.poststart())?,
        poststop: list("poststop", hooks.poststop())?,
    };
    Ok((host, list("startContainer", hooks.start_container())?))
}

fn list(kind: &str, hooks: &Option<Vec<oci::Hook>>) -> Result<Vec<Hook>, PlanError> {
    hooks
        .iter()
        .flatten()
        .enumerate()
        .map(|(index, hook)| {
            let field = |name: &str| format!("hooks.{kind}[{index}].{name}");
            if !hook.path().is_absolute() {
                return Err(invalid(
                    field("path"),
                    format!("{:?} is not absolute", hook.path()),
                ));
            }
            let timeout = match hook.timeout() {
                None => None,
                Some(seconds) => Some(
                    u32::try_from(seconds)
                        .ok()
                        .filter(|seconds| *seconds > 0)
                        .ok_or_else(|| {
                            invalid(
                                field("timeout"),
                                format!("{seconds} is not a number of seconds"),
                            )
                        })?,
                ),
            };
            Ok(Hook {
                path: hook.path().to_string_lossy().into_owned(),
                args: hook.args().clone().unwrap_or_default(),
                env: hook.env().clone().unwrap_or_default(),
                timeout,
            })
        })
        .collect()
}

/// Each kind at most once.
pub fn check_namespaces(namespaces: &[oci::LinuxNamespace]) -> Result<(), PlanError> {
    let mut seen = HashSet::new();
    match namespaces
        .iter()
        .find(|namespace| !seen.insert(namespace.typ()))
    {
        Some(namespace) => Err(invalid(
            "linux.namespaces",
            format!("{} occurs twice", namespace.typ()),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
