// SPDX-License-Identifier: Apache-2.0
//! System calls that rustix does not offer, or not in the form needed here.

use std::ffi::{CStr, CString};
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::{Errno, Result};
use rustix::process::Pid;

fn check(result: libc::c_long) -> Result<libc::c_long> {
    if result == -1 {
        // SAFETY: errno is a thread-local integer of the C library, always valid.
        Err(Errno::from_raw_os_error(unsafe {
            *libc::__errno_location()
        }))
    } else {
        Ok(result)
    }
}

/// The caller's half of [`fork`].
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
}

/// clone3(2) without sharing memory. The child runs `body`, which returns its exit status, and never
/// comes back into the caller's code, so nothing of the caller's is dropped twice.
pub(crate) fn fork(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce() -> i32,
) -> Result<Child> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is a plain structure of integers, for which zero means unused.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | libc::CLONE_PIDFD as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= 0x2_0000_0000; // CLONE_INTO_CGROUP, wider than libc's constant
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the structure and `pidfd` outlive the call and its size is passed. Without CLONE_VM and
    // with no stack given this is fork(2): the child gets a copy of the memory. The agent has one
    // thread, so no lock of the C library is held by anyone in that copy.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        let status = body();
        // SAFETY: ends the process, has no other precondition.
        unsafe { libc::_exit(status) }
    }
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Errno::OVERFLOW)?;
    // SAFETY: the call succeeded, so with CLONE_PIDFD it stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd })
}

/// setns(2) on a pidfd: all the namespaces named, at once.
pub(crate) fn set_namespaces(pidfd: BorrowedFd<'_>, namespaces: u64) -> Result<()> {
    let flags = libc::c_int::try_from(namespaces).map_err(|_| Errno::INVAL)?;
    // SAFETY: takes a descriptor and a number. The agent holds no state tied to its namespaces.
    check(unsafe { libc::setns(pidfd.as_raw_fd(), flags) }.into()).map(drop)
}

pub(crate) fn unshare(namespaces: u64) -> Result<()> {
    let flags = libc::c_int::try_from(namespaces).map_err(|_| Errno::INVAL)?;
    // SAFETY: takes a number; called with CLONE_NEW* flags only, in a process with one thread.
    check(unsafe { libc::unshare(flags) }.into()).map(drop)
}

/// What mount_setattr(2) is to change.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MountAttributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    /// A user namespace, for `MOUNT_ATTR_IDMAP`.
    pub(crate) user_namespace: u64,
}

pub(crate) fn mount_set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: MountAttributes,
) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and the structure has the layout of struct mount_attr,
    // whose size is passed; the kernel only reads both.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// Closes every descriptor from 3 on, but for those named.
pub(crate) fn close_others(keep: &mut [RawFd]) -> Result<()> {
    keep.sort_unstable();
    let mut first = 3u32;
    for &fd in keep.iter() {
        let fd = u32::try_from(fd).map_err(|_| Errno::BADF)?;
        if fd < first {
            continue;
        }
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX, 0)
}

/// Lets no descriptor from 3 on survive an exec.
pub(crate) fn close_on_exec() -> Result<()> {
    close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: libc::c_uint) -> Result<()> {
    // SAFETY: only called in a child that is about to exec. It keeps what it still uses by naming it,
    // and leaves by _exit or exec, so owners of closed descriptors are never dropped.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Gives every signal its default action, but for SIGPIPE, which Rust's start-up code ignores. In a
/// machine this is so from the beginning; on a development machine the caller may have ignored some.
pub(crate) fn default_signals() {
    for signal in (1..=64).filter(|&signal| signal != libc::SIGPIPE) {
        default_signal(signal);
    }
}

/// Undoes for a child what the agent has changed of its signals.
pub(crate) fn reset_signals() -> Result<()> {
    default_signal(libc::SIGPIPE);
    // SAFETY: the set is initialised by sigemptyset before it is read.
    check(
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut())
        }
        .into(),
    )
    .map(drop)
}

fn default_signal(signal: libc::c_int) {
    // The kernel's sigaction: SIG_DFL, no flags, no restorer, an empty mask.
    let action = [0u64; 4];
    // SAFETY: the action outlives the call and is read only. The C library's own call would refuse the
    // two signals that it keeps to itself. Failure for KILL and STOP is expected; they have no other.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            action.as_ptr(),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        );
    }
}

/// Blocks SIGCHLD and returns the descriptor that tells of it.
pub(crate) fn child_signals() -> Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is used; -1 asks for a new descriptor,
    // which on success nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()).into())?;
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(fd.into())?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

pub(crate) fn kill(pid: Pid, signal: i32) -> Result<()> {
    // SAFETY: takes two numbers.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }.into()).map(drop)
}

pub(crate) fn set_resource_limit(pid: Pid, resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the kernel reads one structure, which outlives the call, and writes nothing.
    check(
        unsafe {
            libc::prlimit64(
                pid.as_raw_nonzero().get(),
                resource,
                &raw const limit,
                ptr::null_mut(),
            )
        }
        .into(),
    )
    .map(drop)
}

pub(crate) fn set_scheduler(pid: Pid, scheduler: &agent_protocol::Scheduler) -> Result<()> {
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).map_err(|_| Errno::INVAL)?,
        sched_policy: scheduler.policy,
        sched_flags: scheduler.flags,
        sched_nice: scheduler.nice,
        sched_priority: scheduler.priority,
        sched_runtime: scheduler.runtime,
        sched_deadline: scheduler.deadline,
        sched_period: scheduler.period,
    };
    // SAFETY: the kernel reads `size` bytes of a structure that outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            pid.as_raw_nonzero().get(),
            &raw const attributes,
            0,
        )
    })
    .map(drop)
}

