//! Looking again, for a moment, before going to sleep.
//!
//! To be woken costs a guest an exit and a device a turn of the scheduler: more than most requests take. So a device may look at its ring
//! for a while longer, as long as that pays: the window grows when the next request would have come within it, shrinks each time it
//! passed in vain, and is nothing at all where requests come seldom. Over any stretch of time the looking takes no more than a part of a
//! processor ([`SHARE`]); a ring that is idle is not looked at, and costs nothing.
//!
//! Where a guest's programs ask one thing at a time and wait for each answer, as they do with names and attributes of files, all they
//! wait for is two wake-ups. There only what was looked for in vain counts against the budget ([`Poller::eager`]): a look that found
//! something was shorter than going to sleep and being woken would have been.

use std::time::{Duration, Instant};

/// Longest window. What takes longer is better slept through.
const LONGEST: Duration = Duration::from_micros(50);

/// A window shorter than this is none.
const SHORTEST: Duration = Duration::from_micros(2);

/// One part in so many of the time may be spent looking.
const SHARE: u32 = 5;

/// The budget is counted over such a stretch.
const STRETCH: Duration = Duration::from_millis(10);

/// One worker's.
#[derive(Debug)]
pub struct Poller {
    longest: Duration,
    eager: bool,
    window: Duration,
    stretch: Instant,
    spent: Duration,
    asleep: Option<Instant>,
}

impl Poller {
    /// With no window longer than `longest`; zero: never looks. Where there is only one processor to run on, looking keeps the guest from
    /// asking, so there it never does either.
    pub fn new(longest: Duration, processors: usize) -> Poller {
        let longest = if processors > 1 { longest.min(LONGEST) } else { Duration::ZERO };
        Poller { longest, eager: false, window: Duration::ZERO, stretch: Instant::now(), spent: Duration::ZERO, asleep: None }
    }

    /// The same, and a look that found something costs nothing.
    pub fn eager(longest: Duration, processors: usize) -> Poller {
        Poller { eager: true, ..Poller::new(longest, processors) }
    }

    /// Looks until `ready` says so, or the window is over. `true`: there is something.
    pub(super) fn look(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let start = Instant::now();
        let window = self.window.min(self.left(start));
        let mut found = false;
        while !found && start.elapsed() < window {
            found = ready();
            std::hint::spin_loop();
        }
        if !(found && self.eager) {
            self.spent += start.elapsed();
        }
        if !found {
            self.shrink();
        }
        found
    }

    /// The worker goes to sleep.
    pub(super) fn sleep(&mut self) {
        self.asleep = (!self.longest.is_zero()).then(Instant::now);
    }

    /// It was woken by its ring.
    pub(super) fn wake(&mut self) {
        let Some(asleep) = self.asleep.take() else { return };
        let gap = asleep.elapsed();
        // To fall asleep and be woken is a part of the gap.
        if gap <= self.longest * 2 {
            self.window = (gap * 2).clamp(SHORTEST, self.longest);
        } else {
            self.shrink();
        }
    }

    fn shrink(&mut self) {
        self.window /= 2;
        if self.window < SHORTEST {
            self.window = Duration::ZERO;
        }
    }

    /// What is left of the budget.
    fn left(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.stretch) >= STRETCH {
            (self.stretch, self.spent) = (now, Duration::ZERO);
        }
        (STRETCH / SHARE).saturating_sub(self.spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> Poller {
        let mut poller = Poller::new(LONGEST, 2);
        poller.sleep();
        poller.wake();
        poller
    }

    #[test]
    fn only_a_ring_that_was_busy_a_moment_ago_is_looked_at() {
        let mut looked = 0;
        let mut count = || {
            looked += 1;
            false
        };
        assert!(!Poller::new(LONGEST, 2).look(&mut count));
        let mut idle = busy();
        idle.asleep = Instant::now().checked_sub(Duration::from_millis(500));
        for _ in 0..10 {
            idle.shrink();
        }
        assert!(!idle.look(&mut count));
        assert!(!Poller::new(LONGEST, 1).look(&mut count), "it would keep the guest from asking");
        assert_eq!(looked, 0);
        assert!(busy().look(|| true));
    }

    #[test]
    fn looking_in_vain_ends_by_itself_and_stays_within_its_share() {
        let mut poller = busy();
        for _ in 0..10 {
            assert!(!poller.look(|| false));
        }
        assert!(poller.window.is_zero());
        // The budget of this stretch is used up, and the stretch is not over.
        let mut poller = busy();
        (poller.window, poller.spent) = (LONGEST, STRETCH / SHARE);
        poller.stretch = Instant::now() + Duration::from_secs(3600);
        let mut looked = 0;
        poller.look(|| {
            looked += 1;
            false
        });
        assert_eq!(looked, 0);
    }

    #[test]
    fn who_is_eager_pays_only_for_looks_in_vain() {
        let after_a_look = |mut poller: Poller, found| {
            (poller.window, poller.stretch) = (LONGEST, Instant::now() + Duration::from_secs(3600));
            let mut times = 0;
            poller.look(|| {
                times += 1;
                found && times > 10
            });
            poller.spent
        };
        assert!(after_a_look(Poller::eager(LONGEST, 2), true).is_zero());
        assert!(!after_a_look(Poller::eager(LONGEST, 2), false).is_zero());
        assert!(!after_a_look(Poller::new(LONGEST, 2), true).is_zero());
    }
}
