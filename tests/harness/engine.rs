// SPDX-License-Identifier: Apache-2.0
//! Container engines, driven by their own command lines. Each has its state in a directory of its own below the
//! temporary directory, which has to be a tmpfs: the emulated host's root is an overlay, and overlays do not stack.
//!
//! `RUNTIME` in the environment names another runtime for the engines to use, which shows that a test is right.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::process::{Pid, Signal, kill_process};

use crate::bundle::Bundle;
use crate::runtime::{Outcome, finish};
use crate::top;

/// Debian's, whatever else there is.
const DOCKER: &str = "/usr/bin/docker";
const CTR: &str = "ctr";

/// An engine that has an image `busybox`, unless it is containerd.
#[derive(Debug)]
pub struct Engine {
    program: &'static str,
    /// Before the command of the engine.
    options: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    directory: PathBuf,
    /// Daemons, in the order of their start.
    daemons: Mutex<Vec<Daemon>>,
}

/// A process of an engine, with its log.
#[derive(Debug)]
struct Daemon {
    process: Child,
    log: PathBuf,
}

/// A test program drives one engine. A static is not dropped, so that its end is that of the program.
static ENGINE: OnceLock<Engine> = OnceLock::new();

fn engine(program: &str, start: fn() -> Engine) -> &'static Engine {
    extern "C" fn end() {
        if let Some(engine) = ENGINE.get() {
            // A panic must not leave a C function.
            let _ = std::panic::catch_unwind(|| engine.end());
        }
    }
    let engine = ENGINE.get_or_init(|| {
        // SAFETY: `end` is a function without arguments that does not unwind, as atexit(3) wants it.
        unsafe { libc::atexit(end) };
        start()
    });
    assert_eq!(engine.program, program, "one engine in a test program");
    engine
}

/// Podman, with the runtime under test as its default.
pub fn podman() -> &'static Engine {
    engine("podman", Engine::podman)
}

/// Docker with a containerd of its own and without networks, with the runtime under test as its default.
pub fn docker() -> &'static Engine {
    engine(DOCKER, Engine::docker)
}

/// containerd with its stock shim. `ctr` is told of the runtime by each command, and needs no image.
pub fn containerd() -> &'static Engine {
    engine(CTR, Engine::containerd)
}

/// The runtime under test: `RUNTIME` in the environment, or this checkout's `sandbox`.
pub fn runtime() -> PathBuf {
    std::env::var_os("RUNTIME").map_or_else(|| top().join("target/release/sandbox"), PathBuf::from)
}

/// Whether the runtime under test is `sandbox`, for what only a VM shows.
pub fn is_sandbox() -> bool {
    runtime().file_name().is_some_and(|name| name == "sandbox")
}

