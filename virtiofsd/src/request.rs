//! A request of the guest: a FUSE message in a descriptor chain. No I/O here.
//!
//! Guest bytes are fetched once, into a [`Scratch`] of the thread's own: the header, the arguments, the names, and the values that
//! are small. What is parsed is that copy. Data of reads and writes is never copied: it stays in the chain, behind the arguments.

//!
//! ```text
//! readable: header (40 bytes) | arguments | names | data | extensions
//! writable: header (16 bytes) | answer | data
//! ```
//!
//! How these are spread over descriptors says nothing; only their order counts. The length in the header is where a message ends: the
//! chain may go on behind it, but not end before it.
//!
//! | file | what lives there |
//! |---|---|
//! | `fetch` | the one copy, and how it goes to another thread |
//! | `message` | a message, from which one field after the other is taken |
//! | `name` | names, targets of symbolic links, names of attributes |
//! | `parse` | each message, in the order of its number |
//! | `extension` | what may follow a message that makes something |

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod extension;
mod fetch;
mod message;
mod name;
mod parse;

use std::ffi::CStr;

pub use fetch::{BoxedRequest, Fetched, Scratch, data, fetch, fetch_bytes, forgotten};
pub use name::MAX_NAME;
pub use parse::parse;

/// Longest target of a symbolic link, in bytes without the zero at its end (`PATH_MAX`, which counts that).
pub const MAX_TARGET: usize = 4095;

/// Longest value of an extended attribute, and longest list of names of such, in bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub const MAX_XATTR: u32 = 65536;

/// Most bytes of an ioctl, in each direction. Those that mean something to a file system have a few dozen.
pub const MAX_IOCTL: u32 = 4096;

/// Longest label of a file, in bytes: a page, as Linux has it.
pub const MAX_LABEL: usize = 4096;

/// Bytes of both sides of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What the guest sends.
    pub readable: u32,
    /// What it has room for in an answer.
    pub writable: u32,
}

/// A message that is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// There is nobody to answer, or no place for it: no whole header, no room for the header of an answer, or nonsense in one of the two
    /// messages that have no answer (FORGET and BATCH_FORGET, which need no room either). The chain goes back with 0 bytes.
    #[error("A message that cannot be answered: no whole header, no room for an answer, or a malformed FORGET")]
    Unanswerable,
    /// It is answered with an error.
    #[error("A message was refused with error {errno}: {why}")]
    Refused {
        /// The guest's number for it.
        unique: u64,
        /// Linux's number of the error, positive.
        errno: i32,
        /// What is wrong, for people.
        why: &'static str,
    },
}

/// A name in a directory: one component, neither empty nor `.` nor `..`, without a slash, at most 255 bytes. There is no other way to
/// name something below the share, so nothing that a guest says is ever a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// This text, if it is a name.
    pub fn new(text: &'a CStr) -> Option<Name<'a>> {
        name::checked(text).ok()
    }

    /// As the system wants it.
    pub fn as_c_str(&self) -> &'a CStr {
        self.0
    }
}

/// Which variants of a message a session has agreed on (`FUSE_INIT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dialect {
    /// `FUSE_SETXATTR_EXT`: the longer form of that message.
    pub setxattr_ext: bool,
    /// `FUSE_SECURITY_CTX`: what is made may have a label.
    pub security_ctx: bool,
}

/// A checked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The guest's number for it, for the answer and for an interruption.
    pub unique: u64,
    /// The inode it is about. Never looked into here.
    pub node: u64,
    /// Whoever asked, in the guest. Neither is `u32::MAX` where something is made.
    pub uid: u32,
    /// As above.
    pub gid: u32,
    /// The one supplementary group that matters where something is made (`FUSE_EXT_GROUPS`).
    pub group: Option<u32>,
    /// The label of what is made (`FUSE_SECURITY_CTX`).
    pub label: Option<Label<'a>>,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What a security module of the guest says of a file: an extended attribute, and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the above")]
pub struct Label<'a> {
    pub name: &'a CStr,
    pub value: &'a [u8],
}

