//! How fast a virtio-fs server is, without a file system in front of it: a fixed number of one kind of request always out.
//!
//! As with disks ([`crate::blk::bench`]), a request is laid out once and offered again and again, so that the server is measured and
//! not this program. Only where it reads or writes changes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::message::{ROOT, op};
use super::{FIRST, OUT_HEADER, PAGE, Share, wire};
use crate::blk::bench::{Report, Times, rest};
use crate::device::Device;
use crate::random::Random;
use crate::ring::Buffer;

/// The file that is used; made if it is not there.
const NAME: &[u8] = b"outboard-bench";

/// A name that is not there.
const MISSING: &[u8] = b"outboard-bench-missing";

/// Bytes of the file.
const FILE: u64 = 64 << 20;

/// Bytes of data at a time while the file is filled.
const PIECE: u32 = 128 * 1024;

/// Where the offset stands in a READ and a WRITE.
const OFFSET: u64 = 48;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// What is known of a file.
    Getattr,
    /// A name that is there.
    Lookup,
    /// A name that is not.
    LookupMiss,
    /// Reads at random places.
    Read,
    /// Writes at random places.
    Write,
    /// What no server knows: the cost of everything else.
    Nothing,
}

/// What to measure with.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What is measured.
    pub load: Load,
    /// Bytes of a read or write.
    pub size: u32,
    /// Requests at a time, on all queues together.
    pub depth: usize,
    /// How long.
    pub time: Duration,
    /// Look for answers all the time instead of sleeping until one is announced.
    pub poll: bool,
    /// Where the random places begin.
    pub seed: u64,
}

/// A request that is laid out.
#[derive(Clone, Copy, Debug)]
struct Laid {
    head: u16,
    request: u64,
    began: Instant,
}

#[derive(Debug)]
struct Lane {
    queue: u16,
    laid: Vec<Option<Laid>>,
}

/// Bytes of memory that a plan takes beside what a share takes.
pub fn memory(plan: &Plan) -> u64 {
    plan.depth as u64 * (u64::from(plan.size) + 4 * PAGE) + (1 << 20)
}

/// Measures on all request queues.
///
/// # Errors
/// When the server answers otherwise than it should.
pub fn run(share: &mut Share, plan: Plan) -> Result<Report> {
    share.exchange(&wire::init(2))?;
    let (node, handle) = file(share)?;
    let message = message(plan, node, handle);
    let mut lanes = lay_out(&mut share.device, plan, &message)?;
    let mut random = Random::new(plan.seed);
    let mut times = Times::default();
    let start = Instant::now();
    let mut out = 0;
    for lane in &mut lanes {
        for laid in lane.laid.iter_mut().flatten() {
            offer(&mut share.device, lane.queue, laid, plan, &mut random, start);
            out += 1;
        }
        share.device.kick(lane.queue);
    }
    while out > 0 {
        let before = times.count();
        for lane in &mut lanes {
            out -= turn(&mut share.device, lane, plan, &mut random, &mut times, start)?;
        }
        if times.count() == before {
            rest(&mut share.device, plan.poll, start).context("The server did not answer")?;
        }
    }
    Ok(times.report(start.elapsed()))
}

fn turn(device: &mut Device, lane: &mut Lane, plan: Plan, random: &mut Random, times: &mut Times, start: Instant) -> Result<u64> {
    /// Completions that are taken with one look at the clock.
    const TOGETHER: usize = 8;
    let mut ended = 0;
    let mut now = None;
    for _ in 0..TOGETHER {
        let Some(used) = device.used(lane.queue)? else { break };
        let now = *now.get_or_insert_with(Instant::now);
        let Some(laid) = lane.laid.get_mut(usize::from(used.head)).and_then(Option::as_mut) else {
            bail!("an answer on queue {} that belongs to no request", lane.queue);
        };
        if used.len < OUT_HEADER {
            bail!("an answer of {} bytes", used.len);
        }
        times.add(now.saturating_duration_since(laid.began));
        if now.saturating_duration_since(start) < plan.time {
            offer(device, lane.queue, laid, plan, random, now);
        } else {
            ended += 1;
        }
    }
    if now.is_some() {
        device.kick(lane.queue);
    }
    Ok(ended)
}

