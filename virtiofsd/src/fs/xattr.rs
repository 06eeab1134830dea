//! Requests about extended attributes.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

use crate::fs::{BUFFER, EMPTY, Io, Outcome, Share, Thread};
use crate::reply;
use crate::sys;
use crate::tree::node::Kind;
use crate::xattrmap::{Room, XattrMap};

/// Access control lists are attributes with these names.
const LISTS: &[u8] = b"system.posix_acl_";

impl Share {
    /// What the host calls it.
    pub(super) fn xattr_name<'a>(&self, name: &'a CStr, room: &'a mut Room) -> Result<&'a CStr, Errno> {
        if !self.settings.xattr {
            return Err(Errno::NOSYS);
        }
        if self.is_refused(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP);
        }
        match &self.settings.xattrmap {
            Some(map) => map.to_host(name, room),
            None => Ok(name),
        }
    }

    fn is_refused(&self, name: &[u8]) -> bool {
        name.starts_with(LISTS) && !self.settings.posix_acl
    }

    pub(super) fn set_xattr(&self, node: u64, name: &CStr, value: &[u8], flags: u32) -> Outcome {
        let mut room = [0; size_of::<Room>()];
        let name = self.xattr_name(name, &mut room)?;
        self.set_attribute(&*self.tree.fd(node)?, self.tree.kind(node)?, (name, value), flags)?;
        Ok(EMPTY)
    }

    /// Sets an attribute of what is open, be it as a path only, by the host's name.
    pub(super) fn set_attribute(&self, fd: &OwnedFd, kind: Kind, (name, value): (&CStr, &[u8]), flags: u32) -> Result<(), Errno> {
        let (dir, path) = self.magic.name(fd.as_fd());
        match sys::setxattrat(dir, path.as_c_str(), name, value, flags) {
            Err(Errno::NOSYS) => fsetxattr(self.file_itself(fd, kind)?, name, value, XattrFlags::from_bits_retain(flags)),
            set => set,
        }
    }

    pub(super) fn get_xattr(&self, thread: &mut Thread, node: u64, name: &CStr, size: u32, io: Io<'_>) -> Outcome {
        let mut room = [0; size_of::<Room>()];
        // As upstream has it: who looks for what it may not have finds nothing.
        let name = self.xattr_name(name, &mut room).map_err(|errno| if errno == Errno::PERM { Errno::NODATA } else { errno })?;
        let value = thread.told(usize::try_from(size).unwrap_or_default());
        let fd = self.tree.fd(node)?;
        let (dir, path) = self.magic.name(fd.as_fd());
        let len = match sys::getxattrat(dir, path.as_c_str(), name, value) {
            Err(Errno::NOSYS) => fgetxattr(self.file_of(node)?, name, &mut *value)?,
            got => got?,
        };
        tell(value, size, len, io)
    }

    pub(super) fn list_xattr(&self, thread: &mut Thread, node: u64, size: u32, io: Io<'_>) -> Outcome {
        if !self.settings.xattr {
            return Err(Errno::NOSYS);
        }
        // A name may be shorter in the guest than on the host, or not be there at all: how long they are is known when they are all read.
        let map = self.settings.xattrmap.as_ref();
        let room = if map.is_some() { BUFFER } else { usize::try_from(size).unwrap_or_default() };
        let list = thread.told(room);
        let fd = self.tree.fd(node)?;
        let (dir, path) = self.magic.name(fd.as_fd());
        let len = match sys::listxattrat(dir, path.as_c_str(), list) {
            Err(Errno::NOSYS) => flistxattr(self.file_of(node)?, &mut *list)?,
            got => got?,
        };
        let Some(map) = map else { return tell(list, size, len, io) };
        let list = list.get_mut(..len).ok_or(Errno::RANGE)?;
        let len = map.list(list, |name| self.is_refused(name));
        if size != 0 && len > usize::try_from(size).unwrap_or(usize::MAX) {
            return Err(Errno::RANGE);
        }
        tell(list, size, len, io)
    }

    pub(super) fn remove_xattr(&self, node: u64, name: &CStr) -> Outcome {
        let mut room = [0; size_of::<Room>()];
        let name = self.xattr_name(name, &mut room)?;
        self.remove(node, name)?;
        Ok(EMPTY)
    }

    /// A file that is open is about to be changed: the capabilities it has go, whoever changes it. The kernel does so by itself where
    /// it knows them by their name.
    pub(super) fn drop_capability(&self, file: &OwnedFd) -> Result<(), Errno> {
        match self.settings.xattrmap.as_ref().and_then(XattrMap::capability) {
            Some(name) => not_there(fremovexattr(file, name)),
            None => Ok(()),
        }
    }

    /// The same of an inode.
    pub(super) fn drop_capability_of(&self, node: u64) -> Result<(), Errno> {
        match self.settings.xattrmap.as_ref().and_then(XattrMap::capability) {
            Some(name) => not_there(self.remove(node, name)),
            None => Ok(()),
        }
    }

    fn remove(&self, node: u64, name: &CStr) -> Result<(), Errno> {
        let fd = self.tree.fd(node)?;
        let (dir, path) = self.magic.name(fd.as_fd());
        match sys::removexattrat(dir, path.as_c_str(), name) {
            Err(Errno::NOSYS) => fremovexattr(self.file_of(node)?, name),
            removed => removed,
        }
    }

    /// The file itself: before Linux 6.13 there is no other way to the attributes of an inode, and none to those of other kinds.
    fn file_of(&self, node: u64) -> Result<OwnedFd, Errno> {
        self.file_itself(&*self.tree.fd(node)?, self.tree.kind(node)?)
    }

    fn file_itself(&self, fd: &OwnedFd, kind: Kind) -> Result<OwnedFd, Errno> {
        if !matches!(kind, Kind::REGULAR | Kind::DIRECTORY) {
            return Err(Errno::OPNOTSUPP);
        }
        self.magic.reopen(fd.as_fd(), OFlags::RDONLY)
    }
}

/// What is not there need not be removed, and what cannot have such attributes has none.
fn not_there(removed: Result<(), Errno>) -> Result<(), Errno> {
    match removed {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        removed => removed,
    }
}

/// Tells the guest what there is, or how long it is.
fn tell(bytes: &[u8], size: u32, len: usize, io: Io<'_>) -> Outcome {
    if size == 0 {
        return io.answer(&reply::xattr_size(u32::try_from(len).map_err(|_| Errno::TOOBIG)?));
    }
    io.answer(bytes.get(..len).ok_or(Errno::RANGE)?)
}
