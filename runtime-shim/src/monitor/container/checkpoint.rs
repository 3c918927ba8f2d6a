// SPDX-License-Identifier: Apache-2.0
//! A running container that is saved, and one that goes on from there.
//!
//! The processes are paused in the guest before the machine stops, and go on after the restored guest has got time and
//! entropy of its own: none of them sees what its copies see.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Instant;

use agent_protocol::{AgentError, ErrorKind, Mount, MountSource, Request as AgentRequest, Stdio};
use serde::{Deserialize, Serialize};
use vmm::{HostStream, SnapshotFiles};

use super::action::{Action, Asked, Verb, answer, refuse};
use super::streams::Streams;
use super::{BTreeMap, Container, KILLED, Phase};
use crate::control::Reply;
use crate::monitor::order::{Deadlines, Report, Stage};
use crate::plan::BOOT_ID;

/// A checkpoint that is being made.
#[derive(Debug)]
pub(super) struct Hold {
    /// None: the verb has gone.
    verb: Option<Verb>,
    /// To be filled when the processes are paused.
    files: Option<SnapshotFiles>,
    was_paused: bool,
    /// The machine stands still.
    saved: bool,
}

/// What is taken along of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedContainer {
    id: String,
    args: Vec<String>,
    stdio: Stdio,
    ports: BTreeSet<u32>,
    next_port: u32,
    next_exec: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("process.terminal: must be {0}, as it was when the checkpoint was made")]
    Terminal(bool),
}

impl Container {
    pub(super) fn checkpoint(
        &mut self,
        verb: Verb,
        fds: Vec<OwnedFd>,
        now: Instant,
    ) -> Vec<Action> {
        if self.phase != Phase::Running {
            return vec![refuse(verb, "container not running")];
        }
        if self.hold.is_some() {
            return vec![refuse(verb, "another checkpoint is being made")];
        }
        if !self.execs.is_empty() {
            let text = "a container with exec sessions cannot be saved, end them first";
            return vec![refuse(verb, text)];
        }
        let mut files = fds.into_iter().map(std::fs::File::from);
        let (Some(state), Some(memory)) = (files.next(), files.next()) else {
            return vec![refuse(verb, "checkpoint without its files")];
        };
        self.hold = Some(Hold {
            verb: Some(verb),
            files: Some(SnapshotFiles { state, memory }),
            was_paused: self.paused,
            saved: false,
        });
        if self.paused {
            return self.frozen(None);
        }
        self.ask_live(verb, Asked::Freeze, now, |container| AgentRequest::Pause {
            container,
        })
    }

    /// The processes are paused, or could not be.
    pub(super) fn frozen(&mut self, error: Option<AgentError>) -> Vec<Action> {
        let Some(hold) = &mut self.hold else {
            return Vec::new();
        };
        match (error, hold.verb, hold.files.take()) {
            (None, Some(_), Some(files)) => vec![Action::Save { files }],
            (Some(error), Some(verb), _) => {
                let mut actions = vec![answer(verb, Reply::Failed(error))];
                actions.extend(self.resume_processes());
                actions
            }
            _ => self.resume_processes(),
        }
    }

    /// The machine stands still and is saved, or could not be.
    pub fn saved(&mut self, result: Result<(), String>, now: Instant) -> Vec<Action> {
        let Some(hold) = &mut self.hold else {
            return vec![Action::Thaw];
        };
        hold.saved = true;
        let verb = hold.verb;
        match (result, verb) {
            (Ok(()), Some(verb)) => vec![answer(verb, Reply::Done)],
            (Ok(()), None) => self.let_go(now),
            (Err(message), verb) => {
                let kind = ErrorKind::System;
                let error = AgentError { kind, message };
                let failed = verb.map(|verb| answer(verb, Reply::Failed(error)));
                let mut actions = self.let_go(now);
                actions.extend(failed);
                actions
            }
        }
    }

    pub(super) fn holds(&self, verb: Verb) -> bool {
        let hold = self.hold.as_ref();
        hold.is_some_and(|hold| hold.verb == Some(verb))
    }

    pub(super) fn thaw(&mut self, verb: Verb, now: Instant) -> Vec<Action> {
        if !self.holds(verb) {
            return vec![refuse(verb, "no checkpoint has been made")];
        }
        let mut actions = self.let_go(now);
        actions.push(answer(verb, Reply::Done));
        actions
    }

    /// The container lives on in its checkpoint only.
    pub(super) fn end_frozen(&mut self, verb: Verb) -> Vec<Action> {
        match &self.hold {
            Some(hold) if hold.saved && hold.verb == Some(verb) => vec![Action::Exit(KILLED)],
            _ => vec![refuse(verb, "no checkpoint has been made")],
        }
    }

    /// Goes on as if nothing had been saved.
    pub(super) fn let_go(&mut self, _now: Instant) -> Vec<Action> {
        match &mut self.hold {
            None => Vec::new(),
            Some(hold) if hold.saved => {
                let mut actions = vec![Action::Thaw];
                actions.extend(self.resume_processes());
                actions
            }
            // The answer to the pause is on its way.
            Some(hold) => {
                hold.verb = None;
                Vec::new()
            }
        }
    }

