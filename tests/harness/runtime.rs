// SPDX-License-Identifier: Apache-2.0
//! An OCI runtime, driven as an engine or a person drives it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bundle::Bundle;
use crate::{DEADLINE, top};

/// The runtime under test with a state directory of its own.
#[derive(Debug)]
pub struct Runtime {
    program: PathBuf,
    root: PathBuf,
}

/// What a command left.
#[derive(Debug)]
pub struct Outcome {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Outcome {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("output is text")
    }

    /// The output of a command that must have succeeded, without the newline at its end.
    pub fn ok(&self) -> &str {
        assert_eq!(self.status, 0, "{self:?}");
        self.text().trim_end_matches('\n')
    }

    /// The one line of a command that must have failed with status 1.
    pub fn refusal(&self) -> &str {
        assert_eq!(self.status, 1, "{self:?}");
        let line = self.stderr.trim_end();
        assert!(
            !line.is_empty() && !line.contains('\n'),
            "one line: {line:?}"
        );
        line
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Outcome {
        use std::os::unix::process::ExitStatusExt;
        let status = output.status;
        Outcome {
            status: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Default for Runtime {
    fn default() -> Runtime {
        Runtime::new()
    }
}

impl Runtime {
    /// `RUNTIME` in the environment, or this checkout's `sandbox`.
    pub fn new() -> Runtime {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let program = std::env::var_os("RUNTIME")
            .map_or_else(|| top().join("target/release/sandbox"), PathBuf::from);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("root-{}-{number}", std::process::id()));
        fs::create_dir(&root).unwrap();
        Runtime { program, root }
    }

    /// Whether this is `sandbox`, for what only a VM shows.
    pub fn is_sandbox(&self) -> bool {
        self.name() == "sandbox"
    }

    /// `sandbox`, `runc`, `crun`.
    pub fn name(&self) -> &str {
        let name = self.program.file_name();
        name.and_then(|name| name.to_str()).unwrap_or_default()
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The command with its global options; the caller adds the verb.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root);
        command
    }

    /// Runs a verb to its end with nothing on stdin.
    pub fn call(&self, arguments: &[&str]) -> Outcome {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null());
        finish(command)
    }

    /// `run` of a bundle in the foreground.
    pub fn run(&self, bundle: &Bundle) -> Outcome {
        finish(self.run_command(bundle))
    }

    /// `run` with its stdin at end of file, not started yet.
    pub fn run_command(&self, bundle: &Bundle) -> Command {
        let mut command = self.command();
        let id = new_id();
        command
            .arg("run")
            .arg("-b")
            .arg(bundle.path())
            .arg(&id)
            .stdin(Stdio::null());
        command
    }

    /// A container created and not started, with its output in files.
    pub fn create(&self, bundle: Bundle) -> Container<'_> {
        self.try_create(bundle)
            .unwrap_or_else(|outcome| panic!("create failed: {outcome:?}"))
    }

    pub fn try_create(&self, bundle: Bundle) -> Result<Container<'_>, Outcome> {
        let id = new_id();
        let output = bundle.path().join("stdout");
        let errors = bundle.path().join("stderr");
        let mut command = self.command();
        command
            .arg("create")
            .arg("-b")
            .arg(bundle.path())
            .arg("--pid-file")
            .arg(bundle.path().join("pid"))
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&output).unwrap())
            .stderr(fs::File::create(&errors).unwrap());
        let status = wait(command.spawn().expect("the runtime starts"));
        if status != 0 {
            return Err(Outcome {
                status,
                stdout: fs::read(&output).unwrap(),
                stderr: fs::read_to_string(&errors).unwrap(),
            });
        }
        Ok(Container {
            runtime: self,
            id,
            output,
            errors,
            bundle: Arc::new(bundle),
        })
    }

    /// A container that goes on from the checkpoint in `image`, in the bundle of the one that was saved.
    pub fn restore(&self, of: &Container<'_>, image: &Path) -> Result<Container<'_>, Outcome> {
        let id = new_id();
        let output = of.bundle.path().join(format!("stdout-{id}"));
        let errors = of.bundle.path().join(format!("stderr-{id}"));
        let mut command = self.command();
        command
            .arg("--log")
            .arg(of.bundle.path().join("log"))
            .args(["restore", "--detach", "--image-path"])
            .arg(image)
            .arg("-b")
            .arg(of.bundle.path())
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&output).unwrap())
            .stderr(fs::File::create(&errors).unwrap());
        let status = wait(command.spawn().expect("the runtime starts"));
        if status != 0 {
            return Err(Outcome {
                status,
                stdout: fs::read(&output).unwrap(),
                stderr: fs::read_to_string(&errors).unwrap(),
            });
        }
        Ok(Container {
            runtime: self,
            id,
            output,
            errors,
            bundle: of.bundle.clone(),
        })
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let id = entry.file_name();
            let mut command = self.command();
            command
                .args(["delete", "--force"])
                .arg(id)
                .stdin(Stdio::null());
            let _ = command.output();
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// A container of a test, deleted on drop.
#[derive(Debug)]
pub struct Container<'a> {
    runtime: &'a Runtime,
    id: String,
    output: PathBuf,
    errors: PathBuf,
    bundle: Arc<Bundle>,
}

impl Container<'_> {
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    pub fn runtime(&self) -> &Runtime {
        self.runtime
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Runs `VERB ID ARGUMENTS`.
    pub fn call(&self, verb: &str, arguments: &[&str]) -> Outcome {
        let mut all = vec![verb, &self.id];
        all.extend(arguments);
        self.runtime.call(&all)
    }

    pub fn start(&self) {
        self.call("start", &[]).ok();
    }

    pub fn exec(&self, arguments: &[&str]) -> Outcome {
        self.call("exec", arguments)
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(self.call("state", &[]).ok()).expect("state is JSON")
    }

    pub fn status(&self) -> String {
        self.state()["status"]
            .as_str()
            .expect("state has a status")
            .to_owned()
    }

    /// Waits until the container's process has ended.
    pub fn wait_stopped(&self) {
        crate::wait_until("container stops", || self.status() == "stopped");
    }

    /// What the container wrote to stdout so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.errors).unwrap()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.runtime.call(&["delete", "--force", &self.id]);
    }
}

pub fn new_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("test-{}-{number}", std::process::id())
}

/// Runs a command to its end, or fails the test at the deadline.
pub fn finish(mut command: Command) -> Outcome {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runtime starts");
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let errors = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stderr.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let status = wait(child);
    Outcome {
        status,
        stdout: reader.join().unwrap(),
        stderr: errors.join().unwrap(),
    }
}

/// How long a command of the runtime may take: `COMMAND_SECONDS` of the environment, for tests made longer by hand.
fn command_deadline() -> Duration {
    match std::env::var("COMMAND_SECONDS") {
        Ok(seconds) => Duration::from_secs(seconds.parse().expect("COMMAND_SECONDS is a number")),
        Err(_) => DEADLINE * 3,
    }
}

/// The status of a child, as a shell shows it. Killed and reported at the deadline.
pub fn wait(mut child: Child) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let (start, deadline) = (Instant::now(), command_deadline());
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        }
        if start.elapsed() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("a command did not end in time");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
