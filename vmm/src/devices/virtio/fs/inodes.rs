// SPDX-License-Identifier: Apache-2.0
//! The inodes that the guest knows.
//!
//! A node id is given out once and never again, so a stale one can only be refused, not mistaken. Behind it is the
//! identity of a host file and the place where it was seen last, a directory that is a node itself and a name in it.
//! The `O_PATH` descriptor of a file is opened when it is first needed, kept within a budget, and opened again from
//! that place if it was given up; a file found there with another identity is not the one the guest means (ESTALE, on
//! which the guest's kernel looks the path up anew). What has lost its last known name keeps its descriptor.
//!
//! So the number of open descriptors is bounded whatever the guest walks over, and the table can be rebuilt from names.

mod saved;

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Statx, StatxFlags};
use rustix::io::Errno;

use super::abi::ROOT_ID;
use super::inert::Inert;
use super::self_fd;
pub(super) use saved::SavedInodes;

/// A node id of the FUSE protocol.
pub(super) type NodeId = u64;

/// Mounts that a share may hold.
const MOUNTS: usize = 4096;
/// How many directories deep a place may be.
const DEPTH: usize = 16384;
/// OVERLAYFS_SUPER_MAGIC. Its files change their time of birth when they are copied up.
const OVERLAY: i64 = 0x794c_7630;

/// How much the guest can make the host keep.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) nodes: usize,
    /// Descriptors that can be given up.
    pub(super) cached: usize,
    /// Descriptors of files without a known name.
    pub(super) nameless: usize,
}

/// Which file of the host: no two that exist at the same time have the same. The mount is part of it because the same
/// file may be shared twice, once read-only. The time of birth tells a file from an earlier one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    mount: u64,
    device: (u32, u32),
    ino: u64,
    file_type: u32,
    birth: (i64, u32),
}

/// What does not change about a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Nature {
    /// Of the host's file.
    pub(super) file_type: FileType,
    /// The device that a regular file stands for.
    pub(super) inert: Option<Inert>,
    /// Nobody but the guest is expected to change it.
    pub(super) private: bool,
}

/// When a file was seen to change last: equal versions mean equal data, if the guest has not written in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    mtime: (i64, u32),
    ctime: (i64, u32),
    size: u64,
}

impl Version {
    pub(super) fn of(stat: &Statx) -> Version {
        Version {
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            size: stat.stx_size,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    parent: NodeId,
    name: CString,
}

#[derive(Debug)]
struct Node {
    identity: Identity,
    nature: Nature,
    /// How often the guest was told of it, less what it has forgotten.
    lookups: u64,
    /// Nodes whose place is in this one. It stays as long as there are any.
    children: usize,
    place: Option<Place>,
    path: Option<Arc<OwnedFd>>,
    recently_used: bool,
    version: Option<Version>,
}

impl Node {
    fn new(identity: Identity, nature: Nature, lookups: u64) -> Node {
        Node {
            identity,
            nature,
            lookups,
            children: 0,
            place: None,
            path: None,
            recently_used: false,
            version: None,
        }
    }
}

#[derive(Debug)]
struct Mount {
    has_birth: bool,
    /// The first file seen on it.
    anchor: Arc<OwnedFd>,
    file_type: FileType,
}

#[derive(Debug)]
struct Table {
    nodes: HashMap<NodeId, Node>,
    by_identity: HashMap<Identity, NodeId>,
    next: NodeId,
    mounts: HashMap<u64, Mount>,
    devices: HashMap<(u32, u32), u16>,
    /// Nodes with a descriptor that can be given up, and some that have none any more.
    clock: VecDeque<NodeId>,
    cached: usize,
    nameless: usize,
}

/// A directory that a name is about to be looked up in.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) node: NodeId,
    pub(super) path: Arc<OwnedFd>,
}

#[derive(Debug)]
pub(super) struct Inodes {
    root: Arc<OwnedFd>,
    limits: Limits,
    /// Names in the root of the share below which nobody but the guest is expected to change anything.
    private: Vec<CString>,
    table: Mutex<Table>,
}

impl Inodes {
    pub(super) fn new(
        root: OwnedFd,
        private: Vec<CString>,
        limits: Limits,
    ) -> Result<Inodes, Errno> {
        let root = Arc::new(root);
        let table = Table::new(&root)?;
        Ok(Inodes {
            root,
            limits,
            private,
            table: Mutex::new(table),
        })
    }

