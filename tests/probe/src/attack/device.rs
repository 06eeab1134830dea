//! Requests that are well-formed chains and nonsense to the device.

use super::foe::{Foe, Result};
use super::guest::{DATA, DESC, Desc, NEXT, SIZE, WRITE, desc};
use super::target::Kind;
use super::{Case, Halt, Seen};
use crate::random::Random;

/// Where a request has its head and its answer.
const HEAD: u64 = DATA;
const BODY: u64 = DATA + 0x1000;

pub(super) const CASES: &[Case] = &[
    Case::new("one-byte", "A request of one byte to be read, and one to be written", |foe| {
        request(foe, &[0xff], &[desc(HEAD, 1, NEXT, 1), desc(BODY, 1, WRITE, 0)])
    }),
    Case::new("garbage", "A request of 4 KiB of ones, and room for 4 KiB", |foe| {
        request(foe, &[0xff; 4096], &[desc(HEAD, 4096, NEXT, 1), desc(BODY, 4096, WRITE, 0)])
    }),
    Case::new("zeroes", "A request of 4 KiB of zeroes, and room for 4 KiB", |foe| {
        request(foe, &[0; 4096], &[desc(HEAD, 4096, NEXT, 1), desc(BODY, 4096, WRITE, 0)])
    }),
    Case::new("pieces", "A request in pieces of one byte", |foe| {
        let mut table: Vec<_> = (0..15).map(|n| desc(HEAD + u64::from(n), 1, NEXT, n + 1)).collect();
        table.push(desc(BODY, 1, WRITE, 0));
        request(foe, &[0; 16], &table)
    }),
    Case::new("random", "500 requests of random bytes", |foe| {
        foe.start()?;
        let mut random = Random::new(3);
        let mut seen = Seen::Taken;
        for _ in 0..500 {
            let bytes: Vec<u8> = (0..random.below(80)).map(|_| random.number().to_le_bytes()[0] >> random.below(8)).collect();
            // A disk is not to be written by chance.
            let bytes = if foe.target.kind == Kind::Blk { harmless(bytes) } else { bytes };
            foe.guest.put(HEAD, &bytes);
            let len = u32::try_from(bytes.len()).unwrap_or(0);
            let room = u32::try_from(random.below(600)).unwrap_or(0);
            foe.guest.describe(DESC, 0, desc(HEAD, len, NEXT, 1));
            foe.guest.describe(DESC, 1, desc(BODY, room, WRITE, 0));
            let before = foe.guest.used();
            foe.guest.offer(0);
            foe.ring();
            let start = std::time::Instant::now();
            while foe.guest.used() == before && start.elapsed() < std::time::Duration::from_millis(300) {
                std::thread::yield_now();
            }
            if foe.guest.used() == before {
                seen = foe.ring_outcome()?;
                break;
            }
        }
        Ok(if seen == Seen::Taken { foe.ring_outcome()? } else { seen })
    }),
    Case::new("blk-no-status", "A disk request whose status cannot be written", |foe| {
        only(foe, Kind::Blk)?;
        request(foe, &block(0, 0), &[desc(HEAD, 16, NEXT, 1), desc(BODY, 1, 0, 0)])
    }),
    Case::new("blk-short", "A disk request whose head is cut off", |foe| {
        only(foe, Kind::Blk)?;
        request(foe, &block(0, 0), &[desc(HEAD, 8, NEXT, 1), desc(BODY, 513, WRITE, 0)])
    }),
    Case::new("blk-far", "A read behind the last sector there can be", |foe| {
        only(foe, Kind::Blk)?;
        request(foe, &block(0, u64::MAX), &[desc(HEAD, 16, NEXT, 1), desc(BODY, 513, WRITE, 0)])
    }),
    Case::new("blk-wrap", "A read whose place in bytes wraps to 0", |foe| {
        only(foe, Kind::Blk)?;
        request(foe, &block(0, 1 << 55), &[desc(HEAD, 16, NEXT, 1), desc(BODY, 513, WRITE, 0)])
    }),
    Case::new("blk-half", "A read of half a sector", |foe| {
        only(foe, Kind::Blk)?;
        request(foe, &block(0, 0), &[desc(HEAD, 16, NEXT, 1), desc(BODY, 257, WRITE, 0)])
    }),
    Case::new("blk-kinds", "Requests of every kind there is not", |foe| {
        only(foe, Kind::Blk)?;
        foe.start()?;
        for kind in [2, 3, 5, 7, 9, 14, 99, 0x8000_0000, u32::MAX] {
            foe.guest.put(HEAD, &block(kind, 0));
            foe.guest.describe(DESC, 0, desc(HEAD, 16, NEXT, 1));
            foe.guest.describe(DESC, 1, desc(BODY, 513, WRITE, 0));
            foe.guest.offer(0);
            foe.ring();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        foe.ring_outcome()
    }),
    Case::new("blk-discard", "A discard of half a range, of none, and of all there could be", |foe| {
        only(foe, Kind::Blk)?;
        foe.start()?;
        let range = [&block(11, 0)[..], &[0xff; 16]].concat();
        for (step, len) in [24u32, 16, 32].into_iter().enumerate() {
            let head = u16::try_from(2 * step).unwrap_or(0);
            foe.guest.put(HEAD, &range);
            foe.guest.describe(DESC, head, desc(HEAD, len, NEXT, head + 1));
            foe.guest.describe(DESC, head + 1, desc(BODY, 1, WRITE, 0));
            foe.guest.offer(head);
        }
        foe.ring_outcome()
    }),
    Case::new("fs-length", "A file system request that is shorter than it says", |foe| {
        only(foe, Kind::Fs)?;
        let bytes = [u32::MAX, 3, 7, 0, 1, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
        request(foe, &bytes, &[desc(HEAD, 40, NEXT, 1), desc(BODY, 120, WRITE, 0)])
    }),
    Case::new("fs-opcode", "A file system request of an unknown kind", |foe| {
        only(foe, Kind::Fs)?;
        let bytes = [40, 0xffff, 7, 0, 1, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
        request(foe, &bytes, &[desc(HEAD, 40, NEXT, 1), desc(BODY, 120, WRITE, 0)])
    }),
    Case::new("fs-no-room", "A file system request without room for its answer", |foe| {
        only(foe, Kind::Fs)?;
        let bytes = [56, 3, 7, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
        request(foe, &bytes, &[desc(HEAD, 56, NEXT, 1), desc(BODY, 4, WRITE, 0)])
    }),
];

fn only(foe: &Foe, kind: Kind) -> Result<()> {
    if foe.target.kind == kind { Ok(()) } else { Err(Halt::NotOffered("such a device")) }
}

/// A head of a disk request.
fn block(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// Random bytes that do not ask for a write.
fn harmless(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(kind) = bytes.first_mut() {
        *kind |= 0x40;
    }
    bytes
}

fn request(foe: &mut Foe, bytes: &[u8], table: &[Desc]) -> Result<Seen> {
    foe.start()?;
    foe.guest.put(HEAD, bytes);
    for (index, desc) in (0..SIZE).zip(table) {
        foe.guest.describe(DESC, index, *desc);
    }
    foe.guest.offer(0);
    foe.ring_outcome()
}
