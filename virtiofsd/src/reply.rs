//! Answers, as bytes. Nothing here allocates, and nothing can fail: every answer is an array of its size.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::time::Duration;

use crate::abi::{self, answer, init};
use crate::request::{Lock, LockKind};

/// Bytes of a header.
pub const HEADER: usize = 16;

/// Bytes of an inode's attributes by themselves, as they are part of several answers.
pub const ATTR: usize = 88;

/// Bytes of an entry: what LOOKUP gives, and what stands in front of each name that READDIRPLUS gives.
pub const ENTRY: usize = 128;

/// Fields of an array, written one after the other; what is not written is zero. What does not fit is not there, which the tests of the
/// layouts would find.
struct Fields<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Fields<N> {
    fn new() -> Fields<N> {
        Fields { bytes: [0; N], at: 0 }
    }

    fn put(mut self, field: &[u8]) -> Fields<N> {
        let end = self.at.saturating_add(field.len());
        if let Some(place) = self.bytes.get_mut(self.at..end) {
            place.copy_from_slice(field);
        }
        self.at = end;
        self
    }

    fn u16(self, value: u16) -> Fields<N> {
        self.put(&value.to_le_bytes())
    }

    fn u32(self, value: u32) -> Fields<N> {
        self.put(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Fields<N> {
        self.put(&value.to_le_bytes())
    }

    fn time(self, (seconds, nanoseconds): (i64, u32)) -> Fields<N> {
        self.put(&seconds.to_le_bytes()).u32(nanoseconds).u32(0)
    }
}

/// The header of an answer of `len` bytes in all, the header included. `errno` is Linux's number, positive, or 0 if all went well.
pub fn header(unique: u64, errno: i32, len: u32) -> [u8; HEADER] {
    Fields::new().u32(len).put(&errno.saturating_neg().to_le_bytes()).u64(unique).bytes
}

/// An inode as the guest sees it (`fuse_attr`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// The host's number of it, which programs see. Not the node.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Sectors of 512 bytes that it takes.
    pub blocks: u64,
    /// When it was read last: seconds since 1970, and nanoseconds.
    pub atime: (i64, u32),
    /// When its content changed last.
    pub mtime: (i64, u32),
    /// When the inode changed last.
    pub ctime: (i64, u32),
    /// Type and permissions.
    pub mode: u32,
    /// Names it has.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Which device it is, in the encoding of the kernel: minor number in bits 0 to 7 and 20 to 31, major number in bits 8 to 19.
    pub rdev: u32,
    /// The size that I/O is best done in.
    pub blksize: u32,
    /// [`abi::attr`].
    pub flags: u32,
}

impl Attr {
    /// As it is part of other answers.
    pub fn to_bytes(&self) -> [u8; ATTR] {
        let seconds = |(seconds, _): (i64, u32)| seconds.cast_unsigned();
        let fields = Fields::new().u64(self.ino).u64(self.size).u64(self.blocks);
        let fields = fields.u64(seconds(self.atime)).u64(seconds(self.mtime)).u64(seconds(self.ctime));
        let fields = fields.u32(self.atime.1).u32(self.mtime.1).u32(self.ctime.1);
        let fields = fields.u32(self.mode).u32(self.nlink).u32(self.uid).u32(self.gid);
        fields.u32(self.rdev).u32(self.blksize).u32(self.flags).bytes
    }
}

/// For how long the guest need not ask again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// What the name leads to.
    pub entry: Duration,
    /// What the inode is like.
    pub attr: Duration,
}

/// LOOKUP, MKDIR and all else that gives a node (`fuse_entry_out`). A node and its generation are never used for another inode.
pub fn entry(node: u64, generation: u64, attr: &Attr, timeouts: Timeouts) -> [u8; ENTRY] {
    let Timeouts { entry, attr: valid } = timeouts;
    let fields = Fields::new().u64(node).u64(generation).u64(entry.as_secs()).u64(valid.as_secs());
    fields.u32(entry.subsec_nanos()).u32(valid.subsec_nanos()).put(&attr.to_bytes()).bytes
}

/// There is nothing of that name, and there will not be for so long.
pub fn negative(timeout: Duration) -> [u8; ENTRY] {
    entry(0, 0, &Attr::default(), Timeouts { entry: timeout, attr: Duration::ZERO })
}

/// GETATTR and SETATTR (`fuse_attr_out`).
pub fn attr(attr: &Attr, timeout: Duration) -> [u8; answer::ATTR as usize] {
    Fields::new().u64(timeout.as_secs()).u32(timeout.subsec_nanos()).u32(0).put(&attr.to_bytes()).bytes
}

