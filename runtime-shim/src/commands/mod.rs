// SPDX-License-Identifier: Apache-2.0
//! One module a verb. Each returns the exit status of the process.

mod check;
mod completion;
pub mod create;
mod delete;
mod events;
mod exec;
mod exec_process;
mod exec_stub;
mod features;
mod install;
mod jail;
mod kill;
mod list;
mod live;
mod monitor;
mod pause;
mod ps;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod update;

use std::io;
use std::path::{Path, PathBuf};

use crate::bundle::BundleError;
use crate::cgroup::CgroupError;
use crate::channel;
use crate::cli::{Cli, CliError, Command};
use crate::console;
use crate::control;
use crate::guest_files::GuestFilesError;
use crate::hooks::HookError;
use crate::logging::LoggingError;
use crate::monitor::launch;
use crate::mount_points::MountPointError;
use crate::network;
use crate::pid_file::PidFileError;
use crate::plan::PlanError;
use crate::sandbox;
use crate::status::StatusError;
use crate::store::{Store, StoreError};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Cli(#[from] CliError),
    #[error(transparent)]
    Logging(#[from] LoggingError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Status(#[from] StatusError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Spec(#[from] spec::SpecError),
    #[error(transparent)]
    Control(#[from] control::Error),
    #[error(transparent)]
    Monitor(#[from] launch::Error),
    #[error(transparent)]
    Console(#[from] console::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    GuestFiles(#[from] GuestFilesError),
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
    #[error(transparent)]
    PidFile(#[from] PidFileError),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error("guest file {path}", path = .0.display())]
    GuestFile(PathBuf, #[source] io::Error),
    #[error("/dev/kvm ({hint})")]
    Kvm {
        hint: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Install(#[from] install::InstallError),
    #[error("standard output")]
    Output(#[source] io::Error),
    #[error("standard streams")]
    Stdio(#[source] io::Error),
    #[error("take over signals")]
    Signals(#[source] io::Error),
    #[error("wait")]
    Wait(#[source] channel::Error),
    #[error("wait for the monitor")]
    WaitForMonitor(#[source] io::Error),
    #[error("kill the monitor")]
    Kill(#[source] io::Error),
    #[error("start a process to stand for the exec")]
    Fork(#[source] io::Error),
    #[error("make up a container ID")]
    RandomId(#[source] io::Error),
    #[error("network namespace of the monitor")]
    Namespace(#[source] io::Error),
    #[error("send a pidfd to {path}", path = .0.display())]
    PidfdSocket(PathBuf, #[source] io::Error),
    #[error("ps")]
    HostPs(#[source] io::Error),
    #[error("ps: its output has no column PID")]
    NoPidColumn,
    #[error("a process ended before it could be recorded")]
    NoIdentity,
    #[error("process {0} of the container does not end")]
    StillThere(i32),
    #[error("cannot allocate tty if the container is detached without setting --console-socket")]
    TerminalWithoutSocket,
    #[error("cannot use --console-socket if the container is not detached or allocates no tty")]
    SocketWithoutTerminal,
    #[error("--preserve-fds: open files cannot be passed into a virtual machine")]
    PreserveFds,
    #[error("process args cannot be empty")]
    NoCommand,
    #[error("--user {0:?}: not UID[:GID]")]
    User(String),
    #[error("--cap {0:?}: no such capability")]
    Capability(String),
    #[error("--interval: has to be longer than 0")]
    Interval,
    #[error("look at the monitor")]
    Jail(#[source] io::Error),
    #[error("resources of {path}", path = .0.display())]
    Resources(PathBuf, #[source] io::Error),
    #[error("resources")]
    ResourcesJson(#[source] serde_json::Error),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<u8, Error> {
    let store = Store::new(cli.global.root.as_deref())?;
    match &cli.command {
        Command::Run(arguments) => run::run(&store, &cli.global, arguments),
        Command::Create(arguments) => create::run(&store, &cli.global, arguments),
        Command::Start(arguments) => start::run(&store, &arguments.id),
        Command::Exec(arguments) => exec::run(&store, arguments),
        Command::Kill(arguments) => kill::run(&store, arguments),
        Command::Delete(arguments) => delete::run(&store, &cli.global, arguments),
        Command::State(arguments) => state::run(&store, &arguments.id),
        Command::List(arguments) => list::run(&store, arguments),
        Command::Ps(arguments) => ps::run(&store, arguments),
        Command::Events(arguments) => events::run(&store, arguments),
        Command::Pause(arguments) => pause::run(&store, &arguments.id),
        Command::Resume(arguments) => resume::run(&store, &arguments.id),
        Command::Update(arguments) => update::run(&store, arguments),
        Command::Spec(arguments) => spec::run(arguments),
        Command::Features => features::run(),
        Command::Check(arguments) => check::run(arguments, &store),
        Command::Install(arguments) => install::install(arguments),
        Command::Uninstall(arguments) => install::uninstall(arguments),
        Command::Completion(arguments) => completion::run(arguments),
        Command::Monitor(arguments) => monitor::run(arguments),
        other => Err(Error::Unsupported(other.name())),
    }
}

/// A terminal needs somebody at its other end, and a socket for it needs a terminal.
fn check_console(terminal: bool, attached: bool, socket: Option<&Path>) -> Result<(), Error> {
    match (terminal, attached, socket) {
        (true, false, None) => Err(Error::TerminalWithoutSocket),
        (false, _, Some(_)) | (_, true, Some(_)) => Err(Error::SocketWithoutTerminal),
        _ => Ok(()),
    }
}

/// An error and its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    crate::monitor::order::chain(error)
}

/// Writes to stdout and looks at the result, which `print!` does not.
fn print(text: &str) -> Result<(), Error> {
    use io::Write;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(Error::Output)
}

/// Indented JSON with a newline.
fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| Error::Output(error.into()))
}
