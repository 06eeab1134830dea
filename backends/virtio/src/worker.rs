//! A thread that serves queues, and the hand-over of queues to it.
//!
//! A device has one or more workers, each a thread that was started before the process gave up the right to start threads.
//! The control thread keeps a [`Worker`], the thread runs [`run`] with the other end, the [`Mailbox`]. Queues travel through it by
//! value; the bell, an event descriptor, wakes the thread.
//!
//! The loop waits in one `poll` for the bell, the kicks of its queues, and at most [`SOURCES`] descriptors of the device's own. After
//! a kick it serves that queue until it is empty or [`BUDGET`] descriptors are used up; then it looks at everything else before
//! it comes back to the rest, so a guest that fills its ring faster than it is served can keep neither its neighbours
//! nor a stop waiting.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::chain::Chain;
use crate::queue::{Queue, QueueState, Token};

mod mailbox;
mod poll;
mod slot;

use mailbox::{Closed, Command};
pub use mailbox::{Mailbox, Worker};
pub use poll::Poller;
use slot::Held;
pub use slot::{HELD, Served, Slot, Ticket};

/// Descriptors that one kick is worth. Enough for a full ring of requests of usual size; a hostile chain as long as its ring
/// uses it up alone.
pub const BUDGET: u32 = 1024;

/// Most queues of one worker (a console has the most: two ports' worth).
pub const QUEUES: usize = 4;

/// Most descriptors that a device waits for besides its queues.
pub const SOURCES: usize = 2;

/// Bell, sources, queues.
const WAITING: usize = 1 + SOURCES + QUEUES;

/// What a worker waits for besides its queues.
pub type Source<'a> = (BorrowedFd<'a>, PollFlags);

/// What a device does with its queues.
pub trait Serve: Send {
    /// Does one request of queue `index`, or begins it.
    fn serve(&mut self, index: u16, chain: &Chain, attempt: &mut Attempt<'_>) -> Served;

    /// Answers a request with an error, without looking further into it than that takes.
    fn refuse(&mut self, _index: u16, _chain: &Chain) -> u32 {
        0
    }

    /// A batch has been taken: hand on what was begun and only collected, finish what is finished ([`Slot::finish`]).
    fn settle(&mut self, _slot: &mut Slot) {}

    /// Whether a request of queue `index` could be served now. What is not taken stays in the ring; the device comes back when it
    /// can, by [`Serve::timeout`] or [`Serve::ready`].
    fn can_serve(&mut self, _index: u16) -> bool {
        true
    }

    /// How long to look for more before going to sleep, for a device that does. Not asked while requests are in hand: what they wait for
    /// wakes the thread.
    fn poller(&mut self) -> Option<&mut Poller> {
        None
    }

    /// What to wait for besides the queues.
    fn sources(&self, _slots: &Slots) -> [Option<Source<'_>>; SOURCES] {
        [None; SOURCES]
    }

    /// Source `which` is ready. A queue of which something was finished is looked at after that.
    fn ready(&mut self, _which: usize, _events: PollFlags, _slots: &mut Slots) {}

    /// How long to wait at most. After it every queue counts as kicked.
    fn timeout(&self, _slots: &Slots) -> Option<Duration> {
        None
    }

    /// Queue `index` is about to be given back: finish what is in hand ([`Slot::in_hand`]), and wait for it.
    fn stopping(&mut self, _index: u16, _slots: &mut Slots) {}
}

/// A device's workers; queue `n` is served by worker `n` modulo their number.
#[derive(Debug, Default)]
pub struct Workers(Vec<Worker>);

impl Workers {
    /// From the control ends.
    pub fn new(workers: Vec<Worker>) -> Workers {
        Workers(workers)
    }

    /// See [`crate::Device::start`].
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn start(&self, index: u16, queue: Queue) -> io::Result<()> {
        self.of(index).ok_or_else(|| io::Error::other("no thread serves this queue"))?.start(queue)
    }

    /// See [`crate::Device::stop`].
    pub fn stop(&self, index: u16) -> Option<QueueState> {
        self.of(index)?.stop(index)
    }

    fn of(&self, index: u16) -> Option<&Worker> {
        self.0.get(usize::from(index).checked_rem(self.0.len())?)
    }
}

/// A request that is being served.
#[derive(Debug)]
pub struct Attempt<'a> {
    queue: &'a mut Queue,
    token: &'a Token,
    held: &'a Held,
}

impl Attempt<'_> {
    /// What the request is finished with, should the answer be [`Served::Later`].
    pub fn ticket(&self) -> Ticket {
        self.held.next()
    }

    /// The chain of another request of this queue, one that is begun.
    pub fn held(&self, ticket: Ticket) -> Option<&Chain> {
        self.held.get(ticket)
    }

    /// What a predecessor noted with it before it died; `None` if none has begun it.
    pub fn noted(&self) -> Option<u32> {
        self.token.note()
    }

    /// Notes something for a successor, before what cannot be done twice is begun.
    pub fn note(&mut self, note: u32) {
        self.queue.note(self.token, note);
    }
}

