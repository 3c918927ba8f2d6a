// SPDX-License-Identifier: Apache-2.0
//! `linux.devices`, and the rules of `linux.resources.devices` as an eBPF program.
//!
//! A guest has devices of its own: the ones that every Linux has. Nodes of the host's hardware mean
//! nothing there.

use agent_protocol::{Device, DeviceKind};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{PlanError, Warnings, invalid, unsupported};

/// linux/bpf.h: BPF_DEVCG_DEV_*, BPF_DEVCG_ACC_*.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL_ACCESS: u32 = MKNOD | READ | WRITE;

/// Rules are unrolled into a program. With a thousand the verifier gives up on it (Linux 6.18), engines
/// send some dozens.
const MAX_RULES: usize = 256;
/// Each device is a message's part and a mknod(2).
const MAX_DEVICES: usize = 4096;

/// Character devices that the guest kernel has: major, and minor or any.
const GUEST_DEVICES: [(u32, Option<u32>); 6] = [
    (1, None),       // null, zero, full, random, urandom, kmsg, …
    (5, None),       // tty, console, ptmx
    (136, None),     // pts
    (10, Some(200)), // net/tun
    (10, Some(229)), // fuse
    (10, Some(237)), // loop-control
];

/// Nodes that the agent makes in every container.
const STANDARD: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The node of a standard device, if the guest has it at that path too.
pub fn guest_path(major: u32, minor: u32) -> Option<&'static str> {
    Some(match (major, minor) {
        (1, 3) => "/dev/null",
        (1, 5) => "/dev/zero",
        (1, 7) => "/dev/full",
        (1, 8) => "/dev/random",
        (1, 9) => "/dev/urandom",
        (1, 11) => "/dev/kmsg",
        (5, 0) => "/dev/tty",
        (10, 200) => "/dev/net/tun",
        (10, 229) => "/dev/fuse",
        _ => return None,
    })
}

/// `linux.devices`. With every device allowed, which is how engines say `--privileged`, the list is
/// all that the host has: what a guest cannot have is left out then.
pub fn nodes(
    devices: &[LinuxDevice],
    everything_allowed: bool,
    warnings: &mut Warnings,
) -> Result<Vec<Device>, PlanError> {
    if devices.len() > MAX_DEVICES {
        return Err(invalid("linux.devices", format!("more than {MAX_DEVICES}")));
    }
    let mut nodes = Vec::new();
    let mut left_out = 0;
    for (index, device) in devices.iter().enumerate() {
        let field = format!("linux.devices[{index}]");
        match node(&field, device) {
            Ok(Some(node)) => nodes.push(node),
            Ok(None) => {}
            Err(PlanError::Unsupported { .. }) if everything_allowed => left_out += 1,
            Err(error) => return Err(error),
        }
    }
    if left_out > 0 {
        warnings.ignored(
            "linux.devices",
            format!("{left_out} devices of the host that a guest cannot have"),
        );
    }
    Ok(nodes)
}

