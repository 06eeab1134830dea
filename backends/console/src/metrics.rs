//! What is counted.

use virtio::metrics::Counter;

/// Bytes from the guest.
pub static SHOWN_BYTES: Counter = Counter::new();
/// Bytes from the guest that the port did not take.
pub static DROPPED_BYTES: Counter = Counter::new();
/// Bytes to the guest.
pub static TYPED_BYTES: Counter = Counter::new();
/// Chains that were no request.
pub static BAD_REQUESTS: Counter = Counter::new();

/// All counters, with their names and what they count.
pub const ALL: [(&str, &Counter, &str); 4] = [
    ("console_shown_bytes", &SHOWN_BYTES, "Bytes from the guest"),
    ("console_dropped_bytes", &DROPPED_BYTES, "Bytes from the guest that the port did not take"),
    ("console_typed_bytes", &TYPED_BYTES, "Bytes to the guest"),
    ("console_bad_requests", &BAD_REQUESTS, "Chains that were no request"),
];
