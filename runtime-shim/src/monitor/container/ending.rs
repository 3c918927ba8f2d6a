// SPDX-License-Identifier: Apache-2.0
//! How a container ends: by its process, by a failure, by time that has passed.

use std::time::Instant;

use agent_protocol::Request as AgentRequest;
use vmm::StopReason;

use super::action::{Action, Asked, cut, unopened};
use super::{Container, FLUSH_AFTER_KILL, FLUSH_EXECS, KILLED, Phase, SHUTDOWN};
use crate::monitor::order::{Failure, Report, Stage};

impl Container {
    /// The file data goes back to the host while the rest of the output is read.
    pub(super) fn init_exited(&mut self, status: u8, now: Instant) -> Vec<Action> {
        if matches!(self.phase, Phase::Ending { .. }) {
            return Vec::new();
        }
        self.phase = Phase::Ending {
            status,
            shut_down: false,
        };
        self.kill_until = None;
        self.flush_execs_until = Some(now + FLUSH_EXECS);
        if self.killed {
            self.flush_until = Some(now + FLUSH_AFTER_KILL);
        }
        let mut actions = unopened(&self.ports);
        actions.push(Action::Ask {
            request: AgentRequest::Shutdown,
            asked: Asked::Shutdown,
            deadline: Some(now + SHUTDOWN),
        });
        actions
    }

    pub(super) fn shut_down(&mut self, now: Instant) -> Vec<Action> {
        if let Phase::Ending { shut_down, .. } = &mut self.phase {
            *shut_down = true;
        }
        self.exit_if_over(now)
    }

    /// All is said and done: the status is the last thing that is left.
    pub(super) fn exit_if_over(&mut self, now: Instant) -> Vec<Action> {
        let Phase::Ending {
            status,
            shut_down: true,
        } = self.phase
        else {
            return Vec::new();
        };
        let passed = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        let flushed = self.ports.is_empty() || passed(self.flush_until);
        let execs_flushed = self.execs.values().all(|exec| exec.ports.is_empty());
        if flushed && (execs_flushed || passed(self.flush_execs_until)) {
            vec![Action::Exit(status)]
        } else {
            Vec::new()
        }
    }

    /// At the end, nothing more is to be had from the guest.
    pub(super) fn guest_gone(&mut self, now: Instant) -> Vec<Action> {
        self.flush_until.get_or_insert(now + FLUSH_AFTER_KILL);
        self.shut_down(now)
    }

    /// The creating verb has gone away.
    pub fn creator_gone(&mut self) -> Vec<Action> {
        match self.phase {
            // Nobody knows of this container.
            Phase::Booting { .. } | Phase::Creating => vec![Action::Exit(1)],
            _ => Vec::new(),
        }
    }

    /// The guest cannot even be booted.
    pub fn start_failed(&mut self, reason: String) -> Vec<Action> {
        self.fail_host(Stage::Boot, reason)
    }

    /// The connection to the agent has broken.
    pub fn agent_lost(&mut self, reason: String, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Ending { .. } => self.guest_gone(now),
            _ => self.fail_guest(reason),
        }
    }

    /// The VM does not run any more.
    pub fn machine_stopped(&mut self, reason: &StopReason, now: Instant) -> Vec<Action> {
        let how = match reason {
            StopReason::Reset => String::new(),
            StopReason::Failed(reason) => format!(" ({reason})"),
        };
        match self.phase {
            Phase::Booting { .. } => {
                self.fail_guest(format!("guest kernel stopped while booting{how}"))
            }
            Phase::Ending { .. } => self.guest_gone(now),
            _ => self.fail_guest(format!("guest kernel stopped{how}")),
        }
    }

    /// When [`time`](Self::time) has something to do next. It has been called with `now`.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let boot = match self.phase {
            Phase::Booting { until } => Some(until),
            _ => None,
        };
        let waits = [
            boot,
            self.kill_until,
            self.cut_at,
            self.flush_until,
            self.flush_execs_until,
        ];
        let execs = self.execs.values().map(|exec| exec.flush_until);
        let all = waits.into_iter().chain(execs).flatten();
        all.filter(|&until| until > now).min()
    }

    /// Deadlines have passed.
    pub fn time(&mut self, now: Instant) -> Vec<Action> {
        if let Phase::Booting { until } = self.phase
            && until <= now
        {
            let seconds = self.deadlines.boot.as_secs();
            return self.fail_guest(format!("guest did not come up within {seconds} s"));
        }
        if self.kill_until.is_some_and(|until| until <= now) {
            log::error!("container {}: survived SIGKILL, its VM is ended", self.id);
            return vec![Action::Exit(KILLED)];
        }
        let late: Vec<_> = self
            .execs
            .iter()
            .filter(|(_, exec)| exec.flush_until.is_some_and(|until| until <= now))
            .map(|(&process, _)| process)
            .collect();
        let mut actions = Vec::new();
        if self.cut_at.is_some_and(|at| at <= now) {
            self.cut_at = None;
            actions.extend(cut(&mut self.ports));
        }
        for process in late {
            actions.extend(self.finish_exec(process, now));
        }
        actions.extend(self.exit_if_over(now));
        actions
    }

    pub(super) fn stage(&self) -> Stage {
        match self.phase {
            Phase::Booting { .. } => Stage::Boot,
            Phase::Creating => Stage::Create,
            Phase::Created | Phase::Starting => Stage::Start,
            Phase::Restoring => Stage::Restore,
            Phase::Running | Phase::Ending { .. } => Stage::Run,
        }
    }

    pub(super) fn fail_host(&mut self, stage: Stage, message: String) -> Vec<Action> {
        self.fail(Failure::Host { stage, message })
    }

    /// The console is added by the event loop, which has the machine.
    pub(super) fn fail_guest(&mut self, message: String) -> Vec<Action> {
        let console = String::new();
        self.fail(Failure::Guest { message, console })
    }

    pub(super) fn fail(&mut self, failure: Failure) -> Vec<Action> {
        let status = match self.phase {
            Phase::Running | Phase::Created => KILLED,
            _ => 1,
        };
        vec![
            Action::Report(Report::Failed(failure)),
            Action::Exit(status),
        ]
    }
}
