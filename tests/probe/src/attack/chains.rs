//! What a hostile guest can write into a ring that runs.

use std::time::{Duration, Instant};

use super::foe::{Foe, Result};
use super::guest::{AVAIL, BASE, DATA, DESC, Desc, END, HALF, INDIRECT, NEXT, SIZE, TABLE, USED, WRITE, desc};
use super::{Case, Seen};
use crate::random::Random;

/// How long descriptors are rewritten in flight.
const REWRITE: Duration = Duration::from_millis(400);

pub(super) const CASES: &[Case] = &[
    Case::new("loop", "Two descriptors that follow each other for ever", |foe| {
        ring(foe, &[desc(DATA, 16, NEXT, 1), desc(DATA, 16, NEXT, 0)])
    }),
    Case::new("self-loop", "A descriptor that follows itself, to be written", |foe| {
        ring(foe, &[desc(DATA, 16, NEXT | WRITE, 0)])
    }),
    Case::new("next-outside", "A descriptor that is followed by the 65535th", |foe| ring(foe, &[desc(DATA, 16, NEXT, 0xffff)])),
    Case::new("outside", "A buffer outside of memory", |foe| ring(foe, &[desc(END + 0x1000, 64, WRITE, 0)])),
    Case::new("outside-read", "A buffer to be read outside of memory", |foe| {
        ring(foe, &[desc(0, 64, NEXT, 1), desc(DATA, 64, WRITE, 0)])
    }),
    Case::new("over-end", "A buffer over the end of memory", |foe| ring(foe, &[desc(END - 8, 64, WRITE, 0)])),
    Case::new("over-begin", "A buffer that begins before memory", |foe| ring(foe, &[desc(BASE - 8, 64, WRITE, 0)])),
    Case::new("wrap", "A buffer whose addresses wrap", |foe| ring(foe, &[desc(u64::MAX - 15, 64, WRITE, 0)])),
    Case::new("wrap-long", "A buffer of 4 GiB at the last address", |foe| ring(foe, &[desc(u64::MAX, u32::MAX, WRITE, 0)])),
    Case::new("border", "A buffer over the border of two regions that touch, which is allowed", |foe| {
        ring(foe, &[desc(BASE + HALF - 32, 64, WRITE, 0)])
    }),
    Case::new("border-read", "A buffer to be read over that border", |foe| {
        ring(foe, &[desc(BASE + HALF - 32, 64, NEXT, 1), desc(DATA, 512, NEXT | WRITE, 2), desc(DATA + 512, 1, WRITE, 0)])
    }),
    Case::new("long", "A buffer of 4 GiB", |foe| ring(foe, &[desc(DATA, u32::MAX, WRITE, 0)])),
    Case::new("sum", "Buffers of more than 4 GiB together", |foe| {
        let table: Vec<_> = (1..=8).map(|next| desc(BASE, 0x4000_0000, WRITE | if next < 8 { NEXT } else { 0 }, next)).collect();
        ring(foe, &table)
    }),
    Case::new("whole-memory", "All of memory to be written, eight times", |foe| {
        let table: Vec<_> = (1..=8).map(|next| desc(DATA, 0x3_0000, WRITE | if next < 8 { NEXT } else { 0 }, next)).collect();
        ring(foe, &table)
    }),
    Case::new("zero-length", "Buffers of no bytes", |foe| {
        ring(foe, &[desc(DATA, 0, NEXT, 1), desc(DATA, 0, NEXT | WRITE, 2), desc(DATA, 0, WRITE, 0)])
    }),
    Case::new("zero-outside", "A buffer of no bytes outside of memory", |foe| ring(foe, &[desc(u64::MAX, 0, WRITE, 0)])),
    Case::new("order", "A buffer to be read after one to be written", |foe| {
        ring(foe, &[desc(DATA, 64, NEXT | WRITE, 1), desc(DATA, 64, 0, 0)])
    }),
    Case::new("only-read", "A request with nothing to be written", |foe| ring(foe, &[desc(DATA, 64, 0, 0)])),
    Case::new("only-write", "A request with nothing to be read", |foe| ring(foe, &[desc(DATA, 64, WRITE, 0)])),
    Case::new("flags", "A descriptor with all flags", |foe| ring(foe, &[desc(DATA, 64, 0xffff, 0)])),
    Case::new("flags-reserved", "A descriptor with the reserved flags", |foe| ring(foe, &[desc(DATA, 64, 0xfff8 | WRITE, 0)])),
    Case::new("indirect-nested", "An indirect table in an indirect table", |foe| {
        indirect(foe, 16, 0, &[desc(TABLE, 16, INDIRECT, 0)])
    }),
    Case::new("indirect-next", "An indirect table that is followed", |foe| indirect(foe, 16, NEXT, &[desc(DATA, 64, WRITE, 0)])),
    Case::new("indirect-write", "An indirect table to be written", |foe| indirect(foe, 16, WRITE, &[desc(DATA, 64, WRITE, 0)])),
    Case::new("indirect-ragged", "An indirect table of one entry and a byte", |foe| {
        indirect(foe, 17, 0, &[desc(DATA, 64, WRITE, 0)])
    }),
    Case::new("indirect-empty", "An indirect table of no entries", |foe| indirect(foe, 0, 0, &[])),
    Case::new("indirect-long", "An indirect table of more entries than the ring has", |foe| {
        let table: Vec<_> =
            (1..=2 * SIZE).map(|next| desc(DATA, 1, WRITE | if next < 2 * SIZE { NEXT } else { 0 }, next)).collect();
        indirect(foe, 16 * 2 * u32::from(SIZE), 0, &table)
    }),
    Case::new("indirect-4g", "An indirect table of 4 GiB", |foe| indirect(foe, u32::MAX - 15, 0, &[desc(DATA, 64, WRITE, 0)])),
    Case::new("indirect-loop", "An indirect table that goes round", |foe| {
        indirect(foe, 32, 0, &[desc(DATA, 1, NEXT | WRITE, 1), desc(DATA, 1, NEXT | WRITE, 0)])
    }),
    Case::new("indirect-outside", "An indirect table outside of memory", |foe| ring(foe, &[desc(END, 64, INDIRECT, 0)])),
    Case::new("indirect-straddle", "An indirect table over the border of two regions", |foe| {
        let at = BASE + HALF - 16;
        foe.start()?;
        foe.guest.describe(at, 0, desc(DATA, 1, NEXT | WRITE, 1));
        foe.guest.put(BASE + HALF, &[0; 16]);
        foe.guest.describe(DESC, 0, desc(at, 32, INDIRECT, 0));
        foe.guest.offer(0);
        foe.ring_outcome()
    }),
    Case::new("indirect-flood", "Every head an indirect table of 12288 entries, 20 times", indirect_flood),
    Case::new("head-outside", "A head that the ring does not have", |foe| {
        foe.start()?;
        foe.guest.offer(SIZE);
        foe.ring_outcome()
    }),
    Case::new("head-max", "Head 65535", |foe| {
        foe.start()?;
        foe.guest.offer(0xffff);
        foe.ring_outcome()
    }),
    Case::new("head-twice", "One head made available sixteen times at once", |foe| {
        foe.start()?;
        foe.guest.describe(DESC, 0, desc(DATA, 64, WRITE, 0));
        (0..SIZE).for_each(|_| foe.guest.offer(0));
        foe.ring_outcome()
    }),
    Case::new("head-middle", "A head in the middle of another chain", |foe| {
        foe.start()?;
        foe.guest.describe(DESC, 0, desc(DATA, 16, NEXT | WRITE, 1));
        foe.guest.describe(DESC, 1, desc(DATA, 16, WRITE, 0));
        foe.guest.offer(0);
        foe.guest.offer(1);
        foe.ring_outcome()
    }),
    Case::new("jump", "An available index that jumps by one more than the ring", |foe| jumps(foe, SIZE + 1)),
    Case::new("jump-half", "An available index that jumps by 32768", |foe| jumps(foe, 0x8000)),
    Case::new("jump-back", "An available index that goes back", |foe| jumps(foe, 0xffff)),
    Case::new("jump-often", "1000 jumps of the available index, each kicked", |foe| {
        foe.start()?;
        for step in 0..1000u16 {
            foe.guest.jump(step.wrapping_mul(0x4321));
            foe.ring();
        }
        foe.ring_outcome()
    }),
    Case::new("ring-as-buffer", "The used ring as a buffer to be written", |foe| ring(foe, &[desc(USED, 134, WRITE, 0)])),
    Case::new("table-as-buffer", "The descriptor table as a buffer to be written", |foe| ring(foe, &[desc(DESC, 256, WRITE, 0)])),
    Case::new("avail-as-buffer", "The available ring as a buffer to be written", |foe| ring(foe, &[desc(AVAIL, 38, WRITE, 0)])),
    Case::new("rewrite", "Descriptors rewritten while they are served", rewrite),
    Case::new("random", "2000 random descriptors in random rings", random),
];

