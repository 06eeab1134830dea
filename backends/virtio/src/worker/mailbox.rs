//! The hand-over of queues between the control thread and a worker.
//!
//! Commands go one way, the answer to a stop comes the other way; both lie under one lock that neither side holds while it works
//! or waits. Who waits does so in `poll`, on an event descriptor: the channels of the standard library would do the same with
//! two system calls more, for which every filter would have to have a hole.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::queue::{Queue, QueueState};

/// How long a stop waits for what is in flight. A disk that does not answer for so long does not answer. The process ends then: the
/// thread may come back to the ring at any time, and the ring may be somebody else's by that time. Two who serve one ring
/// corrupt what it carries.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// What the control thread wants.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve this queue.
    Start(Box<Queue>),
    /// Give back the queue of this index; the number is that of the question.
    Stop(u16, u64),
}

#[derive(Debug, Default)]
struct Post {
    commands: VecDeque<Command>,
    /// The answer to the question of that number.
    answer: Option<(u64, Option<QueueState>)>,
    questions: u64,
    /// One of the two ends is gone.
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    post: Mutex<Post>,
    bell: OwnedFd,
    answered: OwnedFd,
}

impl Shared {
    fn post(&self) -> MutexGuard<'_, Post> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing came back in time.
struct Late;

/// The control thread's end.
#[derive(Debug)]
pub struct Worker(Arc<Shared>, Duration);

/// The thread's end.
#[derive(Debug)]
pub struct Mailbox(Arc<Shared>);

impl Worker {
    /// Both ends.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<(Worker, Mailbox)> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared { post: Mutex::default(), bell: event()?, answered: event()? });
        Ok((Worker(Arc::clone(&shared), STOP_LIMIT), Mailbox(shared)))
    }

    /// Another limit for a stop.
    #[cfg(test)]
    pub(super) fn within(self, limit: Duration) -> Worker {
        Worker(self.0, limit)
    }

    /// Hands a queue over.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn start(&self, queue: Queue) -> io::Result<()> {
        let mut post = self.0.post();
        if post.closed {
            return Err(io::Error::other("the queue's thread has ended"));
        }
        post.commands.push_back(Command::Start(Box::new(queue)));
        drop(post);
        ring(&self.0.bell);
        Ok(())
    }

    /// Takes a queue back. `None`: it was not running. If nothing comes back within a minute, the process ends.
    pub fn stop(&self, index: u16) -> Option<QueueState> {
        let mut post = self.0.post();
        post.questions += 1;
        let question = post.questions;
        post.commands.push_back(Command::Stop(index, question));
        drop(post);
        ring(&self.0.bell);
        let asked = Instant::now();
        self.wait_for(question, asked + self.1).unwrap_or_else(|Late| {
            tracing::error!(
                queue = index,
                "A request does not end; the process does, {} s after its queue was to stop",
                self.1.as_secs()
            );
            // Of a confined process it is the filter that ends it, at what Rust wants to tidy up first. It ends.
            std::process::exit(1)
        })
    }

    /// Lets the thread come to its end. A process does not do that: its threads end with it, without the system calls that an end
    /// by itself takes.
    pub fn end(self) {
        self.0.post().closed = true;
        ring(&self.0.bell);
    }

    fn wait_for(&self, question: u64, until: Instant) -> Result<Option<QueueState>, Late> {
        loop {
            let mut post = self.0.post();
            // The answer to an earlier question came too late for whoever asked it.
            if let Some((_, state)) = post.answer.take().filter(|(answered, _)| *answered == question) {
                return Ok(state);
            }
            if post.closed {
                return Ok(None);
            }
            drop(post);
            let left = until.checked_duration_since(Instant::now()).and_then(|left| Timespec::try_from(left).ok()).ok_or(Late)?;
            let _interrupted = poll(&mut [PollFd::new(&self.0.answered, PollFlags::IN)], Some(&left));
            silence(&self.0.answered);
        }
    }
}

impl Mailbox {
    /// Readable when there is something to do.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }

    /// The bell was heard.
    pub(super) fn acknowledge(&self) {
        silence(&self.0.bell);
    }

    /// The next command; an error when there will be no more.
    pub(super) fn next(&self) -> Result<Option<Command>, Closed> {
        let mut post = self.0.post();
        match post.commands.pop_front() {
            None if post.closed => Err(Closed),
            command => Ok(command),
        }
    }

    /// Answers a stop.
    pub(super) fn answer(&self, question: u64, state: Option<QueueState>) {
        self.0.post().answer = Some((question, state));
        ring(&self.0.answered);
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.0.post().closed = true;
        ring(&self.0.answered);
    }
}

/// The device is gone.
#[derive(Debug)]
pub(super) struct Closed;

fn ring(bell: &OwnedFd) {
    let _already_ringing = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn silence(bell: &OwnedFd) {
    let _nothing_rung = rustix::io::read(bell, &mut [0; 8]);
}
