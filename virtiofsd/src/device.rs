//! The device: its identity, and its threads.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use daemon::Confined;
use rustix::fs::Mode;
use sandbox::Capability;
use virtio::device::{Device, Identity, Immovable, read_config};
use virtio::worker::{Poller, Worker, Workers, run};
use virtio::{Queue, QueueState, feature};

use crate::args::{Config, TAG};
use crate::fs::{MOST, Share, Thread};
use crate::pool::{Jobs, Pool, work};
use crate::queue::FsQueue;
use crate::sandbox::{POOL, POOL_BY_HANDLE, POOL_OF_MANY, QUEUE, QUEUE_BY_HANDLE, QUEUE_OF_MANY};
use crate::sys;

/// The virtio device id of a file system.
const ID: u32 = 26;

/// Largest ring.
const QUEUE_SIZE: u16 = 1024;

/// Bytes of the configuration space (virtio 1.3, 5.11.4), up to the number of request queues.
const CONFIG: usize = TAG + 4;

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    workers: Workers,
    share: Arc<Share>,
    config: [u8; CONFIG],
    /// The guest's VMM has no tag of its own for it.
    tagged: bool,
    queues: u16,
}

impl Fs {
    /// Starts a thread for each queue, and those for what may have to wait.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn new(share: Share, config: &Config, several: bool, confined: &Confined) -> Result<Fs> {
        share.limits.begin(config.operations, config.bytes);
        let share = Arc::new(share);
        // Asked once, before there are filters.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let (queue, pool) = match (several, share.tree.reaches_by_handle()) {
            (_, true) => (QUEUE_BY_HANDLE, POOL_BY_HANDLE),
            (true, false) => (QUEUE_OF_MANY, POOL_OF_MANY),
            (false, false) => (QUEUE, POOL),
        };
        let start = |role: &str, name: String, body: Box<dyn FnOnce(Thread) + Send>| {
            let begin = move |thread: Result<Thread>| match thread {
                Ok(thread) => body(thread),
                Err(error) => tracing::error!("A thread cannot be used: {error}"),
            };
            confined.spawn_prepared(role, name, move || prepare(several), begin)
        };
        let jobs = Arc::new(Jobs::new(config.pool));
        for index in 0..config.pool {
            let (jobs, share) = (Arc::clone(&jobs), Arc::clone(&share));
            start(pool, format!("slow{index}"), Box::new(move |thread| work(&jobs, &share, thread)))?;
        }
        if config.settings.locks {
            let share = Arc::clone(&share);
            start(pool, "locks".to_owned(), Box::new(move |thread| share.waiting.work(&share, thread)))?;
        }
        if config.watch {
            let share = Arc::clone(&share);
            start(pool, "watch".to_owned(), Box::new(move |_thread| share.watch()))?;
        }
        let mut workers = Vec::new();
        for index in 0..=config.queues {
            let (worker, mailbox) = Worker::new()?;
            let (pool, share) = (Pool::new(Arc::clone(&jobs))?, Arc::clone(&share));
            let poller = Poller::eager(if index == 0 { Duration::ZERO } else { config.poll }, processors);
            let name = if index == 0 { "urgent".to_owned() } else { format!("queue{index}") };
            start(queue, name, Box::new(move |thread| run(FsQueue::new(share, thread, pool, poller), mailbox)))?;
            workers.push(worker);
        }
        let (space, tagged) = space(config);
        Ok(Fs { workers: Workers::new(workers), share, config: space, tagged, queues: config.queues })
    }
}

/// What a thread does before its filter: its mask for new files is its own, and of its rights it has those in force that a guest's user
/// could have.
fn prepare(several: bool) -> Result<Thread> {
    sys::own_mask()?;
    rustix::process::umask(Mode::empty());
    if several {
        sandbox::lower(&[Capability::CAP_FSETID])?;
    }
    Ok(Thread::new(several))
}

impl Device for Fs {
    fn identity(&self) -> Identity {
        let config_len = if self.tagged { u32::try_from(CONFIG).unwrap_or_default() } else { 0 };
        // The first queue is the one for what must not wait.
        Identity { id: ID, features: feature::RING, queues: self.queues.saturating_add(1), queue_size: QUEUE_SIZE, config_len }
    }

    fn read_config(&self, offset: u32, buf: &mut [u8]) {
        read_config(&self.config, offset, buf);
    }

    fn start(&mut self, index: u16, queue: Queue) -> io::Result<()> {
        self.workers.start(index, queue)
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.workers.stop(index)
    }

    fn reset(&mut self) {
        self.share.end();
    }

    fn most_state(&self) -> usize {
        MOST
    }

    fn save(&mut self) -> Result<Vec<u8>, Immovable> {
        self.share.tree.by_names(|| self.share.save())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Immovable> {
        self.share.tree.by_names(|| self.share.load(state))
    }
}

fn space(config: &Config) -> ([u8; CONFIG], bool) {
    let mut space = [0; CONFIG];
    let tag = config.tag.as_deref().unwrap_or_default();
    for (place, byte) in space.iter_mut().zip(tag.bytes().take(TAG)) {
        *place = byte;
    }
    let (_, queues) = space.split_at_mut(TAG);
    queues.copy_from_slice(&u32::from(config.queues).to_le_bytes());
    (space, config.tag.is_some())
}
