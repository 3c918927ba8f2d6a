// SPDX-License-Identifier: Apache-2.0
//! Many commands on one container at once, and commands killed half-way. `RACES` and `KILLS` in the environment say how
//! many rounds and how many killed commands.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use harness::inventory::{leaves_nothing, wait_until_no_process};
use harness::runtime::{new_id, wait};
use harness::{Bundle, BundleBuilder, Outcome, Runtime};

const PROCESSES: usize = 32;

fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable);
    text.map_or(default, |text| text.parse().expect("a number"))
}

fn sleeper() -> BundleBuilder {
    Bundle::busybox(&["/bin/sleep", "1000"])
}

/// The outcome of a command whose output nobody else may hold on to: a container does.
fn outcome(mut command: Command, directory: &std::path::Path) -> Outcome {
    let errors = directory.join(format!("stderr-{}", new_id()));
    let file = fs::File::create(&errors).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file);
    let status = wait(command.spawn().unwrap());
    let stderr = fs::read_to_string(&errors).unwrap();
    Outcome {
        status,
        stdout: Vec::new(),
        stderr,
    }
}

/// Runs what `command` makes for each index, all at the same moment.
fn at_once(directory: &std::path::Path, command: impl Fn(usize) -> Command + Sync) -> Vec<Outcome> {
    let barrier = Barrier::new(PROCESSES);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..PROCESSES)
            .map(|index| {
                let (barrier, command) = (&barrier, &command);
                scope.spawn(move || {
                    let command = command(index);
                    barrier.wait();
                    outcome(command, directory)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

fn succeeded(outcomes: &[Outcome]) -> usize {
    outcomes
        .iter()
        .filter(|outcome| outcome.status == 0)
        .count()
}

fn check_failures(outcomes: &[Outcome], expected: &[&str]) {
    for outcome in outcomes.iter().filter(|outcome| outcome.status != 0) {
        let line = outcome.refusal();
        assert!(expected.iter().any(|text| line.contains(text)), "{line}");
    }
}

#[test]
fn one_wins_and_the_others_are_told() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    for _ in 0..number("RACES", 1) {
        leaves_nothing(|runtime| {
            let bundle = sleeper().build();
            let id = new_id();
            let verb = |verb: &'static str, arguments: &'static [&'static str]| {
                let (runtime, id) = (&runtime, &id);
                move |_: usize| {
                    let mut command = runtime.command();
                    command.arg(verb);
                    let force = usize::from(arguments == ["--force"]);
                    command
                        .args(&arguments[..force])
                        .arg(id)
                        .args(&arguments[force..]);
                    command
                }
            };
            let created = at_once(bundle.path(), |_| {
                let mut command = runtime.command();
                command.args(["create", "-b"]).arg(bundle.path()).arg(&id);
                command
            });
            assert_eq!(succeeded(&created), 1, "{created:?}");
            check_failures(&created, &["already exists"]);
            let started = at_once(bundle.path(), verb("start", &[]));
            assert_eq!(succeeded(&started), 1, "{started:?}");
            check_failures(&started, &["already running"]);
            let killed = at_once(bundle.path(), verb("kill", &["KILL"]));
            assert_ne!(succeeded(&killed), 0, "{killed:?}");
            check_failures(&killed, &["not running"]);
            let deleted = at_once(bundle.path(), verb("delete", &["--force"]));
            assert_eq!(succeeded(&deleted), PROCESSES, "{deleted:?}");
            assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
        });
    }
}

#[test]
fn everybody_does_everything() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    for _ in 0..number("RACES", 1) {
        leaves_nothing(|runtime| {
            let bundle = sleeper().build();
            let id = new_id();
            let outcomes = at_once(bundle.path(), |index| {
                let mut command = runtime.command();
                match index % 8 {
                    0..=2 => command.args(["create", "-b"]).arg(bundle.path()).arg(&id),
                    3 => command.args(["start", &id]),
                    4 => command.args(["kill", &id, "KILL"]),
                    5 => command.args(["delete", "--force", &id]),
                    6 => command.args(["delete", &id]),
                    _ => command.args(["exec", &id, "/bin/true"]),
                };
                command
            });
            // Each did it or says in one line why not, and no two had the container at once.
            for outcome in outcomes.iter().filter(|outcome| outcome.status != 0) {
                let line = outcome.stderr.trim_end();
                println!("{} {line}", outcome.status);
                // A creation or an exec whose container is deleted is killed with it.
                assert!([1, 137, 255].contains(&outcome.status), "{outcome:?}");
            }
            runtime.call(&["delete", "--force", &id]).ok();
            wait_until_no_process(&id);
            assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0);
        });
    }
}

/// Kills the command at moments between its start and its end: nothing is left, or what `delete --force` removes.
#[test]
fn a_command_killed_at_random() {
    if !Runtime::new().is_sandbox() {
        return;
    }
    let kills = number("KILLS", 12);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("SEED", u64::from(now.subsec_nanos()));
    println!("SEED={seed}");
    let mut random = seed | 1;
    leaves_nothing(|runtime| {
        let bundle = sleeper().build();
        let start = Instant::now();
        let timed = runtime.create(sleeper().build());
        let whole = start.elapsed();
        drop(timed);
        for round in 0..kills {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let moment = whole.mul_f64((random % 1100) as f64 / 1000.0);
            let id = new_id();
            let mut command = runtime.command();
            command.args(["create", "-b"]).arg(bundle.path()).arg(&id);
            let quiet = command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let mut child = quiet.spawn().unwrap();
            // There is no event to wait for: the moments themselves are what is tried.
            thread::sleep(moment);
            child.kill().unwrap();
            child.wait().unwrap();
            let state = runtime.call(&["state", &id]);
            assert!(
                [0, 1].contains(&state.status),
                "{round} {moment:?}: {state:?}"
            );
            runtime.call(&["delete", "--force", &id]).ok();
            wait_until_no_process(&id);
            let left = fs::read_dir(runtime.root()).unwrap().count();
            assert_eq!(left, 0, "{round} {moment:?}");
        }
        assert!(whole > Duration::ZERO);
    });
}