/// Starts the ring, writes descriptors from the first on, and makes the first available.
fn ring(foe: &mut Foe, table: &[Desc]) -> Result<Seen> {
    foe.start()?;
    for (index, desc) in (0..).zip(table) {
        foe.guest.describe(DESC, index, *desc);
    }
    foe.guest.offer(0);
    foe.ring_outcome()
}

fn indirect(foe: &mut Foe, len: u32, flags: u16, table: &[Desc]) -> Result<Seen> {
    foe.start()?;
    for (index, desc) in (0..).zip(table) {
        foe.guest.describe(TABLE, index, *desc);
    }
    foe.guest.describe(DESC, 0, desc(TABLE, len, INDIRECT | flags, 1));
    foe.guest.describe(DESC, 1, desc(DATA, 16, WRITE, 0));
    foe.guest.offer(0);
    foe.ring_outcome()
}

fn jumps(foe: &mut Foe, by: u16) -> Result<Seen> {
    foe.start()?;
    foe.guest.jump(by);
    foe.ring_outcome()
}

fn indirect_flood(foe: &mut Foe) -> Result<Seen> {
    foe.start()?;
    let entries: u16 = 12288;
    for index in 0..entries {
        let last = index + 1 == entries;
        foe.guest.describe(TABLE, index, desc(DATA + 0x3_0000, 1, WRITE | if last { 0 } else { NEXT }, index + 1));
    }
    (0..SIZE).for_each(|head| foe.guest.describe(DESC, head, desc(TABLE, u32::from(entries) * 16, INDIRECT, 0)));
    for _ in 0..20 {
        (0..SIZE).for_each(|head| foe.guest.offer(head));
        foe.ring();
        std::thread::sleep(Duration::from_millis(5));
    }
    foe.ring_outcome()
}

