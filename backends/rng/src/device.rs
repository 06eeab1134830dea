//! The device: one queue, one thread.

use std::io;
use std::time::Duration;

use anyhow::Result;
use daemon::Confined;
use virtio::device::{Device, Identity};
use virtio::worker::{Attempt, Serve, Served, Slots, Worker, Workers, run};
use virtio::{Chain, Queue, QueueState, feature};

use crate::args::Config;
use crate::metrics;
use crate::request::Request;
use crate::sandbox::THREAD;
use crate::source::Source;

/// The virtio device id of an entropy source.
const ID: u32 = 4;

/// Largest ring. A driver keeps one or two requests in it.
const QUEUE_SIZE: u16 = 256;

/// A virtio-rng device.
#[derive(Debug)]
pub struct Rng {
    workers: Workers,
}

impl Rng {
    /// Starts the device's thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn new(config: &Config, confined: &Confined) -> Result<Rng> {
        let (worker, mailbox) = Worker::new()?;
        let filler = Filler { source: Source::new(config.share) };
        confined.spawn(THREAD, "queue0".to_owned(), move || run(filler, mailbox))?;
        Ok(Rng { workers: Workers::new(vec![worker]) })
    }
}

impl Device for Rng {
    fn identity(&self) -> Identity {
        Identity { id: ID, features: feature::RING, queues: 1, queue_size: QUEUE_SIZE, config_len: 0 }
    }

    fn read_config(&self, _offset: u32, buf: &mut [u8]) {
        buf.fill(0);
    }

    fn start(&mut self, index: u16, queue: Queue) -> io::Result<()> {
        self.workers.start(index, queue)
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.workers.stop(index)
    }

    fn reset(&mut self) {}
}

/// What the thread does.
#[derive(Debug)]
struct Filler {
    source: Source,
}

impl Filler {
    fn fill(&mut self, chain: &Chain) -> u32 {
        let served = Request::read(chain).map_err(io::Error::other).and_then(|request| {
            let bytes = request.bytes.min(self.source.available());
            self.source.fill(chain.writable().split_at(bytes).0)
        });
        match served {
            Ok(bytes) => {
                metrics::BYTES.add(bytes.into());
                metrics::REQUESTS.add(1);
                bytes
            }
            Err(error) => {
                metrics::BAD_REQUESTS.add(1);
                tracing::warn!(target: virtio::GUEST, "A request is given back empty: {error}");
                0
            }
        }
    }
}

impl Serve for Filler {
    fn serve(&mut self, _index: u16, chain: &Chain, _attempt: &mut Attempt<'_>) -> Served {
        Served::Done(self.fill(chain))
    }

    fn can_serve(&mut self, _index: u16) -> bool {
        self.source.available() > 0
    }

    fn timeout(&self, _slots: &Slots) -> Option<Duration> {
        self.source.wait()
    }
}
