//! A guest that says what it likes: any bytes in any buffers on any queue of a virtio-fs server, and what comes back.
//!
//! [`Raw::post`] and [`Raw::wait`] are one request and its answer; between them others may go out on other queues, which a server takes
//! up at the same time. [`Raw::call`] is both. [`Raw::offer`] takes buffers as they are to stand in the ring.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::message::{self, Message};
use super::wire::{self, BEFORE_DATA, OUT_HEADER, Request, Settled};
use crate::device::{Device, Shape};
use crate::memory::View;
use crate::ring::{Buffer, Used};

/// Requests that can be out at a time.
const SLOTS: usize = 8;

/// Bytes of each side of a request.
pub const SIDE: u32 = (1 << 20) + 8192;

/// The first queue for requests; before it comes the one for what must not wait.
pub const FIRST: u16 = 1;
/// The other one.
pub const SECOND: u16 = 2;
/// The queue for what must not wait.
pub const URGENT: u16 = 0;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// How long a server is given that perhaps does not answer at all.
const BRIEFLY: Duration = Duration::from_secs(3);

/// Memory for a request and its answer.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// What is sent.
    pub request: u64,
    /// What comes back.
    pub answer: u64,
}

/// A request that is out.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    slot: usize,
    queue: u16,
    head: u16,
    request: Request,
    offered: u32,
}

/// What a server answered: an error, or what follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Linux's number, positive; 0: it went well.
    pub error: i32,
    /// What follows the header.
    pub body: Vec<u8>,
}

/// What became of buffers that were offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// They came back with an answer that is as long as it says.
    Answer(Reply),
    /// They came back with 0 bytes.
    Nothing,
    /// They came back with something that is no answer.
    Nonsense(String),
    /// The ring is not served any more; the server said so.
    Broken,
    /// The connection is gone.
    Gone,
    /// Nothing came back.
    Silence,
}

/// A guest.
#[derive(Debug)]
pub struct Raw {
    /// The device underneath.
    pub device: Device,
    places: Vec<Place>,
    busy: Vec<bool>,
    came: Vec<(u16, Used)>,
    unique: u64,
}

impl Raw {
    /// Connects, and starts so many queues for requests.
    ///
    /// # Errors
    /// When the backend is none, or has fewer.
    pub fn open(stream: UnixStream, queues: u16) -> Result<Raw> {
        Raw::open_after(stream, queues, |_| Ok(()))
    }

    /// The same, with something to do before the queues start.
    ///
    /// # Errors
    /// As above.
    pub fn open_after(stream: UnixStream, queues: u16, before: impl FnOnce(&mut Device) -> Result<()>) -> Result<Raw> {
        let shape = Shape { queues: queues + FIRST, memory: 40 << 20, ..Shape::default() };
        let mut device = Device::connect(stream, shape, 0)?;
        let mut place = || device.memory_mut().take(SIDE.into(), 4096, 2);
        // One more is for buffers that are offered as they are.
        let places = (0..=SLOTS).map(|_| Ok(Place { request: place()? + 4096 - u64::from(BEFORE_DATA), answer: place()? + 16 }));
        let places = places.collect::<Result<Vec<_>>>()?;
        before(&mut device)?;
        device.start()?;
        Ok(Raw { device, places, busy: vec![false; SLOTS], came: Vec::new(), unique: 0 })
    }

