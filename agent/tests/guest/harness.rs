// SPDX-License-Identifier: Apache-2.0
//! The host's side of the agent for tests: the agent runs as PID 1 of fresh namespaces, Unix sockets
//! stand for vsock.

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use agent_protocol::{
    AgentError, CONTROL_PORT, Capabilities, CgroupPlan, Event, FrameReader, FromAgent, GuestPlan,
    Mount, MountSource, Process, Reply, Request, Stdio, ToAgent, encode,
};

/// For every wait: an emulated host is slow.
const DEADLINE: Duration = Duration::from_secs(60);

pub const ALL_CAPABILITIES: u64 = (1 << 41) - 1;

pub struct Guest {
    agent: Child,
    control: UnixStream,
    reader: FrameReader,
    replies: Vec<(u64, Result<Reply, AgentError>)>,
    pub events: VecDeque<Event>,
    pub directory: PathBuf,
    pub cgroup: PathBuf,
    next_request: u64,
    next_port: u32,
}

/// Says why a test does not run.
pub fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

fn cgroup_mount() -> Option<&'static Path> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|mount| mount.join("cgroup.controllers").exists())
}

impl Guest {
    /// None, with the reason told, where the agent cannot run.
    pub fn start() -> Option<Guest> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let capabilities = rustix::thread::capabilities(None).unwrap().effective;
        if capabilities.bits() & ALL_CAPABILITIES != ALL_CAPABILITIES {
            skip("needs root with every capability, as in tests/host/run");
            return None;
        }
        let Some(mount) = cgroup_mount() else {
            skip("needs cgroup v2");
            return None;
        };
        let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"]
            .iter()
            .find(|path| Path::new(path).exists())
        else {
            skip("needs busybox-static");
            return None;
        };
        let name = format!(
            "agent-test-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let directory = Path::new("/dev/shm").join(&name);
        let cgroup = mount.join(&name);
        let sockets = directory.join("sockets");
        fs::create_dir_all(&sockets).unwrap();
        make_rootfs(&directory.join("share/rootfs"), busybox);
        for controller in ["cpu", "memory", "pids", "io", "cpuset"] {
            // Those that the machine has.
            let _ = fs::write(
                mount.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
        fs::create_dir(&cgroup).unwrap();
        let listener = UnixListener::bind(sockets.join(CONTROL_PORT.to_string())).unwrap();
        let agent = Command::new("unshare")
            .args([
                "--pid",
                "--mount",
                "--uts",
                "--net",
                "--fork",
                "--kill-child",
            ])
            .arg(env!("CARGO_BIN_EXE_agent"))
            .arg("--development")
            .args([&sockets, &directory.join("share"), &cgroup])
            .spawn()
            .unwrap();
        let alive = pidfd_open(Pid::from_child(&agent), PidfdFlags::empty()).unwrap();
        let control = accept_from(&listener, &alive);
        let mut guest = Guest {
            agent,
            control,
            reader: FrameReader::default(),
            replies: Vec::new(),
            events: VecDeque::new(),
            directory,
            cgroup,
            next_request: 0,
            next_port: 100,
        };
        let ready = guest.event();
        assert!(
            matches!(ready, Event::Ready { version: agent_protocol::VERSION, age_ns } if age_ns > 0),
            "{ready:?}"
        );
        Some(guest)
    }

    pub fn has_controller(&self, controller: &str) -> bool {
        let controllers = fs::read_to_string(self.cgroup.join("cgroup.controllers")).unwrap();
        controllers
            .split_whitespace()
            .any(|name| name == controller)
    }

    pub fn rootfs(&self) -> PathBuf {
        self.directory.join("share/rootfs")
    }

    pub fn send(&mut self, request: Request) -> u64 {
        self.next_request += 1;
        let number = self.next_request;
        let frame = encode(&ToAgent { number, request }).unwrap();
        self.control.write_all(&frame).unwrap();
        number
    }

    fn receive(&mut self) {
        let message = loop {
            if let Some(message) = self.reader.next().unwrap() {
                break message;
            }
            let mut buffer = [0; 65536];
            let length = self
                .control
                .read(&mut buffer)
                .expect("message of the agent");
            assert!(length > 0, "the agent closed the connection");
            self.reader.push(&buffer[..length]);
        };
        match message {
            FromAgent::Reply { number, result } => self.replies.push((number, result)),
            FromAgent::Event(event) => self.events.push_back(event),
        }
    }

    pub fn event(&mut self) -> Event {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            self.receive();
        }
    }

    pub fn reply(&mut self, number: u64) -> Result<Reply, AgentError> {
        loop {
            if let Some(index) = self.replies.iter().position(|(other, _)| *other == number) {
                return self.replies.remove(index).1;
            }
            self.receive();
        }
    }

    pub fn ask(&mut self, request: Request) -> Result<Reply, AgentError> {
        let number = self.send(request);
        self.reply(number)
    }

    /// A port, and what comes to connect to it.
    pub fn listen(&mut self) -> (u32, UnixListener) {
        self.next_port += 1;
        let path = self.directory.join(format!("sockets/{}", self.next_port));
        (self.next_port, UnixListener::bind(path).unwrap())
    }

    /// A port whose output is collected.
    pub fn collect(&mut self) -> (u32, JoinHandle<Vec<u8>>) {
        let (port, listener) = self.listen();
        let reader = std::thread::spawn(move || {
            let mut socket = accept(&listener);
            let mut output = Vec::new();
            // A reset is an end.
            let _ = socket.read_to_end(&mut output);
            output
        });
        (port, reader)
    }

    pub fn create(
        &mut self,
        container: &str,
        plan: GuestPlan,
        stdio: Stdio,
    ) -> Result<Reply, AgentError> {
        self.ask(Request::Create {
            container: container.into(),
            plan: Box::new(plan),
            stdio,
        })
    }

    pub fn start_container(&mut self, container: &str) -> Result<Reply, AgentError> {
        self.ask(Request::Start {
            container: container.into(),
            cards: vec![],
        })
    }

    pub fn delete(&mut self, container: &str) -> Result<Reply, AgentError> {
        self.ask(Request::Delete {
            container: container.into(),
        })
    }

    pub fn signal(
        &mut self,
        container: &str,
        process: u32,
        signal: i32,
    ) -> Result<Reply, AgentError> {
        self.ask(Request::Signal {
            container: container.into(),
            process,
            signal,
            all: false,
        })
    }

    pub fn exec(
        &mut self,
        container: &str,
        process: u32,
        plan: Process,
        stdio: Stdio,
    ) -> Result<Reply, AgentError> {
        self.ask(Request::Exec {
            container: container.into(),
            process,
            plan: Box::new(plan),
            stdio,
            ignore_paused: false,
        })
    }

    /// The status of the next process to end, which must be this one.
    pub fn exited(&mut self, container: &str, process: u32) -> u8 {
        match self.event() {
            Event::Exited {
                container: c,
                process: p,
                status,
            } if c == container && p == process => status,
            other => panic!("expected the end of {container} {process}, got {other:?}"),
        }
    }

    /// Runs a shell command in a container of its own: status, stdout, stderr.
    pub fn run(&mut self, container: &str, plan: GuestPlan) -> (u8, String, String) {
        let (stdout, out) = self.collect();
        let (stderr, err) = self.collect();
        let stdio = Stdio::Streams {
            stdin: None,
            stdout: Some(stdout),
            stderr: Some(stderr),
        };
        self.create(container, plan, stdio).unwrap();
        self.start_container(container).unwrap();
        let status = self.exited(container, 0);
        self.delete(container).unwrap();
        let text = |reader: JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&reader.join().unwrap()).into_owned()
        };
        (status, text(out), text(err))
    }

    /// Closes the control connection and waits for the agent's end.
    pub fn hang_up(&mut self) {
        self.control.shutdown(std::net::Shutdown::Both).unwrap();
        self.agent.wait().unwrap();
    }

    /// A running container that does nothing.
    pub fn sleeper(&mut self, container: &str) {
        self.create(container, plan("exec sleep 1000"), NOTHING)
            .unwrap();
        self.start_container(container).unwrap();
    }
}

