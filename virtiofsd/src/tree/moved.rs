//! Inodes that come from a tree on another host, under the numbers that they had there: the guest goes on using them.
//!
//! A number says which part of the table the inode is in, and there that followed from the inode's identity. Here its file has another
//! identity, and so belongs into another part: where it is in spite of that is noted in [`Elsewhere`], for as long as the process lives.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::io::Errno;

use crate::tree::node::{Identity, Kind, Node};
use crate::tree::{Found, ROOT, SHARDS, Text, Tree, hash, id_of, lock, node, place_of};

/// Inodes that are in another part of the table than their identity says.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    /// There are some. It is asked with each name that is looked up, and is false unless a guest came from elsewhere.
    any: AtomicBool,
    parts: RwLock<HashMap<(u64, u16), u8>>,
}

impl Elsewhere {
    pub(crate) fn get(&self, identity: &Identity) -> Option<u64> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let parts = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        parts.get(&(identity.ino, identity.mount)).map(|part| u64::from(*part))
    }

    fn set(&self, identity: &Identity, part: u64) {
        let mut parts = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        parts.insert((identity.ino, identity.mount), u8::try_from(part).unwrap_or_default());
        self.any.store(true, Ordering::Release);
    }

    fn clear(&self) {
        self.any.store(false, Ordering::Release);
        *self.parts.write().unwrap_or_else(PoisonError::into_inner) = HashMap::new();
    }
}

/// What is known of an inode, for whoever moves it.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) identity: Identity,
    pub(crate) kind: Kind,
    pub(crate) lookups: u64,
    pub(crate) parent: u64,
    pub(crate) name: Text,
    pub(crate) orphan: bool,
    pub(crate) fd: Option<Arc<OwnedFd>>,
}

/// Why an inode is not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Another one has its number, or nothing can have it here.
    Number,
    /// Its file is that of another one.
    Twice,
    /// The system's, or there are too many.
    Failed(Errno),
}

impl Tree {
    /// The numbers of all inodes: those in one directory after each other, so that each directory is opened once.
    pub(crate) fn all(&self) -> Vec<u64> {
        let mut all = Vec::new();
        for (number, shard) in (0..).zip(&self.shards) {
            let shard = lock(shard);
            all.extend(shard.all().map(|(key, node)| (node.parent, id_of(number, key))));
        }
        all.sort_unstable();
        all.into_iter().map(|(_, id)| id).collect()
    }

    /// What is known of an inode; `None` of one that is not known, and of the share itself.
    pub(crate) fn about(&self, id: u64) -> Option<About> {
        let about = self.with(id, |node| {
            Some(About {
                identity: node.identity,
                kind: node.kind,
                lookups: node.lookups,
                parent: node.parent,
                name: Text::new(&node.name)?,
                orphan: node.orphan,
                fd: node.fd.clone(),
            })
        });
        about?.ok()?
    }

    /// Knows nothing any more, and is ready for what comes from elsewhere. No ring is served.
    pub(crate) fn make_ready(&self) {
        self.shards.iter().for_each(|shard| lock(shard).renew());
        self.handles.renew();
        self.elsewhere.clear();
    }

    /// Takes an inode in under the number that the guest has for it. The directory it is in is there already.
    pub(crate) fn restore(&self, id: u64, lookups: u64, found: &Found<'_>, here: (&OwnedFd, &CStr)) -> Result<(), Refused> {
        let (number, key) = place_of(id).filter(|_| id != ROOT).ok_or(Refused::Number)?;
        let known = self.shard_of(&found.identity);
        if self.lock(known).find(&found.identity).is_some() {
            return Err(Refused::Twice);
        }
        self.hold(found.parent).map_err(Refused::Failed)?;
        let most = self.budget.nodes / 64;
        let taken = Node { lookups, handle: self.handle_of(&found.identity, here), ..node(found) };
        let taken = { self.lock(number).restore(key, taken, most) };
        if taken.is_none() {
            self.release(found.parent);
            return Err(Refused::Number);
        }
        if number != hash(!self.seed, &found.identity) % SHARDS {
            self.elsewhere.set(&found.identity, number);
        }
        Ok(())
    }

    /// After the last [`Tree::restore`].
    pub(crate) fn settle(&self) {
        self.shards.iter().for_each(|shard| lock(shard).settle());
        self.handles.settle();
    }
}