/// ioprio_set(2) of one process.
pub(crate) fn set_io_priority(pid: Pid, class: u8, level: u8) -> Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let priority = u32::from(class) << IOPRIO_CLASS_SHIFT | u32::from(level);
    // SAFETY: takes three numbers.
    check(unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            IOPRIO_WHO_PROCESS,
            pid.as_raw_nonzero().get(),
            priority,
        )
    })
    .map(drop)
}

pub(crate) fn set_personality(personality: u64) -> Result<()> {
    // SAFETY: takes a number; affects execs and mappings to come only.
    check(unsafe { libc::personality(personality) }.into()).map(drop)
}

/// prctl(2) whose arguments are numbers.
pub(crate) fn process_control(option: libc::c_int, second: u64, third: u64) -> Result<()> {
    // SAFETY: called with options whose arguments are numbers, never addresses.
    check(unsafe { libc::prctl(option, second, third, 0u64, 0u64) }.into()).map(drop)
}

/// seccomp(2), SECCOMP_SET_MODE_FILTER, with raw 8-byte instructions.
pub(crate) fn set_seccomp_filter(program: &[u8], flags: u64) -> Result<()> {
    let (instructions, rest) = program.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let mut filter: Vec<libc::sock_filter> = instructions
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect();
    let description = libc::sock_fprog {
        len: libc::c_ushort::try_from(filter.len()).map_err(|_| Errno::INVAL)?,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the description points to `len` instructions that outlive the call; the kernel checks
    // the program and copies it.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const description,
        )
    })
    .map(drop)
}

/// The head of union bpf_attr, as BPF_PROG_LOAD reads it (linux/bpf.h).
#[repr(C)]
#[derive(Debug, Default)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The head of union bpf_attr, as BPF_PROG_ATTACH reads it.
#[repr(C)]
#[derive(Debug, Default)]
struct ProgramAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// Loads a device program given as raw 8-byte instructions.
pub(crate) fn load_device_program(program: &[u8]) -> Result<OwnedFd> {
    if !program.len().is_multiple_of(8) {
        return Err(Errno::INVAL);
    }
    // The kernel wants the instructions on an 8-byte boundary.
    let instructions: Vec<u64> = program
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_ne_bytes(*bytes))
        .collect();
    let attributes = ProgramLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(|_| Errno::INVAL)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..ProgramLoad::default()
    };
    // SAFETY: the structure is the head of union bpf_attr for this command and its size is passed; the
    // instructions and the licence that it points to outlive the call.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<ProgramLoad>(),
        )
    })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::OVERFLOW)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to a cgroup, in the place of an earlier one.
pub(crate) fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).map_err(|_| Errno::BADF);
    let attributes = ProgramAttach {
        target: number(cgroup)?,
        program: number(program)?,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI | replaced.map_or(0, |_| BPF_F_REPLACE),
        replaced: replaced.map_or(Ok(0), number)?,
    };
    // SAFETY: the structure is the head of union bpf_attr for this command and its size is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            size_of::<ProgramAttach>(),
        )
    })
    .map(drop)
}

/// How long connect(2) waits for the host, in seconds: Linux gives a busy host only two.
const CONNECT_TIMEOUT: libc::time_t = 60;

/// connect(2) of a vsock socket to a port of the host.
pub(crate) fn connect_to_host(socket: BorrowedFd<'_>, port: u32) -> Result<()> {
    const AF_VSOCK: libc::c_int = 40;
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
    let timeout = libc::timeval {
        tv_sec: CONNECT_TIMEOUT,
        tv_usec: 0,
    };
    let length = libc::socklen_t::try_from(size_of_val(&timeout)).map_err(|_| Errno::INVAL)?;
    // SAFETY: the value outlives the call and its size is passed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const timeout).cast::<libc::c_void>(),
            length,
        )
    };
    check(result.into())?;
    // SAFETY: sockaddr_vm is a plain structure of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = 40; // AF_VSOCK
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length =
        libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the address outlives the call and its size is passed.
    check(
        unsafe {
            libc::connect(
                socket.as_raw_fd(),
                (&raw const address).cast::<libc::sockaddr>(),
                length,
            )
        }
        .into(),
    )
    .map(drop)
}

/// Sets the loopback interface of the current network namespace up.
pub(crate) fn loopback_up(socket: BorrowedFd<'_>) -> Result<()> {
    const UP_AND_RUNNING: libc::c_short = 0x41; // IFF_UP | IFF_RUNNING
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = UP_AND_RUNNING;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
        .map(drop)
}

/// Credits bytes to the entropy pool (RNDADDENTROPY) and has the generator take them up at once.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let length = i32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    let bits = length.checked_mul(8).ok_or(Errno::INVAL)?;
    // struct rand_pool_info: entropy_count, buf_size, then the bytes, in whole words.
    let mut pool = Vec::with_capacity(8 + bytes.len());
    pool.extend(bits.to_ne_bytes());
    pool.extend(length.to_ne_bytes());
    pool.extend(bytes);
    // SAFETY: the buffer holds the two counts and as many bytes as the second says. The kernel copies
    // from any address, aligned or not.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) }.into())?;
    // SAFETY: has no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG, 0) }.into()).map(drop)
}

/// execve(2): returns only on failure.
pub(crate) fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> Errno {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([ptr::null()])
            .collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: the path and both arrays, which end with a null pointer, outlive the call.
    let result = unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    check(result.into()).err().unwrap_or(Errno::IO)
}
