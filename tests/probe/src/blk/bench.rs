//! How fast a disk is: a fixed number of requests always out, for a fixed time.
//!
//! What is to be measured is the disk and not this program, so a request is laid out once, in one table with one page-aligned buffer of data,
//! as a kernel's driver lays it out, and offered again and again with another sector. What has come back is taken and offered again in
//! one go, with one announcement if the disk wants one.

use std::hint;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::{Disk, HEADER, Kind, LIMIT, PAGE, SECTOR, STATUS_NONE, Status};
use crate::device::Device;
use crate::random::Random;
use crate::ring::Buffer;

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

    fn is_in_order(self) -> bool {
        matches!(self, Load::Read | Load::Write)
    }
}

/// What to measure with.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What is measured.
    pub load: Load,
    /// Bytes of a request.
    pub size: u32,
    /// Requests at a time, on all queues together.
    pub depth: usize,
    /// How long.
    pub time: Duration,
    /// Look for completions all the time instead of sleeping until one is announced.
    pub poll: bool,
    /// Where the random places begin.
    pub seed: u64,
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

/// A request that is laid out.
#[derive(Clone, Copy, Debug)]
struct Laid {
    head: u16,
    header: u64,
    status: u64,
    began: Instant,
}

/// A queue, and what is laid out in it, by head.
#[derive(Debug)]
struct Lane {
    queue: u16,
    laid: Vec<Option<Laid>>,
}

/// Measures on all queues.
///
/// # Errors
/// When a request fails.
pub fn run(disk: &mut Disk, plan: Plan) -> Result<Report> {
    let blocks = disk.geometry.capacity * SECTOR / u64::from(plan.size);
    if blocks == 0 {
        bail!("The disk is smaller than one request");
    }
    let mut lanes = lay_out(&mut disk.device, plan)?;
    let mut places = Places { load: plan.load, blocks, next: 0, random: Random::new(plan.seed) };
    let mut times = Times::default();
    let start = Instant::now();
    let mut out = 0;
    for lane in &mut lanes {
        for laid in lane.laid.iter_mut().flatten() {
            offer(&mut disk.device, lane.queue, laid, &mut places, plan.size, start);
            out += 1;
        }
        disk.device.kick(lane.queue);
    }
    while out > 0 {
        let before = times.count;
        for lane in &mut lanes {
            out -= turn(&mut disk.device, lane, &mut places, &mut times, plan, start)?;
        }
        if times.count == before {
            rest(&mut disk.device, plan.poll, start).context("The disk did not answer")?;
        }
    }
    Ok(times.report(start.elapsed()))
}

/// Completions that are taken with one look at the clock.
const TOGETHER: usize = 8;

/// Takes what has come back on a queue, and offers it again while there is time. How many stay back.
fn turn(device: &mut Device, lane: &mut Lane, places: &mut Places, times: &mut Times, plan: Plan, start: Instant) -> Result<u64> {
    let mut ended = 0;
    let mut now = None;
    for _ in 0..TOGETHER {
        let Some(used) = device.used(lane.queue)? else { break };
        let now = *now.get_or_insert_with(Instant::now);
        let Some(laid) = lane.laid.get_mut(usize::from(used.head)).and_then(Option::as_mut) else {
            bail!("a completion on queue {} that belongs to no request", lane.queue);
        };
        let mut status = [0];
        device.memory().read(laid.status, &mut status);
        match status.map(Status::from) {
            [Status::Ok] => times.add(now.saturating_duration_since(laid.began)),
            [other] => bail!("the disk answered {other:?}"),
        }
        if now.saturating_duration_since(start) < plan.time {
            offer(device, lane.queue, laid, places, plan.size, now);
        } else {
            ended += 1;
        }
    }
    if now.is_some() {
        device.kick(lane.queue);
    }
    Ok(ended)
}

/// There is nothing to take: waits until there is, or looks once more.
///
/// # Errors
/// When nothing came for too long.
pub(crate) fn rest(device: &mut Device, poll: bool, start: Instant) -> Result<()> {
    if poll {
        hint::spin_loop();
        // A server that never answers is somebody else's finding, but not to be waited for without end.
        if start.elapsed() > LIMIT * 4 {
            bail!("nothing came back");
        }
    } else if !device.wait(LIMIT) {
        bail!("nothing came back within {} s", LIMIT.as_secs());
    }
    Ok(())
}

