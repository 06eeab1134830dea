//! Requests about open files.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    FallocateFlags, OFlags, SeekFrom, Statx, copy_file_range, fallocate, fdatasync, fsync, ftruncate, seek, syncfs,
};
use rustix::io::Errno;

use crate::abi::{flag, fopen, init};
use crate::fs::change::PRIVILEGED;
use crate::fs::{Cache, Done, EMPTY, Io, Outcome, Share, Thread};
use crate::metrics;
use crate::reply;
use crate::request::{Operation, Request};
use crate::sys;
use crate::tree::handle::Handle;
use crate::tree::node::Kind;
use crate::tree::{ROOT, look};

/// Most bytes that a thread copies which serves a queue and has more to do: having another thread do it takes less long.
pub(crate) const SHORT: u32 = 64 * 1024;

/// Most bytes that such a thread cuts off a file: the host's kernel gives them up page by page, a quarter of a millisecond for a million.
const CUT: u64 = 1 << 20;

/// Data is kept in pieces of that many bytes.
const PAGE: u64 = 4096;

/// Flags of an open file that are passed on. The rest is up to the guest's kernel, or to us.
const PASSED: OFlags = OFlags::RWMODE.union(OFlags::APPEND).union(OFlags::SYNC).union(OFlags::DSYNC);

/// A file that was opened for the guest.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: OwnedFd,
    pub(super) stat: Statx,
    pub(super) flags: u32,
}

/// Whether so much is to be cut off a file that others would wait for it.
pub(super) fn takes_long(stat: &Statx, size: u64) -> bool {
    stat.stx_size.saturating_sub(size) > CUT
}

impl Share {
    /// How a file is opened that the guest wants opened so.
    pub(super) fn flags(&self, flags: u32) -> OFlags {
        let asked = OFlags::from_bits_retain(flags);
        let mut how = (asked & PASSED) | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        if self.settings.allow_direct_io {
            how |= asked & OFlags::DIRECT;
        }
        if self.settings.preserve_noatime {
            how |= asked & OFlags::NOATIME;
        }
        let writeback = self.agreed(init::WRITEBACK_CACHE);
        if writeback {
            // The guest knows where the end is.
            how -= OFlags::APPEND;
        }
        let (reads, writes) = (asked & OFlags::RWMODE == OFlags::RDONLY, asked & OFlags::RWMODE == OFlags::WRONLY);
        // What is emptied is written; a guest that collects writes reads what it writes a part of.
        if (reads && asked.contains(OFlags::TRUNC)) || (writes && writeback) {
            how = (how - OFlags::RWMODE) | OFlags::RDWR;
        }
        how
    }

    /// Opens an inode.
    pub(super) fn reopen(&self, node: u64, how: OFlags) -> Result<OwnedFd, Errno> {
        // By way of the inode itself: whatever has its name by now is not even opened.
        self.magic.reopen(self.tree.fd(node)?.as_fd(), how)
    }

    pub(super) fn open(&self, thread: &mut Thread, node: u64, (flags, more): (u32, u32), io: Io<'_>) -> Outcome {
        if self.agreed(init::NO_OPEN_SUPPORT) {
            // From now on the guest does not ask.
            return Err(Errno::NOSYS);
        }
        let Some(opened) = self.open_file(thread, node, (flags, more), io)? else { return Ok(Done::Slow) };
        io.answer(&self.register(node, opened)?)
    }

    /// The open file that a request is about: that of its number; or, of a guest that does not open files, one without.
    pub(super) fn file(&self, node: u64, number: u64) -> Result<Arc<Handle>, Errno> {
        if number != 0 || !self.agreed(init::NO_OPEN_SUPPORT) {
            return self.tree.handles.get(number, node);
        }
        if let Some(kept) = self.tree.handles.kept(node) {
            return Ok(kept);
        }
        let Opened { file, stat, .. } = self.open_regular(node, OFlags::RDONLY.bits())?;
        Ok(self.tree.handles.keep(self.handle(node, file, &stat, OFlags::RDONLY)))
    }

    /// Opens a file, unless it is to be emptied and that takes long.
    pub(super) fn open_file(
        &self,
        thread: &mut Thread,
        node: u64,
        (flags, more): (u32, u32),
        io: Io<'_>,
    ) -> Result<Option<Opened>, Errno> {
        let opened = self.open_regular(node, flags)?;
        if flags.cast_signed() & libc::O_TRUNC != 0 {
            if !io.patient && takes_long(&opened.stat, 0) {
                return Ok(None);
            }
            self.drop_capability(&opened.file)?;
            let keep = self.agreed(init::HANDLE_KILLPRIV_V2) && more & flag::OPEN_KILL_SUIDGID == 0;
            thread.credentials.keeping_ids_if(keep, || ftruncate(&opened.file, 0))?;
        }
        Ok(Some(opened))
    }

