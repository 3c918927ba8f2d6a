// SPDX-License-Identifier: Apache-2.0
//! Further processes: each belongs to the connection of the verb that asked for it.

use std::collections::BTreeSet;
use std::time::Instant;

use agent_protocol::{AgentError, Process, Reply as AgentReply, Request as AgentRequest};

use super::action::{Action, Asked, Verb, answer, cut, refuse};
use super::streams::Streams;
use super::{Container, FLUSH_AFTER_KILL, KILLED};
use crate::control::Reply;
use crate::monitor::wording::start_error;

/// A process that a verb waits for.
#[derive(Debug)]
pub(super) struct Exec {
    /// None: it went away.
    pub(super) verb: Option<Verb>,
    pub(super) args: Vec<String>,
    pub(super) ports: BTreeSet<u32>,
    pub(super) running: bool,
    pub(super) status: Option<u8>,
    pub(super) stands_in: Option<u32>,
    pub(super) flush_until: Option<Instant>,
}

impl Container {
    pub(super) fn exec(
        &mut self,
        verb: Verb,
        process: Process,
        streams: Streams,
        ignore_paused: bool,
        now: Instant,
    ) -> Vec<Action> {
        if !self.is_live() {
            return vec![refuse(verb, "cannot exec in a stopped container")];
        }
        if self.paused && !ignore_paused {
            let text = "cannot exec in a paused container (use --ignore-paused to override)";
            return vec![refuse(verb, text)];
        }
        if self.hold.is_some() {
            return vec![refuse(
                verb,
                "cannot exec in a container that is being saved",
            )];
        }
        let (Some(number), None) = (self.free_number(), self.exec_of(verb)) else {
            return vec![refuse(verb, "one exec a connection")];
        };
        let mut actions = Vec::new();
        let mut ports = BTreeSet::new();
        let stdio = self.connect(streams, &mut ports, &mut actions);
        let exec = Exec {
            verb: Some(verb),
            args: process.args.clone(),
            ports,
            running: false,
            status: None,
            stands_in: None,
            flush_until: None,
        };
        self.execs.insert(number, exec);
        actions.push(Action::Ask {
            request: AgentRequest::Exec {
                container: self.id.clone(),
                process: number,
                plan: Box::new(process),
                stdio,
                ignore_paused,
            },
            asked: Asked::Exec(number),
            deadline: Some(now + self.deadlines.request),
        });
        actions
    }

    pub(super) fn exec_started(
        &mut self,
        process: u32,
        result: Result<AgentReply, AgentError>,
        now: Instant,
    ) -> Vec<Action> {
        let Some(exec) = self.execs.get_mut(&process) else {
            return Vec::new();
        };
        let error = match result {
            Ok(_) => {
                exec.running = true;
                let started = exec.verb.map(|verb| answer(verb, Reply::Done));
                let mut actions: Vec<_> = started.into_iter().collect();
                actions.extend(self.finish_exec(process, now));
                return actions;
            }
            Err(error) => start_error(&exec.args, error),
        };
        let mut actions = cut(&mut exec.ports);
        if let Some(verb) = exec.verb {
            actions.push(answer(verb, Reply::Failed(error)));
            actions.push(Action::Hangup { verb });
        }
        self.execs.remove(&process);
        actions
    }

    /// Tells the verb about the end of its process, once the process has run, ended and been read.
    pub(super) fn finish_exec(&mut self, process: u32, now: Instant) -> Vec<Action> {
        let Some(exec) = self.execs.get_mut(&process) else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        if exec.flush_until.is_some_and(|until| until <= now) {
            actions.extend(cut(&mut exec.ports));
        }
        let (true, Some(status), true) = (exec.running, exec.status, exec.ports.is_empty()) else {
            return actions;
        };
        if let Some(verb) = exec.verb {
            actions.push(answer(verb, Reply::Exited(status)));
            actions.push(Action::Hangup { verb });
        }
        self.execs.remove(&process);
        actions
    }

    pub(super) fn exec_of(&self, verb: Verb) -> Option<u32> {
        let mut execs = self.execs.iter();
        execs
            .find(|(_, exec)| exec.verb == Some(verb))
            .map(|(&process, _)| process)
    }

    /// Numbers of processes are not used twice: a late event must not hit a later process.
    pub(super) fn free_number(&mut self) -> Option<u32> {
        let number = self.next_exec;
        self.next_exec = number.checked_add(1)?;
        Some(number)
    }

    pub(super) fn stand_in(&mut self, verb: Verb, pid: u32) -> Vec<Action> {
        let mut execs = self.execs.values_mut();
        if let Some(exec) = execs.find(|exec| exec.verb == Some(verb)) {
            exec.stands_in = Some(pid);
        }
        Vec::new()
    }

    /// Signals on the connection of an exec are not answered: its verb waits for something else.
    pub(super) fn signal_exec(&mut self, process: u32, signal: i32, now: Instant) -> Vec<Action> {
        if signal == libc::SIGKILL
            && let Some(exec) = self.execs.get_mut(&process)
        {
            exec.flush_until = Some(now + FLUSH_AFTER_KILL);
        }
        vec![Action::Ask {
            request: self.ask_signal(process, signal, false),
            asked: Asked::Nothing,
            deadline: None,
        }]
    }

    /// The last words to verbs that wait for a process. Those whose end was not heard of die with
    /// the guest.
    pub fn farewell(&mut self) -> Vec<Action> {
        let execs = std::mem::take(&mut self.execs);
        let waiting = execs.into_values().filter_map(|exec| {
            let verb = exec.verb?;
            Some(answer(verb, Reply::Exited(exec.status.unwrap_or(KILLED))))
        });
        waiting.collect()
    }
}
