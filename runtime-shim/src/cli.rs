// SPDX-License-Identifier: Apache-2.0
//! The command line: runc's, with what engines and crun's users also send, and a few verbs of our own.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{
    ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint,
};

use crate::signal;

/// The newest version of the runtime specification whose fields are all looked at.
pub const OCI_VERSION: &str = "1.3.0";

/// The verb of a monitor, before all options.
pub const MONITOR: &str = "monitor";

/// An OCI runtime that runs each container in a microVM.
///
/// The command line is runc's, so engines use it unchanged. To try it by hand: put a
/// root file system into DIRECTORY/rootfs, write DIRECTORY/config.json with
/// `sandbox spec -b DIRECTORY`, and start it with `sandbox run DIRECTORY/`.
/// `sandbox check` tells whether this host can run containers in microVMs.
#[derive(Debug, Parser)]
#[command(
    name = "sandbox",
    disable_version_flag = true,
    disable_help_subcommand = true,
    subcommand_required = true,
    subcommand_value_name = "COMMAND",
    subcommand_help_heading = "Commands",
    verbatim_doc_comment
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// The command line of a monitor alone. To build the whole of the other takes as long as the rest of its start.
#[derive(Debug, Parser)]
#[command(name = "sandbox", disable_version_flag = true)]
struct MonitorCli {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    monitor: Monitor,
}

/// Options before the command.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Directory of container state [default: /run/sandbox, or $XDG_RUNTIME_DIR/sandbox when not root]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub root: Option<PathBuf>,
    /// Append log messages to this file instead of stderr
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub log: Option<PathBuf>,
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "Format of log messages"
    )]
    pub log_format: LogFormat,
    /// Least severe messages to log [default: warn, or error with --log-format json]
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Log everything, same as --log-level debug
    #[arg(long)]
    pub debug: bool,
    /// cgroupsPath has systemd's form, slice:prefix:name
    #[arg(long, short = 's')]
    pub systemd_cgroup: bool,
    /// How to treat cgroups on the host
    #[arg(long, value_enum, value_name = "MANAGER")]
    pub cgroup_manager: Option<CgroupManager>,
    /// Ignore failures that come from not being root
    #[arg(long, value_enum, value_name = "WHEN", hide = true)]
    pub rootless: Option<Rootless>,
    #[arg(long, hide = true)]
    pub criu: Option<PathBuf>,
    /// Print the version
    #[arg(long, short = 'v', visible_short_alias = 'V', action = ArgAction::Version)]
    pub version: Option<bool>,
}