/// None: the agent makes it anyway.
fn node(field: &str, device: &LinuxDevice) -> Result<Option<Device>, PlanError> {
    let path = device.path().to_string_lossy().into_owned();
    if !path.starts_with('/') {
        return Err(invalid(
            format!("{field}.path"),
            format!("{path:?} is not absolute"),
        ));
    }
    let number = |name: &str, number: i64| {
        u32::try_from(number)
            .ok()
            .filter(|number| *number < 1 << 20)
            .ok_or_else(|| {
                invalid(
                    format!("{field}.{name}"),
                    format!("{number} is not a device number"),
                )
            })
    };
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => DeviceKind::Character,
        LinuxDeviceType::P => DeviceKind::Fifo,
        LinuxDeviceType::B => {
            return Err(unsupported(
                field,
                format!("{path}: block devices of the host cannot be given to a guest"),
            ));
        }
        LinuxDeviceType::A => {
            return Err(invalid(format!("{field}.type"), "must be c, u, p or b"));
        }
    };
    let (major, minor) = match kind {
        DeviceKind::Fifo => (0, 0),
        _ => (
            number("major", device.major())?,
            number("minor", device.minor())?,
        ),
    };
    if STANDARD.contains(&(path.as_str(), major, minor)) {
        return Ok(None);
    }
    let known = GUEST_DEVICES
        .iter()
        .any(|(known, any)| *known == major && any.is_none_or(|known| known == minor));
    if kind == DeviceKind::Character && !known {
        return Err(unsupported(
            field,
            format!(
                "{path}: character device {major}:{minor} of the host cannot be given to a guest"
            ),
        ));
    }
    // As in runc: the type of the file, which Docker sends along, is left to `type`.
    let mode = device.file_mode().unwrap_or(0o666) & !libc::S_IFMT;
    if mode > 0o7777 {
        return Err(invalid(
            format!("{field}.fileMode"),
            format!("{mode:#o} has more than permission bits"),
        ));
    }
    Ok(Some(Device {
        path,
        kind,
        major,
        minor,
        mode,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    }))
}

/// One rule. None stands for any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    const fn allow(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
        Rule {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }

    fn catches_all(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == ALL_ACCESS
    }
}

/// What every container may do, whatever the configuration says: runc appends the same.
const DEFAULT_RULES: [Rule; 10] = [
    Rule::allow(CHARACTER, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHARACTER, Some(1), Some(3), ALL_ACCESS),
    Rule::allow(CHARACTER, Some(1), Some(8), ALL_ACCESS),
    Rule::allow(CHARACTER, Some(1), Some(7), ALL_ACCESS),
    Rule::allow(CHARACTER, Some(5), Some(0), ALL_ACCESS),
    Rule::allow(CHARACTER, Some(1), Some(5), ALL_ACCESS),
    Rule::allow(CHARACTER, Some(1), Some(9), ALL_ACCESS),
    Rule::allow(CHARACTER, Some(136), None, ALL_ACCESS),
    Rule::allow(CHARACTER, Some(5), Some(2), ALL_ACCESS),
];

fn rule(field: &str, rule: &LinuxDeviceCgroup) -> Result<Rule, PlanError> {
    let number = |name: &str, number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .ok()
            .filter(|number| *number < 1 << 20)
            .map(Some)
            .ok_or_else(|| {
                invalid(
                    format!("{field}.{name}"),
                    format!("{number} is not a device number"),
                )
            }),
    };
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C) => Some(CHARACTER),
        Some(LinuxDeviceType::U | LinuxDeviceType::P) => {
            return Err(invalid(format!("{field}.type"), "must be a, b or c"));
        }
    };
    let access = match rule.access().as_deref() {
        None | Some("") => ALL_ACCESS,
        Some(letters) => letters.chars().try_fold(0, |access, letter| match letter {
            'r' => Ok(access | READ),
            'w' => Ok(access | WRITE),
            'm' => Ok(access | MKNOD),
            _ => Err(invalid(
                format!("{field}.access"),
                format!("{letters:?} has other letters than rwm"),
            )),
        })?,
    };
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number("major", rule.major())?,
        minor: number("minor", rule.minor())?,
        access,
    })
}

/// The rules, compiled. None: everything is allowed, no program is needed.
pub fn program(rules: &[LinuxDeviceCgroup]) -> Result<Option<Vec<u8>>, PlanError> {
    if rules.len() > MAX_RULES {
        return Err(invalid(
            "linux.resources.devices",
            format!("more than {MAX_RULES} rules"),
        ));
    }
    let mut all = Vec::with_capacity(rules.len() + DEFAULT_RULES.len());
    for (index, device) in rules.iter().enumerate() {
        all.push(rule(&format!("linux.resources.devices[{index}]"), device)?);
    }
    all.extend(DEFAULT_RULES);
    // What comes before a rule for everything never counts.
    let start = all.iter().rposition(Rule::catches_all).unwrap_or(0);
    let effective = &all[start..];
    if effective.first().is_some_and(Rule::catches_all) && effective.iter().all(|rule| rule.allow) {
        return Ok(None);
    }
    Ok(Some(compile(effective)))
}

