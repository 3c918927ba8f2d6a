// SPDX-License-Identifier: Apache-2.0
//! The `sandbox` command.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use runtime_shim::cli::{Cli, CliError, Command};
use runtime_shim::{commands, logging, sandbox};

fn main() -> ExitCode {
    let cli = match Cli::from_arguments(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(CliError::Print(text)) => {
            // Nobody is left to tell if stdout is gone.
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error, 1),
    };
    // Engines tell an exec that could not be from one that failed by this.
    let failure = if matches!(cli.command, Command::Exec(_)) {
        255
    } else {
        1
    };
    // Before anything is opened: it outlives the one that left these open, and must not hold them.
    if let Command::Monitor(arguments) = &cli.command
        && let Err(error) = sandbox::close_inherited_except(arguments.fd)
    {
        return fail(&error, failure);
    }
    if let Err(error) = logging::init(&cli.global) {
        return fail(&error, failure);
    }
    match commands::run(cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => fail(&error, failure),
    }
}

/// The error and its sources in one line.
fn fail(error: &dyn Error, status: u8) -> ExitCode {
    logging::fatal(&commands::chain(error));
    ExitCode::from(status)
}
