//! What is known of one inode, and of the mounts that inodes are on.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::Statx;
use rustix::io::Errno;

use crate::tree::file_handle::FileHandle;

/// Most mounts of a share. A share with more is served, without what lies on the others.
pub(crate) const MAX_MOUNTS: usize = 256;

/// Which inode a file of the host is. The number alone may be used again after the file is gone: the time of birth tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) ino: u64,
    pub(crate) mount: u16,
    pub(crate) birth: u32,
}

impl Identity {
    /// Of a file that was looked at, on a mount with this number.
    pub(crate) fn of(stat: &Statx, mount: u16) -> Identity {
        let birth = if stat.stx_mask & libc::STATX_BTIME == 0 {
            0
        } else {
            let seconds = stat.stx_btime.tv_sec.cast_unsigned();
            let [a, b, c, d, ..] = seconds.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
            u32::from_be_bytes([a, b, c, d]) ^ stat.stx_btime.tv_nsec
        };
        Identity { ino: stat.stx_ino, mount, birth }
    }

    /// The same inode number of the same mount.
    pub(crate) fn has_number(&self, other: &Identity) -> bool {
        (self.ino, self.mount) == (other.ino, other.mount)
    }
}

/// The type of a file: the highest four bits of its mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind(u8);

impl Kind {
    pub(crate) const DIRECTORY: Kind = Kind(0o4);
    pub(crate) const REGULAR: Kind = Kind(0o10);
    pub(crate) const SYMLINK: Kind = Kind(0o12);

    pub(crate) fn of(mode: u16) -> Kind {
        Kind(mode.to_be_bytes()[0] >> 4)
    }

    /// The number that stands for it.
    pub(crate) fn number(self) -> u8 {
        self.0
    }
}

/// An inode that the guest may know.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) identity: Identity,
    pub(crate) kind: Kind,
    /// It was used since the clock's hand was here.
    pub(crate) warm: bool,
    /// It has no name any more: its descriptor is the only way to it, and is not closed to make room.
    pub(crate) orphan: bool,
    /// How many references the guest has.
    pub(crate) lookups: u64,
    /// How many nodes have this one as their parent.
    pub(crate) children: u32,
    /// The directory in which it was found, and the name that it had there.
    pub(crate) parent: u64,
    pub(crate) name: Box<[u8]>,
    /// What its file system calls it, where that is of use.
    pub(crate) handle: FileHandle,
    /// A descriptor, opened as a path only (or, of a file that never had a name, as a file).
    pub(crate) fd: Option<Arc<OwnedFd>>,
}

/// A mount that is part of the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) id: u64,
    /// Whatever is asked of its file system may wait for another machine, or for another process.
    pub(crate) slow: bool,
}

/// The mounts that were met, by the number each has in [`Identity`].
#[derive(Debug)]
pub(crate) struct Mounts {
    known: Box<[OnceLock<Mount>]>,
    adding: Mutex<()>,
    /// One of them is slow.
    slow: AtomicBool,
}

impl Mounts {
    pub(crate) fn new() -> Mounts {
        Mounts { known: (0..MAX_MOUNTS).map(|_| OnceLock::new()).collect(), adding: Mutex::new(()), slow: AtomicBool::new(false) }
    }

    /// The number of the mount that a file is on. `slow` is asked about one that was not met before.
    pub(crate) fn number(&self, stat: &Statx, slow: impl FnOnce() -> bool) -> Result<u16, Errno> {
        if let Some(number) = self.find(stat) {
            return Ok(number);
        }
        let slow = slow();
        let _one_at_a_time = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = self.find(stat) {
            return Ok(number);
        }
        let free = self.known.iter().position(|mount| mount.get().is_none()).ok_or(Errno::NFILE)?;
        let mount = Mount { major: stat.stx_dev_major, minor: stat.stx_dev_minor, id: mount_id(stat), slow };
        let _only_we_set_it = self.known.get(free).ok_or(Errno::NFILE)?.set(mount);
        self.slow.fetch_or(slow, Ordering::Relaxed);
        u16::try_from(free).map_err(|_| Errno::NFILE)
    }

    /// Whether one of them is slow.
    pub(crate) fn any_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed)
    }

    pub(crate) fn get(&self, number: u16) -> Option<Mount> {
        self.known.get(usize::from(number))?.get().copied()
    }

    fn find(&self, stat: &Statx) -> Option<u16> {
        let id = mount_id(stat);
        let is = |mount: &Mount| mount.id == id && mount.minor == stat.stx_dev_minor && mount.major == stat.stx_dev_major;
        let number = self.known.iter().map_while(OnceLock::get).position(is)?;
        u16::try_from(number).ok()
    }
}

/// The number that this kernel has for a mount; 0 where it does not tell.
fn mount_id(stat: &Statx) -> u64 {
    if stat.stx_mask & libc::STATX_MNT_ID == 0 { 0 } else { stat.stx_mnt_id }
}
