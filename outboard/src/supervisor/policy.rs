//! When something that died is tried again.
//!
//! The first death is answered at once: a guest's driver waits tens of seconds before it notices, and most deaths are
//! singular. A process that dies again and again gets growing pauses, so that a machine with a broken device costs no
//! processor time; one that has lived for a while is trusted again, and one that works for most of the time is not tried more
//! rarely for that: longer pauses would only be worse for its guest.

use std::time::{Duration, Instant};

/// The second death in a row waits this long; each further one twice as long.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Guests give up on a disk after 30 s: a device that recovers must be back before.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Who lives this long has recovered.
const RECOVERED: Duration = Duration::from_secs(10);
/// Who lives this many times as long as the pause before its successor works for more than nine tenths of the time.
const WORTH: u32 = 10;

/// The pause before the next attempt.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Something that began at `began` has ended at `now`: how long to wait?
    pub fn after(&mut self, began: Instant, now: Instant) -> Duration {
        let lived = now.saturating_duration_since(began);
        if lived >= RECOVERED {
            self.failures = 0;
        }
        let delay = match self.failures {
            0 => Duration::ZERO,
            n => FIRST_DELAY.saturating_mul(1_u32.checked_shl(n - 1).unwrap_or(u32::MAX)).min(LONGEST_DELAY),
        };
        let worth_it = !delay.is_zero() && lived >= delay.saturating_mul(WORTH);
        self.failures = if worth_it { self.failures.saturating_sub(1).max(1) } else { self.failures.saturating_add(1) };
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

    #[test]
    fn who_works_most_of_the_time_is_not_tried_more_rarely() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let delays: Vec<u128> = (0..50).map(|_| backoff.after(now, now + Duration::from_secs(1)).as_millis()).collect();
        assert!(delays.get(1..).unwrap().iter().all(|delay| *delay == 100), "{delays:?}");
    }
}
