// SPDX-License-Identifier: Apache-2.0
//! A container: its state, its cgroup and its processes.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::rc::Rc;

use agent_protocol::{
    AgentError, Card, CgroupPlan, ErrorKind, Event, GuestPlan, IdMapping, Mount, Process, Reply,
    Stdio, Usage,
};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use crate::cgroup::Cgroup;
use crate::channel::channel;
use crate::child::{self, Exec, Init, MADE_BY_CHILD, MountChange, NEW_NETWORK, NEW_PID, NEW_USER};
use crate::core::{Core, Owner, Source, state_error};
use crate::error::{Result, Stage, Within, error, refused};
use crate::instance::{Instance, Phase, Progress, Stdios, open_stdio};
use crate::mounts::{CgroupView, open_source, open_sources};
use crate::network::Target;
use crate::poll::Token;
use crate::process::set_limits;
use crate::stdio::Side;
use crate::syscalls::{Child, fork, set_namespaces};
use crate::{mounts, namespaces, network};

/// The number of a container's init process.
const INIT: u32 = 0;

/// NAME_MAX: the id is the name of the cgroup.
const MAX_ID: usize = 255;

#[derive(Debug)]
enum State {
    Creating,
    Created,
    Running,
    Stopped,
    /// Killed; answered when the last process is gone.
    Deleting {
        number: u64,
        answer: std::result::Result<Reply, AgentError>,
    },
}

/// The freezer, which goes its own way beside the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freezer {
    Thawed,
    Freezing { number: u64 },
    Frozen,
}

#[derive(Debug)]
pub(crate) struct Container {
    id: Rc<str>,
    state: State,
    freezer: Freezer,
    cgroup: Cgroup,
    tokens: Vec<(Side, Token)>,
    /// What is written to the cgroup once the init process is set up: its limits are for the container,
    /// not for its making.
    limits: CgroupPlan,
    /// Those that the container does not share with the agent.
    namespaces: u64,
    uid_mappings: Vec<IdMapping>,
    gid_mappings: Vec<IdMapping>,
    processes: BTreeMap<u32, Instance>,
}

/// Whether a container is still to be kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Kept,
    Gone,
}

impl Container {
    /// Begins to make a container. The answer comes when its init process is ready, or has failed.
    pub(crate) fn create(
        core: &mut Core,
        number: u64,
        id: Rc<str>,
        plan: &GuestPlan,
        stdio: Stdio,
    ) -> Result<Container> {
        if id.is_empty() || id.len() > MAX_ID || id.contains(['/', '\0']) || id.starts_with('.') {
            return Err(refused(format!("container id {id:?}: invalid")));
        }
        let namespaces = child::namespaces_of(plan)?;
        let user = namespaces & NEW_USER != 0;
        if !(user || plan.uid_mappings.is_empty() && plan.gid_mappings.is_empty()) {
            return Err(refused("uidMappings, gidMappings: no user namespace"));
        }
        let sources = open_sources(core.share()?, plan)?;
        let stdios = open_stdio(core, stdio, &plan.process, &plan.uid_mappings)?;
        let cgroup = Cgroup::create(&core.cgroup_root, &id)?;
        let mut container = Container {
            id,
            state: State::Creating,
            freezer: Freezer::Thawed,
            cgroup,
            tokens: Vec::new(),
            limits: plan.cgroup.clone(),
            namespaces,
            uid_mappings: plan.uid_mappings.clone(),
            gid_mappings: plan.gid_mappings.clone(),
            processes: BTreeMap::new(),
        };
        let begun = container.begin(core, number, plan, sources, stdios);
        if let Err(error) = begun {
            if container.processes.is_empty() {
                container
                    .release(core)
                    .unwrap_or_else(|leak| log::warn!("{leak}"));
                return Err(error);
            }
            for process in container.processes.values_mut() {
                // Its end is not to be told of: this is.
                process.abandon(core, None);
            }
            container.delete(core, number, Err(error));
        }
        Ok(container)
    }

