//! When something that died is tried again.
//!
//! The first death is answered at once: a guest's driver waits tens of seconds before it notices, and most deaths are
//! singular. A process that dies again and again gets growing pauses, so that a machine with a broken device costs no
//! processor time; one that has lived for a while is trusted again.

use std::time::{Duration, Instant};

/// The second death in a row waits this long; each further one twice as long.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Guests give up on a disk after 30 s: a device that recovers must be back before.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Who lives this long has recovered.
const RECOVERED: Duration = Duration::from_secs(10);

/// The pause before the next attempt.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Something that began at `began` has ended at `now`: how long to wait?
    pub fn after(&mut self, began: Instant, now: Instant) -> Duration {
        if now.saturating_duration_since(began) >= RECOVERED {
            self.failures = 0;
        }
        let delay = match self.failures {
            0 => Duration::ZERO,
            n => FIRST_DELAY.saturating_mul(1_u32.checked_shl(n - 1).unwrap_or(u32::MAX)).min(LONGEST_DELAY),
        };
        self.failures = self.failures.saturating_add(1);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_once_then_growing_then_constant_and_forgiven_after_a_while() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let delays: Vec<u128> = (0..10).map(|_| backoff.after(now, now).as_millis()).collect();
        assert_eq!(delays, [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(backoff.after(now, now + RECOVERED), Duration::ZERO);
        for _ in 0..100 {
            assert!(backoff.after(now, now) <= LONGEST_DELAY);
        }
    }
}
