// SPDX-License-Identifier: Apache-2.0
//! The process that is a container as far as the host is concerned. It holds the VM, sits in the
//! container's network namespace and cgroup, carries its stdio, stands in for it when signals come,
//! and ends with its exit status.

mod checkpoint;
pub mod container;
mod event_loop;
pub mod launch;
pub mod order;
mod wording;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use agent_protocol::CONTROL_PORT;
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::thread::set_name;
use vmm::{HostStream, Machine, NetworkCard, SnapshotFiles, VmConfig};

use crate::agent_client::AgentClient;
use crate::channel::Channel;
use crate::network::Joined;
use crate::plan::{BOOT_ID, Network};
use crate::templates::Template as VmTemplate;
use crate::{console, control, logging, network, sandbox, signal_fd, stages, stdio};
use checkpoint::Checkpoint;
use container::{Container, Streams, Template};
use event_loop::{EventLoop, Owed, Parts};
use order::{FILES, Failure, Go, Order, Report, Stage, chain};

/// The creating verb has everything ready when it starts the monitor.
const ORDER: Duration = Duration::from_secs(30);

/// Ends the process with the container's exit status. `fd` is the socket to the creating verb.
pub fn run(fd: RawFd) -> ! {
    let status = match creator(fd).and_then(take_order) {
        Ok((creator, order, files)) => serve(creator, order, files),
        Err(error) => {
            log::error!("monitor: {error}");
            1
        }
    };
    // Nothing is dropped one by one: the VM ends with the process.
    std::process::exit(status.into())
}

fn creator(fd: RawFd) -> Result<Channel, io::Error> {
    // SAFETY: F_GETFD only looks the number up.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open, as just seen. The creating verb opened it for this process, in
    // which nothing else knows of it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    Ok(Channel::new(socket))
}

fn take_order(mut creator: Channel) -> Result<(Channel, Order, Vec<OwnedFd>), io::Error> {
    let order: Order = creator
        .receive(Some(Instant::now() + ORDER))
        .map_err(io::Error::other)?;
    let files = creator
        .take_fds(FILES.len() + usize::from(order.terminal) + 2 * usize::from(order.restore))
        .map_err(io::Error::other)?;
    Ok((creator, order, files))
}

fn serve(mut creator: Channel, order: Order, files: Vec<OwnedFd>) -> u8 {
    let parts = match set_up(&mut creator, order, files) {
        Ok(Some(parts)) => parts,
        Ok(None) => return 1,
        Err(failure) => {
            if creator.send(&Report::Failed(failure.clone())).is_err() {
                log::error!("monitor: {failure}");
            }
            return 1;
        }
    };
    match EventLoop::new(parts, creator) {
        Ok(mut event_loop) => {
            let status = event_loop.run();
            event_loop.leave_to_kernel();
            status
        }
        Err(error) => {
            log::error!("monitor: event loop: {error}");
            1
        }
    }
}

