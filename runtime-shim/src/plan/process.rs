// SPDX-License-Identifier: Apache-2.0
//! `process`: of config.json, and of exec.

use std::collections::HashSet;

use agent_protocol::{Capabilities, IoPriority, Process, Rlimit, Scheduler, WindowSize};
use oci_spec::runtime::{
    self as oci, IOPriorityClass, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    PosixRlimitType,
};

use super::{PlanError, Warnings, invalid, seccomp, unsupported};

/// Linux allows a fourth of the stack limit for both together, 2 MiB by default.
const MAX_ARGUMENTS: usize = 2 << 20;

/// `CAP_*` in the order of their numbers, linux/capability.h.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The number of a capability, with or without `CAP_`, in any case.
pub fn capability(name: &str) -> Option<u8> {
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = CAPABILITIES.iter().position(|known| *known == name)?;
    u8::try_from(number).ok()
}

/// The names of all capabilities, for `features`.
pub fn capability_names() -> impl Iterator<Item = String> {
    CAPABILITIES.iter().map(|name| format!("CAP_{name}"))
}

/// Which process of a container this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Init,
    Exec,
}

/// What a process takes from `linux`: its filter and its personality.
pub fn process(
    process: &oci::Process,
    linux: Option<&oci::Linux>,
    role: Role,
    vcpus: Option<u8>,
    warnings: &mut Warnings,
) -> Result<Process, PlanError> {
    let args = process.args().clone().unwrap_or_default();
    let env = process.env().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args", "must not be empty"));
    }
    let length: usize = args.iter().chain(&env).map(|text| text.len() + 1).sum();
    if length > MAX_ARGUMENTS {
        return Err(invalid(
            "process.args, process.env",
            format!("longer than {MAX_ARGUMENTS} bytes together"),
        ));
    }
    if process.command_line().is_some() {
        warnings.ignored("process.commandLine", "it is for Windows");
    }
    let cwd = process.cwd().to_string_lossy().into_owned();
    if !cwd.starts_with('/') {
        return Err(invalid(
            "process.cwd",
            "Cwd property must be an absolute path",
        ));
    }
    if set(process.apparmor_profile()) {
        warnings.ignored(
            "process.apparmorProfile",
            "the guest kernel has no AppArmor",
        );
    }
    if set(process.selinux_label()) {
        warnings.ignored("process.selinuxLabel", "the guest kernel has no SELinux");
    }
    let user = process.user();
    if set(user.username()) {
        warnings.ignored("process.user.username", "it is for Windows");
    }
    let seccomp = match linux.and_then(|linux| linux.seccomp().as_ref()) {
        Some(profile) => seccomp::filter(profile)?,
        None => None,
    };
    let (affinity_initial, affinity_final) = match role {
        Role::Init => (None, None),
        Role::Exec => affinity(process, vcpus)?,
    };
    Ok(Process {
        args,
        env,
        cwd,
        terminal: terminal(process),
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: umask(user)?,
        capabilities: capabilities(process),
        rlimits: rlimits(process)?,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: oom_score_adj(process)?,
        seccomp,
        scheduler: scheduler(process)?,
        io_priority: io_priority(process)?,
        personality: personality(linux)?,
        affinity_initial,
        affinity_final,
    })
}

fn set(text: &Option<String>) -> bool {
    text.as_ref().is_some_and(|text| !text.is_empty())
}

fn terminal(process: &oci::Process) -> Option<WindowSize> {
    let side = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
    process.terminal().unwrap_or(false).then(|| {
        process
            .console_size()
            .map(|size| WindowSize {
                rows: side(size.height()),
                columns: side(size.width()),
            })
            .unwrap_or_default()
    })
}

fn umask(user: &oci::User) -> Result<Option<u32>, PlanError> {
    match user.umask() {
        Some(umask) if umask > 0o777 => Err(invalid(
            "process.user.umask",
            format!("{umask:#o} is more than 0777"),
        )),
        umask => Ok(umask),
    }
}

fn capabilities(process: &oci::Process) -> Capabilities {
    let bits = |names: &Option<HashSet<oci::Capability>>| {
        names
            .iter()
            .flatten()
            .filter_map(|name| capability(&name.to_string()))
            .fold(0u64, |bits, number| bits | 1 << number)
    };
    let Some(sets) = process.capabilities() else {
        return Capabilities::default();
    };
    Capabilities {
        bounding: bits(sets.bounding()),
        effective: bits(sets.effective()),
        inheritable: bits(sets.inheritable()),
        permitted: bits(sets.permitted()),
        ambient: bits(sets.ambient()),
    }
}

