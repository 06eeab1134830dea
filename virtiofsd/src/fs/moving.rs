//! A guest moves to another host, where another server of the share goes on: what this one knows is saved, and the other one loads it.
//!
//! An inode moves by the name it has in a directory that moves as well. Whether it has that name still is looked at when it is saved: the
//! guest has stopped by then. What the host has renamed meanwhile is found by way of its descriptor, if there is one. What has no name
//! cannot move; nor can locks that are the host's. Whether the guest then stays where it is, or goes without them, is said by
//! [`Loss`].
//!
//! The other server finds each inode by that name, with the same calls as if the guest had looked it up, and opens what was open. It
//! looks at types before it opens anything, and opens files and directories only.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fmt::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{OFlags, ResolveFlags, fcntl_getfl, fdatasync};
use rustix::io::Errno;
use virtio::device::Immovable;

use crate::fs::Share;
use crate::fs::dir::{FOREIGN, UNKNOWN};
use crate::request::Name;
use crate::state::{self, Inode, Open, State, Writer};
use crate::sys;
use crate::tree::handle::Handle;
use crate::tree::moved::{About, Refused};
use crate::tree::node::{Identity, Kind};
use crate::tree::{Found, MAX_DEPTH, ROOT, look};

/// Most bytes of a state: about five million inodes whose names have usual lengths.
pub const MOST: usize = 256 << 20;

/// What may be wrong with the numbers of inodes.
const NUMBERS: &str = "the numbers of its inodes are none, or more than this server has (--max-inodes), or do not fit together";

/// How much of what cannot move is told by name.
const NAMED: usize = 8;

/// Flags of an open file that it is opened with again.
const KEPT: OFlags =
    OFlags::RWMODE.union(OFlags::APPEND).union(OFlags::SYNC).union(OFlags::DSYNC).union(OFlags::DIRECT).union(OFlags::NOATIME);

/// What becomes of a guest that has something which cannot move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loss {
    /// It does not move.
    #[default]
    Abort,
    /// It moves, and is told of an error when it uses that.
    GuestError,
}

/// How a guest moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moving {
    /// What has to be left behind.
    pub loss: Loss,
    /// The other server is told what the file system calls each file, and takes no other: it has to be the same file system.
    pub verify: bool,
}

/// What has to be left behind, the first few of it by name.
#[derive(Debug, Default)]
struct Lost {
    count: usize,
    named: Vec<String>,
}

impl Lost {
    fn add(&mut self, what: impl FnOnce() -> String) {
        if self.named.len() < NAMED {
            self.named.push(what());
        }
        self.count = self.count.saturating_add(1);
    }

