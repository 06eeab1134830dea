//! What the file system itself calls an inode: good for as long as that exists, whatever its names.
//!
//! A guest never sees one, so it can neither keep nor make one up: each is asked for here, kept here, and what it leads to is believed only
//! if it is the inode that was meant, as with names.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::magic::Magic;
use crate::sys::{self, RawHandle};

/// A handle, as it is kept: those of most file systems have 8 bytes, or 12.
#[derive(Debug, Default)]
pub(crate) enum FileHandle {
    /// There is none.
    #[default]
    None,
    Short {
        kind: u8,
        len: u8,
        bytes: [u8; 12],
    },
    Long(Box<RawHandle>),
}

impl FileHandle {
    /// That of what has a name in a directory, or of the descriptor itself if the name is empty.
    pub(crate) fn of(dir: BorrowedFd<'_>, name: &CStr) -> Result<FileHandle, Errno> {
        let raw = sys::name_to_handle_at(dir, name)?;
        let mut short = [0; 12];
        Ok(match (u8::try_from(raw.kind), raw.content(), short.get_mut(..raw.content().len())) {
            (Ok(kind), content, Some(place)) => {
                place.copy_from_slice(content);
                FileHandle::Short { kind, len: u8::try_from(content.len()).unwrap_or_default(), bytes: short }
            }
            _ => FileHandle::Long(Box::new(raw)),
        })
    }

    /// As the system wants it.
    pub(crate) fn raw(&self) -> Option<RawHandle> {
        match self {
            FileHandle::None => None,
            FileHandle::Short { kind, len, bytes } => RawHandle::new((*kind).into(), bytes.get(..usize::from(*len))?).ok(),
            FileHandle::Long(raw) => Some(RawHandle::clone(raw)),
        }
    }
}

/// The share, open for reading, if its inodes can be reached by handles.
///
/// # Errors
/// `EOPNOTSUPP` if the file system has none, `EPERM` without the right that this takes.
pub(crate) fn probe(root: &OwnedFd, magic: &Magic) -> Result<OwnedFd, Errno> {
    let share = magic.reopen(root.as_fd(), OFlags::RDONLY)?;
    sys::open_by_handle_at(share.as_fd(), &sys::name_to_handle_at(root.as_fd(), c"")?)?;
    Ok(share)
}