    /// The same, and greets as a guest's kernel does.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn begin(stream: UnixStream, queues: u16) -> Result<Raw> {
        let mut raw = Raw::open(stream, queues)?;
        raw.init(!0)?;
        Ok(raw)
    }

    /// Greets, with all features that are in `mask`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn init(&mut self, mask: u64) -> Result<Settled> {
        let mut bytes = wire::init(self.next_unique());
        let mut keep = |at: usize, mask: u64| {
            if let Some((byte, part)) = bytes.get_mut(at..at + 4).zip(mask.to_le_bytes().get(..4)) {
                byte.iter_mut().zip(part).for_each(|(byte, part)| *byte &= part);
            }
        };
        keep(52, mask);
        keep(56, mask >> 32);
        let ticket = self.post_bytes(FIRST, &bytes)?;
        let reply = self.wait(ticket)?;
        if reply.error != 0 {
            bail!("FUSE_INIT is answered with error {}", reply.error);
        }
        Ok(Settled::read(&[&[0; 16], &reply.body[..]].concat()))
    }

    /// A number that no request had.
    pub fn next_unique(&mut self) -> u64 {
        self.unique += 2;
        self.unique
    }

    /// Memory for whoever lays buffers out.
    pub fn place(&self) -> Place {
        self.places.last().copied().unwrap_or(Place { request: 0, answer: 0 })
    }

    /// The guest's memory, for another thread.
    pub fn view(&self) -> View {
        self.device.memory().view()
    }

    /// Sends a request, without waiting.
    ///
    /// # Errors
    /// When there is no room.
    pub fn post(&mut self, queue: u16, message: &Message) -> Result<Ticket> {
        let bytes = message.bytes(self.next_unique());
        self.post_bytes(queue, &bytes)
    }

    /// The same for bytes that begin with a whole header.
    ///
    /// # Errors
    /// As above.
    pub fn post_bytes(&mut self, queue: u16, bytes: &[u8]) -> Result<Ticket> {
        let request = Request::read(bytes).context("Less than a request")?;
        let slot = self.busy.iter().position(|busy| !busy).context("Too many requests are out")?;
        let place = *self.places.get(slot).context("Too many requests are out")?;
        let offered = request.room.map_or(0, |room| room.saturating_add(OUT_HEADER)).min(SIDE - 64);
        self.device.memory().write(place.request, bytes);
        self.device.memory().write(place.answer, &[0; 16]);
        let mut buffers = vec![Buffer { addr: place.request, len: u32::try_from(bytes.len())?, write: false }];
        if offered > 0 {
            buffers.push(Buffer { addr: place.answer, len: offered, write: true });
        }
        let head = self.device.submit(queue, &buffers).context("The ring has no room")?;
        self.device.kick(queue);
        if let Some(busy) = self.busy.get_mut(slot) {
            *busy = true;
        }
        Ok(Ticket { slot, queue, head, request, offered })
    }

    /// Where the request of a ticket lies.
    pub fn place_of(&self, ticket: Ticket) -> Place {
        self.places.get(ticket.slot).copied().unwrap_or(Place { request: 0, answer: 0 })
    }

    /// Waits for an answer. One that is not as long as it says, or is to something else, is an error.
    ///
    /// # Errors
    /// When none comes.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Reply> {
        let end = Instant::now() + LIMIT;
        loop {
            let mine = |(queue, used): &(u16, Used)| (*queue, used.head) == (ticket.queue, ticket.head);
            if let Some(at) = self.came.iter().position(mine) {
                let (_, used) = self.came.swap_remove(at);
                return self.finish(ticket, used);
            }
            if !self.gather()? {
                if Instant::now() > end {
                    bail!("The server did not answer {}", wire::name(ticket.request.opcode));
                }
                self.device.wait(Duration::from_millis(200));
            }
        }
    }

    fn finish(&mut self, ticket: Ticket, used: Used) -> Result<Reply> {
        if let Some(busy) = self.busy.get_mut(ticket.slot) {
            *busy = false;
        }
        let place = self.place_of(ticket);
        let mut bytes = vec![0; usize::try_from(used.len.min(ticket.offered))?];
        self.device.memory().read(place.answer, &mut bytes);
        Ok(Reply::of(&wire::check(&ticket.request, used.len, ticket.offered, bytes)?))
    }

    fn gather(&mut self) -> Result<bool> {
        let before = self.came.len();
        for queue in 0..self.device.queues() {
            while let Some(used) = self.device.completion(queue)? {
                self.came.push((queue, used));
            }
        }
        Ok(self.came.len() > before)
    }

    /// One request and its answer, on the first queue.
    ///
    /// # Errors
    /// When none comes.
    pub fn call(&mut self, message: &Message) -> Result<Reply> {
        let ticket = self.post(FIRST, message)?;
        self.wait(ticket)
    }

    /// The same of what has to go well; gives what follows the header.
    ///
    /// # Errors
    /// When it does not.
    pub fn ask(&mut self, message: &Message) -> Result<Vec<u8>> {
        let reply = self.call(message)?;
        if reply.error != 0 {
            bail!("The server answered {} with error {}", wire::name(message.opcode), reply.error);
        }
        Ok(reply.body)
    }

    /// Two requests at the same time, on two queues.
    ///
    /// # Errors
    /// As above.
    pub fn both(&mut self, one: &Message, other: &Message) -> Result<(Reply, Reply)> {
        let (one, other) = (self.post(FIRST, one)?, self.post(SECOND, other)?);
        Ok((self.wait(one)?, self.wait(other)?))
    }

    /// The node of a name, with one reference more.
    ///
    /// # Errors
    /// When there is none.
    pub fn lookup(&mut self, dir: u64, name: impl AsRef<[u8]>) -> Result<u64> {
        Ok(node_of(&self.ask(&message::lookup(dir, name))?))
    }

    /// The handle of a file that is opened.
    ///
    /// # Errors
    /// When it is not.
    pub fn open_file(&mut self, node: u64, flags: i32) -> Result<u64> {
        Ok(long(&self.ask(&message::open(node, flags))?, 0))
    }

    /// A new file: its node and its handle.
    ///
    /// # Errors
    /// When it is not made.
    pub fn create(&mut self, dir: u64, name: impl AsRef<[u8]>, flags: i32, mode: u32) -> Result<(u64, u64)> {
        let made = self.ask(&message::create(dir, name, flags, mode))?;
        Ok((node_of(&made), long(&made, 128)))
    }

    /// Offers buffers as they are, and says what became of them. Only of what lies at [`Raw::place`] an answer is read.
    ///
    /// # Errors
    /// When the ring has no room, or is not one any more.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> Result<Heard> {
        self.device.memory().write(self.place().answer, &[0; 16]);
        let head = self.device.submit(queue, buffers).context("The ring has no room")?;
        self.device.kick(queue);
        let end = Instant::now() + BRIEFLY;
        loop {
            self.gather()?;
            if let Some(at) = self.came.iter().position(|(on, used)| (*on, used.head) == (queue, head)) {
                let (_, used) = self.came.swap_remove(at);
                return Ok(self.heard(used));
            }
            if let Some(state) = self.state() {
                return Ok(state);
            }
            if Instant::now() > end {
                return Ok(Heard::Silence);
            }
            self.device.wait(Duration::from_millis(5));
        }
    }

    fn heard(&self, used: Used) -> Heard {
        if used.len == 0 {
            return Heard::Nothing;
        }
        let mut bytes = vec![0; usize::try_from(used.len.min(SIDE - 64)).unwrap_or(0)];
        self.device.memory().read(self.place().answer, &mut bytes);
        let said = bytes.first_chunk().copied().map_or(0, u32::from_le_bytes);
        if used.len < OUT_HEADER || said != used.len {
            return Heard::Nonsense(format!("{} bytes are used, the header says {said}", used.len));
        }
        Heard::Answer(Reply::of(&bytes))
    }

    /// Whether a ring is broken or the connection gone.
    pub fn state(&self) -> Option<Heard> {
        let ready = |fd: &dyn AsFd, what: PollFlags| {
            let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), what)];
            let _nothing = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            let [fd] = fds;
            fd.revents()
        };
        if ready(&self.device.ring_errors(), PollFlags::IN).contains(PollFlags::IN) {
            return Some(Heard::Broken);
        }
        let gone = match self.device.connection() {
            Some(connection) => ready(&connection, PollFlags::empty()).intersects(PollFlags::HUP | PollFlags::ERR),
            None => true,
        };
        gone.then_some(Heard::Gone)
    }
}

