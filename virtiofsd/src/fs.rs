//! A share, and what is done with it.
//!
//! [`Share::perform`] carries out a checked request. It writes what belongs behind the header of the answer into the room there is, and
//! gives its length. Any thread may do so: what threads share is in the [`Tree`], what a thread needs for itself is its [`Thread`].
//!
//! A thread that serves a queue is impatient: a request that would have to wait for a disk, or for another machine, is not carried out but
//! given back as [`Done::Slow`], for another thread to do. Of a file system that asks another machine, or another process, that is
//! everything: a name there, too, is as far away as they are, and when they do not answer nobody comes back.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::Statx;
use rustix::io::Errno;
use virtio::Buffer;
use virtio::limit::Limits;

use crate::abi::{attr, init};
use crate::fs::lock::Owned;
use crate::identity::Credentials;
use crate::magic::Magic;
use crate::owner::Owners;
use crate::reply::{Attr, Timeouts};
use crate::request::{Dialect, Operation, Request};
use crate::tree::node::Kind;
use crate::tree::{ROOT, Tree};
use crate::waiting::Waiting;
use crate::watch::Watch;
use crate::xattrmap::XattrMap;

mod change;
mod dir;
pub(crate) mod file;
pub(crate) mod ioctl;
pub(crate) mod lock;
mod look;
mod make;
mod moving;
mod remove;
mod session;
mod xattr;

pub use moving::{Loss, MOST, Moving};

/// Bytes of the answer to one reading of a directory, of one extended attribute, and of the names of all of a file.
const BUFFER: usize = 64 * 1024;

/// What of a share is up to whoever starts the process.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent of each other")]
pub struct Settings {
    /// What the guest keeps, and for how long.
    pub cache: Cache,
    /// How long the guest believes what it knows.
    pub timeout: Duration,
    /// How long it believes that something is not there. None: it asks each time.
    pub negative_timeout: Option<Duration>,
    /// Nothing is changed.
    pub read_only: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// Names of them that are others on the host.
    pub xattrmap: Option<XattrMap>,
    /// Access control lists.
    pub posix_acl: bool,
    /// Files have labels of the guest's security module from the start.
    pub security_label: bool,
    /// A guest that cannot do that is turned away.
    pub security_label_required: bool,
    /// The guest may collect writes.
    pub writeback: bool,
    /// The guest may pass the host's page cache by.
    pub allow_direct_io: bool,
    /// Files that are not cached may be mapped all the same.
    pub allow_mmap: bool,
    /// Mounts in the share show as mounts.
    pub announce_submounts: bool,
    /// The guest says when set-user-id bits are to go.
    pub killpriv_v2: bool,
    /// Directories are read with what is in them.
    pub readdirplus: bool,
    /// Locks of the guest are locks of the host.
    pub locks: bool,
    /// A guest that does not want the time of access changed is obeyed.
    pub preserve_noatime: bool,
    /// How a guest moves to another host.
    pub moving: Moving,
}

impl Settings {
    /// Whether a guest need not open files: nothing depends on how it would, and it would keep their data in any case.
    fn opens_nothing(&self) -> bool {
        self.cache == Cache::Always && self.read_only && !self.allow_direct_io && !self.locks
    }
}

/// What a guest keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing.
    Never,
    /// What is known about files, but no data.
    Metadata,
    /// Everything, for a second; data until the file is opened again.
    #[default]
    Auto,
    /// Everything, for as long as there is room.
    Always,
}

/// A directory, or a file, that is shared.
#[derive(Debug)]
pub struct Share {
    pub(crate) tree: Tree,
    pub(crate) settings: Settings,
    pub(crate) owners: Owners,
    session: Session,
    /// What guests are offered: it follows from the settings.
    offers: u64,
    pub(crate) magic: Magic,
    pub(crate) locks: Owned,
    /// What tells where the host changes something.
    pub(crate) watch: Option<Watch>,
    /// How much it may be used.
    pub(crate) limits: Limits,
    /// Who waits for a lock.
    pub waiting: Waiting,
}

/// What was agreed on with the guest: all of it that outlives the process.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// 1: it has begun.
    begun: &'static AtomicU64,
    /// [`init`], as far as both sides can.
    flags: &'static AtomicU64,
}

