// SPDX-License-Identifier: Apache-2.0
//! Stdio of containers made by the real agent.

use std::io::{Read, Write};

use crate::harness::*;
use agent_protocol::{ErrorKind, Request, Stdio, WindowSize};

macro_rules! guest {
    () => {
        match Guest::start() {
            Some(guest) => guest,
            None => return,
        }
    };
}

/// Bytes that are not the same anywhere (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn ten_megabytes_both_ways() {
    let mut guest = guest!();
    let sent = noise(10 << 20);
    let (stdin, listener) = guest.listen();
    let (stdout, out) = guest.collect();
    let (stderr, err) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: Some(stderr),
    };
    guest.create("c", plan("tee /dev/stderr"), stdio).unwrap();
    let mut input = accept(&listener);
    let copy = sent.clone();
    let writer = std::thread::spawn(move || input.write_all(&copy).unwrap());
    guest.start_container("c").unwrap();
    writer.join().unwrap();
    assert_eq!(guest.exited("c", 0), 0);
    assert!(out.join().unwrap() == sent, "stdout differs");
    assert!(err.join().unwrap() == sent, "stderr differs");
}

#[test]
fn output_is_complete_when_the_end_is_told() {
    let mut guest = guest!();
    for (number, process_plan) in [
        (0, plan("head -c 60000 /dev/zero")),
        (0, plan("head -c 5000000 /dev/zero")),
    ] {
        let (stdout, listener) = guest.listen();
        let stdio = Stdio::Streams {
            stdin: None,
            stdout: Some(stdout),
            stderr: None,
        };
        guest.create("c", process_plan, stdio).unwrap();
        let mut output = accept(&listener);
        guest.start_container("c").unwrap();
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() == 60_000 || bytes.len() == 5_000_000);
        assert_eq!(guest.exited("c", number), 0);
        guest.delete("c").unwrap();
    }
}

#[test]
fn a_host_that_does_not_read_holds_up_nobody_else() {
    let mut guest = guest!();
    let (stdout, listener) = guest.listen();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    guest.create("c", plan("yes"), stdio).unwrap();
    guest.start_container("c").unwrap();
    let _unread = accept(&listener);
    let (status, out, _) = guest.run("other", plan("echo hello"));
    assert_eq!((status, out.as_str()), (0, "hello\n"));
    guest.signal("c", 0, libc::SIGKILL).unwrap();
    // Its end is told only when all is passed on, or when it is deleted.
    guest.delete("c").unwrap();
    assert_eq!(guest.exited("c", 0), 137);
}

#[test]
fn a_host_that_hangs_up_breaks_the_pipe() {
    let mut guest = guest!();
    let (stdout, listener) = guest.listen();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    // Not PID 1, which no signal would end.
    guest.create("c", plan("yes; exit $?"), stdio).unwrap();
    guest.start_container("c").unwrap();
    drop(accept(&listener));
    assert_eq!(guest.exited("c", 0), 141);
    guest.delete("c").unwrap();
    // A reader that never reads is told as well.
    let (stdout, listener) = guest.listen();
    let stdio = Stdio::Streams {
        stdin: None,
        stdout: Some(stdout),
        stderr: None,
    };
    guest
        .create(
            "c",
            plan("sleep 0.2; while echo x; do sleep 0.01; done 2>/dev/null; exit 9"),
            stdio,
        )
        .unwrap();
    guest.start_container("c").unwrap();
    drop(accept(&listener));
    // The shell's own echo: SIGPIPE is ignored by PID 1, EPIPE is not.
    assert_eq!(guest.exited("c", 0), 9);
}

#[test]
fn stdin_ends_and_is_refused() {
    let mut guest = guest!();
    let (stdin, listener) = guest.listen();
    let stdio = Stdio::Streams {
        stdin: Some(stdin),
        stdout: None,
        stderr: None,
    };
    guest
        .create("c", plan("exec 0<&-; sleep 1000"), stdio)
        .unwrap();
    let mut input = accept(&listener);
    guest.start_container("c").unwrap();
    // The connection is closed when the container closes its end.
    assert_eq!(input.read(&mut [0; 1]).unwrap(), 0);
    let bytes = [0; 4096];
    let failed = (0..10_000).find_map(|_| input.write(&bytes).err());
    assert!(failed.is_some());
    guest.delete("c").unwrap();
    assert_eq!(guest.exited("c", 0), 137);
    // An end of file reaches the process.
    let (stdin, listener) = guest.listen();
    let (stdout, out) = guest.collect();
    let stdio = Stdio::Streams {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: None,
    };
    guest.create("c", plan("wc -c"), stdio).unwrap();
    let mut input = accept(&listener);
    input.write_all(b"12345").unwrap();
    drop(input);
    guest.start_container("c").unwrap();
    assert_eq!(guest.exited("c", 0), 0);
    assert_eq!(out.join().unwrap(), b"5\n");
}

#[test]
fn terminals() {
    let mut guest = guest!();
    let (port, listener) = guest.listen();
    let mut asked = plan(
        "tty; stty size; ls -la /dev/console | cut -c 1; test -t 0 && test -t 2 && echo all; \
        trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.05; done",
    );
    asked.process.terminal = Some(WindowSize {
        rows: 24,
        columns: 80,
    });
    let error = guest.create("c", asked.clone(), NOTHING).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Plan);
    guest.create("c", asked, Stdio::Terminal { port }).unwrap();
    let mut terminal = accept(&listener);
    guest.start_container("c").unwrap();
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.contains("ready\r\n") {
        assert_eq!(terminal.read(&mut byte).unwrap(), 1, "{seen}");
        seen.push(char::from(byte[0]));
    }
    assert_eq!(seen, "/dev/pts/0\r\n24 80\r\nc\r\nall\r\nready\r\n");
    let size = WindowSize {
        rows: 50,
        columns: 100,
    };
    guest
        .ask(Request::Resize {
            container: "c".into(),
            process: 0,
            size,
        })
        .unwrap();
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "50 100\r\n");
    assert_eq!(guest.exited("c", 0), 3);
    guest.delete("c").unwrap();

    // An exec with one, both ways, and the end of the line.
    guest.sleeper("c");
    let (port, listener) = guest.listen();
    let mut shell = process(&["sh", "-c", "read line; echo got $line; sleep 1000"]);
    shell.terminal = Some(size);
    shell.uid = 1000;
    guest.exec("c", 1, shell, Stdio::Terminal { port }).unwrap();
    let mut terminal = accept(&listener);
    terminal.write_all(b"hello\n").unwrap();
    let mut seen = [0; 18];
    terminal.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello\r\ngot hello\r\n");
    // Hanging up ends the session.
    drop(terminal);
    assert_eq!(guest.exited("c", 1), 129);
    let error = guest
        .ask(Request::Resize {
            container: "c".into(),
            process: 0,
            size,
        })
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::State);
}
