// SPDX-License-Identifier: Apache-2.0
//! The jail of the monitor: what the kernel says about that of a running container, and what code in the monitor's
//! place can do.

use std::ffi::{CString, c_long};
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use harness::{Bundle, Runtime};
use runtime_shim::plan::{ReadOnly, Share, ShareKind};
use runtime_shim::sandbox;
use serde_json::Value;
use vmm::ThreadKind;

#[test]
fn the_kernel_confirms_the_jail() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let templates = std::env::temp_dir().join(format!("templates-jail-{}", std::process::id()));
    // A cold boot, then a restored template, if need be after one that makes it.
    for (templates, starts) in [(Path::new("off"), 1), (templates.as_path(), 2)] {
        for _ in 0..starts {
            inspect(&runtime, templates);
        }
    }
    fs::remove_dir_all(&templates).unwrap();
}

fn inspect(runtime: &Runtime, templates: &Path) {
    let id = harness::runtime::new_id();
    let bundle = Bundle::script("sleep 1000").build();
    let mut command = runtime.command();
    command
        .args(["run", "--detach", "-b"])
        .arg(bundle.path())
        .arg(&id)
        .env("SANDBOX_TEMPLATES", templates)
        // A container that runs on holds what its caller would read to the end.
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    assert_eq!(harness::runtime::wait(command.spawn().unwrap()), 0);
    runtime.call(&["exec", &id, "/bin/true"]).ok();
    let outcome = runtime.call(&["check", "--jail", &id]);
    println!("{}", outcome.text());
    let json = runtime.call(&["check", "--jail", &id, "--format", "json"]);
    runtime.call(&["delete", "--force", &id]).ok();

    assert_eq!(outcome.status, 0, "{outcome:?}");
    let report: Value = serde_json::from_str(json.ok()).unwrap();
    assert_eq!(report["holds"], true);
    let threads = report["threads"].as_array().unwrap();
    let names: Vec<&str> = threads
        .iter()
        .map(|thread| thread["name"].as_str().unwrap())
        .collect();
    assert_eq!(names[..5], ["sandbox", "fs0", "fs1", "fs2", "vcpu0"]);
    for name in &names[5..] {
        // The last is the kernel's own, of KVM.
        assert!(
            name.starts_with("vcpu") || *name == "kvm-nx-lpage-re",
            "{name}"
        );
    }
    for thread in threads {
        assert_eq!(thread["seccomp"], 2, "{thread}");
        let serves = thread["name"].as_str().unwrap().starts_with("fs");
        assert_eq!(thread["capabilities"] != 0, serves, "{thread}");
    }
    let targets = report["mounts"].as_array().unwrap();
    let targets: Vec<&str> = targets
        .iter()
        .map(|mount| mount["target"].as_str().unwrap())
        .collect();
    assert_eq!(targets[..2], ["/", "/rootfs"]);
    // Nothing by which other files of the host could be reached.
    let files = report["files"].as_array().unwrap();
    for file in files {
        let target = file["target"].as_str().unwrap();
        let harmless = target.starts_with("anon_inode:")
            || target.starts_with("socket:")
            || target.starts_with("pipe:")
            || ["/", "/rootfs", "/dev/null"].contains(&target)
            || target.ends_with("/fd")
            || target.starts_with("/rootfs/")
            || target.ends_with("/pagemap")
            || target.ends_with(".memory");
        assert!(harmless, "{file}");
    }
}

/// Somebody on the host who must not be reached.
struct Host {
    directory: PathBuf,
    pid: i32,
    abstract_name: Vec<u8>,
    _listeners: [UnixListener; 2],
}

/// What an attempt came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused(i32),
    /// By the system call filter.
    Killed,
}

