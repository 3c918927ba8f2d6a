// SPDX-License-Identifier: Apache-2.0
//! The monitor's cgroup on the host: one directory in the unified hierarchy, or in each of the legacy
//! ones, or both where the host has both.
//!
//! Engines read statistics and out-of-memory events there. With systemd's form of path the directory
//! is where systemd would have it, but systemd is not told.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::plan::{
    CgroupLocation, CpuQuota, HostLimits, IoThrottle, Limit, ThrottleKind, io_weight,
    weight_of_shares,
};

/// How deep containers can have nested cgroups of their own below the monitor's.
const MAX_DEPTH: u32 = 32;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("{0}")]
    Detect(&'static str, #[source] io::Error),
    #[error("no cgroup file system is mounted")]
    NotMounted,
    #[error("cgroup {path}: {operation}", path = .path.display())]
    Io {
        path: PathBuf,
        operation: &'static str,
        source: io::Error,
    },
    #[error("cgroup limit {file}: the host has no such file in {path}", path = .path.display())]
    NoLimit { path: PathBuf, file: String },
    #[error("cgroup limit {file} = {value:?}")]
    Limit {
        file: String,
        value: String,
        source: io::Error,
    },
    #[error("cgroup {path}: processes are still running", path = .0.display())]
    Busy(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// v2 alone.
    Unified,
    /// Controllers in v1 hierarchies, beside a v2 tree.
    Hybrid,
    Legacy,
}

/// Where cgroup file systems are mounted, and where this process is in each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies(Vec<Hierarchy>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// Empty: the unified one.
    controllers: Vec<String>,
    /// This process's own cgroup, relative to the mount.
    own: PathBuf,
}

impl Hierarchies {
    pub fn detect() -> Result<Hierarchies, CgroupError> {
        let read =
            |path| fs::read_to_string(path).map_err(|error| CgroupError::Detect(path, error));
        let found = Hierarchies::parse(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
        if found.0.is_empty() {
            return Err(CgroupError::NotMounted);
        }
        Ok(found)
    }

    pub fn mode(&self) -> Mode {
        let unified = self.0.iter().any(|h| h.controllers.is_empty());
        let legacy = self.0.iter().any(|h| !h.controllers.is_empty());
        match (unified, legacy) {
            (true, false) => Mode::Unified,
            (true, true) => Mode::Hybrid,
            _ => Mode::Legacy,
        }
    }

    /// The mount point of the first hierarchy, to try out what is allowed.
    pub fn mount_point(&self) -> Option<&Path> {
        self.0.first().map(|hierarchy| hierarchy.mount.as_path())
    }

    fn parse(mountinfo: &str, own: &str) -> Hierarchies {
        let mut found: Vec<Hierarchy> = Vec::new();
        for line in mountinfo.lines() {
            let Some((front, back)) = line.split_once(" - ") else {
                continue;
            };
            let mut front = front.split(' ').skip(3);
            let (Some(root), Some(mount)) = (front.next(), front.next()) else {
                continue;
            };
            let mut back = back.split(' ');
            let kind = back.next().unwrap_or_default();
            let options = back.nth(1).unwrap_or_default();
            let controllers: Vec<String> = match kind {
                "cgroup2" => Vec::new(),
                "cgroup" => controllers(options, own),
                _ => continue,
            };
            if kind == "cgroup" && controllers.is_empty() {
                continue;
            }
            // Mounted again elsewhere: the first one counts.
            if found.iter().any(|h| h.controllers == controllers) {
                continue;
            }
            let own = own_path(own, &controllers);
            // In a container the mount shows a part of the hierarchy only.
            let own = own.strip_prefix(unescape(root)).unwrap_or(&own).to_owned();
            found.push(Hierarchy {
                mount: PathBuf::from(unescape(mount)),
                controllers,
                own: relative(&own).to_owned(),
            });
        }
        Hierarchies(found)
    }

    /// The directories of a container, whether they exist or not.
    fn directories(&self, location: &CgroupLocation, user: bool) -> Vec<PathBuf> {
        self.0
            .iter()
            .filter_map(|hierarchy| hierarchy.directory(location, user))
            .collect()
    }
}

/// The controllers among a v1 mount's options: those that `/proc/self/cgroup` lists.
fn controllers(options: &str, own: &str) -> Vec<String> {
    let known: Vec<&str> = own
        .lines()
        .filter_map(|line| line.split(':').nth(1))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .collect();
    let mut controllers: Vec<String> = options
        .split(',')
        .filter(|option| known.contains(option))
        .map(str::to_owned)
        .collect();
    controllers.sort();
    controllers
}

fn own_path(own: &str, controllers: &[String]) -> PathBuf {
    own.lines()
        .find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, names, path) = (fields.next()?, fields.next()?, fields.next()?);
            let matches = match controllers.first() {
                None => names.is_empty(),
                Some(first) => names.split(',').any(|name| name == first),
            };
            matches.then(|| PathBuf::from(path))
        })
        .unwrap_or_else(|| PathBuf::from("/"))
}

