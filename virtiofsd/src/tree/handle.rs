//! Open files and directories, by the numbers that the guest has for them.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::tree::slots::{Key, Slots};

const SHARDS: u64 = 16;
const SHARD_BITS: u32 = 4;
const PLACE_BITS: u32 = 28;

/// Files that are open because a guest read them that does not open files.
pub(crate) const KEPT: usize = 24;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    /// The file.
    pub(crate) file: OwnedFd,
    /// Which inode it is. A handle is good for no other.
    pub(crate) node: u64,
    /// Of a directory: how far it has been read, and a lock on that. `None`: a file.
    pub(crate) cursor: Option<Mutex<u64>>,
    /// It had a set-user-id or set-group-id bit, or may have by now.
    pub(crate) privileged: AtomicBool,
    /// Data that is not in memory cannot be told from data that is; or always comes from the disk.
    pub(crate) patient: AtomicBool,
    /// Its file system asks somebody else.
    pub(crate) slow: bool,
    /// The whole file was locked by way of it, here on the host.
    pub(crate) locked: AtomicBool,
}

impl Handle {
    /// A file, or a directory that is read from this place.
    pub(crate) fn new(file: OwnedFd, node: u64, cursor: Option<u64>, slow: bool) -> Handle {
        let flag = || AtomicBool::new(false);
        let cursor = cursor.map(Mutex::new);
        Handle { file, node, cursor, privileged: flag(), patient: flag(), slow, locked: flag() }
    }
}

/// All handles of a share.
#[derive(Debug)]
pub(crate) struct Handles {
    shards: Box<[Mutex<Slots<Arc<Handle>>>]>,
    count: AtomicU32,
    most: u32,
    /// Each in the place that its inode's number gives it, until another comes there.
    kept: [Mutex<Option<Arc<Handle>>>; KEPT],
}

impl Handles {
    pub(crate) fn new(epoch: u32, most: u32) -> Handles {
        let shards = (0..SHARDS).map(|_| Mutex::new(Slots::new(epoch))).collect();
        Handles { shards, count: AtomicU32::new(0), most, kept: [const { Mutex::new(None) }; KEPT] }
    }

    /// A number for a handle.
    ///
    /// # Errors
    /// When there are too many.
    pub(crate) fn insert(&self, handle: Handle) -> Result<u64, Errno> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        // Handles of one inode are together, which is of no use but to find them; inodes are spread.
        let number = (handle.node ^ (handle.node >> 6)) % SHARDS;
        let inserted = if count < self.most { self.lock(number).insert(Arc::new(handle), 1 << PLACE_BITS) } else { None };
        match inserted {
            Some(key) => Ok(number_of(number, key)),
            None => {
                self.count.fetch_sub(1, Ordering::Relaxed);
                Err(Errno::NFILE)
            }
        }
    }

    /// Gives a handle the number that it had elsewhere. `None`: it is none, or taken.
    ///
    /// # Errors
    /// When there are too many.
    pub(crate) fn restore(&self, number: u64, handle: Handle) -> Result<Option<()>, Errno> {
        let (shard, key) = place_of(number)?;
        if self.count.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.count.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::NFILE);
        }
        // No table was ever longer than there may be handles.
        let restored = self.lock(shard).restore(key, Arc::new(handle), self.most);
        if restored.is_none() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(restored)
    }

    /// None, and room for none.
    pub(crate) fn renew(&self) {
        self.clear();
        (0..SHARDS).for_each(|number| self.lock(number).renew());
    }

    /// After the last [`Handles::restore`].
    pub(crate) fn settle(&self) {
        (0..SHARDS).for_each(|number| self.lock(number).settle());
    }

    /// All of them, with their numbers.
    pub(crate) fn all(&self) -> Vec<(u64, Arc<Handle>)> {
        let of = |number: u64| -> Vec<_> {
            self.lock(number).all().map(|(key, handle)| (number_of(number, key), Arc::clone(handle))).collect()
        };
        (0..SHARDS).flat_map(of).collect()
    }

    /// The handle of this number, if it is one of this inode.
    pub(crate) fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let (shard, key) = place_of(number)?;
        let mut shard = self.lock(shard);
        let handle = shard.get_mut(key).filter(|handle| handle.node == node).ok_or(Errno::BADF)?;
        Ok(Arc::clone(handle))
    }

    /// Takes a handle out. It is closed when the last request that uses it is done.
    pub(crate) fn remove(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let (shard, key) = place_of(number)?;
        let mut shard = self.lock(shard);
        if shard.get_mut(key).is_none_or(|handle| handle.node != node) {
            return Err(Errno::BADF);
        }
        let removed = shard.remove(key).ok_or(Errno::BADF)?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Ok(removed)
    }

    /// A file of this inode that has no number, if there is one.
    pub(crate) fn kept(&self, node: u64) -> Option<Arc<Handle>> {
        self.place(node).as_ref().filter(|handle| handle.node == node).map(Arc::clone)
    }

    /// Keeps a file for a while, without a number.
    pub(crate) fn keep(&self, handle: Handle) -> Arc<Handle> {
        let handle = Arc::new(handle);
        let _closed_unlocked = self.place(handle.node).replace(Arc::clone(&handle));
        handle
    }

    fn place(&self, node: u64) -> MutexGuard<'_, Option<Arc<Handle>>> {
        // Shard and place of an inode are in the lower bits of its number.
        let index = usize::try_from((node ^ (node >> 6)) % KEPT as u64).unwrap_or_default();
        #[expect(clippy::indexing_slicing, reason = "there are as many as the remainder may be")]
        self.kept[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn clear(&self) {
        for place in &self.kept {
            place.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let removed = shard.len();
            shard.clear();
            self.count.fetch_sub(removed, Ordering::Relaxed);
        }
    }

    fn lock(&self, number: u64) -> MutexGuard<'_, Slots<Arc<Handle>>> {
        let index = usize::try_from(number % SHARDS).unwrap_or_default();
        #[expect(clippy::indexing_slicing, reason = "there are as many as the remainder may be")]
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn number_of(shard: u64, key: Key) -> u64 {
    u64::from(key.generation) << (SHARD_BITS + PLACE_BITS) | u64::from(key.place) << SHARD_BITS | shard
}

fn place_of(number: u64) -> Result<(u64, Key), Errno> {
    let generation = u32::try_from(number >> (SHARD_BITS + PLACE_BITS)).map_err(|_| Errno::BADF)?;
    let place = u32::try_from((number >> SHARD_BITS) & ((1 << PLACE_BITS) - 1)).map_err(|_| Errno::BADF)?;
    Ok((number % SHARDS, Key { place, generation }))
}
