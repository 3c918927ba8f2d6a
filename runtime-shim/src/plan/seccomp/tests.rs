// SPDX-License-Identifier: Apache-2.0
use serde_json::{Value, json};

use super::*;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const KILL_THREAD: u32 = 0;
const KILL_PROCESS: u32 = 0x8000_0000;
const X86_64: u32 = AUDIT_ARCH_X86_64;
const I386: u32 = AUDIT_ARCH_I386;

/// Enough of classic BPF for what libseccomp writes.
fn run(program: &[u8], arch: u32, number: u32, arguments: &[u64]) -> u32 {
    let mut data = [0u8; 64];
    data[0..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (index, argument) in arguments.iter().enumerate() {
        data[16 + index * 8..24 + index * 8].copy_from_slice(&argument.to_le_bytes());
    }
    let (mut accumulator, mut at) = (0u32, 0usize);
    loop {
        let instruction = &program[at * 8..at * 8 + 8];
        let code = u16::from_le_bytes([instruction[0], instruction[1]]);
        let k = u32::from_le_bytes(instruction[4..8].try_into().unwrap());
        let jump = |taken: bool| {
            usize::from(if taken {
                instruction[2]
            } else {
                instruction[3]
            })
        };
        at += 1;
        match code {
            0x20 => {
                let offset = k as usize;
                accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x45 => at += jump(accumulator & k != 0),
            0x06 => return k,
            other => panic!("opcode {other:#x}"),
        }
    }
}

fn plan(profile: Value) -> Result<Option<Seccomp>, PlanError> {
    filter(&serde_json::from_value(profile).unwrap())
}

fn program(profile: Value) -> Vec<u8> {
    plan(profile).unwrap().unwrap().program
}

fn number(name: &str) -> u32 {
    u32::try_from(i32::from(ScmpSyscall::from_name(name).unwrap())).unwrap()
}

fn number_i386(name: &str) -> u32 {
    let syscall = ScmpSyscall::from_name_by_arch(name, ScmpArch::X86).unwrap();
    u32::try_from(i32::from(syscall)).unwrap()
}

#[test]
fn a_list_of_allowed_calls() {
    let program = program(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],
        "syscalls": [
            {"names": ["read", "write", "close_range", "not_a_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["ptrace"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["mount"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    }));
    assert_eq!(run(&program, X86_64, number("read"), &[]), ALLOW);
    assert_eq!(run(&program, X86_64, number("ptrace"), &[]), ERRNO | 38);
    assert_eq!(run(&program, X86_64, number("mount"), &[]), KILL_PROCESS);
    assert_eq!(run(&program, X86_64, number("reboot"), &[]), ERRNO | 1);
    assert_eq!(run(&program, I386, number_i386("write"), &[]), ALLOW);
    assert_eq!(run(&program, I386, number_i386("reboot"), &[]), ERRNO | 1);
    // x32 comes under the number of x86-64's architecture.
    assert_eq!(run(&program, X86_64, X32_BIT | number("read"), &[]), ALLOW);
    assert_eq!(run(&program, X86_64, X32_BIT | 500, &[]), ERRNO | 1);
    // Newer than anything that the profile knows.
    assert_eq!(run(&program, X86_64, 999, &[]), ERRNO | 38);
    assert_eq!(run(&program, I386, 999, &[]), ERRNO | 38);
    // Foreign architectures end the thread.
    assert_eq!(run(&program, 0xc000_00b7, 0, &[]), KILL_THREAD);
}

#[test]
fn a_list_of_refused_calls() {
    let program = program(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}],
    }));
    assert_eq!(run(&program, X86_64, number("reboot"), &[]), ERRNO | 1);
    assert_eq!(run(&program, X86_64, number("read"), &[]), ALLOW);
    assert_eq!(run(&program, X86_64, 999, &[]), ALLOW);
}

#[test]
fn all_comparisons() {
    // clone3 allowed or not by the first argument.
    for (operator, value, two, yes, no) in [
        ("SCMP_CMP_EQ", 5u64, 0u64, vec![5], vec![4, 6, 5 | 1 << 32]),
        ("SCMP_CMP_NE", 5, 0, vec![4, 6], vec![5]),
        ("SCMP_CMP_LT", 5, 0, vec![0, 4], vec![5, 6]),
        ("SCMP_CMP_LE", 5, 0, vec![4, 5], vec![6]),
        ("SCMP_CMP_GE", 5, 0, vec![5, 6, 1 << 40], vec![4]),
        ("SCMP_CMP_GT", 5, 0, vec![6], vec![5, 4]),
        (
            "SCMP_CMP_MASKED_EQ",
            0x7e02_0000,
            0,
            vec![0, 1],
            vec![0x0002_0000, 0x4000_0000],
        ),
    ] {
        let program = program(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 1, "value": value, "valueTwo": two, "op": operator}],
            }],
        }));
        for argument in yes {
            assert_eq!(
                run(&program, X86_64, number("clone"), &[9, argument]),
                ALLOW,
                "{operator} {argument}"
            );
        }
        for argument in no {
            assert_eq!(
                run(&program, X86_64, number("clone"), &[9, argument]),
                ERRNO | 1,
                "{operator} {argument}"
            );
        }
    }
}

