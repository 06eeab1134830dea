//! What the process may do.
//!
//! Every call that takes a path takes one that begins at a descriptor of the share: the number that means "here" instead is refused,
//! so that a slip of ours cannot name anything else, were there anything else to name.

use daemon::rules::{PROTOCOL, RINGS, RUNTIME};
use sandbox::{Capability, Limits, Policy, Rule, When, allow, allow_if};
use sandbox::{GETXATTRAT, LISTXATTRAT, REMOVEXATTRAT, SETXATTRAT};

use crate::args::{MAX_POOL, MAX_QUEUES};
use crate::fs::ioctl as commands;
use crate::sys;
use crate::tree::handle::KEPT;

/// The role of the threads that serve queues.
pub const QUEUE: &str = "queue";

/// The role of the threads for what may have to wait.
pub const POOL: &str = "slow";

/// The same where the process is several users.
pub const QUEUE_OF_MANY: &str = "queue of many users";

/// The same where the process is several users.
pub const POOL_OF_MANY: &str = "slow of many users";

/// The same of several users where inodes are reached by their handles.
pub const QUEUE_BY_HANDLE: &str = "queue by handle";

/// The same of several users where inodes are reached by their handles.
pub const POOL_BY_HANDLE: &str = "slow by handle";

/// Descriptors of each queue: two ends of a bell, one of outcomes, three of the ring, and one to spare.
const PER_QUEUE: u64 = 7;

/// Standard streams, sockets, signals, the share, those that come with messages, and files of a guest that does not open them.
const FIXED: u64 = 32 + 64 + KEPT as u64;

/// Descriptors besides those of files.
pub const OWN_DESCRIPTORS: u64 = FIXED + PER_QUEUE * (MAX_QUEUES as u64 + 1) + MAX_POOL as u64;

/// What a process needs that makes files in the name of several users.
pub const OF_MANY: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
];

/// What a process needs whose one user is the guest's root: what its owner could do all the same, without the detour of first
/// changing a file's permissions.
pub const OF_ONE: &[Capability] =
    &[Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_FOWNER, Capability::CAP_SETFCAP];

/// Not relative to the current directory.
const BELOW: &[When] = &[When::Not(0, HERE)];
const BOTH_BELOW: &[When] = &[When::Not(0, HERE), When::Not(2, HERE)];
const SECOND_BELOW: &[When] = &[When::Not(1, HERE)];
const HERE: u32 = libc::AT_FDCWD.cast_unsigned();

const FILES: &[Rule] = &[
    allow_if(libc::SYS_openat2, BELOW, "files and directories, by one name in a directory of the share"),
    allow_if(libc::SYS_statx, BELOW, "what is known about a file"),
    allow_if(libc::SYS_readlinkat, BELOW, "targets of symbolic links"),
    allow_if(SYMLINKAT, SECOND_BELOW, "making symbolic links"),
    allow_if(libc::SYS_mkdirat, BELOW, "making directories"),
    allow_if(libc::SYS_mknodat, BELOW, "making files, pipes and sockets"),
    allow_if(libc::SYS_linkat, BOTH_BELOW, "giving a file another name"),
    allow_if(libc::SYS_unlinkat, BELOW, "taking a name away"),
    allow_if(libc::SYS_renameat2, BOTH_BELOW, "changing a name"),
    allow_if(libc::SYS_fchmodat2, BELOW, "permissions"),
    allow(libc::SYS_fchmod, "permissions, before Linux 6.6"),
    allow_if(libc::SYS_fchownat, BELOW, "owners"),
    allow_if(libc::SYS_utimensat, BELOW, "times"),
    allow_if(SETXATTRAT, BELOW, "extended attributes"),
    allow_if(GETXATTRAT, BELOW, "extended attributes"),
    allow_if(LISTXATTRAT, BELOW, "extended attributes"),
    allow_if(REMOVEXATTRAT, BELOW, "extended attributes"),
    allow(libc::SYS_fsetxattr, "extended attributes, before Linux 6.13"),
    allow(libc::SYS_fgetxattr, "extended attributes, before Linux 6.13"),
    allow(libc::SYS_flistxattr, "extended attributes, before Linux 6.13"),
    allow(libc::SYS_fremovexattr, "extended attributes, before Linux 6.13"),
    allow(libc::SYS_fstatfs, "how much room there is"),
    allow(libc::SYS_getdents64, "reading directories"),
    allow(libc::SYS_lseek, "places in directories; holes in files"),
    allow(libc::SYS_preadv2, "data, straight into guest memory"),
    allow(libc::SYS_pwritev2, "data, straight from guest memory"),
    allow(libc::SYS_ftruncate, "lengths of files"),
    allow(libc::SYS_fallocate, "room for a file, and holes in it"),
    allow(libc::SYS_copy_file_range, "copies that need not pass the guest"),
    allow(libc::SYS_fsync, "what was written reaches the disk"),
    allow(libc::SYS_fdatasync, "what was written reaches the disk"),
    allow(libc::SYS_syncfs, "what was written reaches the disk"),
    allow_if(
        libc::SYS_fcntl,
        &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)],
        "a file that never had a name is kept; some file systems say what went wrong when a descriptor is closed",
    ),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_OFD_SETLK as u32)], "locks on ranges of a file, without waiting"),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_OFD_GETLK as u32)], "what is in the way of a lock"),
    allow_if(libc::SYS_flock, &[When::Is(1, (libc::LOCK_SH | libc::LOCK_NB) as u32)], "locks on whole files, without waiting"),
    allow_if(libc::SYS_flock, &[When::Is(1, (libc::LOCK_EX | libc::LOCK_NB) as u32)], "locks on whole files, without waiting"),
    allow_if(libc::SYS_flock, &[When::Is(1, (libc::LOCK_UN | libc::LOCK_NB) as u32)], "locks on whole files"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, commands::GET_FLAGS)], "flags of a file"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, commands::SET_FLAGS)], "flags of a file"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, commands::GET_MORE)], "flags and project of a file"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, commands::SET_MORE)], "flags and project of a file"),
    allow_if(libc::SYS_name_to_handle_at, BELOW, "what the file system calls a file"),
    allow_if(libc::SYS_fanotify_mark, &[When::Not(3, HERE)], "watching directories"),
    allow(libc::SYS_umask, "what a guest's user does not want new files to have"),
    allow(libc::SYS_munmap, "guest memory that is given up, by whoever had it last"),
];

