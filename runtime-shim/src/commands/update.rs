// SPDX-License-Identifier: Apache-2.0
//! `update`: new limits for a running container, in the guest and on the host.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Error, live};
use crate::cgroup::Cgroup;
use crate::cli::Update;
use crate::control::{self, Reply, Request};
use crate::plan;
use crate::store::Store;

/// Engines send some hundred bytes.
const MAX_RESOURCES: u64 = 1 << 20;

/// Settings that only make sense together: who changes one keeps the others.
const TOGETHER: [(&str, &[&str]); 2] = [
    ("cpu", &["quota", "period", "burst"]),
    ("memory", &["limit", "swap"]),
];

pub fn run(store: &Store, arguments: &Update) -> Result<u8, Error> {
    let container = store.lock(&arguments.id)?;
    let state = container.load()?;
    state.status().is_live()?;
    let changes = match &arguments.resources {
        Some(path) => read(path)?,
        None => from_options(arguments)?,
    };
    let mut config: Value =
        serde_json::from_slice(&store.config(&arguments.id)?).map_err(Error::ResourcesJson)?;
    let before = config["linux"]["resources"].take();
    let resources: LinuxResources =
        serde_json::from_value(complete(&changes, &before)).map_err(Error::ResourcesJson)?;
    let (guest, host, warnings) = plan::plan_update(&resources, state.vm)?;
    for warning in warnings {
        log::warn!("{warning}");
    }
    let mut monitor = live::connect(store, &arguments.id)?;
    if let Some(limit) = checked_limit(&resources) {
        check_memory(monitor.ask(&Request::Usage, live::guest_deadline())?, limit)?;
        monitor = live::connect(store, &arguments.id)?;
    }
    // The guest first: it has to fit into what the host allows.
    monitor.command(&Request::Update(guest), live::guest_deadline())?;
    if !state.cgroups.is_empty() {
        Cgroup::open(state.cgroups.clone()).set(&host)?;
    }
    config["linux"]["resources"] = merge(before, changes);
    let text = serde_json::to_vec(&config).map_err(Error::ResourcesJson)?;
    container.save_config(&text)?;
    Ok(0)
}

/// The memory limit that `checkBeforeUpdate` wants to be above what is used.
fn checked_limit(resources: &LinuxResources) -> Option<u64> {
    let memory = resources.memory().as_ref()?;
    let checked = memory.check_before_update().unwrap_or(false);
    let limit = u64::try_from(memory.limit()?).ok()?;
    (checked && limit != 0).then_some(limit)
}

/// In runc's words.
fn check_memory(usage: Reply, limit: u64) -> Result<(), Error> {
    let Reply::Usage(usage) = usage else {
        return Err(control::Error::OutOfTurn.into());
    };
    let current = usage
        .files
        .iter()
        .find(|(name, _)| name == "memory.current");
    match current.and_then(|(_, text)| text.trim().parse().ok()) {
        Some(used) if used >= limit => Err(Error::MemoryInUse { limit, used }),
        _ => Ok(()),
    }
}

/// Device rules are not updated: engines send those of the container along.
fn read(path: &Path) -> Result<Value, Error> {
    let fail = |error| Error::Resources(path.to_owned(), error);
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        io::stdin()
            .lock()
            .take(MAX_RESOURCES)
            .read_to_end(&mut text)
    } else {
        File::open(path).and_then(|file| file.take(MAX_RESOURCES).read_to_end(&mut text))
    };
    read.map_err(fail)?;
    let mut changes: Value = serde_json::from_slice(&text).map_err(Error::ResourcesJson)?;
    if let Some(changes) = changes.as_object_mut() {
        changes.remove("devices");
    }
    Ok(without_nulls(changes))
}

