// SPDX-License-Identifier: Apache-2.0
//! Runs the hooks that are the host's: the OCI state on their stdin, a deadline where one is set.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use agent_protocol::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// How much of the end of a hook's output goes into the error.
const MAX_OUTPUT: usize = 4096;

#[derive(Debug, thiserror::Error)]
#[error("error running {kind} hook #{index}")]
pub struct HookError {
    kind: &'static str,
    index: usize,
    #[source]
    cause: HookCause,
}

#[derive(Debug, thiserror::Error)]
pub enum HookCause {
    #[error("{path}")]
    Start { path: String, source: io::Error },
    #[error("state cannot be passed")]
    State(#[source] io::Error),
    #[error("cannot be waited for")]
    Wait(#[source] io::Error),
    #[error("still running after {0} seconds")]
    Timeout(u32),
    #[error("{status}, output: {output:?}")]
    Failed { status: ExitStatus, output: String },
}

/// What all hooks of a container have in common.
#[derive(Debug)]
pub struct Environment<'a> {
    /// The OCI state as JSON.
    pub state: &'a str,
    /// The working directory: the bundle.
    pub directory: &'a Path,
    /// Hooks of the container's namespaces run in this network namespace.
    pub network: Option<BorrowedFd<'a>>,
}

/// Runs hooks in order. The first that fails ends it.
pub fn run(kind: &'static str, hooks: &[Hook], environment: &Environment) -> Result<(), HookError> {
    for (index, hook) in hooks.iter().enumerate() {
        log::debug!("running {kind} hook #{index}: {}", hook.path);
        run_one(hook, environment).map_err(|cause| HookError { kind, index, cause })?;
    }
    Ok(())
}

/// Runs hooks in order, also those after one that failed.
pub fn run_all(kind: &'static str, hooks: &[Hook], environment: &Environment) -> Vec<HookError> {
    hooks
        .iter()
        .enumerate()
        .filter_map(|(index, hook)| {
            let cause = run_one(hook, environment).err()?;
            Some(HookError { kind, index, cause })
        })
        .collect()
}

fn run_one(hook: &Hook, environment: &Environment) -> Result<(), HookCause> {
    let (mut child, output) = spawn(hook, environment)?;
    let deadline = hook
        .timeout
        .map(|seconds| Instant::now() + Duration::from_secs(u64::from(seconds)));
    let mut tail = Tail::default();
    let waited = wait(&mut child, &output, deadline, &mut tail);
    match waited {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(HookCause::Failed {
            status,
            output: tail.text(),
        }),
        Ok(None) => {
            end(&mut child);
            Err(HookCause::Timeout(hook.timeout.unwrap_or(0)))
        }
        Err(error) => {
            end(&mut child);
            Err(HookCause::Wait(error))
        }
    }
}

fn spawn(hook: &Hook, environment: &Environment) -> Result<(Child, OwnedFd), HookCause> {
    let state = state_file(environment.state).map_err(HookCause::State)?;
    let start = |source| HookCause::Start {
        path: hook.path.clone(),
        source,
    };
    let (output, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| start(error.into()))?;
    rustix::io::ioctl_fionbio(&output, true).map_err(|error| start(error.into()))?;
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|entry| entry.split_once('=')))
        .current_dir(environment.directory)
        .stdin(state)
        .stdout(writer.try_clone().map_err(start)?)
        .stderr(writer)
        // So that all of it can be ended at the deadline.
        .process_group(0);
    if let Some(network) = environment.network {
        let network = network.as_raw_fd();
        // SAFETY: between fork and exec only setns(2) is called, which is async-signal-safe and takes
        // two numbers. The descriptor is borrowed for as long as `environment`, so it is open.
        unsafe {
            command.pre_exec(move || match libc::setns(network, libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
    }
    let child = command.spawn().map_err(start)?;
    Ok((child, output))
}

/// A file, not a pipe: a hook that does not read its stdin holds nobody up.
fn state_file(state: &str) -> io::Result<File> {
    let memory = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(memory);
    file.write_all(state.as_bytes())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// None: the deadline has passed.
fn wait(
    child: &mut Child,
    output: &OwnedFd,
    deadline: Option<Instant>,
    tail: &mut Tail,
) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Errno::SRCH)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let mut open = true;
    loop {
        let timeout = match deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(None);
                }
                Some(Timespec::try_from(left).map_err(|_| Errno::INVAL)?)
            }
        };
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        if open {
            fds.push(PollFd::new(output, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ended = !fds[0].revents().is_empty();
        open = open && tail.read(output.as_fd())?;
        // Something that the hook left behind may hold the pipe for ever: the hook itself counts.
        if ended {
            return child.wait().map(Some);
        }
    }
}

fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Gone already is as good.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

/// The end of a hook's output.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    /// Takes what is there. False: nothing more will come.
    fn read(&mut self, output: BorrowedFd) -> io::Result<bool> {
        let mut file = File::from(output.try_clone_to_owned()?);
        let mut buffer = [0; MAX_OUTPUT];
        // A hook that writes without end must not keep its deadline from being seen.
        for _ in 0..16 {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(length) => {
                    self.0.extend_from_slice(&buffer[..length]);
                    let surplus = self.0.len().saturating_sub(MAX_OUTPUT);
                    self.0.drain(..surplus);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    fn shell(script: &str, timeout: Option<u32>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["hook".into(), "-c".into(), script.into()],
            env: vec!["NAME=value".into()],
            timeout,
        }
    }

    fn run_hooks(hooks: &[Hook]) -> Result<(), String> {
        let environment = Environment {
            state: "{\"id\":\"c\"}",
            directory: Path::new("/"),
            network: None,
        };
        run("prestart", hooks, &environment).map_err(|error| {
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            format!("{error}: {cause}")
        })
    }

    #[test]
    fn state_environment_and_directory() {
        let script = "test \"$(cat)\" = '{\"id\":\"c\"}' -a $NAME = value -a $PWD = / -a $0 = hook \
                      -a -z \"$HOME\"";
        assert_eq!(run_hooks(&[shell(script, None)]), Ok(()));
        assert_eq!(run_hooks(&[shell("exec <&-; true", Some(5))]), Ok(()));
    }

    #[test]
    fn the_first_failure_ends_it() {
        let error = run_hooks(&[shell("true", None), shell("echo why >&2; exit 3", None)]);
        let error = error.unwrap_err();
        assert!(
            error.starts_with("error running prestart hook #1: "),
            "{error}"
        );
        assert!(error.contains("3") && error.contains("why"), "{error}");
        let missing = Hook {
            path: "/nonexistent".into(),
            ..shell("", None)
        };
        assert!(run_hooks(&[missing]).unwrap_err().contains("/nonexistent"));
    }

    #[test]
    fn a_hanging_hook_is_ended_with_its_children() {
        let begun = Instant::now();
        let error = run_hooks(&[shell("sleep 60 & sleep 60", Some(1))]).unwrap_err();
        assert!(error.contains("after 1 seconds"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn what_a_hook_leaves_behind_is_not_waited_for() {
        let begun = Instant::now();
        assert_eq!(run_hooks(&[shell("sleep 30 & exit 0", None)]), Ok(()));
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn output_is_bounded() {
        let error = run_hooks(&[shell("yes | head -c 1000000; exit 1", Some(30))]).unwrap_err();
        assert!(error.len() < 3 * MAX_OUTPUT, "{}", error.len());
    }
}