/// The ring is loaded as a correct driver would, and at every moment a descriptor points somewhere else.
fn rewrite(foe: &mut Foe) -> Result<Seen> {
    foe.start()?;
    let mut random = Random::new(7);
    let start = Instant::now();
    while start.elapsed() < REWRITE {
        for head in 0..4 {
            foe.guest.describe(DESC, head, desc(DATA, 64, WRITE, 0));
            foe.guest.offer(head);
        }
        foe.ring();
        for _ in 0..50 {
            let addr = [DATA, END, u64::MAX, USED, DESC][usize::try_from(random.below(5)).unwrap_or(0)];
            let flags = u16::try_from(random.below(8)).unwrap_or(0);
            let head = u16::try_from(random.below(4)).unwrap_or(0);
            let len = u32::MAX >> random.below(32);
            foe.guest.describe(DESC, head, desc(addr, len, flags, head));
        }
    }
    foe.ring_outcome()
}

/// Rings of random descriptors, each served on a ring that is started anew.
fn random(foe: &mut Foe) -> Result<Seen> {
    let mut random = Random::new(1);
    foe.start()?;
    for _ in 0..125 {
        for index in 0..SIZE {
            let addr = if random.below(8) == 0 { random.number() } else { BASE + random.below(2 * HALF) };
            let most = 1 << random.below(16);
            let len = u32::try_from(random.below(most)).unwrap_or(0);
            let (flags, next) = (random.below(8), random.below(u64::from(SIZE) + 1));
            let one = desc(addr, len, u16::try_from(flags).unwrap_or(0), u16::try_from(next).unwrap_or(0));
            foe.guest.describe(DESC, index, one);
        }
        (0..random.below(u64::from(SIZE))).for_each(|head| foe.guest.offer(u16::try_from(head).unwrap_or(0)));
        foe.ring();
        std::thread::sleep(Duration::from_millis(1));
        if let Some(seen) = foe.begin_again()? {
            return Ok(seen);
        }
    }
    foe.ring_outcome()
}