/// mountinfo writes blanks and backslashes as octal numbers.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

impl Hierarchy {
    fn directory(&self, location: &CgroupLocation, user: bool) -> Option<PathBuf> {
        match location {
            CgroupLocation::Unchanged => None,
            CgroupLocation::Path(path) if path.is_absolute() => {
                Some(self.mount.join(relative(path)))
            }
            // As in runc: the own cgroup has processes in it and so cannot pass controllers on.
            CgroupLocation::Path(path) => {
                let parent = self.own.parent().unwrap_or(Path::new(""));
                Some(self.mount.join(parent).join(path))
            }
            CgroupLocation::Systemd {
                slice,
                prefix,
                name,
            } => {
                let base = if user {
                    user_service(&self.own)
                } else {
                    PathBuf::new()
                };
                let default = if user { "user.slice" } else { "system.slice" };
                let slice = if slice.is_empty() { default } else { slice };
                let unit = match (prefix.as_str(), name.ends_with(".slice")) {
                    (_, true) => name.clone(),
                    ("", false) => format!("{name}.scope"),
                    (prefix, false) => format!("{prefix}-{name}.scope"),
                };
                Some(self.mount.join(base).join(expand_slice(slice)).join(unit))
            }
        }
    }
}

/// The cgroup of the user's service manager that this process is below.
fn user_service(own: &Path) -> PathBuf {
    let mut base = PathBuf::new();
    for component in own.components() {
        base.push(component);
        let name = component.as_os_str().to_string_lossy();
        if name.starts_with("user@") && name.ends_with(".service") {
            return base;
        }
    }
    PathBuf::new()
}