    fn begin(
        &mut self,
        core: &mut Core,
        number: u64,
        plan: &GuestPlan,
        sources: mounts::Sources,
        stdios: Stdios,
    ) -> Result<()> {
        self.watch_cgroup(core)?;
        if let Some(root) = namespaces::outside(&self.uid_mappings, 0).filter(|&root| root != 0) {
            self.cgroup.delegate(root)?;
        }
        let (channel, upward) = channel().stage("process set-up")?;
        let (stdio, streams) = stdios.split();
        let path = self.cgroup.path().to_owned();
        let init = Init {
            plan,
            sources,
            stdio,
            cgroup: &path,
        };
        let flags = self.namespaces & !MADE_BY_CHILD;
        let child = fork(flags, Some(self.cgroup.as_fd()), || {
            child::run_init(upward, init)
        })
        .stage("clone")?;
        let pid = child.pid;
        core.children
            .insert(pid.as_raw_pid(), Owner::Process((self.id.clone(), INIT)));
        let key = (self.id.clone(), INIT);
        let instance = Instance::new(core, key, child, channel, streams, number)?;
        self.processes.insert(INIT, instance);
        if self.namespaces & NEW_USER != 0 {
            namespaces::write_mappings(pid, &self.uid_mappings, &self.gid_mappings)?;
        }
        set_limits(pid, &plan.process)?;
        self.configure(core, &plan.cards)?;
        self.process(INIT)?.proceed()
    }

    /// Sets cards up in the network namespace of the container.
    fn configure(&self, core: &Core, cards: &[Card]) -> Result<()> {
        if cards.is_empty() {
            return Ok(());
        }
        let own_network = self.namespaces & NEW_NETWORK != 0;
        let init = self.process(INIT)?;
        let target = own_network.then(|| Target {
            pid: init.pid,
            pidfd: init.pidfd.as_fd(),
        });
        network::configure(cards, target, core.own.as_fd())
    }

    fn watch_cgroup(&mut self, core: &mut Core) -> Result<()> {
        let id = &self.id;
        let events = core
            .poll
            .add_priority(&self.cgroup.events, Source::Cgroup(id.clone()));
        self.tokens.push((Side::Guest, events.stage("epoll")?));
        if let Some(memory) = &self.cgroup.memory_events {
            let memory = core.poll.add_priority(memory, Source::Memory(id.clone()));
            self.tokens.push((Side::Host, memory.stage("epoll")?));
        }
        Ok(())
    }

    fn process(&self, process: u32) -> Result<&Instance> {
        let missing = || {
            error(
                ErrorKind::NotFound,
                format!("process {process} does not exist"),
            )
        };
        self.processes.get(&process).ok_or_else(missing)
    }

    /// The init process, if the container has one that can be joined.
    fn init(&self) -> Result<&Instance> {
        let not_running = || state_error("container not running");
        match self.state {
            State::Created | State::Running => self.processes.get(&INIT).ok_or_else(not_running),
            State::Creating | State::Stopped | State::Deleting { .. } => Err(not_running()),
        }
    }

    pub(crate) fn start(&mut self, core: &Core, number: u64, cards: &[Card]) -> Result<()> {
        match self.state {
            State::Created => {}
            State::Running => return Err(state_error("cannot start an already running container")),
            State::Creating => {
                return Err(state_error("cannot start a container that is not created"));
            }
            State::Stopped | State::Deleting { .. } => {
                return Err(state_error("cannot start a container that has stopped"));
            }
        }
        self.configure(core, cards)?;
        self.init()?.proceed()?;
        if let Some(init) = self.processes.get_mut(&INIT) {
            init.phase = Phase::Starting { number };
        }
        self.state = State::Running;
        Ok(())
    }

    /// Begins to run a further process. In a paused container it is born frozen, and answered for when
    /// the container is resumed.
    pub(crate) fn exec(
        &mut self,
        core: &mut Core,
        number: u64,
        process: u32,
        plan: &Process,
        stdio: Stdio,
        ignore_paused: bool,
    ) -> Result<()> {
        let init = self
            .init()
            .map_err(|_| state_error("cannot exec in a stopped container"))?;
        if self.freezer != Freezer::Thawed && !ignore_paused {
            return Err(state_error(
                "cannot exec in a paused container (use --ignore-paused to override)",
            ));
        }
        if self.processes.contains_key(&process) {
            return Err(state_error("process number is in use"));
        }
        let stdios = open_stdio(core, stdio, plan, &self.uid_mappings)?;
        let (channel, upward) = channel().stage("process set-up")?;
        let (stdio, streams) = stdios.split();
        let exec = Exec {
            process: plan,
            init: init.pidfd.as_fd(),
            namespaces: self.namespaces & !NEW_PID,
            has_root: child::has_root(&self.uid_mappings, &self.gid_mappings),
            stdio,
        };
        let child = self.fork_into(core, init, || child::run_exec(upward, exec))?;
        let pid = child.pid;
        let key = (self.id.clone(), process);
        core.children
            .insert(pid.as_raw_pid(), Owner::Process(key.clone()));
        let instance = Instance::new(core, key, child, channel, streams, number)?;
        let begun = set_limits(pid, plan).and_then(|()| instance.proceed());
        self.processes.insert(process, instance);
        if let Err(error) = begun
            && let Some(instance) = self.processes.get_mut(&process)
        {
            instance.abandon(core, Some((number, error)));
        }
        Ok(())
    }

