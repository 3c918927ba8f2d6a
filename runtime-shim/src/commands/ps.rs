// SPDX-License-Identifier: Apache-2.0
//! `ps`: the host's processes of a container, which are its monitor and those that stand for execs.

use std::process::{Command, Stdio};

use super::{Error, live, print};
use crate::cli::{Ps, TableFormat};
use crate::control::{self, Reply, Request};
use crate::store::Store;

pub fn run(store: &Store, arguments: &Ps) -> Result<u8, Error> {
    let state = store.load(&arguments.id)?;
    state.status().is_live()?;
    let mut client = live::connect(store, &arguments.id)?;
    let Reply::Processes(stubs) = client.ask(&Request::Processes, live::guest_deadline())? else {
        return Err(control::Error::OutOfTurn.into());
    };
    let mut pids = vec![state.process.pid];
    pids.extend(stubs.into_iter().filter_map(|pid| i32::try_from(pid).ok()));
    match arguments.format {
        TableFormat::Json => {
            let text = serde_json::to_string(&pids).map_err(|error| Error::Output(error.into()))?;
            print(&(text + "\n"))?;
        }
        TableFormat::Table => print(&select(&table(&arguments.options)?, &pids)?)?,
    }
    Ok(0)
}

/// The host's own ps, for all processes.
fn table(options: &[String]) -> Result<String, Error> {
    let default = ["-ef".to_owned()];
    let options = if options.is_empty() {
        &default
    } else {
        options
    };
    let output = Command::new("ps")
        .args(options)
        .stdin(Stdio::null())
        .output()
        .map_err(Error::HostPs)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::HostPs(std::io::Error::other(message)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The headline, and the lines of the container's processes.
fn select(table: &str, pids: &[i32]) -> Result<String, Error> {
    let mut lines = table.lines();
    let head = lines.next().unwrap_or_default();
    let column = head.split_whitespace().position(|title| title == "PID");
    let column = column.ok_or(Error::NoPidColumn)?;
    let ours = lines.filter(|line| {
        let pid = line.split_whitespace().nth(column);
        pid.and_then(|pid| pid.parse().ok())
            .is_some_and(|pid| pids.contains(&pid))
    });
    let mut text = String::new();
    for line in std::iter::once(head).chain(ours) {
        text.push_str(line);
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_selected_by_pid() {
        let table = "UID PID PPID CMD\nroot 1 0 init 7\nroot 7 1 sandbox\nroot 70 7 x\n";
        assert_eq!(
            select(table, &[7, 9]).unwrap(),
            "UID PID PPID CMD\nroot 7 1 sandbox\n"
        );
        assert!(matches!(
            select("COMMAND\nx\n", &[7]),
            Err(Error::NoPidColumn)
        ));
    }
}