pub const NOTHING: Stdio = Stdio::Streams {
    stdin: None,
    stdout: None,
    stderr: None,
};

pub fn accept(listener: &UnixListener) -> UnixStream {
    accept_from(listener, listener)
}

/// Accepts a connection of a process that is known to be alive.
fn accept_from(listener: &UnixListener, alive: &impl AsFd) -> UnixStream {
    let timeout = Timespec {
        tv_sec: DEADLINE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    let mut events = [
        PollFd::new(listener, PollFlags::IN),
        PollFd::new(alive, PollFlags::IN),
    ];
    poll(&mut events, Some(&timeout)).unwrap();
    assert!(!events[0].revents().is_empty(), "nobody connected");
    let (socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // Processes of containers end with the agent's pid namespace, a little later than it.
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let removed = (0..1000).any(|_| {
            remove_cgroup(&self.cgroup) || {
                std::thread::sleep(Duration::from_millis(5));
                false
            }
        });
        let _ = fs::remove_dir_all(&self.directory);
        if !removed && !std::thread::panicking() {
            panic!("{}: still populated", self.cgroup.display());
        }
    }
}

fn remove_cgroup(path: &Path) -> bool {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    fs::remove_dir(path).is_ok()
}

fn make_rootfs(rootfs: &Path, busybox: &str) {
    for directory in [
        "bin",
        "etc",
        "tmp",
        "dev",
        "proc",
        "sys",
        "root",
        "home/user",
    ] {
        fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    fs::copy(busybox, rootfs.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox).arg("--list").output().unwrap().stdout;
    for applet in String::from_utf8(applets)
        .unwrap()
        .lines()
        .filter(|name| *name != "busybox")
    {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    fs::write(
        rootfs.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
}

pub fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|&arg| arg.into()).collect(),
        env: vec!["PATH=/bin:/usr/bin".into()],
        cwd: "/".into(),
        terminal: None,
        uid: 0,
        gid: 0,
        additional_gids: vec![],
        umask: None,
        capabilities: Capabilities {
            bounding: ALL_CAPABILITIES,
            effective: ALL_CAPABILITIES,
            inheritable: 0,
            permitted: ALL_CAPABILITIES,
            ambient: 0,
        },
        rlimits: vec![],
        no_new_privileges: false,
        oom_score_adj: None,
        seccomp: None,
        scheduler: None,
        io_priority: None,
        personality: None,
        affinity_initial: None,
        affinity_final: None,
    }
}

pub fn mount(destination: &str, source: MountSource, kind: &str, flags: u64, data: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source,
        kind: kind.into(),
        flags,
        propagation: vec![],
        recursive_set: 0,
        recursive_clear: 0,
        data: data.into(),
        copy_up: false,
        uid_mappings: vec![],
        gid_mappings: vec![],
    }
}