impl Global {
    pub fn cgroup_manager(&self) -> CgroupManager {
        match self.cgroup_manager {
            Some(manager) => manager,
            None if self.systemd_cgroup => CgroupManager::Systemd,
            None => CgroupManager::Cgroupfs,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Error,
    #[value(alias = "warning")]
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum CgroupManager {
    /// Directories of the cgroup file system, as cgroupsPath says
    #[default]
    Cgroupfs,
    /// cgroupsPath is slice:prefix:name
    Systemd,
    /// Leave the host's cgroups alone
    Disabled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rootless {
    True,
    False,
    Auto,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum TextFormat {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a container and wait for it
    ///
    /// Creates and starts a container from a bundle, forwards signals and the terminal, and exits
    /// with the container's exit status. BUNDLE is a directory with a config.json; a single
    /// argument is one if it has a slash. ID is made up if absent.
    #[command(display_order = 1, verbatim_doc_comment)]
    Run(Run),
    /// Create a container, to be started later
    #[command(display_order = 2)]
    Create(Create),
    /// Start the process of a created container
    #[command(display_order = 3)]
    Start(Id),
    /// Run a further process in a container
    #[command(display_order = 4)]
    Exec(Exec),
    /// Send a signal to a container's process
    #[command(display_order = 5)]
    Kill(Kill),
    /// Delete a container
    #[command(display_order = 6)]
    Delete(Delete),
    /// Print the state of a container as JSON
    #[command(display_order = 7)]
    State(Id),
    /// List containers
    #[command(display_order = 8, visible_alias = "ls")]
    List(List),
    /// Show the processes of a container
    #[command(display_order = 9)]
    Ps(Ps),
    /// Print statistics and out-of-memory events of a container
    #[command(display_order = 10)]
    Events(Events),
    /// Suspend all processes of a container
    #[command(display_order = 11)]
    Pause(Id),
    /// Resume a paused container
    #[command(display_order = 12)]
    Resume(Id),
    /// Change the resource limits of a container
    #[command(display_order = 13)]
    Update(Box<Update>),
    /// Add or remove a mount of a running container
    #[command(display_order = 14)]
    Mounts(Mounts),
    /// Save a running container to a directory
    #[command(display_order = 15)]
    Checkpoint(Box<Checkpoint>),
    /// Start a container from a checkpoint
    #[command(display_order = 16)]
    Restore(Box<Restore>),
    /// Make running copies of a running container
    #[command(display_order = 17)]
    Fork(Fork),
    /// Look after the booted guests that containers start from
    #[command(display_order = 17, subcommand)]
    Template(Template),
    /// Write a config.json to start from
    #[command(display_order = 17)]
    Spec(Spec),
    /// Print what this runtime supports as JSON
    #[command(display_order = 18)]
    Features,
    /// Check that this host can run containers in microVMs
    #[command(display_order = 19, visible_alias = "doctor")]
    Check(Check),
    /// Make this program a runtime of Podman, Docker or containerd
    ///
    /// Shows the lines that the engine's configuration needs, and adds them. What others wrote there
    /// stays as it is.
    #[command(display_order = 20)]
    Install(Install),
    /// Remove what install wrote
    #[command(display_order = 21)]
    Uninstall(Uninstall),
    /// Print a completion script for a shell
    #[command(display_order = 22)]
    Completion(Completion),
    /// The process that holds a container's VM; started by create and run
    #[command(hide = true)]
    Monitor(Monitor),
}

impl Command {
    /// The verb as typed, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Run(_) => "run",
            Command::Create(_) => "create",
            Command::Start(_) => "start",
            Command::Exec(_) => "exec",
            Command::Kill(_) => "kill",
            Command::Delete(_) => "delete",
            Command::State(_) => "state",
            Command::List(_) => "list",
            Command::Ps(_) => "ps",
            Command::Events(_) => "events",
            Command::Pause(_) => "pause",
            Command::Resume(_) => "resume",
            Command::Update(_) => "update",
            Command::Mounts(_) => "mounts",
            Command::Checkpoint(_) => "checkpoint",
            Command::Restore(_) => "restore",
            Command::Fork(_) => "fork",
            Command::Template(_) => "template",
            Command::Spec(_) => "spec",
            Command::Features => "features",
            Command::Check(_) => "check",
            Command::Install(_) => "install",
            Command::Uninstall(_) => "uninstall",
            Command::Completion(_) => "completion",
            Command::Monitor(_) => MONITOR,
        }
    }
}

#[derive(Debug, Args)]
pub struct Id {
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

/// What create and run have in common.
#[derive(Debug, Clone, Default, Args)]
pub struct CreateOptions {
    /// Read the configuration from this file instead of BUNDLE/config.json
    #[arg(long, short = 'f', value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Unix socket that the terminal is sent to
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that a pidfd of the container's process on the host is sent to
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// File to write the container's pid on the host to
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub pid_file: Option<PathBuf>,
    /// Pass this many further file descriptors to the container
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Boot the guest instead of restoring a booted one
    #[arg(long)]
    pub no_template: bool,
    #[arg(long, hide = true)]
    pub no_pivot: bool,
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
}

#[derive(Debug, Args)]
pub struct Create {
    /// Directory with the config.json
    #[arg(long, short, value_name = "DIR", default_value = ".", value_hint = ValueHint::DirPath)]
    pub bundle: PathBuf,
    #[command(flatten)]
    pub options: CreateOptions,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
#[command(override_usage = "sandbox run [OPTIONS] [BUNDLE] [ID]")]
pub struct Run {
    /// Directory with the config.json [default: the BUNDLE argument, or the current directory]
    #[arg(long, short, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub bundle: Option<PathBuf>,
    #[command(flatten)]
    pub options: CreateOptions,
    /// Leave the container running in the background
    #[arg(long, short)]
    pub detach: bool,
    /// Do not delete the container when it has ended
    #[arg(long)]
    pub keep: bool,
    /// Bundle directory, container ID, or both
    #[arg(value_name = "BUNDLE|ID", num_args = 0..=2)]
    pub target: Vec<OsString>,
}

/// The bundle and id that `run` was given.
#[derive(Debug, PartialEq, Eq)]
pub struct RunTarget {
    pub bundle: PathBuf,
    /// None: to be made up.
    pub id: Option<String>,
}

impl Run {
    /// Tells bundle and id apart. A single argument is a bundle if it contains a slash or is a
    /// directory with a config.json, which `is_bundle` finds out.
    pub fn target(&self, is_bundle: impl Fn(&Path) -> bool) -> Result<RunTarget, CliError> {
        let id = |argument: &OsString| {
            argument
                .to_str()
                .map(|id| Some(id.to_owned()))
                .ok_or(CliError::IdNotUtf8)
        };
        let here = || PathBuf::from(".");
        match (&self.bundle, self.target.as_slice()) {
            (Some(bundle), []) => Ok(RunTarget {
                bundle: bundle.clone(),
                id: None,
            }),
            (Some(bundle), [argument]) => Ok(RunTarget {
                bundle: bundle.clone(),
                id: id(argument)?,
            }),
            (Some(_), _) => Err(CliError::TwoBundles),
            (None, []) => Ok(RunTarget {
                bundle: here(),
                id: None,
            }),
            (None, [argument]) => {
                if argument.as_bytes().contains(&b'/') || is_bundle(Path::new(argument)) {
                    Ok(RunTarget {
                        bundle: argument.into(),
                        id: None,
                    })
                } else {
                    Ok(RunTarget {
                        bundle: here(),
                        id: id(argument)?,
                    })
                }
            }
            (None, [bundle, argument, ..]) => Ok(RunTarget {
                bundle: bundle.into(),
                id: id(argument)?,
            }),
        }
    }
}

#[derive(Debug, Args)]
#[command(
    override_usage = "sandbox exec [OPTIONS] ID COMMAND [ARGUMENTS]...\n       \
                            sandbox exec [OPTIONS] --process FILE ID"
)]
pub struct Exec {
    /// Unix socket that the terminal is sent to
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that a pidfd of the process on the host is sent to
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Set an environment variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Give the process a terminal
    #[arg(long, short)]
    pub tty: bool,
    /// User to run as
    #[arg(long, short, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Further group ids
    #[arg(long, short = 'g', value_name = "GID", value_delimiter = ',')]
    pub additional_gids: Vec<u32>,
    /// Read the process from this file, as in config.json
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub process: Option<PathBuf>,
    /// Leave the process running in the background
    #[arg(long, short)]
    pub detach: bool,
    /// File to write the pid on the host to
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub pid_file: Option<PathBuf>,
    #[arg(long, value_name = "LABEL", hide = true)]
    pub process_label: Option<String>,
    #[arg(long, value_name = "PROFILE", hide = true)]
    pub apparmor: Option<String>,
    /// Set no_new_privs
    #[arg(long)]
    pub no_new_privs: bool,
    /// Add a capability
    #[arg(long, short, value_name = "CAP")]
    pub cap: Vec<String>,
    /// Pass this many further file descriptors to the process
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// cgroup to run in, below the container's
    #[arg(long, value_name = "[CONTROLLER:]PATH")]
    pub cgroup: Vec<String>,
    /// Also in a paused container
    #[arg(long)]
    pub ignore_paused: bool,
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
    /// Command and its arguments
    #[arg(value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Send the signal to all processes of the container
    #[arg(long, short)]
    pub all: bool,
    /// ID is a regular expression
    #[arg(long, short, hide = true)]
    pub regex: bool,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
    /// Name or number
    #[arg(value_name = "SIGNAL", default_value = "SIGTERM", value_parser = signal::parse)]
    pub signal: i32,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Kill the container if it runs; no error if it does not exist
    #[arg(long, short)]
    pub force: bool,
    /// ID is a regular expression
    #[arg(long, short, hide = true)]
    pub regex: bool,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct List {
    #[arg(
        long,
        short,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "Output format"
    )]
    pub format: TableFormat,
    /// IDs only
    #[arg(long, short)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Ps {
    #[arg(
        long,
        short,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "Output format"
    )]
    pub format: TableFormat,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
    /// Options of ps(1), for the table
    #[arg(value_name = "PS OPTIONS")]
    pub options: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Print the statistics once
    #[arg(long)]
    pub stats: bool,
    /// Time between two statistics
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub interval: std::time::Duration,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

/// Values are kept as written: which of them go together is decided by the verb.
#[derive(Debug, Default, Args)]
pub struct Update {
    /// Read the resources from a file, or from stdin (-); the other options are ignored then
    #[arg(long, short, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Block I/O weight, 10 to 1000
    #[arg(long, value_name = "N")]
    pub blkio_weight: Option<u16>,
    /// CPU period in microseconds
    #[arg(long, value_name = "USECS")]
    pub cpu_period: Option<u64>,
    /// CPU time in one period in microseconds, -1: no limit
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    /// CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "USECS")]
    pub cpu_burst: Option<u64>,
    /// CPU weight, 2 to 262144
    #[arg(long, value_name = "N")]
    pub cpu_share: Option<u64>,
    #[arg(long, value_name = "USECS", hide = true)]
    pub cpu_rt_period: Option<u64>,
    #[arg(long, value_name = "USECS", hide = true, allow_hyphen_values = true)]
    pub cpu_rt_runtime: Option<i64>,
    /// CPUs to run on, as in 0-3,8
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Scheduling class idle: 1
    #[arg(long, value_name = "0|1", allow_hyphen_values = true)]
    pub cpu_idle: Option<i64>,
    /// Memory limit, as in 512m; -1: no limit
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_hyphen_values = true)]
    pub memory: Option<i64>,
    /// Memory that is not reclaimed
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_hyphen_values = true)]
    pub memory_reservation: Option<i64>,
    /// Limit of memory and swap together; -1: no limit
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_hyphen_values = true)]
    pub memory_swap: Option<i64>,
    /// Number of processes, -1: no limit
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    #[arg(long, hide = true)]
    pub l3_cache_schema: Option<String>,
    #[arg(long, hide = true)]
    pub mem_bw_schema: Option<String>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub kernel_memory: Option<String>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub kernel_memory_tcp: Option<String>,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Mounts {
    #[command(subcommand)]
    pub action: MountsAction,
}

