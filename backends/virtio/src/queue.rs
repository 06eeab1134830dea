//! A split virtqueue (virtio 1.3, 2.7), from the device's side.
//!
//! One worker owns a queue from start to stop; nobody else touches it, so there is no lock here. Its life:
//!
//! - [`Queue::pop`] takes the next chain, first those a predecessor left in flight, then the available ring's;
//! - [`Queue::complete`] finishes it: the used element is written, invisible yet;
//! - [`Queue::publish`] shows the batch, or what there is of it: one store of the used index, one decision about an interrupt, one signal;
//! - [`Queue::arm`] asks to be kicked for what comes next, and looks once more, since a kick may have been left out just before;
//! - [`Queue::into_state`] gives it up.
//!
//! A driver that breaks the rules (an index that jumps, a chain that is none, a head it has not got back yet) breaks its ring:
//! the error is reported once, on the error descriptor and in the log, and the queue is empty from then on. The offending
//! entry is not consumed, so reading on would meet it again for ever.

use std::error::Error as Source;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::GUEST;
use crate::chain::{self, Chain};
use crate::dirty::DirtyLog;
use crate::event;
use crate::inflight::{self, Log};
use crate::memory::{self, Memory, Span};
use crate::metrics::{BROKEN, CALLS, CHAINS, KICKS};

/// Largest ring (virtio 1.3, 2.7: a power of two, at most 32768).
pub const MAX_SIZE: u16 = 32768;

/// Driver flag: do not interrupt (without EVENT_IDX).
const NO_INTERRUPT: u16 = 1;
/// Device flag: do not kick (without EVENT_IDX).
const NO_NOTIFY: u16 = 1;

const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const RING_AT: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;

