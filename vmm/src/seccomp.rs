// SPDX-License-Identifier: Apache-2.0
//! What each kind of thread may ask of the kernel. Anything else ends the process, with the call named in the log.
//!
//! A guest that has taken a thread over is left with these calls: no programs, no threads or processes, no sockets, no
//! mounts, no signals but to its own process, and no memory that can be executed. `DESIGN.md` has the table with the
//! reasons.

mod calls;
mod names;
mod violation;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

pub use violation::report_violations;

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Serves files.
    FileServer,
    /// Owns the [`crate::Machine`]: devices, streams, control.
    EventLoop,
}

/// A thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("the system call filter of the {0} threads cannot be compiled")]
    Compile(ThreadKind, #[source] seccompiler::BackendError),
    #[error("the system call filter of the {0} threads cannot be installed")]
    Install(ThreadKind, #[source] seccompiler::Error),
    #[error("capabilities cannot be given up")]
    Capabilities(#[source] std::io::Error),
}

impl ThreadKind {
    pub fn name(self) -> &'static str {
        match self {
            ThreadKind::Vcpu => "vCPU",
            ThreadKind::FileServer => "file server",
            ThreadKind::EventLoop => "event loop",
        }
    }
}

impl std::fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Gives up all capabilities of the calling thread.
pub fn drop_capabilities() -> std::io::Result<()> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, none)?)
}

/// Leaves the calling thread the system calls that its kind needs, for good. A vCPU needs no capability either.
pub fn confine(kind: ThreadKind) -> Result<(), ConfineError> {
    // A sanitizer asks the kernel for more.
    if cfg!(fuzzing) {
        return Ok(());
    }
    if kind == ThreadKind::Vcpu {
        drop_capabilities().map_err(ConfineError::Capabilities)?;
    }
    violation::name_this_thread(kind);
    let program = compile(kind).map_err(|error| ConfineError::Compile(kind, error))?;
    seccompiler::apply_filter(&program).map_err(|error| ConfineError::Install(kind, error))
}

/// One allowed call. Several of the same number: one of them has to fit.
#[derive(Debug, Clone, Copy)]
struct Call {
    number: i64,
    arguments: &'static [Argument],
}

/// What an argument has to be.
#[derive(Debug, Clone, Copy)]
enum Argument {
    Is(u8, u64),
    /// None of these bits.
    Without(u8, u64),
    /// The id of this process.
    OwnProcess(u8),
}

impl Argument {
    fn condition(self) -> Result<SeccompCondition, seccompiler::BackendError> {
        use SeccompCmpArgLen::{Dword, Qword};
        match self {
            // What the kernel takes for an int or a 32-bit command: the upper half is nobody's.
            Argument::Is(index, value) => {
                SeccompCondition::new(index, Dword, SeccompCmpOp::Eq, value)
            }
            Argument::Without(index, bits) => {
                SeccompCondition::new(index, Qword, SeccompCmpOp::MaskedEq(bits), 0)
            }
            Argument::OwnProcess(index) => {
                SeccompCondition::new(index, Dword, SeccompCmpOp::Eq, std::process::id().into())
            }
        }
    }
}

fn compile(kind: ThreadKind) -> Result<BpfProgram, seccompiler::BackendError> {
    let own: &[Call] = match kind {
        ThreadKind::Vcpu => calls::VCPU,
        ThreadKind::FileServer => calls::FILE_SERVER,
        ThreadKind::EventLoop => calls::EVENT_LOOP,
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls::COMMON.iter().chain(own) {
        let rules = rules.entry(call.number).or_default();
        // No rule at all stands for any arguments.
        if !call.arguments.is_empty() {
            let conditions = call.arguments.iter().map(|argument| argument.condition());
            rules.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ThreadKind; 3] = [
        ThreadKind::Vcpu,
        ThreadKind::FileServer,
        ThreadKind::EventLoop,
    ];

    /// A call that is listed with and without conditions would be allowed without any.
    #[test]
    fn conditions_are_not_undone() {
        for own in [calls::VCPU, calls::FILE_SERVER, calls::EVENT_LOOP] {
            let mut free = BTreeMap::new();
            for call in calls::COMMON.iter().chain(own) {
                let is_free = call.arguments.is_empty();
                assert_eq!(*free.entry(call.number).or_insert(is_free), is_free);
            }
        }
    }

    #[test]
    fn filters_compile() {
        for kind in KINDS {
            let program = compile(kind).unwrap();
            assert!(program.len() < 400, "{kind}: {}", program.len());
        }
    }

    /// What nobody may ever need: each of these in a list would be a hole in the jail.
    #[test]
    fn no_list_has_what_makes_programs_processes_sockets_or_mounts() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
            libc::SYS_mount_setattr,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_rt_sigqueueinfo,
            libc::SYS_rt_tgsigqueueinfo,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_send_signal,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_seccomp,
            libc::SYS_open_by_handle_at,
            libc::SYS_memfd_create,
        ];
        for call in [
            calls::COMMON,
            calls::VCPU,
            calls::FILE_SERVER,
            calls::EVENT_LOOP,
        ]
        .concat()
        {
            assert!(!never.contains(&call.number), "{call:?}");
        }
    }
}
