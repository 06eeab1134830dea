//! The numbers of the FUSE protocol, as in `linux/fuse.h` up to version 7.45. All fields are little-endian here: virtio says so, and so
//! are the machines this runs on.

/// Major version. Another one is another protocol.
pub const MAJOR: u32 = 7;

/// The oldest minor version that is spoken: that of Linux 5.4, the first with virtio-fs.
pub const OLDEST_MINOR: u32 = 31;

/// The newest minor version that is known here.
pub const NEWEST_MINOR: u32 = 45;

/// The first minor version in which a message says how long its extensions are: that of Linux 6.3.
pub const EXTENSIONS_MINOR: u32 = 38;

/// The node of the root (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// What is asked for (`enum fuse_opcode`).
#[expect(missing_docs, reason = "the names are those of linux/fuse.h")]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const BMAP: u32 = 37;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const POLL: u32 = 40;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
    pub const COPY_FILE_RANGE_64: u32 = 53;
}

/// What the two sides can do (`FUSE_INIT`). The upper half travels in a field of its own, which is valid with [`init::INIT_EXT`].
#[expect(missing_docs, reason = "the names are those of linux/fuse.h")]
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const FILE_OPS: u64 = 1 << 2;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const SPLICE_WRITE: u64 = 1 << 7;
    pub const SPLICE_MOVE: u64 = 1 << 8;
    pub const SPLICE_READ: u64 = 1 << 9;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const HAS_IOCTL_DIR: u64 = 1 << 11;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const HANDLE_KILLPRIV: u64 = 1 << 19;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const INIT_RESERVED: u64 = 1 << 31;
    pub const SECURITY_CTX: u64 = 1 << 32;
    pub const HAS_INODE_DAX: u64 = 1 << 33;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub const HAS_EXPIRE_ONLY: u64 = 1 << 35;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    pub const HAS_RESEND: u64 = 1 << 39;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
    pub const OVER_IO_URING: u64 = 1 << 41;
    pub const REQUEST_TIMEOUT: u64 = 1 << 42;
}

/// What the server says of an open file (`FOPEN_*`).
#[expect(missing_docs, reason = "the names are those of linux/fuse.h")]
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const NONSEEKABLE: u32 = 1 << 2;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const STREAM: u32 = 1 << 4;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub const PASSTHROUGH: u32 = 1 << 7;
}

/// Which fields of SETATTR count (`FATTR_*`).
#[expect(missing_docs, reason = "the names are those of linux/fuse.h")]
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const LOCKOWNER: u32 = 1 << 9;
    pub const CTIME: u32 = 1 << 10;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// Flags of single messages, each with the name of its message in front.
#[expect(missing_docs, reason = "the names are those of linux/fuse.h")]
pub mod flag {
    pub const GETATTR_FH: u32 = 1 << 0;
    pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
    pub const READ_LOCKOWNER: u32 = 1 << 1;
    pub const WRITE_CACHE: u32 = 1 << 0;
    pub const WRITE_LOCKOWNER: u32 = 1 << 1;
    pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
    pub const RELEASE_FLUSH: u32 = 1 << 0;
    pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
    pub const LK_FLOCK: u32 = 1 << 0;
    pub const FSYNC_FDATASYNC: u32 = 1 << 0;
    pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
    pub const IOCTL_COMPAT: u32 = 1 << 0;
    pub const IOCTL_UNRESTRICTED: u32 = 1 << 1;
    pub const IOCTL_RETRY: u32 = 1 << 2;
    pub const IOCTL_32BIT: u32 = 1 << 3;
    pub const IOCTL_DIR: u32 = 1 << 4;
    pub const IOCTL_COMPAT_X32: u32 = 1 << 5;
}

/// What the server says of an inode (`FUSE_ATTR_*`).
#[expect(missing_docs, reason = "the names are those of linux/fuse.h")]
pub mod attr {
    pub const SUBMOUNT: u32 = 1 << 0;
    pub const DAX: u32 = 1 << 1;
}

/// What may follow a message: pieces of [`extension::HEADER`] bytes (size with the header, type) and content, each a multiple of
/// [`extension::UNIT`].
pub mod extension {
    /// Bytes that the header of a message counts extensions in.
    pub const UNIT: u32 = 8;
    /// Bytes of the header of each.
    pub const HEADER: u32 = 8;
    /// Types up to this one are security contexts (`FUSE_MAX_NR_SECCTX`).
    pub const MAX_SECURITY_CONTEXT: u32 = 31;
    /// Supplementary groups: how many, then the groups (`FUSE_EXT_GROUPS`).
    pub const GROUPS: u32 = 32;
}

/// Flags of RENAME2, as of renameat2(2).
#[expect(missing_docs, reason = "the names are those of linux/fs.h")]
pub mod rename {
    pub const NOREPLACE: u32 = 1 << 0;
    pub const EXCHANGE: u32 = 1 << 1;
    pub const WHITEOUT: u32 = 1 << 2;
}

/// Kinds of locks, as of fcntl(2).
#[expect(missing_docs, reason = "the names are those of fcntl.h")]
pub mod lock {
    pub const F_RDLCK: u32 = 0;
    pub const F_WRLCK: u32 = 1;
    pub const F_UNLCK: u32 = 2;
}

/// From where LSEEK counts, as of lseek(2).
#[expect(missing_docs, reason = "the names are those of unistd.h")]
pub mod seek {
    pub const SET: u32 = 0;
    pub const CUR: u32 = 1;
    pub const END: u32 = 2;
    pub const DATA: u32 = 3;
    pub const HOLE: u32 = 4;
}

/// Errors of Linux: on the wire they are its numbers, whatever the host.
#[expect(missing_docs, reason = "the names are those of errno.h")]
pub mod errno {
    pub const ENOENT: i32 = 2;
    pub const ENXIO: i32 = 6;
    pub const E2BIG: i32 = 7;
    pub const EINVAL: i32 = 22;
    pub const EFBIG: i32 = 27;
    pub const ERANGE: i32 = 34;
    pub const ENAMETOOLONG: i32 = 36;
    pub const ENOSYS: i32 = 38;
}

/// Bytes of what a guest sends.
pub mod sent {
    /// In front of every message.
    pub const HEADER: u32 = 40;
    /// The arguments of WRITE. The data follows.
    pub const WRITE: u32 = 40;
    /// The arguments of BATCH_FORGET. The pairs follow.
    pub const BATCH_FORGET: u32 = 8;
    /// One of those pairs: a node, and how many references.
    pub const FORGET_ONE: u32 = 16;
    /// The arguments of INIT before 7.36.
    pub const SHORT_INIT: u32 = 16;
    /// The arguments of INIT.
    pub const INIT: u32 = 64;
}

/// Bytes of what it is answered, behind the header.
#[expect(missing_docs, reason = "each is named for its message")]
pub mod answer {
    /// In front of every answer.
    pub const HEADER: u32 = 16;
    pub const ATTR: u32 = 104;
    pub const ENTRY: u32 = 128;
    pub const OPEN: u32 = 16;
    pub const WRITE: u32 = 8;
    pub const STATFS: u32 = 80;
    pub const XATTR_SIZE: u32 = 8;
    pub const LOCK: u32 = 24;
    pub const LSEEK: u32 = 8;
    pub const IOCTL: u32 = 16;
    pub const STATX: u32 = 288;
    pub const INIT: u32 = 64;
    pub const COPY_64: u32 = 8;
    /// A name in a directory, without the name.
    pub const DIRENT: u32 = 24;
    /// What each name in a directory is filled up to a multiple of.
    pub const ALIGNMENT: u32 = 8;
}
