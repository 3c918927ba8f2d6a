// SPDX-License-Identifier: Apache-2.0
//! A process on the host, told apart from a later one with the same pid by its start time.

use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: i32,
    /// Clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    #[serde(rename = "startTime")]
    pub start_time: u64,
}

impl Identity {
    /// The process that has this pid now. None if there is none, or only its zombie.
    pub fn of(pid: i32) -> Option<Identity> {
        start_time(pid).map(|start_time| Identity { pid, start_time })
    }

    pub fn is_alive(&self) -> bool {
        Identity::of(self.pid).as_ref() == Some(self)
    }

    /// A pidfd for it: what is sent there reaches no stranger.
    pub fn open(&self) -> Option<OwnedFd> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // The pid may have been reused before the open, not after.
        self.is_alive().then_some(pidfd)
    }
}

/// The pid of this process as the mounted `/proc` has it: getpid(2) is 1 in a pid namespace of its own.
pub fn pid_on_host() -> std::io::Result<u32> {
    let link = std::fs::read_link("/proc/self")?;
    let pid = link.to_str().and_then(|pid| pid.parse().ok());
    pid.ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

fn start_time(pid: i32) -> Option<u64> {
    if pid <= 0 {
        return None;
    }
    let mut stat = Vec::new();
    std::fs::File::open(format!("/proc/{pid}/stat"))
        .and_then(|file| file.take(4096).read_to_end(&mut stat))
        .ok()?;
    parse_start_time(&String::from_utf8_lossy(&stat))
}

/// None for a process that has ended but has not been waited for.
fn parse_start_time(stat: &str) -> Option<u64> {
    // The command name may contain anything, closing parentheses included.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    // State is field 3.
    fields.nth(22 - 4)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines() {
        let tail = "1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 424242 9 10";
        assert_eq!(parse_start_time(&format!("7 (sh) S {tail}")), Some(424_242));
        assert_eq!(
            parse_start_time(&format!("7 (a) b (c)) R {tail}")),
            Some(424_242)
        );
        assert_eq!(parse_start_time(&format!("7 (sh) Z {tail}")), None);
        assert_eq!(parse_start_time("7 (sh) S 1 2"), None);
        assert_eq!(parse_start_time(""), None);
    }

    #[test]
    fn the_own_pid() {
        assert_eq!(pid_on_host().unwrap(), std::process::id());
    }

    #[test]
    fn a_child_and_its_zombie() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let identity = Identity::of(pid).unwrap();
        assert!(identity.is_alive());
        assert!(identity.open().is_some());
        let stranger = Identity {
            start_time: identity.start_time + 1,
            ..identity
        };
        assert!(!stranger.is_alive());
        assert!(stranger.open().is_none());

        let pidfd = identity.open().unwrap();
        drop(child.stdin.take());
        let mut poll = [rustix::event::PollFd::new(
            &pidfd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut poll, None).unwrap();
        assert!(!identity.is_alive(), "a zombie does not count");
        child.wait().unwrap();
        assert!(
            !Identity {
                pid: 0,
                start_time: 0
            }
            .is_alive()
        );
    }
}
