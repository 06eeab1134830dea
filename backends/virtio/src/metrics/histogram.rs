//! How long things took: how many were how fast, in steps of twice the time.

use std::time::Duration;

use super::Counter;

/// Upper bounds of the steps, in microseconds: from 1 us to a second. What takes longer is counted after the last.
pub const BOUNDS: [u64; 21] = {
    let mut bounds = [0; 21];
    let mut at = 0;
    while at < bounds.len() {
        bounds[at] = 1 << at;
        at += 1;
    }
    bounds
};

/// The steps, what is beyond them, and the sum of all times in microseconds.
const COUNTERS: usize = BOUNDS.len() + 2;

/// Times, counted.
#[derive(Debug)]
pub struct Histogram([Counter; COUNTERS]);

impl Histogram {
    /// Nothing was counted.
    #[expect(clippy::new_without_default, reason = "histograms are statics, which need a const function")]
    pub const fn new() -> Histogram {
        Histogram([const { Counter::new() }; COUNTERS])
    }

    /// So many things took this long each.
    pub fn add(&self, time: Duration, count: u64) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let step = BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS.len());
        let [steps @ .., sum] = &self.0;
        if let Some(counter) = steps.get(step) {
            counter.add(count);
        }
        sum.add(micros.saturating_mul(count));
    }

    /// As they are shown.
    pub fn counters(&'static self) -> &'static [Counter] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_first_step_that_holds_it() {
        static TIMES: Histogram = Histogram::new();
        TIMES.add(Duration::from_nanos(700), 1);
        TIMES.add(Duration::from_micros(3), 2);
        TIMES.add(Duration::from_micros(4), 1);
        TIMES.add(Duration::from_secs(7), 1);
        let counted: Vec<u64> = TIMES.counters().iter().map(Counter::get).collect();
        assert_eq!(counted[..4], [1, 0, 3, 0]);
        assert_eq!(counted[BOUNDS.len()..], [1, 7_000_010]);
    }
}
