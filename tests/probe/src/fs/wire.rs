//! What of FUSE's wire format a go-between has to know (Linux, `include/uapi/linux/fuse.h`): headers, how long an answer may be, which
//! requests have none, and what FUSE_INIT settles. All else passes through.
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use anyhow::{Result, bail};

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: u32 = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER: u32 = 16;
/// Bytes before the data of a WRITE: the header and `fuse_write_in`.
pub const BEFORE_DATA: u32 = 80;

/// Most bytes of data in a request or an answer: 256 pages, as many as Linux moves at a time unless it is told otherwise
/// (`fs.fuse.max_pages_limit`). A server that offers more is taken at this.
pub const MOST_DATA: u32 = 1 << 20;

/// Most bytes of data, in pages.
const MOST_PAGES: u16 = 256;

const PAGE: u32 = 4096;

/// FUSE_WRITE, the one request with data of pages.
pub const WRITE: u32 = 16;
/// FUSE_INIT.
pub const INIT: u32 = 26;
/// FUSE_INTERRUPT.
pub const INTERRUPT: u32 = 36;
/// FUSE_DESTROY.
pub const DESTROY: u32 = 38;

const FORGET: u32 = 2;
const NOTIFY_REPLY: u32 = 41;
const BATCH_FORGET: u32 = 42;

/// Kinds of requests, their numbers and names.
const NAMES: [(u32, &str); 52] = [
    (1, "LOOKUP"),
    (FORGET, "FORGET"),
    (3, "GETATTR"),
    (4, "SETATTR"),
    (5, "READLINK"),
    (6, "SYMLINK"),
    (8, "MKNOD"),
    (9, "MKDIR"),
    (10, "UNLINK"),
    (11, "RMDIR"),
    (12, "RENAME"),
    (13, "LINK"),
    (14, "OPEN"),
    (15, "READ"),
    (WRITE, "WRITE"),
    (17, "STATFS"),
    (18, "RELEASE"),
    (20, "FSYNC"),
    (21, "SETXATTR"),
    (22, "GETXATTR"),
    (23, "LISTXATTR"),
    (24, "REMOVEXATTR"),
    (25, "FLUSH"),
    (INIT, "INIT"),
    (27, "OPENDIR"),
    (28, "READDIR"),
    (29, "RELEASEDIR"),
    (30, "FSYNCDIR"),
    (31, "GETLK"),
    (32, "SETLK"),
    (33, "SETLKW"),
    (34, "ACCESS"),
    (35, "CREATE"),
    (INTERRUPT, "INTERRUPT"),
    (37, "BMAP"),
    (DESTROY, "DESTROY"),
    (39, "IOCTL"),
    (40, "POLL"),
    (NOTIFY_REPLY, "NOTIFY_REPLY"),
    (BATCH_FORGET, "BATCH_FORGET"),
    (43, "FALLOCATE"),
    (44, "READDIRPLUS"),
    (45, "RENAME2"),
    (46, "LSEEK"),
    (47, "COPY_FILE_RANGE"),
    (48, "SETUPMAPPING"),
    (49, "REMOVEMAPPING"),
    (50, "SYNCFS"),
    (51, "TMPFILE"),
    (52, "STATX"),
    (53, "COPY_FILE_RANGE_64"),
    (4096, "CUSE_INIT"),
];

/// The name of a kind of request.
pub fn name(opcode: u32) -> String {
    NAMES.iter().find(|(number, _)| *number == opcode).map_or_else(|| format!("request {opcode}"), |(_, name)| (*name).to_owned())
}

/// What a request says of itself that matters on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub opcode: u32,
    /// Its number; the answer has the same.
    pub unique: u64,
    /// Most bytes that its answer may have behind the header. `None`: it has no answer.
    pub room: Option<u32>,
}

impl Request {
    /// Reads it off a whole request. `None`: it is shorter than its header.
    pub fn read(bytes: &[u8]) -> Option<Request> {
        let (opcode, unique) = (word(bytes, 4)?, long(bytes, 8)?);
        bytes.get(..40)?;
        Some(Request { opcode, unique, room: room(opcode, bytes) })
    }

    /// It goes past the others, into the queue for what must not wait: what frees memory, and what ends a wait.
    pub fn is_urgent(&self) -> bool {
        matches!(self.opcode, FORGET | BATCH_FORGET | INTERRUPT)
    }
}

