// SPDX-License-Identifier: Apache-2.0
//! `check --jail`: what the kernel says about the jail of a running container's monitor.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Error, print};
use crate::cli::TextFormat;
use crate::monitor::launch;
use crate::sandbox;
use crate::store::{self, Store};

/// SECCOMP_MODE_FILTER, linux/seccomp.h.
const FILTER: u64 = 2;

/// Namespaces that have to be the monitor's own; with root's privileges also that of pids. That of the network is the
/// container's.
const OWN: [&str; 5] = ["user", "mnt", "ipc", "uts", "cgroup"];

/// One thread, from its `status`.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Thread {
    tid: u32,
    name: String,
    /// 2: filtered.
    seccomp: u64,
    no_new_privileges: bool,
    /// Of the permitted, effective, inheritable and ambient sets together.
    capabilities: u64,
    /// Real, effective, saved and file system user.
    users: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Mount {
    target: String,
    options: Vec<String>,
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct File {
    number: u32,
    target: String,
}

/// All there is to see.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Facts {
    pid: i32,
    threads: Vec<Thread>,
    /// Whether they are another one's than the caller's, by kind.
    own_namespaces: BTreeMap<String, bool>,
    mounts: Vec<Mount>,
    files: Vec<File>,
    /// The hard limits, by the kernel's names.
    limits: BTreeMap<String, String>,
    dumpable: bool,
    environment: Vec<String>,
    /// Whether root is asking, and so has started the monitor.
    #[serde(skip)]
    by_root: bool,
}

/// One thing that has to hold.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    name: &'static str,
    holds: bool,
    /// What does not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    faults: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    holds: bool,
    findings: Vec<Finding>,
    #[serde(flatten)]
    facts: Facts,
}

/// Exit status 1 where something is not as it should be.
pub fn run(id: &str, format: TextFormat, store: &Store) -> Result<u8, Error> {
    let state = store.load(id)?;
    state.status().is_live()?;
    let facts = Facts::read(state.process.pid).map_err(Error::Jail)?;
    // Nothing of a process that has taken its place.
    state.status().is_live()?;
    let findings = facts.findings();
    let report = Report {
        holds: findings.iter().all(|finding| finding.holds),
        findings,
        facts,
    };
    let text = match format {
        TextFormat::Text => report.text(),
        TextFormat::Json => super::json(&report)?,
    };
    print(&text)?;
    Ok(u8::from(!report.holds))
}

impl Facts {
    fn read(pid: i32) -> io::Result<Facts> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let text = |name: &str| fs::read_to_string(process.join(name));
        let mut threads = Vec::new();
        for entry in fs::read_dir(process.join("task"))? {
            let status = fs::read_to_string(entry?.path().join("status"))?;
            threads.push(Thread::parse(&status));
        }
        threads.sort_by_key(|thread| thread.tid);
        let effective = threads.first().and_then(|thread| thread.users.get(1));
        Ok(Facts {
            pid,
            own_namespaces: namespaces(&process)?,
            mounts: text("mountinfo")?.lines().filter_map(mount).collect(),
            files: files(&process.join("fd"))?,
            limits: text("limits")?.lines().skip(1).filter_map(limit).collect(),
            // The files of a process that is not dumpable belong to root.
            dumpable: Some(&fs::metadata(process.join("environ"))?.uid()) == effective,
            environment: text("environ")?
                .split_terminator('\0')
                .map(str::to_owned)
                .collect(),
            threads,
            by_root: store::is_host_root(),
        })
    }

    fn findings(&self) -> Vec<Finding> {
        let threads = |is_wrong: &dyn Fn(&Thread) -> bool| -> Vec<String> {
            let wrong = self.threads.iter().filter(|thread| is_wrong(thread));
            wrong.map(Thread::to_string).collect()
        };
        let pid = self.by_root.then_some("pid");
        let namespaces = OWN.into_iter().chain(pid).filter(|kind| !self.is_own(kind));
        let mounts = self.mounts.iter().filter(|mount| !mount.is_confined());
        let devices = self.files.iter().filter(|file| file.target == "/dev/kvm");
        let limits = [("Max core file size", "0")];
        let limits = limits
            .iter()
            .filter(|(name, value)| self.limits.get(*name).map(String::as_str) != Some(*value));
        // What sets up the runtime itself is handed on, and says nothing of the operator.
        let variables = self.environment.iter().filter(|variable| {
            let name = variable.split('=').next().unwrap_or_default();
            !launch::HANDED_ON.contains(&name)
        });
        let dumpable = self.dumpable.then(|| "others may read its memory".into());
        vec![
            Finding::new(
                "seccomp filters",
                threads(&|thread| thread.seccomp != FILTER),
            ),
            Finding::new(
                "no new privileges",
                threads(&|thread| !thread.no_new_privileges),
            ),
            Finding::new(
                "capabilities",
                threads(&|thread| thread.capabilities & !thread.may_have() != 0),
            ),
            Finding::new("unprivileged user", threads(&Thread::is_root)),
            Finding::new(
                "own namespaces",
                namespaces
                    .map(|kind| format!("{kind} is the caller's"))
                    .collect(),
            ),
            Finding::new("root directory", mounts.map(Mount::to_string).collect()),
            Finding::new(
                "open files",
                devices
                    .map(|file| format!("{}: {}", file.number, file.target))
                    .collect(),
            ),
            Finding::new(
                "limits",
                limits
                    .map(|(name, value)| format!("{name} is not {value}"))
                    .collect(),
            ),
            Finding::new("not dumpable", dumpable.into_iter().collect()),
            Finding::new("empty environment", variables.cloned().collect()),
        ]
    }

    fn is_own(&self, kind: &str) -> bool {
        self.own_namespaces.get(kind).copied().unwrap_or(false)
    }
}

