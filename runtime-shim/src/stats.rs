// SPDX-License-Identifier: Apache-2.0
//! From the cgroup files of the guest to the statistics that `events` prints, in runc's form.
//!
//! The files come from the guest: what does not look like a number is left out.

use std::collections::BTreeMap;

use agent_protocol::Usage;
use serde_json::{Map, Value, json};

/// The `data` of a `stats` event.
pub fn stats(usage: &Usage) -> Value {
    let files: BTreeMap<&str, &str> = usage
        .files
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()))
        .collect();
    let files = Files(files);
    json!({
        "cpu": cpu(&files),
        "cpuset": {},
        "memory": memory(&files),
        "pids": {
            "current": files.number("pids.current").unwrap_or(0),
            "limit": files.number("pids.max").unwrap_or(0),
        },
        "blkio": block_io(&files),
        "hugetlb": huge_pages(&files),
        "intel_rdt": {},
        "network_interfaces": interfaces(&usage.network),
    })
}

struct Files<'a>(BTreeMap<&'a str, &'a str>);

impl Files<'_> {
    fn text(&self, name: &str) -> &str {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// A file with one number. `max` is none.
    fn number(&self, name: &str) -> Option<u64> {
        self.text(name).trim().parse().ok()
    }

    /// A file with a limit. No limit is the largest number.
    fn limit(&self, name: &str) -> u64 {
        self.number(name).unwrap_or(u64::MAX)
    }

    /// A file of lines with a name and a number.
    fn pairs(&self, name: &str) -> BTreeMap<&str, u64> {
        let pair = |line: &'_ str| -> Option<(usize, u64)> {
            let (key, value) = line.split_once(' ')?;
            Some((key.len(), value.trim().parse().ok()?))
        };
        self.text(name)
            .lines()
            .filter_map(|line| pair(line).map(|(length, value)| (&line[..length], value)))
            .collect()
    }
}

fn cpu(files: &Files<'_>) -> Value {
    let stat = files.pairs("cpu.stat");
    let get = |name: &str| stat.get(name).copied().unwrap_or(0);
    let nanoseconds = |name: &str| get(name).saturating_mul(1000);
    let mut cpu = json!({
        "usage": {
            "total": nanoseconds("usage_usec"),
            "kernel": nanoseconds("system_usec"),
            "user": nanoseconds("user_usec"),
        },
        "throttling": {
            "periods": get("nr_periods"),
            "throttledPeriods": get("nr_throttled"),
            "throttledTime": nanoseconds("throttled_usec"),
        },
    });
    add_pressure(&mut cpu, files.text("cpu.pressure"));
    cpu
}

fn memory(files: &Files<'_>) -> Value {
    let stat = files.pairs("memory.stat");
    let events = files.pairs("memory.events");
    let usage = files.number("memory.current").unwrap_or(0);
    let swap = files.number("memory.swap.current").unwrap_or(0);
    let limit = files.limit("memory.max");
    let mut memory = json!({
        "cache": stat.get("file").copied().unwrap_or(0),
        "usage": {
            "limit": limit,
            "usage": usage,
            "max": files.number("memory.peak").unwrap_or(0),
            "failcnt": events.get("max").copied().unwrap_or(0),
        },
        "swap": {
            "limit": limit.saturating_add(files.limit("memory.swap.max")),
            "usage": usage.saturating_add(swap),
            "failcnt": 0,
        },
        "kernel": { "limit": 0, "usage": stat.get("kernel").copied().unwrap_or(0), "failcnt": 0 },
        "kernelTCP": { "limit": 0, "usage": stat.get("sock").copied().unwrap_or(0), "failcnt": 0 },
        "raw": stat,
    });
    add_pressure(&mut memory, files.text("memory.pressure"));
    memory
}

/// Lines such as `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn block_io(files: &Files<'_>) -> Value {
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    for line in files.text("io.stat").lines() {
        let mut fields = line.split_whitespace();
        let device = fields.next().and_then(|device| device.split_once(':'));
        let Some((major, minor)) = device else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse::<u64>(), minor.parse::<u64>()) else {
            continue;
        };
        for field in fields {
            let Some((key, value)) = field.split_once('=') else {
                continue;
            };
            let Ok(value) = value.parse::<u64>() else {
                continue;
            };
            let (list, op) = match key {
                "rbytes" => (&mut bytes, "Read"),
                "wbytes" => (&mut bytes, "Write"),
                "rios" => (&mut operations, "Read"),
                "wios" => (&mut operations, "Write"),
                _ => continue,
            };
            list.push(json!({ "major": major, "minor": minor, "op": op, "value": value }));
        }
    }
    let mut block_io = json!({
        "ioServiceBytesRecursive": bytes,
        "ioServicedRecursive": operations,
    });
    add_pressure(&mut block_io, files.text("io.pressure"));
    block_io
}