    fn open_regular(&self, node: u64, flags: u32) -> Result<Opened, Errno> {
        // Opening a device or a pipe does something; what the guest wants with one it does by itself.
        match self.tree.kind(node)? {
            Kind::REGULAR => {}
            Kind::DIRECTORY => return Err(Errno::ISDIR),
            Kind::SYMLINK => return Err(Errno::LOOP),
            _ => return Err(Errno::BADF),
        }
        let file = self.reopen(node, self.flags(flags))?;
        let stat = look(&file, c"")?;
        if Kind::of(stat.stx_mode) != Kind::REGULAR {
            return Err(Errno::STALE);
        }
        Ok(Opened { file, stat, flags })
    }

    /// Gives an open file a number, and says how the guest is to treat it.
    pub(super) fn register(&self, node: u64, opened: Opened) -> Result<[u8; 16], Errno> {
        let Opened { file, stat, flags } = opened;
        let asked = OFlags::from_bits_retain(flags);
        let direct = self.settings.allow_direct_io && asked.contains(OFlags::DIRECT);
        let slow = self.tree.is_slow(node);
        let number = self.tree.handles.insert(self.handle(node, file, &stat, asked))?;
        Ok(reply::open(number, self.open_flags(direct, slow)))
    }

    /// A file that is open with these flags.
    pub(super) fn handle(&self, node: u64, file: OwnedFd, stat: &Statx, flags: OFlags) -> Handle {
        let direct = self.settings.allow_direct_io && flags.contains(OFlags::DIRECT);
        let slow = self.tree.is_slow(node) || direct || flags.intersects(OFlags::SYNC | OFlags::DSYNC);
        let privileged = AtomicBool::new(u32::from(stat.stx_mode) & PRIVILEGED != 0);
        Handle { privileged, ..Handle::new(file, node, None, slow) }
    }

    fn open_flags(&self, direct: bool, slow: bool) -> u32 {
        // What is written reaches the host with each write, except where the file system says more when a file is closed.
        let flush = if slow || self.settings.locks { 0 } else { fopen::NOFLUSH };
        let cache = match self.settings.cache {
            Cache::Auto if !direct => 0,
            Cache::Always if !direct => fopen::KEEP_CACHE,
            _ => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
        };
        flush | cache
    }