/// `a-b.slice` is below `a.slice`.
fn expand_slice(slice: &str) -> PathBuf {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    if stem == "-" {
        return path;
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    path
}

/// The directories of one container. Those that were made are removed on drop, until it is kept.
#[derive(Debug)]
pub struct Cgroup {
    directories: Vec<PathBuf>,
    made: Vec<PathBuf>,
}

impl Cgroup {
    /// The directories that [`Cgroup::create`] will make or find.
    pub fn planned(hierarchies: &Hierarchies, location: &CgroupLocation) -> Vec<PathBuf> {
        hierarchies.directories(location, !crate::store::is_host_root())
    }

    pub fn create(
        hierarchies: &Hierarchies,
        location: &CgroupLocation,
    ) -> Result<Cgroup, CgroupError> {
        let mut cgroup = Cgroup {
            directories: Self::planned(hierarchies, location),
            made: Vec::new(),
        };
        for (directory, hierarchy) in cgroup.directories.iter().zip(&hierarchies.0) {
            make(&hierarchy.mount, directory, &mut cgroup.made)?;
        }
        Ok(cgroup)
    }

    /// Of a container that exists: the paths of [`Cgroup::paths`].
    pub fn open(directories: Vec<PathBuf>) -> Cgroup {
        Cgroup {
            directories,
            made: Vec::new(),
        }
    }

    pub fn paths(&self) -> &[PathBuf] {
        &self.directories
    }

    /// The container has come into being: its cgroup stays.
    pub fn keep(&mut self) {
        self.made.clear();
    }

    /// Moves a process here. Its children to come are here too.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for directory in &self.directories {
            fs::write(directory.join("cgroup.procs"), pid.to_string())
                .map_err(|source| failed(directory, "move the process", source))?;
        }
        Ok(())
    }

    pub fn set(&self, limits: &HostLimits) -> Result<(), CgroupError> {
        let unified = |directory: &&PathBuf| is_unified(directory);
        if let Some(directory) = self.directories.iter().find(unified)
            && self.directories.len() == 1
        {
            return set_unified(directory, limits);
        }
        let legacy: Vec<&PathBuf> = self.directories.iter().filter(|d| !is_unified(d)).collect();
        for setting in legacy_settings(limits) {
            set_in_any(&legacy, &setting)?;
        }
        Ok(())
    }

    /// Ends all processes here and waits until they are gone.
    pub fn kill(&self, deadline: Instant) -> Result<(), CgroupError> {
        for directory in &self.directories {
            // The kernel's own way reaches processes that fork meanwhile.
            let _ = fs::write(directory.join("cgroup.kill"), "1");
            let mut found = Vec::new();
            collect_processes(directory, MAX_DEPTH, &mut found);
            for (place, pid) in found {
                end(&place, pid, deadline).map_err(|error| match error {
                    Errno::TIMEDOUT => CgroupError::Busy(directory.clone()),
                    error => failed(directory, "end a process", error.into()),
                })?;
            }
        }
        Ok(())
    }

    /// Removes the directories, and what a container made below them. They have no processes.
    pub fn delete(mut self, deadline: Instant) -> Result<(), CgroupError> {
        self.made.clear();
        for directory in &self.directories {
            remove(directory, MAX_DEPTH, deadline)?;
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in self.made.iter().rev() {
            let deadline = Instant::now() + Duration::from_secs(2);
            if let Err(error) = remove(directory, 1, deadline) {
                log::warn!("{error}");
            }
        }
    }
}

fn failed(path: &Path, operation: &'static str, source: io::Error) -> CgroupError {
    CgroupError::Io {
        path: path.to_owned(),
        operation,
        source,
    }
}

fn is_unified(directory: &Path) -> bool {
    directory.join("cgroup.controllers").exists()
}

/// Makes a directory below a mount point, with the controllers of its parents passed on to it.
fn make(mount: &Path, directory: &Path, made: &mut Vec<PathBuf>) -> Result<(), CgroupError> {
    let below = directory.strip_prefix(mount).unwrap_or(Path::new(""));
    let mut path = mount.to_owned();
    for component in below.components() {
        if is_unified(&path) {
            pass_on_controllers(&path);
        }
        path.push(component);
        match fs::create_dir(&path) {
            Ok(()) => made.push(path.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&path, "create", error)),
        }
        inherit_cpuset(&path);
    }
    Ok(())
}

/// Each by itself: one that cannot be passed on is only missed by a limit that needs it, and that
/// failure names its file.
fn pass_on_controllers(directory: &Path) {
    let Ok(available) = fs::read_to_string(directory.join("cgroup.controllers")) else {
        return;
    };
    let control = directory.join("cgroup.subtree_control");
    let active = fs::read_to_string(&control).unwrap_or_default();
    let active: Vec<&str> = active.split_whitespace().collect();
    for controller in available
        .split_whitespace()
        .filter(|name| !active.contains(name))
    {
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            log::debug!(
                "cgroup {}: controller {controller}: {error}",
                directory.display()
            );
        }
    }
}

