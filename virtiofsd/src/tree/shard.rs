//! One part of the table of inodes: those whose identity falls here. It is used under one lock, which nobody holds during a system
//! call, except while a descriptor is closed.
//!
//! Descriptors are a cache. A clock goes over those that this part holds: one that was used since the last time stays, another is
//! closed to make room. Only of a file without a name the descriptor is more than a cache, and it stays.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// How many of those have no name, and stay.
    orphans: usize,
    most_cached: usize,
    nameless: Arc<Nameless>,
}

/// Files without a name, of all parts together.
#[derive(Debug)]
pub(crate) struct Nameless {
    count: AtomicUsize,
    most: usize,
}

impl Nameless {
    pub(crate) fn new(most: usize) -> Nameless {
        Nameless { count: AtomicUsize::new(0), most }
    }

    /// One more, if there may be.
    fn add(&self) -> Result<(), Errno> {
        if self.count.fetch_add(1, Ordering::Relaxed) < self.most {
            return Ok(());
        }
        self.remove(1);
        Err(Errno::NFILE)
    }

    fn remove(&self, count: usize) {
        self.count.fetch_sub(count, Ordering::Relaxed);
    }
}

impl Shard {
    pub(crate) fn new(epoch: u32, seed: u64, most_cached: usize, nameless: Arc<Nameless>) -> Shard {
        let (nodes, index) = (Slots::new(epoch), HashTable::new());
        Shard { nodes, index, seed, open: Vec::new(), hand: 0, orphans: 0, most_cached, nameless }
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut Node> {
        self.nodes.get_mut(key)
    }

    /// The node of a file, if it is known. One that had the same number and is gone is not found any more.
    pub(crate) fn find(&mut self, identity: &Identity) -> Option<Key> {
        let hash = hash(self.seed, identity);
        loop {
            let nodes = &self.nodes;
            let same = |place: &u32| nodes.at(*place).is_some_and(|node| node.identity.has_number(identity));
            let found = self.index.find_entry(hash, same).ok()?;
            let place = *found.get();
            if nodes.at(place).is_some_and(|node| node.identity.birth == identity.birth) {
                return nodes.key(place);
            }
            // A file that never had a name may stand behind one that is gone.
            found.remove();
        }
    }

    /// A node that is not known.
    pub(crate) fn insert(&mut self, node: Node, most: u32) -> Option<Key> {
        let identity = node.identity;
        let key = self.nodes.insert(node, most)?;
        self.list(key.place, identity);
        Some(key)
    }

    /// The same under the key that it had elsewhere.
    pub(crate) fn restore(&mut self, key: Key, node: Node, most: u32) -> Option<()> {
        let identity = node.identity;
        self.nodes.restore(key, node, most)?;
        self.list(key.place, identity);
        Some(())
    }

    pub(crate) fn renew(&mut self) {
        self.clear();
        self.nodes.renew();
    }

    pub(crate) fn settle(&mut self) {
        self.nodes.settle();
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (Key, &Node)> {
        self.nodes.all()
    }

    fn list(&mut self, place: u32, identity: Identity) {
        let (seed, nodes) = (self.seed, &self.nodes);
        let rehash = |place: &u32| nodes.at(*place).map_or(0, |node| hash(seed, &node.identity));
        self.index.insert_unique(hash(seed, &identity), place, rehash);
    }

    /// Takes a node out that nobody refers to. Its descriptor is closed with it.
    pub(crate) fn remove(&mut self, key: Key) -> Option<Node> {
        let node = self.nodes.remove(key)?;
        if let Ok(entry) = self.index.find_entry(hash(self.seed, &node.identity), |place| *place == key.place) {
            entry.remove();
        }
        if node.fd.is_some() {
            self.open.retain(|place| *place != key.place);
            self.lose(usize::from(node.orphan));
        }
        Some(node)
    }

    /// Nothing is known any more.
    pub(crate) fn clear(&mut self) {
        self.nodes.clear();
        self.index.clear();
        self.open.clear();
        self.lose(self.orphans);
    }

    fn lose(&mut self, orphans: usize) {
        self.orphans = self.orphans.saturating_sub(orphans);
        self.nameless.remove(orphans);
    }

    /// Gives a node its descriptor, unless somebody else was faster; gives the one that it has.
    pub(crate) fn keep(&mut self, key: Key, fd: OwnedFd, orphan: bool) -> Result<Arc<OwnedFd>, Errno> {
        let node = self.nodes.get_mut(key).ok_or(Errno::STALE)?;
        let becomes = orphan && !node.orphan;
        if becomes {
            self.nameless.add()?;
        }
        if let Some(fd) = &node.fd {
            let fd = Arc::clone(fd);
            node.orphan |= orphan;
            self.orphans = self.orphans.saturating_add(usize::from(becomes));
            return Ok(fd);
        }
        let fd = Arc::new(fd);
        let cached = self.open.len().saturating_sub(self.orphans);
        if orphan || cached < self.most_cached || self.make_room() {
            let node = self.nodes.get_mut(key).ok_or(Errno::STALE)?;
            node.fd = Some(Arc::clone(&fd));
            // Not before: without a descriptor its name is the only way to it.
            node.orphan |= orphan;
            node.warm = true;
            self.orphans = self.orphans.saturating_add(usize::from(becomes));
            self.open.push(key.place);
        }
        Ok(fd)
    }

    /// The node has a name again, by which it can be reached.
    pub(crate) fn adopt(&mut self, key: Key) {
        if let Some(node) = self.nodes.get_mut(key) {
            let was = std::mem::replace(&mut node.orphan, false) && node.fd.is_some();
            self.lose(usize::from(was));
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
