//! Locks of the guest's processes, as locks of the host: other programs here, and other guests, respect them.
//!
//! A lock on a range belongs to an owner in the guest, whatever descriptor it was asked by; here it belongs to an open file of that owner's
//! own ([`Owned`]), which is closed when the owner closes any descriptor of the file, as POSIX has it. A lock on a whole file (flock) is
//! one of the handle's.
//!
//! Nobody waits in the kernel for a lock: a request that cannot have one is given back as [`Done::Locked`], and tried again
//! ([`crate::waiting`]), until it can, or is interrupted.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::fs::{Done, EMPTY, Io, Outcome, Share};
use crate::reply;
use crate::request::{Lock, LockKind};
use crate::sys::{LockCall, ofd_lock};

/// Most owners of locks at a time: each has a descriptor.
const MAX_OWNERS: usize = 4096;

/// The open file by which an owner holds its locks, and the handle by which it asked for them last.
#[derive(Debug)]
struct Held {
    file: Arc<OwnedFd>,
    handle: u64,
}

/// All of them, by inode and owner.
#[derive(Debug, Default)]
pub(crate) struct Owned(Mutex<HashMap<(u64, u64), Held>>);

impl Owned {
    fn list(&self) -> MutexGuard<'_, HashMap<(u64, u64), Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The owner has closed the file: all its locks on it are gone. Gives whether there were any.
    pub(crate) fn give_up(&self, node: u64, owner: u64) -> bool {
        self.list().remove(&(node, owner)).is_some()
    }

    /// The last copy of a descriptor is closed. What was locked in the name of the open file itself (`F_OFD_SETLK`) goes with it, of which
    /// Linux says nothing else.
    pub(crate) fn released(&self, node: u64, handle: u64) {
        self.list().retain(|(of, _), held| *of != node || held.handle != handle);
    }

    /// Whose inodes are, or were, locked by anybody who still has them open.
    pub(crate) fn nodes(&self) -> Vec<u64> {
        self.list().keys().map(|(node, _)| *node).collect()
    }

    pub(crate) fn clear(&self) {
        self.list().clear();
    }
}

impl Share {
    pub(super) fn get_lock(&self, (node, number): (u64, u64), owner: u64, lock: &Lock, io: Io<'_>) -> Outcome {
        if !self.settings.locks {
            return Err(Errno::NOSYS);
        }
        self.tree.handles.get(number, node)?;
        let file = self.owned((node, number), owner)?;
        let (start, len) = range(lock)?;
        let in_the_way = ofd_lock(file.as_fd(), LockCall::Get, kind(lock.kind), start, len)?;
        io.answer(&reply::lock(&found(&in_the_way)))
    }

    pub(super) fn set_lock(&self, (node, number): (u64, u64), owner: u64, lock: &Lock, (wait, whole): (bool, bool)) -> Outcome {
        if !self.settings.locks {
            return Err(Errno::NOSYS);
        }
        let handle = self.tree.handles.get(number, node)?;
        let done = if whole {
            let how = match lock.kind {
                LockKind::Shared => FlockOperation::NonBlockingLockShared,
                LockKind::Exclusive => FlockOperation::NonBlockingLockExclusive,
                LockKind::None => FlockOperation::NonBlockingUnlock,
            };
            flock(&handle.file, how).inspect(|()| handle.locked.store(lock.kind != LockKind::None, Ordering::Relaxed))
        } else {
            let (start, len) = range(lock)?;
            let file = self.owned((node, number), owner)?;
            ofd_lock(file.as_fd(), LockCall::Set, kind(lock.kind), start, len).map(drop)
        };
        if lock.kind == LockKind::None {
            self.waiting.look_again();
        }
        match done {
            Ok(()) => Ok(EMPTY),
            Err(Errno::AGAIN) if wait => Ok(Done::Locked),
            Err(errno) => Err(errno),
        }
    }

    /// A request is not wanted any more. Only those that wait for a lock can be anywhere but at work.
    pub(super) fn interrupt(&self, unique: u64) -> Outcome {
        if self.settings.locks {
            self.waiting.interrupt(unique);
        }
        Ok(EMPTY)
    }

    /// The open file of an owner: for reading and writing if that can be, since either may be locked.
    fn owned(&self, (node, handle): (u64, u64), owner: u64) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(held) = self.locks.list().get_mut(&(node, owner)) {
            held.handle = handle;
            return Ok(Arc::clone(&held.file));
        }
        let both = self.reopen(node, OFlags::RDWR).or_else(|_| self.reopen(node, OFlags::RDONLY));
        let file = both.or_else(|_| self.reopen(node, OFlags::WRONLY))?;
        let mut list = self.locks.list();
        if list.len() >= MAX_OWNERS {
            return Err(Errno::NOLCK);
        }
        let file = Arc::new(file);
        Ok(Arc::clone(&list.entry((node, owner)).or_insert(Held { file, handle }).file))
    }
}

fn kind(kind: LockKind) -> i32 {
    match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::None => libc::F_UNLCK,
    }
}

/// First byte and length, 0 for all there may ever be.
fn range(lock: &Lock) -> Result<(i64, i64), Errno> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    let len = match i64::try_from(lock.end) {
        Err(_) | Ok(i64::MAX) => 0,
        Ok(end) => end.checked_sub(start).and_then(|len| len.checked_add(1)).ok_or(Errno::INVAL)?,
    };
    Ok((start, len))
}

/// What is in the way, as the guest is told. Whose process it is, only the host knows.
fn found(range: &libc::flock) -> Lock {
    let is = |kind: i32| i32::from(range.l_type) == kind;
    let kind = match range.l_type {
        _ if is(libc::F_RDLCK) => LockKind::Shared,
        _ if is(libc::F_WRLCK) => LockKind::Exclusive,
        _ => LockKind::None,
    };
    let start = u64::try_from(range.l_start).unwrap_or_default();
    let len = u64::try_from(range.l_len).unwrap_or_default();
    let end = if len == 0 { i64::MAX.cast_unsigned() } else { start.saturating_add(len).saturating_sub(1) };
    Lock { start, end, kind, pid: 0 }
}
