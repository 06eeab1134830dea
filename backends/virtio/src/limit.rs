//! Limits on how much a disk or a share is used: operations and bytes in a second, each with a burst.
//!
//! # Theory of operation
//!
//! A limit is one number that all queues share, the time up to which what was admitted has been paid for, and paying is one exchange of
//! that number: no lock, and no thread that fills buckets. A request is admitted while that time is not further ahead of now than a
//! burst lasts. What it costs is known only when it has been looked at, so it is admitted first and pays afterwards: the next one
//! waits for it. (This is a token bucket with the tokens written as time.)
//!
//! The rates may change at any moment, from the control thread. A *group* of devices shares one set of these numbers, in memory that the
//! composer gives to each of their processes (`--limit-fd`). The first of them sets the rates, and none that is started later sets them
//! again. A process that is no longer ours can write there what it likes: the worst is that devices of its own group are slow, or
//! not limited.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::words::Words;

const SECOND: u64 = 1_000_000_000;

/// Longest burst, in seconds at the full rate: more is no limit any more.
const LONGEST_BURST: u64 = 60;

/// What is allowed in a second, and at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// In a second; zero: as much as there is.
    pub per_second: u64,
    /// At once, after a pause; zero: as much as in a tenth of a second.
    pub burst: u64,
}

impl FromStr for Rate {
    type Err = String;

    /// `N`, or `N:BURST`.
    fn from_str(text: &str) -> Result<Rate, String> {
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is not a number"));
        let (per_second, burst) = text.split_once(':').unwrap_or((text, "0"));
        Ok(Rate { per_second: number(per_second)?, burst: number(burst)? })
    }
}

/// One limit.
#[derive(Debug)]
pub struct Limit {
    per_second: &'static AtomicU64,
    /// Nanoseconds.
    burst: &'static AtomicU64,
    /// Up to when it is paid, in nanoseconds of [`now`].
    paid: &'static AtomicU64,
}

impl Default for Limit {
    fn default() -> Limit {
        let own = || -> &'static AtomicU64 { Box::leak(Box::default()) };
        Limit { per_second: own(), burst: own(), paid: own() }
    }
}

impl Limit {
    /// Sets the rate. What was used before counts as paid.
    pub fn set(&self, rate: Rate) {
        let per_second = rate.per_second.max(1);
        let burst = if rate.burst == 0 { SECOND / 10 } else { cost(rate.burst, per_second) };
        self.burst.store(burst.min(LONGEST_BURST * SECOND), Ordering::Relaxed);
        self.paid.store(0, Ordering::Relaxed);
        self.per_second.store(rate.per_second, Ordering::Release);
    }

    fn rate(&self) -> Rate {
        let per_second = self.per_second.load(Ordering::Acquire);
        let burst = u128::from(self.burst.load(Ordering::Relaxed)) * u128::from(per_second) / u128::from(SECOND);
        Rate { per_second, burst: u64::try_from(burst).unwrap_or(u64::MAX) }
    }

    fn is_set(&self) -> bool {
        self.per_second.load(Ordering::Acquire) != 0
    }

    /// How long to wait before the next request.
    fn wait(&self, now: u64) -> u64 {
        if !self.is_set() {
            return 0;
        }
        let ahead = self.paid.load(Ordering::Relaxed).saturating_sub(now);
        ahead.saturating_sub(self.burst.load(Ordering::Relaxed))
    }

    fn pay(&self, amount: u64, now: u64) {
        let per_second = self.per_second.load(Ordering::Acquire);
        if per_second == 0 || amount == 0 {
            return;
        }
        let cost = cost(amount, per_second);
        let later = |paid: u64| Some(paid.max(now).saturating_add(cost));
        let _always_some = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
    }
}

/// Nanoseconds that so much takes.
fn cost(amount: u64, per_second: u64) -> u64 {
    u64::try_from(u128::from(amount) * u128::from(SECOND) / u128::from(per_second.max(1))).unwrap_or(u64::MAX)
}

/// The limits of a device, or of a group of them.
#[derive(Debug, Default)]
pub struct Limits {
    operations: Limit,
    bytes: Limit,
    /// Of a group: not zero when somebody has set them.
    set: Option<&'static AtomicU64>,
}

