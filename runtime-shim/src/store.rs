// SPDX-License-Identifier: Apache-2.0
//! The state directory: one directory for each container, claimed by mkdir, locked by flock, with a
//! state file that is replaced as a whole.
//!
//! All access to a container's directory goes through a descriptor of it, so that an exchange of the
//! directory for a link leads nowhere.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::bundle::{IdError, validate_id};
use crate::identity::Identity;
use crate::plan::{ShareKind, VmShape};
use crate::status::Status;

/// Of the state file. A larger number is refused, a smaller one would be converted.
pub const VERSION: u32 = 1;

const STATE_FILE: &str = "state.json";
const CONFIG_FILE: &str = "config.json";
/// State files are some hundred bytes and annotations.
const MAX_STATE: u64 = 16 << 20;
/// How long a command waits for another one on the same container.
const LOCK_DEADLINE: Duration = Duration::from_secs(30);
const MAX_DEPTH: u32 = 16;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("container with given ID already exists")]
    Exists,
    #[error("container does not exist")]
    NotFound,
    /// The directory is there, its state file is not: what an interrupted create leaves.
    #[error("container does not exist")]
    NoState,
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("container {0:?}: another command holds its lock")]
    Busy(String),
    #[error("state directory {path}: {reason}", path = .path.display())]
    UnsafeRoot { path: PathBuf, reason: &'static str },
    #[error("state directory {path}", path = .path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("container {id:?}: {operation} {file}")]
    Io {
        id: String,
        operation: &'static str,
        file: String,
        source: io::Error,
    },
    #[error("container {0:?}: state.json is not a regular file, `delete --force` removes it")]
    NotAFile(String),
    #[error("container {0:?}: state.json is empty or cut off, `delete --force` removes it")]
    Truncated(String),
    #[error("container {id:?}: state.json is damaged, `delete --force` removes it")]
    Damaged {
        id: String,
        source: serde_json::Error,
    },
    #[error(
        "container {id:?}: state.json has version {found}, this program knows up to {VERSION}; \
         `delete --force` removes it"
    )]
    Newer { id: String, found: u64 },
    #[error(
        "container {id:?}: state.json belongs to container {found:?}, `delete --force` removes it"
    )]
    Foreign { id: String, found: String },
    #[error("container {id:?}: {file} is a mount point, unmount it first")]
    MountInside { id: String, file: String },
}

impl StoreError {
    /// The container's directory is there, but what its state file says means nothing.
    pub fn is_unreadable(&self) -> bool {
        use StoreError::{Damaged, Foreign, Newer, NoState, NotAFile, Truncated};
        matches!(
            self,
            NoState | NotAFile(_) | Truncated(_) | Damaged { .. } | Newer { .. } | Foreign { .. }
        )
    }
}

/// What is known of a container, as written at its last change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub version: u32,
    pub oci_version: String,
    pub id: String,
    /// The monitor; before it exists, the command that creates the container.
    pub process: Identity,
    /// Never stopped: that is what the process being gone means.
    pub status: Status,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339 with nanoseconds.
    pub created: String,
    pub owner: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Directories of the container's cgroup on the host, one for each hierarchy.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    pub vm: VmShape,
    /// Added since the creation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<AddedMount>,
    /// How often that was tried.
    #[serde(default)]
    pub mounts_added: u64,
    /// The container that this one is a copy of: its files lie below this one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<String>,
}

/// A mount that was added to a running container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedMount {
    pub destination: String,
    /// What it has of the host's files, by its name in the share.
    pub share: Option<(String, ShareKind)>,
}

/// The state as the runtime specification has it, with runc's further fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciState<'a> {
    pub oci_version: &'a str,
    pub id: &'a str,
    pub pid: i32,
    pub status: Status,
    pub bundle: &'a Path,
    pub rootfs: &'a Path,
    pub created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: &'a BTreeMap<String, String>,
    pub owner: &'a str,
}

impl State {
    /// The status now, which is stopped once the process is gone.
    pub fn status(&self) -> Status {
        if self.process.is_alive() {
            self.status
        } else {
            Status::Stopped
        }
    }

    /// For the state command and for hooks.
    pub fn oci(&self, status: Status) -> OciState<'_> {
        OciState {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: if status == Status::Stopped {
                0
            } else {
                self.process.pid
            },
            status,
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            annotations: &self.annotations,
            owner: &self.owner,
        }
    }
}

/// The directory that holds the containers' directories.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    explicit: bool,
}

/// A container in a listing.
#[derive(Debug)]
pub struct Entry {
    pub id: String,
    pub state: Result<State, StoreError>,
}

