//! What a successor has to know: the inodes that the guest knows, and its open files.
//!
//! # Inodes
//!
//! An inode is known by its number, its mount and its time of birth, and reached by a descriptor or by its parent and its name there.
//! A name is believed only as far as what is found under it is the same inode; else the guest is told that its knowledge is stale, and
//! looks again. So descriptors are a cache of bounded size, however many inodes the guest knows.
//!
//! A node lives as long as the guest has references to it (lookup count) or nodes have it as their parent. What the guest says about its
//! references can only make it lose its own.
//!
//! The table is in parts, each under a lock of its own; which part an inode is in is told by its identity, and stands in its number. No
//! two of these locks are held at once.
//!
//! # Handles
//!
//! See [`handle`].

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;

use crate::request::Name;
use crate::sys;

pub(crate) mod file_handle;
pub(crate) mod handle;
pub(crate) mod moved;
pub(crate) mod node;
mod shard;
mod slots;

use file_handle::FileHandle;
use handle::Handles;
use moved::Elsewhere;
use node::{Identity, Kind, MAX_MOUNTS, Mounts, Node};
use shard::{Nameless, Shard, hash};
use slots::Key;

/// The share's own directory.
pub(crate) const ROOT: u64 = 1;

const SHARDS: u64 = 64;
const SHARD_BITS: u32 = 6;
const PLACE_BITS: u32 = 26;

/// What is asked about a file.
pub(crate) const LOOK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// Most directories between the share and a file that are opened one after the other to reach it.
pub(crate) const MAX_DEPTH: usize = 16 * 1024;

/// How names are followed: not at all.
pub(crate) const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// What of this there may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Inodes.
    pub(crate) nodes: u32,
    /// Descriptors of inodes, kept as a cache.
    pub(crate) descriptors: usize,
    /// Descriptors of inodes without a name.
    pub(crate) orphans: usize,
    /// Open files and directories.
    pub(crate) handles: u32,
}

/// All inodes and handles of one share.
#[derive(Debug)]
pub(crate) struct Tree {
    root: Root,
    shards: Box<[Mutex<Shard>]>,
    seed: u64,
    budget: Budget,
    pub(crate) mounts: Mounts,
    pub(crate) handles: Handles,
    /// Mount points are not crossed.
    one_mount: bool,
    /// The share, open for reading: inodes on its own mount are reached by their handles.
    by_handle: Option<OwnedFd>,
    /// For the moment they are not: whoever asks may not open files by handles.
    by_name: AtomicBool,
    elsewhere: Elsewhere,
    /// Where file systems that ask somebody else are mounted: the directory, and the name there.
    slow_names: Mutex<Vec<(u64, Box<[u8]>)>>,
}

/// The share itself.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) kind: Kind,
    pub(crate) mount: u16,
}

/// A file that was found, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'a> {
    pub(crate) identity: Identity,
    pub(crate) kind: Kind,
    pub(crate) parent: u64,
    pub(crate) name: Name<'a>,
}

/// How to come to an inode.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is looked into at once, and kept nowhere")]
pub(crate) enum Way {
    Open(Arc<OwnedFd>),
    Named { parent: u64, name: Text, identity: Identity, again: bool },
}

/// A name, copied.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    bytes: [u8; 256],
}

impl Text {
    pub(crate) fn new(name: &[u8]) -> Option<Text> {
        let mut bytes = [0; 256];
        // The last byte stays zero.
        bytes.get_mut(..255)?.get_mut(..name.len())?.copy_from_slice(name);
        Some(Text { bytes })
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

impl Tree {
    /// A tree that knows its root only. `random` makes its numbers ones that no other process had.
    pub(crate) fn new(root: OwnedFd, budget: Budget, one_mount: bool, random: [u64; 2]) -> Result<Tree, Errno> {
        let [seed, epoch] = random;
        let [a, b, c, d, ..] = epoch.to_ne_bytes();
        let epoch = u32::from_ne_bytes([a, b, c, d]);
        let nameless = Arc::new(Nameless::new(budget.orphans));
        let cached = (budget.descriptors / 64).max(1);
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::new(epoch, seed, cached, Arc::clone(&nameless)))).collect();
        let mounts = Mounts::new();
        let stat = look(&root, c"")?;
        let mount = mounts.number(&stat, || is_slow(&root))?;
        let root = Root { fd: Arc::new(root), kind: Kind::of(stat.stx_mode), mount };
        let handles = Handles::new(epoch, budget.handles);
        Ok(Tree {
            root,
            shards,
            seed,
            budget,
            mounts,
            handles,
            one_mount,
            by_handle: None,
            by_name: AtomicBool::new(false),
            elsewhere: Elsewhere::default(),
            slow_names: Mutex::default(),
        })
    }

