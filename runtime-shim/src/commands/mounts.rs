// SPDX-License-Identifier: Apache-2.0
//! `mounts add|remove`: mounts of a running container, as crun has it.
//!
//! What is to be seen of the host's files is opened here and attached to the share in the monitor's mount namespace;
//! the monitor itself, which cannot mount, only passes on to the guest where it is to appear.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use serde::Deserialize;

use super::{Error, live};
use crate::cli::{Mounts, MountsAction, MountsFile};
use crate::control::Request;
use crate::facts;
use crate::plan::{self, MountSource, Share};
use crate::sandbox;
use crate::status::StatusError;
use crate::store::{AddedMount, State, Store, is_host_root};

/// A thousand mounts take some hundred KiB.
const MAX_FILE: u64 = 1 << 20;

pub fn run(store: &Store, arguments: &Mounts) -> Result<u8, Error> {
    let (MountsAction::Add(file) | MountsAction::Remove(file)) = &arguments.action;
    let container = store.lock(&file.id)?;
    let mut state = container.load()?;
    state.status().is_live()?;
    if !is_host_root() {
        return Err(Error::MountsAsUser);
    }
    let mounts = read(file)?;
    for (index, mount) in mounts.iter().enumerate() {
        let done = match &arguments.action {
            MountsAction::Add(_) => add(store, &mut state, index, mount),
            MountsAction::Remove(_) => remove(store, &mut state, index, mount),
        };
        // Also what has failed has used up a name.
        container.save(&state)?;
        done?;
    }
    Ok(0)
}

/// The `mounts` of a configuration, alone or in one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Alone(Vec<Mount>),
    Within { mounts: Vec<Mount> },
}

fn read(file: &MountsFile) -> Result<Vec<Mount>, Error> {
    let fail = |error| Error::MountsFile(file.file.clone(), error);
    let mut text = Vec::new();
    File::open(&file.file)
        .and_then(|opened| opened.take(MAX_FILE).read_to_end(&mut text))
        .map_err(fail)?;
    let document = serde_json::from_slice(&text)
        .map_err(|error| Error::MountsJson(file.file.clone(), error))?;
    Ok(match document {
        Document::Alone(mounts) | Document::Within { mounts } => mounts,
    })
}

fn field(index: usize) -> String {
    format!("mounts[{index}]")
}

fn add(store: &Store, state: &mut State, index: usize, mount: &Mount) -> Result<(), Error> {
    let directory =
        std::env::current_dir().map_err(|error| Error::MountsFile(".".into(), error))?;
    let source = MountSource {
        kind: source_kind(&directory, mount),
        bundle: &directory,
        share_name: new_name(state),
    };
    let (guest, share, warnings) = plan::plan_mount(&field(index), mount, &source)?;
    for warning in warnings {
        log::warn!("{warning}");
    }
    let destination = guest.destination.clone();
    let monitor = state.process.open().ok_or(StatusError::NotRunning)?;
    if let Some(share) = &share {
        sandbox::share_more(&monitor, share)?;
    }
    let request = Request::Mount(Box::new(guest));
    let mounted = live::connect(store, &state.id)
        .and_then(|mut client| Ok(client.command(&request, live::guest_deadline())?));
    if let (Err(_), Some(share)) = (&mounted, &share) {
        sandbox::share_less(&monitor, &share.name, share.kind)?;
    }
    mounted?;
    state.mounts.push(AddedMount {
        destination,
        share: share.map(|Share { name, kind, .. }| (name, kind)),
    });
    Ok(())
}

fn source_kind(directory: &Path, mount: &Mount) -> Option<plan::SourceKind> {
    let source: &PathBuf = mount.source().as_ref().filter(|_| plan::is_bind(mount))?;
    Some(facts::kind(std::fs::metadata(directory.join(source))))
}

/// Unlike those of the creation, which begin with another letter; and none twice, since the guest's kernel remembers
/// what a name led to.
fn new_name(state: &mut State) -> String {
    let number = state.mounts_added;
    state.mounts_added += 1;
    format!("a{number}")
}

fn remove(store: &Store, state: &mut State, index: usize, mount: &Mount) -> Result<(), Error> {
    let destination = plan::mount_destination(&field(index), mount.destination())?;
    let position = state
        .mounts
        .iter()
        .rposition(|added| added.destination == destination);
    let Some(position) = position else {
        return Err(Error::NotAdded { index, destination });
    };
    let monitor = state.process.open().ok_or(StatusError::NotRunning)?;
    live::connect(store, &state.id)?
        .command(&Request::Unmount { destination }, live::guest_deadline())?;
    let removed = state.mounts.remove(position);
    if let Some((name, kind)) = removed.share {
        sandbox::share_less(&monitor, &name, kind)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_mounts_or_has_them() {
        let count = |text: &str| match serde_json::from_str(text) {
            Ok(Document::Alone(mounts) | Document::Within { mounts }) => Some(mounts.len()),
            Err(_) => None,
        };
        assert_eq!(count(r#"[{"destination": "/a"}]"#), Some(1));
        assert_eq!(count(r#"{"mounts": [{"destination": "/a"}]}"#), Some(1));
        assert_eq!(count(r#"{"x": 1}"#), None);
    }
}
