//! A directory or a file of the host, taken out of the tree it is in.
//!
//! A process that serves files keeps one thing of the host after [`crate::confine`]: a mount of its own of what it shares, attached
//! nowhere. It has no parent, so `..` at its root is the root; an absolute symbolic link leads to the process's root, which is empty.
//! There is no path to it either: whoever wants something there begins at the descriptor. What the host mounts beneath it later does
//! not appear.
//!
//! A descriptor that only names a file (`O_PATH`) is opened for reading or writing by its number in `/proc/self/fd`. A process
//! keeps that folder the same way, as a mount of its own: nothing else of `/proc` can be reached from it, and what is opened by
//! it has to be beneath a share, too. It is nothing that Landlock has to be told of.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::{Error, Result, sys};

/// How a share is taken out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Detach {
    /// Nothing can be written there, whatever a program tries (`EROFS`).
    pub read_only: bool,
    /// With what is mounted beneath.
    pub submounts: bool,
}

/// A share that is attached nowhere. It is gone when the last copy of `root` is closed.
#[derive(Debug)]
pub struct Detached {
    /// Its root, to begin paths at (`O_PATH`).
    pub root: OwnedFd,
    /// What is mounted beneath came along. Also where that was not asked for: in a user namespace the kernel does not show
    /// what a mount hides, so it refuses to copy a directory without the mounts in it. Who wants none of them resolves paths with
    /// `RESOLVE_NO_XDEV`, which does not step across.
    pub submounts: bool,
}

/// Takes a directory or a file out, by a path that begins at `dir`; an empty path means `dir` itself. Symbolic links are followed.
/// Set-user-id bits and device files have no meaning there.
///
/// To be called before [`crate::confine`], in the namespaces of [`crate::spawn`], and with descriptors that were opened there: the
/// kernel copies mounts of the caller's own mount namespace only.
///
/// # Errors
/// The system's.
pub fn detach(dir: impl AsFd, path: &Path, how: Detach) -> Result<Detached> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    let recursive = flags | OpenTreeFlags::AT_RECURSIVE;
    let taken = match how.submounts {
        true => open_tree(&dir, path, recursive).map(|root| (root, true)),
        false => match open_tree(&dir, path, flags) {
            Err(Errno::INVAL) => open_tree(&dir, path, recursive).map(|root| (root, true)),
            other => other.map(|root| (root, false)),
        },
    };
    let (root, submounts) = taken.map_err(Error::step("take the share out of its tree"))?;
    sys::restrict_mounts(root.as_fd(), how.read_only).map_err(Error::step("restrict the share's mounts"))?;
    Ok(Detached { root, submounts })
}
