//! A driver for virtio-fs (virtio 1.3, 5.11), and any such server as a mount of this host.
//!
//! virtio-fs is the FUSE protocol over virtqueues: what a guest's kernel would say to a FUSE daemon through `/dev/fuse`, it puts into a
//! queue. So the driver needs no file system of its own: this host's kernel is one, and [`bridge`] carries its requests over, byte for byte.
//!
//! A [`Share`] has a number of slots, each with memory for one request and its answer. Data lies on pages there, as a guest's does: a
//! server that reads and writes files past the page cache needs it so.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::args::Rings;
use crate::device::{Device, Shape};
use crate::random::Random;
use crate::ring::Buffer;
use layout::{Layout, Side};
use wire::{BEFORE_DATA, MOST_DATA, OUT_HEADER, Request, Settled};

pub mod attack;
pub mod bench;
pub mod bridge;
pub mod layout;
pub mod message;
pub mod mount;
pub mod raw;
pub mod wire;

/// Requests that are out at a time.
const SLOTS: usize = 64;

/// How long a server may take for what it does not need the disk for: to greet, and to say goodbye.
const LIMIT: Duration = Duration::from_secs(10);

/// Bytes of a configuration space with all that is asked about: the tag, and the number of request queues.
const CONFIG: u32 = 40;
const TAG: usize = 36;

/// The first request queue; before it comes the one for what must not wait.
const FIRST: u16 = 1;
const URGENT: u16 = 0;

const PAGE: u64 = 4096;

/// Bytes of memory for one side of a request: a page that ends with what comes before the data, the data, and a page for the longest
/// name behind arguments.
const SIDE: u32 = MOST_DATA + 2 * 4096;

/// Bytes of memory that a slot takes; [`Rings::shape`] leaves room between slots.
pub const SLOT: u32 = 2 * SIDE;

/// Most bytes of a request.
pub const MOST_REQUEST: usize = 1 << 20 | 1 << 12;

/// How a share is driven.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The rings. `queues` is how many request queues are used.
    pub shape: Shape,
    /// Cut buffers at random.
    pub scatter: bool,
    /// Of layouts and places.
    pub seed: u64,
}

impl Plan {
    /// Rings for so many slots.
    pub fn new(rings: Rings, scatter: bool) -> Plan {
        let mut shape = rings.shape(SLOTS, SLOT);
        if rings.indirect {
            // The queue for what must not wait has its tables, too.
            shape.memory += 64 * u64::from(shape.size) * u64::from(shape.size);
        }
        Plan { shape, scatter, seed: rings.seed }
    }
}

impl Default for Plan {
    fn default() -> Plan {
        Plan::new(Rings { queues: 1, queue_size: 128, no_event_idx: false, indirect: false, seed: 1 }, false)
    }
}

/// What a server says of itself in its configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// What a guest mounts it by. `None`: the VMM knows it, not the server.
    pub tag: Option<String>,
    /// Request queues.
    pub queues: u16,
}

#[derive(Debug)]
struct Slot {
    request: u64,
    answer: u64,
    out: Option<Out>,
}

/// A request that is out.
#[derive(Clone, Copy, Debug)]
struct Out {
    queue: u16,
    head: u16,
    request: Request,
    /// Bytes that are offered for the answer, with its header.
    offered: u32,
}

/// A request that was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What was asked.
    pub request: Request,
    /// The answer with its header; empty if there is none.
    pub bytes: Vec<u8>,
}

/// A file system that a server shares.
#[derive(Debug)]
pub struct Share {
    /// The device underneath.
    pub device: Device,
    /// What it says of itself.
    pub about: About,
    slots: Vec<Slot>,
    layout: Layout,
    /// Buffers that a request may have: half of them for each side.
    most: usize,
    /// Requests sent, to take turns between queues.
    turn: u16,
}

impl Share {
    /// Connects to a server and starts it.
    ///
    /// # Errors
    /// When the backend is none, has no queue for requests, or fewer than are asked for.
    pub fn open(stream: UnixStream, plan: &Plan) -> Result<Share> {
        let asked = plan.shape.queues;
        let shape = Shape { queues: asked + FIRST, ..plan.shape };
        let mut device = Device::connect(stream, shape, 0)?;
        let about = About::read(&mut device)?;
        if about.queues < asked {
            bail!("The server has {}, and {asked} are asked for", request_queues(about.queues));
        }
        let mut random = Random::new(plan.seed);
        let mut slots = Vec::with_capacity(SLOTS);
        for _ in 0..SLOTS {
            let (request, answer) = (place(&mut device, &mut random)?, place(&mut device, &mut random)?);
            let request = request + PAGE - u64::from(BEFORE_DATA);
            slots.push(Slot { request, answer: answer + PAGE - u64::from(OUT_HEADER), out: None });
        }
        device.start()?;
        let layout = if plan.scatter { Layout::Scatter(random) } else { Layout::Linux };
        let most = usize::from(plan.shape.size / 2);
        if most == 0 {
            bail!("A request needs two descriptors, and the ring has one");
        }
        Ok(Share { device, about, slots, layout, most, turn: 0 })
    }

    /// Whether there is a slot for another request.
    pub fn has_room(&self) -> bool {
        self.slots.iter().any(|slot| slot.out.is_none())
    }