/// From a process that a verb has started to a jailed one with a VM that is ready to run. None: the
/// creating verb has given up.
fn set_up(
    creator: &mut Channel,
    mut order: Order,
    files: Vec<OwnedFd>,
) -> Result<Option<Parts>, Failure> {
    stages::mark("spawn");
    let owner = rustix::process::geteuid().as_raw();
    let setup = at(Stage::Setup);
    let files = Files::sort(files, order.terminal, order.restore).map_err(&setup)?;
    control::take_over(files.listener.as_fd()).map_err(&setup)?;
    leave_caller(order.oom_score_adj).map_err(&setup)?;
    vmm::report_violations(logging::from_signal_handler).map_err(&setup)?;
    let signals = signal_fd::take().map_err(&setup)?;
    let terminal = files.terminal;
    let streams = take_streams(terminal.as_ref(), order.restore).map_err(&setup)?;
    enter_network(&order.network)?;
    tell(creator, Report::Namespaces)?;

    tell(creator, Report::Stage(Stage::Machine))?;
    let console = console().map_err(&setup)?;
    // Before the jail: the file server needs a look at /proc.
    let template = match (&console, order.template && !order.restore) {
        (None, true) => VmTemplate::find(&order.vm, &files.kernel, &files.initramfs),
        _ => None,
    };
    let config = || -> io::Result<VmConfig> {
        Ok(VmConfig {
            kvm: files.kvm.try_clone()?,
            kernel: files.kernel.try_clone()?,
            initramfs: files.initramfs.try_clone()?,
            vcpus: order.vm.vcpus,
            memory_mib: order.vm.memory_mib,
            command_line: console.iter().map(|_| "loglevel=7".to_owned()).collect(),
        })
    };
    let shares: Vec<String> = order
        .shares
        .iter()
        .map(|share| share.name.clone())
        .collect();
    let (mut machine, owed, checkpoint) = match files.checkpoint {
        Some(checkpoint) => {
            let config = config().map_err(at(Stage::Machine))?;
            // What a copy has beside what it was copied from.
            let shares: Vec<String> = match order.fork {
                true => shares
                    .iter()
                    .filter(|name| *name != BOOT_ID)
                    .cloned()
                    .collect(),
                false => shares.clone(),
            };
            let (machine, checkpoint) = restore_machine(config, checkpoint, &shares)?;
            (machine, Owed::default(), Some(checkpoint))
        }
        None => {
            let (machine, owed) = make_machine(config, template)?;
            (machine, owed, None)
        }
    };
    if let Some(console) = console {
        machine.echo_console(console);
    }
    if order.hooks && creator.receive::<Go>(None).is_err() {
        return Ok(None);
    }
    // A new namespace is empty, unless a hook has put something into it.
    if order.joins_links && (order.hooks || order.network != Network::New) {
        tell(creator, Report::Stage(Stage::Network))?;
        let joined = network::join(false).map_err(at(Stage::Network))?;
        order.guest.cards = plug(&mut machine, joined).map_err(at(Stage::Network))?;
    }
    tell(creator, Report::Stage(Stage::Jail))?;
    let mut guest = order.guest;
    // Engines set it as soon as they have the terminal, which may have been before there was somebody to
    // get a signal for it.
    if let Some(Ok(size)) = terminal.as_ref().map(|own| console::size(own.as_fd())) {
        guest.process.terminal = Some(size);
    }
    let root = sandbox::enter(&order.shares, order.open_files).map_err(at(Stage::Jail))?;
    let sharing = match checkpoint {
        Some(_) => Stage::Restore,
        None => Stage::Machine,
    };
    machine
        .share_files(root, &["rootfs"])
        .map_err(at(sharing))?;
    let agent = connect_agent(&mut machine)?;
    stages::mark("vm");
    tell(creator, Report::Stage(Stage::Boot))?;
    let agent_heard = checkpoint.is_some();
    let now = Instant::now();
    let (agent, (container, first)) = match checkpoint {
        Some(checkpoint) => (
            AgentClient::resume(agent, checkpoint.agent),
            Container::restore(
                checkpoint.container,
                streams,
                order.fork,
                order.deadlines,
                now,
            )
            .map_err(at(Stage::Restore))?,
        ),
        None => {
            let template = Template {
                id: order.id,
                guest,
                start: order.start,
                streams,
                deadlines: order.deadlines,
            };
            (AgentClient::new(agent), Container::new(template, now))
        }
    };
    Ok(Some(Parts {
        machine,
        owed,
        agent,
        agent_heard,
        container,
        first,
        listener: files.listener,
        signals,
        terminal,
        owner,
        shares,
    }))
}

/// The machine of a checkpoint, and what else is in there.
fn restore_machine(
    config: VmConfig,
    files: SnapshotFiles,
    shares: &[String],
) -> Result<(Machine, Checkpoint), Failure> {
    let (machine, owner) = Machine::restore_running(config, files).map_err(at(Stage::Restore))?;
    let checkpoint = Checkpoint::decode(&owner, shares).map_err(at(Stage::Restore))?;
    Ok((machine, checkpoint))
}

/// Gives the machine cards for taps, and tells what the guest is to do with them.
fn plug(
    machine: &mut Machine,
    joined: Vec<(Joined, OwnedFd)>,
) -> Result<Vec<agent_protocol::Card>, vmm::Error> {
    let mut cards = Vec::with_capacity(joined.len());
    for (Joined { mut card, mac, mtu }, tap) in joined {
        let slot = machine.plug_network(NetworkCard { tap, mac, mtu })?;
        // A VM has less than a dozen of slots.
        card.slot = slot as u8;
        cards.push(card);
    }
    Ok(cards)
}

