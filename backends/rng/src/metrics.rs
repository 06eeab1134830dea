//! What is counted.

use virtio::metrics::Counter;

/// Requests that were served.
pub static REQUESTS: Counter = Counter::new();
/// Bytes given to the guest.
pub static BYTES: Counter = Counter::new();
/// Chains that were no request.
pub static BAD_REQUESTS: Counter = Counter::new();

/// All counters, with their names and what they count.
pub const ALL: [(&str, &Counter, &str); 3] = [
    ("rng_requests", &REQUESTS, "Requests that were served"),
    ("rng_bytes", &BYTES, "Bytes given to the guest"),
    ("rng_bad_requests", &BAD_REQUESTS, "Chains that were no request"),
];
