// SPDX-License-Identifier: Apache-2.0
//! startContainer hooks: programs of the image, run in the container by its init process.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use agent_protocol::{ErrorKind, Hook};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Result, error, reason};

/// How much of what a failing hook wrote is told.
const MAX_OUTPUT: usize = 1024;

pub(crate) fn run(hooks: &[Hook], state: &str) -> Result<()> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, state).map_err(|cause| {
            let message = format!("error running startContainer hook #{index}: {cause}");
            error(ErrorKind::System, message)
        })?;
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum HookError {
    #[error("{0}: {why}", why = reason(*.1))]
    System(&'static str, rustix::io::Errno),
    #[error("{path}: {why}")]
    Start { path: String, why: String },
    #[error("{path}: no end after {seconds} s")]
    Timeout { path: String, seconds: u32 },
    #[error("{how}, stderr: {stderr}")]
    Failed { how: String, stderr: String },
}

fn run_one(hook: &Hook, state: &str) -> std::result::Result<(), HookError> {
    // Files in memory: a hook that reads nothing or writes much cannot hold up the init process.
    let mut input = memory_file()?;
    let output = memory_file()?;
    let system = |cause: std::io::Error| {
        let errno = rustix::io::Errno::from_io_error(&cause).unwrap_or(rustix::io::Errno::IO);
        HookError::System("stdin", errno)
    };
    input.write_all(state.as_bytes()).map_err(system)?;
    input.seek(SeekFrom::Start(0)).map_err(system)?;
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    let environment = hook
        .env
        .iter()
        .filter_map(|variable| variable.split_once('='));
    let mut child = command
        .env_clear()
        .envs(environment)
        .stdin(Stdio::from(OwnedFd::from(input)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(OwnedFd::from(
            output.try_clone().map_err(system)?,
        )))
        .spawn()
        .map_err(|cause| HookError::Start {
            path: hook.path.clone(),
            why: reason(cause),
        })?;
    match wait(&mut child, hook.timeout)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(HookError::Failed {
            how: match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, signal) => format!("signal {}", signal.unwrap_or(0)),
            },
            stderr: written(&output),
        }),
        None => Err(HookError::Timeout {
            path: hook.path.clone(),
            seconds: hook.timeout.unwrap_or(0),
        }),
    }
}

/// None: it has not ended in time and was killed.
fn wait(
    child: &mut Child,
    timeout: Option<u32>,
) -> std::result::Result<Option<ExitStatus>, HookError> {
    let failed = |errno| HookError::System("wait", errno);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(failed(rustix::io::Errno::SRCH))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    let timeout = timeout.map(|seconds| Timespec {
        tv_sec: seconds.into(),
        tv_nsec: 0,
    });
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    let in_time = poll(&mut ended, timeout.as_ref()).map_err(failed)? > 0;
    let reaped = |cause: std::io::Error| {
        failed(rustix::io::Errno::from_io_error(&cause).unwrap_or(rustix::io::Errno::IO))
    };
    if !in_time {
        child.kill().map_err(reaped)?;
    }
    let status = child.wait().map_err(reaped)?;
    Ok(in_time.then_some(status))
}

fn memory_file() -> std::result::Result<File, HookError> {
    memfd_create("hook", MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|errno| HookError::System("memfd", errno))
}

fn written(output: &File) -> String {
    let mut buffer = [0; MAX_OUTPUT];
    let length = output.read_at(&mut buffer, 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&buffer[..length]);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
