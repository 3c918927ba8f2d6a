// SPDX-License-Identifier: Apache-2.0
//! What the integration tests share: bundles made fluently, an OCI runtime driven by its command line, and waiting
//! for events with a deadline. `RUNTIME` in the environment names another runtime to run the same tests against.

pub mod bundle;
pub mod engine;
pub mod fields;
pub mod guest;
pub mod inventory;
pub mod runtime;

pub use bundle::{Bundle, BundleBuilder};
pub use engine::Engine;
pub use runtime::{Container, Outcome, Runtime};

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a test waits for anything before it fails: emulated hosts are slow.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The root of the checkout.
pub fn top() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}

/// The Debian root file system with Python that `examples/rootfs.sh` makes.
pub fn debian() -> PathBuf {
    let path = top().join("target/rootfs");
    assert!(
        path.join("usr/bin/python3").exists(),
        "{} is missing: run examples/rootfs.sh",
        path.display()
    );
    path
}

/// Waits until `condition` holds. For states that no descriptor announces; panics at the deadline.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "gave up waiting: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