impl Session {
    /// One that ends with the process.
    #[must_use]
    pub fn new() -> Session {
        let [begun, flags] = Box::leak(Box::new([const { AtomicU64::new(0) }; 2]));
        Session { begun, flags }
    }

    /// One that a predecessor may have begun. What stands there is not believed: see [`Share::new`].
    ///
    /// # Errors
    /// The system's.
    pub fn kept(page: OwnedFd) -> io::Result<Session> {
        let [begun, flags] = virtio::words::map::<2>(page)?;
        Ok(Session { begun, flags })
    }
}

impl Default for Session {
    fn default() -> Session {
        Session::new()
    }
}

/// What one thread has for itself.
#[derive(Debug)]
pub struct Thread {
    pub(crate) credentials: Credentials,
    /// What the kernel says, and what the guest is told.
    heard: Vec<u8>,
    told: Vec<u8>,
}

impl Thread {
    /// Of a process that may, or may not, be several users.
    pub fn new(several: bool) -> Thread {
        Thread { credentials: Credentials::new(several), heard: Vec::with_capacity(BUFFER), told: Vec::new() }
    }
}

impl Thread {
    /// Room for what the guest is told, of at most so many bytes. It is there from the first time on.
    fn told(&mut self, most: usize) -> &mut [u8] {
        if self.told.is_empty() {
            self.told.resize(BUFFER, 0);
        }
        let len = most.min(self.told.len());
        self.told.get_mut(..len).unwrap_or_default()
    }
}

/// Where a request's data is, and where its answer goes.
#[derive(Clone, Copy, Debug)]
pub struct Io<'a> {
    /// What follows the arguments.
    pub data: Buffer<'a>,
    /// What follows the header of the answer.
    pub room: Buffer<'a>,
    /// The thread may wait.
    pub patient: bool,
    /// Whatever it does, it may take long over copying.
    pub at_length: bool,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It is done, and the answer has so many bytes after its header.
    Answer(u32),
    /// It is done, and there is no answer.
    Silence,
    /// Nothing was done yet: it takes a thread that may wait.
    Slow,
    /// Nothing was done yet: somebody has a lock that this one waits for.
    Locked,
}

pub(crate) type Outcome = Result<Done, Errno>;

impl Io<'_> {
    /// The answer is these bytes.
    pub(crate) fn answer(&self, bytes: &[u8]) -> Outcome {
        let len = u32::try_from(bytes.len()).map_err(|_| Errno::OVERFLOW)?;
        if self.room.len() < len {
            return Err(Errno::INVAL);
        }
        self.room.copy_from(bytes);
        Ok(Done::Answer(len))
    }
}

const EMPTY: Done = Done::Answer(0);

impl Share {
    /// A share of what `root` refers to.
    pub(crate) fn new(
        tree: Tree,
        (magic, watch): (Magic, Option<Watch>),
        session: Session,
        settings: Settings,
        owners: Owners,
    ) -> Share {
        let (locks, limits, waiting) = (Owned::default(), Limits::default(), Waiting::default());
        let offers = session::offers(&settings);
        Share { tree, settings, owners, session, offers, magic, watch, locks, limits, waiting }
    }

    /// Watches what the host changes, for as long as the process lives.
    pub fn watch(&self) {
        if let Some(watch) = &self.watch {
            watch.work();
        }
    }

    /// How requests of this session are to be read.
    pub fn dialect(&self) -> Dialect {
        Dialect { setxattr_ext: self.agreed(init::SETXATTR_EXT), security_ctx: self.agreed(init::SECURITY_CTX) }
    }

    /// Whether both sides can do this.
    pub(crate) fn agreed(&self, flag: u64) -> bool {
        // Nothing is agreed on that was not offered, whoever may have written there.
        self.session.flags.load(Ordering::Relaxed) & flag & self.offers != 0
    }

    /// Carries out a request.
    ///
    /// # Errors
    /// What the guest is to be told.
    pub fn perform(&self, thread: &mut Thread, request: &Request<'_>, io: Io<'_>) -> Outcome {
        let done = self.dispatch(thread, request, io);
        if done.is_err() && makes(&request.operation) {
            thread.credentials.come_back();
        }
        done
    }

