// SPDX-License-Identifier: Apache-2.0
//! The lists. Taken from the code, and held against strace of the integration tests.

use kvm_bindings as kvm;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::Argument::{Is, OwnProcess, Without};
use super::{Argument, Call};

const fn any(number: i64) -> Call {
    only(number, &[])
}

const fn only(number: i64, arguments: &'static [Argument]) -> Call {
    Call { number, arguments }
}

#[allow(
    clippy::cast_sign_loss,
    reason = "flags and signal numbers are positive"
)]
const fn bits(value: i32) -> u64 {
    value as u64
}

/// SIGRTMIN as glibc has it: the kernel's is two less. What gets a vCPU out of the guest.
const KICK: u64 = 34;

const EXECUTABLE: u64 = bits(libc::PROT_EXEC);

/// linux/kvm.h: `KVMIO`.
const KVM: u32 = 0xae;

const fn ioctl<T>(direction: u32, number: u32) -> u64 {
    ioctl_expr(direction, KVM, number, size_of::<T>() as u32)
}

/// linux/kvm.h.
mod request {
    use super::*;

    pub(super) const RUN: u64 = ioctl::<()>(_IOC_NONE, 0x80);
    pub(super) const GET_REGS: u64 = ioctl::<kvm::kvm_regs>(_IOC_READ, 0x81);
    pub(super) const GET_SREGS: u64 = ioctl::<kvm::kvm_sregs>(_IOC_READ, 0x83);
    pub(super) const GET_MSRS: u64 = ioctl::<kvm::kvm_msrs>(_IOC_READ | _IOC_WRITE, 0x88);
    pub(super) const GET_LAPIC: u64 = ioctl::<kvm::kvm_lapic_state>(_IOC_READ, 0x8e);
    pub(super) const GET_MP_STATE: u64 = ioctl::<kvm::kvm_mp_state>(_IOC_READ, 0x98);
    pub(super) const GET_VCPU_EVENTS: u64 = ioctl::<kvm::kvm_vcpu_events>(_IOC_READ, 0x9f);
    pub(super) const GET_DEBUGREGS: u64 = ioctl::<kvm::kvm_debugregs>(_IOC_READ, 0xa1);
    pub(super) const GET_XSAVE: u64 = ioctl::<kvm::kvm_xsave>(_IOC_READ, 0xa4);
    pub(super) const GET_XCRS: u64 = ioctl::<kvm::kvm_xcrs>(_IOC_READ, 0xa6);
    pub(super) const SET_GSI_ROUTING: u64 = ioctl::<kvm::kvm_irq_routing>(_IOC_WRITE, 0x6a);
    pub(super) const IRQFD: u64 = ioctl::<kvm::kvm_irqfd>(_IOC_WRITE, 0x76);
    pub(super) const IOEVENTFD: u64 = ioctl::<kvm::kvm_ioeventfd>(_IOC_WRITE, 0x79);
    pub(super) const GET_CLOCK: u64 = ioctl::<kvm::kvm_clock_data>(_IOC_READ, 0x7c);
}

/// Memory, locks, the log, and the ways to end.
pub(super) const COMMON: &[Call] = &[
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_close),
    // What a debug build asks before it closes a descriptor.
    only(libc::SYS_fcntl, &[Is(1, bits(libc::F_GETFD))]),
    any(libc::SYS_futex),
    only(libc::SYS_mmap, &[Without(2, EXECUTABLE)]),
    only(libc::SYS_mprotect, &[Without(2, EXECUTABLE)]),
    any(libc::SYS_mremap),
    any(libc::SYS_munmap),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    any(libc::SYS_sched_yield),
    any(libc::SYS_clock_gettime),
    // Keys of hash maps.
    any(libc::SYS_getrandom),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    // After a stop, which a debugger or an operator may make.
    any(libc::SYS_restart_syscall),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
    // abort(3).
    any(libc::SYS_getpid),
    any(libc::SYS_gettid),
    only(
        libc::SYS_tgkill,
        &[OwnProcess(0), Is(2, bits(libc::SIGABRT))],
    ),
    only(libc::SYS_rt_sigaction, &[Is(0, bits(libc::SIGABRT))]),
];