    pub(super) fn read(&self, (node, number): (u64, u64), offset: u64, size: u32, io: Io<'_>) -> Outcome {
        let handle = self.file(node, number)?;
        if !io.patient && (handle.slow || (size > SHORT && !io.at_length)) {
            return Ok(Done::Slow);
        }
        let mut at_once = !io.patient && !handle.patient.load(Ordering::Relaxed);
        let mut rest = io.room.split_at(size).0;
        let mut at = offset;
        while !rest.is_empty() {
            let file = handle.file.as_fd();
            let asked = rest.in_one_call();
            let read = if at_once { rest.read_at_once(file, at) } else { rest.read_from(file, Some(at)) };
            let count = match read {
                Ok(count) => u32::try_from(count).map_err(|_| Errno::OVERFLOW)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock && at_once => return Ok(Done::Slow),
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) && at_once => {
                    handle.patient.store(true, Ordering::Relaxed);
                    at_once = false;
                    continue;
                }
                Err(error) if at == offset => return Err(errno(&error)),
                Err(_) => break,
            };
            at = at.saturating_add(count.into());
            rest = rest.split_at(count).1;
            // Data that is missing from memory is missing page by page: what ends within one is the end of the file, unless it was all
            // that could be read at a time.
            if count == 0 || (count < asked && !at.is_multiple_of(PAGE)) {
                break;
            }
        }
        let done = at.saturating_sub(offset);
        metrics::READ_BYTES.add(done);
        u32::try_from(done).map(Done::Answer).map_err(|_| Errno::OVERFLOW)
    }

    pub(super) fn write(
        &self,
        thread: &mut Thread,
        (node, number): (u64, u64),
        (offset, size, write_flags): (u64, u32, u32),
        io: Io<'_>,
    ) -> Outcome {
        let handle = self.tree.handles.get(number, node)?;
        if !io.patient && (handle.slow || (size > SHORT && !io.at_length)) {
            return Ok(Done::Slow);
        }
        self.drop_capability(&handle.file)?;
        // Nobody has the right to keep these bits, unless the guest says who does and it is this one.
        let keep = self.agreed(init::HANDLE_KILLPRIV_V2)
            && write_flags & flag::WRITE_KILL_SUIDGID == 0
            && handle.privileged.load(Ordering::Relaxed);
        let data = io.data.split_at(size).0;
        let written = thread.credentials.keeping_ids_if(keep, || write_all(&handle, data, offset))?;
        metrics::WRITTEN_BYTES.add(written.into());
        io.answer(&reply::write(written))
    }

    pub(super) fn release(&self, node: u64, handle: u64) -> Outcome {
        drop(self.tree.handles.remove(handle, node)?);
        if self.settings.locks {
            // A lock on the whole file went with it.
            self.locks.released(node, handle);
            self.waiting.look_again();
        }
        Ok(EMPTY)
    }

    pub(super) fn flush(&self, (node, handle): (u64, u64), owner: u64, io: Io<'_>) -> Outcome {
        if handle == 0 && self.agreed(init::NO_OPEN_SUPPORT) {
            return Err(Errno::NOSYS);
        }
        let handle = self.tree.handles.get(handle, node)?;
        if self.settings.locks && self.locks.give_up(node, owner) {
            self.waiting.look_again();
        }
        if !handle.slow {
            return Ok(EMPTY);
        }
        if !io.patient {
            return Ok(Done::Slow);
        }
        // Some file systems tell what went wrong with a write only when a descriptor is closed.
        sys::close(rustix::io::fcntl_dupfd_cloexec(&handle.file, 3)?)?;
        Ok(EMPTY)
    }

    pub(super) fn sync(&self, node: u64, handle: u64, data_only: bool, io: Io<'_>) -> Outcome {
        if !io.patient {
            return Ok(Done::Slow);
        }
        let done = |file: &OwnedFd| if data_only { fdatasync(file) } else { fsync(file) };
        match self.file(node, handle) {
            Ok(handle) => done(&handle.file)?,
            // Where directories are not opened, there is no handle.
            Err(_) if handle == 0 && self.is_directory(node) => done(&self.reopen(node, OFlags::RDONLY)?)?,
            Err(errno) => return Err(errno),
        }
        Ok(EMPTY)
    }

    pub(super) fn sync_fs(&self, io: Io<'_>) -> Outcome {
        if !io.patient {
            return Ok(Done::Slow);
        }
        let root = self.reopen(ROOT, OFlags::RDONLY)?;
        syncfs(&root)?;
        Ok(EMPTY)
    }

    pub(super) fn allocate(&self, (node, handle): (u64, u64), offset: u64, length: u64, mode: u32, io: Io<'_>) -> Outcome {
        let handle = self.tree.handles.get(handle, node)?;
        if !io.patient {
            return Ok(Done::Slow);
        }
        self.drop_capability(&handle.file)?;
        fallocate(&handle.file, FallocateFlags::from_bits_retain(mode), offset, length)?;
        Ok(EMPTY)
    }

    pub(super) fn seek(&self, node: u64, handle: u64, offset: u64, whence: u32, io: Io<'_>) -> Outcome {
        let handle = self.file(node, handle)?;
        let signed = i64::try_from(offset).map_err(|_| Errno::INVAL);
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            libc::SEEK_SET => SeekFrom::Start(offset),
            libc::SEEK_CUR => SeekFrom::Current(signed?),
            libc::SEEK_END => SeekFrom::End(signed?),
            _ => return Err(Errno::INVAL),
        };
        io.answer(&reply::lseek(seek(&handle.file, to)?))
    }

    pub(super) fn copy(&self, request: &Request<'_>, io: Io<'_>) -> Outcome {
        let Operation::CopyFileRange { handle, offset, to, to_handle, to_offset, length, long, .. } = request.operation else {
            return Err(Errno::INVAL);
        };
        let from = self.tree.handles.get(handle, request.node)?;
        let into = self.tree.handles.get(to_handle, to)?;
        if !io.patient {
            return Ok(Done::Slow);
        }
        self.drop_capability(&into.file)?;
        let most = if long { u64::MAX } else { u32::MAX.into() };
        let length = usize::try_from(length.min(most)).unwrap_or(usize::MAX);
        let (mut offset, mut to_offset) = (offset, to_offset);
        let copied = copy_file_range(&from.file, Some(&mut offset), &into.file, Some(&mut to_offset), length)?;
        match u32::try_from(copied) {
            _ if long => io.answer(&reply::copy64(copied as u64)),
            Ok(copied) => io.answer(&reply::write(copied)),
            Err(_) => Err(Errno::OVERFLOW),
        }
    }

    pub(super) fn open_dir(&self, node: u64, io: Io<'_>) -> Outcome {
        if self.agreed(init::NO_OPENDIR_SUPPORT) {
            // From now on the guest does not ask.
            return Err(Errno::NOSYS);
        }
        let file = self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let number = self.tree.handles.insert(Handle::new(file, node, Some(0), false))?;
        let flags = match self.settings.cache {
            Cache::Always | Cache::Metadata => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            Cache::Auto | Cache::Never => 0,
        };
        io.answer(&reply::open(number, flags))
    }
}

fn write_all(handle: &Handle, data: virtio::Buffer<'_>, offset: u64) -> Result<u32, Errno> {
    let mut rest = data;
    let mut done = 0_u32;
    while !rest.is_empty() {
        let at = offset.checked_add(done.into()).ok_or(Errno::FBIG)?;
        match rest.write_to(handle.file.as_fd(), Some(at)) {
            Ok(0) => break,
            Ok(count) => {
                let count = u32::try_from(count).map_err(|_| Errno::OVERFLOW)?;
                done = done.saturating_add(count);
                rest = rest.split_at(count).1;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if done == 0 => return Err(errno(&error)),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// The system's number for an error of an input or output.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
