// SPDX-License-Identifier: Apache-2.0
//! The inodes in a snapshot: by name below the root of the share, since nothing else of them means anything elsewhere.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::super::abi::ROOT_ID;
use super::super::inert::Inert;
use super::super::name::Name;
use super::super::self_fd;
use super::{DEPTH, Identity, Inodes, Nature, Node, NodeId, Place};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct SavedInodes {
    next: NodeId,
    nodes: Vec<SavedNode>,
    /// Of file systems, in the inode numbers that programs have seen.
    devices: Vec<((u32, u32), u16)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct SavedNode {
    id: NodeId,
    lookups: u64,
    /// As in a mode.
    file_type: u32,
    /// Where it is; none: it has lost its last known name.
    place: Option<(NodeId, Vec<u8>)>,
}

impl SavedInodes {
    /// The path that a node had below the root of the share.
    pub(in super::super) fn shown(&self, node: NodeId) -> String {
        let find = |id| self.nodes.iter().find(|saved| saved.id == id);
        shown(node, |id| find(id)?.place.clone())
    }
}

/// Puts a path together from places.
fn shown(node: NodeId, place: impl Fn(NodeId) -> Option<(NodeId, Vec<u8>)>) -> String {
    let mut names = Vec::new();
    let mut at = node;
    while at != ROOT_ID && names.len() < DEPTH {
        let Some((parent, name)) = place(at) else {
            names.push("(deleted)".to_owned());
            break;
        };
        names.push(String::from_utf8_lossy(&name).into_owned());
        at = parent;
    }
    names.reverse();
    names.join("/")
}

impl Inodes {
    pub(in super::super) fn save(&self) -> SavedInodes {
        let table = self.table();
        let nodes = table.nodes.iter().filter(|(id, _)| **id != ROOT_ID);
        let nodes = nodes.map(|(id, node)| SavedNode {
            id: *id,
            lookups: node.lookups,
            file_type: node.nature.file_type.as_raw_mode(),
            place: node
                .place
                .as_ref()
                .map(|place| (place.parent, place.name.as_bytes().to_vec())),
        });
        let devices = table.devices.iter();
        SavedInodes {
            next: table.next,
            nodes: nodes.collect(),
            devices: devices.map(|(device, index)| (*device, *index)).collect(),
        }
    }

    /// The path of a node below the root of the share, for messages.
    pub(in super::super) fn shown(&self, node: NodeId) -> String {
        let table = self.table();
        shown(node, |id| {
            let place = table.nodes.get(&id)?.place.as_ref()?;
            Some((place.parent, place.name.as_bytes().to_vec()))
        })
    }

    /// Whether the file of the node is at its place.
    pub(in super::super) fn is_in_place(&self, node: NodeId) -> bool {
        let (place, identity) = {
            let table = self.table();
            let Some(node) = table.nodes.get(&node) else {
                return false;
            };
            (node.place.clone(), node.identity)
        };
        let Some(Place { parent, name }) = place else {
            return node == ROOT_ID;
        };
        let found = self
            .path(parent)
            .and_then(|directory| self_fd::stat_at(&*directory, &name));
        found.is_ok_and(|stat| self.table().identity(&stat) == Some(identity))
    }

    /// The descriptor of a node that has lost its name.
    pub(in super::super) fn nameless(&self, node: NodeId) -> Option<Arc<OwnedFd>> {
        let table = self.table();
        let node = table.nodes.get(&node)?;
        node.path.clone().filter(|_| node.place.is_none())
    }

    /// Takes over the inodes of a snapshot. Those that are not found are stale from now on, as if they had been
    /// deleted.
    pub(in super::super) fn restore(&self, saved: &SavedInodes) -> Result<(), Errno> {
        self.reset()?;
        if saved.nodes.len() >= self.limits.nodes {
            return Err(Errno::NFILE);
        }
        let mut below: HashMap<NodeId, Vec<&SavedNode>> = HashMap::new();
        {
            let mut table = self.table();
            for node in &saved.nodes {
                let known = table.nodes.contains_key(&node.id) || node.id >= saved.next;
                if known {
                    return Err(Errno::INVAL);
                }
                // Until it is found.
                table.nodes.insert(node.id, Node::stale(node));
                if let Some((parent, _)) = &node.place {
                    below.entry(*parent).or_default().push(node);
                }
            }
            table.next = saved.next;
            // The first is that of the root, which is another one each time.
            let others = saved.devices.iter().filter(|(_, index)| *index != 0);
            for (device, index) in others {
                table.devices.entry(*device).or_insert(*index);
            }
        }
        let mut found = vec![ROOT_ID];
        while let Some(directory) = found.pop() {
            for node in below.remove(&directory).unwrap_or_default() {
                if self.find_again(directory, node).is_ok() {
                    found.push(node.id);
                }
            }
        }
        Ok(())
    }

    fn find_again(&self, directory: NodeId, saved: &SavedNode) -> Result<(), Errno> {
        let (_, name) = saved.place.as_ref().ok_or(Errno::STALE)?;
        let name = CString::new(name.as_slice()).map_err(|_| Errno::INVAL)?;
        Name::new(&name)?;
        let path = self.path(directory)?;
        let stat = self_fd::stat_at(&*path, &name)?;
        if self_fd::file_type(&stat).as_raw_mode() != saved.file_type {
            return Err(Errno::STALE);
        }
        self.learn_mount(&stat, || self_fd::pin(&*path, &name))?;
        let inert = Inert::look(&*path, &name, &stat)?;
        let mut table = self.table();
        let identity = table.identity(&stat).ok_or(Errno::STALE)?;
        let nature = Nature {
            file_type: self_fd::file_type(&stat),
            inert,
            private: self.is_private(&table, directory, &name, identity)?,
        };
        let node = table.nodes.get_mut(&saved.id).ok_or(Errno::STALE)?;
        node.identity = identity;
        node.nature = nature;
        table.by_identity.entry(identity).or_insert(saved.id);
        let place = Place {
            parent: directory,
            name,
        };
        table.set_place(saved.id, Some(place), self.limits);
        Ok(())
    }

    /// A stale node gets the nameless file behind `path`.
    pub(in super::super) fn give(&self, node: NodeId, path: OwnedFd) -> Result<(), Errno> {
        let stat = self_fd::stat(&path)?;
        let mut table = self.table();
        let identity = table.identity(&stat).ok_or(Errno::STALE)?;
        if table.nameless >= self.limits.nameless {
            return Err(Errno::NFILE);
        }
        let node = table.nodes.get_mut(&node).ok_or(Errno::STALE)?;
        if node.place.is_some() || node.path.is_some() {
            return Err(Errno::INVAL);
        }
        node.identity = identity;
        node.nature.file_type = self_fd::file_type(&stat);
        node.path = Some(Arc::new(path));
        table.nameless += 1;
        Ok(())
    }
}

impl Node {
    /// A node that leads nowhere.
    fn stale(saved: &SavedNode) -> Node {
        let identity = Identity {
            mount: 0,
            device: (0, 0),
            ino: 0,
            file_type: saved.file_type,
            birth: (0, 0),
        };
        let nature = Nature {
            file_type: FileType::from_raw_mode(saved.file_type),
            inert: None,
            private: false,
        };
        Node::new(identity, nature, saved.lookups)
    }
}