#[derive(Debug, Subcommand)]
pub enum MountsAction {
    /// Mount what a file with a JSON array of mounts says
    Add(MountsFile),
    /// Unmount the destinations of a file with a JSON array of mounts
    Remove(MountsFile),
}

#[derive(Debug, Args)]
pub struct MountsFile {
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
    /// JSON file
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Checkpoint {
    /// Directory to save to
    #[arg(long, value_name = "DIR", default_value = "checkpoint", value_hint = ValueHint::DirPath)]
    pub image_path: PathBuf,
    /// Directory for logs and temporary files
    #[arg(long, value_name = "DIR")]
    pub work_path: Option<PathBuf>,
    /// Earlier checkpoint that this one adds to
    #[arg(long, value_name = "DIR")]
    pub parent_path: Option<PathBuf>,
    /// Let the container run on
    #[arg(long)]
    pub leave_running: bool,
    /// Save memory only, the container runs on
    #[arg(long)]
    pub pre_dump: bool,
    #[command(flatten)]
    pub criu: CriuOptions,
    #[arg(long, hide = true)]
    pub tcp_skip_in_flight: bool,
    #[arg(long, hide = true)]
    pub link_remap: bool,
    #[arg(long, hide = true)]
    pub status_fd: Option<String>,
    #[arg(long, hide = true)]
    pub page_server: Option<String>,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// Directory with the config.json
    #[arg(long, short, value_name = "DIR", default_value = ".", value_hint = ValueHint::DirPath)]
    pub bundle: PathBuf,
    #[command(flatten)]
    pub options: CreateOptions,
    /// Leave the container running in the background
    #[arg(long, short)]
    pub detach: bool,
    /// Directory of the checkpoint
    #[arg(long, value_name = "DIR", default_value = "checkpoint", value_hint = ValueHint::DirPath)]
    pub image_path: PathBuf,
    /// Directory for logs and temporary files
    #[arg(long, value_name = "DIR")]
    pub work_path: Option<PathBuf>,
    #[command(flatten)]
    pub criu: CriuOptions,
    #[arg(long, hide = true)]
    pub tcp_close: bool,
    #[arg(long, hide = true)]
    pub lsm_profile: Option<String>,
    #[arg(long, hide = true)]
    pub lsm_mount_context: Option<String>,
    /// Container ID
    #[arg(value_name = "ID")]
    pub id: String,
}

/// Options that tune CRIU. A checkpoint of a whole VM has all of it, so they change nothing.
#[derive(Debug, Args)]
pub struct CriuOptions {
    #[arg(long, hide = true)]
    pub tcp_established: bool,
    #[arg(long, hide = true)]
    pub ext_unix_sk: bool,
    #[arg(long, hide = true)]
    pub shell_job: bool,
    #[arg(long, hide = true)]
    pub lazy_pages: bool,
    #[arg(long, hide = true)]
    pub file_locks: bool,
    #[arg(long, hide = true)]
    pub manage_cgroups_mode: Option<String>,
    #[arg(long, hide = true)]
    pub empty_ns: Vec<String>,
    #[arg(long, hide = true)]
    pub auto_dedup: bool,
}

#[derive(Debug, Args)]
pub struct Fork {
    /// Number of copies; more than one are named NEW-ID-1, NEW-ID-2 and so on
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub number: u16,
    /// ID of the running container
    #[arg(value_name = "ID")]
    pub id: String,
    /// ID of the copy
    #[arg(value_name = "NEW-ID")]
    pub new_id: String,
}

#[derive(Debug, Subcommand)]
pub enum Template {
    /// Make the template that containers without limits start from, or one of another size
    Create(TemplateCreate),
    /// List templates
    #[command(alias = "ls")]
    List(TemplateList),
    /// Remove templates; containers that run from them are not disturbed
    #[command(alias = "rm")]
    Remove(TemplateRemove),
    /// Remove what no container can start from any more
    Prune,
}

#[derive(Debug, Args)]
pub struct TemplateCreate {
    /// Number of virtual CPUs
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u8>,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
}

#[derive(Debug, Args)]
pub struct TemplateList {
    #[arg(
        long,
        short,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "Output format"
    )]
    pub format: TableFormat,
}