/// A new cpuset of v1 is empty and takes no processes.
fn inherit_cpuset(directory: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = directory.join(file);
        if fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty())
            && !is_unified(directory)
            && let Some(parent) = directory.parent()
            && let Ok(text) = fs::read_to_string(parent.join(file))
            && let Err(error) = fs::write(&own, text.trim())
        {
            log::debug!("cgroup {}: {error}", own.display());
        }
    }
}

/// Alternatives in the order to try: kernels have one file or the other.
type Setting = Vec<(&'static str, String)>;

fn text(limit: Limit) -> String {
    match limit {
        Limit::Unlimited => "max".to_owned(),
        Limit::Value(value) => value.to_string(),
    }
}

fn unified_settings(limits: &HostLimits) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    let mut add = |file: &'static str, value: String| settings.push(vec![(file, value)]);
    if let Some(limit) = limits.memory_max {
        add("memory.max", text(limit));
    }
    if let Some(bytes) = limits.memory_low {
        add("memory.low", bytes.to_string());
    }
    if let Some(limit) = limits.memory_swap_max {
        add("memory.swap.max", text(limit));
    }
    if limits.cpu_idle {
        add("cpu.idle", "1".to_owned());
    } else if let Some(shares) = limits.cpu_shares {
        add("cpu.weight", weight_of_shares(shares).to_string());
    }
    if let Some(CpuQuota {
        quota,
        period,
        burst,
    }) = limits.cpu_quota
    {
        add("cpu.max", format!("{} {period}", text(quota)));
        if let Some(burst) = burst {
            add("cpu.max.burst", burst.to_string());
        }
    }
    if let Some(cpus) = &limits.cpuset_cpus {
        add("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = &limits.cpuset_mems {
        add("cpuset.mems", mems.clone());
    }
    for throttle in &limits.io_throttle {
        add("io.max", io_max(throttle));
    }
    if let Some(weight) = limits.io_weight {
        settings.push(vec![
            ("io.bfq.weight", weight.to_string()),
            ("io.weight", format!("default {}", io_weight(weight))),
        ]);
    }
    settings
}

fn io_max(throttle: &IoThrottle) -> String {
    let key = match throttle.kind {
        ThrottleKind::ReadBytes => "rbps",
        ThrottleKind::WriteBytes => "wbps",
        ThrottleKind::ReadOperations => "riops",
        ThrottleKind::WriteOperations => "wiops",
    };
    let rate = match throttle.rate {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    format!("{}:{} {key}={rate}", throttle.major, throttle.minor)
}

fn legacy_settings(limits: &HostLimits) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    let mut add = |file: &'static str, value: String| settings.push(vec![(file, value)]);
    let text = |limit| match limit {
        Limit::Unlimited => "-1".to_owned(),
        Limit::Value(value) => value.to_string(),
    };
    if let Some(limit) = limits.memory_max {
        add("memory.limit_in_bytes", text(limit));
    }
    if let Some(bytes) = limits.memory_low {
        add("memory.soft_limit_in_bytes", bytes.to_string());
    }
    match (limits.memory_max, limits.memory_swap_max) {
        // v1 counts both together.
        (Some(Limit::Value(memory)), Some(Limit::Value(swap))) => {
            add(
                "memory.memsw.limit_in_bytes",
                memory.saturating_add(swap).to_string(),
            );
        }
        (_, Some(Limit::Unlimited)) => add("memory.memsw.limit_in_bytes", "-1".to_owned()),
        _ => {}
    }
    if limits.cpu_idle {
        add("cpu.idle", "1".to_owned());
    } else if let Some(shares) = limits.cpu_shares {
        add("cpu.shares", shares.to_string());
    }
    if let Some(CpuQuota {
        quota,
        period,
        burst,
    }) = limits.cpu_quota
    {
        add("cpu.cfs_period_us", period.to_string());
        add("cpu.cfs_quota_us", text(quota));
        if let Some(burst) = burst {
            add("cpu.cfs_burst_us", burst.to_string());
        }
    }
    if let Some(cpus) = &limits.cpuset_cpus {
        add("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = &limits.cpuset_mems {
        add("cpuset.mems", mems.clone());
    }
    for throttle in &limits.io_throttle {
        let file = match throttle.kind {
            ThrottleKind::ReadBytes => "blkio.throttle.read_bps_device",
            ThrottleKind::WriteBytes => "blkio.throttle.write_bps_device",
            ThrottleKind::ReadOperations => "blkio.throttle.read_iops_device",
            ThrottleKind::WriteOperations => "blkio.throttle.write_iops_device",
        };
        add(
            file,
            format!("{}:{} {}", throttle.major, throttle.minor, throttle.rate),
        );
    }
    if let Some(weight) = limits.io_weight {
        settings.push(vec![
            ("blkio.bfq.weight", weight.to_string()),
            ("blkio.weight", weight.to_string()),
        ]);
    }
    settings
}

fn set_unified(directory: &PathBuf, limits: &HostLimits) -> Result<(), CgroupError> {
    for setting in unified_settings(limits) {
        set_in_any(&[directory], &setting)?;
    }
    Ok(())
}

/// Writes to the first file of the setting that exists in a directory.
fn set_in_any(directories: &[&PathBuf], setting: &Setting) -> Result<(), CgroupError> {
    for (file, value) in setting {
        for directory in directories {
            let path = directory.join(file);
            if !path.exists() {
                continue;
            }
            return fs::write(&path, value).map_err(|source| CgroupError::Limit {
                file: (*file).to_owned(),
                value: value.clone(),
                source,
            });
        }
    }
    Err(CgroupError::NoLimit {
        path: directories
            .first()
            .map(|d| d.to_path_buf())
            .unwrap_or_default(),
        file: setting
            .last()
            .map(|(file, _)| (*file).to_owned())
            .unwrap_or_default(),
    })
}

fn processes(directory: &Path) -> Vec<i32> {
    let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    procs.lines().filter_map(|line| line.parse().ok()).collect()
}

fn collect_processes(directory: &Path, depth: u32, found: &mut Vec<(PathBuf, i32)>) {
    found.extend(
        processes(directory)
            .into_iter()
            .map(|pid| (directory.to_owned(), pid)),
    );
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for child in children(directory) {
        collect_processes(&child, depth, found);
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// The pid was in the cgroup a moment ago; that it has been reused since for a stranger is excluded
/// by looking again with its pidfd in hand.
fn end(place: &Path, pid: i32, deadline: Instant) -> Result<(), Errno> {
    let Some(raw) = Pid::from_raw(pid) else {
        return Ok(());
    };
    let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error),
    };
    if !processes(place).contains(&pid) {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => return Err(error),
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn remove(directory: &Path, depth: u32, deadline: Instant) -> Result<(), CgroupError> {
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(failed(directory, "remove", error)),
        }
        if let Some(depth) = depth.checked_sub(1) {
            for child in children(directory) {
                remove(&child, depth, deadline)?;
            }
        }
        match fs::remove_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            _ => continue,
        }
        if Instant::now() >= deadline {
            return Err(CgroupError::Busy(directory.to_owned()));
        }
        await_change(directory);
    }
}

/// An ended process leaves its cgroup a moment after it can be waited for. v2 tells when; for v1, and
/// for a notice that came before the wait, the wait is bounded.
fn await_change(directory: &Path) {
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: 10_000_000,
    };
    let events = fs::File::open(directory.join("cgroup.events")).ok();
    let mut fds: Vec<PollFd> = events
        .iter()
        .map(|events| PollFd::new(events, PollFlags::PRI))
        .collect();
    // Interrupted or not: the caller looks again.
    let _ = poll(&mut fds, Some(&pause));
}

#[cfg(test)]
mod tests;
