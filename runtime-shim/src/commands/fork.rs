// SPDX-License-Identifier: Apache-2.0
//! `fork`: copies of a running container that go on where it is.
//!
//! The container is saved once, to files without names, and stands still until each copy has opened its files: what is
//! open for writing is then no longer shared with it. Memory is shared until one of them writes to it. Below the root
//! of a copy lies that of the container, whose later changes a copy sees where it has made none itself; volumes are the
//! same for all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, ResolveFlags, memfd_create, openat};
use vmm::SnapshotFiles;

use super::checkpoint::PATIENCE;
use super::create::{Begun, Created, Mode as CreateMode, Wanted, begin};
use super::run::{delete_ended, wait_for_start};
use super::{Error, chain, live};
use crate::cli::{CreateOptions, Fork, Global};
use crate::control::Request;
use crate::monitor::order::{Report, Stage};
use crate::plan::{BOOT_ID, HostPlan, Overlay, ReadOnly, Share, ShareKind};
use crate::store::{Locked, Store};
use crate::{signal_fd, stdio, templates};

const UPPER: &str = "rootfs-upper";
const WORK: &str = "rootfs-work";
/// Of machine-id(5): 32 digits and a newline.
const MACHINE_ID_LENGTH: u64 = 33;

#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    #[error("fork: {0}")]
    Files(&'static str, #[source] io::Error),
    #[error("fork: {path}", path = .0.display())]
    Path(PathBuf, #[source] io::Error),
}

pub fn run(store: &Store, global: &Global, arguments: &Fork) -> Result<u8, Error> {
    let container = store.lock(&arguments.id)?;
    let state = container.load()?;
    state.status().can_checkpoint()?;
    if state.forked_from.is_some() {
        return Err(Error::Unsupported("fork of a forked container"));
    }
    let signals = signal_fd::take().map_err(Error::Signals)?;
    let image = new_image()?;
    let mut parent = live::connect(store, &arguments.id)?;
    let fds = [image.state.as_fd(), image.memory.as_fd()];
    parent.send(&Request::Checkpoint, &fds)?;
    parent.expect_done(Some(Instant::now() + PATIENCE))?;

    let ids = ids(arguments);
    let views: Vec<SnapshotFiles> = ids.iter().map(|_| view(&image)).collect::<Result<_, _>>()?;
    // As it was created, whatever has become of the bundle.
    let options = CreateOptions {
        config: Some(store.directory(&arguments.id).join("config.json")),
        ..CreateOptions::default()
    };
    let mut begun = Vec::new();
    for (id, view) in ids.iter().zip(&views) {
        begun.push(begin(Wanted {
            global,
            store,
            bundle: &state.bundle,
            id,
            options: &options,
            mode: CreateMode::Detached,
            signals: signals.as_fd(),
            checkpoint: Some(view),
            forked_from: Some(&arguments.id),
        })?);
    }
    for copy in &mut begun {
        copy.expect(&Report::Stage(Stage::Restore))?;
    }
    parent.command(&Request::Thaw, live::guest_deadline())?;
    let mut copies = Vec::new();
    let result = start(begun, &mut copies, signals.as_fd());
    finish(store, global, copies, result)
}

fn ids(arguments: &Fork) -> Vec<String> {
    match arguments.number {
        1 => vec![arguments.new_id.clone()],
        number => (1..=number)
            .map(|index| format!("{}-{index}", arguments.new_id))
            .collect(),
    }
}

fn start(
    begun: Vec<Begun<'_>>,
    copies: &mut Vec<Created>,
    signals: std::os::fd::BorrowedFd<'_>,
) -> Result<(), Error> {
    for copy in begun {
        copies.push(copy.finish()?);
        if let Some(copy) = copies.last_mut() {
            wait_for_start(copy, signals)?;
        }
    }
    Ok(())
}

/// All run, or none is left.
fn finish(
    store: &Store,
    global: &Global,
    copies: Vec<Created>,
    result: Result<(), Error>,
) -> Result<u8, Error> {
    for copy in copies {
        let Created {
            container, monitor, ..
        } = copy;
        if result.is_ok() {
            monitor.release();
            continue;
        }
        let id = container.id().to_owned();
        drop((monitor, container));
        if let Err(error) = delete_ended(store, global, &id) {
            log::warn!("{}", chain(&error));
        }
    }
    result.map(|()| 0)
}

/// Files without names. The memory is in the page cache of a disk, if there is a place for it: it can be written out
/// when the host is short of memory.
fn new_image() -> Result<SnapshotFiles, ForkError> {
    let in_memory = |name| {
        memfd_create(name, MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|error| ForkError::Files("a file in memory", error.into()))
    };
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let on_disk =
        templates::path().and_then(|path| openat(CWD, path, flags, Mode::RUSR | Mode::WUSR).ok());
    Ok(SnapshotFiles {
        state: in_memory("state")?,
        memory: match on_disk {
            Some(file) => file.into(),
            None => in_memory("memory")?,
        },
    })
}

/// The same files for reading only, with a position of their own.
fn view(image: &SnapshotFiles) -> Result<SnapshotFiles, ForkError> {
    let open = |file: &File| {
        File::open(stdio::self_fd(file))
            .map_err(|error| ForkError::Files("open the saved machine again", error))
    };
    Ok(SnapshotFiles {
        state: open(&image.state)?,
        memory: open(&image.memory)?,
    })
}

/// Gives a copy, whose state directory is at `path`, a root file system of its own and what tells it from others.
pub fn prepare(container: &Locked, path: &Path, host: &mut HostPlan) -> Result<(), ForkError> {
    let Some(root) = host.shares.first_mut() else {
        return Ok(());
    };
    let fail = |error| ForkError::Path(root.source.clone(), error);
    let lower = fs::metadata(&root.source).map_err(fail)?;
    let overlay = Overlay {
        upper: path.join(UPPER),
        work: path.join(WORK),
    };
    for (directory, name) in [(&overlay.upper, UPPER), (&overlay.work, WORK)] {
        let fail = |error| ForkError::Path(directory.clone(), error);
        rustix::fs::mkdirat(container.directory(), name, Mode::RWXU)
            .map_err(|error| fail(error.into()))?;
        take_on(directory, &lower).map_err(fail)?;
    }
    new_machine_id(&root.source, &overlay.upper)?;
    root.overlay = Some(overlay);
    let boot_id = path.join(BOOT_ID);
    let fail = |error| ForkError::Path(boot_id.clone(), error);
    let uuid = fs::read("/proc/sys/kernel/random/uuid").map_err(fail)?;
    fs::write(&boot_id, uuid).map_err(fail)?;
    fs::set_permissions(&boot_id, fs::Permissions::from_mode(0o444)).map_err(fail)?;
    host.shares.push(Share {
        name: BOOT_ID.to_owned(),
        source: boot_id,
        kind: ShareKind::File,
        readonly: ReadOnly::Recursive,
        recursive: false,
        overlay: None,
    });
    Ok(())
}

/// Owner and mode of another file.
fn take_on(path: &Path, of: &fs::Metadata) -> io::Result<()> {
    match std::os::unix::fs::chown(path, Some(of.uid()), Some(of.gid())) {
        // A user's own sandbox has one owner.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        result => result?,
    }
    fs::set_permissions(path, fs::Permissions::from_mode(of.mode() & 0o7777))
}

/// A root file system that has an id of its machine gets another one. Links are left alone.
fn new_machine_id(lower: &Path, upper: &Path) -> Result<(), ForkError> {
    let open = |path: &str, flags: OFlags| -> io::Result<File> {
        let root = File::open(lower)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
        let found = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)?;
        Ok(found.into())
    };
    let metadata = |file: io::Result<File>| file.and_then(|file| file.metadata()).ok();
    let (Some(etc), Some(old)) = (
        metadata(open("etc", OFlags::DIRECTORY)),
        metadata(open("etc/machine-id", OFlags::empty())),
    ) else {
        return Ok(());
    };
    if !old.is_file() || old.len() != MACHINE_ID_LENGTH {
        return Ok(());
    }
    let make = || -> io::Result<()> {
        let directory = upper.join("etc");
        fs::create_dir(&directory)?;
        take_on(&directory, &etc)?;
        let mut bytes = [0u8; 16];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // As of a random UUID, which machine-id(5) asks for.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = directory.join("machine-id");
        File::create_new(&path)?.write_all(format!("{digits}\n").as_bytes())?;
        take_on(&path, &old)
    };
    make().map_err(|error| ForkError::Path(upper.join(OsString::from("etc/machine-id")), error))
}
