//! A device as its driver has it: a session, and the rings of its queues, negotiated and running.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost_user::{Deadlines, Notifiers, Session, Setup};

use crate::memory::Memory;
use crate::ring::{Buffer, Ring, Used};

/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// How long a backend may take. A VMM is less patient; but how long a start on a busy host takes is measured here, not judged.
const PATIENCE: Deadlines =
    Deadlines { exchange: Duration::from_secs(6), whole: Duration::from_secs(20), stop: Duration::from_secs(10) };

/// How the rings are made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Queues to run.
    pub queues: u16,
    /// Descriptors of each.
    pub size: u16,
    /// Negotiate EVENT_IDX, if it is offered.
    pub event_idx: bool,
    /// Negotiate and use indirect tables, if they are offered.
    pub indirect: bool,
    /// Bytes of guest memory.
    pub memory: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { queues: 1, size: 128, event_idx: true, indirect: false, memory: 64 << 20 }
    }
}

/// A running device.
#[derive(Debug)]
pub struct Device {
    session: Session,
    memory: Memory,
    rings: Vec<Ring>,
    features: u64,
}

impl Device {
    /// Connects, and lays rings out. `features` are those of the device's kind that the driver knows.
    ///
    /// # Errors
    /// When the backend is none, or lacks what is needed.
    pub fn connect(stream: UnixStream, shape: Shape, features: u64) -> Result<Device> {
        let mut memory = Memory::new(shape.memory)?;
        let notifiers = (0..shape.queues).map(|_| notifiers()).collect::<Result<_>>()?;
        let setup = Setup { memory: memory.regions(), notifiers, deadlines: PATIENCE };
        let session = Session::connect(stream, setup).context("Cannot set up the backend")?;
        let mut wanted = features | VERSION_1;
        wanted |= if shape.event_idx { EVENT_IDX } else { 0 } | if shape.indirect { INDIRECT_DESC } else { 0 };
        let features = session.offered() & wanted;
        if features & VERSION_1 == 0 {
            bail!("The backend offers only the legacy interface");
        }
        if session.queue_count() < shape.queues {
            bail!("The backend has {} queues, {} are needed", session.queue_count(), shape.queues);
        }
        let (event_idx, indirect) = (features & EVENT_IDX != 0, features & INDIRECT_DESC != 0);
        let rings = (0..shape.queues).map(|index| Ring::new(&mut memory, index, shape.size, event_idx, indirect));
        let rings = rings.collect::<Result<_>>()?;
        Ok(Device { session, memory, rings, features })
    }

    /// Starts the rings, also again after [`Session::stop`]: at where they were, as a guest does that comes out of sleep.
    ///
    /// # Errors
    /// What the backend refuses.
    pub fn start(&mut self) -> Result<()> {
        let places: Vec<_> = self.rings.iter().map(Ring::place).collect();
        self.session.start(self.features, &places).context("Cannot start the device")
    }

