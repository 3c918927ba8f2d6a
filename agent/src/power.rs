// SPDX-License-Identifier: Apache-2.0
//! The end of the virtual machine.

use rustix::system::{RebootCommand, reboot};

/// Ends the machine: the monitor sees a reset. In a pid namespace, as on a development machine, the
/// kernel ends the namespace instead.
pub(crate) fn restart() -> ! {
    if let Err(errno) = reboot(RebootCommand::Restart) {
        log::error!("reboot: {errno}");
    }
    // PID 1 that ends is a panic of the kernel, which the monitor sees as well.
    std::process::exit(1)
}