impl Finding {
    fn new(name: &'static str, faults: Vec<String>) -> Finding {
        Finding {
            name,
            holds: faults.is_empty(),
            faults,
        }
    }
}

impl Thread {
    /// `/proc/PID/task/TID/status`.
    fn parse(status: &str) -> Thread {
        let fields: BTreeMap<&str, &str> = status
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name, value.trim()))
            .collect();
        let field = |name: &str| fields.get(name).copied().unwrap_or_default();
        // What is missing counts as the worst.
        let set = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(u64::MAX);
        let sets = ["CapPrm", "CapEff", "CapInh", "CapAmb"];
        Thread {
            tid: field("Pid").parse().unwrap_or(0),
            name: field("Name").to_owned(),
            seccomp: field("Seccomp").parse().unwrap_or(0),
            no_new_privileges: field("NoNewPrivs") == "1",
            capabilities: sets.into_iter().map(set).fold(0, |all, set| all | set),
            users: field("Uid")
                .split_ascii_whitespace()
                .map(|user| user.parse().unwrap_or(0))
                .collect(),
        }
    }

    /// The user for access to files, which comes last, is for the file server that of the guest's process.
    fn is_root(&self) -> bool {
        let count = if self.may_have() == 0 { 4 } else { 3 };
        self.users.iter().take(count).any(|&user| user == 0)
    }

    /// The file server acts on files for all users of the guest; the others on nothing.
    fn may_have(&self) -> u64 {
        match self.name.starts_with("fs") {
            true => sandbox::capabilities(),
            false => 0,
        }
    }
}

impl std::fmt::Display for Thread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let user = self.users.first().copied().unwrap_or(0);
        let Thread {
            tid,
            name,
            seccomp,
            capabilities,
            ..
        } = self;
        let new = if self.no_new_privileges { "no" } else { "yes" };
        write!(
            f,
            "{tid} {name}: seccomp {seccomp}, new privileges {new}, capabilities {capabilities:#x}, user {user}"
        )
    }
}

impl Mount {
    /// The root is empty and stays so; nothing runs from the shares, and devices do nothing.
    fn is_confined(&self) -> bool {
        let has = |option: &str| self.options.iter().any(|other| other == option);
        let is_empty = self.target != "/" || (has("ro") && self.kind == "tmpfs");
        let is_inert = has("nosuid") && has("nodev") && has("noexec");
        is_empty && is_inert && self.kind != "proc" && self.kind != "sysfs"
    }
}

impl std::fmt::Display for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} {}",
            self.target,
            self.kind,
            self.options.join(",")
        )
    }
}

/// A line of mountinfo: proc_pid_mountinfo(5).
fn mount(line: &str) -> Option<Mount> {
    let (own, file_system) = line.split_once(" - ")?;
    let mut own = own.split(' ');
    let target = own.nth(4)?.to_owned();
    let options = own.next()?.split(',').map(str::to_owned).collect();
    let kind = file_system.split(' ').next()?.to_owned();
    Some(Mount {
        target,
        options,
        kind,
    })
}

/// A line of limits: name, soft limit, hard limit and unit in columns.
fn limit(line: &str) -> Option<(String, String)> {
    let (name, values) = line.split_at_checked(26)?;
    let hard = values.split_ascii_whitespace().nth(1)?;
    Some((name.trim().to_owned(), hard.to_owned()))
}

fn namespaces(process: &Path) -> io::Result<BTreeMap<String, bool>> {
    let kinds = OWN.into_iter().chain(["net", "pid"]);
    kinds
        .map(|kind| {
            let theirs = fs::read_link(process.join("ns").join(kind))?;
            let own = fs::read_link(Path::new("/proc/self/ns").join(kind))?;
            Ok((kind.to_owned(), theirs != own))
        })
        .collect()
}

