// SPDX-License-Identifier: Apache-2.0
use super::*;

/// Enough of eBPF for [`compile`]. An instruction that a verifier would refuse is a panic.
fn run(program: &[u8], kind: u32, access: u32, major: u32, minor: u32) -> bool {
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0u64; 6];
    let mut reached = vec![false; program.len() / 8];
    let mut at = 0usize;
    loop {
        let instruction = &program[at * 8..at * 8 + 8];
        reached[at] = true;
        let destination = usize::from(instruction[1] & 0xf);
        let source = usize::from(instruction[1] >> 4);
        let offset = i16::from_le_bytes([instruction[2], instruction[3]]);
        let immediate = u32::from_le_bytes(instruction[4..8].try_into().unwrap());
        let extended = i64::from(immediate.cast_signed()).cast_unsigned();
        at += 1;
        let jump = |taken: bool| {
            if taken {
                usize::try_from(offset).unwrap()
            } else {
                0
            }
        };
        match instruction[0] {
            0x61 => {
                assert_eq!(source, 1);
                registers[destination] = u64::from(context[usize::try_from(offset).unwrap() / 4]);
            }
            0xbf => registers[destination] = registers[source],
            0x77 => registers[destination] >>= immediate,
            0x57 => registers[destination] &= extended,
            0xb7 => registers[destination] = extended,
            0x55 => at += jump(registers[destination] != extended),
            0x15 => at += jump(registers[destination] == extended),
            0x95 => return registers[0] != 0,
            other => panic!("opcode {other:#x}"),
        }
    }
}

/// What the rules mean: for each kind of access by itself, the last rule that matches.
fn allowed(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
    [MKNOD, READ, WRITE]
        .into_iter()
        .filter(|bit| access & bit != 0)
        .all(|bit| {
            rules
                .iter()
                .rev()
                .find(|rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|k| k == kind)
                        && rule.major.is_none_or(|n| n == major)
                        && rule.minor.is_none_or(|n| n == minor)
                })
                .is_some_and(|rule| rule.allow)
        })
}

fn rules(text: &str) -> Vec<LinuxDeviceCgroup> {
    serde_json::from_str(text).unwrap()
}

fn compiled(text: &str) -> Option<Vec<u8>> {
    program(&rules(text)).unwrap()
}

#[test]
fn denied_by_default_but_for_the_standard_devices() {
    for text in ["[]", r#"[{"allow": false, "access": "rwm"}]"#] {
        let program = compiled(text).unwrap();
        assert!(run(&program, CHARACTER, READ | WRITE, 1, 3), "null");
        assert!(run(&program, CHARACTER, READ, 136, 7), "pts");
        assert!(run(&program, CHARACTER, MKNOD, 99, 99), "mknod");
        assert!(run(&program, BLOCK, MKNOD, 8, 0), "mknod");
        assert!(!run(&program, CHARACTER, READ, 10, 229), "fuse");
        assert!(!run(&program, BLOCK, READ, 8, 0), "sda");
        assert!(!run(&program, BLOCK, MKNOD | READ, 8, 0), "both");
    }
}