pub fn kernel(destination: &str, kind: &str, flags: u64, data: &str) -> Mount {
    mount(
        destination,
        MountSource::Kernel(kind.into()),
        kind,
        flags,
        data,
    )
}

pub fn share(destination: &str, path: &str) -> Mount {
    let source = MountSource::Share {
        path: path.into(),
        recursive: true,
    };
    mount(destination, source, "", 0, "")
}

/// What engines ask for by default, with a shell command.
pub fn plan(command: &str) -> GuestPlan {
    let hard = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;
    GuestPlan {
        rootfs: "rootfs".into(),
        rootfs_readonly: false,
        rootfs_propagation: 0,
        namespaces: (libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWCGROUP) as u64,
        uid_mappings: vec![],
        gid_mappings: vec![],
        time_offsets: vec![],
        hostname: Some("box".into()),
        domainname: None,
        mounts: vec![
            kernel("/proc", "proc", hard, ""),
            kernel(
                "/dev",
                "tmpfs",
                libc::MS_NOSUID | libc::MS_STRICTATIME,
                "mode=755,size=65536k",
            ),
            kernel(
                "/dev/pts",
                "devpts",
                libc::MS_NOSUID | libc::MS_NOEXEC,
                "newinstance,ptmxmode=0666,mode=0620,gid=5",
            ),
            kernel("/dev/shm", "tmpfs", hard, "mode=1777,size=65536k"),
            kernel("/dev/mqueue", "mqueue", hard, ""),
            kernel("/sys", "sysfs", hard | libc::MS_RDONLY, ""),
            mount(
                "/sys/fs/cgroup",
                MountSource::Cgroup,
                "cgroup",
                hard | libc::MS_RDONLY,
                "",
            ),
        ],
        devices: vec![],
        default_devices: true,
        masked_paths: vec![],
        readonly_paths: vec![],
        sysctls: vec![],
        cgroup: CgroupPlan::default(),
        cards: vec![],
        process: process(&["sh", "-c", command]),
        start_hooks: vec![],
        state: "{}".into(),
    }
}
