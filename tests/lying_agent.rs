// SPDX-License-Identifier: Apache-2.0
//! A guest whose agent lies: whatever it says or does not say, each command gets one clear line or does its work, `kill`
//! and `delete` finish without the agent, and nothing is left.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;

use harness::guest::Installation;
use harness::inventory::{leaves_nothing, wait_until_no_process};
use harness::runtime::{finish, new_id};
use harness::{Bundle, Outcome, Runtime};

/// The guest's PID 1: see its source for what it can do.
const AGENT: &str = env!("CARGO_BIN_EXE_lying-agent");

/// For an agent that does not answer. Starts from a template take less, boots in emulated hosts can take more.
const PATIENCE: &str = "15";

fn installation(first: &str) -> Installation {
    let files = [("first", first.as_bytes())];
    Installation::with_program(Path::new(AGENT), &files)
}

fn is_sandbox() -> bool {
    Runtime::new().is_sandbox()
}

fn run(installation: &Installation, root: &Path, when: &str, what: &str) -> (Bundle, Child) {
    let bundle = Bundle::busybox(&[when, what]).build();
    let mut command = installation.command(root, &bundle);
    let child = command
        .env("SANDBOX_BOOT_TIMEOUT_S", PATIENCE)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (bundle, child)
}

/// The one line of a command, fit to be shown.
fn line(what: &str, outcome: &Outcome) -> String {
    let line = outcome.refusal();
    println!("{what}: {}", line.chars().take(300).collect::<String>());
    assert!(!line.contains(char::is_control), "{what}: {line:?}");
    assert!(line.len() < 8192, "{what}: {} bytes", line.len());
    line.to_owned()
}

#[test]
fn lies_before_anything_else() {
    if !is_sandbox() {
        return;
    }
    for (first, expected) in [
        ("version", "version 99"),
        ("huge", "larger than the limit"),
        ("exited", "did not say hello"),
        ("close", "closed its connection"),
    ] {
        let installation = installation(first);
        leaves_nothing(|runtime| {
            let bundle = Bundle::script("true").build();
            let mut command = installation.command(runtime.root(), &bundle);
            command.env("SANDBOX_TEMPLATES", "off");
            let line = line(first, &finish(command));
            assert!(line.contains(expected), "{first}: {line}");
            assert_eq!(fs::read_dir(runtime.root()).unwrap().count(), 0, "{first}");
        });
    }
}

/// One after the other: from the second start on they come from a template.
#[test]
fn lies_of_an_agent_that_began_well() {
    if !is_sandbox() {
        return;
    }
    let installation = installation("");
    leaves_nothing(|runtime| {
        let bundle = Bundle::busybox(&["create", "text"]).build();
        let outcome = finish(installation.command(runtime.root(), &bundle));
        assert!(line("text", &outcome).contains("\\u{1b}[2J"));
    });
    lies_instead_of_a_container(&installation);
    a_sweep_over_the_ports_of_the_host(&installation);
    an_agent_that_breaks_the_rules_loses_its_container(&installation);
    kill_and_delete_do_without_the_agent(&installation);
    answers_that_make_no_sense(&installation);
}

fn lies_instead_of_a_container(installation: &Installation) {
    leaves_nothing(|runtime| {
        let root = runtime.root();
        let outcome =
            |(_bundle, child): (Bundle, Child)| Outcome::from(child.wait_with_output().unwrap());
        for (what, expected) in [
            ("garbage", "nonsense"),
            ("trailing", "nonsense"),
            ("number", "was not asked"),
            ("twice", "was not asked"),
            ("kind", "wrong answer"),
            ("exited", "ended before it was created"),
            ("ready", "started twice"),
        ] {
            let line = line(what, &outcome(run(installation, root, "create", what)));
            assert!(line.contains(expected), "{what}: {line}");
        }
        // These take as long as they may; all at once they take that once.
        let slow = ["silent", "claimed", "drip", "flood"];
        let slow = slow.map(|what| (what, run(installation, root, "create", what)));
        for (what, child) in slow {
            let line = line(what, &outcome(child));
            assert!(line.contains("in time"), "{what}: {line}");
        }
        assert_eq!(fs::read_dir(root).unwrap().count(), 0);
    });
}

