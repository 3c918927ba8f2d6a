// SPDX-License-Identifier: Apache-2.0
//! What a guest knows of a share and has open of it, in a snapshot. Files go by their names and are opened again when
//! the VM is restored; only those that have none any more are saved with what is in them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::path::DecInt;
use serde::{Deserialize, Serialize};

use super::abi::ROOT_ID;
use super::directory::OpenDirectory;
use super::file::OpenFile;
use super::inodes::{NodeId, SavedInodes};
use super::name::Name;
use super::passthrough::Passthrough;
use super::self_fd;

/// Of all deleted files together that are still open.
const LARGEST_CONTENT: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SavedFilesError {
    #[error("{0}: open in the container, but not there any more")]
    Gone(String),
    #[error("{0}: open in the container, but it has been moved or replaced on the host")]
    Moved(String),
    #[error("{0}: deleted while the container has it open, and it is a {1}")]
    Deleted(String, &'static str),
    #[error("{0}: deleted while the container has it open, and too large to be saved")]
    TooLarge(String),
    #[error("{0}: cannot be read or made again")]
    Io(String, #[source] io::Error),
    #[error("the table of files is damaged")]
    Damaged,
    #[error("a thread of the file server")]
    Thread(#[source] io::Error),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedFiles {
    /// The guest has the share mounted.
    pub(super) connected: bool,
    inodes: SavedInodes,
    next_file: u64,
    files: Vec<SavedHandle>,
    next_directory: u64,
    directories: Vec<SavedHandle>,
    nameless: Vec<NamelessFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedHandle {
    handle: u64,
    node: NodeId,
    /// Of open(2); 0 for directories.
    flags: u32,
}

/// A regular file that was deleted while it was open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct NamelessFile {
    node: NodeId,
    /// The directory in the root of the share below which it was.
    share: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    content: Vec<u8>,
}

impl SavedFiles {
    fn gone(&self, node: NodeId, error: Errno) -> SavedFilesError {
        let shown = self.inodes.shown(node);
        match error {
            Errno::STALE | Errno::NOENT => SavedFilesError::Gone(shown),
            error => SavedFilesError::Io(shown, error.into()),
        }
    }
}

impl Passthrough {
    pub(super) fn save(&self, connected: bool) -> Result<SavedFiles, SavedFilesError> {
        let (next_file, files) = self.files.list();
        let (next_directory, directories) = self.directories.list();
        // One that can be read, if there is one.
        let mut open: BTreeMap<NodeId, &OpenFile> = BTreeMap::new();
        for (_, node, file) in &files {
            match open.entry(*node) {
                Entry::Vacant(entry) => _ = entry.insert(file),
                Entry::Occupied(mut entry) if file.reads() => _ = entry.insert(file),
                Entry::Occupied(_) => {}
            }
        }
        let mut nameless = Vec::new();
        let mut room = LARGEST_CONTENT;
        for (node, file) in open {
            if let Some(path) = self.inodes.nameless(node) {
                nameless.push(self.save_nameless(node, path.as_fd(), file, &mut room)?);
            } else if !self.inodes.is_in_place(node) {
                return Err(SavedFilesError::Moved(self.inodes.shown(node)));
            }
        }
        for (_, node, _) in &directories {
            if !self.inodes.is_in_place(*node) {
                let shown = self.inodes.shown(*node);
                return Err(SavedFilesError::Deleted(shown, "directory"));
            }
        }
        let files = files.into_iter().map(|(handle, node, file)| SavedHandle {
            handle,
            node,
            flags: file.flags(),
        });
        let directories = directories
            .into_iter()
            .map(|(handle, node, _)| SavedHandle {
                handle,
                node,
                flags: 0,
            });
        Ok(SavedFiles {
            connected,
            inodes: self.inodes.save(),
            next_file,
            files: files.collect(),
            next_directory,
            directories: directories.collect(),
            nameless,
        })
    }

    /// Reads through what the guest has open: whoever saves can open nothing in the jail.
    fn save_nameless(
        &self,
        node: NodeId,
        path: std::os::fd::BorrowedFd<'_>,
        file: &OpenFile,
        room: &mut usize,
    ) -> Result<NamelessFile, SavedFilesError> {
        let name = rustix::fs::readlinkat(&*self.self_fd, DecInt::from_fd(path), Vec::new());
        let name = name.map(CString::into_bytes).unwrap_or_default();
        let name = String::from_utf8_lossy(&name).into_owned();
        let fail = |error: Errno| SavedFilesError::Io(name.clone(), error.into());
        let stat = self_fd::stat(path).map_err(fail)?;
        if stat.stx_size > *room as u64 {
            return Err(SavedFilesError::TooLarge(name));
        }
        let mut content = vec![0; stat.stx_size as usize];
        let mut length = 0;
        while length < content.len() {
            match rustix::io::pread(file.file(), &mut content[length..], length as u64) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        content.truncate(length);
        *room -= content.len();
        let first = Path::new(&name).components().find_map(|part| match part {
            Component::Normal(name) => Some(name.as_encoded_bytes().to_vec()),
            _ => None,
        });
        Ok(NamelessFile {
            node,
            share: first.unwrap_or_default(),
            mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            content,
        })
    }

    /// To be called in a thread that is prepared to serve requests.
    pub(super) fn restore(&self, saved: &SavedFiles) -> Result<(), SavedFilesError> {
        let damaged = |_: Errno| SavedFilesError::Damaged;
        self.inodes.restore(&saved.inodes).map_err(damaged)?;
        for nameless in &saved.nameless {
            self.restore_nameless(nameless)?;
        }
        let mut files: Vec<(u64, NodeId, OpenFile)> = Vec::new();
        for SavedHandle {
            handle,
            node,
            flags,
        } in &saved.files
        {
            let file = self.open_saved(*node, *flags);
            files.push((
                *handle,
                *node,
                file.map_err(|error| saved.gone(*node, error))?,
            ));
        }
        let mut directories: Vec<(u64, NodeId, OpenDirectory)> = Vec::new();
        for SavedHandle { handle, node, .. } in &saved.directories {
            let directory = self.open_directory(*node);
            let directory = directory.map_err(|error| saved.gone(*node, error))?;
            directories.push((*handle, *node, directory));
        }
        self.files
            .restore(saved.next_file, files)
            .and_then(|()| self.directories.restore(saved.next_directory, directories))
            .map_err(damaged)
    }

    fn open_saved(&self, node: NodeId, flags: u32) -> Result<OpenFile, Errno> {
        super::passthrough::require_regular(self.inodes.nature(node)?)?;
        self.open_again(self.inodes.path(node)?.as_fd(), flags)
    }

    /// Makes a deleted file again, without a name as before.
    fn restore_nameless(&self, saved: &NamelessFile) -> Result<(), SavedFilesError> {
        let shown = format!("deleted file of {}", String::from_utf8_lossy(&saved.share));
        let fail = |error: Errno| SavedFilesError::Io(shown.clone(), error.into());
        let share = CString::new(saved.share.as_slice()).map_err(|_| SavedFilesError::Damaged)?;
        let share = Name::new(&share).map_err(|_| SavedFilesError::Damaged)?;
        let root = self.inodes.directory(ROOT_ID).map_err(fail)?;
        let directory = self_fd::pin(&root, share.as_c_str()).map_err(fail)?;
        let stat = self_fd::stat(&directory).map_err(fail)?;
        if self_fd::file_type(&stat) != FileType::Directory {
            return Err(SavedFilesError::Damaged);
        }
        let pinned = directory.try_clone().map_err(|_| fail(Errno::NFILE))?;
        self.inodes
            .learn_mount(&stat, || Ok(pinned))
            .map_err(fail)?;
        let mut file = File::from(make_nameless(&directory).map_err(fail)?);
        file.write_all(&saved.content)
            .map_err(|error| SavedFilesError::Io(shown.clone(), error))?;
        let owner = (Uid::from_raw(saved.uid), Gid::from_raw(saved.gid));
        rustix::fs::fchown(&file, Some(owner.0), Some(owner.1)).map_err(fail)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(saved.mode & 0o7777)).map_err(fail)?;
        let path = self.self_fd.reopen(file.as_fd(), OFlags::PATH);
        self.inodes
            .give(saved.node, path.map_err(fail)?)
            .map_err(|_| SavedFilesError::Damaged)
    }
}

/// An open file without a name, on the file system of `directory`.
fn make_nameless(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, c".", flags | OFlags::TMPFILE, mode) {
        // A file system that cannot do it.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {}
        result => return result,
    }
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = format!(".deleted-{:016x}", u64::from_ne_bytes(random));
    let exclusive = flags | OFlags::CREATE | OFlags::EXCL;
    let file = rustix::fs::openat(directory, name.as_str(), exclusive, mode)?;
    rustix::fs::unlinkat(directory, name.as_str(), AtFlags::empty())?;
    Ok(file)
}
