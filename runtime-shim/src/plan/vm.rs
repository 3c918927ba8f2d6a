// SPDX-License-Identifier: Apache-2.0
//! The size of the VM: from limits, annotations and the `vm` section.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxResources, Spec};
use serde_json::{Map, Value};

use super::process::count_cpus;
use super::{HostFacts, PlanError, VmShape, Warnings, invalid, unsupported};

/// What the guest's kernel and agent need beside the container.
const GUEST_OVERHEAD_MIB: u64 = 64;
/// Below this a kernel does not get as far as an agent.
const MIN_MEMORY_MIB: u64 = 96;
/// Page tables of the guest map it in pages of this size.
const GRANULARITY_MIB: u64 = 2;
const DEFAULT_MEMORY_MIB: u64 = 1024;
/// A container's limit below this leaves no room for a process.
const MIN_LIMIT: u64 = 4 << 20;
const MAX_VCPUS: u32 = 32;
/// Without a quota: more would cost memory and start-up time for what most containers never use.
const DEFAULT_VCPUS: u32 = 4;

const MEMORY_ANNOTATION: &str = "io.sandbox.vm.memory_mib";
const VCPUS_ANNOTATION: &str = "io.sandbox.vm.vcpus";

/// Annotations that change a VM, for `features`.
pub const ANNOTATION_PREFIX: &str = "io.sandbox.";

/// What is asked for explicitly, in whatever place.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wishes {
    vcpus: Option<u32>,
    memory_mib: Option<u64>,
}

pub fn shape(
    spec: &Spec,
    platforms: &Map<String, Value>,
    facts: &HostFacts,
    warnings: &mut Warnings,
) -> Result<VmShape, PlanError> {
    refuse_platforms(platforms, spec.linux().is_some(), warnings)?;
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let section = section(platforms.get("vm"))?;
    let annotations = annotations(spec.annotations().as_ref())?;
    let vcpus = annotations
        .vcpus
        .or(section.vcpus)
        .unwrap_or_else(|| vcpus(resources, facts));
    let memory_mib = match annotations.memory_mib.or(section.memory_mib) {
        Some(memory) => explicit_memory(memory, facts)?,
        None => memory(resources, facts)?,
    };
    Ok(VmShape {
        vcpus: u8::try_from(vcpus.clamp(1, MAX_VCPUS)).unwrap_or(1),
        memory_mib,
    })
}

/// Of a container without limits.
pub fn default_shape(facts: &HostFacts) -> VmShape {
    VmShape {
        vcpus: u8::try_from(vcpus(None, facts)).unwrap_or(1),
        memory_mib: DEFAULT_MEMORY_MIB.min(round_down(facts.memory_mib).max(MIN_MEMORY_MIB)),
    }
}

fn vcpus(resources: Option<&LinuxResources>, facts: &HostFacts) -> u32 {
    let most = facts.cpus.clamp(1, MAX_VCPUS);
    let Some(cpu) = resources.and_then(|resources| resources.cpu().as_ref()) else {
        return most.min(DEFAULT_VCPUS);
    };
    let pinned = cpu
        .cpus()
        .as_deref()
        .and_then(count_cpus)
        .unwrap_or(most)
        .clamp(1, most);
    let period = cpu
        .period()
        .filter(|period| *period != 0)
        .unwrap_or(100_000);
    match cpu.quota().and_then(|quota| u64::try_from(quota).ok()) {
        Some(quota) if quota > 0 => u32::try_from(quota.div_ceil(period))
            .unwrap_or(pinned)
            .clamp(1, pinned),
        _ => pinned.min(DEFAULT_VCPUS),
    }
}

fn memory(resources: Option<&LinuxResources>, facts: &HostFacts) -> Result<u64, PlanError> {
    let host = round_down(facts.memory_mib).max(MIN_MEMORY_MIB);
    let (field, limit) = memory_limit(resources);
    let Some(limit) = limit else {
        return Ok(DEFAULT_MEMORY_MIB.min(host));
    };
    if limit < MIN_LIMIT {
        return Err(invalid(
            field,
            format!(
                "{limit} bytes are too little to start a container, at least {} MiB are needed",
                MIN_LIMIT >> 20
            ),
        ));
    }
    // A limit above what the host has is kept in the guest, but no VM can be that large.
    let memory = limit.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB);
    Ok(round_up(memory.min(host)).clamp(MIN_MEMORY_MIB, host))
}

fn memory_limit(resources: Option<&LinuxResources>) -> (&'static str, Option<u64>) {
    let limit = resources
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit != 0);
    if limit.is_some() {
        return ("linux.resources.memory.limit", limit);
    }
    let unified = resources
        .and_then(|resources| resources.unified().as_ref())
        .and_then(|unified| unified.get("memory.max"))
        .and_then(|limit| limit.trim().parse().ok());
    ("linux.resources.unified[memory.max]", unified)
}