    /// Forks a child into the cgroup and the pid namespace of the container.
    fn fork_into(&self, core: &Core, init: &Instance, body: impl FnOnce() -> i32) -> Result<Child> {
        let divided;
        let cgroup = match self.cgroup.is_divided() {
            false => self.cgroup.as_fd(),
            true => {
                divided = self.cgroup.of_init(init.pid)?;
                divided.as_fd()
            }
        };
        // Only children to come are affected, and the agent comes back at once: it has one thread.
        let own_pid_namespace = self.namespaces & NEW_PID != 0;
        if own_pid_namespace {
            set_namespaces(init.pidfd.as_fd(), NEW_PID).stage("enter the pid namespace")?;
        }
        let child = fork(0, Some(cgroup), body);
        if own_pid_namespace && let Err(errno) = set_namespaces(core.own.as_fd(), NEW_PID) {
            // Whatever it forked from now on would be born into that container.
            log::error!("leave the pid namespace: {errno}");
            crate::power::restart();
        }
        child.map_err(|errno| match errno {
            Errno::AGAIN => error(
                ErrorKind::System,
                "clone: the limit of processes is reached",
            ),
            errno => error(
                ErrorKind::System,
                format!("clone: {}", crate::error::reason(errno)),
            ),
        })
    }

    pub(crate) fn signal(&self, process: u32, signal: i32, all: bool) -> Result<()> {
        if !(0..=64).contains(&signal) {
            return Err(refused(format!("signal {signal}: out of range")));
        }
        if !all {
            let missing = |_| match process {
                INIT => state_error("container not running"),
                _ => error(ErrorKind::NotFound, "no such process"),
            };
            return self.process(process).map_err(missing)?.signal(signal);
        }
        if signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.processes() {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            match pid.map(|pid| crate::syscalls::kill(pid, signal)) {
                // It has ended meanwhile.
                Some(Err(Errno::SRCH)) | None => {}
                Some(sent) => sent.stage("kill")?,
            }
        }
        Ok(())
    }

    pub(crate) fn resize(&self, process: u32, size: agent_protocol::WindowSize) -> Result<()> {
        self.process(process)?.resize(size)
    }

    pub(crate) fn pause(&mut self, core: &mut Core, number: u64) -> Result<()> {
        self.init()?;
        match self.freezer {
            Freezer::Thawed => {}
            Freezer::Freezing { .. } | Freezer::Frozen => {
                return Err(state_error("container already paused"));
            }
        }
        self.cgroup.freeze(true)?;
        self.freezer = Freezer::Freezing { number };
        self.check_frozen(core);
        Ok(())
    }

    pub(crate) fn resume(&mut self, core: &mut Core) -> Result<()> {
        if self.freezer == Freezer::Thawed {
            return Err(state_error("container not paused"));
        }
        self.cgroup.freeze(false)?;
        self.give_up_pause(core);
        Ok(())
    }

    fn give_up_pause(&mut self, core: &mut Core) {
        if let Freezer::Freezing { number } = self.freezer {
            core.reply(number, Err(state_error("pause: given up")));
        }
        self.freezer = Freezer::Thawed;
    }

    fn check_frozen(&mut self, core: &mut Core) {
        if let Freezer::Freezing { number } = self.freezer
            && self.cgroup.events().frozen
        {
            self.freezer = Freezer::Frozen;
            core.reply(number, Ok(Reply::Done));
        }
    }

    pub(crate) fn update(&mut self, plan: &CgroupPlan) -> Result<()> {
        self.init()?;
        self.cgroup.apply(plan)
    }

    pub(crate) fn usage(&self) -> Usage {
        let network = self
            .processes
            .get(&INIT)
            .and_then(|init| std::fs::read_to_string(format!("/proc/{}/net/dev", init.pid)).ok());
        Usage {
            files: self.cgroup.usage(),
            network: network.unwrap_or_default(),
        }
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.cgroup.processes()
    }

