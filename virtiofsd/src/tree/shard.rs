//! One part of the table of inodes: those whose identity falls here. It is used under one lock, which nobody holds during a system
//! call, except while a descriptor is closed.
//!
//! Descriptors are a cache. A clock goes over those that this part holds: one that was used since the last time stays, another is
//! closed to make room. Only of a file without a name the descriptor is more than a cache, and it stays.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hashbrown::HashTable;
use rustix::io::Errno;

use crate::tree::node::{Identity, Node};
use crate::tree::slots::{Key, Slots};

#[derive(Debug)]
pub(crate) struct Shard {
    nodes: Slots<Node>,
    /// Places of nodes, by identity.
    index: HashTable<u32>,
    seed: u64,
    /// Places of nodes that have a descriptor, and where the clock's hand is.
    open: Vec<u32>,
    hand: usize,
    most_open: usize,
}

impl Shard {
    pub(crate) fn new(epoch: u32, seed: u64, most_open: usize) -> Shard {
        let (nodes, index) = (Slots::new(epoch), HashTable::new());
        Shard { nodes, index, seed, open: Vec::new(), hand: 0, most_open }
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut Node> {
        self.nodes.get_mut(key)
    }

    /// The node of a file, if it is known. One that had the same number and is gone is not found any more.
    pub(crate) fn find(&mut self, identity: &Identity) -> Option<Key> {
        let hash = hash(self.seed, identity);
        let nodes = &self.nodes;
        let same = |place: &u32| nodes.at(*place).is_some_and(|node| node.identity.has_number(identity));
        let found = self.index.find_entry(hash, same).ok()?;
        let place = *found.get();
        if nodes.at(place).is_some_and(|node| node.identity.birth == identity.birth) {
            return nodes.key(place);
        }
        found.remove();
        None
    }

    /// A node that is not known.
    pub(crate) fn insert(&mut self, node: Node, most: u32) -> Option<Key> {
        let (seed, identity) = (self.seed, node.identity);
        let key = self.nodes.insert(node, most)?;
        let nodes = &self.nodes;
        let rehash = |place: &u32| nodes.at(*place).map_or(0, |node| hash(seed, &node.identity));
        self.index.insert_unique(hash(seed, &identity), key.place, rehash);
        Some(key)
    }

    /// Takes a node out that nobody refers to. Its descriptor is closed with it.
    pub(crate) fn remove(&mut self, key: Key) -> Option<Node> {
        let node = self.nodes.remove(key)?;
        if let Ok(entry) = self.index.find_entry(hash(self.seed, &node.identity), |place| *place == key.place) {
            entry.remove();
        }
        if node.fd.is_some() {
            self.open.retain(|place| *place != key.place);
        }
        Some(node)
    }

    /// Nothing is known any more.
    pub(crate) fn clear(&mut self) {
        self.nodes.clear();
        self.index.clear();
        self.open.clear();
    }

    /// Gives a node its descriptor, unless somebody else was faster; gives the one that it has.
    pub(crate) fn keep(&mut self, key: Key, fd: OwnedFd, orphan: bool) -> Result<Arc<OwnedFd>, Errno> {
        let node = self.nodes.get_mut(key).ok_or(Errno::STALE)?;
        node.orphan |= orphan;
        if let Some(fd) = &node.fd {
            return Ok(Arc::clone(fd));
        }
        if self.open.len() >= self.most_open && !self.make_room() && orphan {
            return Err(Errno::NFILE);
        }
        let fd = Arc::new(fd);
        if self.open.len() < self.most_open {
            let node = self.nodes.get_mut(key).ok_or(Errno::STALE)?;
            node.fd = Some(Arc::clone(&fd));
            node.warm = true;
            self.open.push(key.place);
        }
        Ok(fd)
    }

    /// The node has a name again, by which it can be reached.
    pub(crate) fn adopt(&mut self, key: Key) {
        if let Some(node) = self.nodes.get_mut(key) {
            node.orphan = false;
        }
    }

    /// Closes the descriptor that was not used for the longest time, more or less.
    fn make_room(&mut self) -> bool {
        for _ in 0..self.open.len().saturating_mul(2) {
            self.hand = if self.hand < self.open.len() { self.hand } else { 0 };
            let Some(place) = self.open.get(self.hand).copied() else { return false };
            match self.nodes.at_mut(place) {
                Some(node) if node.orphan => self.hand = self.hand.saturating_add(1),
                Some(node) if node.warm => {
                    node.warm = false;
                    self.hand = self.hand.saturating_add(1);
                }
                Some(node) => {
                    node.fd = None;
                    self.open.swap_remove(self.hand);
                    return true;
                }
                None => {
                    self.open.swap_remove(self.hand);
                }
            }
        }
        false
    }
}

/// Inode numbers are the host's, which a guest has some influence on: the seed keeps it from choosing where they fall.
pub(crate) fn hash(seed: u64, identity: &Identity) -> u64 {
    let mixed = (identity.ino ^ seed ^ (u64::from(identity.mount) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93)
}