/// The last rule that matches decides, for each kind of access by itself. So the rules are tried from
/// the last to the first: an allowing one takes its kinds off those still asked for, and nothing left
/// means yes; a denying one that meets a kind still asked for means no, as does the end.
fn compile(rules: &[Rule]) -> Vec<u8> {
    let mut program = Program::default();
    // struct bpf_cgroup_dev_ctx: access_type (access << 16 | type), major, minor.
    program.load(TYPE, CONTEXT, 0);
    program.copy(ACCESS, TYPE);
    program.shift_right(ACCESS, 16);
    program.and(TYPE, 0xffff);
    program.load(MAJOR, CONTEXT, 4);
    program.load(MINOR, CONTEXT, 8);
    for rule in rules.iter().rev() {
        if rule.catches_all() {
            // Nothing may follow: the verifier refuses code that cannot be reached.
            program.leave(u32::from(rule.allow));
            return program.0;
        }
        let tests = [(TYPE, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        let tests: Vec<(u8, u32)> = tests
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        // Length of what follows the tests below.
        let body: i16 = 4 + i16::from(!rule.allow);
        for (test, left) in tests.iter().zip((0..tests.len()).rev()) {
            // At most two tests follow.
            let skip = body + i16::try_from(left).unwrap_or(0);
            program.jump_unless_equal(test.0, test.1, skip);
        }
        if rule.allow {
            program.and(ACCESS, ALL_ACCESS & !rule.access);
            program.jump_unless_equal(ACCESS, 0, 2);
            program.leave(1);
        } else {
            program.copy(RESULT, ACCESS);
            program.and(RESULT, rule.access);
            program.jump_if_equal(RESULT, 0, 2);
            program.leave(0);
        }
    }
    program.leave(0);
    program.0
}

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// eBPF: struct bpf_insn is opcode, registers (source in the high half), offset, immediate.
#[derive(Default)]
struct Program(Vec<u8>);

impl Program {
    fn push(&mut self, opcode: u8, destination: u8, source: u8, offset: i16, immediate: u32) {
        self.0.extend([opcode, source << 4 | destination]);
        self.0.extend(offset.to_le_bytes());
        self.0.extend(immediate.to_le_bytes());
    }

    /// BPF_LDX | BPF_MEM | BPF_W
    fn load(&mut self, register: u8, address: u8, offset: i16) {
        self.push(0x61, register, address, offset, 0);
    }

    /// BPF_ALU64 | BPF_MOV | BPF_X
    fn copy(&mut self, to: u8, from: u8) {
        self.push(0xbf, to, from, 0, 0);
    }

    /// BPF_ALU64 | BPF_RSH | BPF_K
    fn shift_right(&mut self, register: u8, bits: u32) {
        self.push(0x77, register, 0, 0, bits);
    }

    /// BPF_ALU64 | BPF_AND | BPF_K
    fn and(&mut self, register: u8, mask: u32) {
        self.push(0x57, register, 0, 0, mask);
    }

    /// BPF_JMP | BPF_JNE | BPF_K
    fn jump_unless_equal(&mut self, register: u8, value: u32, offset: i16) {
        self.push(0x55, register, 0, offset, value);
    }

    /// BPF_JMP | BPF_JEQ | BPF_K
    fn jump_if_equal(&mut self, register: u8, value: u32, offset: i16) {
        self.push(0x15, register, 0, offset, value);
    }

    /// BPF_ALU64 | BPF_MOV | BPF_K, BPF_JMP | BPF_EXIT
    fn leave(&mut self, result: u32) {
        self.push(0xb7, RESULT, 0, 0, result);
        self.push(0x95, 0, 0, 0, 0);
    }
}

#[cfg(test)]
mod tests;