    /// Back to knowing the root only.
    pub(super) fn reset(&self) -> Result<(), Errno> {
        let table = Table::new(&self.root)?;
        *self.table() = table;
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn nature(&self, node: NodeId) -> Result<Nature, Errno> {
        let table = self.table();
        table
            .nodes
            .get(&node)
            .map(|node| node.nature)
            .ok_or(Errno::STALE)
    }

    /// A directory, to work with what is in it.
    pub(super) fn directory(&self, node: NodeId) -> Result<Directory, Errno> {
        if self.nature(node)?.file_type != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let path = self.path(node)?;
        Ok(Directory { node, path })
    }

    /// The descriptor of a node.
    pub(super) fn path(&self, node: NodeId) -> Result<Arc<OwnedFd>, Errno> {
        let (mut path, missing) = self.table().walk(node)?;
        for (node, name, identity) in missing.into_iter().rev() {
            let opened = self_fd::pin(&*path, &name).map_err(as_stale)?;
            let stat = self_fd::stat(&opened)?;
            if self.table().identity(&stat) != Some(identity) {
                return Err(Errno::STALE);
            }
            path = self.table().keep(node, opened, self.limits);
        }
        Ok(path)
    }

    /// The attributes of a node, if it is still where it was.
    pub(super) fn stat(&self, node: NodeId) -> Result<(Statx, Nature), Errno> {
        let (path, place, identity, nature) = {
            let table = self.table();
            let node = table.nodes.get(&node).ok_or(Errno::STALE)?;
            (
                node.path.clone(),
                node.place.clone(),
                node.identity,
                node.nature,
            )
        };
        if let Some(path) = path {
            return Ok((self_fd::stat(&*path)?, nature));
        }
        let Place { parent, name } = place.ok_or(Errno::STALE)?;
        let directory = self.path(parent)?;
        let stat = self_fd::stat_at(&*directory, &name).map_err(as_stale)?;
        if self.table().identity(&stat) != Some(identity) {
            return Err(Errno::STALE);
        }
        Ok((stat, nature))
    }

    /// Takes note of the mount that a file is on. `open` pins the file, and is called if the mount is new.
    pub(super) fn learn_mount(
        &self,
        stat: &Statx,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<(), Errno> {
        if self.table().mounts.contains_key(&stat.stx_mnt_id) {
            return Ok(());
        }
        let anchor = open()?;
        let again = self_fd::stat(&anchor)?;
        if again.stx_mnt_id != stat.stx_mnt_id {
            return Err(Errno::STALE);
        }
        self.table().add_mount(&again, anchor)
    }

    /// The guest is told of the file `name` in `directory`, whose mount is known.
    pub(super) fn add(
        &self,
        directory: NodeId,
        name: &CStr,
        stat: &Statx,
        inert: Option<Inert>,
    ) -> Result<(NodeId, Nature), Errno> {
        let mut table = self.table();
        let identity = table.identity(stat).ok_or(Errno::STALE)?;
        let place = Place {
            parent: directory,
            name: name.to_owned(),
        };
        if let Some(&id) = table.by_identity.get(&identity) {
            table.set_place(id, Some(place), self.limits);
            let node = table.nodes.get_mut(&id).ok_or(Errno::STALE)?;
            node.lookups = node.lookups.saturating_add(1);
            return Ok((id, node.nature));
        }
        let nature = Nature {
            file_type: self_fd::file_type(stat),
            inert,
            private: self.is_private(&table, directory, name, identity)?,
        };
        let id = table.insert(identity, nature, self.limits)?;
        table.set_place(id, Some(place), self.limits);
        Ok((id, nature))
    }

    /// Whether a file of this name is in a tree that belongs to the container alone.
    fn is_private(
        &self,
        table: &Table,
        directory: NodeId,
        name: &CStr,
        identity: Identity,
    ) -> Result<bool, Errno> {
        let parent = table.nodes.get(&directory).ok_or(Errno::STALE)?;
        Ok(if directory == ROOT_ID {
            self.private.iter().any(|private| **private == *name)
        } else {
            parent.nature.private && parent.identity.mount == identity.mount
        })
    }

    /// The guest is told of a file that has no name yet.
    pub(super) fn add_nameless(
        &self,
        directory: NodeId,
        stat: &Statx,
        path: OwnedFd,
    ) -> Result<(NodeId, Nature), Errno> {
        let mut table = self.table();
        let identity = table.identity(stat).ok_or(Errno::STALE)?;
        if table.nameless >= self.limits.nameless {
            return Err(Errno::NFILE);
        }
        let parent = table.nodes.get(&directory).ok_or(Errno::STALE)?;
        let nature = Nature {
            file_type: self_fd::file_type(stat),
            inert: None,
            private: parent.nature.private,
        };
        let id = table.insert(identity, nature, self.limits)?;
        table.nameless += 1;
        if let Some(node) = table.nodes.get_mut(&id) {
            node.path = Some(Arc::new(path));
        }
        Ok((id, nature))
    }

    pub(super) fn forget(&self, node: NodeId, count: u64) {
        if node == ROOT_ID {
            return;
        }
        let mut table = self.table();
        if let Some(known) = table.nodes.get_mut(&node) {
            known.lookups = known.lookups.saturating_sub(count);
            table.drop_unused(node);
        }
    }

    /// The node of the file that is now `name` in `directory`.
    pub(super) fn find(&self, directory: &Directory, name: &CStr) -> Option<NodeId> {
        let stat = self_fd::stat_at(&*directory.path, name).ok()?;
        let table = self.table();
        let identity = table.identity(&stat)?;
        table.by_identity.get(&identity).copied()
    }

    /// Before `node` loses the name it has in `directory`: its descriptor must be open if that is the name by which it
    /// is known.
    pub(super) fn hold(&self, node: NodeId, directory: NodeId, name: &CStr) {
        let known_by_it = self.table().is_at(node, directory, name);
        if known_by_it {
            // If that fails, the node is stale when its name is gone.
            let _ = self.path(node);
        }
    }

    /// `node` is not `name` in `directory` any more.
    pub(super) fn unlinked(&self, node: NodeId, directory: NodeId, name: &CStr) {
        let mut table = self.table();
        if table.is_at(node, directory, name) {
            table.set_place(node, None, self.limits);
        }
    }

    /// `node` is now `name` in `directory`.
    pub(super) fn moved(&self, node: NodeId, directory: NodeId, name: &CStr) {
        let place = Place {
            parent: directory,
            name: name.to_owned(),
        };
        self.table().set_place(node, Some(place), self.limits);
    }

    /// Whether `version` is what was seen last; it is what was seen last from now on.
    pub(super) fn is_unchanged(&self, node: NodeId, version: Version) -> bool {
        let mut table = self.table();
        let node = table.nodes.get_mut(&node);
        node.is_some_and(|node| node.version.replace(version) == Some(version))
    }

    /// The inode number that the guest shows to programs: that of the host, made unique over all file systems of the
    /// share.
    pub(super) fn number(&self, device: (u32, u32), ino: u64) -> u64 {
        self.table().number(device, ino)
    }

    /// Some file of each mount that can be opened.
    pub(super) fn anchors(&self) -> Vec<Arc<OwnedFd>> {
        let table = self.table();
        let openable = table
            .mounts
            .values()
            .filter(|mount| matches!(mount.file_type, FileType::Directory | FileType::RegularFile));
        openable.map(|mount| mount.anchor.clone()).collect()
    }

    /// How many nodes there are, and how many have a descriptor open.
    #[cfg(test)]
    pub(super) fn usage(&self) -> (usize, usize) {
        let table = self.table();
        let open = table.nodes.values().filter(|node| node.path.is_some());
        let open = open.count();
        assert_eq!(open, table.cached + table.nameless + 1);
        (table.nodes.len(), open)
    }
}

/// A place that does not lead anywhere any more.
fn as_stale(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        error => error,
    }
}

type Missing = Vec<(NodeId, CString, Identity)>;

impl Table {
    fn new(root: &Arc<OwnedFd>) -> Result<Table, Errno> {
        let stat = self_fd::stat(root)?;
        let mut table = Table {
            nodes: HashMap::new(),
            by_identity: HashMap::new(),
            next: ROOT_ID,
            mounts: HashMap::new(),
            devices: HashMap::new(),
            clock: VecDeque::new(),
            cached: 0,
            nameless: 0,
        };
        let anchor = root.try_clone().map_err(|_| Errno::NFILE)?;
        table.add_mount(&stat, anchor)?;
        let identity = table.identity(&stat).ok_or(Errno::STALE)?;
        let nature = Nature {
            file_type: self_fd::file_type(&stat),
            inert: None,
            private: false,
        };
        let limits = Limits {
            nodes: 1,
            cached: 0,
            nameless: 0,
        };
        let id = table.insert(identity, nature, limits)?;
        if let Some(node) = table.nodes.get_mut(&id) {
            node.path = Some(root.clone());
        }
        Ok(table)
    }