/// Most bytes of an answer behind its header.
fn room(opcode: u32, bytes: &[u8]) -> Option<u32> {
    // Where the request says it itself: `size` of fuse_read_in and fuse_getxattr_in, `out_size` of fuse_ioctl_in.
    let said = |at| word(bytes, at).unwrap_or(0);
    Some(match opcode {
        FORGET | BATCH_FORGET | NOTIFY_REPLY => return None,
        // fuse_entry_out
        1 | 6 | 8 | 9 | 13 => 128,
        // fuse_attr_out
        3 | 4 => 104,
        5 => PAGE,
        // fuse_open_out
        14 | 27 => 16,
        15 | 28 | 44 => said(56),
        // fuse_write_out, fuse_bmap_out, fuse_poll_out, fuse_lseek_out, fuse_copy_file_range_out
        WRITE | 37 | 40 | 46 | 47 | 53 => 8,
        // fuse_statfs_out
        17 => 80,
        // Asked with 0 for the size alone, they answer with fuse_getxattr_out.
        22 | 23 => said(40).max(8),
        // fuse_init_out
        INIT => 64,
        // fuse_lk_out
        31 => 24,
        // fuse_entry_out and fuse_open_out
        35 | 51 => 144,
        // fuse_ioctl_out, and what it is to fetch
        39 => said(68).saturating_add(16),
        // fuse_statx_out
        52 => 288,
        10 | 11 | 12 | 18 | 20 | 21 | 24 | 25 | 29 | 30 | 32 | 33 | 34 | INTERRUPT | DESTROY | 43 | 45 | 48 | 49 | 50 => 0,
        // Younger than this table: room for what is not much data.
        _ => PAGE,
    })
}

/// Checks an answer to `request` of which the server says that it has `used` bytes, where `offered` were offered. `bytes` is what is there, and
/// as much of it as there can be. What comes back is the answer: nothing, where there is none.
///
/// # Errors
/// A sentence on what the server must not say. The kernel would refuse most of it, too, but only this side knows what was offered.
pub fn check(request: &Request, used: u32, offered: u32, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let what = name(request.opcode);
    // An INTERRUPT may be left alone; then the request that it was for ends in its own time. To DESTROY upstream's virtiofsd says nothing, either,
    // and nothing depends on it.
    if used == 0 && (request.room.is_none() || matches!(request.opcode, INTERRUPT | DESTROY)) {
        return Ok(Vec::new());
    }
    if request.room.is_none() {
        bail!("The server says it wrote {used} bytes in answer to {what}, which has no answer");
    }
    if used > offered {
        bail!("The server says it wrote {used} bytes in answer to {what}, and {offered} were offered");
    }
    let (Some(len), Some(error), Some(unique)) = (word(&bytes, 0), word(&bytes, 4), long(&bytes, 8)) else {
        bail!("The server answered {what} with {used} bytes: that is less than a header");
    };
    if len != used {
        bail!("The server says it wrote {used} bytes in answer to {what}, and in them that there are {len}");
    }
    if unique != request.unique {
        bail!("The server answered {what} number {} with an answer to number {unique}", request.unique);
    }
    // As a negative number: 0, or an error from 1 to 511.
    let number = 0u32.wrapping_sub(error);
    if number > 511 {
        bail!("The server answered {what} with an error that is none ({error:#x})");
    }
    if number != 0 && len != OUT_HEADER {
        bail!("The server answered {what} with error {number} and with {} bytes of data", len.saturating_sub(OUT_HEADER));
    }
    Ok(bytes)
}

/// The error that an answer carries, as a positive number.
pub fn error(answer: &[u8]) -> u32 {
    0u32.wrapping_sub(word(answer, 4).unwrap_or(0))
}

/// A request without a body.
pub fn bare(opcode: u32, unique: u64) -> Vec<u8> {
    request(opcode, unique, &[])
}