    /// That is an error, or is said in the log.
    fn judge(self, loss: Loss) -> Result<(), Immovable> {
        if self.count == 0 {
            return Ok(());
        }
        let mut said = self.named.join("; ");
        let more = self.count.saturating_sub(self.named.len());
        if more > 0 {
            let _a_string_takes_all = write!(said, "; and {more} more");
        }
        match loss {
            Loss::Abort => Err(Immovable(said)),
            Loss::GuestError => {
                tracing::warn!(target: virtio::GUEST, "The guest moves without what cannot move: {said}");
                Ok(())
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It waits for its directory.
    Pending,
    Saved,
    Lost,
}

/// A state that is being saved.
struct Saving<'a> {
    share: &'a Share,
    writer: Writer,
    fates: HashMap<u64, Fate>,
    handles: HashMap<u64, Arc<Handle>>,
    lost: Lost,
}

impl Share {
    /// Saves what another server has to know. No ring is served.
    ///
    /// # Errors
    /// When something cannot move, and the guest is not to move then.
    pub fn save(&self) -> Result<Vec<u8>, Immovable> {
        let all = self.tree.handles.all();
        let handles = all.iter().map(|(_, handle)| (handle.node, Arc::clone(handle))).collect();
        let writer = Writer::new(self.session.flags.load(Ordering::Relaxed) & self.offers);
        let mut saving = Saving { share: self, writer, fates: HashMap::new(), handles, lost: Lost::default() };
        for id in self.tree.all() {
            saving.save(id);
            saving.is_short()?;
        }
        saving.writer.end_inodes();
        for (number, handle) in &all {
            saving.save_open(*number, handle);
        }
        saving.is_short()?;
        for node in self.locks.nodes() {
            saving.lost.add(|| format!("{} is locked, and locks of this host cannot move", self.called(node)));
        }
        saving.lost.judge(self.settings.moving.loss)?;
        Ok(saving.writer.finish())
    }

    /// How people are told which inode is meant.
    fn called(&self, node: u64) -> String {
        match self.tree.about(node) {
            Some(about) => called(&about),
            None => "the share's own directory".to_owned(),
        }
    }

    /// What a file has to be.
    fn expected(&self, parent: u64, name: Name<'_>, identity: &Identity) -> Result<(), Errno> {
        let dir = self.tree.directory(parent)?;
        let stat = look(&dir, name.as_c_str())?;
        if self.tree.identify(&stat, &dir, name.as_c_str())? == *identity { Ok(()) } else { Err(Errno::STALE) }
    }

    /// Looks for a file that has lost the name by which it is known, and notes the one that it has.
    fn seek_again(&self, about: &About, handle: Option<&Handle>) -> Result<(), Errno> {
        let fd = about.fd.as_ref().map(AsFd::as_fd).or(handle.map(|handle| handle.file.as_fd())).ok_or(Errno::STALE)?;
        let root = self.magic.path(self.tree.fd(ROOT)?.as_fd())?;
        let path = self.magic.path(fd)?;
        let root = root.strip_suffix(b"/").unwrap_or(&root);
        let path = path.strip_prefix(root).and_then(|path| path.strip_prefix(b"/")).ok_or(Errno::STALE)?;
        let mut taken = Vec::new();
        let found = self.walk(path, about, &mut taken);
        // What holds the directories on the way from now on is what was found.
        taken.into_iter().for_each(|id| self.tree.forget(id, 1));
        found
    }

    fn walk(&self, path: &[u8], about: &About, taken: &mut Vec<u64>) -> Result<(), Errno> {
        let mut dir = ROOT;
        let mut parts = path.split(|byte| *byte == b'/').peekable();
        while let Some(part) = parts.next() {
            let text = CString::new(part).map_err(|_| Errno::STALE)?;
            let name = Name::new(&text).ok_or(Errno::STALE)?;
            let fd = self.tree.directory(dir)?;
            let stat = look(&fd, name.as_c_str())?;
            let identity = self.tree.identify(&stat, &fd, name.as_c_str())?;
            let found = Found { identity, kind: Kind::of(stat.stx_mode), parent: dir, name };
            if parts.peek().is_none() {
                if identity != about.identity {
                    return Err(Errno::STALE);
                }
                self.tree.moved(&found);
                return Ok(());
            }
            dir = self.tree.refer(&found, (&*fd, name.as_c_str()))?;
            taken.push(dir);
        }
        Err(Errno::STALE)
    }

    /// Goes on where another server was. No ring is served.
    ///
    /// # Errors
    /// When this is no state, or something of it is not here and the guest is not to go without. Nothing is known then.
    pub fn load(&self, bytes: &[u8]) -> Result<(), Immovable> {
        let state = State::read(bytes).map_err(|wrong| Immovable(wrong.to_string()))?;
        if state.agreed & !self.offers != 0 {
            return Err(Immovable(format!(
                "the other server offers its guest what this one does not (FUSE_INIT flags {:#x}): start both with the same options",
                state.agreed & !self.offers
            )));
        }
        self.end();
        self.tree.make_ready();
        let loaded = self.take_over(&state);
        self.tree.settle();
        if loaded.is_err() {
            self.tree.make_ready();
            return loaded;
        }
        self.session.begun.store(1, Ordering::Relaxed);
        self.session.flags.store(state.agreed, Ordering::Relaxed);
        Ok(())
    }

    fn take_over(&self, state: &State<'_>) -> Result<(), Immovable> {
        let (mut missing, mut lost, mut unused) = (HashSet::new(), Lost::default(), Vec::new());
        for inode in state.inodes() {
            let why = if missing.contains(&inode.parent) {
                Errno::NOENT
            } else {
                match self.take_inode(&inode) {
                    Ok(()) if inode.lookups == 0 => {
                        unused.push(inode.id);
                        continue;
                    }
                    Ok(()) => continue,
                    Err(Refused::Failed(why)) => why,
                    Err(Refused::Twice) => Errno::EXIST,
                    Err(Refused::Number) => {
                        return Err(forged(NUMBERS));
                    }
                }
            };
            if inode.id == ROOT || !missing.insert(inode.id) {
                return Err(forged(NUMBERS));
            }
            lost.add(|| format!("{} is not the same here: {why}", quoted(inode.name.as_c_str().to_bytes())));
        }
        for open in state.opens() {
            // Of what is missing it was said already.
            if !missing.contains(&open.node)
                && let Err(why) = self.take_open(&open)?
            {
                lost.add(|| format!("{} cannot be opened as it was: {why}", self.called(open.node)));
            }
        }
        // Directories that were there for the sake of what is in them, and nothing came.
        unused.into_iter().rev().for_each(|id| self.tree.forget(id, 0));
        lost.judge(self.settings.moving.loss)
    }

    fn take_inode(&self, inode: &Inode<'_>) -> Result<(), Refused> {
        if self.tree.kind(inode.parent) != Ok(Kind::DIRECTORY) {
            return Err(Refused::Number);
        }
        let (name, failed) = (inode.name.as_c_str(), Refused::Failed);
        let dir = self.tree.directory(inode.parent).map_err(failed)?;
        let stat = look(&dir, name).map_err(failed)?;
        let kind = Kind::of(stat.stx_mode);
        if kind.number() != inode.kind {
            return Err(failed(Errno::STALE));
        }
        if !inode.handle.is_empty() && inode.handle != sys::name_to_handle_at(dir.as_fd(), name).map_err(failed)?.to_bytes() {
            return Err(failed(Errno::STALE));
        }
        let identity = self.tree.identify(&stat, &dir, name).map_err(failed)?;
        let crossed = self.tree.mount(inode.parent).map_err(failed)? != identity.mount;
        if crossed && self.tree.resolve().contains(ResolveFlags::NO_XDEV) {
            return Err(failed(Errno::XDEV));
        }
        let found = Found { identity, kind, parent: inode.parent, name: inode.name };
        self.tree.restore(inode.id, inode.lookups, &found, (&*dir, name))
    }

    /// Opens what was open. The inner error: it cannot be opened here.
    fn take_open(&self, open: &Open) -> Result<Result<(), Errno>, Immovable> {
        let kind = self.tree.kind(open.node).map_err(|_| forged("something is open that is not known"))?;
        let handle = match kind {
            Kind::REGULAR => self.open_again(open),
            Kind::DIRECTORY => self.open_dir_again(open),
            _ => return Err(forged("something is open that is neither a file nor a directory")),
        };
        let handle = match handle {
            Ok(handle) => handle,
            Err(errno) => return Ok(Err(errno)),
        };
        match self.tree.handles.restore(open.number, handle) {
            Ok(Some(())) => Ok(Ok(())),
            Err(Errno::NFILE) => Ok(Err(Errno::NFILE)),
            Ok(None) | Err(_) => Err(forged("the numbers of its open files are none, or do not fit together")),
        }
    }

    fn open_again(&self, open: &Open) -> Result<Handle, Errno> {
        let mut how = OFlags::from_bits_retain(open.flags) & KEPT;
        if how.contains(OFlags::RWMODE) {
            return Err(Errno::INVAL);
        }
        if self.settings.read_only && how.intersects(OFlags::RWMODE) {
            return Err(Errno::ROFS);
        }
        if !self.settings.allow_direct_io {
            how -= OFlags::DIRECT;
        }
        if !self.settings.preserve_noatime {
            how -= OFlags::NOATIME;
        }
        let file = self.reopen(open.node, how)?;
        let stat = look(&file, c"")?;
        if Kind::of(stat.stx_mode) != Kind::REGULAR {
            return Err(Errno::STALE);
        }
        Ok(self.handle(open.node, file, &stat, how))
    }

    /// A directory that is another one than there has other places, and cannot be read on where the guest was.
    fn open_dir_again(&self, open: &Open) -> Result<Handle, Errno> {
        let file = self.reopen(open.node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let identity = self.tree.identify_open(&look(&file, c"")?, &file)?;
        let same = (identity.ino, identity.birth) == (open.ino, open.birth);
        Ok(Handle::new(file, open.node, Some(if same { UNKNOWN } else { FOREIGN }), false))
    }
}

impl Saving<'_> {
    /// Nobody takes more.
    fn is_short(&self) -> Result<(), Immovable> {
        if self.writer.len() <= MOST {
            return Ok(());
        }
        Err(Immovable(format!("the guest knows too many files: no more than {} MiB of them can move", MOST >> 20)))
    }

    /// Saves an inode, and before it the directories above that are not saved yet.
    fn save(&mut self, id: u64) {
        let mut stack = Vec::new();
        self.push(&mut stack, id);
        while let Some((id, sought)) = stack.last().copied() {
            let Some(about) = self.share.tree.about(id) else {
                self.settle(&mut stack, Fate::Lost);
                continue;
            };
            let above = if about.parent == ROOT { Some(Fate::Saved) } else { self.fates.get(&about.parent).copied() };
            if above.is_none() && stack.len() < MAX_DEPTH {
                self.push(&mut stack, about.parent);
                continue;
            }
            let written = match above {
                Some(Fate::Saved) if !about.orphan => self.write(id, &about),
                _ => Err(Errno::STALE),
            };
            let handle = self.handles.get(&id).map(Arc::as_ref);
            match written {
                Ok(()) => self.settle(&mut stack, Fate::Saved),
                Err(_) if !sought && self.share.seek_again(&about, handle).is_ok() => {
                    if let Some((_, sought)) = stack.last_mut() {
                        *sought = true;
                    }
                }
                Err(why) => {
                    // What the guest could not reach any more in any case is not lost by moving.
                    if about.fd.is_some() || handle.is_some() {
                        let why = if why == Errno::OPNOTSUPP {
                            "its file system has no file handles"
                        } else {
                            "it has no name any more"
                        };
                        self.lost.add(|| format!("{} cannot move: {why}", called(&about)));
                    }
                    self.settle(&mut stack, Fate::Lost);
                }
            }
        }
    }

    fn push(&mut self, stack: &mut Vec<(u64, bool)>, id: u64) {
        if let Entry::Vacant(fate) = self.fates.entry(id) {
            fate.insert(Fate::Pending);
            stack.push((id, false));
        }
    }

    fn settle(&mut self, stack: &mut Vec<(u64, bool)>, fate: Fate) {
        if let Some((id, _)) = stack.pop() {
            self.fates.insert(id, fate);
        }
    }

    /// Writes an inode that still has its name.
    fn write(&mut self, id: u64, about: &About) -> Result<(), Errno> {
        let name = Name::new(about.name.as_c_str()).ok_or(Errno::STALE)?;
        self.share.expected(about.parent, name, &about.identity)?;
        let handle = if self.share.settings.moving.verify {
            sys::name_to_handle_at(self.share.tree.directory(about.parent)?.as_fd(), name.as_c_str())?.to_bytes()
        } else {
            Vec::new()
        };
        let (kind, handle) = (about.kind.number(), handle.as_slice());
        self.writer.inode(&Inode { id, parent: about.parent, lookups: about.lookups, kind, handle, name });
        Ok(())
    }

    fn save_open(&mut self, number: u64, handle: &Handle) {
        let node = handle.node;
        if handle.locked.load(Ordering::Relaxed) {
            self.lost.add(|| format!("{} is locked, and locks of this host cannot move", self.share.called(node)));
        }
        if node != ROOT && self.fates.get(&node) != Some(&Fate::Saved) {
            // Of an inode that cannot move it was said already.
            if !self.fates.contains_key(&node) {
                self.lost.add(|| "something is open that is not known any more".to_owned());
            }
            return;
        }
        let identity = look(&handle.file, c"").and_then(|stat| self.share.tree.identify_open(&stat, &handle.file));
        let (Ok(flags), Ok(identity)) = (fcntl_getfl(&handle.file), identity) else {
            self.lost.add(|| format!("{} is open, and cannot be looked at", self.share.called(node)));
            return;
        };
        // Another host sees what has reached the machine that both ask.
        if handle.slow
            && flags.intersects(OFlags::RWMODE)
            && let Err(why) = fdatasync(&handle.file)
        {
            self.lost.add(|| format!("{} cannot be written out: {why}", self.share.called(node)));
        }
        let flags = (flags & KEPT).bits();
        self.writer.open(&Open { number, node, flags, ino: identity.ino, birth: identity.birth });
    }
}

fn forged(what: &'static str) -> Immovable {
    Immovable(state::Malformed(what).to_string())
}

fn called(about: &About) -> String {
    format!("{} (inode {})", quoted(about.name.as_c_str().to_bytes()), about.identity.ino)
}

fn quoted(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}