#[derive(Debug, Args)]
pub struct TemplateRemove {
    /// Remove all
    #[arg(long, short)]
    pub all: bool,
    /// Names as `template list` shows them
    #[arg(value_name = "NAME", required_unless_present = "all")]
    pub names: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Spec {
    /// Directory to write config.json to
    #[arg(long, short, value_name = "DIR", default_value = ".", value_hint = ValueHint::DirPath)]
    pub bundle: PathBuf,
    /// Map root of the container to the calling user
    #[arg(long)]
    pub rootless: bool,
}

#[derive(Debug, Args)]
pub struct Check {
    #[arg(
        long,
        short,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "Output format"
    )]
    pub format: TextFormat,
    /// Show the jail of a container's monitor as the kernel reports it
    #[arg(long, value_name = "ID")]
    pub jail: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    Podman,
    Docker,
    Containerd,
}

#[derive(Debug, Args)]
pub struct Install {
    #[arg(
        long,
        short,
        value_enum,
        value_name = "ENGINE",
        help = "Engine to configure"
    )]
    pub engine: Engine,
    /// Its configuration file [default: where the engine looks for it]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Path that the engine is told [default: of this program]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub program: Option<PathBuf>,
    /// Show the lines, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Uninstall {
    #[arg(
        long,
        short,
        value_enum,
        value_name = "ENGINE",
        help = "Engine to configure [default: all of them]"
    )]
    pub engine: Option<Engine>,
    /// Its configuration file [default: where the engine looks for it]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Show the lines, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Completion {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// What the hidden verbs need comes over an inherited socket.