    /// Inodes are reached by their handles from now on, by way of the share, which is open for reading.
    pub(crate) fn reach_by_handle(&mut self, share: OwnedFd) {
        self.by_handle = Some(share);
    }

    /// Does something for which inodes are reached by their names alone. No ring is served.
    pub(crate) fn by_names<T>(&self, work: impl FnOnce() -> T) -> T {
        self.by_name.store(true, Ordering::Relaxed);
        let done = work();
        self.by_name.store(false, Ordering::Relaxed);
        done
    }

    /// Whether they are.
    pub(crate) fn reaches_by_handle(&self) -> bool {
        self.by_handle.is_some()
    }

    /// What the file system calls a file that is looked at for the first time. A handle that is missing is made up for by the name.
    fn handle_of(&self, identity: &Identity, (dir, name): (&OwnedFd, &CStr)) -> FileHandle {
        let asked = self.by_handle.is_some() && identity.mount == self.root.mount;
        if asked { FileHandle::of(dir.as_fd(), name).unwrap_or_default() } else { FileHandle::None }
    }

    /// How names are followed here.
    pub(crate) fn resolve(&self) -> ResolveFlags {
        if self.one_mount { RESOLVE.union(ResolveFlags::NO_XDEV) } else { RESOLVE }
    }

    /// The identity of a file that was looked at under a name.
    pub(crate) fn identify(&self, stat: &Statx, dir: &OwnedFd, name: &CStr) -> Result<Identity, Errno> {
        let slow = || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat2(dir, name, flags, Mode::empty(), RESOLVE).is_ok_and(|file| is_slow(&file))
        };
        Ok(Identity::of(stat, self.mounts.number(stat, slow)?))
    }

    /// The identity of an open file.
    pub(crate) fn identify_open(&self, stat: &Statx, file: &OwnedFd) -> Result<Identity, Errno> {
        Ok(Identity::of(stat, self.mounts.number(stat, || is_slow(file))?))
    }

    /// The guest is about to learn of a file, which is here: one reference more. Gives its number.
    pub(crate) fn refer(&self, found: &Found<'_>, here: (&OwnedFd, &CStr)) -> Result<u64, Errno> {
        let number = self.shard_of(&found.identity);
        if let Some(id) = self.refer_again(number, found) {
            return Ok(id);
        }
        self.hold(found.parent)?;
        let handle = self.handle_of(&found.identity, here);
        let mut replaced = None;
        let referred = {
            let mut shard = self.lock(number);
            match shard.find(&found.identity) {
                Some(key) => {
                    replaced = rename(&mut shard, key, found);
                    if let Some(node) = shard.get_mut(key) {
                        node.lookups = node.lookups.saturating_add(1);
                    }
                    Ok(id_of(number, key))
                }
                None => {
                    let most = self.budget.nodes / 64;
                    shard.insert(Node { handle, ..node(found) }, most).map(|key| id_of(number, key)).ok_or(Errno::NOMEM)
                }
            }
        };
        if referred.is_err() {
            replaced = Some(found.parent);
        }
        if let Some(parent) = replaced {
            self.release(parent);
        }
        referred
    }

    /// The same for a file that is known under this very name.
    fn refer_again(&self, number: u64, found: &Found<'_>) -> Option<u64> {
        let mut shard = self.lock(number);
        let key = shard.find(&found.identity)?;
        let node = shard.get_mut(key)?;
        let same = !node.orphan && node.parent == found.parent && *node.name == *found.name.as_c_str().to_bytes();
        same.then(|| {
            node.lookups = node.lookups.saturating_add(1);
            id_of(number, key)
        })
    }

    /// A file that the guest may know has another name now.
    pub(crate) fn moved(&self, found: &Found<'_>) {
        if self.hold(found.parent).is_err() {
            return;
        }
        let number = self.shard_of(&found.identity);
        let released = {
            let mut shard = self.lock(number);
            match shard.find(&found.identity) {
                Some(key) => rename(&mut shard, key, found),
                None => Some(found.parent),
            }
        };
        if let Some(parent) = released {
            self.release(parent);
        }
    }

    /// A file is about to lose this name. If it is the name by which the guest knows it, then from now on it is reached by this
    /// descriptor alone. Gives whether that is so.
    pub(crate) fn orphan(&self, identity: &Identity, parent: u64, name: Name<'_>, fd: OwnedFd) -> Result<bool, Errno> {
        let mut shard = self.lock(self.shard_of(identity));
        let Some(key) = shard.find(identity) else { return Ok(false) };
        let known = shard.get_mut(key).is_some_and(|node| node.parent == parent && *node.name == *name.as_c_str().to_bytes());
        if known {
            shard.keep(key, fd, true)?;
        }
        Ok(known)
    }

    /// It has kept its name after all.
    pub(crate) fn adopt(&self, identity: &Identity) {
        let mut shard = self.lock(self.shard_of(identity));
        if let Some(key) = shard.find(identity) {
            shard.adopt(key);
        }
    }

    /// A file that never had a name: one reference of the guest's.
    pub(crate) fn refer_nameless(&self, identity: Identity, parent: u64, fd: OwnedFd) -> Result<u64, Errno> {
        self.hold(parent)?;
        let number = self.shard_of(&identity);
        let kept = {
            let mut shard = self.lock(number);
            // It becomes one without a name, and is counted as such, with its descriptor.
            let inserted = shard.insert(blank(identity, Kind::REGULAR, parent), self.budget.nodes / 64).ok_or(Errno::NOMEM);
            inserted.and_then(|key| match shard.keep(key, fd, true) {
                Ok(_) => Ok(id_of(number, key)),
                Err(errno) => {
                    shard.remove(key);
                    Err(errno)
                }
            })
        };
        if kept.is_err() {
            self.release(parent);
        }
        kept
    }

    /// The guest gives references back: at most those that it has.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        if id == ROOT {
            return;
        }
        let Some((number, key)) = place_of(id) else { return };
        let left = {
            let mut shard = self.lock(number);
            let Some(node) = shard.get_mut(key) else { return };
            node.lookups = node.lookups.saturating_sub(count);
            let unused = node.lookups == 0 && node.children == 0;
            if unused { shard.remove(key) } else { None }
        };
        if let Some(node) = left {
            self.release(node.parent);
        }
    }

    /// The guest knows nothing any more.
    pub(crate) fn forget_all(&self) {
        for shard in &self.shards {
            lock(shard).clear();
        }
        self.handles.clear();
    }

    /// The type of an inode.
    pub(crate) fn kind(&self, id: u64) -> Result<Kind, Errno> {
        self.with(id, |node| node.kind).unwrap_or(Ok(self.root.kind))
    }

    /// The directory in which an inode was found. The share itself is its own.
    pub(crate) fn parent(&self, id: u64) -> u64 {
        self.with(id, |node| node.parent).and_then(Result::ok).unwrap_or(ROOT)
    }

    /// The mount that an inode is on.
    pub(crate) fn mount(&self, id: u64) -> Result<u16, Errno> {
        self.with(id, |node| node.identity.mount).unwrap_or(Ok(self.root.mount))
    }

    /// Whether an inode's file system asks somebody else.
    pub(crate) fn is_slow(&self, id: u64) -> bool {
        self.mount(id).is_ok_and(|mount| self.mounts.get(mount).is_some_and(|mount| mount.slow))
    }

    /// Whether a name in a directory, or one of all of them, is that of a file system which asks somebody else: to look it up is to wait.
    pub(crate) fn leads_to_slow(&self, dir: u64, name: Option<Name<'_>>) -> bool {
        let is = |(known, own): &(u64, Box<[u8]>)| *known == dir && name.is_none_or(|name| **own == *name.as_c_str().to_bytes());
        self.slow_names().iter().any(is)
    }

    /// It is. What is known of those that were found longest ago is forgotten when there are too many.
    pub(crate) fn note_slow(&self, dir: u64, name: Name<'_>) {
        if self.leads_to_slow(dir, Some(name)) {
            return;
        }
        let mut names = self.slow_names();
        if names.len() >= MAX_MOUNTS {
            names.remove(0);
        }
        names.push((dir, name.as_c_str().to_bytes().into()));
    }

    fn slow_names(&self) -> MutexGuard<'_, Vec<(u64, Box<[u8]>)>> {
        self.slow_names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to come to an inode.
    pub(crate) fn way(&self, id: u64) -> Result<Way, Errno> {
        let way = self.with(id, |node| match &node.fd {
            Some(fd) => {
                node.warm = true;
                Ok(Way::Open(Arc::clone(fd)))
            }
            None if node.orphan => Err(Errno::STALE),
            None => {
                let name = Text::new(&node.name).ok_or(Errno::STALE)?;
                // Asked about twice: it will be again.
                let again = std::mem::replace(&mut node.warm, true);
                Ok(Way::Named { parent: node.parent, name, identity: node.identity, again })
            }
        });
        way.map_or_else(|| Ok(Way::Open(Arc::clone(&self.root.fd))), |way| way?)
    }

    /// A descriptor of an inode, opened as a path only.
    ///
    /// Directories are reached by their handles, where they have some. Files are so only if their names do not lead to them any more: a
    /// file that nobody has reached by a name lately has no place in the tree then, and Landlock lets it have no other name.
    pub(crate) fn fd(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.fd_by_names(id) {
            Err(Errno::STALE) => self.keep(id, self.open_by_handle(id, |_| true).ok_or(Errno::STALE)?),
            fd => fd,
        }
    }

    fn fd_by_names(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let mut down = Vec::new();
        let mut at = id;
        let mut fd = loop {
            match self.way(at)? {
                Way::Open(fd) => break fd,
                Way::Named { parent, name, identity, .. } => {
                    if let Some(file) = self.open_by_handle(at, |kind| kind == Kind::DIRECTORY) {
                        break self.keep(at, file)?;
                    }
                    down.push((at, name, identity));
                    at = parent;
                }
            }
            if down.len() > MAX_DEPTH {
                return Err(Errno::LOOP);
            }
        };
        while let Some((id, name, identity)) = down.pop() {
            let file = self.open_as_path(&fd, name.as_c_str(), &identity)?;
            fd = self.keep(id, file)?;
        }
        Ok(fd)
    }

    /// A descriptor of a directory, opened as a path only.
    pub(crate) fn directory(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let fd = self.fd(id)?;
        if self.kind(id)? == Kind::DIRECTORY { Ok(fd) } else { Err(Errno::NOTDIR) }
    }

    fn open_as_path(&self, dir: &OwnedFd, name: &CStr, identity: &Identity) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat2(dir, name, flags, Mode::empty(), self.resolve()).map_err(gone)?;
        if self.identify_open(&look(&file, c"")?, &file)? == *identity { Ok(file) } else { Err(Errno::STALE) }
    }

    /// The same by the handle of an inode of some kind, whatever name it has by now.
    fn open_by_handle(&self, id: u64, kind: impl FnOnce(Kind) -> bool) -> Option<OwnedFd> {
        let share = self.by_handle.as_ref().filter(|_| !self.by_name.load(Ordering::Relaxed))?;
        let known = self.with(id, |node| kind(node.kind).then(|| Some((node.handle.raw()?, node.identity))).flatten());
        let (handle, identity) = known?.ok()??;
        let file = sys::open_by_handle_at(share.as_fd(), &handle).ok()?;
        let found = self.identify_open(&look(&file, c"").ok()?, &file).ok()?;
        (found == identity).then_some(file)
    }

    fn keep(&self, id: u64, file: OwnedFd) -> Result<Arc<OwnedFd>, Errno> {
        let (number, key) = place_of(id).ok_or(Errno::STALE)?;
        self.lock(number).keep(key, file, false)
    }

    /// A node must stay: another one has it as its parent.
    fn hold(&self, id: u64) -> Result<(), Errno> {
        self.with(id, |node| node.children = node.children.saturating_add(1)).unwrap_or(Ok(()))
    }

    /// It need not stay any more; nor need its parents, one after the other.
    fn release(&self, id: u64) {
        let mut at = id;
        while let Some((number, key)) = place_of(at).filter(|_| at != ROOT) {
            let mut shard = self.lock(number);
            let Some(node) = shard.get_mut(key) else { return };
            node.children = node.children.saturating_sub(1);
            if node.children > 0 || node.lookups > 0 {
                return;
            }
            let Some(node) = shard.remove(key) else { return };
            drop(shard);
            at = node.parent;
        }
    }

    /// Does something with a node; `None` for the share itself, which is none.
    fn with<T>(&self, id: u64, with: impl FnOnce(&mut Node) -> T) -> Option<Result<T, Errno>> {
        if id == ROOT {
            return None;
        }
        let Some((number, key)) = place_of(id) else { return Some(Err(Errno::STALE)) };
        Some(self.lock(number).get_mut(key).map(with).ok_or(Errno::STALE))
    }

    fn shard_of(&self, identity: &Identity) -> u64 {
        self.elsewhere.get(identity).unwrap_or_else(|| hash(!self.seed, identity) % SHARDS)
    }

    fn lock(&self, number: u64) -> MutexGuard<'_, Shard> {
        let index = usize::try_from(number % SHARDS).unwrap_or_default();
        #[expect(clippy::indexing_slicing, reason = "there are as many as the remainder may be")]
        lock(&self.shards[index])
    }
}

