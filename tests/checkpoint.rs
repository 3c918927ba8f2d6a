// SPDX-License-Identifier: Apache-2.0
//! Checkpoint and restore: whatever runs in a container goes on where it was, in another VM.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use harness::{Bundle, Container, Runtime, wait_until};

/// The last complete line, which is a number.
fn last(container: &Container<'_>) -> u64 {
    let output = container.stdout();
    let Some((lines, _)) = output.rsplit_once('\n') else {
        return 0;
    };
    let line = lines.lines().next_back().unwrap_or_default();
    line.parse().unwrap_or_else(|_| panic!("{output:?}"))
}

fn first(container: &Container<'_>) -> u64 {
    wait_until("it counts", || container.stdout().contains('\n'));
    container.stdout().lines().next().unwrap().parse().unwrap()
}

fn image(container: &Container<'_>) -> PathBuf {
    container.bundle().path().join("image")
}

fn checkpoint(container: &Container<'_>, image: &Path, options: &[&str]) -> harness::Outcome {
    let mut arguments = vec!["--image-path", image.to_str().unwrap()];
    arguments.extend(options);
    arguments.push(container.id());
    let mut all = vec!["checkpoint"];
    all.extend(arguments);
    container.runtime().call(&all)
}

const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";

#[test]
fn a_counter_goes_on_where_it_was() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let container = runtime.create(Bundle::script(COUNT).build());
    let image = image(&container);
    let early = checkpoint(&container, &image, &[]);
    assert_eq!(
        early.refusal().split(": ").last().unwrap_or_default(),
        "Container cannot be checkpointed in created state"
    );
    container.start();
    wait_until("it counts", || last(&container) > 3);
    checkpoint(&container, &image, &["--leave-running"]).ok();
    assert_eq!(container.status(), "running");
    let saved = last(&container);
    wait_until("it still counts", || last(&container) > saved + 3);
    assert!(container.exec(&["/bin/true"]).status == 0);

    let clone = runtime.restore(&container, &image).unwrap();
    assert_eq!(clone.status(), "running");
    let from = first(&clone);
    assert!(from <= saved + 1 && from > 3, "{from}, {saved} when saved");
    wait_until("the clone counts", || last(&clone) > from + 3);
    assert_eq!(clone.exec(&["/bin/echo", "in"]).ok(), "in");

    checkpoint(&clone, &image, &[]).ok();
    let gone = runtime.call(&["state", clone.id()]);
    assert!(gone.refusal().contains("does not exist"), "{gone:?}");
    let saved = last(&clone);
    let again = runtime.restore(&container, &image).unwrap();
    assert!(first(&again) <= saved + 1);
    again.call("kill", &["KILL"]).ok();
    again.wait_stopped();
}

/// Threads, a timer, a listening socket, open and deleted files, a database: each has to go on.
const BUSY: &str = r#"
import os, signal, socket, sqlite3, sys, tempfile, threading, time

ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

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

log = open("/data/log", "a")
deleted = tempfile.TemporaryFile(dir="/data")
deleted.write(b"still here")
deleted.flush()
database = sqlite3.connect("/data/db")
database.execute("create table counts (number integer)")
monotonic = time.monotonic()
while True:
    count += 1
    database.execute("insert into counts values (?)", (count,))
    database.commit()
    log.write(f"{count}\n")
    log.flush()
    now = time.monotonic()
    assert now >= monotonic, "time went back"
    monotonic = now
    deleted.seek(0)
    kept = deleted.read().decode()
    (rows,) = database.execute("select count(*) from counts").fetchone()
    entropy = os.urandom(8).hex()
    uuid = open("/proc/sys/kernel/random/uuid").read().strip()
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = port.getsockname()[1]
    print(count, ticks, rows, kept.replace(" ", "_"), entropy, uuid, number, time.time(), flush=True)
    time.sleep(0.05)
"#;

/// A line of the program above.
#[derive(Debug, PartialEq)]
struct Line {
    count: u64,
    ticks: u64,
    rows: u64,
    kept: String,
    random: [String; 2],
    port: String,
    time: f64,
}

fn lines(container: &Container<'_>) -> Vec<Line> {
    let output = container.stdout();
    let complete = output.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [count, ticks, rows, kept, entropy, uuid, port, time] = fields.as_slice() else {
            panic!("{line:?}, stderr: {}", container.stderr());
        };
        Line {
            count: count.parse().unwrap(),
            ticks: ticks.parse().unwrap(),
            rows: rows.parse().unwrap(),
            kept: (*kept).to_owned(),
            random: [(*entropy).to_owned(), (*uuid).to_owned()],
            port: (*port).to_owned(),
            time: time.parse().unwrap(),
        }
    };
    complete.lines().map(parse).collect()
}

fn wait_for_lines(container: &Container<'_>, count: usize) -> Vec<Line> {
    wait_until("the program counts", || {
        let log = fs::read_to_string(container.bundle().path().join("log"));
        assert_ne!(
            container.status(),
            "stopped",
            "{}{log:?}",
            container.stderr()
        );
        lines(container).len() >= count
    });
    lines(container)
}

fn ask_count(container: &Container<'_>) -> u64 {
    let client =
        "import socket; print(socket.create_connection(('127.0.0.1', 8080)).recv(99).decode())";
    container
        .exec(&["/usr/bin/python3", "-c", client])
        .ok()
        .parse()
        .unwrap()
}

fn now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