/// Why a queue cannot be started, or has stopped by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not a power of two from 1 to 32768.
    #[error("A ring of {0} descriptors")]
    Size(u16),
    /// A part of the ring is not where it can be.
    #[error("The {0} of the ring is not in guest memory, or not aligned")]
    Part(&'static str, #[source] Option<memory::Error>),
    /// The in-flight log does not fit.
    #[error("Cannot continue from the in-flight log")]
    Log(#[source] inflight::Error),
    /// The available index moved further than the ring is long.
    #[error("The available index jumped from {0} to {1}")]
    Jump(u16, u16),
    /// A head that is still in the device's hands.
    #[error("Descriptor {0} was made available while in use")]
    InUse(u16),
    /// A head that does not exist.
    #[error("Descriptor {0} of {1} was made available")]
    Head(u16, u16),
    /// A broken chain.
    #[error("A broken descriptor chain")]
    Chain(#[source] chain::Error),
}

/// What a queue is made from.
#[derive(Debug)]
pub struct Config {
    /// Its index in the device.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Guest physical address of the available ring.
    pub avail: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Where to begin, if there is no log that knows better.
    pub next_avail: u16,
    /// The guest's announcements. `None`: the ring is looked at when something else happens.
    pub kick: Option<OwnedFd>,
    /// Ours.
    pub call: Option<OwnedFd>,
    /// Where a broken ring is reported.
    pub error: Option<OwnedFd>,
    /// The in-flight log.
    pub log: Option<Log>,
    /// Where pages that were written are noted.
    pub dirty: Option<Arc<DirtyLog>>,
    /// The guest address under which writes to the used ring are noted there.
    pub used_address: Option<u64>,
}

/// What is left of a queue that was given up.
#[derive(Debug)]
pub struct QueueState {
    /// Where the next owner begins. Nothing before it is in flight, unless the ring is broken.
    pub next_avail: u16,
    /// The descriptors, for the next start.
    pub kick: Option<OwnedFd>,
    /// See [`Config::call`].
    pub call: Option<OwnedFd>,
    /// See [`Config::error`].
    pub error: Option<OwnedFd>,
}

/// A chain in the device's hands. It ends in [`Queue::complete`]; there is no other way to get rid of it.
#[must_use = "a request that is not completed is lost for the guest"]
#[derive(Debug)]
pub struct Token {
    head: u16,
    /// What is known of it from before this process: how often it was begun, and the note left with it.
    replayed: Option<(u8, Option<u32>)>,
}

impl Token {
    /// The head of the chain, for messages to people.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// A predecessor had it in hand when it died.
    pub fn is_replayed(&self) -> bool {
        self.replayed.is_some()
    }

    /// It has ended so many processes that served it that it has to be taken for the cause. The device answers it with an
    /// error, without trying.
    pub fn is_condemned(&self) -> bool {
        self.replayed.is_some_and(|(attempts, _)| attempts >= inflight::CONDEMNED)
    }

    /// What a predecessor noted with it, see [`Queue::note`].
    pub fn note(&self) -> Option<u32> {
        self.replayed.and_then(|(_, note)| note)
    }
}

/// A running split ring.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    size: u16,
    memory: Arc<Memory>,
    desc: Span,
    avail: Span,
    used: Span,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The used index the guest was last told about.
    signalled: Option<u16>,
    in_use: Vec<bool>,
    replay: Vec<u16>,
    batch: Vec<u16>,
    log: Option<Log>,
    dirty: Option<Arc<DirtyLog>>,
    used_address: Option<u64>,
    broken: Option<Error>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

impl Queue {
    /// Takes over a ring: looks where it lies and, if there is a log, what a predecessor left in flight.
    ///
    /// # Errors
    /// When the ring cannot be where it is said to be, or the log is not for it.
    pub fn new(memory: Arc<Memory>, config: Config) -> Result<Queue, Error> {
        let Config { index, size, event_idx, .. } = config;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(Error::Size(size));
        }
        let entries = u32::from(size);
        let desc = part(&memory, "descriptor table", config.desc, entries * 16, 16)?;
        let avail = part(&memory, "available ring", config.avail, 6 + entries * 2, 2)?;
        let used = part(&memory, "used ring", config.used, 6 + entries * 8, 4)?;
        let next_used = memory.load_u16(used, INDEX_AT, Ordering::Acquire);
        let mut log = config.log;
        let mut next_avail = config.next_avail;
        let mut replay = Vec::new();
        let mut in_use = vec![false; usize::from(size)];
        if let Some(log) = &mut log {
            replay = log.recover(next_used).map_err(Error::Log)?;
            let taken = u16::try_from(replay.len()).unwrap_or(u16::MAX);
            next_avail = next_used.wrapping_add(taken);
            for head in &replay {
                mark(&mut in_use, *head, true);
            }
            // `pop` takes from the end.
            replay.reverse();
        }
        let batch = Vec::with_capacity(usize::from(size));
        let Config { kick, call, error, dirty, used_address, .. } = config;
        Ok(Queue {
            index,
            size,
            memory,
            desc,
            avail,
            used,
            event_idx,
            next_avail,
            next_used,
            signalled: None,
            in_use,
            replay,
            batch,
            log,
            dirty,
            used_address,
            broken: None,
            kick,
            call,
            error,
        })
    }

    /// Its index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory of its guest.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// A chain to pop into, to be kept and reused.
    pub fn chain(&self) -> Chain {
        Chain::new(Arc::clone(&self.memory), self.size)
    }

    /// What to wait on for the guest's announcements.
    pub fn kick(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_ref().map(AsFd::as_fd)
    }

    /// Why the ring is broken, if it is.
    pub fn broken(&self) -> Option<&Error> {
        self.broken.as_ref()
    }

    /// Takes the announcements off the kick descriptor, without ever waiting for one: who shares the descriptor can be faster, and
    /// can have taken back that it does not block.
    pub fn acknowledge_kick(&mut self) {
        let Some(kick) = &self.kick else { return };
        KICKS.add(self.index.into(), 1);
        // The descriptor is not what it was when it was checked: better never again than for ever.
        if event::take(kick.as_fd()).is_err() {
            self.kick = None;
        }
    }

    /// The next chain, if there is one. An error breaks the ring: it is returned once, later calls find nothing.
    ///
    /// # Errors
    /// See the module.
    pub fn pop(&mut self, chain: &mut Chain) -> Option<Token> {
        if self.broken.is_some() {
            return None;
        }
        let popped = self.try_pop(chain);
        if let Ok(Some(_)) = popped {
            CHAINS.add(self.index.into(), 1);
        }
        popped.unwrap_or_else(|error| {
            self.break_ring(error);
            None
        })
    }

    fn try_pop(&mut self, chain: &mut Chain) -> Result<Option<Token>, Error> {
        if let Some(head) = self.replay.last().copied() {
            chain.walk(self.desc, self.size, head).map_err(Error::Chain)?;
            self.replay.pop();
            let replayed = self.log.as_mut().map(|log| log.retake(head));
            return Ok(Some(Token { head, replayed }));
        }
        if self.available()? == 0 {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = self.memory.load_u16(self.avail, RING_AT + slot * AVAIL_ENTRY, Ordering::Relaxed);
        match self.in_use.get(usize::from(head)) {
            None => return Err(Error::Head(head, self.size)),
            Some(true) => return Err(Error::InUse(head)),
            Some(false) => {}
        }
        chain.walk(self.desc, self.size, head).map_err(Error::Chain)?;
        if let Some(log) = &mut self.log {
            log.take(head);
        }
        mark(&mut self.in_use, head, true);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(Token { head, replayed: None }))
    }

    /// Leaves a note with a chain in hand, for a successor that finds it unfinished ([`Token::note`]). Without a log there is no
    /// successor that would ask.
    pub fn note(&mut self, token: &Token, note: u32) {
        if let Some(log) = &mut self.log {
            log.note(token.head, note);
        }
    }

    /// Notes that a chain, which is about to be completed, was written to.
    pub fn note_written(&self, chain: &Chain) {
        if let Some(dirty) = &self.dirty {
            chain.log(dirty);
        }
    }

    /// Finishes a chain; `written` is the number of bytes the device wrote into it. The guest learns of it with the next
    /// [`Queue::publish`].
    pub fn complete(&mut self, token: Token, written: u32) {
        let pending = u16::try_from(self.batch.len()).unwrap_or_default();
        let slot = usize::from(self.next_used.wrapping_add(pending) & (self.size - 1));
        let mut element = [0; USED_ENTRY];
        let (id, len) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(token.head).to_le_bytes());
        len.copy_from_slice(&written.to_le_bytes());
        self.memory.store(self.used, RING_AT + slot * USED_ENTRY, &element);
        if let Some(log) = &mut self.log {
            log.join_batch(token.head);
        }
        self.batch.push(token.head);
    }

    /// Shows the batch to the guest and interrupts it if it wants that.
    pub fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        // From the store of the index on the guest may reuse the heads, so they are free before it.
        for head in &self.batch {
            mark(&mut self.in_use, *head, false);
        }
        let count = u16::try_from(self.batch.len()).unwrap_or_default();
        self.next_used = self.next_used.wrapping_add(count);
        self.memory.store_u16(self.used, INDEX_AT, self.next_used, Ordering::Release);
        if let Some(log) = &mut self.log {
            log.batch_published(&self.batch, self.next_used);
        }
        self.batch.clear();
        self.note_used_ring();
        // The index has to be visible before the guest's wish is read: it does the two in the opposite order.
        fence(Ordering::SeqCst);
        if self.wants_interrupt() {
            self.signal();
        }
    }

    /// Shows what there is of a batch that is still being served. A guest that sleeps takes longer to wake than most requests take; woken
    /// by the first, it finds many done, and asks for more before the batch is over. That is no more interrupts than without: the guest
    /// says which completion is to wake it next. One that cannot say so (without EVENT_IDX) is shown the whole batch.
    pub(crate) fn publish_early(&mut self) {
        if self.event_idx {
            self.publish();
        }
    }

    fn note_used_ring(&self) {
        if let (Some(dirty), Some(addr)) = (&self.dirty, self.used_address) {
            dirty.mark(addr, self.used.len().into());
        }
    }

    /// Whether there is something new, without asking to be told.
    pub(crate) fn has_more(&self) -> bool {
        self.broken.is_none() && (!self.replay.is_empty() || !matches!(self.available(), Ok(0)))
    }

    /// Asks to be kicked when more comes. `true`: more is there already, do not wait.
    pub fn arm(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        if !self.replay.is_empty() {
            return true;
        }
        if self.event_idx {
            let at = RING_AT + usize::from(self.size) * USED_ENTRY;
            self.memory.store_u16(self.used, at, self.next_avail, Ordering::Relaxed);
        } else {
            self.memory.store_u16(self.used, FLAGS_AT, 0, Ordering::Relaxed);
        }
        self.note_used_ring();
        // The wish has to be visible before the index is read: the guest does the two in the opposite order.
        fence(Ordering::SeqCst);
        match self.available() {
            Ok(count) => count > 0,
            Err(error) => {
                self.break_ring(error);
                false
            }
        }
    }

    /// Says that kicks are not needed for the moment.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.memory.store_u16(self.used, FLAGS_AT, NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Interrupts the guest.
    pub fn signal(&self) {
        if let Some(call) = &self.call {
            CALLS.add(self.index.into(), 1);
            event::signal(call.as_fd());
        }
    }

    /// Gives the ring up. Nothing may be in flight; what was taken over and not begun stays in the log.
    pub fn into_state(mut self) -> QueueState {
        self.publish();
        let left = u16::try_from(self.replay.len()).unwrap_or_default();
        let next_avail = self.next_avail.wrapping_sub(left);
        QueueState { next_avail, kick: self.kick, call: self.call, error: self.error }
    }

    /// How many entries are new.
    fn available(&self) -> Result<u16, Error> {
        let index = self.memory.load_u16(self.avail, INDEX_AT, Ordering::Acquire);
        let count = index.wrapping_sub(self.next_avail);
        if count > self.size { Err(Error::Jump(self.next_avail, index)) } else { Ok(count) }
    }

    fn wants_interrupt(&mut self) -> bool {
        if !self.event_idx {
            return self.memory.load_u16(self.avail, FLAGS_AT, Ordering::Relaxed) & NO_INTERRUPT == 0;
        }
        let at = RING_AT + usize::from(self.size) * AVAIL_ENTRY;
        let event = self.memory.load_u16(self.avail, at, Ordering::Relaxed);
        // Of the first batch nobody knows what the guest was told before.
        let old = self.signalled.replace(self.next_used);
        old.is_none_or(|old| crossed(event, self.next_used, old))
    }

    fn break_ring(&mut self, error: Error) {
        BROKEN.add(self.index.into(), 1);
        let cause = Source::source(&error).map(ToString::to_string).unwrap_or_default();
        tracing::warn!(target: GUEST, queue = self.index, "The driver broke its ring: {error}. {cause}");
        if let Some(fd) = &self.error {
            event::signal(fd.as_fd());
        }
        self.broken = Some(error);
    }
}