impl Reply {
    fn of(bytes: &[u8]) -> Reply {
        let error = i32::try_from(wire::error(bytes)).unwrap_or(i32::MAX);
        Reply { error, body: bytes.get(16..).unwrap_or_default().to_vec() }
    }
}

/// The node that an answer introduces.
pub fn node_of(body: &[u8]) -> u64 {
    long(body, 0)
}

/// Eight bytes of an answer as a number; 0 if it is shorter.
pub fn long(body: &[u8], at: usize) -> u64 {
    body.get(at..).and_then(|rest| rest.first_chunk().copied()).map_or(0, u64::from_le_bytes)
}

/// Four bytes of an answer as a number.
pub fn word(body: &[u8], at: usize) -> u32 {
    body.get(at..).and_then(|rest| rest.first_chunk().copied()).map_or(0, u32::from_le_bytes)
}

/// What an answer tells of an inode (`fuse_attr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// The host's number of it.
    pub ino: u64,
    /// Length.
    pub size: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Told {
    /// In an answer that introduces a node.
    pub fn entry(body: &[u8]) -> Told {
        Told::at(body, 40)
    }

    /// In an answer to GETATTR or SETATTR.
    pub fn attr(body: &[u8]) -> Told {
        Told::at(body, 16)
    }

    fn at(body: &[u8], at: usize) -> Told {
        let (ino, size) = (long(body, at), long(body, at + 8));
        let [mode, links, uid, gid] = [60, 64, 68, 72].map(|more| word(body, at + more));
        Told { ino, size, mode, links, uid, gid }
    }
}
