// SPDX-License-Identifier: Apache-2.0
//! Fork: running copies of a running container, each on its own from there.

use std::fs;
use std::process::Stdio;

use harness::runtime::{new_id, wait};
use harness::{Bundle, Runtime, wait_until};

/// A thread that answers, a database that is written to, a file; all below `DIRECTORY`.
const BUSY: &str = r#"
import os, socket, sqlite3, sys, threading, time

count = 0
listener = socket.socket()
listener.bind(("127.0.0.1", 8080))
listener.listen()
def serve():
    while True:
        connection, _ = listener.accept()
        connection.sendall(str(count).encode())
        connection.close()
threading.Thread(target=serve, daemon=True).start()

os.mkdir("DIRECTORY")
log = open("DIRECTORY/log", "w")
database = sqlite3.connect("DIRECTORY/db")
database.execute("create table counts (number integer)")
monotonic = time.monotonic()
while True:
    count += 1
    database.execute("insert into counts values (?)", (count,))
    database.commit()
    log.write(f"{count}\n")
    log.flush()
    assert time.monotonic() >= monotonic, "time went back"
    monotonic = time.monotonic()
    time.sleep(0.05)
"#;

/// What is asked of a copy: that it counts and has lost nothing, and what tells it from others.
const QUESTION: &str = r#"
import os, socket, sqlite3, time
def ask():
    return int(socket.create_connection(("127.0.0.1", 8080)).recv(99).decode())
first = ask()
while ask() < first + 3:
    time.sleep(0.02)
database = sqlite3.connect("DIRECTORY/db", timeout=60)
rows, highest = database.execute("select count(*), max(number) from counts").fetchone()
assert rows == highest, (rows, highest)
assert database.execute("pragma integrity_check").fetchone() == ("ok",)
lines = [int(line) for line in open("DIRECTORY/log")]
assert lines == list(range(1, len(lines) + 1)), lines
open("DIRECTORY/mine", "x").write("mine")
port = socket.socket()
port.bind(("127.0.0.1", 0))
read = lambda path: open(path).read().strip()
print(rows, os.urandom(16).hex(), read("/proc/sys/kernel/random/uuid"),
      read("/proc/sys/kernel/random/boot_id"), port.getsockname()[1], int(time.time()))
"#;

#[test]
fn five_copies_go_on_and_nothing_is_shared() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let directory = format!("/var/tmp/fork-{}", std::process::id());
    let program = |text: &str| text.replace("DIRECTORY", &directory);
    let bundle = Bundle::python(&program(BUSY))
        .set("/root/readonly", false)
        .build();
    let container = runtime.create(bundle);
    let on_host = container.bundle().rootfs().join(&directory[1..]);
    container.start();
    let counted = || fs::read_to_string(on_host.join("log")).map_or(0, |log| log.lines().count());
    wait_until("it counts", || counted() > 3);

    let new = new_id();
    let mut command = runtime.command();
    command
        .args(["fork", "-n", "5", container.id(), &new])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let before = counted();
    assert_eq!(wait(command.spawn().unwrap()), 0);
    assert_eq!(container.status(), "running");
    wait_until("the original goes on", || counted() > before + 10);
    let mut seen = Vec::new();
    for copy in 1..=5 {
        let id = format!("{new}-{copy}");
        let question = program(QUESTION);
        let answer = runtime.call(&["exec", &id, "/usr/bin/python3", "-c", &question]);
        let fields: Vec<String> = answer.ok().split(' ').map(str::to_owned).collect();
        let rows: usize = fields[0].parse().unwrap();
        assert!(rows > before, "{rows} of {before}");
        for value in &fields[1..5] {
            assert!(!seen.contains(value), "{value} again");
            seen.push(value.clone());
        }
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let clock: u64 = fields[5].parse().unwrap();
        assert!(now.as_secs().abs_diff(clock) < 15, "{clock}");
        assert!(!on_host.join("mine").exists(), "copies write elsewhere");
    }
    let again = runtime.call(&["fork", &format!("{new}-1"), "another"]);
    assert!(again.refusal().contains("not supported"), "{again:?}");
    let saved = runtime.call(&["checkpoint", &format!("{new}-1")]);
    assert!(saved.refusal().contains("not supported"), "{saved:?}");
    container.call("kill", &["KILL"]).ok();
    container.wait_stopped();
    for copy in 1..=5 {
        let id = format!("{new}-{copy}");
        runtime.call(&["delete", "--force", &id]).ok();
        assert!(!runtime.root().join(&id).exists(), "nothing is left");
    }
    let numbers: Vec<usize> = fs::read_to_string(on_host.join("log"))
        .unwrap()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());
    fs::remove_dir_all(&on_host).unwrap();
}

#[test]
fn what_cannot_be_copied_is_refused_and_the_original_runs_on() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let container = runtime.create(Bundle::script("while :; do echo x; sleep 0.05; done").build());
    let created = runtime.call(&["fork", container.id(), "copy"]);
    assert!(
        created.refusal().contains("in created state"),
        "{created:?}"
    );
    container.start();
    wait_until("it runs", || container.stdout().lines().count() > 2);
    let same = runtime.call(&["fork", container.id(), container.id()]);
    assert!(same.refusal().contains("already exists"), "{same:?}");
    let lines = container.stdout().lines().count();
    wait_until("it runs on", || {
        container.stdout().lines().count() > lines + 3
    });
    assert_eq!(container.status(), "running");
    let none = runtime.call(&["fork", "nosuch", "copy"]);
    assert!(none.refusal().contains("does not exist"), "{none:?}");
}