    /// Begins to mount something into the running container.
    pub(crate) fn mount(&self, core: &mut Core, number: u64, mount: &Mount) -> Result<()> {
        self.init()?;
        let name = format_args!("mount {}", mount.destination).to_string();
        let source = open_source(core.share()?, mount).within(name)?;
        let cgroup = CgroupView {
            namespaced: false,
            path: self.cgroup.path(),
        };
        let change = MountChange::Attach {
            mount,
            source,
            cgroup,
        };
        self.change_mounts(core, number, change)
    }

    pub(crate) fn unmount(&self, core: &mut Core, number: u64, destination: &str) -> Result<()> {
        self.change_mounts(core, number, MountChange::Detach { destination })
    }

    fn change_mounts(&self, core: &mut Core, number: u64, change: MountChange<'_>) -> Result<()> {
        let init = self.init()?.pidfd.as_fd();
        let (channel, upward) = channel().stage("mount")?;
        let child =
            fork(0, None, || child::run_mount_change(upward, init, change)).stage("clone")?;
        core.children
            .insert(child.pid.as_raw_pid(), Owner::Change { number, channel });
        Ok(())
    }

    /// Kills what is left, and answers when it is gone. Output on its way is given up.
    pub(crate) fn delete(
        &mut self,
        core: &mut Core,
        number: u64,
        answer: std::result::Result<Reply, AgentError>,
    ) -> Fate {
        if matches!(self.state, State::Deleting { .. }) {
            core.reply(number, Err(state_error("container is being deleted")));
            return Fate::Kept;
        }
        self.give_up_pause(core);
        self.state = State::Deleting { number, answer };
        if let Err(error) = self.cgroup.kill() {
            log::warn!("{}: {error}", self.id);
            for process in self.processes.values() {
                // One that has ended already is what is wanted.
                let _ = process.signal(libc::SIGKILL);
            }
        }
        for process in self.processes.values_mut() {
            process.close_streams(core);
        }
        self.collect(core);
        self.settle(core)
    }

    /// Tells of processes that have ended and whose output is passed on, and forgets them.
    fn collect(&mut self, core: &mut Core) {
        let finished = |process: &Instance| Some((process.key.1, process.finished()?));
        for (number, status) in self
            .processes
            .values()
            .filter_map(finished)
            .collect::<Vec<_>>()
        {
            core.event(Event::Exited {
                container: self.id.to_string(),
                process: number,
                status,
            });
            self.processes.remove(&number);
        }
    }

    /// Answers a deletion when nothing is left to wait for.
    fn settle(&mut self, core: &mut Core) -> Fate {
        let State::Deleting { number, answer } = &self.state else {
            return Fate::Kept;
        };
        if !self.processes.is_empty() || self.cgroup.events().populated {
            return Fate::Kept;
        }
        let (number, answer) = (*number, answer.clone());
        let released = self.release(core);
        core.reply(number, answer.and_then(|reply| released.map(|()| reply)));
        Fate::Gone
    }

    fn release(&mut self, core: &mut Core) -> Result<()> {
        for (file, token) in self.tokens.drain(..) {
            match (file, &self.cgroup.memory_events) {
                (Side::Guest, _) => core.poll.remove(&self.cgroup.events, token),
                (Side::Host, Some(memory)) => core.poll.remove(memory, token),
                (Side::Host, None) => {}
            }
        }
        self.cgroup.remove()
    }

    /// `cgroup.events` has changed.
    pub(crate) fn cgroup_event(&mut self, core: &mut Core) -> Fate {
        // Reading it is what ends the event, whatever it says.
        self.cgroup.events();
        self.check_frozen(core);
        self.settle(core)
    }

    /// `memory.events` has changed, or may have.
    pub(crate) fn memory_event(&mut self, core: &mut Core) {
        if self.cgroup.was_out_of_memory() {
            let container = self.id.to_string();
            core.event(Event::OutOfMemory { container });
        }
    }