/// Files such as `hugetlb.2MB.current`.
fn huge_pages(files: &Files<'_>) -> Value {
    let mut sizes = Map::new();
    for name in files.0.keys() {
        let Some(size) = name
            .strip_prefix("hugetlb.")
            .and_then(|name| name.strip_suffix(".current"))
        else {
            continue;
        };
        let events = files
            .pairs(&format!("hugetlb.{size}.events"))
            .get("max")
            .copied();
        let value = json!({
            "usage": files.number(name).unwrap_or(0),
            "failcnt": events.unwrap_or(0),
        });
        sizes.insert(size.to_owned(), value);
    }
    Value::Object(sizes)
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same with `full`.
fn add_pressure(value: &mut Value, text: &str) {
    let mut pressure = Map::new();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let Some(kind @ ("some" | "full")) = fields.next() else {
            continue;
        };
        let mut numbers = Map::new();
        for field in fields {
            let Some((key, number)) = field.split_once('=') else {
                continue;
            };
            if !["avg10", "avg60", "avg300", "total"].contains(&key) {
                continue;
            }
            let number = match number.parse::<u64>() {
                Ok(number) => Some(Value::from(number)),
                Err(_) => number.parse::<f64>().ok().map(Value::from),
            };
            numbers.extend(number.map(|number| (key.to_owned(), number)));
        }
        pressure.insert(kind.to_owned(), Value::Object(numbers));
    }
    if !pressure.is_empty()
        && let Some(object) = value.as_object_mut()
    {
        object.insert("psi".to_owned(), Value::Object(pressure));
    }
}

/// `/proc/net/dev`: eight counters for each direction.
fn interfaces(text: &str) -> Value {
    let mut interfaces = Vec::new();
    for line in text.lines() {
        let Some((name, counters)) = line.split_once(':') else {
            continue;
        };
        let numbers: Vec<u64> = counters
            .split_whitespace()
            .map_while(|number| number.parse().ok())
            .collect();
        let name = name.trim();
        // 15 characters is what Linux allows.
        if numbers.len() < 12 || name == "lo" || name.len() > 15 {
            continue;
        }
        interfaces.push(json!({
            "Name": name,
            "RxBytes": numbers[0],
            "RxPackets": numbers[1],
            "RxErrors": numbers[2],
            "RxDropped": numbers[3],
            "TxBytes": numbers[8],
            "TxPackets": numbers[9],
            "TxErrors": numbers[10],
            "TxDropped": numbers[11],
        }));
    }
    Value::Array(interfaces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(files: &[(&str, &str)], network: &str) -> Usage {
        Usage {
            files: files
                .iter()
                .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
                .collect(),
            network: network.to_owned(),
        }
    }

    #[test]
    fn files_become_numbers() {
        let network = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
                       eth0: 10 2 3 4 0 0 0 0 20 5 6 7 0 0 0 0\n";
        let stats = stats(&usage(
            &[
                (
                    "cpu.stat",
                    "usage_usec 7\nuser_usec 5\nsystem_usec 2\nnr_periods 3\n",
                ),
                (
                    "cpu.pressure",
                    "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\n",
                ),
                ("memory.current", "4096\n"),
                ("memory.max", "max\n"),
                ("memory.stat", "anon 1\nfile 2\n"),
                ("pids.current", "3\n"),
                ("pids.max", "9\n"),
                (
                    "io.stat",
                    "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
                ),
                ("hugetlb.2MB.current", "0\n"),
            ],
            network,
        ));
        assert_eq!(stats["cpu"]["usage"]["total"], 7000);
        assert_eq!(stats["cpu"]["psi"]["some"]["avg10"], 1.5);
        assert_eq!(stats["memory"]["usage"]["usage"], 4096);
        assert_eq!(stats["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(stats["memory"]["raw"]["file"], 2);
        assert_eq!(stats["pids"]["limit"], 9);
        assert_eq!(stats["blkio"]["ioServiceBytesRecursive"][1]["value"], 2);
        assert_eq!(stats["hugetlb"]["2MB"]["usage"], 0);
        let interfaces = stats["network_interfaces"].as_array().unwrap();
        assert_eq!(interfaces.len(), 1);
        assert_eq!(interfaces[0]["TxBytes"], 20);
    }

    #[test]
    fn nonsense_does_no_harm() {
        let stats = stats(&usage(
            &[
                (
                    "cpu.stat",
                    "usage_usec 99999999999999999999999\nuser_usec\n\u{1b} 18446744073709551615\n",
                ),
                ("memory.current", "-1"),
                ("io.stat", "x:y rbytes=z\n:::\n1:2 =\n"),
                ("memory.pressure", "some avg10=NaN total=-1\nfull"),
                ("hugetlb..current", ""),
            ],
            "a: 1 2\n:::\neth0: x",
        ));
        assert_eq!(stats["cpu"]["usage"]["total"], 0);
        assert_eq!(stats["memory"]["usage"]["usage"], 0);
        assert_eq!(stats["network_interfaces"], json!([]));
        serde_json::to_string(&stats).unwrap();
    }
}