/// OPEN, OPENDIR, and the second part of CREATE and TMPFILE (`fuse_open_out`). `open_flags`: [`abi::fopen`].
pub fn open(handle: u64, open_flags: u32) -> [u8; answer::OPEN as usize] {
    Fields::new().u64(handle).u32(open_flags).u32(0).bytes
}

/// WRITE and COPY_FILE_RANGE: bytes done (`fuse_write_out`).
pub fn write(size: u32) -> [u8; answer::WRITE as usize] {
    Fields::new().u32(size).bytes
}

/// COPY_FILE_RANGE_64: bytes done (`fuse_copy_file_range_out`).
pub fn copy64(size: u64) -> [u8; answer::COPY_64 as usize] {
    size.to_le_bytes()
}

/// A file system as the guest sees it (`fuse_kstatfs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Blocks of `frsize`.
    pub blocks: u64,
    /// Those that are free.
    pub bfree: u64,
    /// Those that are free for everybody.
    pub bavail: u64,
    /// Inodes.
    pub files: u64,
    /// Those that are free.
    pub ffree: u64,
    /// The size that I/O is best done in, in bytes.
    pub bsize: u32,
    /// Longest name, in bytes.
    pub namelen: u32,
    /// Bytes of a block.
    pub frsize: u32,
}

/// STATFS (`fuse_statfs_out`).
pub fn statfs(of: &StatFs) -> [u8; answer::STATFS as usize] {
    let fields = Fields::new().u64(of.blocks).u64(of.bfree).u64(of.bavail).u64(of.files).u64(of.ffree);
    fields.u32(of.bsize).u32(of.namelen).u32(of.frsize).bytes
}

/// GETXATTR and LISTXATTR that asked how many bytes there are (`fuse_getxattr_out`).
pub fn xattr_size(size: u32) -> [u8; answer::XATTR_SIZE as usize] {
    Fields::new().u32(size).bytes
}

/// GETLK: the lock that is in the way, or one of no kind (`fuse_lk_out`).
pub fn lock(lock: &Lock) -> [u8; answer::LOCK as usize] {
    let kind = match lock.kind {
        LockKind::Shared => abi::lock::F_RDLCK,
        LockKind::Exclusive => abi::lock::F_WRLCK,
        LockKind::None => abi::lock::F_UNLCK,
    };
    Fields::new().u64(lock.start).u64(lock.end).u32(kind).u32(lock.pid).bytes
}

/// LSEEK (`fuse_lseek_out`).
pub fn lseek(offset: u64) -> [u8; answer::LSEEK as usize] {
    offset.to_le_bytes()
}

/// IOCTL, in front of its data (`fuse_ioctl_out`). `result` is what the call gave; `flags` are 0, but for a guest that is to try again.
pub fn ioctl(result: i32, flags: u32) -> [u8; answer::IOCTL as usize] {
    Fields::new().put(&result.to_le_bytes()).u32(flags).bytes
}

/// An inode as statx(2) sees it (`fuse_statx`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statx {
    /// Which fields are filled in (`STATX_*`).
    pub mask: u32,
    /// The size that I/O is best done in.
    pub blksize: u32,
    /// `STATX_ATTR_*`.
    pub attributes: u64,
    /// Which of those are known.
    pub attributes_mask: u64,
    /// Names it has.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Type and permissions.
    pub mode: u16,
    /// The host's number of it.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Sectors of 512 bytes that it takes.
    pub blocks: u64,
    /// When it was read last: seconds since 1970, and nanoseconds.
    pub atime: (i64, u32),
    /// When it was made.
    pub btime: (i64, u32),
    /// When the inode changed last.
    pub ctime: (i64, u32),
    /// When its content changed last.
    pub mtime: (i64, u32),
    /// Which device it is: major and minor number.
    pub rdev: (u32, u32),
    /// Which device it lies on: major and minor number.
    pub dev: (u32, u32),
}

/// STATX (`fuse_statx_out`).
pub fn statx(of: &Statx, timeout: Duration) -> [u8; answer::STATX as usize] {
    // Behind the timeout are flags, of which there are none, and 16 bytes for later.
    let fields = Fields::new().u64(timeout.as_secs()).u32(timeout.subsec_nanos()).u32(0).put(&[0; 16]);
    let fields = fields.u32(of.mask).u32(of.blksize).u64(of.attributes);
    let fields = fields.u32(of.nlink).u32(of.uid).u32(of.gid).u16(of.mode).u16(0);
    let fields = fields.u64(of.ino).u64(of.size).u64(of.blocks).u64(of.attributes_mask);
    let fields = fields.time(of.atime).time(of.btime).time(of.ctime).time(of.mtime);
    fields.u32(of.rdev.0).u32(of.rdev.1).u32(of.dev.0).u32(of.dev.1).bytes
}

