//! Threads for what may have to wait: for a disk, for another machine, for somebody's lock.
//!
//! The process has a few, for all its queues. A job is a whole request: the copy of its message, which is parsed anew, and the guest's
//! memory for its data and its answer, which stays mapped with it. Its outcome goes to the box of the queue it came from, with a
//! ring of that box's bell.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use virtio::OwnedBuffer;
use virtio::worker::Ticket;

use crate::fs::{Io, Outcome, Share, Thread};
use crate::request::BoxedRequest;

/// A request for another thread.
#[derive(Debug)]
pub struct Job {
    ticket: Ticket,
    unique: u64,
    message: BoxedRequest,
    data: OwnedBuffer,
    room: OwnedBuffer,
}

impl Job {
    /// The request of this ticket.
    pub fn new(ticket: Ticket, unique: u64, message: BoxedRequest, data: OwnedBuffer, room: OwnedBuffer) -> Job {
        Job { ticket, unique, message, data, room }
    }
}

/// What became of a job.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Of which request.
    pub ticket: Ticket,
    /// The guest's number of it.
    pub unique: u64,
    /// What the guest is to be told.
    pub done: Outcome,
}

/// What there is to do.
#[derive(Debug, Default)]
pub struct Jobs {
    list: Mutex<VecDeque<(Job, Arc<Outcomes>)>>,
    more: Condvar,
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
        let mut list = locked(&jobs.list);
        let (job, to) = loop {
            match list.pop_front() {
                Some(job) => break job,
                None => list = jobs.more.wait(list).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(list);
        let Job { ticket, unique, message, data, room } = job;
        let done = message.parse(share.dialect()).map_err(|_| Errno::IO).and_then(|request| {
            let io = Io { data: data.as_buffer(), room: room.as_buffer(), patient: true };
            share.perform(&mut thread, &request, io)
        });
        // The memory goes before the news: who hears it may give the memory up.
        drop((data, room));
        locked(&to.list).push_back(Finished { ticket, unique, done });
        let _full_is_rung = rustix::io::write(&to.bell, &1u64.to_ne_bytes());
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
    pub fn submit(&mut self, job: Job) {
        self.in_flight = self.in_flight.saturating_add(1);
        locked(&self.jobs.list).push_back((job, Arc::clone(&self.outcomes)));
        self.jobs.more.notify_one();
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
