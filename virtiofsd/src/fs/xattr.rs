//! Requests about extended attributes.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

use crate::fs::{EMPTY, Io, Outcome, Share, Thread};
use crate::reply;
use crate::sys;
use crate::tree::node::Kind;

/// Access control lists are attributes with these names.
const LISTS: &[u8] = b"system.posix_acl_";

impl Share {
    /// What the host calls it.
    fn xattr_name<'a>(&self, name: &'a CStr) -> Result<&'a CStr, Errno> {
        if !self.settings.xattr {
            return Err(Errno::NOSYS);
        }
        if name.to_bytes().starts_with(LISTS) && !self.settings.posix_acl {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(name)
    }

    pub(super) fn set_xattr(&self, node: u64, name: &CStr, value: &[u8], flags: u32) -> Outcome {
        let name = self.xattr_name(name)?;
        let fd = self.tree.fd(node)?;
        let (dir, path) = self.magic.name(fd.as_fd());
        match sys::setxattrat(dir, path.as_c_str(), name, value, flags) {
            Err(Errno::NOSYS) => fsetxattr(self.file_of(node)?, name, value, XattrFlags::from_bits_retain(flags))?,
            set => set?,
        }
        Ok(EMPTY)
    }

    pub(super) fn get_xattr(&self, thread: &mut Thread, node: u64, name: &CStr, size: u32, io: Io<'_>) -> Outcome {
        let name = self.xattr_name(name)?;
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
        let list = thread.told(usize::try_from(size).unwrap_or_default());
        let fd = self.tree.fd(node)?;
        let (dir, path) = self.magic.name(fd.as_fd());
        let len = match sys::listxattrat(dir, path.as_c_str(), list) {
            Err(Errno::NOSYS) => flistxattr(self.file_of(node)?, &mut *list)?,
            got => got?,
        };
        tell(list, size, len, io)
    }

    pub(super) fn remove_xattr(&self, node: u64, name: &CStr) -> Outcome {
        let name = self.xattr_name(name)?;
        let fd = self.tree.fd(node)?;
        let (dir, path) = self.magic.name(fd.as_fd());
        match sys::removexattrat(dir, path.as_c_str(), name) {
            Err(Errno::NOSYS) => fremovexattr(self.file_of(node)?, name)?,
            removed => removed?,
        }
        Ok(EMPTY)
    }

    /// The file itself: before Linux 6.13 there is no other way to the attributes of an inode, and none to those of other kinds.
    fn file_of(&self, node: u64) -> Result<std::os::fd::OwnedFd, Errno> {
        if !matches!(self.tree.kind(node)?, Kind::REGULAR | Kind::DIRECTORY) {
            return Err(Errno::OPNOTSUPP);
        }
        self.reopen(node, OFlags::RDONLY)
    }
}

/// Tells the guest what there is, or how long it is.
fn tell(bytes: &[u8], size: u32, len: usize, io: Io<'_>) -> Outcome {
    if size == 0 {
        return io.answer(&reply::xattr_size(u32::try_from(len).map_err(|_| Errno::TOOBIG)?));
    }
    io.answer(bytes.get(..len).ok_or(Errno::RANGE)?)
}
