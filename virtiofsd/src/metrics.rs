//! What is counted.

use virtio::metrics::Counter;

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
/// Messages that were no request.
pub static BAD_REQUESTS: Counter = Counter::new();

/// All counters, with their names and what they count.
pub const ALL: [(&str, &Counter, &str); 6] = [
    ("virtiofsd_requests", &REQUESTS, "Requests that were carried out, or tried"),
    ("virtiofsd_errors", &ERRORS, "Requests answered with an error of the file system"),
    ("virtiofsd_handed_on", &HANDED_ON, "Requests that might have had to wait, and went to another thread"),
    ("virtiofsd_read_bytes", &READ_BYTES, "Bytes read"),
    ("virtiofsd_written_bytes", &WRITTEN_BYTES, "Bytes written"),
    ("virtiofsd_bad_requests", &BAD_REQUESTS, "Messages that were no request"),
];
