//! Requests that look at a file.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{Statx, StatxFlags, readlinkat_raw};
use rustix::io::Errno;

use crate::abi::init;
use crate::fs::{EMPTY, Io, Outcome, Share};
use crate::reply;
use crate::request::{Name, Request};
use crate::tree::node::{Identity, Kind};
use crate::tree::{Found, Way, look};

/// Bytes of the longest target of a symbolic link, and one more to see that it is no longer.
const LINK: usize = 4096;

impl Share {
    pub(super) fn lookup(&self, dir: u64, name: Name<'_>, io: Io<'_>) -> Outcome {
        let fd = self.tree.directory(dir)?;
        match self.enter(dir, &fd, name) {
            Ok(entry) => io.answer(&entry),
            Err(Errno::NOENT) => match self.settings.negative_timeout {
                Some(timeout) => io.answer(&reply::negative(timeout.min(self.quiet(dir)))),
                None => Err(Errno::NOENT),
            },
            Err(errno) => Err(errno),
        }
    }

    /// What the guest is told of a file that it learns of now.
    pub(super) fn enter(&self, dir: u64, fd: &OwnedFd, name: Name<'_>) -> Result<[u8; 128], Errno> {
        let stat = look(fd, name.as_c_str())?;
        let identity = self.tree.identify(&stat, fd, name.as_c_str())?;
        self.introduce(&stat, &Found { identity, kind: Kind::of(stat.stx_mode), parent: dir, name }, (fd, name.as_c_str()))
    }

    /// The same for a file that was looked at.
    pub(super) fn introduce(&self, stat: &Statx, found: &Found<'_>, here: (&OwnedFd, &CStr)) -> Result<[u8; 128], Errno> {
        let crossed = found.kind == Kind::DIRECTORY && self.tree.mount(found.parent)? != found.identity.mount;
        if crossed && self.tree.resolve().contains(rustix::fs::ResolveFlags::NO_XDEV) {
            return Err(Errno::XDEV);
        }
        if crossed && self.tree.mounts.get(found.identity.mount).is_some_and(|mount| mount.slow) {
            self.tree.note_slow(found.parent, found.name);
        }
        let node = self.tree.refer(found, here)?;
        Ok(reply::entry(node, 0, &self.attributes(stat, crossed), self.timeouts(found.parent, node)))
    }

    /// Looks at an inode.
    pub(super) fn stat(&self, node: u64) -> Result<Statx, Errno> {
        match self.tree.way(node)? {
            Way::Open(fd) => look(&fd, c""),
            Way::Named { again: true, .. } => look(&self.tree.fd(node)?, c""),
            Way::Named { parent, name, identity, .. } => match self.stat_name(parent, name.as_c_str(), &identity) {
                // It may have another name by now, or a directory above it.
                Err(Errno::STALE) if self.tree.reaches_by_handle() => look(&self.tree.fd(node)?, c""),
                stat => stat,
            },
        }
    }

    /// Looks at an inode by its name.
    fn stat_name(&self, parent: u64, name: &CStr, identity: &Identity) -> Result<Statx, Errno> {
        let dir = self.tree.fd(parent)?;
        let stat = look(&dir, name).map_err(|errno| if errno == Errno::NOENT { Errno::STALE } else { errno })?;
        let found = self.tree.identify(&stat, &dir, name)?;
        if found == *identity { Ok(stat) } else { Err(Errno::STALE) }
    }

    fn stat_by(&self, node: u64, handle: Option<u64>) -> Result<Statx, Errno> {
        match handle {
            Some(handle) if handle != 0 || !self.agreed(init::NO_OPEN_SUPPORT) => {
                look(&self.tree.handles.get(handle, node)?.file, c"")
            }
            _ => self.stat(node),
        }
    }

    pub(super) fn get_attr(&self, node: u64, handle: Option<u64>, io: Io<'_>) -> Outcome {
        let stat = self.stat_by(node, handle)?;
        io.answer(&reply::attr(&self.attributes(&stat, false), self.timeout(node)))
    }

    pub(super) fn statx(&self, node: u64, handle: Option<u64>, io: Io<'_>) -> Outcome {
        let stat = self.stat_by(node, handle)?;
        let attr = self.attributes(&stat, false);
        let all = reply::Statx {
            // What is told of mounts and of direct I/O is about this host.
            mask: stat.stx_mask & (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits(),
            blksize: attr.blksize,
            attributes: stat.stx_attributes.bits(),
            attributes_mask: stat.stx_attributes_mask.bits(),
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: stat.stx_mode,
            ino: attr.ino,
            size: attr.size,
            blocks: attr.blocks,
            atime: attr.atime,
            btime: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
            ctime: attr.ctime,
            mtime: attr.mtime,
            rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
            dev: (0, 0),
        };
        io.answer(&reply::statx(&all, self.timeout(node)))
    }

    pub(super) fn read_link(&self, node: u64, io: Io<'_>) -> Outcome {
        if self.tree.kind(node)? != Kind::SYMLINK {
            return Err(Errno::INVAL);
        }
        let fd = self.tree.fd(node)?;
        let mut buffer = [0; LINK];
        let len = readlinkat_raw(&fd, c"", &mut buffer[..])?;
        io.answer(buffer.get(..len).unwrap_or_default())
    }

    /// Only of guests that do not check for themselves.
    pub(super) fn access(&self, request: &Request<'_>, mask: u32) -> Outcome {
        let stat = self.stat(request.node)?;
        if self.may(&stat, request, mask) { Ok(EMPTY) } else { Err(Errno::ACCESS) }
    }

    /// Whether the user of a request may do this (4 read, 2 write, 1 execute) with a file, as far as its mode says.
    pub(super) fn may(&self, stat: &Statx, request: &Request<'_>, mask: u32) -> bool {
        let (uid, gid) = (self.owners.uids.to_guest(stat.stx_uid), self.owners.gids.to_guest(stat.stx_gid));
        let mode = u32::from(stat.stx_mode);
        if request.uid == 0 {
            return mask & 1 == 0 || mode & 0o111 != 0 || Kind::of(stat.stx_mode) == Kind::DIRECTORY;
        }
        let bits = if request.uid == uid {
            mode >> 6
        } else if request.gid == gid || request.group == Some(gid) {
            mode >> 3
        } else {
            mode
        };
        bits & mask & 7 == mask & 7
    }

    pub(super) fn stat_fs(&self, node: u64, io: Io<'_>) -> Outcome {
        let about = rustix::fs::fstatvfs(&*self.tree.fd(node)?)?;
        io.answer(&reply::statfs(&reply::StatFs {
            blocks: about.f_blocks,
            bfree: about.f_bfree,
            bavail: about.f_bavail,
            files: about.f_files,
            ffree: about.f_ffree,
            bsize: u32::try_from(about.f_bsize).unwrap_or(4096),
            namelen: u32::try_from(about.f_namemax).unwrap_or(255),
            frsize: u32::try_from(about.f_frsize).unwrap_or(4096),
        }))
    }
}
