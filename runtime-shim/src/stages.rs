// SPDX-License-Identifier: Apache-2.0
//! When each stage of a start was over, for benchmarks: JSON lines with CLOCK_MONOTONIC in nanoseconds, appended to the
//! file that [`VARIABLE`] names. Without it nothing is opened or written.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};

/// The environment variable that names the file.
pub const VARIABLE: &str = "SANDBOX_STAGES";

/// Says that `stage` is over. The first call opens the file, so the monitor makes it before its jail.
pub fn mark(stage: &str) {
    mark_ago(stage, 0);
}

/// Says that `stage` was over so many nanoseconds ago.
pub fn mark_ago(stage: &str, ago: u64) {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let open = || {
        File::options()
            .append(true)
            .create(true)
            .open(std::env::var_os(VARIABLE)?)
            .ok()
    };
    if let Some(mut file) = FILE.get_or_init(open).as_ref() {
        let now = clock_gettime(ClockId::Monotonic);
        let nanoseconds = (now.tv_sec * 1_000_000_000 + now.tv_nsec).saturating_sub_unsigned(ago);
        // A benchmark misses a line; nothing else depends on it.
        let _ = file
            .write_all(format!("{{\"stage\": \"{stage}\", \"ns\": {nanoseconds}}}\n").as_bytes());
    }
}
