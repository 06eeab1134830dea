//! How fast a disk is: a fixed number of requests always out, for a fixed time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::{Disk, Kind, SECTOR, Status};
use crate::random::Random;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// Reads at random places.
    Randread,
    /// Writes at random places.
    Randwrite,
    /// Reads in order.
    Read,
    /// Writes in order.
    Write,
}

impl Load {
    /// Whether the disk's content changes.
    pub fn writes(self) -> bool {
        matches!(self, Load::Randwrite | Load::Write)
    }
}

/// What came out.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Requests.
    pub requests: u64,
    /// Time.
    pub elapsed: Duration,
    /// Median of the time from request to completion.
    pub p50: Duration,
    /// 99 of 100 were faster.
    pub p99: Duration,
}

impl Report {
    /// Requests in a second.
    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }
}

/// Measures for `time`, with requests of `size` bytes, as many at a time as the disk has slots, on all queues in turn.
///
/// # Errors
/// When a request fails.
pub fn run(disk: &mut Disk, load: Load, size: u32, time: Duration, seed: u64) -> Result<Report> {
    let kind = if load.writes() { Kind::Out } else { Kind::In };
    let blocks = disk.geometry.capacity * SECTOR / u64::from(size);
    if blocks == 0 {
        bail!("The disk is smaller than one request");
    }
    let mut random = Random::new(seed);
    let (mut started, mut latencies) = (std::collections::HashMap::new(), Vec::new());
    let (mut next, mut queue) = (0, 0);
    let start = Instant::now();
    loop {
        let running = start.elapsed() < time;
        while running && let Some(slot) = disk.idle() {
            let block = if matches!(load, Load::Read | Load::Write) { next % blocks } else { random.below(blocks) };
            if !disk.submit(queue, slot, kind, block * u64::from(size) / SECTOR, size) {
                break;
            }
            started.insert(slot, Instant::now());
            disk.device.kick(queue);
            (next, queue) = (next + 1, (queue + 1) % disk.device.queues());
        }
        if disk.outstanding() == 0 {
            break;
        }
        let done = disk.wait()?;
        if done.status != Status::Ok {
            bail!("the disk answered {:?}", done.status);
        }
        latencies.extend(started.remove(&done.slot).map(|from| from.elapsed()));
    }
    let elapsed = start.elapsed();
    latencies.sort_unstable();
    Ok(Report { requests: latencies.len() as u64, elapsed, p50: quantile(&latencies, 50), p99: quantile(&latencies, 99) })
}

/// The smallest value that `percent` of the sorted values do not exceed.
pub fn quantile(sorted: &[Duration], percent: usize) -> Duration {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}
