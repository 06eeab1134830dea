//! Counters: they cost one relaxed addition where something is counted, and nothing else.
//!
//! A process shows them to whoever started it in a page that both share ([`page`]): it maps the page before it is confined, and
//! from then on counts there. Showing a counter takes no system call, and no thread that could be kept waiting.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

mod histogram;
pub mod page;

pub use histogram::{BOUNDS, Histogram};
pub use page::{Kind, Label};

/// Queues that are counted apart; the composer starts no device with more.
pub const MOST_QUEUES: usize = 64;

/// A number that only grows, until the process ends.
#[derive(Debug)]
pub struct Counter {
    own: AtomicU64,
    shown: OnceLock<&'static AtomicU64>,
}

impl Counter {
    /// Zero.
    #[expect(clippy::new_without_default, reason = "counters are statics, which need a const function")]
    pub const fn new() -> Counter {
        Counter { own: AtomicU64::new(0), shown: OnceLock::new() }
    }

    /// Adds.
    pub fn add(&self, count: u64) {
        self.place().fetch_add(count, Ordering::Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> u64 {
        self.place().load(Ordering::Relaxed)
    }

    /// Makes it this. For a [`Kind::Gauge`], and for a number that is counted elsewhere.
    pub fn set(&self, value: u64) {
        self.place().store(value, Ordering::Relaxed);
    }

    fn place(&self) -> &AtomicU64 {
        self.shown.get().copied().unwrap_or(&self.own)
    }

    /// From here on it is counted there.
    fn show(&self, place: &'static AtomicU64) {
        place.fetch_add(self.get(), Ordering::Relaxed);
        let _shown_already = self.shown.set(place);
    }
}

/// The same counter once for each queue, or for each of whatever is counted apart.
#[derive(Debug)]
pub struct Each<const N: usize>([Counter; N]);

impl<const N: usize> Each<N> {
    /// All zero.
    #[expect(clippy::new_without_default, reason = "counters are statics, which need a const function")]
    pub const fn new() -> Each<N> {
        Each([const { Counter::new() }; N])
    }

    /// Adds to one of them. One that is not there is not counted.
    pub fn add(&self, index: usize, count: u64) {
        if let Some(counter) = self.0.get(index) {
            counter.add(count);
        }
    }

    /// Makes one of them this.
    pub fn set(&self, index: usize, value: u64) {
        if let Some(counter) = self.0.get(index) {
            counter.set(value);
        }
    }

    /// The first of them.
    pub fn first(&'static self, count: usize) -> &'static [Counter] {
        self.0.get(..count.min(N)).unwrap_or_default()
    }
}

/// Kicks of the guest that were heard.
pub static KICKS: Each<MOST_QUEUES> = Each::new();
/// Chains that were taken out of the ring.
pub static CHAINS: Each<MOST_QUEUES> = Each::new();
/// Interrupts of the guest.
pub static CALLS: Each<MOST_QUEUES> = Each::new();
/// Rings the driver broke.
pub static BROKEN: Each<MOST_QUEUES> = Each::new();
/// Requests that were answered with an error because each process that served them died.
pub static CONDEMNED: Each<MOST_QUEUES> = Each::new();

/// Counters of one name.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// In lower case, words joined by `_`, without a unit of its own for "total".
    pub name: &'static str,
    /// What is counted, without a full stop.
    pub help: &'static str,
    /// Whether it only grows.
    pub kind: Kind,
    /// What its counters differ in.
    pub label: Label,
    /// One, or one for each of what the label counts.
    pub values: &'static [Counter],
}

/// A device's list of times, in its `metrics.rs`: the name ends in `_seconds`.
pub type Times = (&'static str, &'static Histogram, &'static str);

/// A device's list of counters, in its `metrics.rs`.
pub type Named = (&'static str, &'static Counter, &'static str);

/// Shows the counters of a device process with so many queues in `page`. Without a page nobody asked for them.
///
/// # Errors
/// When the page cannot be used.
pub fn publish(page: Option<OwnedFd>, own: &[Named], queues: u16) -> Result<(), page::Error> {
    publish_with(page, own, &[], queues)
}

/// The same with times that are counted.
///
/// # Errors
/// As [`publish`].
pub fn publish_with(page: Option<OwnedFd>, own: &[Named], times: &[Times], queues: u16) -> Result<(), page::Error> {
    let one = |&(name, counter, help): &Named| {
        let values = std::slice::from_ref(counter);
        Family { name, help, kind: Kind::Counter, label: Label::None, values }
    };
    let rings = [
        ("queue_kicks", "Kicks of the guest that were heard", &KICKS),
        ("queue_chains", "Chains of descriptors that were taken out of the ring", &CHAINS),
        ("queue_calls", "Interrupts of the guest", &CALLS),
        ("queue_broken", "Rings that the driver broke", &BROKEN),
        ("queue_condemned", "Requests answered with an error because each process that served them died", &CONDEMNED),
    ];
    let each = rings.map(|(name, help, each)| {
        let values = each.first(usize::from(queues));
        Family { name, help, kind: Kind::Counter, label: Label::Queue, values }
    });
    let times = times.iter().map(|&(name, histogram, help)| Family {
        name,
        help,
        kind: Kind::Histogram,
        label: Label::None,
        values: histogram.counters(),
    });
    show(page, &own.iter().map(one).chain(times).chain(each).collect::<Vec<_>>())
}

/// Shows these counters in `page`.
///
/// # Errors
/// When the page cannot be used.
pub fn show(page: Option<OwnedFd>, families: &[Family]) -> Result<(), page::Error> {
    let Some(page) = page else { return Ok(()) };
    let page = page::Writer::map(page)?;
    for family in families {
        for (counter, place) in family.values.iter().zip(page.describe(family)?) {
            counter.show(place);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