    /// A child has something to say.
    pub(crate) fn channel_event(&mut self, core: &mut Core, process: u32) -> Fate {
        loop {
            let Some(instance) = self.processes.get_mut(&process) else {
                return Fate::Kept;
            };
            let pid = instance.pid;
            match instance.hear(core) {
                Progress::None => return Fate::Kept,
                Progress::Reported => {
                    if process == INIT
                        && let Err(error) = self.cgroup.apply(&self.limits)
                    {
                        return self.set_up_failed(core, process, error);
                    }
                    self.advance(core, process);
                }
                Progress::Executed { number } => {
                    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
                    let reply = match process {
                        INIT => Reply::Done,
                        _ => Reply::Created { pid },
                    };
                    core.reply(number, Ok(reply));
                }
                Progress::Failed(error) => return self.set_up_failed(core, process, error),
                // A container that could not be started has stopped, a process was never there.
                Progress::NotExecuted { number, error } if process == INIT => {
                    core.reply(number, Err(error));
                }
                Progress::NotExecuted { number, error } => {
                    if let Some(instance) = self.processes.get_mut(&process) {
                        instance.abandon(core, Some((number, error)));
                    }
                }
            }
        }
    }

    /// Goes on when the child is ready and its streams are connected.
    fn advance(&mut self, core: &mut Core, process: u32) {
        let Some(instance) = self.processes.get_mut(&process) else {
            return;
        };
        let Phase::SettingUp { number, .. } = instance.phase else {
            return;
        };
        if !instance.is_ready() {
            return;
        }
        if process == INIT {
            instance.phase = Phase::Created;
            let pid = u32::try_from(instance.pid.as_raw_nonzero().get()).unwrap_or(0);
            if matches!(self.state, State::Creating) {
                self.state = State::Created;
            }
            core.reply(number, Ok(Reply::Created { pid }));
        } else {
            instance.phase = Phase::Starting { number };
            // If the child is gone, its end tells.
            let _ = instance.proceed();
        }
    }

    /// A process could not be made: without its init process, neither could the container.
    fn set_up_failed(&mut self, core: &mut Core, process: u32, error: AgentError) -> Fate {
        let Some(instance) = self.processes.get_mut(&process) else {
            return Fate::Kept;
        };
        let Phase::SettingUp { number, .. } = instance.phase else {
            return Fate::Kept;
        };
        if process == INIT && matches!(self.state, State::Creating) {
            instance.abandon(core, None);
            return self.delete(core, number, Err(error));
        }
        instance.abandon(core, Some((number, error)));
        Fate::Kept
    }

    pub(crate) fn stream_event(
        &mut self,
        core: &mut Core,
        process: u32,
        slot: u8,
        event: Option<(Side, EventFlags)>,
    ) -> Fate {
        let Some(instance) = self.processes.get_mut(&process) else {
            return Fate::Kept;
        };
        let connected = match event {
            Some((side, flags)) => instance.stream_event(core, slot, side, flags),
            None => {
                instance.run_stream(core, slot);
                Ok(())
            }
        };
        if let Err(error) = connected.stage("stdio: connect") {
            return self.set_up_failed(core, process, error);
        }
        self.advance(core, process);
        self.collect(core);
        Fate::Kept
    }

    /// A process has ended.
    pub(crate) fn reaped(&mut self, core: &mut Core, process: u32, status: u8) -> Fate {
        // What it had to say is heard first, and told first.
        if self.channel_event(core, process) == Fate::Gone {
            return Fate::Gone;
        }
        self.memory_event(core);
        let Some(instance) = self.processes.get_mut(&process) else {
            return Fate::Kept;
        };
        match instance.phase {
            Phase::SettingUp { number, .. } => {
                instance.release(core);
                self.processes.remove(&process);
                let message = format!("process set-up: ended with status {status}");
                let error = error(ErrorKind::System, message);
                if process == INIT && matches!(self.state, State::Creating) {
                    return self.delete(core, number, Err(error));
                }
                core.reply(number, Err(error));
            }
            Phase::Failed => {
                instance.release(core);
                self.processes.remove(&process);
            }
            Phase::Created | Phase::Starting { .. } | Phase::Running | Phase::Ended { .. } => {
                instance.ended(core, status);
                if matches!(self.state, State::Deleting { .. }) {
                    instance.close_streams(core);
                } else if process == INIT {
                    self.state = State::Stopped;
                    self.give_up_pause(core);
                    self.kill_others();
                }
                self.collect(core);
            }
        }
        self.settle(core)
    }

    /// Without a pid namespace of its own a container does not end with its init process by itself.
    fn kill_others(&self) {
        if self.namespaces & NEW_PID == 0
            && let Err(error) = self.cgroup.kill()
        {
            log::warn!("{}: {error}", self.id);
        }
    }
}
