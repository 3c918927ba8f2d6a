// SPDX-License-Identifier: Apache-2.0
//! Lives of containers one after the other, with one beside them that lives all the time: the host is as before, and
//! neither the monitor of the one that stays nor the host gets heavier. `CYCLES` in the environment says how many; the
//! default is what an emulated host with two busy processors does within three minutes, and shows a leak of a
//! descriptor or a file in each cycle, but memory only if it is much.

use std::fs;
use std::process::Stdio;

use harness::inventory::leaves_nothing;
use harness::runtime::wait;
use harness::{Bundle, BundleBuilder, Container, Runtime};

const CYCLES: usize = 12;

/// What a leak of a page in each cycle does not reach, and one of a buffer does.
const GROWTH_KIB: u64 = 16 << 10;

fn sleeper() -> BundleBuilder {
    Bundle::busybox(&["/bin/sleep", "100000"])
}

fn number(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    files: usize,
    /// KiB of the monitor's own memory, the guest's apart.
    monitor: u64,
    /// KiB of the host's kernel that cannot be had back.
    kernel: u64,
}

fn sample(staying: &Container) -> Sample {
    let pid = staying.state()["pid"].as_i64().unwrap();
    Sample {
        files: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        monitor: number(&format!("/proc/{pid}/status"), "RssAnon:"),
        kernel: number("/proc/meminfo", "SUnreclaim:"),
    }
}

#[test]
fn the_host_is_the_same_after_many_lives() {
    let cycles = std::env::var("CYCLES");
    let cycles = cycles.map_or(CYCLES, |text| text.parse().expect("CYCLES"));
    leaves_nothing(|runtime| {
        let staying = runtime.create(sleeper().build());
        staying.start();
        let mut samples = Vec::new();
        for cycle in 0..cycles {
            one_life(runtime);
            staying.exec(&["/bin/true"]).ok();
            samples.push(sample(&staying));
            if cycle % 10 == 0 {
                println!("{cycle}: {:?}", samples.last().unwrap());
            }
        }
        staying.call("delete", &["--force"]).ok();
        // The first third warms up caches.
        let (early, late) = (samples[cycles / 3], samples[cycles - 1]);
        println!("{cycles} cycles: from {early:?} to {late:?}");
        assert_eq!(early.files, late.files, "descriptors of the monitor");
        assert!(
            late.monitor <= early.monitor + GROWTH_KIB,
            "monitor: {early:?} to {late:?}"
        );
        assert!(
            late.kernel <= early.kernel + GROWTH_KIB,
            "kernel: {early:?} to {late:?}"
        );
    });
}

fn one_life(runtime: &Runtime) {
    let container = runtime.create(sleeper().build());
    container.start();
    container.exec(&["/bin/true"]).ok();
    let mut command = runtime.command();
    command.args(["exec", "--detach", container.id(), "/bin/sleep", "1000"]);
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    assert_eq!(wait(quiet.spawn().unwrap()), 0);
    container.call("kill", &["KILL"]).ok();
    container.wait_stopped();
    container.call("delete", &[]).ok();
}