    /// Stops the rings as for a guest that moves to another host, and takes the device's state. [`Device::start`] goes on.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn save_state(&mut self) -> Result<Vec<u8>> {
        let queues = self.queues();
        let frontend = self.session.frontend()?;
        for queue in 0..queues {
            frontend.ring_base(queue, PATIENCE.stop)?;
        }
        let (mut out, into) = std::io::pipe()?;
        frontend.transfer_state(false, into.as_fd())?;
        drop(into);
        let mut state = Vec::new();
        out.read_to_end(&mut state)?;
        if !frontend.check_state()? {
            bail!("The backend says that its state has not arrived");
        }
        Ok(state)
    }

    /// Gives the device a state, before its rings start. `false`: it does not take it.
    ///
    /// # Errors
    /// When the backend is gone.
    pub fn load_state(&mut self, state: &[u8]) -> Result<bool> {
        let frontend = self.session.frontend()?;
        let (out, mut into) = std::io::pipe()?;
        frontend.transfer_state(true, out.as_fd())?;
        drop(out);
        // A backend need not read on when it has seen enough.
        let written = into.write_all(state);
        drop(into);
        Ok(frontend.check_state()? && written.is_ok())
    }

    /// Continues with a successor of the backend that died.
    ///
    /// # Errors
    /// When the newcomer will not do.
    pub fn reconnect(&mut self, stream: UnixStream) -> Result<()> {
        let memory = &self.memory;
        self.session.reconnect(stream, |used| Ring::used_index(memory, used)).context("Cannot continue with the new backend")
    }

    /// The session.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Guest memory, to take from.
    pub fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// What was negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How many queues run.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.rings.len()).unwrap_or(u16::MAX)
    }

    /// How many requests are out on all queues.
    pub fn outstanding(&self) -> usize {
        self.rings.iter().map(Ring::outstanding).sum()
    }

    /// The connection, to see its end.
    pub fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.session.connection()
    }

    /// Puts a request into a queue. `None` if there is no room.
    pub fn submit(&mut self, queue: u16, buffers: &[Buffer]) -> Option<u16> {
        self.rings.get_mut(usize::from(queue))?.submit(&self.memory, buffers)
    }

    /// Lays a request out in a queue without offering it. `None` if there is no room.
    pub fn prepare(&mut self, queue: u16, buffers: &[Buffer]) -> Option<u16> {
        self.rings.get_mut(usize::from(queue))?.prepare(&self.memory, buffers)
    }

    /// Offers a request that is laid out, for the first time or again.
    pub fn offer(&mut self, queue: u16, head: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
            ring.offer(&self.memory, head);
        }
    }

    /// The next completion of a queue whose request stays laid out.
    ///
    /// # Errors
    /// What the device must not do.
    pub fn used(&mut self, queue: u16) -> Result<Option<Used>> {
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else { bail!("There is no queue {queue}") };
        ring.used(&self.memory)
    }

    /// Tells the backend of what was put into a queue, if it wants to be told.
    pub fn kick(&mut self, queue: u16) {
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else { return };
        if ring.needs_kick(&self.memory)
            && let Some(pair) = self.session.notifiers(queue)
        {
            let _already_signalled = rustix::io::write(&pair.kick, &1u64.to_ne_bytes());
        }
    }

    /// The next completion of a queue.
    ///
    /// # Errors
    /// What the device must not do.
    pub fn completion(&mut self, queue: u16) -> Result<Option<Used>> {
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else { bail!("There is no queue {queue}") };
        ring.completion(&self.memory)
    }

    /// Asks to be told of the next completion on every queue. `true`: there is one already, do not wait.
    pub fn arm(&mut self) -> bool {
        self.rings.iter_mut().any(|ring| ring.arm(&self.memory))
    }

    /// The event descriptors on which completions are told, after [`Device::arm`].
    pub fn calls(&self) -> Vec<BorrowedFd<'_>> {
        (0..self.queues()).filter_map(|queue| self.session.notifiers(queue)).map(|pair| pair.call.as_fd()).collect()
    }

    /// Takes back what was told on them.
    pub fn hush(&self) {
        for fd in self.calls() {
            let mut count = [0; 8];
            let _nothing = rustix::io::read(fd, &mut count);
        }
    }

    /// An event descriptor that becomes readable when the backend has declared a ring broken.
    pub fn ring_errors(&self) -> BorrowedFd<'_> {
        self.session.ring_errors()
    }

    /// Waits for a completion on any queue. `false`: none came.
    pub fn wait(&mut self, limit: Duration) -> bool {
        if self.arm() {
            return true;
        }
        let calls = self.calls();
        let mut fds: Vec<PollFd<'_>> = calls.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let limit = Timespec::try_from(limit).ok();
        let ready = poll(&mut fds, limit.as_ref()).unwrap_or(0) > 0;
        self.hush();
        ready
    }

    /// Puts one request in and waits for its completion.
    ///
    /// # Errors
    /// When the ring is full, the device does not answer, or answers another.
    pub fn exchange(&mut self, queue: u16, buffers: &[Buffer], limit: Duration) -> Result<Used> {
        let Some(head) = self.submit(queue, buffers) else { bail!("The ring has no room") };
        self.kick(queue);
        loop {
            if let Some(used) = self.completion(queue)? {
                if used.head == head {
                    return Ok(used);
                }
                bail!("The device gave back {} instead of {head}", used.head);
            }
            if !self.wait(limit) && self.completion(queue)?.is_none() {
                bail!("The device did not answer within {} ms", limit.as_millis());
            }
        }
    }
}

fn notifiers() -> Result<Notifiers> {
    let event = || -> Result<OwnedFd> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("Cannot make an event descriptor")
    };
    Ok(Notifiers { kick: event()?, call: event()? })
}
