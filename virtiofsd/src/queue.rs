//! A queue's thread: a request in, its answer out.
//!
//! What can be done without waiting is done here and now. The rest goes to the [`Pool`], with a copy of the message and a hold on the
//! guest's memory, and comes back as an outcome; the header of the answer is written here in either case.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use virtio::worker::{Attempt, Poller, SOURCES, Serve, Served, Slot, Slots, Source};
use virtio::{Buffer, Chain};

use crate::abi::opcode;
use crate::fs::file::SHORT;
use crate::fs::{Done, Io, Outcome, Share, Thread};
use crate::metrics;
use crate::pool::{Job, Kind, Pool};
use crate::reply::header;
use crate::request::{Bad, Fetched, Operation, Request, Scratch, data, fetch_bytes};

/// Bytes of the header of an answer.
pub(crate) const HEADER: u32 = 16;

/// What serves one queue.
#[derive(Debug)]
pub struct FsQueue {
    share: Arc<Share>,
    thread: Thread,
    scratch: Scratch,
    pool: Pool,
    poller: Poller,
    /// It has copied much since it looked at the queue last: what else there is to copy is for others, at the same time.
    copied: bool,
    /// How long the next request has to wait for its limits.
    wait: Option<Duration>,
}

impl FsQueue {
    /// Serves `share` on this thread.
    pub fn new(share: Arc<Share>, thread: Thread, pool: Pool, poller: Poller) -> FsQueue {
        FsQueue { share, thread, scratch: Scratch::new(), pool, poller, copied: false, wait: None }
    }

    fn request(&mut self, chain: &Chain, attempt: &Attempt<'_>) -> Served {
        let began = Instant::now();
        let fetched = match fetch_bytes(chain, &mut self.scratch) {
            Ok(fetched) => fetched,
            Err(bad) => return Served::Done(refuse(chain, &bad)),
        };
        let request = match fetched.parse(self.share.dialect()) {
            Ok(request) => request,
            Err(bad) => return Served::Done(refuse(chain, &bad)),
        };
        metrics::REQUESTS.add(1);
        self.share.limits.pay(copied(&request.operation).into());
        let how = Io { at_length: !self.copied, ..io(&request.operation, chain, false) };
        let done = self.share.perform(&mut self.thread, &request, how);
        // So much that others could do something meanwhile.
        self.copied |= copied(&request.operation) > SHORT;
        match done {
            Ok(Done::Slow) => {
                let elsewhere = self.share.asks_others(&request);
                self.pool.submit(job(&request, &fetched, chain, attempt, began).elsewhere(elsewhere), &self.share.waiting);
            }
            Ok(Done::Locked) => self.pool.wait_for_lock(job(&request, &fetched, chain, attempt, began), &self.share.waiting),
            _ => {
                let answered = answer(chain, request.unique, done);
                metrics::times(fetched.opcode()).add(began.elapsed(), 1);
                return Served::Done(answered);
            }
        }
        Served::Later
    }
}

/// Bytes that a request copies, at most.
fn copied(operation: &Operation<'_>) -> u32 {
    match operation {
        Operation::Read { size, .. } | Operation::Write { size, .. } => *size,
        _ => 0,
    }
}

/// A request, so that another thread can do it.
fn job(request: &Request<'_>, fetched: &Fetched<'_>, chain: &Chain, attempt: &Attempt<'_>, began: Instant) -> Job {
    metrics::HANDED_ON.add(1);
    let Io { data, room, .. } = io(&request.operation, chain, true);
    let kind = Kind { unique: request.unique, opcode: fetched.opcode(), began };
    Job::new(attempt.ticket(), kind, fetched.boxed(), (data.detached(), room.detached()))
}

/// Where the data of a request is, and the room for its answer.
pub(crate) fn io<'a>(operation: &Operation<'_>, chain: &'a Chain, patient: bool) -> Io<'a> {
    let data = data(chain, operation);
    Io { data, room: chain.writable().split_at(HEADER).1, patient, at_length: patient }
}

