// SPDX-License-Identifier: Apache-2.0
//! `list`: all containers of a state directory. One that cannot be read is reported, not fatal.

use super::{Error, print};
use crate::cli::{List, TableFormat};
use crate::store::{Entry, OciState, State, Store};

const HEADER: [&str; 6] = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];

pub fn run(store: &Store, arguments: &List) -> Result<u8, Error> {
    let entries = store.list()?;
    let states = readable(&entries);
    let states: Vec<OciState> = states
        .iter()
        .map(|state| state.oci(state.status()))
        .collect();
    let text = if arguments.quiet {
        states
            .iter()
            .map(|state| format!("{}\n", state.id))
            .collect()
    } else {
        match arguments.format {
            // What Go makes of an empty list.
            TableFormat::Json if states.is_empty() => "null\n".to_owned(),
            TableFormat::Json => super::json(&states)?,
            TableFormat::Table => table(&states),
        }
    };
    print(&text)?;
    Ok(0)
}

fn readable(entries: &[Entry]) -> Vec<&State> {
    entries
        .iter()
        .filter_map(|entry| match &entry.state {
            Ok(state) => Some(state),
            Err(error) => {
                log::warn!("container {:?} left out: {error}", entry.id);
                None
            }
        })
        .collect()
}

fn table(states: &[OciState]) -> String {
    let rows: Vec<[String; 6]> = states
        .iter()
        .map(|state| {
            [
                state.id.to_owned(),
                state.pid.to_string(),
                state.status.to_string(),
                state.bundle.display().to_string(),
                state.created.to_owned(),
                state.owner.to_owned(),
            ]
        })
        .collect();
    let width = |column: usize| {
        let widest = rows.iter().map(|row| row[column].chars().count()).max();
        // runc's: three spaces between columns, twelve characters at least.
        (widest.unwrap_or(0).max(HEADER[column].len()) + 3).max(12)
    };
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |cells: [&str; 6]| {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}"));
        }
        line + cells[5] + "\n"
    };
    let mut text = line(HEADER);
    for row in &rows {
        text.push_str(&line(std::array::from_fn(|column| row[column].as_str())));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::status::Status;

    #[test]
    fn columns_line_up() {
        let annotations = BTreeMap::new();
        let state = |id| OciState {
            oci_version: "1.0.2",
            id,
            pid: 42,
            status: Status::Running,
            bundle: Path::new("/b"),
            rootfs: Path::new("/b/rootfs"),
            created: "2025-01-01T00:00:00.000000001Z",
            annotations: &annotations,
            owner: "root",
        };
        let text = table(&[state("a"), state("a-rather-long-name")]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "ID                   PID         STATUS      BUNDLE      \
             CREATED                          OWNER"
        );
        assert_eq!(
            lines[1],
            "a                    42          running     /b          \
             2025-01-01T00:00:00.000000001Z   root"
        );
        assert_eq!(lines[0].find("OWNER"), lines[2].find("root"));
    }
}
