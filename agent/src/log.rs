// SPDX-License-Identifier: Apache-2.0
//! Log lines go to the kernel's log, which the host sees as the console.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

#[derive(Debug)]
struct KernelLog(File);

impl Log for KernelLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // The levels of syslog(3), which /dev/kmsg takes as a prefix.
        let level = match record.level() {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        // One write is one line of the log. That it fails leaves nowhere to say so.
        let _ = (&self.0).write_all(format!("<{level}>agent: {}\n", record.args()).as_bytes());
    }

    fn flush(&self) {}
}

/// Without `path` nothing is logged.
pub(crate) fn start(path: &str) {
    static LOG: OnceLock<KernelLog> = OnceLock::new();
    if let Ok(file) = File::options().write(true).open(path)
        && log::set_logger(LOG.get_or_init(|| KernelLog(file))).is_ok()
    {
        log::set_max_level(LevelFilter::Info);
    }
}