fn offer(device: &mut Device, queue: u16, laid: &mut Laid, plan: Plan, random: &mut Random, now: Instant) {
    if matches!(plan.load, Load::Read | Load::Write) {
        let place = random.below(FILE / u64::from(plan.size)) * u64::from(plan.size);
        device.memory().write(laid.request + OFFSET, &place.to_le_bytes());
    }
    laid.began = now;
    device.offer(queue, laid.head);
}

/// Lays out as a guest's kernel does: headers and arguments in one buffer, data on pages of their own.
fn lay_out(device: &mut Device, plan: Plan, message: &[u8]) -> Result<Vec<Lane>> {
    let queues = device.queues() - FIRST;
    let mut lanes: Vec<Lane> = (0..queues).map(|queue| Lane { queue: queue + FIRST, laid: Vec::new() }).collect();
    for number in 0..plan.depth {
        let index = number % lanes.len().max(1);
        let Some(lane) = lanes.get_mut(index) else { bail!("The server has no request queues") };
        let memory = device.memory_mut();
        let request = memory.take(256, 256, number as u64)?;
        let answer = memory.take(256, 256, number as u64)?;
        memory.write(request, message);
        let mut buffers = vec![Buffer { addr: request, len: u32::try_from(message.len())?, write: false }];
        let data = |memory: &mut crate::memory::Memory| memory.take(plan.size.into(), PAGE, number as u64);
        match plan.load {
            Load::Read => {
                let data = data(memory)?;
                buffers.push(Buffer { addr: answer, len: OUT_HEADER, write: true });
                buffers.push(Buffer { addr: data, len: plan.size, write: true });
            }
            Load::Write => {
                let data = data(memory)?;
                buffers.push(Buffer { addr: data, len: plan.size, write: false });
                buffers.push(Buffer { addr: answer, len: OUT_HEADER + 8, write: true });
            }
            _ => buffers.push(Buffer { addr: answer, len: OUT_HEADER + 128, write: true }),
        }
        let head = device.prepare(lane.queue, &buffers).context("the ring has no room for this depth")?;
        lane.laid.resize(lane.laid.len().max(usize::from(head) + 1), None);
        if let Some(place) = lane.laid.get_mut(usize::from(head)) {
            *place = Some(Laid { head, request, began: Instant::now() });
        }
    }
    Ok(lanes)
}

fn message(plan: Plan, node: u64, handle: u64) -> Vec<u8> {
    let transfer = |size: u32| [handle.to_le_bytes(), [0; 8], u64::from(size).to_le_bytes(), [0; 8], [0; 8]].concat();
    match plan.load {
        Load::Getattr => wire::about(op::GETATTR, node, 0, &[0; 16]),
        Load::Lookup => wire::about(op::LOOKUP, ROOT, 0, &[NAME, b"\0"].concat()),
        Load::LookupMiss => wire::about(op::LOOKUP, ROOT, 0, &[MISSING, b"\0"].concat()),
        Load::Read => wire::about(op::READ, node, 0, &transfer(plan.size)),
        Load::Write => wire::about(op::WRITE, node, plan.size, &transfer(plan.size)),
        Load::Nothing => wire::about(4000, ROOT, 0, &[]),
    }
}

/// Opens the file, or makes it, full of data that lies in the page cache then. Gives its node and its handle.
fn file(share: &mut Share) -> Result<(u64, u64)> {
    let flags = u32::try_from(libc::O_RDWR | libc::O_CREAT)?;
    let mut body = [flags, 0o100_644, 0, 0].map(u32::to_le_bytes).concat();
    body.extend([NAME, b"\0"].concat());
    let made = share.exchange(&wire::about(op::CREATE, ROOT, 0, &body)).context("Cannot make the file that is to be used")?.bytes;
    let number = |at: usize| made.get(at..at + 8).and_then(|bytes| bytes.first_chunk().copied()).map(u64::from_le_bytes);
    let (node, handle) = (number(16).context("A short answer")?, number(16 + 128).context("A short answer")?);
    for at in (0..FILE).step_by(PIECE as usize) {
        let head = [handle.to_le_bytes(), at.to_le_bytes(), u64::from(PIECE).to_le_bytes(), [0; 8], [0; 8]].concat();
        let body = [head, vec![7; PIECE as usize]].concat();
        share.exchange(&wire::about(op::WRITE, node, 0, &body)).context("Cannot fill the file")?;
    }
    Ok((node, handle))
}