/// FUSE_INIT as a guest sends it that knows version 7.45 and all features of the protocol.
pub fn init(unique: u64) -> Vec<u8> {
    let all = FLAGS.iter().fold(0, |all, (bit, _)| all | 1 << bit) & !OF_THE_DEVICE;
    let (low, high) = halves(all);
    let words = [7, 45, 128 << 10, low, high, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    request(INIT, unique, &words.map(u32::to_le_bytes).concat())
}

/// A request of the guest's root about an inode, with data of `more` bytes to come behind it.
pub fn about(opcode: u32, node: u64, more: u32, body: &[u8]) -> Vec<u8> {
    let len = IN_HEADER.saturating_add(u32::try_from(body.len()).unwrap_or(0)).saturating_add(more);
    [&[len, opcode].map(u32::to_le_bytes).concat()[..], &6_u64.to_le_bytes(), &node.to_le_bytes(), &[0; 16], body].concat()
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let len = IN_HEADER.saturating_add(u32::try_from(body.len()).unwrap_or(0));
    [&[len, opcode].map(u32::to_le_bytes).concat()[..], &unique.to_le_bytes(), &[0; 24], body].concat()
}

/// Features that FUSE_INIT settles: their bits and names.
pub const FLAGS: [(u32, &str); 42] = [
    (0, "ASYNC_READ"),
    (1, "POSIX_LOCKS"),
    (2, "FILE_OPS"),
    (3, "ATOMIC_O_TRUNC"),
    (4, "EXPORT_SUPPORT"),
    (5, "BIG_WRITES"),
    (6, "DONT_MASK"),
    (7, "SPLICE_WRITE"),
    (8, "SPLICE_MOVE"),
    (9, "SPLICE_READ"),
    (10, "FLOCK_LOCKS"),
    (11, "HAS_IOCTL_DIR"),
    (12, "AUTO_INVAL_DATA"),
    (13, "DO_READDIRPLUS"),
    (14, "READDIRPLUS_AUTO"),
    (15, "ASYNC_DIO"),
    (16, "WRITEBACK_CACHE"),
    (17, "NO_OPEN_SUPPORT"),
    (18, "PARALLEL_DIROPS"),
    (19, "HANDLE_KILLPRIV"),
    (20, "POSIX_ACL"),
    (21, "ABORT_ERROR"),
    (22, "MAX_PAGES"),
    (23, "CACHE_SYMLINKS"),
    (24, "NO_OPENDIR_SUPPORT"),
    (25, "EXPLICIT_INVAL_DATA"),
    (26, "MAP_ALIGNMENT"),
    (27, "SUBMOUNTS"),
    (28, "HANDLE_KILLPRIV_V2"),
    (29, "SETXATTR_EXT"),
    (30, "INIT_EXT"),
    (32, "SECURITY_CTX"),
    (33, "HAS_INODE_DAX"),
    (34, "CREATE_SUPP_GROUP"),
    (35, "HAS_EXPIRE_ONLY"),
    (36, "DIRECT_IO_ALLOW_MMAP"),
    (37, "PASSTHROUGH"),
    (38, "NO_EXPORT_SUPPORT"),
    (39, "HAS_RESEND"),
    (40, "ALLOW_IDMAP"),
    (41, "OVER_IO_URING"),
    (42, "REQUEST_TIMEOUT"),
];

/// Features of `/dev/fuse` and not of a file system: files and rings that a server in the same kernel hands over. Across a virtqueue nobody can
/// keep that promise, and requests that the kernel put into such a ring would wait for ever.
const OF_THE_DEVICE: u64 = 1 << 37 | 1 << 41;

/// What FUSE_INIT has settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// The version of the protocol.
    pub major: u32,
    /// And its second number.
    pub minor: u32,
    /// Features, as bits of [`FLAGS`].
    pub flags: u64,
    /// Most bytes that are read ahead.
    pub max_readahead: u32,
    /// Most bytes of a WRITE.
    pub max_write: u32,
    /// Most pages of a request; 0 if it was not said.
    pub max_pages: u16,
    /// Most requests at a time that nobody waits for.
    pub max_background: u16,
    /// Nanoseconds in which times are kept.
    pub time_gran: u32,
}

impl Settled {
    /// Reads it off an answer to FUSE_INIT. What an old server leaves out is 0.
    pub fn read(answer: &[u8]) -> Settled {
        let word = |at| word(answer, at).unwrap_or(0);
        let half = |at| half(answer, at).unwrap_or(0);
        let high = if word(28) & 1 << 30 == 0 { 0 } else { word(48) };
        Settled {
            major: word(16),
            minor: word(20),
            max_readahead: word(24),
            flags: u64::from(word(28)) | u64::from(high) << 32,
            max_background: half(32),
            max_write: word(36),
            time_gran: word(40),
            max_pages: if word(28) & 1 << 22 == 0 { 0 } else { half(44) },
        }
    }
}

/// Takes out of the kernel's FUSE_INIT what cannot be had across a virtqueue.
pub fn narrow_request(request: &mut [u8]) {
    narrow(request, 56);
}

/// Takes out of a server's answer to FUSE_INIT what cannot be had across a virtqueue, and keeps data within [`MOST_DATA`].
pub fn narrow_answer(answer: &mut [u8]) {
    narrow(answer, 48);
    if let Some(most) = word(answer, 36) {
        put(answer, 36, &most.min(MOST_DATA).to_le_bytes());
    }
    if let Some(pages) = half(answer, 44) {
        put(answer, 44, &pages.min(MOST_PAGES).to_le_bytes());
    }
}

fn narrow(bytes: &mut [u8], at: usize) {
    if let Some(high) = word(bytes, at) {
        put(bytes, at, &(high & !halves(OF_THE_DEVICE).1).to_le_bytes());
    }
}

fn halves(flags: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = flags.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..part.len())) {
        place.copy_from_slice(part);
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests;
