// SPDX-License-Identifier: Apache-2.0
//! The event loop: requests of the host, ends of processes, bytes of streams.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use agent_protocol::{Clock, ErrorKind, Event, Reply, Request, ToAgent, VERSION};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus, wait};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::channel::Received;
use crate::container::{Container, Fate};
use crate::core::{ControlError, Core, Owner, Source, state_error};
use crate::error::{Result, Stage, error, refused};

/// Bytes of entropy taken at once.
const MAX_ENTROPY: usize = 4096;

#[derive(Debug)]
pub(crate) struct Server {
    core: Core,
    signals: OwnedFd,
    containers: BTreeMap<Rc<str>, Container>,
}

/// What a request comes to: an answer, or one that follows.
enum Answer {
    Now(Reply),
    Later,
}

impl Server {
    pub(crate) fn new(mut core: Core, start: Instant) -> Result<Server> {
        let signals = crate::syscalls::child_signals().stage("signals")?;
        core.poll
            .add_reader(&signals, Source::Signals)
            .stage("epoll")?;
        core.event(Event::Ready {
            version: VERSION,
            age_ns: u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        });
        Ok(Server {
            core,
            signals,
            containers: BTreeMap::new(),
        })
    }

    /// Serves until the connection to the host ends.
    pub(crate) fn run(&mut self) -> ControlError {
        loop {
            if let Err(error) = self.turn() {
                return error;
            }
        }
    }

    fn turn(&mut self) -> std::result::Result<(), ControlError> {
        self.core.control.flush()?;
        for (token, flags) in self.core.poll.wait(self.core.again.is_empty())? {
            // One handled before it may have removed this one.
            let Some(source) = self.core.poll.source(token) else {
                continue;
            };
            match source {
                Source::Control => self.serve()?,
                Source::Signals => self.reap()?,
                Source::Cgroup(id) => self.with(&id, Container::cgroup_event),
                Source::Memory(id) => self.with(&id, |container, core| {
                    container.memory_event(core);
                    Fate::Kept
                }),
                Source::Channel((id, process)) => {
                    self.with(&id, |container, core| {
                        container.channel_event(core, process)
                    });
                }
                Source::Stream((id, process), slot, side) => self.with(&id, |container, core| {
                    container.stream_event(core, process, slot, Some((side, flags)))
                }),
            }
        }
        for ((id, process), slot) in std::mem::take(&mut self.core.again) {
            self.with(&id, |container, core| {
                container.stream_event(core, process, slot, None)
            });
        }
        Ok(())
    }

    fn with(&mut self, id: &str, event: impl FnOnce(&mut Container, &mut Core) -> Fate) {
        if let Some(container) = self.containers.get_mut(id)
            && event(container, &mut self.core) == Fate::Gone
        {
            self.containers.remove(id);
        }
    }

    fn serve(&mut self) -> std::result::Result<(), ControlError> {
        let mut scratch = std::mem::take(&mut self.core.scratch);
        let served = loop {
            match self.core.control.receive(&mut scratch) {
                Ok(Some(ToAgent { number, request })) => {
                    // Handlers move bytes of streams.
                    std::mem::swap(&mut scratch, &mut self.core.scratch);
                    self.answer(number, request);
                    std::mem::swap(&mut scratch, &mut self.core.scratch);
                }
                Ok(None) => break self.core.control.flush(),
                Err(error) => break Err(error),
            }
        };
        self.core.scratch = scratch;
        served
    }

    fn answer(&mut self, number: u64, request: Request) {
        match self.handle(number, request) {
            Ok(Answer::Later) => {}
            Ok(Answer::Now(reply)) => self.core.reply(number, Ok(reply)),
            Err(error) => self.core.reply(number, Err(error)),
        }
    }

