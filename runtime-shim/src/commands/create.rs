// SPDX-License-Identifier: Apache-2.0
//! `create`, and what `run` has in common with it.
//!
//! Everything that a bundle can have wrong is found before the first side effect. Each later step has
//! a guard that undoes it, and the guards are let go of last.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use agent_protocol::WindowSize;
use vmm::SnapshotFiles;

use super::{Error, fork};
use crate::bundle::Bundle;
use crate::cgroup::{Cgroup, CgroupError, Hierarchies};
use crate::cli::{Create, CreateOptions, Global};
use crate::console::{self, Pty};
use crate::guest_files::GuestFiles;
use crate::hooks::{self, Environment};
use crate::identity::Identity;
use crate::monitor::launch::Monitor;
use crate::monitor::order::{Deadlines, Order, Report};
use crate::plan::{self, CgroupLocation, HostFacts, HostLimits, HostPlan, Network, Options, Plan};
use crate::status::Status;
use crate::store::{Locked, State, Store, VERSION, is_host_root, user_name};
use crate::{channel, control, mount_points, network, pid_file, signal_fd, time};

/// What becomes of the container after its creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It waits for `start`.
    Create,
    /// It is started and left alone.
    Detached,
    /// It is started and waited for.
    Foreground,
}

/// What to create.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub global: &'a Global,
    pub store: &'a Store,
    pub bundle: &'a Path,
    pub id: &'a str,
    pub options: &'a CreateOptions,
    pub mode: Mode,
    /// Where signals that end the process arrive.
    pub signals: BorrowedFd<'a>,
    /// It goes on from here.
    pub checkpoint: Option<&'a SnapshotFiles>,
    /// As a copy of this container.
    pub forked_from: Option<&'a str>,
}

/// A container that has come into being. Its monitor is killed when this is dropped.
#[derive(Debug)]
pub struct Created {
    pub container: Locked,
    pub state: State,
    pub monitor: Monitor,
    /// The master of a terminal that nobody else got.
    pub terminal: Option<OwnedFd>,
    pub host: HostPlan,
}

pub fn run(store: &Store, global: &Global, arguments: &Create) -> Result<u8, Error> {
    let signals = signal_fd::take().map_err(Error::Signals)?;
    let wanted = Wanted {
        global,
        store,
        bundle: &arguments.bundle,
        id: &arguments.id,
        options: &arguments.options,
        mode: Mode::Create,
        signals: signals.as_fd(),
        checkpoint: None,
        forked_from: None,
    };
    let created = create(wanted)?;
    created.monitor.release();
    Ok(0)
}

/// A container whose monitor has its order. All of it goes when this is dropped, the monitor first.
#[derive(Debug)]
pub struct Begun<'a> {
    monitor: Monitor,
    links: Links,
    terminal: Option<Terminal>,
    cgroup: Option<Cgroup>,
    container: Locked,
    state: State,
    host: HostPlan,
    wanted: Wanted<'a>,
}

/// Makes a container up to where its mode says, with its state saved and its pid file written.
pub fn create(wanted: Wanted<'_>) -> Result<Created, Error> {
    begin(wanted)?.finish()
}