fn lay_out(device: &mut Device, plan: Plan) -> Result<Vec<Lane>> {
    let queues = device.queues();
    let kind = if plan.load.writes() { Kind::Out } else { Kind::In };
    let mut lanes: Vec<Lane> = (0..queues).map(|queue| Lane { queue, laid: Vec::new() }).collect();
    for number in 0..plan.depth {
        let index = number % lanes.len().max(1);
        let Some(lane) = lanes.get_mut(index) else { bail!("The device has no queues") };
        let memory = device.memory_mut();
        let place = number as u64;
        let data = memory.take(plan.size.into(), PAGE, place)?;
        let header = memory.take(HEADER.into(), HEADER.into(), place)?;
        let status = memory.take(1, 1, place)?;
        let mut bytes = [0; 16];
        if let Some(first) = bytes.first_chunk_mut() {
            *first = kind.number().to_le_bytes();
        }
        memory.write(header, &bytes);
        let buffers = [
            Buffer { addr: header, len: HEADER, write: false },
            Buffer { addr: data, len: plan.size, write: kind.device_writes() },
            Buffer { addr: status, len: 1, write: true },
        ];
        let head = device.prepare(lane.queue, &buffers).context("the ring has no room for this depth")?;
        lane.laid.resize(lane.laid.len().max(usize::from(head) + 1), None);
        if let Some(place) = lane.laid.get_mut(usize::from(head)) {
            *place = Some(Laid { head, header, status, began: Instant::now() });
        }
    }
    Ok(lanes)
}

fn offer(device: &mut Device, queue: u16, laid: &mut Laid, places: &mut Places, size: u32, now: Instant) {
    let sector = places.next() * u64::from(size) / SECTOR;
    device.memory().write(laid.header + 8, &sector.to_le_bytes());
    device.memory().write(laid.status, &[STATUS_NONE]);
    laid.began = now;
    device.offer(queue, laid.head);
}

/// Where the next request goes.
struct Places {
    load: Load,
    blocks: u64,
    next: u64,
    random: Random,
}

impl Places {
    fn next(&mut self) -> u64 {
        if !self.load.is_in_order() {
            return self.random.below(self.blocks);
        }
        self.next += 1;
        (self.next - 1) % self.blocks
    }
}

/// Parts of an octave that are counted apart: a quantile is exact to one in so many.
const PARTS: u64 = 32;

/// Parts of all octaves.
const PLACES: usize = 64 * 32;

/// How long requests took, counted as they come.
#[derive(Debug)]
pub struct Times {
    counts: Vec<u64>,
    count: u64,
}

impl Default for Times {
    fn default() -> Times {
        Times { counts: vec![0; PLACES], count: 0 }
    }
}

impl Times {
    /// One that took so long.
    pub fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(PARTS);
        let octave = nanos.ilog2();
        // Of the octave's PARTS parts, the one it lies in.
        let part = (nanos >> (octave - PARTS.ilog2())) - PARTS;
        let place = usize::try_from(u64::from(octave) * PARTS + part).unwrap_or(0);
        if let Some(count) = self.counts.get_mut(place) {
            *count += 1;
        }
        self.count += 1;
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// What came out, in so much time.
    pub fn report(&self, elapsed: Duration) -> Report {
        Report { requests: self.count, elapsed, p50: self.quantile(50), p99: self.quantile(99) }
    }

    /// The smallest time that `percent` of all do not exceed, to one part of an octave.
    fn quantile(&self, percent: u64) -> Duration {
        let rank = self.count * percent / 100;
        let mut seen = 0;
        let place = self.counts.iter().position(|count| {
            seen += count;
            seen > rank
        });
        let place = place.unwrap_or(0) as u64;
        let (octave, part) = (place / PARTS, place % PARTS);
        Duration::from_nanos((PARTS + part) << octave >> PARTS.ilog2())
    }
}

/// The smallest value that `percent` of the sorted values do not exceed.
pub fn quantile(sorted: &[Duration], percent: usize) -> Duration {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_times_to_a_thirtieth() {
        let mut random = Random::new(7);
        let mut times = Times::default();
        let mut time = || {
            let octave = random.below(30);
            Duration::from_nanos(50 + random.below(1 << octave))
        };
        let mut sorted: Vec<Duration> = (0..10_000).map(|_| time()).collect();
        sorted.iter().for_each(|time| times.add(*time));
        sorted.sort_unstable();
        for percent in [1, 50, 99] {
            let (exact, about) = (quantile(&sorted, percent).as_nanos(), times.quantile(percent as u64).as_nanos());
            assert!(about <= exact && exact - about <= exact / 30, "{percent}: {exact} and {about}");
        }
    }
}