#[derive(Debug, Args)]
pub struct Monitor {
    /// Inherited socket to the command that started this process
    #[arg(long, value_name = "FD")]
    pub fd: i32,
    /// Container ID, for process listings
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("container ID is not UTF-8")]
    IdNotUtf8,
    #[error("two bundles given: as --bundle and as an argument")]
    TwoBundles,
    #[error("{message} (see '{help}')")]
    Usage { message: String, help: String },
    /// Help or version: text for stdout.
    #[error("{0}")]
    Print(String),
}

/// The text of `--version`.
pub fn version() -> String {
    let mut text = format!("version {}\n", env!("CARGO_PKG_VERSION"));
    if let Some(commit) = option_env!("SANDBOX_COMMIT") {
        text.push_str(&format!("commit: {commit}\n"));
    }
    text.push_str(&format!("spec: {OCI_VERSION}"));
    text
}

/// The clap command, for parsing and for completion scripts.
pub fn command() -> clap::Command {
    Cli::command().version(version())
}

impl Cli {
    /// Parses the arguments of the process, program name first.
    pub fn from_arguments(mut arguments: Vec<OsString>) -> Result<Cli, CliError> {
        if arguments.get(1).is_some_and(|verb| verb == MONITOR) {
            arguments.remove(1);
            return monitor(&arguments);
        }
        let mut command = command();
        let arguments = go_style(&command, arguments);
        // Builds no more of the command than what is used: each process of a start comes through here.
        command
            .try_get_matches_from_mut(&arguments)
            .and_then(|matches| Cli::from_arg_matches(&matches))
            .map_err(|error| describe(&command, &arguments, &error))
    }
}