fn rlimits(process: &oci::Process) -> Result<Vec<Rlimit>, PlanError> {
    let mut seen = HashSet::new();
    let mut limits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let name = limit.typ();
        let resource = resource(name);
        if !seen.insert(resource) {
            return Err(invalid("process.rlimits", format!("{name} occurs twice")));
        }
        if limit.soft() > limit.hard() {
            return Err(invalid(
                "process.rlimits",
                format!(
                    "{name}: soft limit {} is above hard limit {}",
                    limit.soft(),
                    limit.hard()
                ),
            ));
        }
        limits.push(Rlimit {
            resource,
            soft: limit.soft(),
            hard: limit.hard(),
        });
    }
    Ok(limits)
}

pub fn resource(limit: PosixRlimitType) -> u32 {
    match limit {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

pub fn oom_score_adj(process: &oci::Process) -> Result<Option<i32>, PlanError> {
    match process.oom_score_adj() {
        Some(score) if !(-1000..=1000).contains(&score) => Err(invalid(
            "process.oomScoreAdj",
            format!("{score} is not in -1000 to 1000"),
        )),
        score => Ok(score),
    }
}

/// Numbers of linux/sched.h.
fn scheduler(process: &oci::Process) -> Result<Option<Scheduler>, PlanError> {
    let Some(scheduler) = process.scheduler() else {
        return Ok(None);
    };
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(unsupported(
                "process.scheduler.policy",
                "Linux has no SCHED_ISO",
            ));
        }
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(invalid(
            "process.scheduler.nice",
            format!("{nice} is not in -20 to 19"),
        ));
    }
    let priority = u32::try_from(scheduler.priority().unwrap_or(0))
        .ok()
        .filter(|priority| *priority < 100)
        .ok_or_else(|| invalid("process.scheduler.priority", "is not in 0 to 99"))?;
    Ok(Some(Scheduler {
        policy,
        flags,
        nice,
        priority,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    }))
}

/// Classes of linux/ioprio.h.
fn io_priority(process: &oci::Process) -> Result<Option<IoPriority>, PlanError> {
    let Some(priority) = process.io_priority() else {
        return Ok(None);
    };
    let level = u8::try_from(priority.priority())
        .ok()
        .filter(|level| *level < 8)
        .ok_or_else(|| {
            invalid(
                "process.ioPriority.priority",
                format!("{} is not in 0 to 7", priority.priority()),
            )
        })?;
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    Ok(Some(IoPriority { class, level }))
}

/// Numbers of linux/personality.h.
fn personality(linux: Option<&oci::Linux>) -> Result<Option<u64>, PlanError> {
    let Some(personality) = linux.and_then(|linux| linux.personality().as_ref()) else {
        return Ok(None);
    };
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(unsupported(
            "linux.personality.flags",
            "the specification defines none",
        ));
    }
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

type Affinity = (Option<String>, Option<String>);

fn affinity(process: &oci::Process, vcpus: Option<u8>) -> Result<Affinity, PlanError> {
    let Some(affinity) = process.exec_cpu_affinity() else {
        return Ok((None, None));
    };
    let list = |name: &str, list: &Option<String>| {
        let Some(list) = list.as_ref().filter(|list| !list.is_empty()) else {
            return Ok(None);
        };
        let field = format!("process.execCPUAffinity.{name}");
        let last = last_cpu(list)
            .ok_or_else(|| invalid(field.clone(), format!("{list:?} is not a list of CPUs")))?;
        match vcpus {
            Some(vcpus) if last >= u32::from(vcpus) => Err(invalid(
                field,
                format!("there is no CPU {last}, the VM has {vcpus}"),
            )),
            _ => Ok(Some(list.clone())),
        }
    };
    Ok((
        list("initial", affinity.initial())?,
        list("final", affinity.cpu_affinity_final())?,
    ))
}

/// The highest number in a list such as `0-2,4`. None if it is not one.
pub fn last_cpu(list: &str) -> Option<u32> {
    let mut last = 0;
    for part in list.split(',') {
        let part = part.trim();
        let (first, end) = part.split_once('-').unwrap_or((part, part));
        let (first, end): (u32, u32) = (first.parse().ok()?, end.parse().ok()?);
        if first > end {
            return None;
        }
        last = last.max(end);
    }
    Some(last)
}

/// How many CPUs a list has. None if it is not one.
pub fn count_cpus(list: &str) -> Option<u32> {
    last_cpu(list)?;
    let mut cpus = HashSet::new();
    for part in list.split(',') {
        let part = part.trim();
        let (first, end) = part.split_once('-').unwrap_or((part, part));
        let (first, end): (u32, u32) = (first.parse().ok()?, end.parse().ok()?);
        // More than any host has.
        if end - first > 8192 || cpus.len() > 8192 {
            return None;
        }
        cpus.extend(first..=end);
    }
    u32::try_from(cpus.len()).ok()
}
