// SPDX-License-Identifier: Apache-2.0
//! `checkpoint`: saves a running container to two files in a directory.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use vmm::SnapshotFiles;

use super::{Error, delete, live};
use crate::cli::{Checkpoint, Global};
use crate::control::Request;
use crate::store::Store;

/// The memory of the guest goes to a disk meanwhile.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// The files of a checkpoint.
pub const STATE: &str = "state";
pub const MEMORY: &str = "memory";

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("--image-path {path}", path = .0.display())]
    Directory(PathBuf, #[source] io::Error),
    #[error("--image-path {path}: {1}", path = .0.display())]
    File(PathBuf, &'static str, #[source] io::Error),
}

pub fn run(store: &Store, global: &Global, arguments: &Checkpoint) -> Result<u8, Error> {
    refuse(arguments)?;
    let container = store.lock(&arguments.id)?;
    let state = container.load()?;
    state.status().can_checkpoint()?;
    if state.forked_from.is_some() {
        return Err(Error::Unsupported("checkpoint of a forked container"));
    }
    if let Some(path) = &arguments.work_path {
        // runc puts its logs there; engines expect it to exist afterwards.
        make_directory(path)?;
    }
    let draft = Draft::new(&arguments.image_path)?;
    let mut monitor = live::connect(store, &arguments.id)?;
    monitor.send(
        &Request::Checkpoint,
        &[draft.state.as_fd(), draft.memory.as_fd()],
    )?;
    monitor.expect_done(Some(Instant::now() + PATIENCE))?;
    if arguments.leave_running {
        monitor.command(&Request::Thaw, live::guest_deadline())?;
        draft.publish()?;
        return Ok(0);
    }
    // Until the files are safe the container could still go on: it does if this process ends.
    draft.publish()?;
    monitor.send(&Request::End, &[])?;
    live::wait_for_end_of(&state)?;
    delete::destroy(store, global, container)?;
    Ok(0)
}

/// What CRIU has and a machine does not.
fn refuse(arguments: &Checkpoint) -> Result<(), Error> {
    let asked = [
        (arguments.pre_dump, "checkpoint --pre-dump"),
        (arguments.parent_path.is_some(), "checkpoint --parent-path"),
        (arguments.criu.lazy_pages, "checkpoint --lazy-pages"),
        (arguments.page_server.is_some(), "checkpoint --page-server"),
        (arguments.status_fd.is_some(), "checkpoint --status-fd"),
        (!arguments.criu.empty_ns.is_empty(), "checkpoint --empty-ns"),
    ];
    match asked.into_iter().find(|(asked, _)| *asked) {
        Some((_, name)) => Err(Error::Unsupported(name)),
        None => Ok(()),
    }
}

fn make_directory(path: &Path) -> Result<(), ImageError> {
    let mut builder = DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| ImageError::Directory(path.to_owned(), error))
}

/// The files while they are written, under other names. Removed on drop.
#[derive(Debug)]
struct Draft {
    path: PathBuf,
    directory: OwnedFd,
    state: File,
    memory: File,
}

impl Draft {
    fn new(path: &Path) -> Result<Draft, ImageError> {
        make_directory(path)?;
        let directory: OwnedFd = File::open(path)
            .map_err(|error| ImageError::Directory(path.to_owned(), error))?
            .into();
        let create = |name: &'static str| {
            let draft = draft_name(name);
            // What an interrupted checkpoint has left.
            let _ = unlinkat(&directory, &draft, AtFlags::empty());
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            openat(&directory, &draft, flags, Mode::RUSR | Mode::WUSR)
                .map(File::from)
                .map_err(|error| ImageError::File(path.to_owned(), name, error.into()))
        };
        let state = create(STATE)?;
        let memory = create(MEMORY)?;
        Ok(Draft {
            path: path.to_owned(),
            directory,
            state,
            memory,
        })
    }

    /// On disk first, then under their names: a checkpoint that can be found is a whole one.
    fn publish(self) -> Result<(), ImageError> {
        for (name, file) in [(MEMORY, &self.memory), (STATE, &self.state)] {
            let fail = |error| ImageError::File(self.path.clone(), name, error);
            file.sync_all().map_err(fail)?;
            renameat(&self.directory, draft_name(name), &self.directory, name)
                .map_err(|error| fail(error.into()))?;
        }
        rustix::fs::fsync(&self.directory)
            .map_err(|error| ImageError::Directory(self.path.clone(), error.into()))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        for name in [MEMORY, STATE] {
            // Renamed, if all went well.
            let _ = unlinkat(&self.directory, draft_name(name), AtFlags::empty());
        }
    }
}

fn draft_name(name: &str) -> String {
    format!(".{name}.new")
}

/// The files of a finished checkpoint.
pub fn open(path: &Path) -> Result<SnapshotFiles, ImageError> {
    let open = |name: &'static str| {
        File::open(path.join(name)).map_err(|error| ImageError::File(path.to_owned(), name, error))
    };
    Ok(SnapshotFiles {
        state: open(STATE)?,
        memory: open(MEMORY)?,
    })
}