fn monitor(arguments: &[OsString]) -> Result<Cli, CliError> {
    let mut command = MonitorCli::command().version(version());
    let matches = command.try_get_matches_from_mut(arguments);
    let parsed = matches.and_then(|matches| MonitorCli::from_arg_matches(&matches));
    let MonitorCli { global, monitor } =
        parsed.map_err(|error| describe(&command, arguments, &error))?;
    Ok(Cli {
        global,
        command: Command::Monitor(monitor),
    })
}

/// Rewrites what Go's flag package understands and clap does not: long options with one dash, and
/// options that end at the first argument for commands that pass the rest on.
fn go_style(root: &clap::Command, arguments: Vec<OsString>) -> Vec<OsString> {
    let mut command = root;
    let mut result = Vec::with_capacity(arguments.len() + 1);
    let mut arguments = arguments.into_iter();
    result.extend(arguments.next());
    while let Some(argument) = arguments.next() {
        let bytes = argument.as_bytes();
        if bytes == b"--" {
            result.push(argument);
            break;
        }
        if bytes.len() < 2 || bytes[0] != b'-' {
            match command
                .get_subcommands()
                .find(|c| OsStr::new(c.get_name()) == argument || aliased(c, &argument))
            {
                Some(subcommand) => {
                    command = subcommand;
                    result.push(argument);
                    continue;
                }
                None if passes_arguments_on(command) => {
                    result.push(argument);
                    let next = arguments.next();
                    if next.as_deref().is_some_and(|next| next != "--") {
                        result.push("--".into());
                    }
                    result.extend(next);
                    break;
                }
                None => {
                    result.push(argument);
                    continue;
                }
            }
        }
        let (argument, takes_next) = option(root, command, argument);
        result.push(argument);
        if takes_next {
            result.extend(arguments.next());
        }
    }
    result.extend(arguments);
    result
}

fn aliased(command: &clap::Command, name: &OsStr) -> bool {
    command
        .get_all_aliases()
        .any(|alias| OsStr::new(alias) == name)
}

fn passes_arguments_on(command: &clap::Command) -> bool {
    matches!(command.get_name(), "exec" | "ps")
}

/// One option, with two dashes if it is a long one, and whether its value is the next argument.
fn option(root: &clap::Command, command: &clap::Command, argument: OsString) -> (OsString, bool) {
    let bytes = argument.as_bytes();
    let (dashes, name) = match bytes.strip_prefix(b"--") {
        Some(name) => (2, name),
        None => (1, &bytes[1..]),
    };
    let has_value = name.contains(&b'=');
    let name = name.split(|byte| *byte == b'=').next().unwrap_or(name);
    let takes_value =
        |arg: &clap::Arg| matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    let long =
        known(root, command).find(|arg| arg.get_long().is_some_and(|long| long.as_bytes() == name));
    match long {
        // clap adds these when it parses.
        None if dashes == 1 && matches!(name, b"help" | b"version") => {
            let mut rewritten = b"-".to_vec();
            rewritten.extend_from_slice(bytes);
            (OsString::from_vec(rewritten), false)
        }
        Some(arg) if dashes == 2 || name.len() > 1 => {
            let takes_next = takes_value(arg) && !has_value;
            if dashes == 1 {
                let mut rewritten = b"-".to_vec();
                rewritten.extend_from_slice(bytes);
                return (OsString::from_vec(rewritten), takes_next);
            }
            (argument, takes_next)
        }
        _ if dashes == 2 => (argument, false),
        _ => {
            // A bundle of short options: only the last can have its value in the next argument.
            let takes_next = short_takes_next(root, command, &bytes[1..], takes_value);
            (argument, takes_next)
        }
    }
}

