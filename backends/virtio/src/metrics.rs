//! Counters: they cost one relaxed addition where something is counted, and nothing else.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, until the process ends.
#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    #[expect(clippy::new_without_default, reason = "counters are statics, which need a const function")]
    pub const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Adds.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Requests that were answered with an error because each process that served them died.
pub static CONDEMNED: Counter = Counter::new();

/// The counters of the ring layer, with their names and what they count. Every device has them.
pub const ALL: [(&str, &Counter, &str); 1] =
    [("ring_condemned", &CONDEMNED, "Requests answered with an error because each process that served them died")];
