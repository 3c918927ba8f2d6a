// SPDX-License-Identifier: Apache-2.0
//! `linux.seccomp`, compiled to the BPF program that the agent loads.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use agent_protocol::Seccomp;
use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::{PlanError, invalid, unsupported};

/// `SECCOMP_FILTER_FLAG_*`, linux/seccomp.h.
const FLAG_TSYNC: u64 = 1 << 0;
const FLAG_LOG: u64 = 1 << 1;
const FLAG_SPEC_ALLOW: u64 = 1 << 2;
const FLAG_WAIT_KILLABLE_RECV: u64 = 1 << 5;

/// System calls have at most this many arguments.
const ARGUMENTS: usize = 6;
/// errno occupies 16 bits of an action.
const MAX_ERRNO: u32 = 0xffff;
/// Bound on what a profile can make libseccomp work on: the largest public profiles have some
/// hundred names in some dozen rules.
const MAX_RULES: usize = 16_384;

/// x86-64's numbers, linux/audit.h. The guest runs no others.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Bit of the system call numbers of x32.
const X32_BIT: u32 = 0x4000_0000;

/// None: the profile allows everything.
pub fn filter(profile: &LinuxSeccomp) -> Result<Option<Seccomp>, PlanError> {
    let default = action(
        "linux.seccomp.defaultAction",
        profile.default_action(),
        profile.default_errno_ret(),
    )?;
    if profile
        .listener_path()
        .as_ref()
        .is_some_and(|path| !path.as_os_str().is_empty())
    {
        return Err(unsupported(
            "linux.seccomp.listenerPath",
            "a guest's system calls cannot be handed to the host",
        ));
    }
    if profile
        .listener_metadata()
        .as_ref()
        .is_some_and(|text| !text.is_empty())
    {
        return Err(invalid(
            "linux.seccomp.listenerMetadata",
            "must not be set without listenerPath",
        ));
    }
    let syscalls = profile.syscalls().as_deref().unwrap_or_default();
    check(syscalls)?;
    let flags = flags(profile);
    if default == ScmpAction::Allow && syscalls.is_empty() {
        return Ok(None);
    }
    let program = compile(profile, default, syscalls)
        .map_err(|error| invalid("linux.seccomp", error.to_string()))?;
    Ok(Some(Seccomp { program, flags }))
}

#[derive(Debug, thiserror::Error)]
enum CompileError {
    #[error("libseccomp: {0}")]
    Library(#[from] SeccompError),
    #[error("rule for {name}: libseccomp: {source}")]
    Rule { name: String, source: SeccompError },
    #[error("program cannot be written: {0}")]
    Export(#[from] io::Error),
}

fn flags(profile: &LinuxSeccomp) -> u64 {
    match profile.flags() {
        // runc's default: also without the flag the guest is no safer, only slower.
        None => FLAG_SPEC_ALLOW,
        Some(flags) => flags.iter().fold(0, |flags, flag| {
            flags
                | match flag {
                    LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
                    LinuxSeccompFilterFlag::SeccompFilterFlagTsync => FLAG_TSYNC,
                    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
                    LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                        FLAG_WAIT_KILLABLE_RECV
                    }
                }
        }),
    }
}

fn action(
    field: &str,
    action: LinuxSeccompAction,
    errno: Option<u32>,
) -> Result<ScmpAction, PlanError> {
    let takes_errno = matches!(
        action,
        LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace
    );
    if errno.is_some() && !takes_errno {
        return Err(invalid(field, format!("{action} takes no errnoRet")));
    }
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    if errno > MAX_ERRNO {
        return Err(invalid(
            field,
            format!("errnoRet {errno} is more than {MAX_ERRNO}"),
        ));
    }
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        // Checked above to have 16 bits.
        LinuxSeccompAction::ScmpActErrno => {
            ScmpAction::Errno(i32::try_from(errno).unwrap_or(libc::EPERM))
        }
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).unwrap_or(1)),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(unsupported(
                field,
                "SCMP_ACT_NOTIFY: a guest's system calls cannot be handed to the host",
            ));
        }
    })
}

fn check(syscalls: &[LinuxSyscall]) -> Result<(), PlanError> {
    let mut rules = 0;
    for (index, rule) in syscalls.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        action(&field, rule.action(), rule.errno_ret())?;
        if rule.names().is_empty() {
            return Err(invalid(format!("{field}.names"), "must not be empty"));
        }
        let arguments = rule.args().as_deref().unwrap_or_default();
        if let Some(argument) = arguments.iter().find(|a| a.index() >= ARGUMENTS) {
            return Err(invalid(
                format!("{field}.args"),
                format!("there is no argument {}", argument.index()),
            ));
        }
        rules += rule.names().len() * arguments.len().max(1);
    }
    if rules > MAX_RULES {
        return Err(invalid(
            "linux.seccomp.syscalls",
            format!("more than {MAX_RULES} rules"),
        ));
    }
    Ok(())
}

