//! Who is at which bytes. Data I/O shares its range; a discard or a zeroing has its range, rounded out to clusters, alone.
//!
//! # Theory of operation
//!
//! Each queue has a [`Lane`] of slots, one word each. Who reads or writes data puts its range into a free slot and looks once at
//! the number of exclusive holders; where that is zero, that is all: one store and one load, both sequentially consistent, so of
//! a sharer and an exclusive holder at least one sees the other. An exclusive holder registers in a list first, then waits until
//! no slot overlaps. A sharer that finds an overlapping holder takes its range back and waits.
//!
//! Nobody waits while it holds anything in its lane (`Busy`): of two that wait, one then never waits for the other.
//!
//! A range is kept in units that make it fit a word: two that do not overlap may look as if they did, never the other way round.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Ranges one queue can be in at a time: more than a queue of 256 entries whose requests have two descriptors or more needs.
const SLOTS: usize = 256;

/// Bytes of a unit, as a power of two, at least: 4 KiB, so that 16 TiB have 32-bit numbers.
const UNIT_BITS: u32 = 12;

/// The ranges one queue is in. In cache lines of its own: it is written to with each request.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Lane {
    ranges: Arc<Ranges>,
    slots: Box<[AtomicU64]>,
}

/// All lanes, and all exclusive holders.
#[derive(Debug)]
pub(crate) struct Ranges {
    unit_bits: u32,
    exclusives: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lanes: Vec<Arc<Lane>>,
    held: Vec<u64>,
}

/// A range that others may share. It ends when this is dropped.
#[derive(Debug)]
pub struct Shared {
    lane: Arc<Lane>,
    slot: usize,
}

/// A range that nobody else is in. It ends when this is dropped.
#[derive(Debug)]
pub struct Exclusive {
    ranges: Arc<Ranges>,
    packed: u64,
}

impl Lane {
    fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.load(Ordering::SeqCst) == 0)
    }

    /// Shares a range. `may_wait`: the caller holds no claims.
    pub(crate) fn share(self: &Arc<Self>, offset: u64, len: u64, may_wait: bool) -> Result<Shared> {
        let packed = self.ranges.pack(offset, len);
        let free = self.slots.iter().position(|slot| slot.load(Ordering::Relaxed) == 0).ok_or(Error::Busy)?;
        let word = self.slots.get(free).ok_or(Error::Busy)?;
        word.store(packed, Ordering::SeqCst);
        if self.ranges.exclusives.load(Ordering::SeqCst) != 0 {
            let mut state = self.ranges.state();
            while state.held.iter().any(|held| overlap(*held, packed)) {
                word.store(0, Ordering::SeqCst);
                self.ranges.changed.notify_all();
                // The holder may be waiting for another range of ours, or for a claim of ours.
                if !may_wait || !self.is_idle() {
                    return Err(Error::Busy);
                }
                state = self.ranges.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            word.store(packed, Ordering::SeqCst);
        }
        Ok(Shared { lane: Arc::clone(self), slot: free })
    }

    /// Has a range alone.
    pub(crate) fn exclude(self: &Arc<Self>, offset: u64, len: u64) -> Result<Exclusive> {
        if !self.is_idle() {
            return Err(Error::Busy);
        }
        let packed = self.ranges.pack(offset, len);
        let mut state = self.ranges.state();
        while state.held.iter().any(|held| overlap(*held, packed)) {
            state = self.ranges.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held.push(packed);
        self.ranges.exclusives.fetch_add(1, Ordering::SeqCst);
        while state.lanes.iter().any(|lane| lane.overlaps(packed)) {
            state = self.ranges.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(Exclusive { ranges: Arc::clone(&self.ranges), packed })
    }

    fn overlaps(&self, packed: u64) -> bool {
        self.slots.iter().any(|slot| overlap(slot.load(Ordering::SeqCst), packed))
    }
}

/// Two ranges of units: the first unit above, the one after the last below. Zero is no range.
fn overlap(a: u64, b: u64) -> bool {
    let (low, high) = (|word: u64| word >> 32, |word: u64| word & 0xffff_ffff);
    a != 0 && b != 0 && low(a) < high(b) && low(b) < high(a)
}

impl Ranges {
    /// For an image of so many bytes, or more later.
    pub(crate) fn new(bytes: u64) -> Arc<Ranges> {
        let needed = u64::BITS.saturating_sub(bytes.leading_zeros()).saturating_sub(31);
        Arc::new(Ranges {
            unit_bits: needed.max(UNIT_BITS),
            exclusives: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A lane for one more queue.
    pub(crate) fn lane(self: &Arc<Self>) -> Arc<Lane> {
        let slots = (0..SLOTS).map(|_| AtomicU64::new(0)).collect();
        let lane = Arc::new(Lane { ranges: Arc::clone(self), slots });
        self.state().lanes.push(Arc::clone(&lane));
        lane
    }

    /// The queue is gone.
    pub(crate) fn forget(&self, lane: &Arc<Lane>) {
        self.state().lanes.retain(|one| !Arc::ptr_eq(one, lane));
    }

    fn pack(&self, offset: u64, len: u64) -> u64 {
        let unit = |at: u64| at.checked_shr(self.unit_bits).unwrap_or(0).min(u64::from(u32::MAX).saturating_sub(1));
        let last = unit(offset.saturating_add(len.max(1)).saturating_sub(1));
        (unit(offset) << 32) | last.saturating_add(1)
    }

    /// Whether nobody is in a range at this moment. Who comes later sees what was changed before this was asked.
    pub(crate) fn is_quiet(&self, offset: u64, len: u64) -> bool {
        let packed = self.pack(offset, len);
        !self.state().lanes.iter().any(|lane| lane.overlaps(packed))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(slot) = self.lane.slots.get(self.slot) {
            slot.store(0, Ordering::SeqCst);
        }
        let ranges = &self.lane.ranges;
        if ranges.exclusives.load(Ordering::SeqCst) != 0 {
            let _state = ranges.state();
            ranges.changed.notify_all();
        }
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let mut state = self.ranges.state();
        if let Some(at) = state.held.iter().position(|held| *held == self.packed) {
            state.held.swap_remove(at);
        }
        self.ranges.exclusives.fetch_sub(1, Ordering::SeqCst);
        self.ranges.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