    /// Sends a request. The device is told by [`Share::kick`]. `false`: there is no room now.
    ///
    /// # Errors
    /// When it is none, or asks for more than was settled.
    pub fn send(&mut self, bytes: &[u8]) -> Result<bool> {
        let request = Request::read(bytes).context("The kernel sent less than a request")?;
        let what = || wire::name(request.opcode);
        let len = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= MOST_REQUEST);
        let len = len.with_context(|| format!("The kernel sent {} of {} bytes", what(), bytes.len()))?;
        let offered = request.room.map_or(0, |room| room.saturating_add(OUT_HEADER));
        if offered > MOST_DATA + 4096 {
            bail!("The kernel wants {} to be answered with {offered} bytes", what());
        }
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.out.is_none()) else { return Ok(false) };
        let sides = [Side { addr: slot.request, len, write: false }, Side { addr: slot.answer, len: offered, write: true }];
        let buffers: Vec<Buffer> = sides
            .into_iter()
            .filter(|side| side.len > 0)
            .flat_map(|side| self.layout.cut(side, request.opcode, self.most))
            .collect();
        let asked = self.device.queues() - FIRST;
        let queue = if request.is_urgent() { URGENT } else { FIRST + self.turn % asked };
        self.device.memory().write(slot.request, bytes);
        // What an earlier answer left there is no answer.
        let header = [0; 16];
        self.device.memory().write(slot.answer, &header);
        let Some(head) = self.device.submit(queue, &buffers) else { return Ok(false) };
        self.turn = self.turn.wrapping_add(1);
        slot.out = Some(Out { queue, head, request, offered });
        Ok(true)
    }

    /// Tells the server of what was sent.
    pub fn kick(&mut self) {
        for queue in 0..self.device.queues() {
            self.device.kick(queue);
        }
    }

    /// The next request that was answered.
    ///
    /// # Errors
    /// What the server must not do.
    pub fn answer(&mut self) -> Result<Option<Answer>> {
        for queue in 0..self.device.queues() {
            let Some(used) = self.device.completion(queue)? else { continue };
            let is = |slot: &&mut Slot| slot.out.is_some_and(|out| (out.queue, out.head) == (queue, used.head));
            let Some(slot) = self.slots.iter_mut().find(is) else {
                bail!("an answer on queue {queue} that belongs to no request")
            };
            let Some(out) = slot.out.take() else { continue };
            let mut bytes = vec![0; usize::try_from(used.len.min(out.offered))?];
            self.device.memory().read(slot.answer, &mut bytes);
            let bytes = wire::check(&out.request, used.len, out.offered, bytes)?;
            return Ok(Some(Answer { request: out.request, bytes }));
        }
        Ok(None)
    }

    /// One request, and its answer. Answers to others that come meanwhile are dropped.
    ///
    /// # Errors
    /// When none comes, or it is an error.
    pub fn exchange(&mut self, bytes: &[u8]) -> Result<Answer> {
        let wanted = Request::read(bytes).context("Less than a request")?;
        if !self.send(bytes)? {
            bail!("The server has not answered {SLOTS} requests");
        }
        self.kick();
        let end = Instant::now() + LIMIT;
        loop {
            while let Some(answer) = self.answer()? {
                if answer.request.unique != wanted.unique {
                    continue;
                }
                match wire::error(&answer.bytes) {
                    0 => return Ok(answer),
                    error => bail!("The server answered {} with error {error}", wire::name(wanted.opcode)),
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("The server did not answer {} within {} s", wire::name(wanted.opcode), LIMIT.as_secs());
            }
            self.device.wait(left.min(Duration::from_millis(100)));
        }
    }

    /// Greets the server as a guest's kernel does, hears what is settled, and says goodbye.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn greet(&mut self) -> Result<Settled> {
        let settled = Settled::read(&self.exchange(&wire::init(2))?.bytes);
        self.exchange(&wire::bare(wire::DESTROY, 4))?;
        self.device.session().stop()?;
        Ok(settled)
    }
}

impl About {
    fn read(device: &mut Device) -> Result<About> {
        let config = device.session().config(CONFIG).context("Cannot read the configuration of the file system")?;
        let has = device.session().queue_count();
        let Some((tag, rest)) = config.split_at_checked(TAG) else {
            return Ok(About { tag: None, queues: has.saturating_sub(FIRST) });
        };
        let count = rest.first_chunk().copied().map_or(0, u32::from_le_bytes);
        let end = tag.iter().position(|byte| *byte == 0).unwrap_or(tag.len());
        let tag = String::from_utf8_lossy(tag.get(..end).unwrap_or_default()).into_owned();
        Ok(About { tag: Some(tag), queues: u16::try_from(count).unwrap_or(u16::MAX) })
    }
}

impl About {
    /// What the list of mounts shows: the tag, unless it has what a line of that list does not bear.
    pub fn source(&self) -> String {
        let plain = |tag: &&String| tag.chars().all(|one| one.is_ascii_alphanumeric() || "-_.".contains(one)) && !tag.is_empty();
        self.tag.as_ref().filter(plain).map_or_else(|| "virtiofs".to_owned(), String::clone)
    }
}

/// So many of them, in words.
pub fn request_queues(count: u16) -> String {
    format!("{count} request queue{}", if count == 1 { "" } else { "s" })
}

/// Memory for one side of a request, on a page and in one region: a guest's buffers do not run from one piece of memory into another.
fn place(device: &mut Device, random: &mut Random) -> Result<u64> {
    loop {
        let at = device.memory_mut().take(SIDE.into(), PAGE, random.number())?;
        let borders: Vec<u64> = device.memory().regions().iter().map(|region| region.guest_addr).collect();
        if !borders.iter().any(|border| *border > at && *border < at + u64::from(SIDE)) {
            return Ok(at);
        }
    }
}
