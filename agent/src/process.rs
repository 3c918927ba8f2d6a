// SPDX-License-Identifier: Apache-2.0
//! What makes a process of a container out of a fresh child: session, streams, credentials,
//! capabilities, seccomp, program.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use agent_protocol::{Capabilities, ErrorKind, Process};
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, accessat, stat};
use rustix::io::Errno;
use rustix::process::{Pid, chdir, getcwd, setsid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, CpuSet, Gid, Uid, sched_setaffinity, set_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::channel::Upward;
use crate::error::{Result, Stage, error, reason, refused};
use crate::syscalls;

/// Limits of open files where the plan has none: the kernel's own soft limit, which select(2) can
/// live with, and room to raise it.
const DEFAULT_FILES: (u64, u64) = (1024, 512 << 10);

const DEFAULT_UMASK: u32 = 0o022;

/// A filter with this flag returns a descriptor, which no container could be given.
const SECCOMP_FILTER_FLAG_NEW_LISTENER: u64 = 1 << 3;

/// The streams of a child before it has its own.
#[derive(Debug)]
pub(crate) enum ChildStdio {
    Streams([OwnedFd; 3]),
    /// To be made in the container.
    Terminal,
}

/// Detaches a fresh child from the agent: of the agent's descriptors it keeps those named.
pub(crate) fn begin(upward: &Upward, stdio: ChildStdio, keep: &[RawFd]) -> Result<()> {
    if let ChildStdio::Streams(streams) = stdio {
        set_streams(streams.each_ref()).stage("stdio")?;
        // Closed below, with everything else.
        std::mem::forget(streams);
    }
    let mut keep = keep.to_vec();
    keep.push(upward.as_raw_fd());
    syscalls::close_others(&mut keep).stage("close descriptors")?;
    syscalls::reset_signals().stage("signals")?;
    setsid().stage("session")?;
    umask(Mode::empty());
    Ok(())
}

/// Makes these the standard streams.
pub(crate) fn set_streams([stdin, stdout, stderr]: [&OwnedFd; 3]) -> rustix::io::Result<()> {
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)
}

/// The part of a process that the agent sets from outside, since it may need privileges that a user
/// namespace does not have.
pub(crate) fn set_limits(pid: Pid, process: &Process) -> Result<()> {
    // The agent's own value must not be inherited.
    let score = process.oom_score_adj.unwrap_or(0);
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .field("process.oomScoreAdj")?;
    let (soft, hard) = DEFAULT_FILES;
    syscalls::set_resource_limit(pid, libc::RLIMIT_NOFILE, soft, hard).stage("RLIMIT_NOFILE")?;
    for (index, limit) in process.rlimits.iter().enumerate() {
        syscalls::set_resource_limit(pid, limit.resource, limit.soft, limit.hard)
            .field(format_args!("process.rlimits[{index}]"))?;
    }
    if let Some(scheduler) = &process.scheduler {
        syscalls::set_scheduler(pid, scheduler).field("process.scheduler")?;
    }
    if let Some(priority) = process.io_priority {
        syscalls::set_io_priority(pid, priority.class, priority.level)
            .field("process.ioPriority")?;
    }
    // The child is born in its cgroup: what it was pinned to before the move is what it is pinned to
    // after it, unless that is said.
    if let Some(list) = process
        .affinity_final
        .as_ref()
        .or(process.affinity_initial.as_ref())
    {
        let cpus = parse_cpus(list)
            .ok_or_else(|| refused(format!("process.execCPUAffinity: {list:?}: invalid list")))?;
        sched_setaffinity(Some(pid), &cpus).field("process.execCPUAffinity")?;
    }
    Ok(())
}

/// `0-2,4`.
fn parse_cpus(list: &str) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    for range in list.split(',').map(str::trim) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        (first..=last).for_each(|cpu| cpus.set(cpu));
    }
    Some(cpus)
}

/// A program that only has to be executed.
#[derive(Debug)]
pub(crate) struct Program {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

/// Turns the calling process into the user that the plan names, and finds its program as that user.
pub(crate) fn become_user(process: &Process) -> Result<Program> {
    if let Some(personality) = process.personality {
        syscalls::set_personality(personality).field("process.personality")?;
    }
    umask(Mode::from_raw_mode(
        process.umask.unwrap_or(DEFAULT_UMASK) & 0o7777,
    ));
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).field("process.noNewPrivileges")?;
    } else {
        // Without no_new_privs only a privileged process may install a filter, so it has to be now.
        install_seccomp(process)?;
    }
    let environment = environment(process)?;
    // First as root, who may reach a directory that the user may not; as runc does.
    let cwd = if process.cwd.is_empty() {
        "/"
    } else {
        &process.cwd
    };
    let entered = match chdir(cwd) {
        Ok(()) => true,
        Err(Errno::ACCESS | Errno::PERM) => false,
        Err(errno) => return Err(cwd_error(cwd, errno)),
    };
    set_user(process)?;
    if !entered {
        chdir(cwd).map_err(|errno| cwd_error(cwd, errno))?;
    }
    // A directory outside of the container's root has no path in it.
    match getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().starts_with(b"/") => {}
        _ => return Err(cwd_error(cwd, Errno::NOENT)),
    }
    set_capability_sets(process.capabilities)?;
    Ok(Program {
        path: find_executable(process)?,
        arguments: strings("process.args", &process.args)?,
        environment,
    })
}