    fn handle(&mut self, number: u64, request: Request) -> Result<Answer> {
        let core = &mut self.core;
        let containers = &mut self.containers;
        let done = Ok(Answer::Now(Reply::Done));
        match request {
            Request::Prepare { clock, entropy } => prepare(clock, &entropy).and(done),
            Request::Create {
                container,
                plan,
                stdio,
            } => {
                if containers.contains_key(container.as_str()) {
                    return Err(state_error("container with given ID already exists"));
                }
                let id: Rc<str> = container.into();
                let container = Container::create(core, number, id.clone(), &plan, stdio)?;
                containers.insert(id, container);
                Ok(Answer::Later)
            }
            Request::Start { container, cards } => {
                find(containers, &container)?.start(core, number, &cards)?;
                Ok(Answer::Later)
            }
            Request::Exec {
                container,
                process,
                plan,
                stdio,
                ignore_paused,
            } => {
                find(containers, &container)?.exec(
                    core,
                    number,
                    process,
                    &plan,
                    stdio,
                    ignore_paused,
                )?;
                Ok(Answer::Later)
            }
            Request::Signal {
                container,
                process,
                signal,
                all,
            } => find(containers, &container)?
                .signal(process, signal, all)
                .and(done),
            Request::Resize {
                container,
                process,
                size,
            } => find(containers, &container)?
                .resize(process, size)
                .and(done),
            Request::Pause { container } => {
                find(containers, &container)?.pause(core, number)?;
                Ok(Answer::Later)
            }
            Request::Resume { container } => find(containers, &container)?.resume(core).and(done),
            Request::Update { container, cgroup } => {
                find(containers, &container)?.update(&cgroup).and(done)
            }
            Request::Usage { container } => {
                let usage = Box::new(find(containers, &container)?.usage());
                Ok(Answer::Now(Reply::Usage(usage)))
            }
            Request::Processes { container } => Ok(Answer::Now(Reply::Processes(
                find(containers, &container)?.pids(),
            ))),
            Request::Mount { container, mount } => {
                find(containers, &container)?.mount(core, number, &mount)?;
                Ok(Answer::Later)
            }
            Request::Unmount {
                container,
                destination,
            } => {
                find(containers, &container)?.unmount(core, number, &destination)?;
                Ok(Answer::Later)
            }
            Request::Delete { container } => {
                if find(containers, &container)?.delete(core, number, Ok(Reply::Done)) == Fate::Gone
                {
                    containers.remove(container.as_str());
                }
                Ok(Answer::Later)
            }
            Request::Shutdown => self.shut_down().and(done),
        }
    }

    fn shut_down(&mut self) -> Result<()> {
        for container in self.containers.values() {
            // One whose processes cannot be killed must not keep the share from being written back.
            if let Err(error) = container.signal(0, libc::SIGKILL, true) {
                log::warn!("{error}");
            }
        }
        self.core.release_share()
    }

    /// Waits for every child that has ended: the agent's own and the orphans of containers.
    fn reap(&mut self) -> rustix::io::Result<()> {
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        loop {
            match rustix::io::read(&self.signals, &mut signal) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        loop {
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid, exit_status(status)),
                Ok(None) | Err(Errno::CHILD) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            match self.core.children.remove(&pid.as_raw_pid()) {
                Some(Owner::Process((id, process))) => {
                    self.with(&id, |container, core| {
                        container.reaped(core, process, status)
                    });
                }
                Some(Owner::Change {
                    number,
                    mut channel,
                }) => {
                    let result = match (channel.receive(), status) {
                        (Received::Report(Err(error)), _) => Err(error),
                        (_, 0) => Ok(Reply::Done),
                        (_, status) => {
                            let message = format!("mount: ended with status {status}");
                            Err(error(ErrorKind::System, message))
                        }
                    };
                    self.core.reply(number, result);
                }
                None => {}
            }
        }
    }
}

/// As shells tell it.
fn exit_status(status: WaitStatus) -> u8 {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn find<'a>(
    containers: &'a mut BTreeMap<Rc<str>, Container>,
    id: &str,
) -> Result<&'a mut Container> {
    let missing = || {
        error(
            ErrorKind::NotFound,
            format!("container {id:?} does not exist"),
        )
    };
    containers.get_mut(id).ok_or_else(missing)
}

fn prepare(clock: Clock, entropy: &[u8]) -> Result<()> {
    if entropy.len() > MAX_ENTROPY {
        return Err(refused("entropy: too long"));
    }
    let time = Timespec {
        tv_sec: clock.seconds,
        tv_nsec: clock.nanoseconds.into(),
    };
    clock_settime(ClockId::Realtime, time).stage("set the clock")?;
    if entropy.is_empty() {
        return Ok(());
    }
    use std::os::fd::AsFd;
    let random = openat(
        CWD,
        "/dev/urandom",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    );
    crate::syscalls::add_entropy(random.stage("entropy")?.as_fd(), entropy).stage("entropy")
}