fn from_options(options: &Update) -> Result<Value, Error> {
    if options.l3_cache_schema.is_some() || options.mem_bw_schema.is_some() {
        return Err(Error::Unsupported("update of Intel RDT"));
    }
    if options.kernel_memory.is_some() || options.kernel_memory_tcp.is_some() {
        log::warn!("kernel memory limits are obsolete and ignored");
    }
    Ok(without_nulls(json!({
        "cpu": {
            "quota": options.cpu_quota,
            "period": options.cpu_period,
            "burst": options.cpu_burst,
            "shares": options.cpu_share,
            "realtimePeriod": options.cpu_rt_period,
            "realtimeRuntime": options.cpu_rt_runtime,
            "cpus": options.cpuset_cpus,
            "mems": options.cpuset_mems,
            "idle": options.cpu_idle,
        },
        "memory": {
            "limit": options.memory,
            "reservation": options.memory_reservation,
            "swap": options.memory_swap,
        },
        "pids": options.pids_limit.map(|limit| json!({ "limit": limit })),
        "blockIO": options.blkio_weight.map(|weight| json!({ "weight": weight })),
    })))
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| (name, without_nulls(value)))
                .filter(|(_, value)| value.as_object().is_none_or(|fields| !fields.is_empty()))
                .collect(),
        ),
        value => value,
    }
}

/// The changes, with what belongs to them as it was before.
fn complete(changes: &Value, before: &Value) -> Value {
    let mut complete = changes.clone();
    for (section, names) in TOGETHER {
        let Some(fields) = complete.get_mut(section).and_then(Value::as_object_mut) else {
            continue;
        };
        if !names.iter().any(|name| fields.contains_key(*name)) {
            continue;
        }
        for name in names {
            let value = &before[section][*name];
            if !fields.contains_key(*name) && !value.is_null() {
                fields.insert((*name).to_owned(), value.clone());
            }
        }
    }
    complete
}

fn merge(before: Value, changes: Value) -> Value {
    match (before, changes) {
        (Value::Object(before), Value::Object(changes)) => {
            let mut merged: Map<String, Value> = before;
            for (name, change) in changes {
                let old = merged.remove(&name).unwrap_or(Value::Null);
                merged.insert(name, merge(old, change));
            }
            Value::Object(merged)
        }
        (_, changes) => changes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_together_stays_together() {
        let before = json!({
            "cpu": { "quota": 5000, "period": 10000, "shares": 7 },
            "memory": { "limit": 100, "swap": 200, "reservation": 50 },
        });
        let completed = complete(&json!({ "cpu": { "quota": 1 } }), &before);
        assert_eq!(completed, json!({ "cpu": { "quota": 1, "period": 10000 } }));
        let completed = complete(&json!({ "cpu": { "shares": 1 } }), &before);
        assert_eq!(completed, json!({ "cpu": { "shares": 1 } }));
        let completed = complete(&json!({ "memory": { "swap": 300 } }), &Value::Null);
        assert_eq!(completed, json!({ "memory": { "swap": 300 } }));
    }

    #[test]
    fn changes_are_merged_into_the_configuration() {
        let before = json!({ "cpu": { "quota": 1, "shares": 2 }, "devices": [1] });
        let changes = json!({ "cpu": { "quota": 3 }, "pids": { "limit": 4 } });
        assert_eq!(
            merge(before, changes),
            json!({ "cpu": { "quota": 3, "shares": 2 }, "devices": [1], "pids": { "limit": 4 } })
        );
        assert_eq!(merge(Value::Null, json!({ "a": 1 })), json!({ "a": 1 }));
    }

    #[test]
    fn a_limit_below_what_is_used_is_rejected_if_asked() {
        let limit = |text: &str| checked_limit(&serde_json::from_str(text).unwrap());
        assert_eq!(limit(r#"{"memory": {"limit": 5}}"#), None);
        assert_eq!(
            limit(r#"{"memory": {"limit": 5, "checkBeforeUpdate": true}}"#),
            Some(5)
        );
        assert_eq!(
            limit(r#"{"memory": {"limit": -1, "checkBeforeUpdate": true}}"#),
            None
        );
        let usage = || {
            Reply::Usage(Box::new(agent_protocol::Usage {
                files: vec![("memory.current".into(), "100\n".into())],
                network: String::new(),
            }))
        };
        assert!(check_memory(usage(), 101).is_ok());
        let error = check_memory(usage(), 100).unwrap_err().to_string();
        assert!(
            error.contains("rejecting memory limit 100 <= usage 100"),
            "{error}"
        );
    }

    #[test]
    fn options_that_are_not_given_change_nothing() {
        assert_eq!(from_options(&Update::default()).unwrap(), json!({}));
        let options = Update {
            cpu_quota: Some(-1),
            ..Update::default()
        };
        assert_eq!(
            from_options(&options).unwrap(),
            json!({ "cpu": { "quota": -1 } })
        );
    }
}