    fn dispatch(&self, thread: &mut Thread, request: &Request<'_>, io: Io<'_>) -> Outcome {
        let node = request.node;
        if self.settings.read_only && changes(&request.operation) {
            return Err(Errno::ROFS);
        }
        if !io.patient && self.waits_elsewhere(request) {
            return Ok(Done::Slow);
        }
        match request.operation {
            Operation::Init { major, minor, max_readahead, flags } => self.init(major, minor, max_readahead, flags, io),
            Operation::Destroy => self.destroy(),
            Operation::Lookup { name } => self.lookup(node, name, io),
            Operation::Forget { count } => self.forget(node, count),
            Operation::BatchForget { count } => self.forget_many(count, io),
            Operation::GetAttr { handle } => self.get_attr(node, handle, io),
            Operation::Statx { handle, .. } => self.statx(node, handle, io),
            Operation::SetAttr(change) => self.set_attr(thread, node, &change, io),
            Operation::ReadLink => self.read_link(node, io),
            Operation::Access { mask } => self.access(request, mask),
            Operation::StatFs => self.stat_fs(node, io),
            Operation::Symlink { name, target } => self.symlink(thread, request, name, target, io),
            Operation::MkNod { name, mode, device, umask } => self.make_node(thread, request, name, (mode, device, umask), io),
            Operation::MkDir { name, mode, umask } => self.make_dir(thread, request, name, (mode, umask), io),
            Operation::Link { old, name } => self.link(node, old, name, io),
            Operation::Create { name, flags, mode, umask, .. } => self.create(thread, request, name, (flags, mode, umask), io),
            Operation::TmpFile { flags, mode, umask, .. } => self.make_nameless(thread, request, (flags, mode, umask), io),
            Operation::Unlink { name } => self.unlink(node, name, false),
            Operation::RmDir { name } => self.unlink(node, name, true),
            Operation::Rename { name, to, new_name, flags } => self.rename((node, name), (to, new_name), flags),
            Operation::Open { flags, open_flags } => self.open(thread, node, (flags, open_flags), io),
            Operation::Read { handle, offset, size, .. } => self.read((node, handle), offset, size, io),
            Operation::Write { handle, offset, size, write_flags, .. } => {
                self.write(thread, (node, handle), (offset, size, write_flags), io)
            }
            Operation::Release { handle, .. } | Operation::ReleaseDir { handle } => self.release(node, handle),
            Operation::Flush { handle, owner } => self.flush((node, handle), owner, io),
            Operation::FSync { handle, data_only } | Operation::FSyncDir { handle, data_only } => {
                self.sync(node, handle, data_only, io)
            }
            Operation::FAllocate { handle, offset, length, mode } => self.allocate((node, handle), offset, length, mode, io),
            Operation::LSeek { handle, offset, whence } => self.seek(node, handle, offset, whence, io),
            Operation::CopyFileRange { .. } => self.copy(request, io),
            Operation::OpenDir { .. } => self.open_dir(node, io),
            Operation::ReadDir { handle, offset, size, plus } => self.read_dir(thread, (node, handle), (offset, size, plus), io),
            Operation::SetXattr { name, value, flags, .. } => self.set_xattr(node, name, value, flags),
            Operation::GetXattr { name, size } => self.get_xattr(thread, node, name, size, io),
            Operation::ListXattr { size } => self.list_xattr(thread, node, size, io),
            Operation::RemoveXattr { name } => self.remove_xattr(node, name),
            Operation::Ioctl { handle, flags, command, input, output, .. } => {
                self.ioctl((node, handle), (flags, command), input, output, io)
            }
            Operation::SyncFs => self.sync_fs(io),
            Operation::GetLock { handle, owner, lock } => self.get_lock((node, handle), owner, &lock, io),
            Operation::SetLock { handle, owner, lock, wait, flock } => self.set_lock((node, handle), owner, &lock, (wait, flock)),
            Operation::Interrupt { unique } => self.interrupt(unique),
        }
    }

