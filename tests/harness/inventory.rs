// SPDX-License-Identifier: Apache-2.0
//! What there is on the host before and after a test: processes, mounts, cgroups, sockets, files, terminals, network
//! links.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Runtime;

/// What there is on the host, a line each.
type Inventory = BTreeSet<String>;

fn take() -> Inventory {
    let mut lines = Inventory::new();
    processes(&mut lines);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    lines.extend(mounts.lines().map(|line| format!("mount {line}")));
    sockets(&mut lines);
    walk("cgroup", Path::new("/sys/fs/cgroup"), true, &mut lines);
    for directory in [Path::new("/run"), Path::new("/dev"), &std::env::temp_dir()] {
        walk("file", directory, false, &mut lines);
    }
    for link in fs::read_dir("/sys/class/net").unwrap() {
        lines.insert(format!("link {}", link.unwrap().path().display()));
    }
    if std::env::var_os("SANDBOX_EMULATED_HOST").is_none() {
        // Others live on this host too. What containers of this test leave has its process id in its name.
        let own = format!("-{}-", std::process::id());
        lines.retain(|line| line.contains(&own));
    }
    lines
}

/// Without kernel threads, and without those that have ended and wait for a busy PID 1.
fn processes(lines: &mut Inventory) {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let command = read("cmdline").replace('\0', " ");
        let stat = read("stat");
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split(' ').collect();
        if let [_, state, parent, ..] = fields.as_slice()
            && *parent != "2"
            && pid != 2
            && !(*state == "Z" && *parent == "1")
        {
            lines.insert(format!("process {pid} {} {command}", read("comm").trim()));
        }
    }
}

/// Those with a path by it, the others by their number.
fn sockets(lines: &mut Inventory) {
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let mut unnamed = 0;
    for line in table.lines().skip(1) {
        match line.split_whitespace().nth(7) {
            Some(path) => drop(lines.insert(format!("socket {path}"))),
            None => unnamed += 1,
        }
    }
    lines.insert(format!("sockets without a path: {unnamed}"));
}

fn walk(kind: &str, directory: &Path, directories_only: bool, lines: &mut Inventory) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory || !directories_only {
            lines.insert(format!("{kind} {}", entry.path().display()));
        }
        if is_directory {
            walk(kind, &entry.path(), directories_only, lines);
        }
    }
}

/// Waits until no process has `text` in its command line: for those that nobody else waits for.
pub fn wait_until_no_process(text: &str) {
    crate::wait_until("the processes end", || {
        let mut lines = Inventory::new();
        processes(&mut lines);
        !lines.iter().any(|line| line.contains(text))
    });
}

/// Holds off the other tests of this program: they would show in the inventory.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something with containers and compares the host before and after.
pub fn leaves_nothing(act: impl FnOnce(&Runtime)) {
    let _alone = alone();
    let runtime = Runtime::new();
    let before = take();
    act(&runtime);
    let after = take();
    let new: Vec<_> = after.difference(&before).collect();
    let gone: Vec<_> = before.difference(&after).collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "new: {new:#?}\ngone: {gone:#?}"
    );
}
