// SPDX-License-Identifier: Apache-2.0
//! The cgroup (version 2) of a container.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use agent_protocol::{CgroupPlan, ErrorKind};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::error::{Result, Stage, error, reason, refused};

/// What is read for [`agent_protocol::Usage`], beside `hugetlb.*`.
const USAGE_FILES: [&str; 18] = [
    "cpu.max",
    "cpu.pressure",
    "cpu.stat",
    "cpu.weight",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.events",
    "memory.swap.max",
    "pids.current",
    "pids.max",
    "pids.peak",
];

/// No file of a cgroup that is passed on is larger.
const MAX_USAGE_FILE: u64 = 64 << 10;

/// Nested cgroups that are walked, at most: a container can make as many as it likes.
const MAX_NESTED: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    pub(crate) events: fs::File,
    /// Absent where the memory controller is.
    pub(crate) memory_events: Option<fs::File>,
    oom_kills: u64,
    device_program: Option<OwnedFd>,
}

/// `cgroup.events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Events {
    pub(crate) populated: bool,
    pub(crate) frozen: bool,
}

/// Lets the cgroups below `root` use every controller there is.
pub(crate) fn enable_controllers(root: &Path) -> std::io::Result<()> {
    let enable: String = fs::read_to_string(root.join("cgroup.controllers"))?
        .split_whitespace()
        .map(|controller| format!("+{controller} "))
        .collect();
    if enable.is_empty() {
        return Ok(());
    }
    fs::write(root.join("cgroup.subtree_control"), enable)
}

impl Cgroup {
    pub(crate) fn create(root: &Path, container: &str) -> Result<Cgroup> {
        let path = root.join(container);
        fs::create_dir(&path).stage("cgroup")?;
        let opened = || -> std::io::Result<Cgroup> {
            let memory_events = match fs::File::open(path.join("memory.events")) {
                Ok(file) => Some(file),
                Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok(Cgroup {
                directory: open(&path, flags, Mode::empty())?,
                events: fs::File::open(path.join("cgroup.events"))?,
                memory_events,
                oom_kills: 0,
                device_program: None,
                path: path.clone(),
            })
        };
        opened().stage("cgroup").inspect_err(|_| {
            // Empty and just made: nothing else can be done about it if that fails.
            let _ = fs::remove_dir(&path);
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn write(&self, file: &str, value: &str) -> rustix::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&self.directory, file, flags, Mode::empty())?;
        match rustix::io::write(file, value.as_bytes())? {
            length if length == value.len() => Ok(()),
            _ => Err(Errno::IO),
        }
    }

    /// Writes the files in order and attaches the device program.
    pub(crate) fn apply(&mut self, plan: &CgroupPlan) -> Result<()> {
        for (file, value) in &plan.files {
            if file.is_empty() || file.contains(['/', '\0']) || file.starts_with("..") {
                return Err(refused(format!("cgroup: {file:?}: invalid file name")));
            }
            self.write(file, value).map_err(|errno| {
                let value = value.trim_end();
                refused(match errno {
                    Errno::NOENT => format!("cgroup: {file}: {}", reason(errno)),
                    _ => format!("cgroup: {file}: write {value:?}: {}", reason(errno)),
                })
            })?;
        }
        if let Some(program) = &plan.device_program {
            let program =
                crate::syscalls::load_device_program(program).field("cgroup: device program")?;
            crate::syscalls::attach_device_program(
                self.directory.as_fd(),
                program.as_fd(),
                self.device_program.as_ref().map(AsFd::as_fd),
            )
            .stage("cgroup: device program: attach")?;
            self.device_program = Some(program);
        }
        Ok(())
    }

    /// Lets root of the container's user namespace manage its cgroup, as with runc.
    pub(crate) fn delegate(&self, uid: u32) -> Result<()> {
        let owner = Some(rustix::fs::Uid::from_raw(uid));
        for file in [
            "",
            "cgroup.procs",
            "cgroup.subtree_control",
            "cgroup.threads",
        ] {
            rustix::fs::chown(self.path.join(file), owner, None).stage("cgroup: delegate")?;
        }
        Ok(())
    }

    /// Whether the container has given controllers to cgroups below its own.
    pub(crate) fn is_divided(&self) -> bool {
        let enabled = fs::read(self.path.join("cgroup.subtree_control"));
        enabled.is_ok_and(|enabled| !enabled.trim_ascii().is_empty())
    }

    /// The cgroup of the init process: that is where further processes are born when the container has
    /// divided its own, which then cannot have processes any more.
    pub(crate) fn of_init(&self, init: Pid) -> Result<OwnedFd> {
        let membership = fs::read_to_string(format!("/proc/{init}/cgroup")).stage("cgroup")?;
        let mut components = membership
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .map(Path::new)
            .unwrap_or(Path::new(""))
            .components();
        let own = self.path.file_name();
        components.find(|component| Some(component.as_os_str()) == own);
        let rest = components.as_path();
        if rest.components().any(|name| name == Component::ParentDir) {
            return Err(error(
                ErrorKind::System,
                "cgroup: the init process has left it",
            ));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(self.path.join(rest), flags, Mode::empty()).stage("cgroup")
    }

    pub(crate) fn events(&self) -> Events {
        let text = read_again(&self.events);
        Events {
            populated: value(&text, "populated") == Some(1),
            frozen: value(&text, "frozen") == Some(1),
        }
    }

    /// Whether the kernel has killed for lack of memory since this was asked last.
    pub(crate) fn was_out_of_memory(&mut self) -> bool {
        let Some(file) = &self.memory_events else {
            return false;
        };
        let kills = value(&read_again(file), "oom_kill").unwrap_or(0);
        let more = kills > self.oom_kills;
        self.oom_kills = kills;
        more
    }

    pub(crate) fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)
            .stage("cgroup: cgroup.freeze")
    }

    /// Kills every process, also in nested cgroups and frozen ones.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1").stage("cgroup: cgroup.kill")
    }

    /// The pids of all processes, also in nested cgroups.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut pids = BTreeSet::new();
        for directory in self.nested() {
            // A threaded cgroup does not list its processes; its parent does.
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        pids.remove(&0);
        pids.into_iter().collect()
    }

    /// The cgroup and those below it, parents first.
    fn nested(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = found.get(next).cloned() {
            next += 1;
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let directories =
                entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            let room = MAX_NESTED.saturating_sub(found.len());
            found.extend(directories.map(|entry| entry.path()).take(room));
        }
        found
    }

    pub(crate) fn usage(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let mut files = Vec::new();
        for entry in entries {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if !USAGE_FILES.contains(&name.as_str()) && !name.starts_with("hugetlb.") {
                continue;
            }
            let mut text = String::new();
            // Some files can be listed but not read, such as pressure when it is turned off.
            if let Ok(file) = fs::File::open(entry.path())
                && file.take(MAX_USAGE_FILE).read_to_string(&mut text).is_ok()
            {
                files.push((name, text));
            }
        }
        files.sort();
        files
    }

    /// Removes the cgroup and those below it, once no process is left.
    pub(crate) fn remove(&self) -> Result<()> {
        for directory in self.nested().iter().rev() {
            fs::remove_dir(directory).stage("cgroup: remove")?;
        }
        Ok(())
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Reading from the start is also what acknowledges the change that was polled.
fn read_again(file: &fs::File) -> String {
    let mut buffer = [0; 512];
    let length = file.read_at(&mut buffer, 0).unwrap_or(0);
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// A number of a flat keyed file.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_files() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "kill"), None);
        assert_eq!(value("populated x\n", "populated"), None);
    }
}
