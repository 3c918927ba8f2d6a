// SPDX-License-Identifier: Apache-2.0
//! `completion`: a script for a shell.

use super::{Error, print};
use crate::cli::{self, Completion};

pub fn run(arguments: &Completion) -> Result<u8, Error> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut cli::command(), "sandbox", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