/// Whether the step from `old` to `new` passed `event` (virtio 1.3, 2.7.7.1).
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn mark(in_use: &mut [bool], head: u16, value: bool) {
    if let Some(entry) = in_use.get_mut(usize::from(head)) {
        *entry = value;
    }
}

fn part(memory: &Memory, what: &'static str, addr: u64, len: u32, align: u64) -> Result<Span, Error> {
    if !addr.is_multiple_of(align) {
        return Err(Error::Part(what, None));
    }
    memory.span(addr, len).map_err(|error| Error::Part(what, Some(error)))
}

/// Looks whether a descriptor can be a kick: a plain event descriptor, made not to block.
///
/// One in semaphore mode hands out its count one by one, and whoever waits on it spins for as long as its owner likes. A pipe or
/// a socket would do the same, or block.
///
/// # Errors
/// A sentence's worth of why not.
pub fn check_kick(fd: BorrowedFd<'_>) -> Result<(), KickError> {
    check_call(fd)?;
    // What an event descriptor counts is the sum of what was written; what a semaphore gives is always 1.
    rustix::io::write(fd, &2u64.to_ne_bytes()).map_err(KickError::errno)?;
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(8) if u64::from_ne_bytes(count) >= 2 => Ok(()),
        _ => Err(KickError::Semaphore),
    }
}

