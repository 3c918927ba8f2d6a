// SPDX-License-Identifier: Apache-2.0
//! stdin, stdout and stderr are three streams, exact to the byte, whatever stands at their ends.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use harness::runtime::{finish, wait};
use harness::{Bundle, Runtime};

const MEGABYTE: usize = 1 << 20;
const AMOUNT: usize = 100 * MEGABYTE;

/// Bytes that no terminal or line handling would leave alone, different at each position.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Runs `cat` with `input` on stdin; reads its stdout slowly for the first part if asked to.
fn cat(input: Vec<u8>, slow: bool) -> Vec<u8> {
    let bundle = Bundle::busybox(&["/bin/cat"]).build();
    let runtime = Runtime::new();
    let mut command = runtime.run_command(&bundle);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let mut stdout = child.stdout.take().unwrap();
    let mut output = Vec::new();
    if slow {
        let mut piece = [0; 1000];
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(50));
            let count = stdout.read(&mut piece).unwrap();
            output.extend_from_slice(&piece[..count]);
        }
    }
    stdout.read_to_end(&mut output).unwrap();
    writer.join().unwrap();
    assert_eq!(wait(child), 0);
    output
}

#[test]
fn a_hundred_megabytes_in_and_out() {
    let input = pattern(AMOUNT);
    assert!(cat(input.clone(), false) == input, "every byte the same");
}

#[test]
fn a_slow_reader_gets_everything() {
    let input = pattern(2 * MEGABYTE);
    assert!(cat(input.clone(), true) == input, "every byte the same");
}

#[test]
fn streams_are_separate() {
    let script = "echo out; echo error >&2; echo out; echo error >&2";
    let outcome = Runtime::new().run(&Bundle::script(script).build());
    assert_eq!(outcome.ok(), "out\nout");
    assert_eq!(outcome.stderr, "error\nerror\n");
}

#[test]
fn stdin_at_its_end_is_seen() {
    let outcome = Runtime::new().run(&Bundle::script("cat; wc -c; echo end").build());
    assert_eq!(outcome.ok(), "0\nend");
}

#[test]
fn a_closed_reader_ends_the_writer() {
    let runtime = Runtime::new();
    let bundle = Bundle::busybox(&["/bin/yes"]).build();
    let mut child = runtime
        .run_command(&bundle)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    drop(stdout);
    let status = wait(child);
    // SIGPIPE, or the write error that busybox reports when pid 1 ignores the signal.
    assert!(status == 141 || status == 1, "status {status}");
}

#[test]
fn output_goes_to_a_file_at_its_offset() {
    let runtime = Runtime::new();
    let bundle = Bundle::script("echo second; echo third").build();
    let path = bundle.path().join("log");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(b"first\n").unwrap();
    let mut command = runtime.run_command(&bundle);
    let child = command
        .stdout(OwnedFd::from(file.try_clone().unwrap()))
        .spawn()
        .unwrap();
    assert_eq!(wait(child), 0);
    file.write_all(b"fourth\n").unwrap();
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        "first\nsecond\nthird\nfourth\n"
    );
}

#[test]
fn the_last_bytes_before_the_exit_arrive() {
    let script = format!("head -c {} /dev/zero; exit 3", 5 * MEGABYTE);
    let outcome = Runtime::new().run(&Bundle::script(&script).build());
    assert_eq!((outcome.status, outcome.stdout.len()), (3, 5 * MEGABYTE));
}

#[test]
fn dev_stdout_can_be_opened() {
    let script = "echo one > /dev/stdout; echo two > /dev/stderr; cat /dev/stdin";
    let runtime = Runtime::new();
    let outcome = finish(runtime.run_command(&Bundle::script(script).build()));
    assert_eq!(outcome.ok(), "one");
    assert_eq!(outcome.stderr, "two\n");
}
