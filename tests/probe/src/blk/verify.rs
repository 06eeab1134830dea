//! Writes a pattern over a range of the disk and reads it back, many requests at a time, in random order.

use anyhow::{Result, bail};

use super::{Disk, Kind, SECTOR, Status, pattern};
use crate::random::Random;

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Blocks that were written and read.
    pub blocks: u64,
    /// Blocks that held something else.
    pub wrong: u64,
}

/// Writes and reads `blocks` blocks of `size` bytes from the beginning of the disk. What was there is gone.
///
/// # Errors
/// When the disk answers an error. Wrong content is in the report.
pub fn run(disk: &mut Disk, blocks: u64, size: u32, seed: u64) -> Result<Report> {
    pass(disk, Kind::Out, blocks, size, seed)?;
    disk.flush()?;
    let wrong = pass(disk, Kind::In, blocks, size, seed)?;
    Ok(Report { blocks, wrong })
}

fn pass(disk: &mut Disk, kind: Kind, blocks: u64, size: u32, seed: u64) -> Result<u64> {
    let mut order: Vec<u64> = (0..blocks).collect();
    let mut random = Random::new(seed ^ u64::from(kind == Kind::In));
    for index in (1..order.len()).rev() {
        order.swap(index, usize::try_from(random.below(index as u64 + 1))?);
    }
    let (mut wrong, mut of_slot) = (0, std::collections::HashMap::new());
    let (mut expected, mut got) = (vec![0; usize::try_from(size)?], vec![0; usize::try_from(size)?]);
    let queues = u64::from(disk.device.queues());
    loop {
        while let Some(block) = order.last().copied() {
            let Some(slot) = disk.idle() else { break };
            if kind == Kind::Out {
                pattern(block, 1, seed, &mut expected);
                disk.fill(slot, &expected);
            }
            let queue = u16::try_from(random.below(queues))?;
            if !disk.submit(queue, slot, kind, block * u64::from(size) / SECTOR, size) {
                break;
            }
            disk.device.kick(queue);
            of_slot.insert(slot, block);
            order.pop();
        }
        if disk.outstanding() == 0 && order.is_empty() {
            return Ok(wrong);
        }
        let done = disk.wait()?;
        let block = of_slot.remove(&done.slot).unwrap_or_default();
        if done.status != Status::Ok {
            bail!("the disk answered {:?} to {kind:?} of block {block}", done.status);
        }
        if kind == Kind::In {
            pattern(block, 1, seed, &mut expected);
            disk.data(done.slot, &mut got);
            wrong += u64::from(expected != got);
        }
    }
}
