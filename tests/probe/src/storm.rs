//! Kills under verified load.
//!
//! A backend is started, loaded with many requests at once, killed at a random moment, started again, and so on. The probe
//! plays the VMM: rings, memory and the in-flight region stay, the successor gets them. Afterwards three numbers have to be zero:
//!
//! - *lost*: requests that were never given back;
//! - *duplicated*: completions of requests that were not out;
//! - *corrupted*: blocks that do not hold what the last completed write put there, random bytes that were not written, a console's
//!   line that is not as it was sent.
//!
//! A write that was in flight at a kill may have happened or not, until its completion says that it has; since no two requests
//! for one block are out at the same time, every completed request has exactly one right content.
//!
//! A disk may also be killed while it changes its image (`snapshots.rs`).

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::blk::LIMIT;
use crate::blk::bench::quantile;
use crate::device::{Device, Shape};
use crate::link::Backend;
use crate::random::Random;
use crate::ring::{Buffer, Used};

mod blk;
mod console;
mod snapshots;

pub use blk::{REQUEST, blk};
pub use console::console;

/// How a storm is run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Kills.
    pub kills: u32,
    /// Requests out at a time.
    pub depth: usize,
    /// Longest time between two kills.
    pub gap: Duration,
    /// The rings.
    pub shape: Shape,
    /// The seed of everything random.
    pub seed: u64,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Kills that were done.
    pub kills: u32,
    /// Requests that were completed.
    pub requests: u64,
    /// See the module.
    pub lost: u64,
    /// See the module.
    pub duplicated: u64,
    /// See the module.
    pub corrupted: u64,
    /// Requests that the device completed with an error.
    pub failed: u64,
    /// Snapshots that were asked for, a moment before a kill.
    pub snapshots: u64,
    /// Snapshots that were taken before the kill came: the others were cut off.
    pub taken: u64,
    /// From each kill to the next completion, sorted.
    pub pauses: Vec<Duration>,
}

impl Report {
    /// Nothing was lost, duplicated, corrupted or failed.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.corrupted == 0 && self.failed == 0
    }

    /// The pause that `percent` of the kills did not exceed.
    pub fn pause(&self, percent: usize) -> Duration {
        quantile(&self.pauses, percent)
    }
}

/// What a storm needs of the device it drives.
trait Load {
    fn device(&mut self) -> &mut Device;
    /// Puts in as many requests as there is room for.
    fn fill(&mut self);
    /// Takes completions, checks them, and gives their number.
    fn take(&mut self, report: &mut Report) -> Result<u64>;
    /// A request has seen so many kills that one more would make it look like their cause: backends give such a request up.
    fn has_suspect(&self) -> bool {
        false
    }
    /// Asks the backend for something that the kill may cut off. `false`: there is nothing.
    fn disturb(&mut self, _report: &mut Report) -> Result<bool> {
        Ok(false)
    }
    /// The backend is dead: settles how its successor is started.
    fn succeed(&mut self, _backend: &mut Backend, _report: &mut Report) -> Result<()> {
        Ok(())
    }
    /// Checks at the end what only then can be checked.
    fn finish(&mut self, report: &mut Report) -> Result<()>;
}

/// Runs a storm on an entropy source.
///
/// # Errors
/// As [`blk`].
pub fn rng(backend: &mut Backend, plan: Plan, progress: impl FnMut(u32)) -> Result<Report> {
    let stream = backend.start()?;
    let mut device = Device::connect(stream, plan.shape, 0)?;
    let mut idle = Vec::new();
    for place in 0..plan.depth as u64 {
        idle.push(device.memory_mut().take(RANDOM_BYTES.into(), 1, place)?);
    }
    device.start()?;
    run(&mut RngLoad { device, idle, out: Vec::new() }, backend, plan, progress)
}

/// The shortest of the longest times from a disturbance to the kill, in microseconds, and how often it doubles: up to 32 ms. What is
/// disturbed takes less than a millisecond, or as long as a disk takes to make something durable.
const DISTURBED: (u64, u64) = (1000, 6);

