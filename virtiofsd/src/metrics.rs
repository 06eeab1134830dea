//! What is counted.

use virtio::metrics::{Counter, Histogram, Times};

use crate::abi::opcode;

/// Requests that were carried out, or tried.
pub static REQUESTS: Counter = Counter::new();
/// Those that were answered with an error of the file system.
pub static ERRORS: Counter = Counter::new();
/// Those that took another thread, because they might have had to wait.
pub static HANDED_ON: Counter = Counter::new();
/// Bytes read.
pub static READ_BYTES: Counter = Counter::new();
/// Bytes written.
pub static WRITTEN_BYTES: Counter = Counter::new();
/// Reports of changes that others made in directories that are watched.
pub static CHANGES: Counter = Counter::new();
/// Times that a queue waited for its limits.
pub static LIMITED: Counter = Counter::new();
/// Messages that were no request.
pub static BAD_REQUESTS: Counter = Counter::new();

static LOOK_TIMES: Histogram = Histogram::new();
static OPEN_TIMES: Histogram = Histogram::new();
static READ_TIMES: Histogram = Histogram::new();
static WRITE_TIMES: Histogram = Histogram::new();
static MAKE_TIMES: Histogram = Histogram::new();
static CHANGE_TIMES: Histogram = Histogram::new();
static LIST_TIMES: Histogram = Histogram::new();
static SYNC_TIMES: Histogram = Histogram::new();
static OTHER_TIMES: Histogram = Histogram::new();

/// How long requests took from being taken to being answered, by their kinds.
pub const TIMES: [Times; 9] = [
    ("virtiofsd_look_seconds", &LOOK_TIMES, "Time that LOOKUP, GETATTR, STATX, READLINK and STATFS took"),
    ("virtiofsd_open_seconds", &OPEN_TIMES, "Time that OPEN, OPENDIR, RELEASE, RELEASEDIR and FLUSH took"),
    ("virtiofsd_read_seconds", &READ_TIMES, "Time that READ took"),
    ("virtiofsd_write_seconds", &WRITE_TIMES, "Time that WRITE took"),
    ("virtiofsd_make_seconds", &MAKE_TIMES, "Time that CREATE, MKDIR, MKNOD, SYMLINK, LINK and TMPFILE took"),
    (
        "virtiofsd_change_seconds",
        &CHANGE_TIMES,
        "Time that SETATTR, UNLINK, RMDIR, RENAME and changes of extended attributes took",
    ),
    ("virtiofsd_list_seconds", &LIST_TIMES, "Time that READDIR and READDIRPLUS took"),
    ("virtiofsd_sync_seconds", &SYNC_TIMES, "Time that FSYNC, FSYNCDIR, SYNCFS, FALLOCATE and COPY_FILE_RANGE took"),
    ("virtiofsd_other_seconds", &OTHER_TIMES, "Time that all other requests took"),
];

/// Where the time of a request is noted.
pub fn times(number: u32) -> &'static Histogram {
    match number {
        opcode::LOOKUP | opcode::GETATTR | opcode::STATX | opcode::READLINK | opcode::STATFS => &LOOK_TIMES,
        opcode::OPEN | opcode::OPENDIR | opcode::RELEASE | opcode::RELEASEDIR | opcode::FLUSH => &OPEN_TIMES,
        opcode::READ => &READ_TIMES,
        opcode::WRITE => &WRITE_TIMES,
        opcode::CREATE | opcode::MKDIR | opcode::MKNOD | opcode::SYMLINK | opcode::LINK | opcode::TMPFILE => &MAKE_TIMES,
        opcode::SETATTR | opcode::UNLINK | opcode::RMDIR | opcode::RENAME | opcode::RENAME2 => &CHANGE_TIMES,
        opcode::SETXATTR | opcode::REMOVEXATTR => &CHANGE_TIMES,
        opcode::READDIR | opcode::READDIRPLUS => &LIST_TIMES,
        opcode::FSYNC | opcode::FSYNCDIR | opcode::SYNCFS | opcode::FALLOCATE => &SYNC_TIMES,
        opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => &SYNC_TIMES,
        _ => &OTHER_TIMES,
    }
}

/// All counters, with their names and what they count.
pub const ALL: [(&str, &Counter, &str); 8] = [
    ("virtiofsd_requests", &REQUESTS, "Requests that were carried out, or tried"),
    ("virtiofsd_errors", &ERRORS, "Requests answered with an error of the file system"),
    ("virtiofsd_handed_on", &HANDED_ON, "Requests that might have had to wait, and went to another thread"),
    ("virtiofsd_read_bytes", &READ_BYTES, "Bytes read"),
    ("virtiofsd_written_bytes", &WRITTEN_BYTES, "Bytes written"),
    ("virtiofsd_limited", &LIMITED, "Times that a queue waited for a limit"),
    ("virtiofsd_host_changes", &CHANGES, "Reports of changes that this host made in directories that are watched"),
    ("virtiofsd_bad_requests", &BAD_REQUESTS, "Messages that were no request"),
];
