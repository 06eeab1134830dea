//! A disk under kills: reads, writes, zeroes, discards and flushes, each block with one right content.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use anyhow::{Result, bail};

use super::snapshots::Snapshots;
use super::{Load, Plan, Report, run};
use crate::blk::{Disk, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, Kind, SECTOR, Status, pattern, range};
use crate::device::Device;
use crate::link::Backend;
use crate::random::Random;

/// Bytes of a block in a storm.
const BLOCK: u32 = 4096;
const BLOCK_BYTES: usize = BLOCK as usize;

/// Most blocks in a storm: few enough that each is written many times.
const MAX_BLOCKS: u64 = 2048;

/// Most blocks of a read or a write: enough to reach into the next cluster of an image.
const MAX_RUN: u64 = (REQUEST / BLOCK) as u64;

/// Bytes of a request, at most.
pub const REQUEST: u32 = 4 * BLOCK;

/// Kills that a request may have seen before the next one waits for it. A flush takes longer than the time between two kills, and a
/// backend that has died five times with the same request in hand answers it with an error.
const SUSPECT: u32 = 3;

/// Blocks of a large discard: a cluster, as most images have them.
const CLUSTER: u64 = 16;

/// Runs a storm on a block device. Its content is overwritten. With a folder for snapshots, its images are made there, and it is killed
/// while it goes from one to the next.
///
/// # Errors
/// When the backend cannot be started, or a step fails in a way that is no verdict.
pub fn blk(backend: &mut Backend, folder: Option<&Path>, plan: Plan, progress: impl FnMut(u32)) -> Result<Report> {
    let snapshots = folder.map(|folder| Snapshots::new(folder, MAX_BLOCKS * u64::from(BLOCK), backend)).transpose()?;
    let stream = backend.start()?;
    let mut disk = Disk::open(stream, plan.shape, plan.depth, REQUEST, plan.seed)?;
    let blocks = (disk.geometry.capacity * SECTOR / u64::from(BLOCK)).min(MAX_BLOCKS);
    if blocks <= plan.depth as u64 * 2 * MAX_RUN {
        bail!("The disk is too small for a storm of depth {}", plan.depth);
    }
    let mut content = Vec::new();
    for block in 0..blocks {
        let mut bytes = [0; BLOCK_BYTES];
        disk.read(block * u64::from(BLOCK), &mut bytes)?;
        content.push(Content::First(hash(&bytes)));
    }
    let written = vec![0; content.len()];
    let (out, random) = (vec![None; plan.depth], Random::new(plan.seed));
    let mut load = BlkLoad { disk, content, written, out, random, seed: plan.seed, snapshots };
    run(&mut load, backend, plan, progress)
}

/// What a block has to hold.
#[derive(Clone, Copy, Debug)]
enum Content {
    /// What it held at the beginning, by its hash.
    First(u64),
    /// What its write of that number put there.
    Write(u64),
    /// Zeroes.
    Zeroes,
    /// Whatever there is, after a discard.
    Anything,
}

/// A request that is out.
#[derive(Clone, Copy, Debug)]
struct Out {
    kind: Kind,
    block: u64,
    count: u64,
    /// Kills while it was out.
    kills: u32,
}

impl Out {
    fn meets(&self, block: u64, count: u64) -> bool {
        self.block < block + count && block < self.block + self.count
    }
}

struct BlkLoad {
    disk: Disk,
    content: Vec<Content>,
    /// How often each block was written.
    written: Vec<u64>,
    out: Vec<Option<Out>>,
    random: Random,
    seed: u64,
    snapshots: Option<Snapshots>,
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn index(block: u64) -> usize {
    usize::try_from(block).unwrap_or(0)
}

impl BlkLoad {
    fn is_right(&self, block: u64, got: &[u8]) -> bool {
        match self.content[index(block)] {
            Content::First(first) => hash(got) == first,
            Content::Zeroes => got.iter().all(|byte| *byte == 0),
            Content::Anything => true,
            Content::Write(number) => {
                let mut expected = [0; BLOCK_BYTES];
                pattern(block, number, self.seed, &mut expected);
                expected == got
            }
        }
    }

    /// Blocks of a request that hold something else.
    fn wrong(&self, slot: usize, out: Out) -> u64 {
        let mut got = vec![0; index(out.count) * BLOCK_BYTES];
        self.disk.data(slot, &mut got);
        let wrong = (out.block..).zip(got.chunks(BLOCK_BYTES)).filter(|(block, got)| !self.is_right(*block, got));
        wrong.count() as u64
    }

