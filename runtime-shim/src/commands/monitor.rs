// SPDX-License-Identifier: Apache-2.0
//! The hidden verb of the process that holds a VM.

use crate::cli::Monitor;
use crate::monitor;

pub fn run(arguments: &Monitor) -> ! {
    monitor::run(arguments.fd)
}
