// SPDX-License-Identifier: Apache-2.0
//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::inodes::NodeId;

/// Open files of one kind. As with node ids, a handle is given out once.
#[derive(Debug)]
pub(super) struct Handles<T> {
    limit: usize,
    table: Mutex<Table<T>>,
}

#[derive(Debug)]
struct Table<T> {
    open: HashMap<u64, (NodeId, Arc<T>)>,
    next: u64,
}

impl<T> Handles<T> {
    pub(super) fn new(limit: usize) -> Handles<T> {
        Handles {
            limit,
            table: Mutex::new(Table {
                open: HashMap::new(),
                next: 1,
            }),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table<T>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more can be opened.
    pub(super) fn check_room(&self) -> Result<(), Errno> {
        if self.table().open.len() < self.limit {
            Ok(())
        } else {
            Err(Errno::NFILE)
        }
    }

    pub(super) fn add(&self, node: NodeId, file: T) -> Result<u64, Errno> {
        let mut table = self.table();
        if table.open.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        let handle = table.next;
        table.next += 1;
        table.open.insert(handle, (node, Arc::new(file)));
        Ok(handle)
    }

    /// What `handle` stands for, if it is one of `node`.
    pub(super) fn get(&self, node: NodeId, handle: u64) -> Result<Arc<T>, Errno> {
        match self.table().open.get(&handle) {
            Some((of, file)) if *of == node => Ok(file.clone()),
            _ => Err(Errno::BADF),
        }
    }

    pub(super) fn remove(&self, node: NodeId, handle: u64) -> Result<(), Errno> {
        let removed = {
            let mut table = self.table();
            match table.open.get(&handle) {
                Some((of, _)) if *of == node => table.open.remove(&handle),
                _ => return Err(Errno::BADF),
            }
        };
        // Closing may take long; not under the lock.
        drop(removed);
        Ok(())
    }

    /// The number of the next handle, and what is open.
    pub(super) fn list(&self) -> (u64, Vec<(u64, NodeId, Arc<T>)>) {
        let table = self.table();
        let open = table.open.iter();
        let open = open.map(|(handle, (node, file))| (*handle, *node, file.clone()));
        (table.next, open.collect())
    }

    /// Handles of a snapshot: below `next`, each once, no more than there may be.
    pub(super) fn restore(&self, next: u64, files: Vec<(u64, NodeId, T)>) -> Result<(), Errno> {
        let count = files.len();
        let open: HashMap<_, _> = files
            .into_iter()
            .map(|(handle, node, file)| (handle, (node, Arc::new(file))))
            .collect();
        let known = open.keys().all(|handle| (1..next).contains(handle));
        if !known || open.len() != count || count > self.limit {
            return Err(Errno::INVAL);
        }
        *self.table() = Table { open, next };
        Ok(())
    }

    pub(super) fn clear(&self) {
        let open = std::mem::take(&mut self.table().open);
        drop(open);
    }
}