pub fn begin(wanted: Wanted<'_>) -> Result<Begun<'_>, Error> {
    let bundle = Bundle::load(wanted.bundle, wanted.options.config.as_deref())?;
    let mut plan = make_plan(&bundle, wanted)?;
    if wanted.forked_from.is_some() {
        plan.host = plan.host.of_fork(wanted.id);
    }
    check_options(wanted, &plan)?;
    let files = HostFiles::open()?;

    let container = wanted.store.claim(wanted.id)?;
    container.save_config(&bundle.config)?;
    if wanted.forked_from.is_some() {
        fork::prepare(
            &container,
            &wanted.store.directory(wanted.id),
            &mut plan.host,
        )?;
    }
    let mut state = initial_state(&bundle, wanted.id, &plan)?;
    state.forked_from = wanted.forked_from.map(ToOwned::to_owned);
    let hierarchies = hierarchies(&plan.host)?;
    // Before they are made: so `delete` finds them even if this process is killed meanwhile.
    let planned = |found: &Hierarchies| Cgroup::planned(found, &plan.host.cgroup);
    state.cgroups = hierarchies.as_ref().map(planned).unwrap_or_default();
    container.save(&state)?;
    let made = mount_points::make(&bundle.rootfs, &plan.host.mount_points)?;
    plan::set_default_modes(&mut plan.guest.mounts, &made);
    let cgroup = make_cgroup(hierarchies.as_ref(), &plan.host)?;
    let terminal = open_terminal(wanted, &plan)?;
    // Dropped after the monitor has gone.
    let links = Links(network_path(&plan.host));
    let mut monitor = Monitor::spawn(wanted.id, terminal.is_none(), wanted.global)?;
    // It waits for its order; later it may have ended already.
    let process = Identity::of(monitor.pid()).ok_or(Error::NoIdentity)?;
    if let Some(cgroup) = &cgroup {
        cgroup.add(monitor.pid())?;
    } else {
        state.cgroups.clear();
    }
    give_order(
        &mut monitor,
        &container,
        &state,
        wanted,
        &plan,
        &files,
        terminal.as_ref(),
    )?;
    run_hooks(&mut monitor, &state, &plan.host, wanted.signals)?;
    state.process = process;
    Ok(Begun {
        monitor,
        links,
        terminal,
        cgroup,
        container,
        state,
        host: plan.host,
        wanted,
    })
}

impl Begun<'_> {
    /// Waits until the monitor has come so far.
    pub fn expect(&mut self, report: &Report) -> Result<(), Error> {
        Ok(self.monitor.expect(report, self.wanted.signals)?)
    }

    pub fn finish(mut self) -> Result<Created, Error> {
        self.expect(&Report::Created)?;
        let Begun {
            monitor,
            mut links,
            terminal,
            cgroup,
            container,
            mut state,
            host,
            wanted,
        } = self;
        let terminal = terminal.and_then(|terminal| terminal.into_own_master(wanted.options));
        state.status = Status::Created;
        let created = finish(wanted, container, cgroup, state, monitor, terminal, host)?;
        links.0 = None;
        Ok(created)
    }
}

/// A network namespace in which links may have been joined. They are let go of when this is dropped.
#[derive(Debug)]
struct Links(Option<PathBuf>);

impl Drop for Links {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            network::release(path);
        }
    }
}

fn network_path(host: &HostPlan) -> Option<PathBuf> {
    match &host.network {
        Network::Path(path) if host.joins_links => Some(path.clone()),
        _ => None,
    }
}

fn make_plan(bundle: &Bundle, wanted: Wanted<'_>) -> Result<Plan, Error> {
    let options = Options {
        id: wanted.id.to_owned(),
        cgroup_manager: wanted.global.cgroup_manager(),
    };
    let mut plan = plan::plan(bundle, &options, &HostFacts::gather(bundle))?;
    for warning in &plan.warnings {
        log::warn!("{warning}");
    }
    if let Some(size) = &mut plan.guest.process.terminal
        && *size == WindowSize::default()
        && let (Mode::Foreground, Some(own)) = (wanted.mode, console::own_size())
    {
        *size = own;
    }
    Ok(plan)
}

fn check_options(wanted: Wanted<'_>, plan: &Plan) -> Result<(), Error> {
    if wanted.options.preserve_fds > 0 {
        return Err(Error::PreserveFds);
    }
    let terminal = plan.guest.process.terminal.is_some();
    let attached = wanted.mode == Mode::Foreground;
    super::check_console(terminal, attached, wanted.options.console_socket.as_deref())
}

/// What the monitor cannot open itself, or what is better known to be there before it starts.
#[derive(Debug)]
pub struct HostFiles {
    pub kvm: File,
    pub kernel: File,
    pub initramfs: File,
}