/// Looks at a file: at that of the descriptor if the name is empty.
pub(crate) fn look(dir: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let flags = if name.is_empty() { flags | AtFlags::EMPTY_PATH } else { flags };
    statx(dir, name, flags, LOOK)
}

/// What a name does not lead to any more is not missing: what the guest knew is out of date.
fn gone(errno: Errno) -> Errno {
    if matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP) { Errno::STALE } else { errno }
}

/// File systems for which another machine or another process is asked.
fn is_slow(file: &OwnedFd) -> bool {
    const SLOW: [u64; 11] = [
        0x6969,
        0xff53_4d42,
        0xfe53_4d42,
        0x517b,
        0x6573_5546,
        0x0102_1997,
        0x00c3_6400,
        0x5346_414f,
        0x7375_7245,
        0x0bd0_0bd0,
        0x2003_0528,
    ];
    rustix::fs::fstatfs(file).is_ok_and(|about| SLOW.contains(&about.f_type.cast_unsigned()))
}

fn blank(identity: Identity, kind: Kind, parent: u64) -> Node {
    let name = Box::default();
    Node { identity, kind, warm: false, orphan: false, lookups: 1, children: 0, parent, name, handle: FileHandle::None, fd: None }
}

fn node(found: &Found<'_>) -> Node {
    Node { name: found.name.as_c_str().to_bytes().into(), ..blank(found.identity, found.kind, found.parent) }
}

/// Gives a node its newest name. Gives the parent that is not needed any more.
fn rename(shard: &mut Shard, key: Key, found: &Found<'_>) -> Option<u64> {
    let node = shard.get_mut(key)?;
    let before = std::mem::replace(&mut node.parent, found.parent);
    let name = found.name.as_c_str().to_bytes();
    if *node.name != *name {
        node.name = name.into();
    }
    shard.adopt(key);
    Some(before)
}

fn id_of(shard: u64, key: Key) -> u64 {
    u64::from(key.generation) << (SHARD_BITS + PLACE_BITS) | u64::from(key.place) << SHARD_BITS | shard
}

fn place_of(id: u64) -> Option<(u64, Key)> {
    let generation = u32::try_from(id >> (SHARD_BITS + PLACE_BITS)).ok().filter(|generation| *generation != 0)?;
    let place = u32::try_from((id >> SHARD_BITS) & ((1 << PLACE_BITS) - 1)).ok()?;
    Some((id % SHARDS, Key { place, generation }))
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