fn cwd_error(cwd: &str, errno: Errno) -> agent_protocol::AgentError {
    let why = reason(errno);
    refused(format!(
        "chdir to cwd ({cwd:?}) set in config.json failed: {why}"
    ))
}

fn environment(process: &Process) -> Result<Vec<CString>> {
    let mut environment = strings("process.env", &process.env)?;
    if !process.env.iter().any(|variable| {
        variable
            .strip_prefix("HOME=")
            .is_some_and(|home| !home.is_empty())
    }) {
        let home = crate::passwd::home(process.uid).unwrap_or_else(|| "/".into());
        environment.retain(|variable| variable.as_bytes() != b"HOME=");
        environment.extend(strings("HOME", &[format!("HOME={home}")])?);
    }
    Ok(environment)
}

fn strings(field: &str, strings: &[String]) -> Result<Vec<CString>> {
    strings
        .iter()
        .map(|string| CString::new(string.as_str()))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| refused(format!("{field}: contains a nul byte")))
}

fn set_user(process: &Process) -> Result<()> {
    keep_capabilities(true)?;
    drop_bounding(process.capabilities.bounding)?;
    let gid = Gid::from_raw(process.gid);
    let groups: Vec<Gid> = process
        .additional_gids
        .iter()
        .copied()
        .map(Gid::from_raw)
        .collect();
    set_thread_groups(&groups).field("process.user.additionalGids")?;
    set_thread_res_gid(gid, gid, gid).field("process.user.gid")?;
    let uid = Uid::from_raw(process.uid);
    set_thread_res_uid(uid, uid, uid).field("process.user.uid")?;
    keep_capabilities(false)
}

/// Makes the calling process root of the user namespace it is in, where that has a root.
pub(crate) fn become_namespace_root(has_root: bool) -> Result<()> {
    if !has_root {
        return Ok(());
    }
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    set_thread_groups(&[]).stage("user namespace: groups")?;
    set_thread_res_gid(gid, gid, gid).stage("user namespace: gid")?;
    set_thread_res_uid(uid, uid, uid).stage("user namespace: uid")
}

fn keep_capabilities(keep: bool) -> Result<()> {
    rustix::thread::set_keep_capabilities(keep).stage("process.capabilities: keep")
}

fn drop_bounding(bounding: u64) -> Result<()> {
    for capability in 0..u64::BITS {
        if bounding >> capability & 1 == 1 {
            continue;
        }
        match syscalls::process_control(libc::PR_CAPBSET_DROP, capability.into(), 0) {
            Ok(()) => {}
            // One past the last that the kernel knows.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno).field("process.capabilities.bounding"),
        }
    }
    Ok(())
}

fn set_capability_sets(capabilities: Capabilities) -> Result<()> {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(capabilities.effective),
        permitted: CapabilitySet::from_bits_retain(capabilities.permitted),
        inheritable: CapabilitySet::from_bits_retain(capabilities.inheritable),
    };
    set_capabilities(None, sets).field("process.capabilities")?;
    const AMBIENT: libc::c_int = libc::PR_CAP_AMBIENT;
    syscalls::process_control(AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)
        .field("process.capabilities.ambient")?;
    // As with runc, an ambient capability that is not permitted and inheritable is none.
    let ambient = capabilities.ambient & capabilities.permitted & capabilities.inheritable;
    for capability in (0..u64::BITS).filter(|capability| ambient >> capability & 1 == 1) {
        match syscalls::process_control(
            AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE as u64,
            capability.into(),
        ) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno).field("process.capabilities.ambient"),
        }
    }
    Ok(())
}

fn install_seccomp(process: &Process) -> Result<()> {
    let Some(seccomp) = &process.seccomp else {
        return Ok(());
    };
    if seccomp.flags & SECCOMP_FILTER_FLAG_NEW_LISTENER != 0 {
        return Err(refused("seccomp.flags: a listener is not supported"));
    }
    syscalls::set_seccomp_filter(&seccomp.program, seccomp.flags).field("seccomp")
}

impl Program {
    /// The last step: with the filter in place nothing but the exec is left to do.
    pub(crate) fn execute(&self, process: &Process) -> Result<std::convert::Infallible> {
        syscalls::close_on_exec().stage("close descriptors")?;
        if process.no_new_privileges {
            install_seccomp(process)?;
        }
        let errno = syscalls::execute(&self.path, &self.arguments, &self.environment);
        let kind = match errno {
            Errno::NOENT | Errno::NOTDIR => ErrorKind::ExecutableNotFound,
            _ => ErrorKind::ExecutableRefused,
        };
        let path = self.path.to_string_lossy();
        Err(error(kind, format!("exec {path}: {}", reason(errno))))
    }
}

