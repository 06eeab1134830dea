//! The way from a descriptor that is a path only to the file itself.
//!
//! An inode is held by a descriptor that is good for looking at it and for little else. What takes more is done by way of the directory
//! in which the kernel lists this process's descriptors: what it shows under a number is the file, whatever names that has by now, or
//! none. The process keeps that directory as a mount of its own, attached nowhere. No name that a guest gives ever leads there: names of
//! the guest are looked up in directories of the share, and no magic link is followed there.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2, readlinkat_raw};
use rustix::io::Errno;
use sandbox::{Detach, detach};

/// Bytes of the longest path that the kernel shows.
const PATH: usize = 4096;

/// The directory of descriptors.
#[derive(Debug)]
pub(crate) struct Magic(OwnedFd);

/// The name of a descriptor there.
#[derive(Debug)]
pub(crate) struct Number([u8; 12]);

impl Number {
    fn of(fd: BorrowedFd<'_>) -> Number {
        let mut digits = [0; 12];
        let mut left = fd.as_raw_fd().unsigned_abs();
        // From the end; the last byte stays zero.
        let mut at = 10;
        loop {
            if let Some(place) = digits.get_mut(at) {
                *place = b'0'.saturating_add(u8::try_from(left % 10).unwrap_or_default());
            }
            left /= 10;
            if left == 0 {
                break;
            }
            at = at.saturating_sub(1);
        }
        digits.rotate_left(at);
        Number(digits)
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

impl Magic {
    /// Takes it out of the tree. Paths are still there.
    ///
    /// # Errors
    /// When the host shows no descriptors.
    pub(crate) fn open() -> Result<Magic> {
        let taken = detach(CWD, Path::new("/proc/self/fd"), Detach { read_only: true, submounts: false });
        Ok(Magic(taken.context("Cannot reach this process's own descriptors in /proc/self/fd")?.root))
    }

    /// Opens the file of a descriptor.
    pub(crate) fn reopen(&self, fd: BorrowedFd<'_>, how: OFlags) -> Result<OwnedFd, Errno> {
        let how = (how - OFlags::NOFOLLOW) | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        openat2(&self.0, Number::of(fd).as_c_str(), how, Mode::empty(), ResolveFlags::empty())
    }

    /// Where the file of a descriptor is by now, as far as the kernel knows: from the top of its mount.
    pub(crate) fn path(&self, fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
        let mut path = vec![0; PATH];
        let len = readlinkat_raw(&self.0, Number::of(fd).as_c_str(), &mut path[..])?;
        // One that fills the room may be cut off.
        path.truncate(len);
        if len < PATH { Ok(path) } else { Err(Errno::NAMETOOLONG) }
    }

    /// The directory, and the name there of a descriptor.
    pub(crate) fn name(&self, fd: BorrowedFd<'_>) -> (BorrowedFd<'_>, Number) {
        (self.0.as_fd(), Number::of(fd))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn numbers_are_written_as_the_kernel_writes_them() {
        let file = File::open("/dev/null").unwrap();
        for least in [3, 10, 100, 900] {
            let copy = rustix::io::fcntl_dupfd_cloexec(&file, least).unwrap();
            assert_eq!(Number::of(copy.as_fd()).as_c_str().to_str().unwrap(), copy.as_raw_fd().to_string());
        }
    }
}
