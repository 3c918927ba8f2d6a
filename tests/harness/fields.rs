// SPDX-License-Identifier: Apache-2.0
//! What the tests of configuration fields share: programs that look around from inside, and bundles that have to be
//! refused.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::{Bundle, BundleBuilder, Outcome, Runtime};

/// A bundle that runs Python lines which know what `tests/conformance/probe.py` defines.
pub fn probe(lines: &str) -> BundleBuilder {
    Bundle::python(&probe_program(lines))
}

pub fn probe_program(lines: &str) -> String {
    format!("{}\n{lines}", include_str!("../conformance/probe.py"))
}

/// What a program has shown.
pub fn shown(outcome: &Outcome) -> Value {
    let text = outcome.ok();
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

/// Runs a bundle whose program shows something.
pub fn look(runtime: &Runtime, bundle: &Bundle) -> Value {
    shown(&runtime.run(bundle))
}

/// Checks that a bundle is refused in one line with each of these words, in whatever case, and that nothing is left
/// of it.
#[track_caller]
pub fn check_refused(runtime: &Runtime, bundle: BundleBuilder, words: &[&str]) {
    let bundle = bundle.build();
    let path = bundle.path().to_str().unwrap();
    let outcome = runtime.call(&["run", "-b", path, "refused"]);
    let line = outcome.refusal();
    for word in words {
        let found = line.to_lowercase().contains(&word.to_lowercase());
        assert!(found, "expected {word:?} in {line:?}");
    }
    let left = fs::read_dir(runtime.root()).unwrap().count();
    assert_eq!(left, 0, "left behind after: {line}");
}

/// Says that a test cannot be passed by this runtime, and why, also where output of tests is captured.
pub fn report_skip(test: &str, runtime: &Runtime, why: &str) {
    use std::io::Write;
    let test = test.trim_end_matches("::{{closure}}");
    let line = format!("skipped {test} on {}: {why}", runtime.name());
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Ends a test here if it runs against one of the named runtimes.
#[macro_export]
macro_rules! skip_on {
    ($runtime:expr, $names:expr, $why:expr) => {
        if $names.contains(&$runtime.name()) {
            let here = || ();
            $crate::fields::report_skip(std::any::type_name_of_val(&here), &$runtime, $why);
            return;
        }
    };
}

/// A directory of the host for a container to see. Removed on drop, with what was mounted in it.
#[derive(Debug)]
pub struct HostDirectory {
    path: PathBuf,
    mounts: Vec<PathBuf>,
}

impl Default for HostDirectory {
    fn default() -> HostDirectory {
        HostDirectory::new()
    }
}

impl HostDirectory {
    pub fn new() -> HostDirectory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("host-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        HostDirectory {
            path,
            mounts: Vec::new(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Mounts a tmpfs at a new directory in it.
    pub fn mount(&mut self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "tmpfs"]).arg(&path);
        assert!(mount.status().unwrap().success());
        self.mounts.push(path.clone());
        path
    }
}

impl Drop for HostDirectory {
    fn drop(&mut self) {
        for mount in self.mounts.iter().rev() {
            let unmounted = Command::new("umount").arg("-l").arg(mount).status();
            if !unmounted.is_ok_and(|status| status.success()) {
                return;
            }
        }
        let _ = fs::remove_dir_all(&self.path);
    }
}