#[test]
fn threads_sockets_timers_files_and_a_database_go_on() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let data = std::env::temp_dir().join(format!("checkpoint-data-{}", std::process::id()));
    fs::create_dir(&data).unwrap();
    let bundle = Bundle::python(BUSY).bind(&data, "/data", &["rw"]).build();
    let container = runtime.create(bundle);
    container.start();
    wait_for_lines(&container, 3);
    let image = image(&container);
    checkpoint(&container, &image, &[]).ok();
    let before = lines(&container).pop().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(3));

    let restored = runtime.restore(&container, &image).unwrap();
    let after = wait_for_lines(&restored, 3);
    assert!(
        (before.count..=before.count + 2).contains(&after[0].count),
        "{before:?}, {after:?}"
    );
    for pair in after.windows(2) {
        assert_eq!(pair[1].count, pair[0].count + 1);
        assert!(pair[1].ticks >= pair[0].ticks);
    }
    for line in &after {
        assert_eq!(line.rows, line.count, "no row is lost");
        assert_eq!(line.kept, "still_here");
    }
    assert!(after[0].ticks >= before.ticks);
    // The last line before the checkpoint may come out after it, with its old time.
    assert!(after[1].time - before.time > 3.0, "{before:?}, {after:?}");
    assert!((now() - lines(&restored).pop().unwrap().time).abs() < 10.0);
    wait_until("the timer ticks", || {
        lines(&restored).pop().unwrap().ticks > after[0].ticks
    });
    assert!(ask_count(&restored) >= after[2].count);
    restored.call("kill", &["KILL"]).ok();
    restored.wait_stopped();
    let log = fs::read_to_string(data.join("log")).unwrap();
    let logged: Vec<u64> = log.lines().map(|line| line.parse().unwrap()).collect();
    let expected: Vec<u64> = (1..=logged.len() as u64).collect();
    assert_eq!(logged, expected, "the log has neither gaps nor repetitions");
    fs::remove_dir_all(&data).unwrap();
}

#[test]
fn two_that_go_on_from_one_checkpoint_share_no_random_byte() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let script = "touch /tmp/up; while [ ! -e /tmp/go ]; do sleep 0.02; done; \
        head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; \
        date +%s; sleep 1000";
    let container = runtime.create(Bundle::script(script).build());
    container.start();
    let rootfs = container.bundle().rootfs().to_owned();
    wait_until("it is up", || rootfs.join("tmp/up").exists());
    let image = image(&container);
    checkpoint(&container, &image, &[]).ok();
    fs::write(rootfs.join("tmp/go"), "").unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let clone = runtime.restore(&container, &image).unwrap();
        wait_until("it goes on", || clone.stdout().lines().count() == 3);
        let lines: Vec<String> = clone.stdout().lines().map(str::to_owned).collect();
        let clock: f64 = lines[2].parse().unwrap();
        assert!((now() - clock).abs() < 15.0, "{clock}");
        for value in &lines[..2] {
            assert!(!seen.contains(value), "{value} again");
            seen.push(value.clone());
        }
    }
}

#[test]
fn what_is_no_checkpoint_of_this_container_is_refused() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let script = format!("exec 3< /etc/group; {COUNT}");
    let container = runtime.create(Bundle::script(&script).build());
    container.start();
    wait_until("it counts", || last(&container) > 1);
    let image = image(&container);
    let unsupported = checkpoint(&container, &image, &["--pre-dump"]);
    assert!(
        unsupported
            .refusal()
            .contains("--pre-dump is not supported")
    );
    let mut session = runtime.command();
    let mut session = session
        .args(["exec", container.id(), "/bin/sleep", "1000"])
        .spawn()
        .unwrap();
    wait_until("the session runs", || {
        container.exec(&["/bin/ps"]).text().contains("sleep 1000")
    });
    let busy = checkpoint(&container, &image, &[]);
    assert!(busy.refusal().contains("exec sessions"), "{busy:?}");
    assert!(!image.join("state").exists(), "nothing is left of it");
    container.exec(&[
        "/bin/sh",
        "-c",
        "kill -9 $(ps | awk '/sleep 100[0]/ {print $1}')",
    ]);
    session.wait().unwrap();
    wait_until("it is saved", || {
        checkpoint(&container, &image, &[]).status == 0
    });

    let refused = |name: &str, change: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let path = image.join(name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        change(&mut bad);
        fs::write(&path, bad).unwrap();
        let outcome = runtime.restore(&container, &image).unwrap_err();
        assert!(
            outcome.refusal().contains(expected),
            "{expected}: {outcome:?}"
        );
        fs::write(&path, good).unwrap();
    };
    refused("state", &|state| state[0] ^= 1, "not a snapshot");
    refused("state", &|state| state[8] += 1, "expected 3");
    refused("state", &|state| state[8] -= 1, "version 2");
    refused("state", &|state| state[500] ^= 1, "damaged");
    refused("state", &|state| state.truncate(3000), "damaged");
    refused("state", &Vec::clear, "not a snapshot");
    // The memory is large and full of holes: only its end is changed.
    let memory = fs::File::options()
        .read(true)
        .write(true)
        .open(image.join("memory"))
        .unwrap();
    let end = memory.metadata().unwrap().len() - 16;
    let mut id = [0; 16];
    memory.read_exact_at(&mut id, end).unwrap();
    memory.set_len(end).unwrap();
    refused("state", &|_| {}, "cut short");
    memory.write_all_at(&[0; 16], end).unwrap();
    refused("state", &|_| {}, "of another snapshot");
    memory.write_all_at(&id, end).unwrap();
    let group = container.bundle().rootfs().join("etc/group");
    fs::rename(&group, group.with_extension("away")).unwrap();
    refused(
        "state",
        &|_| {},
        "rootfs/etc/group: open in the container, but not there",
    );
    fs::rename(group.with_extension("away"), &group).unwrap();
    let missing = runtime.restore(&container, Path::new("/nonexistent"));
    assert!(missing.unwrap_err().refusal().contains("/nonexistent"));
    let restored = runtime.restore(&container, &image).unwrap();
    first(&restored);
}