fn run(load: &mut impl Load, backend: &mut Backend, plan: Plan, mut progress: impl FnMut(u32)) -> Result<Report> {
    let mut report = Report::default();
    let mut random = Random::new(plan.seed ^ 1);
    for kill in 1..=plan.kills {
        let gap = Duration::from_micros(random.below(u64::try_from(plan.gap.as_micros())?));
        load_for(load, gap, &mut report)?;
        if load.disturb(&mut report)? {
            let (shortest, doubled) = DISTURBED;
            let longest = shortest << random.below(doubled);
            load_for(load, Duration::from_micros(random.below(longest)), &mut report)?;
        }
        let connection: Option<OwnedFd> = load.device().connection().map(|fd| fd.try_clone_to_owned()).transpose()?;
        let killed = Instant::now();
        backend.kill(connection.as_ref().map(AsFd::as_fd))?;
        load.fill();
        load.succeed(backend, &mut report)?;
        let stream = backend.start()?;
        load.device().reconnect(stream).with_context(|| format!("after kill {kill}"))?;
        if !resume(load, &mut report)? {
            break;
        }
        report.pauses.push(killed.elapsed());
        report.kills = kill;
        progress(kill);
    }
    drain(load, &mut report)?;
    load.finish(&mut report)?;
    report.pauses.sort_unstable();
    Ok(report)
}

/// Keeps the device loaded for a while.
fn load_for(load: &mut impl Load, time: Duration, report: &mut Report) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time || (load.has_suspect() && start.elapsed() < LIMIT) {
        load.fill();
        if load.take(report)? == 0 {
            load.device().wait(Duration::from_millis(1));
        }
    }
    load.fill();
    Ok(())
}

/// Waits for the first completion after a restart. `false`: none comes.
fn resume(load: &mut impl Load, report: &mut Report) -> Result<bool> {
    let start = Instant::now();
    while load.take(report)? == 0 {
        if start.elapsed() > LIMIT {
            return Ok(false);
        }
        load.device().wait(Duration::from_millis(100));
    }
    Ok(true)
}

/// Waits for all that is out. What does not come is lost.
fn drain(load: &mut impl Load, report: &mut Report) -> Result<()> {
    let mut last = Instant::now();
    while load.device().outstanding() > 0 && last.elapsed() < LIMIT {
        if load.take(report)? > 0 {
            last = Instant::now();
        } else {
            load.device().wait(Duration::from_millis(100));
        }
    }
    report.lost = load.device().outstanding() as u64;
    Ok(())
}

/// The next completion of a queue, counted. What completes and was not out is a duplicate.
fn next(device: &mut Device, queue: u16, report: &mut Report) -> Option<Used> {
    loop {
        match device.completion(queue) {
            Ok(used) => {
                report.requests += u64::from(used.is_some());
                return used;
            }
            Err(_) => report.duplicated += 1,
        }
    }
}

/// Bytes of a request for random numbers.
const RANDOM_BYTES: u32 = 64;

struct RngLoad {
    device: Device,
    idle: Vec<u64>,
    out: Vec<(u16, u64)>,
}

impl Load for RngLoad {
    fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    fn fill(&mut self) {
        while let Some(at) = self.idle.pop() {
            self.device.memory().write(at, &[0; RANDOM_BYTES as usize]);
            let Some(head) = self.device.submit(0, &[Buffer { addr: at, len: RANDOM_BYTES, write: true }]) else {
                self.idle.push(at);
                break;
            };
            self.out.push((head, at));
        }
        self.device.kick(0);
    }

    fn take(&mut self, report: &mut Report) -> Result<u64> {
        let mut count = 0;
        while let Some(used) = next(&mut self.device, 0, report) {
            count += 1;
            let Some(place) = self.out.iter().position(|(head, _)| *head == used.head) else { continue };
            let (_, at) = self.out.swap_remove(place);
            let mut bytes = [0; RANDOM_BYTES as usize];
            self.device.memory().read(at, &mut bytes);
            // 64 random bytes of which 48 are zero: sooner the sun goes out.
            let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
            report.corrupted += u64::from(used.len != RANDOM_BYTES || zeroes > 48);
            self.idle.push(at);
        }
        Ok(count)
    }

    fn finish(&mut self, _report: &mut Report) -> Result<()> {
        Ok(())
    }
}