/// Looks whether a descriptor can be a call: an event descriptor, made not to block.
///
/// # Errors
/// As [`check_kick`].
pub fn check_call(fd: BorrowedFd<'_>) -> Result<(), KickError> {
    let mode = rustix::fs::fstat(fd).map_err(KickError::errno)?.st_mode;
    // Files of the kernel's anonymous inodes have no type.
    if mode & 0o170_000 == 0 { do_not_block(fd) } else { Err(KickError::NoEvent) }
}

/// Looks whether a descriptor can be a call because it is a socket, made not to block. Only of a frontend that is trusted.
///
/// # Errors
/// As [`check_kick`].
pub fn check_socket(fd: BorrowedFd<'_>) -> Result<(), KickError> {
    let mode = rustix::fs::fstat(fd).map_err(KickError::errno)?.st_mode;
    if FileType::from_raw_mode(mode) == FileType::Socket { do_not_block(fd) } else { Err(KickError::NoEvent) }
}

fn do_not_block(fd: BorrowedFd<'_>) -> Result<(), KickError> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(KickError::errno)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(KickError::errno)
}

/// Why a descriptor cannot be used for notifications.
#[derive(Debug, thiserror::Error)]
pub enum KickError {
    /// Some other kind of file.
    #[error("The descriptor is no event descriptor")]
    NoEvent,
    /// Semaphore mode.
    #[error("The event descriptor is in semaphore mode")]
    Semaphore,
    /// The system's reason.
    #[error("Cannot look at the descriptor")]
    Io(#[source] io::Error),
}

impl KickError {
    fn errno(errno: Errno) -> KickError {
        KickError::Io(errno.into())
    }
}

#[cfg(test)]
mod tests;
