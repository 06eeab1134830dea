//! The in-flight log of the vhost-user specification ("Inflight I/O tracking"), split rings.
//!
//! The log is a piece of shared memory that outlives the process. For each descriptor it holds whether a chain with this head
//! was taken and not given back, and when it was taken. A successor finds in it what its predecessor had in hand, and serves
//! that again, in the order it was taken.
//!
//! Why not simply begin again at the used index? Because completions come out of order: some of what lies behind the used
//! index was served already, and its buffers belong to the guest again. Why not at the available index of the dead process?
//! Because what was in its hands would be lost. Only the log is right.
//!
//! # The order of writes
//!
//! Death can come between any two of them. Taking a chain: its counter, then its mark. Giving back a batch: the used elements; the
//! list of the batch (`last_batch_head`, then `next` from entry to entry); the ring's used index, at which the guest sees the
//! batch; then the marks go, and at last the log's own `used_idx`. So if that differs from the ring's, the process died
//! while it cleared the marks of exactly one batch, whose members are the first entries of the list, as many as the difference
//! ([`Log::recover`]).
//!
//! # What else an entry holds
//!
//! The specification leaves five bytes of an entry unused. The first counts how often somebody began to serve the chain: a request
//! that ends each of its servers is found by it ([`CONDEMNED`]). The other four are a note of the device to its successor,
//! for what cannot simply be done twice. Both are written before the chain is worked on, and mean nothing while the mark is not set.
//! A log written by somebody else has zeroes there.
//!
//! The content is as hostile as everything shared with a peer: each index is checked, each walk is bounded.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::memory::{Memory, Span};

/// Bytes before the first entry: features, version, entries, the head of the last batch, the used index.
const HEADER: u32 = 16;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;

/// Bytes of an entry: the mark, the attempts, the note, the next of its batch, the counter.
const ENTRY: u32 = 16;
const ATTEMPTS_AT: usize = 1;
const NOTE_AT: usize = 2;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

const VERSION: u16 = 1;

/// As many times may a request end the process that serves it. One time more, and its guest would have no device at all.
pub const CONDEMNED: u8 = 5;

/// In the byte of the attempts: there is a note.
const NOTED: u8 = 0x80;

/// The logs of neighbouring queues do not share a cache line.
const ALIGN: u32 = 64;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Made for a ring of another size.
    #[error("The in-flight log is for a ring of {0} descriptors, the ring has {1}")]
    Size(u16, u16),
    /// Of a version this code does not know.
    #[error("The in-flight log has the unknown version {0}")]
    Version(u16),
    /// Not all of it is in the region.
    #[error("The in-flight region is too small")]
    TooSmall,
    /// What it says cannot be.
    #[error("The in-flight log contradicts the ring: {0}")]
    Inconsistent(&'static str),
}

/// Bytes of the logs of `queues` queues of `size` descriptors.
pub fn region_size(queues: u16, size: u16) -> u64 {
    u64::from(queues) * u64::from(log_size(size))
}

fn log_size(size: u16) -> u32 {
    (HEADER + u32::from(size) * ENTRY).next_multiple_of(ALIGN)
}

/// The log of one queue.
#[derive(Debug)]
pub struct Log {
    memory: Arc<Memory>,
    span: Span,
    size: u16,
    counter: u64,
}

impl Log {
    /// The log of queue `index`, a ring of `size` descriptors, in a region made for queues of `region_queue_size`.
    ///
    /// # Errors
    /// [`Error::TooSmall`].
    pub fn new(region: Arc<Memory>, index: u16, region_queue_size: u16, size: u16) -> Result<Log, Error> {
        if size > region_queue_size {
            return Err(Error::TooSmall);
        }
        let bytes = log_size(region_queue_size);
        let span = region.span(u64::from(index) * u64::from(bytes), bytes).map_err(|_| Error::TooSmall)?;
        Ok(Log { memory: region, span, size, counter: 0 })
    }

