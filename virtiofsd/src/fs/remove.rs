//! Requests that take a name away, or give a file another one.
//!
//! A file that the guest knows by a name which it is about to lose has a descriptor from then on: the guest may have it open, and may
//! ask about it for as long as it likes.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, openat2, renameat_with, unlinkat};
use rustix::io::Errno;

use crate::fs::{EMPTY, Outcome, Share};
use crate::request::Name;
use crate::tree::node::{Identity, Kind};
use crate::tree::{Found, look};

impl Share {
    pub(super) fn unlink(&self, node: u64, name: Name<'_>, directory: bool) -> Outcome {
        let dir = self.tree.directory(node)?;
        let orphan = self.prepare_orphan(node, &dir, name)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(&dir, name.as_c_str(), flags).inspect_err(|errno| {
            // Where the name is gone, somebody else was faster: the descriptor is all there is of the file.
            if *errno != Errno::NOENT {
                self.keep_name(orphan);
            }
        })?;
        Ok(EMPTY)
    }

    /// Whoever has this name is about to lose it.
    fn prepare_orphan(&self, node: u64, dir: &OwnedFd, name: Name<'_>) -> Result<Option<Identity>, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat2(dir, name.as_c_str(), flags, Mode::empty(), self.tree.resolve()) {
            Ok(file) => file,
            // It is for the request itself to say what is wrong.
            Err(Errno::NOENT | Errno::XDEV | Errno::ACCESS) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let identity = self.tree.identify_open(&look(&file, c"")?, &file)?;
        Ok(self.tree.orphan(&identity, node, name, file)?.then_some(identity))
    }

    fn keep_name(&self, identity: Option<Identity>) {
        if let Some(identity) = identity {
            self.tree.adopt(&identity);
        }
    }

    pub(super) fn rename(&self, from: (u64, Name<'_>), to: (u64, Name<'_>), flags: u32) -> Outcome {
        let old_dir = self.tree.directory(from.0)?;
        let new_dir = self.tree.directory(to.0)?;
        let flags = RenameFlags::from_bits_retain(flags);
        // Two names of one file: the system does nothing then, and nothing loses its name.
        let orphan = if flags.contains(RenameFlags::EXCHANGE) || self.same_file((&old_dir, from.1), (&new_dir, to.1)) {
            None
        } else {
            self.prepare_orphan(to.0, &new_dir, to.1)?
        };
        let renamed = renameat_with(&old_dir, from.1.as_c_str(), &new_dir, to.1.as_c_str(), flags);
        renamed.inspect_err(|_| self.keep_name(orphan))?;
        self.note_name(to, &new_dir);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_name(from, &old_dir);
        }
        Ok(EMPTY)
    }

    fn same_file(&self, one: (&OwnedFd, Name<'_>), other: (&OwnedFd, Name<'_>)) -> bool {
        let (Ok(one), Ok(other)) = (look(one.0, one.1.as_c_str()), look(other.0, other.1.as_c_str())) else { return false };
        (one.stx_ino, one.stx_dev_major, one.stx_dev_minor) == (other.stx_ino, other.stx_dev_major, other.stx_dev_minor)
    }

    /// Whatever is there now has this name.
    fn note_name(&self, (parent, name): (u64, Name<'_>), dir: &OwnedFd) {
        let Ok(stat) = look(dir, name.as_c_str()) else { return };
        let Ok(identity) = self.tree.identify(&stat, dir, name.as_c_str()) else { return };
        self.tree.moved(&Found { identity, kind: Kind::of(stat.stx_mode), parent, name });
    }
}