    /// Any request on blocks that no other one is about: that is what makes every content right or wrong.
    fn next(&mut self) -> Option<Out> {
        let (features, geometry) = (self.disk.device.features(), self.disk.geometry);
        let kind = match self.random.below(16) {
            0 if features & F_FLUSH != 0 => return Some(Out { kind: Kind::Flush, block: 0, count: 0, kills: 0 }),
            1 if features & F_DISCARD != 0 => Kind::Discard,
            2 if features & F_WRITE_ZEROES != 0 => Kind::WriteZeroes,
            number if number < 9 => Kind::Out,
            _ => Kind::In,
        };
        let mut block = self.random.below(self.content.len() as u64);
        let mut count = 1 + self.random.below(MAX_RUN);
        let most = match kind {
            Kind::Discard => u64::from(geometry.max_discard) * SECTOR / u64::from(BLOCK),
            Kind::WriteZeroes => u64::from(geometry.max_zeroes) * SECTOR / u64::from(BLOCK),
            _ => MAX_RUN,
        };
        if most >= CLUSTER && self.random.below(2) == 0 {
            (block, count) = (block - block % CLUSTER, CLUSTER);
        }
        count = count.min(most).min(self.content.len() as u64 - block);
        let busy = count == 0 || self.out.iter().flatten().any(|out| out.meets(block, count));
        (!busy).then_some(Out { kind, block, count, kills: 0 })
    }

    /// Lays the request's data out, and gives its sector and length on the wire.
    fn prepare(&mut self, slot: usize, out: Out) -> (u64, u32) {
        let sector = out.block * u64::from(BLOCK) / SECTOR;
        let len = u32::try_from(out.count).unwrap_or(0) * BLOCK;
        match out.kind {
            Kind::Out => {
                let mut bytes = vec![0; index(out.count) * BLOCK_BYTES];
                for (block, bytes) in (out.block..).zip(bytes.chunks_mut(BLOCK_BYTES)) {
                    pattern(block, self.written[index(block)] + 1, self.seed, bytes);
                }
                self.disk.fill(slot, &bytes);
            }
            Kind::Discard | Kind::WriteZeroes => {
                let unmap = out.kind == Kind::WriteZeroes && self.random.below(2) == 0;
                let bytes = range(sector, len / 512, unmap.into());
                self.disk.fill(slot, &bytes);
                return (0, 16);
            }
            _ => {}
        }
        (sector, len)
    }

    /// What a completed request has changed.
    fn note(&mut self, out: Out) {
        for block in (out.block..out.block + out.count).map(index) {
            self.content[block] = match out.kind {
                Kind::Out => {
                    self.written[block] += 1;
                    Content::Write(self.written[block])
                }
                Kind::WriteZeroes => Content::Zeroes,
                Kind::Discard => Content::Anything,
                _ => self.content[block],
            };
        }
    }
}

impl Load for BlkLoad {
    fn device(&mut self) -> &mut Device {
        &mut self.disk.device
    }

    fn fill(&mut self) {
        while let Some(slot) = self.disk.idle() {
            let Some(out) = self.next() else { continue };
            let (sector, len) = self.prepare(slot, out);
            let queue = u16::try_from(self.random.below(self.disk.device.queues().into())).unwrap_or(0);
            if !self.disk.submit(queue, slot, out.kind, sector, len) {
                return;
            }
            self.disk.device.kick(queue);
            self.out[slot] = Some(out);
        }
    }

    fn take(&mut self, report: &mut Report) -> Result<u64> {
        let mut count = 0;
        loop {
            let done = match self.disk.completion() {
                Ok(Some(done)) => done,
                Ok(None) => return Ok(count),
                // A head that was not out: the request was completed before.
                Err(_) => {
                    report.duplicated += 1;
                    continue;
                }
            };
            count += 1;
            report.requests += 1;
            let Some(out) = self.out.get_mut(done.slot).and_then(Option::take) else { continue };
            match (done.status, out.kind) {
                (Status::Ok, Kind::In) => report.corrupted += self.wrong(done.slot, out),
                (Status::Ok, _) => self.note(out),
                _ => report.failed += 1,
            }
        }
    }

    fn has_suspect(&self) -> bool {
        self.out.iter().flatten().any(|out| out.kills >= SUSPECT)
    }

    fn disturb(&mut self, report: &mut Report) -> Result<bool> {
        let Some(snapshots) = &mut self.snapshots else { return Ok(false) };
        let asked = self.random.below(2) == 0;
        if asked {
            snapshots.ask()?;
            report.snapshots += 1;
        }
        Ok(asked)
    }

    fn succeed(&mut self, backend: &mut Backend, report: &mut Report) -> Result<()> {
        self.out.iter_mut().flatten().for_each(|out| out.kills += 1);
        match &mut self.snapshots {
            Some(snapshots) => snapshots.succeed(backend, report),
            None => Ok(()),
        }
    }

    fn finish(&mut self, report: &mut Report) -> Result<()> {
        if report.lost > 0 {
            return Ok(());
        }
        for block in 0..self.content.len() as u64 {
            let mut got = [0; BLOCK_BYTES];
            self.disk.read(block * u64::from(BLOCK), &mut got)?;
            report.corrupted += u64::from(!self.is_right(block, &got));
        }
        Ok(())
    }
}