    fn resume_processes(&mut self) -> Vec<Action> {
        match self.hold.take() {
            Some(hold) if !hold.was_paused => vec![Action::Ask {
                request: AgentRequest::Resume {
                    container: self.id.clone(),
                },
                asked: Asked::Nothing,
                deadline: None,
            }],
            _ => Vec::new(),
        }
    }

    /// None: it has ended.
    pub fn save(&self) -> Option<SavedContainer> {
        (self.phase == Phase::Running).then(|| SavedContainer {
            id: self.id.clone(),
            args: self.args.clone(),
            stdio: self.stdio,
            ports: self.ports.clone(),
            next_port: self.next_port,
            next_exec: self.next_exec,
        })
    }

    /// A container that goes on in a machine which is about to start. The actions give its streams their new ends,
    /// and let its processes go on.
    pub fn restore(
        saved: SavedContainer,
        streams: Streams,
        fork: bool,
        deadlines: Deadlines,
        now: Instant,
    ) -> Result<(Container, Vec<Action>), RestoreError> {
        let ends = ends(saved.stdio, streams)?;
        let mut container = Container {
            id: saved.id,
            guest: None,
            has_terminal: matches!(saved.stdio, Stdio::Terminal { .. }),
            stdio: saved.stdio,
            args: saved.args,
            start: false,
            start_deadline: None,
            deadlines,
            phase: Phase::Restoring,
            paused: true,
            ports: saved.ports,
            next_port: saved.next_port,
            execs: BTreeMap::new(),
            next_exec: saved.next_exec,
            listeners: BTreeSet::new(),
            hold: None,
            killed: false,
            cut_at: None,
            flush_until: None,
            flush_execs_until: None,
            kill_until: None,
        };
        let mut actions = vec![Action::Report(Report::Stage(Stage::Restore))];
        // A stream that had ended has no use for a descriptor.
        let open = ends
            .into_iter()
            .filter(|(port, _)| container.ports.contains(port));
        actions.extend(open.map(|(port, stream)| Action::Accept { port, stream }));
        match container.prepare(now) {
            Ok(prepare) => actions.push(prepare),
            Err(error) => actions.extend(container.fail_host(Stage::Restore, error)),
        }
        actions.push(match fork {
            true => container.identify(now),
            false => container.go_on(now),
        });
        Ok((container, actions))
    }

    /// The guest kernel keeps the id of its boot for good: a copy shows another one in its place.
    fn identify(&self, now: Instant) -> Action {
        let mount = Mount {
            destination: "/proc/sys/kernel/random/boot_id".into(),
            source: MountSource::Share {
                path: BOOT_ID.into(),
                recursive: false,
            },
            kind: String::new(),
            flags: libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            propagation: Vec::new(),
            recursive_set: 0,
            recursive_clear: 0,
            data: String::new(),
            copy_up: false,
            uid_mappings: Vec::new(),
            gid_mappings: Vec::new(),
        };
        Action::Ask {
            request: AgentRequest::Mount {
                container: self.id.clone(),
                mount: Box::new(mount),
            },
            asked: Asked::Identified,
            deadline: Some(now + self.deadlines.request),
        }
    }

    pub(super) fn go_on(&self, now: Instant) -> Action {
        Action::Ask {
            request: AgentRequest::Resume {
                container: self.id.clone(),
            },
            asked: Asked::Restored,
            deadline: Some(now + self.deadlines.request),
        }
    }

    /// Its processes go on.
    pub(super) fn restored(&mut self) -> Vec<Action> {
        self.paused = false;
        if self.phase == Phase::Restoring {
            self.phase = Phase::Running;
        }
        vec![
            Action::Report(Report::Created),
            Action::Report(Report::Started),
        ]
    }
}

/// The new ends of the streams, by port.
fn ends(stdio: Stdio, streams: Streams) -> Result<Vec<(u32, HostStream)>, RestoreError> {
    let mut ends = Vec::new();
    let mut add = |port: Option<u32>, input: Option<OwnedFd>, output: Option<OwnedFd>| {
        if let Some(port) = port {
            ends.push((port, HostStream { input, output }));
        }
    };
    match (stdio, streams) {
        (Stdio::Terminal { port }, Streams::Terminal { input, output }) => {
            add(Some(port), Some(input), Some(output));
        }
        (
            Stdio::Streams {
                stdin,
                stdout,
                stderr,
            },
            Streams::Separate {
                stdin: input,
                stdout: output,
                stderr: errors,
            },
        ) => {
            add(stdin, input, None);
            add(stdout, None, output);
            add(stderr, None, errors);
        }
        (Stdio::Terminal { .. }, _) => return Err(RestoreError::Terminal(true)),
        (Stdio::Streams { .. }, _) => return Err(RestoreError::Terminal(false)),
    }
    Ok(ends)
}
