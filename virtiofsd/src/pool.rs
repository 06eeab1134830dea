//! Threads for what may have to wait: for a disk, for another machine, for somebody's lock.
//!
//! The process has a few, for all its queues. A job is a whole request: the copy of its message, which is parsed anew, and the guest's
//! memory for its data and its answer, which stays mapped with it. Its outcome goes to the box of the queue it came from, with a
//! ring of that box's bell.
//!
//! Where another machine does not answer, whoever asks it waits for ever. So one of the threads, if there are several, is for the disks of this
//! one alone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use virtio::OwnedBuffer;
use virtio::worker::Ticket;

use crate::fs::{Done, Io, Outcome, Share, Thread};
use crate::request::BoxedRequest;
use crate::waiting::Waiting;

/// What has to be known of a request to finish it.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The guest's number for it.
    pub unique: u64,
    /// What it asks for.
    pub opcode: u32,
    /// When it was taken.
    pub began: Instant,
}

/// A request for another thread.
#[derive(Debug)]
pub struct Job {
    ticket: Ticket,
    kind: Kind,
    message: BoxedRequest,
    data: OwnedBuffer,
    room: OwnedBuffer,
    elsewhere: bool,
}

impl Job {
    /// The request of this ticket, with its data and the room for its answer.
    pub fn new(ticket: Ticket, kind: Kind, message: BoxedRequest, (data, room): (OwnedBuffer, OwnedBuffer)) -> Job {
        Job { ticket, kind, message, data, room, elsewhere: false }
    }

    /// The same, which may have to wait for another machine, or another process.
    #[must_use]
    pub fn elsewhere(self, elsewhere: bool) -> Job {
        Job { elsewhere, ..self }
    }
}

/// What became of a job.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Of which request.
    pub ticket: Ticket,
    /// Which it was.
    pub kind: Kind,
    /// What the guest is to be told.
    pub done: Outcome,
}

/// A job, and where its outcome goes.
#[derive(Debug)]
pub(crate) struct Errand {
    job: Job,
    to: Arc<Outcomes>,
    /// What [`Waiting::ends`] was when it was handed on.
    pub(crate) ends: u64,
}

impl Errand {
    /// The guest's number of it.
    pub(crate) fn unique(&self) -> u64 {
        self.job.kind.unique
    }

    /// Tries to do it, on a thread that may wait.
    pub(crate) fn attempt(&self, share: &Share, thread: &mut Thread) -> Outcome {
        let Job { message, data, room, .. } = &self.job;
        let request = message.parse(share.dialect()).map_err(|_| Errno::IO)?;
        share.perform(thread, &request, Io { data: data.as_buffer(), room: room.as_buffer(), patient: true, at_length: true })
    }

    /// Tells what became of it.
    pub(crate) fn finish(self, done: Outcome) {
        let Errand { job: Job { ticket, kind, data, room, .. }, to, .. } = self;
        // The memory goes before the news: who hears it may give the memory up.
        drop((data, room));
        locked(&to.list).push_back(Finished { ticket, kind, done });
        let _full_is_rung = rustix::io::write(&to.bell, &1u64.to_ne_bytes());
    }
}

/// What there is to do.
#[derive(Debug)]
pub struct Jobs {
    list: Mutex<List>,
    more: Condvar,
    /// Most threads that ask others.
    most: u16,
}

#[derive(Debug, Default)]
struct List {
    waiting: VecDeque<Errand>,
    /// Threads that ask others at the moment.
    asking: u16,
}

impl Jobs {
    /// For so many threads.
    pub fn new(threads: u16) -> Jobs {
        Jobs { list: Mutex::default(), more: Condvar::new(), most: threads.saturating_sub(1).max(1) }
    }

    /// The next one, when there is one that may begin.
    fn next(&self) -> Errand {
        let mut list = locked(&self.list);
        loop {
            let full = list.asking >= self.most;
            let which = list.waiting.iter().position(|errand| !(full && errand.job.elsewhere));
            if let Some(errand) = which.and_then(|which| list.waiting.remove(which)) {
                list.asking = list.asking.saturating_add(errand.job.elsewhere.into());
                return errand;
            }
            list = self.more.wait(list).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[derive(Debug)]
struct Outcomes {
    list: Mutex<VecDeque<Finished>>,
    bell: OwnedFd,
}

/// One queue's way to the threads.
#[derive(Debug)]
pub struct Pool {
    jobs: Arc<Jobs>,
    outcomes: Arc<Outcomes>,
    in_flight: usize,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Works for as long as the process lives.
pub fn work(jobs: &Jobs, share: &Share, mut thread: Thread) {
    loop {
        let errand = jobs.next();
        let asked = u16::from(errand.job.elsewhere);
        match errand.attempt(share, &mut thread) {
            // Whether somebody has a lock there is known only now.
            Ok(Done::Locked) => share.waiting.enter(errand),
            done => errand.finish(done),
        }
        let mut list = locked(&jobs.list);
        list.asking = list.asking.saturating_sub(asked);
    }
}

impl Pool {
    /// A way to the threads that [`work`] for `jobs`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(jobs: Arc<Jobs>) -> io::Result<Pool> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let outcomes = Arc::new(Outcomes { list: Mutex::default(), bell });
        Ok(Pool { jobs, outcomes, in_flight: 0 })
    }

    /// Hands a request on.
    pub fn submit(&mut self, job: Job, waiting: &Waiting) {
        self.in_flight = self.in_flight.saturating_add(1);
        let errand = self.errand(job, waiting);
        locked(&self.jobs.list).waiting.push_back(errand);
        self.jobs.more.notify_one();
    }

    /// Has a request wait for a lock.
    pub fn wait_for_lock(&mut self, job: Job, waiting: &Waiting) {
        let errand = self.errand(job, waiting);
        self.in_flight = self.in_flight.saturating_add(1);
        waiting.enter(errand);
    }

    fn errand(&self, job: Job, waiting: &Waiting) -> Errand {
        Errand { job, to: Arc::clone(&self.outcomes), ends: waiting.ends() }
    }

    /// The next outcome there is.
    pub fn finished(&mut self) -> Option<Finished> {
        if self.in_flight == 0 {
            return None;
        }
        let finished = locked(&self.outcomes.list).pop_front()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(finished)
    }

    /// What rings when there are outcomes, while some are to come.
    pub fn bell(&self) -> Option<BorrowedFd<'_>> {
        (self.in_flight > 0).then(|| self.outcomes.bell.as_fd())
    }

    /// The bell was heard. What comes from now on rings it again.
    pub fn heard(&self) {
        let _was_silent = rustix::io::read(&self.outcomes.bell, &mut [0; 8]);
    }

    /// Waits for an outcome, if there is one to come.
    pub fn wait(&self) {
        while self.in_flight > 0 && locked(&self.outcomes.list).is_empty() {
            let _interrupted = poll(&mut [PollFd::new(&self.outcomes.bell, PollFlags::IN)], None);
            self.heard();
        }
    }
}