/// The ports of the host are those that the host has told the agent, each once.
fn a_sweep_over_the_ports_of_the_host(installation: &Installation) {
    leaves_nothing(|runtime| {
        let (_bundle, child) = run(installation, runtime.root(), "create", "sweep");
        let outcome = Outcome::from(child.wait_with_output().unwrap());
        let line = line("sweep", &outcome);
        let list = |name: &str| {
            let rest = line.split_once(&format!("{name} [")).unwrap().1;
            rest.split_once(']').unwrap().0.to_owned()
        };
        assert_eq!(list("open"), list("granted"), "{line}");
        assert!(line.ends_with("again 0 elsewhere 0"), "{line}");
    });
}

/// A detached container of a lying agent.
struct Liar<'a> {
    installation: &'a Installation,
    root: &'a Path,
    id: String,
    _bundle: Bundle,
}

impl<'a> Liar<'a> {
    fn start(installation: &'a Installation, root: &'a Path, what: &str) -> Liar<'a> {
        let bundle = Bundle::busybox(&["run", what]).build();
        let id = new_id();
        let mut command = installation.program(root);
        command.args(["run", "--detach", "-b"]).arg(bundle.path());
        let output = fs::File::create(bundle.path().join("output")).unwrap();
        command.arg(&id).stdout(output.try_clone().unwrap());
        command.env("SANDBOX_BOOT_TIMEOUT_S", PATIENCE);
        let status = command.stderr(output).status().unwrap();
        let said = fs::read_to_string(bundle.path().join("output")).unwrap();
        assert!(status.success(), "{what}: {status:?}: {said}");
        Liar {
            installation,
            root,
            id,
            _bundle: bundle,
        }
    }

    fn call(&self, verb: &str, arguments: &[&str]) -> Outcome {
        let mut command = self.installation.program(self.root);
        command.arg(verb);
        let options = arguments
            .iter()
            .take_while(|argument| argument.starts_with('-'));
        let options = options.count();
        command.args(&arguments[..options]).arg(&self.id);
        command.args(&arguments[options..]);
        finish(command)
    }

    fn status(&self) -> String {
        let outcome = self.call("state", &[]);
        let state: serde_json::Value = serde_json::from_str(outcome.ok()).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    /// Kills and deletes without any help of the guest. Says how long that took.
    fn end(self, what: &str) {
        let start = Instant::now();
        if self.status() == "running" {
            self.call("kill", &["KILL"]);
        }
        let killed = start.elapsed();
        self.call("delete", &["--force"]).ok();
        println!("{what}: kill {killed:?}, with delete {:?}", start.elapsed());
        wait_until_no_process(&self.id);
        assert_eq!(fs::read_dir(self.root).unwrap().count(), 0, "{what}");
    }
}

fn an_agent_that_breaks_the_rules_loses_its_container(installation: &Installation) {
    leaves_nothing(|runtime| {
        for what in ["garbage", "ready", "close", "number"] {
            let liar = Liar::start(installation, runtime.root(), what);
            harness::wait_until("the container is lost", || liar.status() == "stopped");
            liar.end(what);
        }
    });
}

fn kill_and_delete_do_without_the_agent(installation: &Installation) {
    leaves_nothing(|runtime| {
        for what in ["silent", "deaf", "flood", "claimed"] {
            let liar = Liar::start(installation, runtime.root(), what);
            assert_eq!(liar.status(), "running", "{what}");
            liar.end(what);
        }
    });
}

fn answers_that_make_no_sense(installation: &Installation) {
    leaves_nothing(|runtime| {
        let root = runtime.root();
        let liar = Liar::start(installation, root, "nothing");
        let stats = liar.call("events", &["--stats"]);
        let stats: serde_json::Value = serde_json::from_str(stats.ok()).unwrap();
        assert_eq!(stats["id"], liar.id.as_str());
        let refused = liar.call("exec", &["refuse"]);
        assert_eq!(refused.status, 255, "{refused:?}");
        let text = refused.stderr.trim_end();
        assert!(
            !text.contains(char::is_control) && text.len() < 8192,
            "{text:?}"
        );
        assert_eq!(liar.call("exec", &["unknown"]).status, 5);
        assert_eq!(liar.call("exec", &["early"]).status, 7);
        let paused = liar.call("pause", &[]);
        assert!(line("pause", &paused).contains("in time"));
        line("update", &liar.call("update", &["--pids-limit=5"]));
        assert_eq!(liar.status(), "running");
        // It says that it kills, and does not.
        liar.end("never dead");
    });
}