/// What a session is agreed on (`fuse_init_out`). The major version is [`abi::MAJOR`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitReply {
    /// The lower of both sides' minor versions counts.
    pub minor: u32,
    /// Most bytes that are read ahead.
    pub max_readahead: u32,
    /// [`abi::init`]. That there is an upper half is said by itself.
    pub flags: u64,
    /// Most requests that nobody waits for.
    pub max_background: u16,
    /// From how many of those on the file system is said to be congested.
    pub congestion_threshold: u16,
    /// Most bytes of a write.
    pub max_write: u32,
    /// Nanoseconds that times are multiples of.
    pub time_gran: u32,
    /// Most pages of a request ([`init::MAX_PAGES`]).
    pub max_pages: u16,
    /// Logarithm of what mappings are aligned to ([`init::MAP_ALIGNMENT`]).
    pub map_alignment: u16,
    /// How deep file systems may be stacked above ([`init::PASSTHROUGH`]).
    pub max_stack_depth: u32,
    /// Seconds after which the guest gives a request up ([`init::REQUEST_TIMEOUT`]); 0: never.
    pub request_timeout: u16,
}

/// INIT. A guest of a newer major version gets the same, and asks again in this one.
pub fn init(of: &InitReply) -> [u8; answer::INIT as usize] {
    let flags = if of.flags >> 32 == 0 { of.flags } else { of.flags | init::INIT_EXT };
    let [a, b, c, d, e, f, g, h] = flags.to_le_bytes();
    let fields = Fields::new().u32(abi::MAJOR).u32(of.minor).u32(of.max_readahead).put(&[a, b, c, d]);
    let fields = fields.u16(of.max_background).u16(of.congestion_threshold).u32(of.max_write).u32(of.time_gran);
    let fields = fields.u16(of.max_pages).u16(of.map_alignment).put(&[e, f, g, h]);
    fields.u32(of.max_stack_depth).u16(of.request_timeout).bytes
}

/// READDIR and READDIRPLUS: names, packed into a buffer one after the other.
#[derive(Debug)]
pub struct Dirents<'b> {
    buffer: &'b mut [u8],
    len: usize,
}

impl<'b> Dirents<'b> {
    /// Nothing yet, in a buffer of which at most `limit` bytes are used.
    pub fn new(buffer: &'b mut [u8], limit: u32) -> Dirents<'b> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX).min(buffer.len());
        Dirents { buffer: buffer.get_mut(..limit).unwrap_or_default(), len: 0 }
    }

    /// Adds a name (`fuse_dirent`). `offset` is where the directory goes on after it, `kind` the type of the inode as of readdir(3)
    /// (`DT_*`). False: there is no room for it, and nothing has changed.
    #[must_use]
    pub fn push(&mut self, ino: u64, offset: u64, kind: u32, name: &[u8]) -> bool {
        self.add(&[], ino, offset, kind, name)
    }

    /// Adds a name with its inode (`fuse_direntplus`), as [`entry`] gives it. One of node 0 is a name of which nothing is said.
    #[must_use]
    pub fn push_plus(&mut self, entry: &[u8; ENTRY], ino: u64, offset: u64, kind: u32, name: &[u8]) -> bool {
        self.add(entry, ino, offset, kind, name)
    }

    /// There is room for a name of so many bytes, with its inode (`plus`) or without: whoever has to do something for a name can know
    /// before.
    pub fn has_room(&self, plus: bool, name: usize) -> bool {
        let entry = if plus { ENTRY } else { 0 };
        room(entry, name).is_some_and(|size| size <= self.buffer.len().saturating_sub(self.len))
    }

    /// Bytes that are used.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No name was added.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes that are used.
    pub fn as_bytes(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }

    fn add(&mut self, entry: &[u8], ino: u64, offset: u64, kind: u32, name: &[u8]) -> bool {
        let (Some(size), Ok(namelen)) = (room(entry.len(), name.len()), u32::try_from(name.len())) else { return false };
        let end = self.len.saturating_add(size);
        let Some(place) = self.buffer.get_mut(self.len..end) else { return false };
        let head: [u8; answer::DIRENT as usize] = Fields::new().u64(ino).u64(offset).u32(namelen).u32(kind).bytes;
        let rest = [entry, &head, name].into_iter().try_fold(place, |place, part| {
            let (front, rest) = place.split_at_mut_checked(part.len())?;
            front.copy_from_slice(part);
            Some(rest)
        });
        rest.unwrap_or_default().fill(0);
        self.len = end;
        true
    }
}

/// Bytes of a name with what stands in front of it, filled up.
fn room(entry: usize, name: usize) -> Option<usize> {
    entry.checked_add(answer::DIRENT as usize)?.checked_add(name)?.checked_next_multiple_of(answer::ALIGNMENT as usize)
}

#[cfg(test)]
mod tests;