    fn add_mount(&mut self, stat: &Statx, anchor: OwnedFd) -> Result<(), Errno> {
        if self.mounts.len() >= MOUNTS {
            return Err(Errno::NFILE);
        }
        let mount = Mount {
            has_birth: rustix::fs::fstatfs(&anchor)?.f_type != OVERLAY,
            anchor: Arc::new(anchor),
            file_type: self_fd::file_type(stat),
        };
        self.mounts.insert(stat.stx_mnt_id, mount);
        // The first device keeps its inode numbers as they are.
        self.number((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino);
        Ok(())
    }

    /// `None` if the mount is not known: then no node is on it.
    fn identity(&self, stat: &Statx) -> Option<Identity> {
        let mount = self.mounts.get(&stat.stx_mnt_id)?;
        let mask = StatxFlags::from_bits_retain(stat.stx_mask);
        let birth = if mount.has_birth && mask.contains(StatxFlags::BTIME) {
            (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
        } else {
            (0, 0)
        };
        Some(Identity {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            file_type: self_fd::file_type(stat).as_raw_mode(),
            birth,
        })
    }

    fn insert(
        &mut self,
        identity: Identity,
        nature: Nature,
        limits: Limits,
    ) -> Result<NodeId, Errno> {
        if self.nodes.len() >= limits.nodes {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        self.by_identity.insert(identity, id);
        self.nodes.insert(id, Node::new(identity, nature, 1));
        Ok(id)
    }

    /// The nearest directory above `node`, or `node` itself, that has a descriptor, and what is below it on the way
    /// to `node`, the lowest first.
    fn walk(&mut self, node: NodeId) -> Result<(Arc<OwnedFd>, Missing), Errno> {
        let mut missing = Vec::new();
        let mut at = node;
        // Host-side renames can make the places of nodes a loop.
        while missing.len() < DEPTH {
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            node.recently_used = true;
            if let Some(path) = &node.path {
                return Ok((path.clone(), missing));
            }
            let place = node.place.as_ref().ok_or(Errno::STALE)?;
            missing.push((at, place.name.clone(), node.identity));
            at = place.parent;
        }
        Err(Errno::STALE)
    }

    /// Keeps `path` for `node`, which has a place, and gives up another one if there are too many.
    fn keep(&mut self, id: NodeId, path: OwnedFd, limits: Limits) -> Arc<OwnedFd> {
        let path = Arc::new(path);
        let Some(node) = self.nodes.get_mut(&id) else {
            return path;
        };
        if let Some(path) = &node.path {
            return path.clone();
        }
        if node.place.is_none() {
            return path;
        }
        node.path = Some(path.clone());
        self.cached += 1;
        self.clock.push_back(id);
        self.give_up(limits);
        path
    }

    /// Second chance: what was used since the hand passed last is passed once more.
    fn give_up(&mut self, limits: Limits) {
        let mut turns = self.clock.len() * 2;
        while self.cached > limits.cached && turns > 0 {
            turns -= 1;
            let Some(id) = self.clock.pop_front() else {
                return;
            };
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            if node.path.is_none() || node.place.is_none() {
                continue;
            }
            if std::mem::take(&mut node.recently_used) {
                self.clock.push_back(id);
            } else {
                node.path = None;
                self.cached -= 1;
            }
        }
        if self.clock.len() > 2 * self.cached + 64 {
            let nodes = &self.nodes;
            let mut seen = std::collections::HashSet::new();
            self.clock.retain(|id| {
                let node = nodes.get(id);
                node.is_some_and(|node| node.path.is_some() && node.place.is_some())
                    && seen.insert(*id)
            });
        }
    }

    fn is_at(&self, node: NodeId, directory: NodeId, name: &CStr) -> bool {
        let place = self.nodes.get(&node).and_then(|node| node.place.as_ref());
        place.is_some_and(|place| place.parent == directory && *place.name == *name)
    }

    fn set_place(&mut self, id: NodeId, place: Option<Place>, limits: Limits) {
        if id == ROOT_ID {
            return;
        }
        let place = place.filter(|place| self.nodes.contains_key(&place.parent));
        if let Some(place) = &place
            && let Some(parent) = self.nodes.get_mut(&place.parent)
        {
            parent.children += 1;
        }
        let Some(node) = self.nodes.get_mut(&id) else {
            if let Some(place) = place {
                self.release_parent(place.parent);
            }
            return;
        };
        let has_place = place.is_some();
        let before = std::mem::replace(&mut node.place, place);
        match (before.is_some(), has_place, node.path.is_some()) {
            (true, false, true) if self.nameless < limits.nameless => {
                self.cached -= 1;
                self.nameless += 1;
            }
            (true, false, true) => {
                self.cached -= 1;
                node.path = None;
            }
            (false, true, true) => {
                self.nameless -= 1;
                self.cached += 1;
                self.clock.push_back(id);
            }
            _ => {}
        }
        // Its number may now be given to another file.
        if node.place.is_none() && node.path.is_none() {
            self.disown(id);
        }
        if let Some(before) = before {
            self.release_parent(before.parent);
        }
        self.give_up(limits);
    }

    /// The identity of a node does not lead to it any more.
    fn disown(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get(&id)
            && let MapEntry::Occupied(entry) = self.by_identity.entry(node.identity)
            && *entry.get() == id
        {
            entry.remove();
        }
    }

    fn release_parent(&mut self, parent: NodeId) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
            self.drop_unused(parent);
        }
    }

    /// Removes a node that neither the guest nor another node needs, and then perhaps the one above it.
    fn drop_unused(&mut self, mut id: NodeId) {
        while id != ROOT_ID {
            let Some(node) = self.nodes.get(&id) else {
                return;
            };
            if node.lookups > 0 || node.children > 0 {
                return;
            }
            self.disown(id);
            let Some(node) = self.nodes.remove(&id) else {
                return;
            };
            if node.path.is_some() {
                let count = if node.place.is_some() {
                    &mut self.cached
                } else {
                    &mut self.nameless
                };
                *count -= 1;
            }
            let Some(place) = node.place else {
                return;
            };
            id = place.parent;
            if let Some(parent) = self.nodes.get_mut(&id) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    fn number(&mut self, device: (u32, u32), ino: u64) -> u64 {
        /// Bits of an inode number that are left when the top ones tell the file system.
        const BITS: u32 = 48;
        /// Top bits of numbers that do not fit.
        const FOLDED: u16 = 0x7fff;
        let index = match self.devices.get(&device) {
            Some(index) => *index,
            None => {
                let last = self.devices.values().max();
                let index = last.map_or(0, |last| last.saturating_add(1).min(FOLDED));
                self.devices.insert(device, index);
                index
            }
        };
        if ino >> BITS == 0 && index < FOLDED {
            return u64::from(index) << BITS | ino;
        }
        let device = u64::from(device.0) << 32 | u64::from(device.1);
        let mixed = (ino ^ device.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        u64::from(FOLDED) << BITS | (mixed ^ mixed >> 29) & ((1 << BITS) - 1)
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.path.as_fd()
    }
}