/// The options of a command and those that each command has.
fn known<'a>(
    root: &'a clap::Command,
    command: &'a clap::Command,
) -> impl Iterator<Item = &'a clap::Arg> {
    let global = root.get_arguments().filter(|arg| arg.is_global_set());
    command.get_arguments().chain(global)
}

fn short_takes_next(
    root: &clap::Command,
    command: &clap::Command,
    letters: &[u8],
    takes_value: impl Fn(&clap::Arg) -> bool,
) -> bool {
    for (position, letter) in letters.iter().enumerate() {
        let arg = known(root, command).find(|arg| arg.get_short() == Some(char::from(*letter)));
        match arg {
            Some(arg) if takes_value(arg) => return position + 1 == letters.len(),
            Some(_) => {}
            None => return false,
        }
    }
    false
}

/// clap's error as one line, in the words that engines look for.
fn describe(root: &clap::Command, arguments: &[OsString], error: &clap::Error) -> CliError {
    use clap::error::{ContextKind, ContextValue};
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(list)) => Some(list.join(", ")),
        _ => None,
    };
    let verb = arguments.iter().skip(1).find_map(|argument| {
        root.get_subcommands()
            .find(|c| OsStr::new(c.get_name()) == argument || aliased(c, argument))
            .map(clap::Command::get_name)
    });
    let option = text(ContextKind::InvalidArg).unwrap_or_default();
    // `--log-format <FORMAT>` and `<ID>` without their frills.
    let option = match option.split_once(" <") {
        Some((option, _)) => option,
        None => option.trim_matches(['<', '>', '[', ']', '.']),
    };
    let value = text(ContextKind::InvalidValue).unwrap_or_default();
    let message = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            return CliError::Print(error.render().to_string());
        }
        ErrorKind::InvalidSubcommand => {
            let name = text(ContextKind::InvalidSubcommand).unwrap_or_default();
            format!("unknown command {name:?}")
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "no command given".to_owned()
        }
        ErrorKind::UnknownArgument if option.starts_with('-') => {
            format!("unknown option {option}")
        }
        ErrorKind::UnknownArgument => format!("unexpected argument {option:?}"),
        // podman looks for these words to find out what is supported.
        ErrorKind::InvalidValue if value.is_empty() => {
            format!("option {option} requires an argument")
        }
        ErrorKind::InvalidValue => {
            let valid = text(ContextKind::ValidValue).unwrap_or_default();
            format!("option {option}: {value:?} is not one of {valid}")
        }
        ErrorKind::ValueValidation => {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            format!(
                "{option}: {value:?}: {}",
                cause.unwrap_or_else(|| "not valid".to_owned())
            )
        }
        ErrorKind::MissingRequiredArgument => format!("{option} is missing"),
        ErrorKind::TooManyValues => format!("unexpected argument {value:?}"),
        _ => {
            let rendered = error.render().to_string();
            let line = rendered.lines().next().unwrap_or_default();
            line.trim_start_matches("error: ").to_owned()
        }
    };
    match verb {
        Some(verb) => CliError::Usage {
            message: format!("{verb}: {message}"),
            help: format!("sandbox {verb} --help"),
        },
        None => CliError::Usage {
            message,
            help: "sandbox --help".to_owned(),
        },
    }
}

/// Bytes with runc's suffixes: `512m`, `2GiB`, `-1`.
fn parse_size(text: &str) -> Result<i64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !(c.is_ascii_digit() || c == '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: i64 = number
        .parse()
        .map_err(|_| "not a size such as 512m".to_owned())?;
    let shift = match suffix.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err("not a size such as 512m".to_owned()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

/// A Go duration (`1m30s`, `500ms`) or a number of seconds.
fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let malformed = || "not a duration such as 5s".to_owned();
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(std::time::Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = std::time::Duration::ZERO;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .ok_or_else(malformed)?;
        let number: f64 = rest[..end].parse().map_err(|_| malformed())?;
        rest = &rest[end..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(malformed()),
        };
        rest = &rest[end..];
        total = std::time::Duration::try_from_secs_f64(number * unit)
            .ok()
            .and_then(|part| total.checked_add(part))
            .ok_or_else(malformed)?;
    }
    if total.is_zero() {
        return Err(malformed());
    }
    Ok(total)
}

#[cfg(test)]
mod tests;