#[test]
fn several_conditions() {
    let args = |first: u32, second: u32| {
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{
                "names": ["socket"],
                "action": "SCMP_ACT_ALLOW",
                "args": [
                    {"index": first, "value": 1, "op": "SCMP_CMP_EQ"},
                    {"index": second, "value": 2, "op": "SCMP_CMP_EQ"},
                ],
            }],
        })
    };
    // Of different arguments all have to hold, of the same one is enough.
    let both = program(args(0, 1));
    assert_eq!(run(&both, X86_64, number("socket"), &[1, 2]), ALLOW);
    assert_eq!(run(&both, X86_64, number("socket"), &[1, 1]), ERRNO | 1);
    let either = program(args(0, 0));
    assert_eq!(run(&either, X86_64, number("socket"), &[1]), ALLOW);
    assert_eq!(run(&either, X86_64, number("socket"), &[2]), ALLOW);
    assert_eq!(run(&either, X86_64, number("socket"), &[3]), ERRNO | 1);
}

#[test]
fn flags_as_in_runc() {
    let flags = |flags: Value| {
        let mut profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_LOG"}],
        });
        if !flags.is_null() {
            profile["flags"] = flags;
        }
        plan(profile).unwrap().unwrap().flags
    };
    assert_eq!(flags(Value::Null), FLAG_SPEC_ALLOW);
    assert_eq!(flags(json!([])), 0);
    assert_eq!(
        flags(json!([
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_TSYNC"
        ])),
        FLAG_LOG | FLAG_TSYNC
    );
}

#[test]
fn no_filter_for_a_profile_that_allows_everything() {
    assert_eq!(plan(json!({"defaultAction": "SCMP_ACT_ALLOW"})), Ok(None));
}

#[test]
fn refusals_name_the_field() {
    let many: Vec<Value> = (0..MAX_RULES + 1)
        .map(|_| json!({"names": ["read"], "action": "SCMP_ACT_ALLOW"}))
        .collect();
    for (profile, expected) in [
        (
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "linux.seccomp.defaultAction: not supported",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW",
                   "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}),
            "linux.seccomp.syscalls[0]: not supported",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock"}),
            "linux.seccomp.listenerPath: not supported",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}),
            "linux.seccomp.listenerMetadata: ",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
            "linux.seccomp.defaultAction: SCMP_ACT_ALLOW takes no errnoRet",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 65536}),
            "linux.seccomp.defaultAction: errnoRet 65536",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO",
                   "syscalls": [{"names": [], "action": "SCMP_ACT_ALLOW"}]}),
            "linux.seccomp.syscalls[0].names: must not be empty",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO",
                   "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                                 "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}),
            "linux.seccomp.syscalls[0].args: there is no argument 6",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": many}),
            "linux.seccomp.syscalls: more than",
        ),
    ] {
        let error = plan(profile).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