#[test]
fn everything_allowed_needs_no_program() {
    assert_eq!(compiled(r#"[{"allow": true, "access": "rwm"}]"#), None);
    assert_eq!(compiled(r#"[{"allow": true, "type": "a"}]"#), None);
    assert_eq!(
        compiled(r#"[{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]"#),
        None
    );
    assert!(compiled(r#"[{"allow": true, "access": "rw"}]"#).is_some());
    assert!(
        compiled(r#"[{"allow": true}, {"allow": false, "type": "b", "access": "w"}]"#).is_some()
    );
}

#[test]
fn the_last_rule_wins() {
    let program = compiled(
        r#"[{"allow": true, "type": "c", "major": 10, "access": "rwm"},
            {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "w"},
            {"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"}]"#,
    )
    .unwrap();
    assert!(run(&program, CHARACTER, READ, 10, 229));
    assert!(!run(&program, CHARACTER, WRITE, 10, 229));
    assert!(!run(&program, CHARACTER, READ | WRITE, 10, 229));
    assert!(run(&program, CHARACTER, READ | WRITE, 10, 200));
    assert!(run(&program, BLOCK, READ, 8, 16));
    assert!(!run(&program, BLOCK, WRITE, 8, 16));
}

/// All short lists of rules over a small domain, against their meaning.
#[test]
fn exhaustively() {
    let mut candidates = Vec::new();
    for allow in [true, false] {
        for kind in [None, Some(BLOCK), Some(CHARACTER)] {
            for (major, minor) in [
                (None, None),
                (Some(1), None),
                (Some(1), Some(3)),
                (None, Some(3)),
            ] {
                for access in [ALL_ACCESS, READ, READ | WRITE, MKNOD] {
                    candidates.push(Rule {
                        allow,
                        kind,
                        major,
                        minor,
                        access,
                    });
                }
            }
        }
    }
    let check = |rules: &[Rule]| {
        // As `program` does.
        let start = rules.iter().rposition(Rule::catches_all).unwrap_or(0);
        let program = compile(&rules[start..]);
        for kind in [BLOCK, CHARACTER] {
            for access in 1..=7 {
                for (major, minor) in [(1, 3), (1, 4), (2, 3), (2, 4)] {
                    assert_eq!(
                        run(&program, kind, access, major, minor),
                        allowed(rules, kind, access, major, minor),
                        "{rules:?}: {kind} {access} {major}:{minor}"
                    );
                }
            }
        }
    };
    for (index, a) in candidates.iter().enumerate() {
        check(&[*a]);
        for b in &candidates {
            check(&[*a, *b]);
        }
        // A third of the third rules each, to keep it short.
        for b in candidates.iter().skip(index % 7).step_by(7) {
            for c in candidates.iter().skip(index % 5).step_by(5) {
                check(&[*a, *b, *c]);
            }
        }
    }
}

#[test]
fn malformed_rules_are_named() {
    for (text, expected) in [
        (
            r#"[{"allow": true, "type": "p"}]"#,
            "linux.resources.devices[0].type",
        ),
        (
            r#"[{"allow": true, "access": "rx"}]"#,
            "linux.resources.devices[0].access",
        ),
        (
            r#"[{"allow": true}, {"allow": true, "major": -2}]"#,
            "linux.resources.devices[1].major",
        ),
        (
            r#"[{"allow": true, "minor": 1048576}]"#,
            "linux.resources.devices[0].minor",
        ),
    ] {
        let error = program(&rules(text)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let many = vec![rules(r#"[{"allow": true}]"#).remove(0); MAX_RULES + 1];
    assert!(program(&many).is_err());
}

fn devices(text: &str, everything: bool) -> Result<(Vec<Device>, Vec<String>), PlanError> {
    let devices: Vec<LinuxDevice> = serde_json::from_str(text).unwrap();
    let mut warnings = Warnings::default();
    nodes(&devices, everything, &mut warnings).map(|nodes| (nodes, warnings.0))
}

#[test]
fn device_nodes() {
    let text = r#"[
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 438},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 384, "uid": 7, "gid": 8},
        {"path": "/dev/net/tun", "type": "u", "major": 10, "minor": 200, "fileMode": 8630},
        {"path": "/pipe", "type": "p"}
    ]"#;
    let (nodes, warnings) = devices(text, false).unwrap();
    assert!(warnings.is_empty());
    let seen: Vec<_> = nodes
        .iter()
        .map(|node| {
            (
                node.path.as_str(),
                node.kind,
                node.major,
                node.minor,
                node.mode,
                node.uid,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("/dev/fuse", DeviceKind::Character, 10, 229, 0o600, 7),
            ("/dev/net/tun", DeviceKind::Character, 10, 200, 0o666, 0),
            ("/pipe", DeviceKind::Fifo, 0, 0, 0o666, 0),
        ]
    );
}

#[test]
fn devices_that_a_guest_cannot_have() {
    for (text, expected) in [
        (
            r#"[{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]"#,
            "/dev/sda: block device",
        ),
        (
            r#"[{"path": "/dev/dri/card0", "type": "c", "major": 226, "minor": 0}]"#,
            "/dev/dri/card0: character",
        ),
    ] {
        let error = devices(text, false).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains("linux.devices[0]"),
            "{error}"
        );
        // Privileged containers are given all that the host has.
        let (nodes, warnings) = devices(text, true).unwrap();
        assert!(nodes.is_empty());
        assert_eq!(warnings.len(), 1);
    }
    for text in [
        r#"[{"path": "dev/x", "type": "c", "major": 1, "minor": 3}]"#,
        r#"[{"path": "/dev/x", "type": "a"}]"#,
        r#"[{"path": "/dev/x", "type": "c", "major": -1, "minor": 3}]"#,
        r#"[{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 1048576}]"#,
    ] {
        assert!(
            matches!(devices(text, true), Err(PlanError::Invalid { .. })),
            "{text}"
        );
    }
}