impl HostFiles {
    pub fn open() -> Result<HostFiles, Error> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let guest = GuestFiles::find()?;
        let open = |path: PathBuf| File::open(&path).map_err(|error| Error::GuestFile(path, error));
        Ok(HostFiles {
            kvm: kvm.map_err(|source| Error::Kvm {
                hint: kvm_hint(&source),
                source,
            })?,
            kernel: open(guest.kernel)?,
            initramfs: open(guest.initramfs)?,
        })
    }
}

fn kvm_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "virtualization is off, or the kvm module is not loaded; `sandbox check` tells more"
        }
        io::ErrorKind::PermissionDenied => "the user has to be in the group of /dev/kvm",
        _ => "`sandbox check` tells more",
    }
}

fn initial_state(bundle: &Bundle, id: &str, plan: &Plan) -> Result<State, Error> {
    let own = i32::try_from(std::process::id())
        .ok()
        .and_then(Identity::of);
    Ok(State {
        version: VERSION,
        oci_version: bundle.spec.version().clone(),
        id: id.to_owned(),
        process: own.ok_or(Error::NoIdentity)?,
        status: Status::Creating,
        bundle: bundle.directory.clone(),
        rootfs: bundle.rootfs.clone(),
        created: time::now(),
        owner: user_name(rustix::process::getuid().as_raw()),
        annotations: plan.host.annotations.clone(),
        cgroups: Vec::new(),
        vm: plan.vm,
        mounts: Vec::new(),
        mounts_added: 0,
        forked_from: None,
    })
}

fn hierarchies(host: &HostPlan) -> Result<Option<Hierarchies>, Error> {
    if host.cgroup == CgroupLocation::Unchanged {
        return Ok(None);
    }
    Ok(Some(Hierarchies::detect()?))
}

fn make_cgroup(
    hierarchies: Option<&Hierarchies>,
    host: &HostPlan,
) -> Result<Option<Cgroup>, Error> {
    let Some(hierarchies) = hierarchies else {
        return Ok(None);
    };
    let cgroup = match Cgroup::create(hierarchies, &host.cgroup) {
        Ok(cgroup) => cgroup,
        // As in runc: a user who has no cgroup to give runs without, if nothing depends on it.
        Err(error)
            if is_denied(&error) && !is_host_root() && host.limits == HostLimits::default() =>
        {
            log::debug!("no cgroup on the host: {}", super::chain(&error));
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    cgroup.set(&host.limits)?;
    Ok(Some(cgroup))
}

fn is_denied(error: &CgroupError) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    let CgroupError::Io { source, .. } = error else {
        return false;
    };
    matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem)
}

/// The terminal of the init process on the host.
#[derive(Debug)]
struct Terminal(Pty);

impl Terminal {
    /// Where the engine got the master, this process has no use for it.
    fn into_own_master(self, options: &CreateOptions) -> Option<OwnedFd> {
        options.console_socket.is_none().then_some(self.0.master)
    }
}

fn open_terminal(wanted: Wanted<'_>, plan: &Plan) -> Result<Option<Terminal>, Error> {
    let Some(size) = plan.guest.process.terminal else {
        return Ok(None);
    };
    let pty = Pty::open(size)?;
    if let Some(socket) = &wanted.options.console_socket {
        pty.send_master(socket)?;
    }
    Ok(Some(Terminal(pty)))
}

