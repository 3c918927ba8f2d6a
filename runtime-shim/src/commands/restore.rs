// SPDX-License-Identifier: Apache-2.0
//! `restore`: a container that goes on from a checkpoint.

use std::os::fd::AsFd;

use super::create::{Mode, Wanted, create};
use super::run::{End, see_through};
use super::{Error, checkpoint};
use crate::cli::{Global, Restore};
use crate::signal_fd;
use crate::store::Store;

pub fn run(store: &Store, global: &Global, arguments: &Restore) -> Result<u8, Error> {
    refuse(arguments)?;
    let files = checkpoint::open(&arguments.image_path)?;
    let signals = signal_fd::take().map_err(Error::Signals)?;
    let mode = match arguments.detach {
        true => Mode::Detached,
        false => Mode::Foreground,
    };
    let created = create(Wanted {
        global,
        store,
        bundle: &arguments.bundle,
        id: &arguments.id,
        options: &arguments.options,
        mode,
        signals: signals.as_fd(),
        checkpoint: Some(&files),
        forked_from: None,
    })?;
    let end = End {
        detach: arguments.detach,
        keep: false,
    };
    see_through(store, global, created, &end, signals.as_fd())
}

/// What CRIU has and a machine does not.
fn refuse(arguments: &Restore) -> Result<(), Error> {
    let asked = [
        (arguments.criu.lazy_pages, "restore --lazy-pages"),
        (!arguments.criu.empty_ns.is_empty(), "restore --empty-ns"),
        (arguments.lsm_profile.is_some(), "restore --lsm-profile"),
        (
            arguments.lsm_mount_context.is_some(),
            "restore --lsm-mount-context",
        ),
    ];
    match asked.into_iter().find(|(asked, _)| *asked) {
        Some((_, name)) => Err(Error::Unsupported(name)),
        None => Ok(()),
    }
}