fn compile(
    profile: &LinuxSeccomp,
    default: ScmpAction,
    syscalls: &[LinuxSyscall],
) -> Result<Vec<u8>, CompileError> {
    let mut context = ScmpFilterContext::new(default)?;
    // The native architecture is always in. Those that the guest cannot run need no rules.
    for arch in profile.architectures().iter().flatten() {
        match arch {
            Arch::ScmpArchX86 => context.add_arch(ScmpArch::X86)?,
            Arch::ScmpArchX32 => context.add_arch(ScmpArch::X32)?,
            _ => continue,
        };
    }
    for rule in syscalls {
        // Checked before.
        let Ok(action) = action("", rule.action(), rule.errno_ret()) else {
            continue;
        };
        // libseccomp refuses rules that change nothing.
        if action == default {
            continue;
        }
        let conditions: Vec<ScmpArgCompare> = rule.args().iter().flatten().map(condition).collect();
        for name in rule.names() {
            // Profiles name system calls of all architectures and of newer kernels.
            let Ok(syscall) = ScmpSyscall::from_name(name) else {
                continue;
            };
            add(&mut context, action, syscall, rule, &conditions).map_err(|source| {
                CompileError::Rule {
                    name: name.clone(),
                    source,
                }
            })?;
        }
    }
    let program = export(&context)?;
    Ok(match unknown_syscalls(default) {
        true => [newer_syscalls(&context, syscalls), program].concat(),
        false => program,
    })
}

fn add(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    rule: &LinuxSyscall,
    conditions: &[ScmpArgCompare],
) -> Result<(), SeccompError> {
    let mut counts = [0u32; ARGUMENTS];
    for argument in rule.args().iter().flatten() {
        if let Some(count) = counts.get_mut(argument.index()) {
            *count += 1;
        }
    }
    if counts.iter().any(|count| *count > 1) {
        // As in runc: two conditions on the same argument are alternatives.
        for condition in conditions {
            context.add_rule_conditional(action, syscall, &[*condition])?;
        }
    } else {
        context.add_rule_conditional(action, syscall, conditions)?;
    }
    Ok(())
}

fn condition(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let index = u32::try_from(argument.index()).unwrap_or(u32::MAX);
    let (operator, datum) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, argument.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, argument.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, argument.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(argument.value()),
            argument.value_two().unwrap_or(0),
        ),
    };
    ScmpArgCompare::new(index, operator, datum)
}

/// libseccomp 2.5 writes programs to descriptors only.
fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, CompileError> {
    let memory = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(io::Error::from)?;
    context.export_bpf(&memory)?;
    let mut file = File::from(memory);
    file.seek(SeekFrom::Start(0))?;
    let mut program = Vec::new();
    file.read_to_end(&mut program)?;
    Ok(program)
}

/// Whether a system call that a profile does not know would be refused.
fn unknown_syscalls(default: ScmpAction) -> bool {
    !matches!(
        default,
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_)
    )
}

/// As in runc: a program that answers ENOSYS to system calls newer than the newest one that the
/// profile names. C libraries fall back to older calls on that, not on EPERM.
fn newer_syscalls(context: &ScmpFilterContext, syscalls: &[LinuxSyscall]) -> Vec<u8> {
    let newest = |arch: ScmpArch| {
        if !context.is_arch_present(arch).unwrap_or(false) {
            return None;
        }
        syscalls
            .iter()
            .flat_map(LinuxSyscall::names)
            .filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok())
            // Negative numbers stand for calls that the architecture lacks.
            .filter_map(|syscall| u32::try_from(i32::from(syscall)).ok())
            .filter(|number| *number < X32_BIT)
            .max()
    };
    let x86_64 = newest(ScmpArch::X8664);
    let x86 = newest(ScmpArch::X86);
    let mut program = Program::default();
    program.load(OFFSET_ARCH);
    if let Some(newest) = x86_64 {
        // Five instructions of one architecture's part are skipped by the others.
        program.jump(JEQ, AUDIT_ARCH_X86_64, 0, 5);
        program.load(OFFSET_NR);
        program.jump(JGE, X32_BIT, 2, 0);
        program.jump(JGT, newest, 0, 1);
        program.ret(RET_ENOSYS);
        program.load(OFFSET_ARCH);
    }
    if let Some(newest) = x86 {
        program.jump(JEQ, AUDIT_ARCH_I386, 0, 3);
        program.load(OFFSET_NR);
        program.jump(JGT, newest, 0, 1);
        program.ret(RET_ENOSYS);
    }
    program.0
}

/// struct seccomp_data, linux/seccomp.h.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
/// linux/filter.h and linux/bpf_common.h.
const LD_W_ABS: u16 = 0x20;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RET_K: u16 = 0x06;
const RET_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();

/// Classic BPF: struct sock_filter is code, jt, jf, k.
#[derive(Default)]
struct Program(Vec<u8>);

impl Program {
    fn push(&mut self, code: u16, jump_true: u8, jump_false: u8, k: u32) {
        self.0.extend(code.to_le_bytes());
        self.0.extend([jump_true, jump_false]);
        self.0.extend(k.to_le_bytes());
    }

    fn load(&mut self, offset: u32) {
        self.push(LD_W_ABS, 0, 0, offset);
    }

    fn jump(&mut self, code: u16, k: u32, jump_true: u8, jump_false: u8) {
        self.push(code, jump_true, jump_false, k);
    }

    fn ret(&mut self, value: u32) {
        self.push(RET_K, 0, 0, value);
    }
}

#[cfg(test)]
mod tests;
