//! Threads that wait for the disk: for all there is to do where the host has no io_uring for us, and beside one for what
//! [`split`](crate::engine::split) says.
//!
//! The device has a few of them, for all its queues. A job carries what it needs: the file, and a buffer that keeps guest memory
//! mapped. Its outcome goes to the box of the queue that asked, with a ring of that box's bell.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{fallocate, fdatasync};
use rustix::io::{ReadWriteFlags, pwritev2};
use virtio::OwnedBuffer;
use virtio::worker::SOURCES;

use crate::engine::{Clear, Done, Engine, File, Work, zeroes};

/// Threads of a device: as many operations can wait for the disk at once.
pub const THREADS: u16 = 8;

#[derive(Debug)]
enum Task {
    Read(u64, OwnedBuffer),
    Write(u64, OwnedBuffer),
    Clear(u64, u32, Clear),
    Sync,
}

#[derive(Debug)]
struct Job {
    id: u64,
    file: File,
    task: Task,
    to: Arc<Outcomes>,
}

/// What there is to do.
#[derive(Debug, Default)]
pub struct Jobs {
    list: Mutex<VecDeque<Job>>,
    more: Condvar,
}

/// What was done for one queue.
#[derive(Debug)]
struct Outcomes {
    list: Mutex<VecDeque<Done>>,
    bell: OwnedFd,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Works for as long as the process lives.
pub fn work(jobs: &Jobs) {
    loop {
        let mut list = locked(&jobs.list);
        let job = loop {
            match list.pop_front() {
                Some(job) => break job,
                None => list = jobs.more.wait(list).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(list);
        let Job { id, file, task, to } = job;
        let outcome = carry_out(&file, &task);
        // The memory goes before the news: who hears it may give the memory up.
        drop(task);
        locked(&to.list).push_back((id, outcome));
        let _full_is_rung = rustix::io::write(&to.bell, &1u64.to_ne_bytes());
    }
}

fn carry_out(file: &File, task: &Task) -> io::Result<u32> {
    loop {
        let outcome = match task {
            Task::Read(offset, data) => data.as_buffer().read_from(file.as_fd(), Some(*offset)),
            Task::Write(offset, data) => data.as_buffer().write_to(file.as_fd(), Some(*offset)),
            Task::Clear(offset, len, how) => clear(file, *offset, *len, *how),
            Task::Sync => fdatasync(file).map(|()| 0).map_err(Into::into),
        };
        match outcome {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other.map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX)),
        }
    }
}

fn clear(file: &File, offset: u64, len: u32, how: Clear) -> io::Result<usize> {
    match how {
        Clear::Write => Ok(pwritev2(file, &[IoSlice::new(zeroes(len))], offset, ReadWriteFlags::empty())?),
        Clear::Punch | Clear::Zero => Ok(fallocate(file, how.mode(), offset, len.into()).map(|()| 0)?),
    }
}

/// One queue's way to the threads.
#[derive(Debug)]
pub struct Pool {
    jobs: Arc<Jobs>,
    outcomes: Arc<Outcomes>,
    /// Begun, not yet handed on.
    collected: Vec<Job>,
    in_flight: usize,
}

impl Pool {
    /// A way to the threads that [`work`] for `jobs`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(jobs: Arc<Jobs>) -> io::Result<Pool> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let outcomes = Arc::new(Outcomes { list: Mutex::default(), bell });
        Ok(Pool { jobs, outcomes, collected: Vec::new(), in_flight: 0 })
    }
}

impl Engine for Pool {
    fn begin(&mut self, id: u64, file: &File, work: Work<'_>) -> io::Result<()> {
        let task = match work {
            Work::Read { offset, data } => Task::Read(offset, data.detached()),
            Work::Write { offset, data } => Task::Write(offset, data.detached()),
            Work::Clear { offset, len, how } => Task::Clear(offset, len, how),
            Work::Sync => Task::Sync,
        };
        self.collected.push(Job { id, file: file.clone(), task, to: Arc::clone(&self.outcomes) });
        self.in_flight += 1;
        Ok(())
    }

    fn submit(&mut self) {
        if self.collected.is_empty() {
            return;
        }
        locked(&self.jobs.list).extend(self.collected.drain(..));
        self.jobs.more.notify_all();
    }

    fn next(&mut self) -> Option<Done> {
        let mut list = locked(&self.outcomes.list);
        let done = list.pop_front();
        if list.is_empty() {
            // Who adds to the list rings afterwards, so nothing is missed; a bell left ringing would keep the queue awake.
            let mut rings = [0; 8];
            let _was_silent = rustix::io::read(&self.outcomes.bell, &mut rings);
        }
        self.in_flight -= usize::from(done.is_some());
        done
    }

    fn wait(&mut self) {
        self.submit();
        while self.in_flight > 0 && locked(&self.outcomes.list).is_empty() {
            let _interrupted = poll(&mut [PollFd::new(&self.outcomes.bell, PollFlags::IN)], None);
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn sources(&self) -> [Option<BorrowedFd<'_>>; SOURCES] {
        [(self.in_flight > 0).then(|| self.outcomes.bell.as_fd()), None]
    }
}
