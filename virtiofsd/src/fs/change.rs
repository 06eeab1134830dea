//! Requests that change what is known about a file.

use rustix::fs::{AtFlags, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chownat, fchmod, ftruncate, utimensat};
use rustix::io::Errno;

use crate::abi::init;
use crate::fs::file::takes_long;
use crate::fs::{Done, Io, Outcome, Share, Thread};
use crate::reply;
use crate::request::{SetAttr, Time};
use crate::sys;
use crate::tree::look;
use crate::tree::node::Kind;

/// Set-user-id and set-group-id.
pub(super) const PRIVILEGED: u32 = 0o6000;

impl Share {
    pub(super) fn set_attr(&self, thread: &mut Thread, node: u64, change: &SetAttr, io: Io<'_>) -> Outcome {
        let fd = self.tree.fd(node)?;
        if let Some(size) = change.size
            && !io.patient
            && takes_long(&look(&fd, c"")?, size)
        {
            return Ok(Done::Slow);
        }
        if let Some(mode) = change.mode {
            let changed = thread.credentials.keeping_ids_if(mode & PRIVILEGED != 0, || self.change_mode(node, &fd, mode));
            changed?;
        }
        if change.uid.is_some() || change.gid.is_some() {
            let uid = change.uid.map(|id| self.owners.uids.to_host(id)).transpose()?.map(Uid::from_raw);
            let gid = change.gid.map(|id| self.owners.gids.to_host(id)).transpose()?.map(Gid::from_raw);
            self.drop_capability_of(node)?;
            chownat(&fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(size) = change.size {
            self.change_size(thread, node, change, size)?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            let times = Timestamps { last_access: time(change.atime), last_modification: time(change.mtime) };
            utimensat(&fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let stat = look(&fd, c"")?;
        io.answer(&reply::attr(&self.attributes(&stat, false), self.timeout(node)))
    }

    fn change_mode(&self, node: u64, fd: &std::os::fd::OwnedFd, mode: u32) -> Result<(), Errno> {
        use std::os::fd::AsFd;
        match sys::fchmodat2(fd.as_fd(), mode) {
            // Before Linux 6.6: of what can be opened.
            Err(Errno::NOSYS) if matches!(self.tree.kind(node)?, Kind::REGULAR | Kind::DIRECTORY) => {
                let file = self.reopen(node, OFlags::RDONLY)?;
                fchmod(&file, rustix::fs::Mode::from_raw_mode(mode))
            }
            Err(Errno::NOSYS) => Err(Errno::OPNOTSUPP),
            changed => changed,
        }
    }

    fn change_size(&self, thread: &mut Thread, node: u64, change: &SetAttr, size: u64) -> Result<(), Errno> {
        if self.tree.kind(node)? != Kind::REGULAR {
            return Err(if self.is_directory(node) { Errno::ISDIR } else { Errno::INVAL });
        }
        let opened = match change.handle {
            Some(handle) => Err(self.tree.handles.get(handle, node)?),
            None => Ok(self.reopen(node, OFlags::WRONLY)?),
        };
        let file = match &opened {
            Ok(file) => file,
            Err(handle) => &handle.file,
        };
        self.drop_capability(file)?;
        let mode = u32::from(look(file, c"")?.stx_mode);
        // They go, unless the guest says whose they may stay and this is one.
        let keep = self.agreed(init::HANDLE_KILLPRIV_V2) && !change.kill_suidgid && mode & PRIVILEGED != 0;
        thread.credentials.keeping_ids_if(keep, || ftruncate(file, size))
    }
}

fn time(time: Option<Time>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(Time::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(Time::At(seconds, nanoseconds)) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
    }
}