const SYMLINKAT: i64 = libc::SYS_symlinkat;

/// What the thread that talks to the frontend does when the guest moves: it looks at what the guest knows, and opens what was open.
const STATE: &[Rule] = &[
    allow_if(libc::SYS_openat2, BELOW, "files and directories, by one name in a directory of the share"),
    allow_if(libc::SYS_statx, BELOW, "what is known about a file"),
    allow_if(libc::SYS_readlinkat, BELOW, "where an open file is by now"),
    allow_if(libc::SYS_name_to_handle_at, BELOW, "what the file system calls a file"),
    allow(libc::SYS_fstatfs, "whether a file system asks somebody else"),
    allow(libc::SYS_fdatasync, "what was written reaches the machine that is asked"),
];

const USERS: &[Rule] = &[
    allow(libc::SYS_setresuid, "the owner of a new file"),
    allow(libc::SYS_setresgid, "the group of a new file"),
    allow(libc::SYS_setgroups, "the one other group of whoever makes a file"),
    allow(libc::SYS_capget, "keeping a set-group-id bit that a guest's root sets"),
    allow(libc::SYS_capset, "keeping a set-group-id bit that a guest's root sets"),
];

/// In no other filter: whoever may do so, and has the right to it, can make up a handle of any file of the file system.
const HANDLES: &[Rule] = &[allow_if(
    libc::SYS_open_by_handle_at,
    &[When::Not(0, HERE), When::Is(2, sys::BY_HANDLE.cast_unsigned())],
    "a file by what the file system calls it, as a path only",
)];

/// The process reaches its share and nothing else.
pub const POLICY: Policy = Policy {
    name: "outboard-virtiofsd",
    limits: Limits { descriptors: OWN_DESCRIPTORS, threads: MAX_QUEUES as u64 + MAX_POOL as u64 + 5 },
    capabilities: OF_MANY,
    control: &[RUNTIME, PROTOCOL, STATE],
    threads: &[
        (QUEUE, &[RUNTIME, RINGS, FILES]),
        (POOL, &[RUNTIME, FILES]),
        (QUEUE_OF_MANY, &[RUNTIME, RINGS, FILES, USERS]),
        (POOL_OF_MANY, &[RUNTIME, FILES, USERS]),
        (QUEUE_BY_HANDLE, &[RUNTIME, RINGS, FILES, USERS, HANDLES]),
        (POOL_BY_HANDLE, &[RUNTIME, FILES, USERS, HANDLES]),
    ],
};
