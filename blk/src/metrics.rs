//! What is counted.

use virtio::metrics::{Counter, Histogram, Times};

/// Read requests.
pub static READS: Counter = Counter::new();
/// Bytes read.
pub static READ_BYTES: Counter = Counter::new();
/// Write requests.
pub static WRITES: Counter = Counter::new();
/// Bytes written.
pub static WRITTEN_BYTES: Counter = Counter::new();
/// Flush requests.
pub static FLUSHES: Counter = Counter::new();
/// Discard requests.
pub static DISCARDS: Counter = Counter::new();
/// Write-zeroes requests.
pub static ZEROES: Counter = Counter::new();
/// Secure-erase requests.
pub static ERASURES: Counter = Counter::new();
/// Requests the image could not carry out.
pub static FAILED: Counter = Counter::new();
/// Requests that were answered with an error without being tried: out of range, not allowed, not known.
pub static REFUSED: Counter = Counter::new();
/// Chains that could not be given an answer.
pub static BAD_REQUESTS: Counter = Counter::new();

static READ_TIMES: Histogram = Histogram::new();
static WRITE_TIMES: Histogram = Histogram::new();
static FLUSH_TIMES: Histogram = Histogram::new();
static OTHER_TIMES: Histogram = Histogram::new();

/// How long requests took from being taken to being answered, by their kinds.
pub const TIMES: [Times; 4] = [
    ("blk_read_seconds", &READ_TIMES, "Time that reads took"),
    ("blk_write_seconds", &WRITE_TIMES, "Time that writes took"),
    ("blk_flush_seconds", &FLUSH_TIMES, "Time that flushes took"),
    ("blk_other_seconds", &OTHER_TIMES, "Time that discards, zeroes and other requests took"),
];

/// All counters, with their names and what they count.
pub const ALL: [(&str, &Counter, &str); 11] = [
    ("blk_reads", &READS, "Read requests"),
    ("blk_read_bytes", &READ_BYTES, "Bytes read"),
    ("blk_writes", &WRITES, "Write requests"),
    ("blk_written_bytes", &WRITTEN_BYTES, "Bytes written"),
    ("blk_flushes", &FLUSHES, "Flush requests"),
    ("blk_discards", &DISCARDS, "Discard requests"),
    ("blk_write_zeroes", &ZEROES, "Write-zeroes requests"),
    ("blk_secure_erases", &ERASURES, "Secure-erase requests"),
    ("blk_failed", &FAILED, "Requests the image could not carry out"),
    ("blk_refused", &REFUSED, "Requests answered with an error without being tried"),
    ("blk_bad_requests", &BAD_REQUESTS, "Chains that could not be given an answer"),
];