fn explicit_memory(memory: u64, facts: &HostFacts) -> Result<u64, PlanError> {
    let field = MEMORY_ANNOTATION;
    if memory < MIN_MEMORY_MIB {
        return Err(invalid(
            field,
            format!(
                "{memory} MiB are too little to start a VM, at least {MIN_MEMORY_MIB} are needed"
            ),
        ));
    }
    if memory > facts.memory_mib {
        return Err(invalid(
            field,
            format!(
                "{memory} MiB are more than the {} MiB of the host",
                facts.memory_mib
            ),
        ));
    }
    Ok(round_up(memory))
}

fn round_up(mib: u64) -> u64 {
    mib.next_multiple_of(GRANULARITY_MIB)
}

fn round_down(mib: u64) -> u64 {
    mib - mib % GRANULARITY_MIB
}

/// Our own annotations. One that does not exist is a misspelt one.
fn annotations(annotations: Option<&HashMap<String, String>>) -> Result<Wishes, PlanError> {
    let mut wishes = Wishes::default();
    for (key, value) in annotations.into_iter().flatten() {
        if !key.starts_with(ANNOTATION_PREFIX) {
            continue;
        }
        let field = || format!("annotations[{key}]");
        match key.as_str() {
            MEMORY_ANNOTATION => {
                let memory = value
                    .parse()
                    .map_err(|_| invalid(field(), format!("{value:?} is not a number of MiB")))?;
                wishes.memory_mib = Some(memory);
            }
            VCPUS_ANNOTATION => {
                let vcpus = value
                    .parse()
                    .ok()
                    .filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus))
                    .ok_or_else(|| {
                        invalid(
                            field(),
                            format!("{value:?} is not a number from 1 to {MAX_VCPUS}"),
                        )
                    })?;
                wishes.vcpus = Some(vcpus);
            }
            super::host::NETWORK_ANNOTATION => {}
            _ => return Err(unsupported(field(), "there is no such annotation")),
        }
    }
    Ok(wishes)
}

/// The `vm` section, config-vm.md of the specification. Files of the host that a VM would be made of
/// are the operator's to choose, not the bundle's.
fn section(vm: Option<&Value>) -> Result<Wishes, PlanError> {
    let mut wishes = Wishes::default();
    let Some(vm) = vm else {
        return Ok(wishes);
    };
    let vm = vm
        .as_object()
        .ok_or_else(|| invalid("vm", "is not an object"))?;
    for (name, value) in vm {
        match name.as_str() {
            // The text of the specification and its Go types spell it differently.
            "hwConfig" | "hwconfig" => hardware(value, &mut wishes)?,
            "hypervisor" | "kernel" | "image" if is_empty(value) => {}
            "hypervisor" => {
                return Err(unsupported(
                    "vm.hypervisor",
                    "this program is the hypervisor",
                ));
            }
            "kernel" => {
                return Err(unsupported(
                    "vm.kernel",
                    "the guest kernel is part of this program",
                ));
            }
            "image" => {
                return Err(unsupported(
                    "vm.image",
                    "the root file system is that of root.path",
                ));
            }
            _ => {}
        }
    }
    Ok(wishes)
}

fn hardware(value: &Value, wishes: &mut Wishes) -> Result<(), PlanError> {
    let hardware = value
        .as_object()
        .ok_or_else(|| invalid("vm.hwConfig", "is not an object"))?;
    for (name, value) in hardware {
        let field = format!("vm.hwConfig.{name}");
        match name.as_str() {
            _ if is_empty(value) => {}
            "vcpus" => {
                let vcpus = value
                    .as_u64()
                    .and_then(|vcpus| u32::try_from(vcpus).ok())
                    .filter(|vcpus| *vcpus <= MAX_VCPUS)
                    .ok_or_else(|| {
                        invalid(field, format!("is not a number from 1 to {MAX_VCPUS}"))
                    })?;
                wishes.vcpus = Some(vcpus);
            }
            "memory" => {
                let bytes = value
                    .as_u64()
                    .ok_or_else(|| invalid(field, "is not a number of bytes"))?;
                wishes.memory_mib = Some(bytes.div_ceil(1 << 20));
            }
            "deviceTree" | "dtdevs" | "iomems" | "irqs" => {
                return Err(unsupported(
                    field,
                    "hardware of the host is not given to VMs",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What Go writes for a value that was not set.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

fn refuse_platforms(
    platforms: &Map<String, Value>,
    linux: bool,
    warnings: &mut Warnings,
) -> Result<(), PlanError> {
    for name in platforms.keys().filter(|name| *name != "vm") {
        if !linux {
            return Err(unsupported(name, "only Linux containers can be run"));
        }
        warnings.ignored(name, "it is for another platform");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