impl Limits {
    /// Those of a group.
    pub fn of_group([set, ops, ops_burst, ops_paid, bytes, bytes_burst, bytes_paid]: Words<7>) -> Limits {
        Limits {
            operations: Limit { per_second: ops, burst: ops_burst, paid: ops_paid },
            bytes: Limit { per_second: bytes, burst: bytes_burst, paid: bytes_paid },
            set: Some(set),
        }
    }

    /// Sets both at the start of a process, unless it has joined a group that has its limits. Also finds out how the time is told,
    /// which takes a system call that filters forbid: the first use is before them.
    pub fn begin(&self, operations: Rate, bytes: Rate) {
        let _the_time_does_not_matter = now();
        if self.set.is_none_or(|set| set.swap(1, Ordering::AcqRel) == 0) {
            self.set(operations, bytes);
        }
    }

    /// Sets both.
    pub fn set(&self, operations: Rate, bytes: Rate) {
        self.operations.set(operations);
        self.bytes.set(bytes);
    }

    /// What they are: operations, bytes.
    pub fn rates(&self) -> (Rate, Rate) {
        (self.operations.rate(), self.bytes.rate())
    }

    /// How long the next request has to wait, if it has to.
    pub fn wait(&self) -> Option<Duration> {
        if !self.operations.is_set() && !self.bytes.is_set() {
            return None;
        }
        let now = now();
        let wait = self.operations.wait(now).max(self.bytes.wait(now));
        (wait > 0).then(|| Duration::from_nanos(wait))
    }

    /// A request of so many bytes is being served.
    pub fn pay(&self, bytes: u64) {
        if self.operations.is_set() || self.bytes.is_set() {
            let now = now();
            self.operations.pay(1, now);
            self.bytes.pay(bytes, now);
        }
    }
}

/// Nanoseconds of the one clock that all processes of a machine share.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, rest) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(SECOND).saturating_add(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_at_once_and_the_rest_at_the_rate() {
        let limit = Limit::default();
        assert_eq!(limit.wait(0), 0, "nothing is limited");
        limit.set(Rate { per_second: 100, burst: 10 });
        let admitted = |until: u64| {
            let (mut now, mut count) = (1, 0);
            while now <= until {
                match limit.wait(now) {
                    0 => {
                        limit.pay(1, now);
                        count += 1;
                    }
                    wait => now += wait,
                }
            }
            count
        };
        // Ten at once, and a hundred a second after that.
        assert!((110..=111).contains(&admitted(SECOND)));
    }

    #[test]
    fn one_large_request_passes_and_is_paid_for_by_the_next() {
        let limit = Limit::default();
        limit.set(Rate { per_second: 1000, burst: 100 });
        assert_eq!(limit.wait(1), 0);
        limit.pay(5000, 1);
        assert_eq!(limit.wait(1), 5 * SECOND - SECOND / 10);
        limit.set(Rate { per_second: 1000, burst: 100 });
        assert_eq!(limit.wait(1), 0, "a new rate begins anew");
    }

    #[test]
    fn a_group_is_limited_together_and_its_first_member_says_how() {
        let file = crate::words::make("limits").unwrap();
        let member = || Limits::of_group(crate::words::map(file.try_clone().unwrap()).unwrap());
        let (one, other) = (member(), member());
        let (slow, fast) = (Rate { per_second: 10, burst: 1 }, Rate { per_second: 1000, burst: 1 });
        one.begin(slow, Rate::default());
        other.begin(fast, Rate::default());
        assert_eq!(other.rates().0, slow);
        assert_eq!(other.wait(), None);
        one.pay(1);
        one.pay(1);
        assert!(other.wait().is_some(), "what one has used the other has not");
        other.set(fast, Rate::default());
        assert_eq!(one.rates().0, fast);
    }

    #[test]
    fn numbers_without_measure_do_no_harm() {
        let limit = Limit::default();
        limit.set(Rate { per_second: 1, burst: u64::MAX });
        limit.pay(u64::MAX, u64::MAX - 1);
        assert!(limit.wait(0) > 0);
        limit.set(Rate { per_second: u64::MAX, burst: 1 });
        limit.pay(u64::MAX, 0);
        assert_eq!(limit.wait(2 * SECOND), 0);
    }
}