pub(super) const VCPU: &[Call] = &[
    only(libc::SYS_ioctl, &[Is(1, request::RUN)]),
    // A register of the IOAPIC was written.
    only(libc::SYS_ioctl, &[Is(1, request::SET_GSI_ROUTING)]),
    // The registers are saved.
    only(libc::SYS_ioctl, &[Is(1, request::GET_REGS)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_SREGS)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_MSRS)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_LAPIC)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_MP_STATE)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_VCPU_EVENTS)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_DEBUGREGS)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_XSAVE)]),
    only(libc::SYS_ioctl, &[Is(1, request::GET_XCRS)]),
    // The driver reset the vsock device, which drops its streams.
    any(libc::SYS_epoll_ctl),
];

/// Below the shares by descriptor: the root of the process has nothing else.
pub(super) const FILE_SERVER: &[Call] = &[
    any(libc::SYS_ppoll),
    // As whom: only what the user namespace of the jail has mapped, and no more capabilities than there were.
    any(libc::SYS_setfsuid),
    any(libc::SYS_setfsgid),
    any(libc::SYS_capset),
    any(libc::SYS_umask),
    any(libc::SYS_openat),
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    any(libc::SYS_readlinkat),
    any(libc::SYS_getdents64),
    any(libc::SYS_lseek),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_pwritev2),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_syncfs),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_linkat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat2),
    any(libc::SYS_fchmod),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchownat),
    any(libc::SYS_utimensat),
    any(libc::SYS_getxattr),
    any(libc::SYS_setxattr),
    any(libc::SYS_fsetxattr),
    any(libc::SYS_listxattr),
    any(libc::SYS_removexattr),
    // A copy of a descriptor.
    only(libc::SYS_fcntl, &[Is(1, bits(libc::F_DUPFD_CLOEXEC))]),
];

/// Devices, the streams of the container, the control socket, and the template that is saved.
pub(super) const EVENT_LOOP: &[Call] = &[
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_ppoll),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_preadv2),
    any(libc::SYS_pwritev2),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_fstat),
    only(libc::SYS_fcntl, &[Is(1, bits(libc::F_GETFL))]),
    only(libc::SYS_fcntl, &[Is(1, bits(libc::F_DUPFD_CLOEXEC))]),
    // A verb connects: the listening socket is there already.
    any(libc::SYS_accept4),
    only(
        libc::SYS_getsockopt,
        &[
            Is(1, bits(libc::SOL_SOCKET)),
            Is(2, bits(libc::SO_PEERCRED)),
        ],
    ),
    // The size of the terminal.
    only(libc::SYS_ioctl, &[Is(1, libc::TIOCGWINSZ)]),
    // A network card is plugged, its tap having come over the control socket, and its driver says what it can do.
    only(libc::SYS_ioctl, &[Is(1, request::IRQFD)]),
    only(libc::SYS_ioctl, &[Is(1, request::IOEVENTFD)]),
    only(libc::SYS_ioctl, &[Is(1, libc::TUNSETOFFLOAD)]),
    // Gets a vCPU out of the guest.
    only(libc::SYS_tgkill, &[OwnProcess(0), Is(2, KICK)]),
    // A VM is saved, a template published, and the capabilities for that given up.
    any(libc::SYS_capset),
    only(libc::SYS_ioctl, &[Is(1, request::GET_CLOCK)]),
    any(libc::SYS_mincore),
    any(libc::SYS_lseek),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_statx),
    any(libc::SYS_readlinkat),
    any(libc::SYS_getdents64),
    any(libc::SYS_renameat),
    any(libc::SYS_unlinkat),
];