/// What is asked, with what it takes. Sizes are at most what the chain has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of linux/fuse.h")]
pub enum Operation<'a> {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
    Lookup {
        name: Name<'a>,
    },
    /// Of one inode, so many references.
    Forget {
        count: u64,
    },
    /// So many pairs of inode and count follow the arguments in the chain, all of them there ([`forgotten`]).
    BatchForget {
        count: u32,
    },
    GetAttr {
        handle: Option<u64>,
    },
    SetAttr(SetAttr),
    Statx {
        handle: Option<u64>,
        flags: u32,
        mask: u32,
    },
    ReadLink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    MkNod {
        name: Name<'a>,
        mode: u32,
        device: u32,
        umask: u32,
    },
    MkDir {
        name: Name<'a>,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    RmDir {
        name: Name<'a>,
    },
    /// `flags` as of renameat2, checked: none that are unknown, and an exchange only by itself.
    Rename {
        name: Name<'a>,
        to: u64,
        new_name: Name<'a>,
        flags: u32,
    },
    /// `node` of the request is the directory, `old` what gets another name.
    Link {
        old: u64,
        name: Name<'a>,
    },
    Open {
        flags: u32,
        open_flags: u32,
    },
    Create {
        name: Name<'a>,
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    },
    TmpFile {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
        flags: u32,
    },
    /// The data follows the arguments in the chain, all of it there ([`data`]).
    Write {
        handle: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        flags: u32,
    },
    StatFs,
    Release {
        handle: u64,
        owner: Option<u64>,
        flags: u32,
        release_flags: u32,
    },
    Flush {
        handle: u64,
        owner: u64,
    },
    FSync {
        handle: u64,
        data_only: bool,
    },
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        clear_sgid: bool,
    },
    /// `size` 0: how long it is. At most [`MAX_XATTR`].
    GetXattr {
        name: &'a CStr,
        size: u32,
    },
    /// As above.
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a CStr,
    },
    OpenDir {
        flags: u32,
    },
    ReadDir {
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    ReleaseDir {
        handle: u64,
    },
    FSyncDir {
        handle: u64,
        data_only: bool,
    },
    GetLock {
        handle: u64,
        owner: u64,
        lock: Lock,
    },
    /// `wait`: until it can be had or the request is interrupted. `flock`: of the open file, not of the owner.
    SetLock {
        handle: u64,
        owner: u64,
        lock: Lock,
        wait: bool,
        flock: bool,
    },
    Access {
        mask: u32,
    },
    /// The request of that number is not wanted any more.
    Interrupt {
        unique: u64,
    },
    /// `output`: most bytes of the answer's data, at most [`MAX_IOCTL`].
    Ioctl {
        handle: u64,
        flags: u32,
        command: u32,
        argument: u64,
        input: &'a [u8],
        output: u32,
    },
    FAllocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    LSeek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    /// `long`: the answer has 64 bits (`FUSE_COPY_FILE_RANGE_64`).
    CopyFileRange {
        handle: u64,
        offset: u64,
        to: u64,
        to_handle: u64,
        to_offset: u64,
        length: u64,
        flags: u64,
        long: bool,
    },
    SyncFs,
}

/// What of an inode is to change; what is `None` is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// The open file by which it was asked.
    pub handle: Option<u64>,
    /// Permissions, and nothing but those (07777).
    pub mode: Option<u32>,
    /// The owner. Not `u32::MAX`.
    pub uid: Option<u32>,
    /// The group. Not `u32::MAX`.
    pub gid: Option<u32>,
    /// The length, at most `i64::MAX`.
    pub size: Option<u64>,
    /// When it was read last.
    pub atime: Option<Time>,
    /// When it was written last.
    pub mtime: Option<Time>,
    /// Whoever changes its length may not keep set-user-id bits on it (`FATTR_KILL_SUIDGID`).
    pub kill_suidgid: bool,
}

/// A time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// The host's.
    Now,
    /// This one: seconds, and nanoseconds below 10^9.
    At(i64, u32),
}

/// A lock on a range of a file. `end` is the last byte, `u64::MAX` or `i64::MAX` for the end of whatever there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// First byte.
    pub start: u64,
    /// Last byte, not before the first.
    pub end: u64,
    /// What kind.
    pub kind: LockKind,
    /// The guest's number of the process.
    pub pid: u32,
}

/// What a lock keeps out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "F_RDLCK, F_WRLCK, F_UNLCK")]
pub enum LockKind {
    Shared,
    Exclusive,
    None,
}

#[cfg(test)]
mod tests;