/// Restores the template, or boots and makes it.
fn make_machine(
    config: impl Fn() -> io::Result<VmConfig>,
    template: Option<VmTemplate>,
) -> Result<(Machine, Owed), Failure> {
    let config = || config().map_err(at(Stage::Machine));
    if let Some(template) = &template
        && let Some(files) = template.open()
    {
        let known = template.working_set();
        match Machine::restore(config()?, files, &known) {
            Ok(machine) => {
                let mut owed = Owed::default();
                if known.is_empty() {
                    owed.working_set = template.working_set_to_fill();
                }
                return Ok((machine, owed));
            }
            Err(error) => log::warn!("template: {}: booting instead", chain(&error)),
        }
        template.remove();
    }
    let mut machine = Machine::new(config()?).map_err(at(Stage::Machine))?;
    let draft = template.and_then(|template| template.draft().ok());
    let files = draft.as_ref().and_then(|draft| draft.files().ok());
    if let Some(files) = files {
        machine.save_when_ready(files);
    }
    let owed = Owed {
        draft,
        working_set: None,
    };
    Ok((machine, owed))
}

/// Names a file for whoever debugs a guest: it gets all that the kernel and the agent say.
const CONSOLE_VARIABLE: &str = "SANDBOX_CONSOLE";

fn console() -> io::Result<Option<File>> {
    let path = std::env::var_os(CONSOLE_VARIABLE);
    path.map(|path| File::options().append(true).create(true).open(path))
        .transpose()
}

/// Gives the stage to an error.
fn at<E: std::error::Error>(stage: Stage) -> impl Fn(E) -> Failure {
    move |error| Failure::Host {
        stage,
        message: chain(&error),
    }
}

fn tell(creator: &mut Channel, report: Report) -> Result<(), Failure> {
    creator.send(&report).map_err(at(Stage::Setup))
}

/// The descriptors of an order by name.
struct Files {
    listener: OwnedFd,
    kvm: File,
    kernel: File,
    initramfs: File,
    terminal: Option<OwnedFd>,
    checkpoint: Option<SnapshotFiles>,
}

impl Files {
    fn sort(files: Vec<OwnedFd>, terminal: bool, restore: bool) -> io::Result<Files> {
        let mut files = files.into_iter();
        let mut next = |name: &str| {
            let missing = || io::Error::other(format!("{name} was not passed on"));
            files.next().ok_or_else(missing)
        };
        let [listener, kvm, kernel, initramfs] = FILES;
        Ok(Files {
            listener: next(listener)?,
            kvm: next(kvm)?.into(),
            kernel: next(kernel)?.into(),
            initramfs: next(initramfs)?.into(),
            terminal: match terminal {
                true => Some(next("terminal")?),
                false => None,
            },
            checkpoint: match restore {
                true => Some(SnapshotFiles {
                    state: next("state of the checkpoint")?.into(),
                    memory: next("memory of the checkpoint")?.into(),
                }),
                false => None,
            },
        })
    }
}

/// A session of its own, so that no terminal of the caller's reaches the process, and a name.
fn leave_caller(oom_score_adj: Option<i32>) -> io::Result<()> {
    setsid()?;
    set_name(c"sandbox")?;
    if let Some(score) = oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())?;
    }
    Ok(())
}

/// Copies of the streams of the init process. What the caller gave is let go of. A restored process may have streams
/// where this caller has none: what it writes to them goes nowhere, but must not fail.
fn take_streams(terminal: Option<&OwnedFd>, restore: bool) -> io::Result<Streams> {
    let output = |fd: BorrowedFd<'_>| match stdio::stream(fd)? {
        None if restore => stdio::null().map(Some),
        stream => Ok(stream),
    };
    let streams = match terminal {
        Some(terminal) => {
            // Its window changes come as signals then.
            ioctl_tiocsctty(terminal)?;
            Streams::Terminal {
                input: terminal.try_clone()?,
                output: terminal.try_clone()?,
            }
        }
        None => Streams::Separate {
            stdin: stdio::stream(rustix::stdio::stdin())?,
            stdout: output(rustix::stdio::stdout())?,
            stderr: output(rustix::stdio::stderr())?,
        },
    };
    stdio::detach()?;
    Ok(streams)
}

fn enter_network(network: &Network) -> Result<(), Failure> {
    let enter = || match network {
        Network::New => sandbox::new_network(),
        Network::Path(path) => sandbox::join_network(path),
    };
    sandbox::become_root_of_own_namespace()
        .and_then(|()| enter())
        .map_err(at(Stage::Setup))
}

/// The agent's connection ends in a socket pair.
fn connect_agent(machine: &mut Machine) -> Result<OwnedFd, Failure> {
    let pair = || -> io::Result<(OwnedFd, HostStream)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (own, guest) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let input = Some(guest.try_clone()?);
        let output = Some(guest);
        Ok((own, HostStream { input, output }))
    };
    let (own, stream) = pair().map_err(at(Stage::Setup))?;
    machine
        .accept_stream(CONTROL_PORT, stream)
        .map_err(at(Stage::Machine))?;
    Ok(own)
}