fn give_order(
    monitor: &mut Monitor,
    container: &Locked,
    state: &State,
    wanted: Wanted<'_>,
    plan: &Plan,
    files: &HostFiles,
    terminal: Option<&Terminal>,
) -> Result<(), Error> {
    let listener = control::listener(container.directory())?;
    let mut guest = plan.guest.clone();
    guest.state = oci_state(state, monitor.pid(), Status::Created)?;
    let order = Order {
        id: wanted.id.to_owned(),
        guest,
        vm: plan.vm,
        shares: plan.host.shares.clone(),
        network: plan.host.network.clone(),
        joins_links: plan.host.joins_links,
        open_files: plan.host.open_files,
        oom_score_adj: plan.host.oom_score_adj,
        start: wanted.mode != Mode::Create,
        hooks: has_create_hooks(&plan.host),
        terminal: terminal.is_some(),
        restore: wanted.checkpoint.is_some(),
        fork: wanted.forked_from.is_some(),
        template: !wanted.options.no_template,
        deadlines: Deadlines::from_environment(),
    };
    let mut descriptors = vec![
        listener.as_fd(),
        files.kvm.as_fd(),
        files.kernel.as_fd(),
        files.initramfs.as_fd(),
    ];
    descriptors.extend(terminal.map(|terminal| terminal.0.slave.as_fd()));
    if let Some(SnapshotFiles { state, memory }) = wanted.checkpoint {
        descriptors.extend([state.as_fd(), memory.as_fd()]);
    }
    Ok(monitor.order(&order, &descriptors)?)
}

fn has_create_hooks(host: &HostPlan) -> bool {
    let hooks = &host.hooks;
    let kinds = [
        &hooks.prestart,
        &hooks.create_runtime,
        &hooks.create_container,
    ];
    kinds.into_iter().any(|hooks| !hooks.is_empty())
}

/// The hooks of create, with the container's namespaces in place and its files not yet shared.
fn run_hooks(
    monitor: &mut Monitor,
    state: &State,
    host: &HostPlan,
    signals: BorrowedFd<'_>,
) -> Result<(), Error> {
    if !has_create_hooks(host) {
        return Ok(());
    }
    monitor.expect(&Report::Namespaces, signals)?;
    let network =
        File::open(format!("/proc/{}/ns/net", monitor.pid())).map_err(Error::Namespace)?;
    let text = oci_state(state, monitor.pid(), Status::Creating)?;
    let runtime = Environment {
        state: &text,
        directory: &state.bundle,
        network: None,
    };
    let inside = Environment {
        network: Some(network.as_fd()),
        ..runtime
    };
    hooks::run("prestart", &host.hooks.prestart, &runtime)?;
    hooks::run("createRuntime", &host.hooks.create_runtime, &runtime)?;
    hooks::run("createContainer", &host.hooks.create_container, &inside)?;
    Ok(monitor.go()?)
}

/// The OCI state as hooks get it.
pub fn oci_state(state: &State, pid: i32, status: Status) -> Result<String, Error> {
    let mut state = state.clone();
    state.process.pid = pid;
    serde_json::to_string(&state.oci(status)).map_err(|error| Error::Output(error.into()))
}

/// The container exists: now it is to stay.
fn finish(
    wanted: Wanted<'_>,
    mut container: Locked,
    cgroup: Option<Cgroup>,
    state: State,
    monitor: Monitor,
    terminal: Option<OwnedFd>,
    host: HostPlan,
) -> Result<Created, Error> {
    container.save(&state)?;
    if let Some(path) = &wanted.options.pid_file {
        pid_file::write(path, monitor.pid())?;
    }
    if let Some(socket) = &wanted.options.pidfd_socket {
        send_pidfd(socket, monitor.pidfd())?;
    }
    if let Some(mut cgroup) = cgroup {
        cgroup.keep();
    }
    container.keep();
    Ok(Created {
        container,
        state,
        monitor,
        terminal,
        host,
    })
}

pub fn send_pidfd(socket: &Path, pidfd: BorrowedFd<'_>) -> Result<(), Error> {
    let fail = |error| Error::PidfdSocket(socket.to_owned(), error);
    let stream = UnixStream::connect(socket).map_err(fail)?;
    channel::send_once(stream.as_fd(), b"pidfd", &[pidfd]).map_err(|error| fail(error.into()))?;
    Ok(())
}