/// The queues a worker holds.
#[derive(Debug, Default)]
pub struct Slots {
    slots: [Option<Slot>; QUEUES],
}

impl Slots {
    /// Queue `index`, if it is running here.
    pub fn get(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.iter_mut().flatten().find(|slot| slot.queue.index() == index)
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut().flatten()
    }

    /// Whether queue `index` is running here.
    pub fn has(&self, index: u16) -> bool {
        self.slots.iter().flatten().any(|slot| slot.queue.index() == index)
    }

    fn put(&mut self, queue: Queue) {
        if let Some(free) = self.slots.iter_mut().find(|slot| slot.is_none()) {
            *free = Some(Slot::new(queue));
        }
    }

    fn take(&mut self, index: u16) -> Option<Queue> {
        let slot = self.slots.iter_mut().find(|slot| slot.as_ref().is_some_and(|slot| slot.queue.index() == index))?;
        slot.take().map(|slot| slot.queue)
    }

    fn pending(&self) -> impl Iterator<Item = u16> + use<> {
        let indices = self.slots.each_ref().map(|slot| slot.as_ref().filter(|slot| slot.pending).map(|slot| slot.queue.index()));
        indices.into_iter().flatten()
    }
}

/// Serves queues until [`Worker::end`], or as long as the process lives.
pub fn run(mut server: impl Serve, mailbox: Mailbox) {
    let mut slots = Slots::default();
    loop {
        let idle = slots.pending().next().is_none();
        if let Some(poller) = server.poller().filter(|_| idle) {
            poller.sleep();
        }
        let Ok(woken) = wait(&server, &slots, &mailbox) else { return };
        if let Some(poller) = server.poller().filter(|_| woken.kicked.contains(&true)) {
            poller.wake();
        }
        if woken.bell && !obey(&mut server, &mut slots, &mailbox) {
            return;
        }
        for (which, events) in woken.sources.into_iter().enumerate() {
            if !events.is_empty() {
                server.ready(which, events, &mut slots);
            }
        }
        for (slot, kicked) in slots.slots.iter_mut().zip(woken.kicked) {
            let Some(slot) = slot else { continue };
            if kicked {
                slot.queue.acknowledge_kick();
            }
            slot.pending |= kicked || woken.late;
        }
        for slot in slots.slots.iter_mut().flatten().filter(|slot| slot.pending) {
            let more = slot.drain(&mut server);
            slot.pending |= more;
        }
    }
}

struct Woken {
    bell: bool,
    late: bool,
    sources: [PollFlags; SOURCES],
    kicked: [bool; QUEUES],
}

impl Woken {
    fn by_nothing() -> Woken {
        Woken { bell: false, late: false, sources: [PollFlags::empty(); SOURCES], kicked: [false; QUEUES] }
    }
}

fn wait(server: &impl Serve, slots: &Slots, mailbox: &Mailbox) -> io::Result<Woken> {
    let sources = server.sources(slots);
    let kicks = slots.slots.each_ref().map(|slot| slot.as_ref().and_then(|slot| slot.queue.kick()));
    let mut count = 1;
    let mut fds: [PollFd<'_>; WAITING] = std::array::from_fn(|_| PollFd::from_borrowed_fd(mailbox.bell(), PollFlags::IN));
    let waiting = sources.into_iter().flatten().chain(kicks.into_iter().flatten().map(|kick| (kick, PollFlags::IN)));
    for (place, (fd, events)) in fds.iter_mut().skip(1).zip(waiting) {
        *place = PollFd::from_borrowed_fd(fd, events);
        count += 1;
    }
    let waiting = fds.get_mut(..count).unwrap_or_default();
    let busy = slots.pending().next().is_some();
    let limit = if busy { Some(Duration::ZERO) } else { server.timeout(slots) };
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let ready = match poll(waiting, limit.as_ref()) {
        Ok(ready) => ready,
        Err(Errno::INTR) => return Ok(Woken::by_nothing()),
        Err(errno) => return Err(errno.into()),
    };
    let mut results = waiting.iter().map(PollFd::revents);
    let mut next = || results.next().unwrap_or(PollFlags::empty());
    let mut woken = Woken { bell: !next().is_empty(), late: ready == 0 && !busy, ..Woken::by_nothing() };
    for (result, source) in woken.sources.iter_mut().zip(sources) {
        *result = source.map_or(PollFlags::empty(), |_| next());
    }
    for (result, kick) in woken.kicked.iter_mut().zip(kicks) {
        *result = kick.is_some_and(|_| !next().is_empty());
    }
    Ok(woken)
}

/// Does what the mailbox says. `false`: the device is gone.
fn obey(server: &mut impl Serve, slots: &mut Slots, mailbox: &Mailbox) -> bool {
    mailbox.acknowledge();
    loop {
        match mailbox.next() {
            Ok(Some(Command::Start(queue))) => slots.put(*queue),
            Ok(Some(Command::Stop(index, question))) => {
                server.stopping(index, slots);
                mailbox.answer(question, slots.take(index).map(Queue::into_state));
            }
            Ok(None) => return true,
            Err(Closed) => return false,
        }
    }
}

#[cfg(test)]
mod tests;