fn files(directory: &Path) -> io::Result<Vec<File>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // Closed again meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        files.push(File {
            number: entry.file_name().to_string_lossy().parse().unwrap_or(0),
            target: target.to_string_lossy().into_owned(),
        });
    }
    files.sort_by_key(|file| file.number);
    Ok(files)
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let verdict = if finding.holds { "ok" } else { "FAILED" };
            text.push_str(&format!("{:<18} {verdict}\n", finding.name));
            for fault in &finding.faults {
                text.push_str(&format!("{:<18} {}\n", "", printable(fault)));
            }
        }
        let facts = &self.facts;
        let mut section = |title: &str, lines: Vec<String>| {
            text.push_str(&format!("\n{title}\n"));
            for line in lines {
                text.push_str(&format!("  {}\n", printable(&line)));
            }
        };
        section("threads", lines(&facts.threads));
        let whose = |(kind, own): (&String, &bool)| match own {
            true => format!("{kind}: own"),
            false => format!("{kind}: the caller's"),
        };
        section(
            "namespaces",
            facts.own_namespaces.iter().map(whose).collect(),
        );
        section("mounts", lines(&facts.mounts));
        let file = |file: &File| format!("{} {}", file.number, file.target);
        section("open files", facts.files.iter().map(file).collect());
        let limit = |(name, value): (&String, &String)| format!("{name}: {value}");
        section("hard limits", facts.limits.iter().map(limit).collect());
        text
    }
}

fn lines<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(T::to_string).collect()
}

/// File names may be the container's.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tvcpu0\nPid:\t7\nUid:\t5\t5\t5\t5\nNoNewPrivs:\t1\nSeccomp:\t2\n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
        CapAmb:\t0000000000000000\n";

    fn jailed() -> Facts {
        let root = "1 0 0:1 / / ro,nosuid,nodev,noexec,relatime - tmpfs none ro,size=1m";
        let share = "2 1 8:1 /c /rootfs rw,nosuid,nodev,noexec shared:1 - ext4 /dev/sda1 rw";
        let limits = "Max core file size        0                    0                    bytes\n\
                      Max processes             0                    0                    processes";
        Facts {
            threads: vec![Thread::parse(STATUS)],
            own_namespaces: OWN.map(|kind| (kind.to_owned(), true)).into(),
            mounts: [root, share].into_iter().filter_map(mount).collect(),
            limits: limits.lines().filter_map(limit).collect(),
            ..Facts::default()
        }
    }

    fn faults(facts: &Facts) -> Vec<&'static str> {
        let findings = facts.findings().into_iter();
        findings
            .filter(|finding| !finding.holds)
            .map(|finding| finding.name)
            .collect()
    }

    #[test]
    fn a_jail_that_holds() {
        assert_eq!(faults(&jailed()), [""; 0]);
    }

    #[test]
    fn each_hole_is_found() {
        let thread = |from: &str, to: &str| Facts {
            threads: vec![Thread::parse(&STATUS.replace(from, to))],
            ..jailed()
        };
        let cases = [
            (thread("Seccomp:\t2", "Seccomp:\t0"), "seccomp filters"),
            (thread("Seccomp", "Other"), "seccomp filters"),
            (
                thread("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
                "no new privileges",
            ),
            (thread("CapEff:\t00", "CapEff:\t01"), "capabilities"),
            (thread("CapAmb", "Other"), "capabilities"),
            (thread("5\t5\n", "5\t0\n"), "unprivileged user"),
            (
                Facts {
                    own_namespaces: BTreeMap::new(),
                    ..jailed()
                },
                "own namespaces",
            ),
            (
                Facts {
                    by_root: true,
                    ..jailed()
                },
                "own namespaces",
            ),
            (
                Facts {
                    mounts: vec![mount("1 0 0:1 / / rw,relatime - ext4 /dev/sda1 rw").unwrap()],
                    ..jailed()
                },
                "root directory",
            ),
            (
                Facts {
                    files: vec![File {
                        number: 3,
                        target: "/dev/kvm".into(),
                    }],
                    ..jailed()
                },
                "open files",
            ),
            (
                Facts {
                    limits: BTreeMap::new(),
                    ..jailed()
                },
                "limits",
            ),
            (
                Facts {
                    dumpable: true,
                    ..jailed()
                },
                "not dumpable",
            ),
            (
                Facts {
                    environment: vec!["A=b".into()],
                    ..jailed()
                },
                "empty environment",
            ),
        ];
        for (facts, name) in cases {
            assert_eq!(faults(&facts), [name]);
        }
    }
}