impl Store {
    /// With `--root`, or the default directory. Nothing is touched yet.
    pub fn new(root: Option<&Path>) -> Result<Store, StoreError> {
        let Some(root) = root else {
            return Ok(Store {
                root: default_root(),
                explicit: false,
            });
        };
        let root = std::path::absolute(root).map_err(|source| StoreError::Root {
            path: root.to_owned(),
            source,
        })?;
        if root.parent().is_none() {
            return Err(StoreError::UnsafeRoot {
                path: root,
                reason: "the root of the file system cannot hold state",
            });
        }
        Ok(Store {
            root,
            explicit: true,
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a container, whether it exists or not. The id has been validated.
    pub fn directory(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Takes an id for a new container: of any number of commands that try at once, one succeeds.
    /// Dropped before [`Locked::keep`], the directory is removed again.
    pub fn claim(&self, id: &str) -> Result<Locked, StoreError> {
        validate_id(id)?;
        let root = self.create_root()?;
        match rustix::fs::mkdirat(&root, id, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(StoreError::Exists),
            Err(error) => return Err(self.root_error(error)),
        }
        let directory = open_directory(&root, id).map_err(|error| match error {
            // Another command deletes leftovers without state, as this one just is.
            Errno::NOENT => StoreError::NotFound,
            error => {
                // Still empty, or somebody else's by now and then not.
                let _ = rustix::fs::unlinkat(&root, id, AtFlags::REMOVEDIR);
                self.root_error(error)
            }
        })?;
        let mut container = Locked {
            root,
            directory,
            id: id.to_owned(),
            temporary: false,
        };
        match rustix::fs::flock(
            &container.directory,
            FlockOperation::NonBlockingLockExclusive,
        ) {
            Ok(()) if container.is_current() => {
                container.temporary = true;
                Ok(container)
            }
            _ => Err(StoreError::Busy(id.to_owned())),
        }
    }

    /// Locks an existing container against other commands.
    pub fn lock(&self, id: &str) -> Result<Locked, StoreError> {
        validate_id(id)?;
        let root = self.open_root()?;
        // The directory may be deleted, even replaced, while waiting.
        for _ in 0..16 {
            let directory = self.open_container(&root, id)?;
            let directory =
                flock_within(directory, LOCK_DEADLINE).map_err(|error| match error {
                    LockError::Deadline => StoreError::Busy(id.to_owned()),
                    LockError::Os(error) => self.root_error(error),
                })?;
            let container = Locked {
                root: root.try_clone().map_err(|source| StoreError::Root {
                    path: self.root.clone(),
                    source,
                })?,
                directory,
                id: id.to_owned(),
                temporary: false,
            };
            if container.is_current() {
                return Ok(container);
            }
        }
        Err(StoreError::Busy(id.to_owned()))
    }

    /// The state as of now, without a lock.
    pub fn load(&self, id: &str) -> Result<State, StoreError> {
        validate_id(id)?;
        let root = self.open_root()?;
        let directory = self.open_container(&root, id)?;
        load(&directory, id)
    }

    /// The copy of the configuration that the container was created from.
    pub fn config(&self, id: &str) -> Result<Vec<u8>, StoreError> {
        validate_id(id)?;
        let root = self.open_root()?;
        let directory = self.open_container(&root, id)?;
        read(&directory, id, CONFIG_FILE)
    }

    /// All containers by id. A directory that is no container at all is left out.
    pub fn list(&self) -> Result<Vec<Entry>, StoreError> {
        let root = match self.open(&self.root) {
            Ok(root) => root,
            Err(Errno::NOENT) if !self.explicit => return Ok(Vec::new()),
            Err(error) => return Err(self.root_error(error)),
        };
        let mut entries = Vec::new();
        for item in Dir::read_from(&root).map_err(|error| self.root_error(error))? {
            let item = item.map_err(|error| self.root_error(error))?;
            let Ok(id) = item.file_name().to_str() else {
                continue;
            };
            if validate_id(id).is_err() {
                continue;
            }
            let Ok(directory) = open_directory(&root, id) else {
                continue;
            };
            entries.push(Entry {
                id: id.to_owned(),
                state: load(&directory, id),
            });
        }
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(entries)
    }

    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    fn open_root(&self) -> Result<OwnedFd, StoreError> {
        self.open(&self.root).map_err(|error| match error {
            Errno::NOENT => StoreError::NotFound,
            error => self.root_error(error),
        })
    }

    fn open_container(&self, root: &OwnedFd, id: &str) -> Result<OwnedFd, StoreError> {
        open_directory(root, id).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => StoreError::NotFound,
            error => self.root_error(error),
        })
    }

    fn create_root(&self) -> Result<OwnedFd, StoreError> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        // The sticky bit keeps a cleaner of the user's runtime directory away.
        let sticky = u32::from(!self.explicit && self.root.starts_with("/run/user")) * 0o1000;
        builder.recursive(true).mode(0o700 | sticky);
        builder
            .create(&self.root)
            .map_err(|source| StoreError::Root {
                path: self.root.clone(),
                source,
            })?;
        let root = self
            .open(&self.root)
            .map_err(|error| self.root_error(error))?;
        let stat = rustix::fs::fstat(&root).map_err(|error| self.root_error(error))?;
        let unsafe_root = |reason| StoreError::UnsafeRoot {
            path: self.root.clone(),
            reason,
        };
        if stat.st_mode & 0o022 != 0 {
            return Err(unsafe_root("others may write to it"));
        }
        if stat.st_uid != 0 && stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(unsafe_root("it belongs to another user"));
        }
        Ok(root)
    }