    /// Makes the log consistent after the death of whoever wrote it, and gives the heads that were in flight, first taken
    /// first. `used` is the ring's used index. A log that was never used is begun.
    ///
    /// Doing it twice is doing it once: death may come here too.
    ///
    /// # Errors
    /// When the log is for another ring, or contradicts itself.
    pub fn recover(&mut self, used: u16) -> Result<Vec<u16>, Error> {
        if self.load(VERSION_AT) == 0 {
            self.begin(used);
            return Ok(Vec::new());
        }
        self.check()?;
        self.finish_batch(used)?;
        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.memory.load_u8(self.span, entry(*head), Ordering::Acquire) != 0)
            .map(|head| (self.memory.load_u64(self.span, entry(head) + COUNTER_AT, Ordering::Relaxed), head))
            .collect();
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(taken.into_iter().map(|(_, head)| head).collect())
    }

    /// A chain is taken.
    pub fn take(&mut self, head: u16) {
        self.memory.store_u64(self.span, entry(head) + COUNTER_AT, self.counter, Ordering::Relaxed);
        self.memory.store_u8(self.span, entry(head) + ATTEMPTS_AT, 1, Ordering::Relaxed);
        self.memory.store_u8(self.span, entry(head), 1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A chain that a predecessor left is begun again. Gives how often it was begun before, and the note that was left.
    pub fn retake(&mut self, head: u16) -> (u8, Option<u32>) {
        let byte = self.memory.load_u8(self.span, entry(head) + ATTEMPTS_AT, Ordering::Acquire);
        let (noted, before) = (byte & NOTED, byte & !NOTED);
        let now = before.saturating_add(1).min(!NOTED);
        self.memory.store_u8(self.span, entry(head) + ATTEMPTS_AT, noted | now, Ordering::Release);
        let half = |at| u32::from(self.memory.load_u16(self.span, entry(head) + at, Ordering::Relaxed));
        (before, (noted != 0).then(|| half(NOTE_AT) | half(NOTE_AT + 2) << 16))
    }

    /// Leaves a note with a chain that is in hand, for whoever has to begin it again.
    pub fn note(&mut self, head: u16, note: u32) {
        let [a, b, c, d] = note.to_le_bytes();
        self.memory.store_u16(self.span, entry(head) + NOTE_AT, u16::from_le_bytes([a, b]), Ordering::Relaxed);
        self.memory.store_u16(self.span, entry(head) + NOTE_AT + 2, u16::from_le_bytes([c, d]), Ordering::Relaxed);
        let attempts = self.memory.load_u8(self.span, entry(head) + ATTEMPTS_AT, Ordering::Relaxed);
        // Last: with it the note counts.
        self.memory.store_u8(self.span, entry(head) + ATTEMPTS_AT, attempts | NOTED, Ordering::Release);
    }

    /// A chain is about to be given back with the next batch.
    pub fn join_batch(&mut self, head: u16) {
        let last = self.load(LAST_BATCH_AT);
        self.memory.store_u16(self.span, entry(head) + NEXT_AT, last, Ordering::Relaxed);
        self.store(LAST_BATCH_AT, head);
    }

    /// The batch is visible to the guest: the ring's used index is now `used`.
    pub fn batch_published(&mut self, batch: &[u16], used: u16) {
        for head in batch {
            self.memory.store_u8(self.span, entry(*head), 0, Ordering::Release);
        }
        self.store(USED_AT, used);
    }

    fn begin(&mut self, used: u16) {
        for head in 0..self.size {
            self.memory.store_u8(self.span, entry(head), 0, Ordering::Relaxed);
        }
        self.store(ENTRIES_AT, self.size);
        self.store(LAST_BATCH_AT, 0);
        self.store(USED_AT, used);
        // Last: with it the log counts.
        self.store(VERSION_AT, VERSION);
    }

    fn check(&self) -> Result<(), Error> {
        let version = self.load(VERSION_AT);
        if version != VERSION {
            return Err(Error::Version(version));
        }
        let entries = self.load(ENTRIES_AT);
        if entries == self.size { Ok(()) } else { Err(Error::Size(entries, self.size)) }
    }

    /// Clears the marks of the batch that the dead process had published and not yet struck out.
    fn finish_batch(&mut self, used: u16) -> Result<(), Error> {
        let unfinished = used.wrapping_sub(self.load(USED_AT));
        if unfinished > self.size {
            return Err(Error::Inconsistent("more was given back than the ring holds"));
        }
        let mut head = self.load(LAST_BATCH_AT);
        for _ in 0..unfinished {
            if head >= self.size {
                return Err(Error::Inconsistent("its last batch names a descriptor that does not exist"));
            }
            self.memory.store_u8(self.span, entry(head), 0, Ordering::Release);
            head = self.memory.load_u16(self.span, entry(head) + NEXT_AT, Ordering::Relaxed);
        }
        self.store(USED_AT, used);
        Ok(())
    }

    fn load(&self, at: usize) -> u16 {
        self.memory.load_u16(self.span, at, Ordering::Acquire)
    }

    fn store(&self, at: usize, value: u16) {
        self.memory.store_u16(self.span, at, value, Ordering::Release);
    }
}

/// Where the entry of a head begins.
fn entry(head: u16) -> usize {
    HEADER as usize + usize::from(head) * ENTRY as usize
}

#[cfg(test)]
mod tests;