impl Engine {
    fn podman() -> Engine {
        let directory = new_directory("podman");
        let containers = directory.join("containers.conf");
        let storage = directory.join("storage.conf");
        install("podman", &containers);
        let installed = fs::read_to_string(&containers).unwrap();
        let ours = "[engine]\n\
                    cgroup_manager = \"cgroupfs\"\n\
                    events_logger = \"file\"\n\
                    runtime = \"sandbox\"\n";
        assert!(installed.contains("[engine]\n"), "{installed}");
        fs::write(&containers, installed.replace("[engine]\n", ours)).unwrap();
        fs::write(
            &storage,
            format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = \"{0}/graph\"\nrunroot = \"{0}/run\"\n",
                directory.display()
            ),
        )
        .unwrap();
        let engine = Engine {
            program: "podman",
            options: Vec::new(),
            environment: vec![
                ("CONTAINERS_CONF", containers.into()),
                ("CONTAINERS_STORAGE_CONF", storage.into()),
                ("TMPDIR", directory.clone().into()),
            ],
            directory,
            daemons: Mutex::default(),
        };
        engine.import_busybox();
        engine
    }

    fn containerd() -> Engine {
        let directory = new_directory("containerd");
        let mut address = OsString::from("--address=");
        address.push(directory.join("containerd.sock"));
        let engine = Engine {
            program: CTR,
            options: vec![address],
            environment: Vec::new(),
            directory,
            daemons: Mutex::default(),
        };
        engine.start_containerd();
        engine
    }

    fn start_containerd(&self) {
        let configuration = self.write(
            "containerd.toml",
            &format!(
                "version = 2\nroot = \"{0}/containerd\"\nstate = \"{0}/containerd-run\"\n\
                 [grpc]\naddress = \"{0}/containerd.sock\"\n",
                self.directory.display()
            ),
        );
        install("containerd", Path::new(&configuration));
        let socket = self.path("containerd.sock");
        self.start_daemon("containerd", &["--config".into(), configuration.into()]);
        crate::wait_until("containerd listens", || socket.exists());
    }

    fn docker() -> Engine {
        let directory = new_directory("docker");
        let configuration = directory.join("daemon.json");
        install("docker", &configuration);
        let socket = format!("unix://{}/docker.sock", directory.display());
        let engine = Engine {
            program: DOCKER,
            options: Vec::new(),
            environment: vec![
                ("DOCKER_HOST", socket.into()),
                ("HOME", directory.clone().into()),
            ],
            directory,
            daemons: Mutex::default(),
        };
        engine.start_containerd();
        engine.start_dockerd();
        engine.import_busybox();
        engine
    }

    /// Starts dockerd, also once more after `kill_daemon`.
    pub fn start_dockerd(&self) {
        let mut arguments: Vec<OsString> = Vec::new();
        for (option, name) in [
            ("--config-file", "daemon.json"),
            ("--containerd", "containerd.sock"),
            ("--data-root", "data"),
            ("--exec-root", "run"),
            ("--pidfile", "docker.pid"),
        ] {
            arguments.extend([option.into(), self.path(name).into()]);
        }
        let words = "--bridge none --iptables=false --storage-driver overlay2 --live-restore \
                     --default-runtime sandbox --exec-opt native.cgroupdriver=cgroupfs --host";
        arguments.extend(
            words
                .split(' ')
                .filter(|word| !word.is_empty())
                .map(OsString::from),
        );
        let mut host = OsString::from("unix://");
        host.push(self.path("docker.sock"));
        arguments.push(host);
        self.start_daemon("dockerd", &arguments);
        crate::wait_until("dockerd answers", || self.call(&["version"]).status == 0);
    }

    fn start_daemon(&self, program: &str, arguments: &[OsString]) {
        let log = self.path(&format!("{program}.log"));
        let file = File::options()
            .append(true)
            .create(true)
            .open(&log)
            .unwrap();
        let process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        self.daemons().push(Daemon { process, log });
    }

    fn stop_daemons(&self) {
        while let Some(mut daemon) = self.daemons().pop() {
            let _ = kill_process(Pid::from_child(&daemon.process), Signal::TERM);
            let _ = daemon.process.wait();
        }
    }

    /// Kills the daemon that was started last, as a crash would.
    pub fn kill_daemon(&self) {
        let mut daemon = self.daemons().pop().expect("a daemon runs");
        daemon.process.kill().unwrap();
        daemon.process.wait().unwrap();
    }

    fn daemons(&self) -> MutexGuard<'_, Vec<Daemon>> {
        self.daemons.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end of each daemon's log, for a test that failed.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for daemon in self.daemons().iter() {
            let log = fs::read_to_string(&daemon.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(20)..] {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }

    /// A command of the engine, with nothing on stdin.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        command
            .args(&self.options)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command of the engine to its end.
    pub fn call(&self, arguments: &[&str]) -> Outcome {
        finish(self.command(arguments))
    }

    /// The same on a terminal of 33 lines and 77 columns, whose output has its line ends.
    pub fn call_on_terminal(&self, arguments: &[&str]) -> Outcome {
        let words = self.options.iter().map(|word| word.to_str().unwrap());
        let words = std::iter::once(self.program)
            .chain(words)
            .chain(arguments.iter().copied());
        let words: Vec<String> = words.map(quote).collect();
        let mut command = Command::new("script");
        command
            .args(["--quiet", "--return", "--command"])
            .arg(format!("stty rows 33 cols 77; {}", words.join(" ")))
            .arg("/dev/null")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        finish(command)
    }

    /// A file or directory for a test, in the engine's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes a file there and returns its path.
    pub fn write(&self, name: &str, content: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path.into_os_string().into_string().unwrap()
    }

    /// A name for a container, which is removed by force on drop.
    pub fn container(&self) -> Named<'_> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Named {
            engine: self,
            name: format!("test{number}"),
        }
    }

    /// Input, both outputs and the status of a container come through `run`, and nothing is left of it.
    pub fn check_run(&self) {
        let file = self.write("input", "from outside\n");
        let script = "cat; echo noise >&2; exit 7";
        let mut command = self.command(&[
            "run",
            "--rm",
            "-i",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            script,
        ]);
        command.stdin(File::open(file).unwrap());
        let outcome = finish(command);
        assert_eq!(outcome.status, 7, "{outcome:?}\n{}", self.logs());
        assert_eq!(outcome.text(), "from outside\n");
        assert_eq!(outcome.stderr, "noise\n");
        assert_eq!(self.call(&["ps", "-aq"]).ok(), "");
    }

    /// What cannot be run has the status that a shell gives it. Gives what came of a file that is no program.
    pub fn check_what_cannot_be_run(&self) -> Outcome {
        let run =
            |command: &str| self.call(&["run", "--rm", "--network", "none", "busybox", command]);
        let missing = run("nosuch");
        assert_eq!(missing.status, 127, "{missing:?}");
        assert!(
            missing
                .stderr
                .contains("executable file not found in $PATH"),
            "{missing:?}"
        );
        let forbidden = run("/etc/passwd");
        assert_eq!(forbidden.status, 126, "{forbidden:?}");
        forbidden
    }

    fn import_busybox(&self) {
        let bundle = Bundle::busybox(&["/bin/sh"]).build();
        self.import("busybox", bundle.rootfs(), ".");
    }

    /// Makes an image of `what` in a directory.
    pub fn import(&self, image: &str, directory: &Path, what: &str) {
        let archive = self.path("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(directory)
            .arg(what);
        finish(tar).ok();
        self.call(&["import", archive.to_str().unwrap(), image])
            .ok();
        fs::remove_file(&archive).unwrap();
    }

    /// With what a test that failed has left.
    fn end(&self) {
        let (list, remove): (&[&str], &[&str]) = match self.program {
            CTR => (
                &["tasks", "list", "--quiet"],
                &["tasks", "delete", "--force"],
            ),
            _ => (&["ps", "--all", "--quiet"], &["rm", "--force"]),
        };
        let left = self.call(list);
        let ids: Vec<&str> = left.text().lines().collect();
        if !ids.is_empty() {
            let _ = self.call(&[remove, &ids].concat()).status;
        }
        self.stop_daemons();
        // Its own mounts, which it leaves for the next command.
        for name in ["graph/overlay", "graph", "run/netns/default", "data"] {
            let _ = rustix::mount::unmount(self.path(name), rustix::mount::UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A container of a test, by its name.
#[derive(Debug)]
pub struct Named<'a> {
    engine: &'a Engine,
    name: String,
}

impl Named<'_> {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `VERB NAME ARGUMENTS`.
    pub fn call(&self, verb: &[&str], arguments: &[&str]) -> Outcome {
        let mut all = verb.to_vec();
        all.push(&self.name);
        all.extend(arguments);
        self.engine.call(&all)
    }

    pub fn exec(&self, arguments: &[&str]) -> Outcome {
        self.call(&["exec"], arguments)
    }

    /// A field of `inspect`, as a Go template has it.
    pub fn inspect(&self, field: &str) -> String {
        self.call(&["inspect", "--format", &format!("{{{{{field}}}}}")], &[])
            .ok()
            .to_owned()
    }

    /// What the container has written to stdout so far.
    pub fn logs(&self) -> String {
        let logs = self.call(&["logs"], &[]);
        logs.ok();
        logs.text().to_owned()
    }
}

impl Drop for Named<'_> {
    fn drop(&mut self) {
        let _ = self.call(&["rm", "--force"], &[]).status;
    }
}

/// Has `sandbox install` write the runtime under test into a configuration.
fn install(engine: &str, configuration: &Path) {
    let mut command = Command::new(top().join("target/release/sandbox"));
    command
        .args(["install", "--engine", engine, "--config"])
        .arg(configuration)
        .arg("--program")
        .arg(runtime());
    finish(command).ok();
}

fn new_directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    fs::create_dir(&path).unwrap();
    path
}

fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