/// Writes the header of an answer. Gives the bytes of all of it.
fn answer(chain: &Chain, unique: u64, done: Outcome) -> u32 {
    let (errno, len) = match done {
        Ok(Done::Answer(len)) => (0, len.saturating_add(HEADER)),
        Ok(Done::Silence) => return 0,
        Ok(Done::Slow | Done::Locked) => (libc::EIO, HEADER),
        Err(errno) => {
            metrics::ERRORS.add(1);
            (told(errno), HEADER)
        }
    };
    write_header(chain.writable(), unique, errno, len)
}

/// What a guest makes of some errors depends on whose they are.
fn told(errno: Errno) -> i32 {
    match errno {
        // It is this process that has too many files open, not the one that asks.
        Errno::MFILE => libc::ENFILE,
        errno => errno.raw_os_error(),
    }
}

fn write_header(room: Buffer<'_>, unique: u64, errno: i32, len: u32) -> u32 {
    room.copy_from(&header(unique, errno, len));
    len
}

fn refuse(chain: &Chain, bad: &Bad) -> u32 {
    // A name that is too long is any program's mistake, the rest are a driver's.
    if !matches!(bad, Bad::Refused { errno: libc::ENAMETOOLONG, .. }) {
        metrics::BAD_REQUESTS.add(1);
        tracing::warn!(target: virtio::GUEST, "A request is refused: {bad}");
    }
    match *bad {
        Bad::Unanswerable => 0,
        Bad::Refused { unique, errno, .. } => write_header(chain.writable(), unique, errno, HEADER),
    }
}

impl Serve for FsQueue {
    fn serve(&mut self, _index: u16, chain: &Chain, attempt: &mut Attempt<'_>) -> Served {
        self.request(chain, attempt)
    }

    fn refuse(&mut self, _index: u16, chain: &Chain) -> u32 {
        let Some((header, _)) = chain.readable().take_array::<40>() else { return 0 };
        let [_, _, _, _, o0, o1, o2, o3, u0, u1, u2, u3, u4, u5, u6, u7, ..] = header;
        let silent = matches!(u32::from_le_bytes([o0, o1, o2, o3]), opcode::FORGET | opcode::BATCH_FORGET);
        if silent || chain.writable().len() < HEADER {
            return 0;
        }
        write_header(chain.writable(), u64::from_le_bytes([u0, u1, u2, u3, u4, u5, u6, u7]), libc::EIO, HEADER)
    }

    fn can_serve(&mut self, index: u16) -> bool {
        // What comes on the first queue gives back, and takes nothing.
        let wait = if index == 0 { None } else { self.share.limits.wait() };
        if wait.is_some() && self.wait.is_none() {
            metrics::LIMITED.add(1);
        }
        self.wait = wait;
        wait.is_none()
    }

    fn timeout(&self, _slots: &Slots) -> Option<Duration> {
        self.wait
    }

    fn settle(&mut self, slot: &mut Slot) {
        self.copied = false;
        while let Some(outcome) = self.pool.finished() {
            slot.finish(outcome.ticket, |chain| answer(chain, outcome.kind.unique, outcome.done));
            metrics::times(outcome.kind.opcode).add(outcome.kind.began.elapsed(), 1);
        }
    }

    fn poller(&mut self) -> Option<&mut Poller> {
        Some(&mut self.poller)
    }

    fn sources(&self, _slots: &Slots) -> [Option<Source<'_>>; SOURCES] {
        [self.pool.bell().map(|bell| (bell, PollFlags::IN)), None]
    }

    fn ready(&mut self, _which: usize, _events: PollFlags, slots: &mut Slots) {
        self.pool.heard();
        for slot in slots.iter_mut() {
            slot.wake();
        }
    }

    fn stopping(&mut self, index: u16, slots: &mut Slots) {
        let Some(slot) = slots.get(index) else { return };
        self.share.waiting.interrupt_all();
        while slot.in_hand() > 0 {
            self.pool.wait();
            self.settle(slot);
        }
    }
}
