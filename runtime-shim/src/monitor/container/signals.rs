// SPDX-License-Identifier: Apache-2.0
//! Signals and sizes of terminals, from verbs and from those who signal the monitor itself.

use std::time::Instant;

use agent_protocol::{Request as AgentRequest, WindowSize};

use super::action::{Action, Asked, Verb, answer, refuse};
use super::{Container, FLUSH_AFTER_KILL, INIT, KILL_ANSWER, Phase};
use crate::control::Reply;
use crate::monitor::order::{Failure, Report};
use crate::signal_fd;

impl Container {
    /// A signal that the monitor itself got. It stands for the init process.
    pub fn signal(&mut self, signal: i32, now: Instant) -> Vec<Action> {
        self.signal_init(None, signal, false, now)
    }

    pub(super) fn signal_init(
        &mut self,
        verb: Option<Verb>,
        signal: i32,
        all: bool,
        now: Instant,
    ) -> Vec<Action> {
        let kill = signal == libc::SIGKILL;
        self.killed |= kill;
        match self.phase {
            Phase::Ending { .. } => {
                if kill && self.flush_until.is_none() {
                    self.flush_until = Some(now + FLUSH_AFTER_KILL);
                }
                let gone = verb.map(|verb| refuse(verb, "container not running"));
                gone.into_iter().collect()
            }
            Phase::Booting { .. } | Phase::Creating | Phase::Created => {
                self.signal_before_start(verb, signal)
            }
            Phase::Starting | Phase::Restoring | Phase::Running => vec![Action::Ask {
                request: self.ask_signal(INIT, signal, all),
                asked: match (kill, verb) {
                    (true, verb) => Asked::Kill(verb),
                    (false, Some(verb)) => Asked::Verb(verb),
                    (false, None) => Asked::Nothing,
                },
                deadline: Some(
                    now + if kill {
                        KILL_ANSWER
                    } else {
                        self.deadlines.request
                    },
                ),
            }],
        }
    }

    /// There is no process yet that could handle a signal: those that end a process end it all.
    pub(super) fn signal_before_start(&mut self, verb: Option<Verb>, signal: i32) -> Vec<Action> {
        let answered = verb.map(|verb| answer(verb, Reply::Done));
        let mut actions: Vec<_> = answered.into_iter().collect();
        let number = u8::try_from(signal).unwrap_or(0);
        if signal != libc::SIGKILL && !signal_fd::ENDING.contains(&signal) {
            return actions;
        }
        if self.phase != Phase::Created {
            let message = format!("ended by signal {signal}");
            let stage = self.stage();
            actions.push(Action::Report(Report::Failed(Failure::Host {
                stage,
                message,
            })));
        }
        actions.push(Action::Exit(128 + number));
        actions
    }

    pub(super) fn ask_signal(&self, process: u32, signal: i32, all: bool) -> AgentRequest {
        AgentRequest::Signal {
            container: self.id.clone(),
            process,
            signal,
            all,
        }
    }

    pub(super) fn ask_resize(&self, process: u32, size: WindowSize) -> Action {
        Action::Ask {
            request: AgentRequest::Resize {
                container: self.id.clone(),
                process,
                size,
            },
            asked: Asked::Nothing,
            deadline: None,
        }
    }

    /// The terminal of the init process has another size.
    pub fn resized(&mut self, size: WindowSize) -> Vec<Action> {
        if self.has_terminal && self.is_live() {
            vec![self.ask_resize(INIT, size)]
        } else {
            Vec::new()
        }
    }
}
