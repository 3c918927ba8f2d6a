// SPDX-License-Identifier: Apache-2.0
//! One module a verb. Each returns the exit status of the process.

mod completion;
mod list;
mod state;

use std::io;

use crate::bundle::BundleError;
use crate::cli::{Cli, CliError, Command};
use crate::logging::LoggingError;
use crate::plan::PlanError;
use crate::status::StatusError;
use crate::store::{Store, StoreError};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Cli(#[from] CliError),
    #[error(transparent)]
    Logging(#[from] LoggingError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Status(#[from] StatusError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("standard output")]
    Output(#[source] io::Error),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<u8, Error> {
    let store = Store::new(cli.global.root.as_deref())?;
    match &cli.command {
        Command::State(arguments) => state::run(&store, &arguments.id),
        Command::List(arguments) => list::run(&store, arguments),
        Command::Completion(arguments) => completion::run(arguments),
        other => Err(Error::Unsupported(other.name())),
    }
}

/// Writes to stdout and looks at the result, which `print!` does not.
fn print(text: &str) -> Result<(), Error> {
    use io::Write;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(Error::Output)
}

/// Indented JSON with a newline.
fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| Error::Output(error.into()))
}