/// Looks args[0] up as runc does, with PATH of the process, and in its words.
fn find_executable(process: &Process) -> Result<CString> {
    let name = process
        .args
        .first()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| refused("process.args: empty"))?;
    let found = if name.contains('/') {
        check_executable(name)
            .map(|()| name.clone())
            .map_err(|why| match why {
                Refusal::Missing(errno) => error(
                    ErrorKind::ExecutableNotFound,
                    format!("exec: {name:?}: stat {name}: {}", reason(errno)),
                ),
                Refusal::NotExecutable(errno) => error(
                    ErrorKind::ExecutableRefused,
                    format!("exec: {name:?}: {}", reason(errno)),
                ),
            })?
    } else {
        let path = process
            .env
            .iter()
            .rev()
            .find_map(|variable| variable.strip_prefix("PATH="));
        path.unwrap_or_default()
            .split(':')
            .map(|directory| match directory {
                "" => format!("./{name}"),
                directory => format!("{directory}/{name}"),
            })
            .find(|candidate| check_executable(candidate).is_ok())
            .ok_or_else(|| {
                let message = format!("exec: {name:?}: executable file not found in $PATH");
                error(ErrorKind::ExecutableNotFound, message)
            })?
    };
    CString::new(found).map_err(|_| refused("process.args: contains a nul byte"))
}

enum Refusal {
    Missing(Errno),
    NotExecutable(Errno),
}

fn check_executable(path: &str) -> std::result::Result<(), Refusal> {
    let found = stat(path).map_err(|errno| match errno {
        Errno::NOENT | Errno::NOTDIR => Refusal::Missing(errno),
        _ => Refusal::NotExecutable(errno),
    })?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        return Err(Refusal::NotExecutable(Errno::ISDIR));
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(Refusal::NotExecutable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        let owned = |strings: &[&str]| strings.iter().map(|&string| string.into()).collect();
        Process {
            args: owned(args),
            env: owned(env),
            cwd: "/".into(),
            terminal: None,
            uid: 0,
            gid: 0,
            additional_gids: vec![],
            umask: None,
            capabilities: Capabilities::default(),
            rlimits: vec![],
            no_new_privileges: false,
            oom_score_adj: None,
            seccomp: None,
            scheduler: None,
            io_priority: None,
            personality: None,
            affinity_initial: None,
            affinity_final: None,
        }
    }

    #[test]
    fn cpu_lists() {
        let set = parse_cpus("0-2, 4").unwrap();
        let cpus: Vec<_> = (0..8).filter(|&cpu| set.is_set(cpu)).collect();
        assert_eq!(cpus, [0, 1, 2, 4]);
        for list in ["", "3-1", "a", "0-99999", "-1"] {
            assert!(parse_cpus(list).is_none(), "{list:?}");
        }
    }

    #[test]
    fn executables_are_found_or_refused_in_the_words_of_runc() {
        use ErrorKind::{ExecutableNotFound, ExecutableRefused, Plan};
        let path = "PATH=/nowhere:/bin";
        assert_eq!(
            find_executable(&process(&["sh"], &[path]))
                .unwrap()
                .as_bytes(),
            b"/bin/sh"
        );
        for (args, env, kind, message) in [
            (
                &["nosuch"][..],
                &[path][..],
                ExecutableNotFound,
                "exec: \"nosuch\": executable file not found in $PATH",
            ),
            (
                &["sh"],
                &[],
                ExecutableNotFound,
                "exec: \"sh\": executable file not found in $PATH",
            ),
            (
                &["/x/y"],
                &[path],
                ExecutableNotFound,
                "exec: \"/x/y\": stat /x/y: no such file or directory",
            ),
            (
                &["/etc"],
                &[path],
                ExecutableRefused,
                "exec: \"/etc\": is a directory",
            ),
            (
                &["/etc/passwd"],
                &[path],
                ExecutableRefused,
                "exec: \"/etc/passwd\": permission denied",
            ),
            (&[], &[path], Plan, "process.args: empty"),
            (&[""], &[path], Plan, "process.args: empty"),
        ] {
            let refusal = find_executable(&process(args, env)).unwrap_err();
            assert_eq!((refusal.kind, refusal.message.as_str()), (kind, message));
        }
    }

    #[test]
    fn home_is_kept_or_found() {
        let has = |env: &[&str]| {
            environment(&process(&[], env))
                .unwrap()
                .into_iter()
                .filter(|variable| variable.as_bytes().starts_with(b"HOME="))
                .collect::<Vec<_>>()
        };
        assert_eq!(has(&["HOME=/x"]), [c"HOME=/x".to_owned()]);
        assert_eq!(has(&["HOME="]).len(), 1);
        assert_ne!(has(&[]), [c"HOME=".to_owned()]);
    }
}