    /// Whether a request may have to wait for another machine, or another process: all that is asked of a file system which asks them.
    pub(crate) fn waits_elsewhere(&self, request: &Request<'_>) -> bool {
        if !self.tree.mounts.any_slow() {
            return false;
        }
        let other = match request.operation {
            Operation::Init { .. }
            | Operation::Destroy
            | Operation::Forget { .. }
            | Operation::BatchForget { .. }
            | Operation::Interrupt { .. } => return false,
            Operation::Lookup { name } if self.tree.leads_to_slow(request.node, Some(name)) => return true,
            Operation::ReadDir { plus: true, .. } if self.tree.leads_to_slow(request.node, None) => return true,
            Operation::Link { old, .. } => old,
            Operation::Rename { to, .. } | Operation::CopyFileRange { to, .. } => to,
            _ => request.node,
        };
        self.tree.is_slow(request.node) || (other != request.node && self.tree.is_slow(other))
    }

    /// Whether it does so while other requests of this share have to do with disks.
    pub(crate) fn asks_others(&self, request: &Request<'_>) -> bool {
        !self.tree.is_slow(ROOT) && self.waits_elsewhere(request)
    }

    /// What the guest is told about a file on the mount `mount` whose directory is on the mount `above`.
    pub(crate) fn attributes(&self, stat: &Statx, crossed: bool) -> Attr {
        let time = |at: &rustix::fs::StatxTimestamp| (at.tv_sec, at.tv_nsec);
        let flags = if crossed && self.agreed(init::SUBMOUNTS) { attr::SUBMOUNT } else { 0 };
        let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
        Attr {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: time(&stat.stx_atime),
            mtime: time(&stat.stx_mtime),
            ctime: time(&stat.stx_ctime),
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: self.owners.uids.to_guest(stat.stx_uid),
            gid: self.owners.gids.to_guest(stat.stx_gid),
            rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
            blksize: stat.stx_blksize,
            flags,
        }
    }

    /// How long the host has changed nothing in a directory, as far as that is watched.
    fn quiet(&self, dir: u64) -> Duration {
        let watch = self.watch.as_ref();
        watch.map_or(Duration::MAX, |watch| watch.quiet(dir, &self.magic, || self.tree.fd(dir).ok()))
    }

    /// How long the guest is to believe what it is told of a file and its name, in a directory.
    pub(crate) fn timeouts(&self, dir: u64, node: u64) -> Timeouts {
        let entry = self.settings.timeout.min(self.quiet(dir));
        // What is known of a directory changes with what is in it.
        let attr = self.watch.as_ref().map_or(entry, |watch| entry.min(watch.quiet_if_known(node)));
        Timeouts { entry, attr }
    }

    /// How long it is to believe what it is told of a file.
    pub(crate) fn timeout(&self, node: u64) -> Duration {
        if self.watch.is_none() {
            return self.settings.timeout;
        }
        self.timeouts(self.tree.parent(node), node).attr
    }

    pub(crate) fn is_directory(&self, node: u64) -> bool {
        self.tree.kind(node) == Ok(Kind::DIRECTORY)
    }
}

/// Whether a request makes a file in somebody's name.
fn makes(operation: &Operation<'_>) -> bool {
    matches!(
        operation,
        Operation::Create { .. }
            | Operation::MkDir { .. }
            | Operation::MkNod { .. }
            | Operation::Symlink { .. }
            | Operation::TmpFile { .. }
    )
}

/// Whether a request changes the share, whatever comes of it.
fn changes(operation: &Operation<'_>) -> bool {
    match operation {
        Operation::SetAttr(_)
        | Operation::Symlink { .. }
        | Operation::MkNod { .. }
        | Operation::MkDir { .. }
        | Operation::Unlink { .. }
        | Operation::RmDir { .. }
        | Operation::Rename { .. }
        | Operation::Link { .. }
        | Operation::Create { .. }
        | Operation::TmpFile { .. }
        | Operation::Write { .. }
        | Operation::SetXattr { .. }
        | Operation::RemoveXattr { .. }
        | Operation::FAllocate { .. }
        | Operation::CopyFileRange { .. } => true,
        Operation::Open { flags, .. } => {
            let flags = flags.cast_signed();
            flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0
        }
        Operation::Ioctl { command, .. } => ioctl::changes(*command),
        _ => false,
    }
}