/// A system call with its arguments; the last -1 or errno.
fn call(number: c_long, arguments: &[i64]) -> i64 {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: the callers pass pointers that are valid for the call, or null where the kernel has to refuse it.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

fn pointer<T: ?Sized>(value: &T) -> i64 {
    (&raw const *value).cast::<u8>().expose_provenance() as i64
}

type Attempt = Box<dyn Fn(&Host) -> i64>;

fn attempt(name: &'static str, number: c_long, arguments: &[i64]) -> (&'static str, Attempt) {
    let arguments = arguments.to_vec();
    (name, Box::new(move |_| call(number, &arguments)))
}

fn on_path(
    name: &'static str,
    path: &'static str,
    act: fn(&CString) -> i64,
) -> (&'static str, Attempt) {
    let path = CString::new(path).unwrap();
    (name, Box::new(move |_| act(&path)))
}

fn open(path: &CString, flags: i32) -> i64 {
    let cwd = i64::from(libc::AT_FDCWD);
    call(
        libc::SYS_openat,
        &[cwd, pointer(path.as_bytes_with_nul()), flags.into(), 0o600],
    )
}

fn connect(address: &[u8], family: i32) -> i64 {
    let socket = call(
        libc::SYS_socket,
        &[family.into(), libc::SOCK_STREAM.into(), 0],
    );
    if socket < 0 {
        return socket;
    }
    call(
        libc::SYS_connect,
        &[socket, pointer(address), address.len() as i64],
    )
}

fn unix(path: &[u8]) -> Vec<u8> {
    let family = u16::try_from(libc::AF_UNIX).unwrap().to_ne_bytes();
    [&family[..], path].concat()
}

/// Refused in the jail with its filters, whatever the thread.
#[rustfmt::skip]
fn attempts() -> Vec<(&'static str, Attempt)> {
    let exec = i64::from(libc::PROT_EXEC | libc::PROT_READ);
    let anonymous = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let read = |path: &CString| open(path, libc::O_RDONLY);
    let of_host = |name, number, arguments: fn(&Host) -> Vec<i64>| -> (&'static str, Attempt) {
        (name, Box::new(move |host: &Host| call(number, &arguments(host))))
    };
    vec![
        on_path("open a file of the host", "/etc/passwd", read),
        on_path("open a file of the host by way of ..", "/rootfs/../../../../etc/passwd", read),
        on_path("open /proc of a process of the host", "/proc/1/status", read),
        on_path("open a device", "/dev/kvm", read),
        on_path("write to a read-only share", "/m0/file", |path| open(path, libc::O_WRONLY)),
        on_path("write beside the shares", "/new", |path| open(path, libc::O_WRONLY | libc::O_CREAT)),
        on_path("make a device", "/rootfs/mem", |path| {
            let dev = libc::makedev(1, 1) as i64;
            let at = [libc::AT_FDCWD.into(), pointer(path.as_bytes_with_nul()), (libc::S_IFCHR | 0o600).into(), dev];
            call(libc::SYS_mknodat, &at)
        }),
        on_path("open a file by its handle", "/rootfs", |_| call(libc::SYS_open_by_handle_at, &[-1, 0, 0])),
        on_path("leave the root", "/rootfs", |path| call(libc::SYS_chroot, &[pointer(path.as_bytes_with_nul())])),
        of_host("see a process of the host", libc::SYS_kill, |host| vec![host.pid.into(), 0]),
        of_host("signal a process of the host", libc::SYS_kill, |host| vec![host.pid.into(), libc::SIGKILL.into()]),
        of_host("signal a thread of the host", libc::SYS_tgkill, |host| vec![host.pid.into(), host.pid.into(), libc::SIGABRT.into()]),
        of_host("open a pidfd", libc::SYS_pidfd_open, |host| vec![host.pid.into(), 0]),
        of_host("trace a process of the host", libc::SYS_ptrace, |host| vec![libc::PTRACE_ATTACH.into(), host.pid.into(), 0, 0]),
        ("read the memory of a process of the host", Box::new(|host: &Host| {
            let mut byte = 0u8;
            let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
            // The same address is the runner's own variable there.
            call(libc::SYS_process_vm_readv, &[host.pid.into(), pointer(&local), 1, pointer(&local), 1, 0])
        })),
        of_host("take limits from a process of the host", libc::SYS_prlimit64, |host| vec![host.pid.into(), libc::RLIMIT_NOFILE.into(), 0, 0]),
        attempt("make a user namespace", libc::SYS_unshare, &[libc::CLONE_NEWUSER.into()]),
        attempt("make a mount namespace", libc::SYS_unshare, &[libc::CLONE_NEWNS.into()]),
        attempt("make a network namespace", libc::SYS_unshare, &[libc::CLONE_NEWNET.into()]),
        attempt("enter a namespace", libc::SYS_setns, &[0, 0]),
        attempt("fork", libc::SYS_fork, &[]),
        attempt("clone", libc::SYS_clone, &[libc::SIGCHLD.into()]),
        attempt("clone3", libc::SYS_clone3, &[0, 0]),
        on_path("execute a program", "/rootfs/program", |path| call(libc::SYS_execve, &[pointer(path.as_bytes_with_nul()), 0, 0])),
        on_path("execute a program by descriptor", "/rootfs/program", |path| {
            call(libc::SYS_execveat, &[libc::AT_FDCWD.into(), pointer(path.as_bytes_with_nul()), 0, 0, 0])
        }),
        on_path("mount", "/rootfs", |path| {
            call(libc::SYS_mount, &[0, pointer(path.as_bytes_with_nul()), pointer(c"tmpfs".to_bytes_with_nul()), 0, 0])
        }),
        on_path("mount writable again", "/m0", |path| {
            let flags = libc::MS_REMOUNT | libc::MS_BIND;
            call(libc::SYS_mount, &[0, pointer(path.as_bytes_with_nul()), 0, flags as i64, 0])
        }),
        on_path("unmount", "/m0", |path| call(libc::SYS_umount2, &[pointer(path.as_bytes_with_nul()), 0])),
        attempt("make a file system", libc::SYS_fsopen, &[pointer(c"tmpfs".to_bytes_with_nul()), 0]),
        on_path("clone a mount", "/rootfs", |path| call(libc::SYS_open_tree, &[libc::AT_FDCWD.into(), pointer(path.as_bytes_with_nul()), 1])),
        ("connect to a socket of the host", Box::new(|host: &Host| {
            let path = host.directory.join("socket");
            connect(&unix(&[path.as_os_str().as_encoded_bytes(), b"\0"].concat()), libc::AF_UNIX)
        })),
        ("connect to an abstract socket of the host", Box::new(|host: &Host| {
            connect(&unix(&[b"\0", host.abstract_name.as_slice()].concat()), libc::AF_UNIX)
        })),
        ("connect to the network", Box::new(|_: &Host| {
            let mut address = u16::try_from(libc::AF_INET).unwrap().to_ne_bytes().to_vec();
            address.extend([0, 80, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            connect(&address, libc::AF_INET)
        })),
        attempt("load a module", libc::SYS_finit_module, &[-1, pointer(c"".to_bytes_with_nul()), 0]),
        attempt("load a module from memory", libc::SYS_init_module, &[0, 0, pointer(c"".to_bytes_with_nul())]),
        attempt("load a kernel", libc::SYS_kexec_load, &[0, 0, 0, 0]),
        attempt("use the keyring", libc::SYS_keyctl, &[0, -3, 1]),
        attempt("add a key", libc::SYS_add_key, &[0, 0, 0, 0, 0]),
        attempt("use BPF", libc::SYS_bpf, &[0, 0, 0]),
        attempt("use perf", libc::SYS_perf_event_open, &[0, 0, -1, -1, 0]),
        attempt("use io_uring", libc::SYS_io_uring_setup, &[1, 0]),
        attempt("use userfaultfd", libc::SYS_userfaultfd, &[1]),
        attempt("make memory that can be executed", libc::SYS_mmap, &[0, 4096, exec, anonymous, -1, 0]),
        attempt("make a file in memory to execute", libc::SYS_memfd_create, &[pointer(c"x".to_bytes_with_nul()), 0]),
        attempt("become root", libc::SYS_setresuid, &[0, 0, 0]),
        attempt("make a virtual machine", libc::SYS_ioctl, &[0, 0xae01, 0]),
        attempt("type into a terminal", libc::SYS_ioctl, &[0, libc::TIOCSTI as i64, pointer(c"x".to_bytes_with_nul())]),
        attempt("set the clock", libc::SYS_settimeofday, &[0, 0]),
        attempt("set the host name", libc::SYS_sethostname, &[pointer(c"x".to_bytes_with_nul()), 1]),
        attempt("restart the host", libc::SYS_reboot, &[0, 0, 0, 0]),
        attempt("read the kernel log", libc::SYS_syslog, &[3, 0, 0]),
        attempt("reach I/O ports", libc::SYS_iopl, &[3]),
        attempt("turn the filter off", libc::SYS_seccomp, &[0, 0, 0]),
        attempt("change the program of the process", libc::SYS_prctl, &[libc::PR_SET_MM.into(), libc::PR_SET_MM_EXE_FILE.into(), 0, 0, 0]),
    ]
}

/// Those that the namespaces, the user and the mounts of the jail refuse without any filter.
const SECOND_LAYER: [&str; 24] = [
    "open a file of the host",
    "open a file of the host by way of ..",
    "open /proc of a process of the host",
    "open a device",
    "write to a read-only share",
    "write beside the shares",
    "make a device",
    "leave the root",
    "signal a process of the host",
    "trace a process of the host",
    "read the memory of a process of the host",
    "make a mount namespace",
    "make a network namespace",
    "execute a program",
    "mount",
    "mount writable again",
    "unmount",
    "clone a mount",
    "connect to a socket of the host",
    "connect to an abstract socket of the host",
    "connect to the network",
    "load a module",
    "set the host name",
    "restart the host",
];

#[test]
fn code_in_place_of_the_monitor_gets_nowhere() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let host = Host::new();
    let shares = host.shares();
    let kinds = [
        ThreadKind::EventLoop,
        ThreadKind::FileServer,
        ThreadKind::Vcpu,
    ];
    let mut got_through = Vec::new();
    for (name, act) in attempts() {
        let mut results = Vec::new();
        for kind in kinds {
            results.push((kind.name(), host.try_in_jail(&shares, Some(kind), &act)));
        }
        if SECOND_LAYER.contains(&name) {
            results.push(("no filter", host.try_in_jail(&shares, None, &act)));
        }
        let text: Vec<String> = results
            .iter()
            .map(|(layer, outcome)| format!("{layer} {outcome}"))
            .collect();
        println!("{name}: {}", text.join(", "));
        if results.iter().any(|(_, outcome)| *outcome == Outcome::Done) {
            got_through.push(name);
        }
    }
    let names: Vec<&str> = attempts().iter().map(|(name, _)| *name).collect();
    assert!(SECOND_LAYER.iter().all(|name| names.contains(name)));
    // What the jail is for goes on: the control of all of the above.
    let path = CString::new("/rootfs/file").unwrap();
    let write: Attempt = Box::new(move |_| open(&path, libc::O_RDWR));
    let allowed = host.try_in_jail(&shares, Some(ThreadKind::FileServer), &write);
    drop(host);
    assert_eq!(got_through, [""; 0]);
    assert_eq!(allowed, Outcome::Done);
}

impl Host {
    fn new() -> Host {
        let pid = std::process::id();
        let directory = std::env::temp_dir().join(format!("jail-{pid}"));
        fs::create_dir_all(directory.join("tree")).unwrap();
        fs::write(directory.join("tree/file"), "content").unwrap();
        fs::copy("/bin/true", directory.join("tree/program")).unwrap();
        let abstract_name = format!("jail-{pid}").into_bytes();
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let listeners = [
            UnixListener::bind(directory.join("socket")).unwrap(),
            UnixListener::bind_addr(&address).unwrap(),
        ];
        Host {
            directory,
            pid: pid.try_into().unwrap(),
            abstract_name,
            _listeners: listeners,
        }
    }

    fn shares(&self) -> [Share; 2] {
        [("rootfs", ReadOnly::No), ("m0", ReadOnly::Recursive)].map(|(name, readonly)| Share {
            name: name.into(),
            source: self.directory.join("tree"),
            kind: ShareKind::Directory,
            readonly,
            recursive: true,
            overlay: None,
        })
    }

    /// Builds the jail of a monitor in a new process and tries one thing in it.
    fn try_in_jail(&self, shares: &[Share], kind: Option<ThreadKind>, act: &Attempt) -> Outcome {
        const NO_JAIL: i32 = 250;
        // SAFETY: the child, which has one thread, goes on in this block and never returns from it. No other thread
        // of the test runner holds a lock that it needs: the tests of this program do not run at the same time.
        let pid = match unsafe { libc::fork() } {
            0 => {
                let jail = sandbox::new_network()
                    .and_then(|()| sandbox::enter(shares, None))
                    .map_err(|error| error.to_string())
                    .and_then(|root| match kind {
                        Some(kind) => vmm::confine(kind)
                            .map(|()| root)
                            .map_err(|error| error.to_string()),
                        None => Ok(root),
                    });
                let status = match jail {
                    Err(_) => NO_JAIL,
                    Ok(_root) => match act(self) {
                        -1 => std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
                        _ => 0,
                    },
                };
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(status) }
            }
            pid => rustix::process::Pid::from_raw(pid).expect("fork"),
        };
        let options = rustix::process::WaitOptions::empty();
        let (_, status) = rustix::process::waitpid(Some(pid), options)
            .unwrap()
            .unwrap();
        match (status.terminating_signal(), status.exit_status()) {
            (Some(libc::SIGSYS), _) => Outcome::Killed,
            (_, Some(0)) => Outcome::Done,
            (_, Some(NO_JAIL)) => panic!("the jail cannot be built"),
            (_, Some(errno)) => Outcome::Refused(errno),
            other => panic!("the attempt ended with {other:?}"),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Done => f.write_str("DONE"),
            Outcome::Killed => f.write_str("killed"),
            Outcome::Refused(errno) => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "refused ({error})")
            }
        }
    }
}