    fn root_error(&self, error: Errno) -> StoreError {
        StoreError::Root {
            path: self.root.clone(),
            source: error.into(),
        }
    }
}

/// A container's directory, locked until dropped. A new one is removed then, unless it is to be kept.
#[derive(Debug)]
pub struct Locked {
    root: OwnedFd,
    directory: OwnedFd,
    id: String,
    temporary: bool,
}

impl Locked {
    /// The new container has come into being: its directory stays.
    pub fn keep(&mut self) {
        self.temporary = false;
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// For further files, such as the control socket.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    pub fn load(&self) -> Result<State, StoreError> {
        load(&self.directory, &self.id)
    }

    /// Replaces the state file: after a crash at any moment it holds the old state or the new one.
    pub fn save(&self, state: &State) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec(state).map_err(|source| StoreError::Damaged {
            id: self.id.clone(),
            source,
        })?;
        text.push(b'\n');
        self.write(STATE_FILE, &text)
    }

    /// Keeps the configuration: edits of the bundle after create have no effect.
    pub fn save_config(&self, config: &[u8]) -> Result<(), StoreError> {
        self.write(CONFIG_FILE, config)
    }

    /// Removes the directory and all in it. The lock ends with it.
    pub fn remove(mut self) -> Result<(), StoreError> {
        self.temporary = false;
        self.remove_directory()
    }

    fn remove_directory(&self) -> Result<(), StoreError> {
        // What lay deeper is at the top now.
        while self.remove_content(&self.directory, MAX_DEPTH)? {}
        rustix::fs::unlinkat(&self.root, self.id.as_str(), AtFlags::REMOVEDIR)
            .map_err(|error| self.io("remove", ".", error))
    }

    /// True: something was too deep and has been moved to the top, where it is to be removed next.
    fn remove_content(&self, directory: &OwnedFd, depth: u32) -> Result<bool, StoreError> {
        let mut moved = false;
        let items = Dir::read_from(directory).map_err(|error| self.io("read", ".", error))?;
        for item in items {
            let item = item.map_err(|error| self.io("read", ".", error))?;
            let name = item.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let shown = name.to_string_lossy().into_owned();
            let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| self.io("look at", &shown, error))?;
            let flags = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                // Never into something mounted there, were it even from the same file system.
                let inner = rustix::fs::openat2(
                    directory,
                    name,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                    ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
                )
                .map_err(|error| match error {
                    Errno::XDEV => StoreError::MountInside {
                        id: self.id.clone(),
                        file: shown.clone(),
                    },
                    error => self.io("open", &shown, error),
                })?;
                let Some(depth) = depth.checked_sub(1) else {
                    // Its number is unique on its file system, and it was never at the top before.
                    let top = format!(".deep-{}", stat.st_ino);
                    rustix::fs::renameat(directory, name, &self.directory, top)
                        .map_err(|error| self.io("move", &shown, error))?;
                    moved = true;
                    continue;
                };
                moved |= self.remove_content(&inner, depth)?;
                AtFlags::REMOVEDIR
            } else {
                AtFlags::empty()
            };
            match rustix::fs::unlinkat(directory, name, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::BUSY) => {
                    return Err(StoreError::MountInside {
                        id: self.id.clone(),
                        file: shown,
                    });
                }
                Err(error) => return Err(self.io("remove", &shown, error)),
            }
        }
        Ok(moved)
    }

    fn write(&self, name: &'static str, content: &[u8]) -> Result<(), StoreError> {
        let temporary = format!(".{name}.new");
        let result = self.write_and_rename(name, &temporary, content);
        if result.is_err() {
            // Not worth a second message: the next write replaces it.
            let _ = rustix::fs::unlinkat(&self.directory, temporary.as_str(), AtFlags::empty());
        }
        result
    }

    fn write_and_rename(
        &self,
        name: &'static str,
        temporary: &str,
        content: &[u8],
    ) -> Result<(), StoreError> {
        let fail = |source: io::Error| StoreError::Io {
            id: self.id.clone(),
            operation: "write",
            file: name.to_owned(),
            source,
        };
        let file = rustix::fs::openat(
            &self.directory,
            temporary,
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )
        .map_err(|error| fail(error.into()))?;
        let mut file = File::from(file);
        file.write_all(content).map_err(fail)?;
        file.sync_data().map_err(fail)?;
        rustix::fs::renameat(&self.directory, temporary, &self.directory, name)
            .map_err(|error| fail(error.into()))?;
        rustix::fs::fsync(&self.directory).map_err(|error| fail(error.into()))
    }

    /// Whether the name still leads to this directory.
    fn is_current(&self) -> bool {
        let named = rustix::fs::statat(&self.root, self.id.as_str(), AtFlags::SYMLINK_NOFOLLOW);
        let own = rustix::fs::fstat(&self.directory);
        matches!((named, own), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
    }

    fn io(&self, operation: &'static str, file: &str, error: Errno) -> StoreError {
        StoreError::Io {
            id: self.id.clone(),
            operation,
            file: file.to_owned(),
            source: error.into(),
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = self.remove_directory()
        {
            log::warn!("{error}");
        }
    }
}

fn open_directory(root: &OwnedFd, id: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        root,
        id,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn load(directory: &OwnedFd, id: &str) -> Result<State, StoreError> {
    #[derive(Deserialize)]
    struct Version {
        version: u64,
    }
    let text = read(directory, id, STATE_FILE)?;
    let damaged = |source: serde_json::Error| {
        if source.is_eof() {
            StoreError::Truncated(id.to_owned())
        } else {
            StoreError::Damaged {
                id: id.to_owned(),
                source,
            }
        }
    };
    let Version { version } = serde_json::from_slice(&text).map_err(damaged)?;
    if version > u64::from(VERSION) {
        return Err(StoreError::Newer {
            id: id.to_owned(),
            found: version,
        });
    }
    let state: State = serde_json::from_slice(&text).map_err(damaged)?;
    if state.id != id {
        return Err(StoreError::Foreign {
            id: id.to_owned(),
            found: state.id,
        });
    }
    Ok(state)
}

fn read(directory: &OwnedFd, id: &str, name: &'static str) -> Result<Vec<u8>, StoreError> {
    let fail = |source: io::Error| StoreError::Io {
        id: id.to_owned(),
        operation: "read",
        file: name.to_owned(),
        source,
    };
    let file = rustix::fs::openat(
        directory,
        name,
        // Non-blocking: what is there may be a FIFO.
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| match error {
        Errno::NOENT if name == STATE_FILE => StoreError::NoState,
        Errno::LOOP | Errno::NXIO if name == STATE_FILE => StoreError::NotAFile(id.to_owned()),
        error => fail(error.into()),
    })?;
    let file = File::from(file);
    if name == STATE_FILE && !file.metadata().map_err(fail)?.is_file() {
        return Err(StoreError::NotAFile(id.to_owned()));
    }
    let mut text = Vec::new();
    file.take(MAX_STATE).read_to_end(&mut text).map_err(fail)?;
    Ok(text)
}

enum LockError {
    Deadline,
    Os(Errno),
}

/// flock(2) has no deadline of its own: when the lock is not free at once, a thread waits for it.
fn flock_within(directory: OwnedFd, deadline: Duration) -> Result<OwnedFd, LockError> {
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(directory),
        Err(Errno::WOULDBLOCK) => {}
        Err(error) => return Err(LockError::Os(error)),
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let result = rustix::fs::flock(&directory, FlockOperation::LockExclusive);
        // After the deadline nobody listens; the lock goes with the descriptor.
        let _ = sender.send(result.map(|()| directory));
    });
    match receiver.recv_timeout(deadline) {
        Ok(result) => result.map_err(LockError::Os),
        Err(_) => Err(LockError::Deadline),
    }
}

/// `/run/sandbox`, or below `$XDG_RUNTIME_DIR` for users that cannot write there: also for the root
/// of a user namespace, as rootless engines run commands.
fn default_root() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match runtime {
        Some(runtime) if !is_host_root() => Path::new(&runtime).join("sandbox"),
        _ => PathBuf::from("/run/sandbox"),
    }
}

/// Whether this is root and not only so in a user namespace.
pub fn is_host_root() -> bool {
    rustix::process::geteuid().is_root()
        && std::fs::read_to_string("/proc/self/uid_map")
            .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
}

/// The name of a user, or `#uid`.
pub fn user_name(uid: u32) -> String {
    std::fs::read_to_string("/etc/passwd")
        .ok()
        .and_then(|passwd| {
            passwd.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
            })
        })
        .unwrap_or_else(|| format!("#{uid}"))
}

#[cfg(test)]
mod tests;
