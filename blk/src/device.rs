//! The device: its configuration, and a thread for each queue.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use daemon::Confined;
use virtio::device::{Device, Host, Identity, Immovable, ReadOnly, read_config};
use virtio::limit::Limits;
use virtio::worker::{Poller, Worker, Workers, run};
use virtio::{Queue, QueueState, feature};

use crate::args::{Config, EngineKind};
use crate::commands::{Commands, Entrance};
use crate::engine::Engine;
use crate::engine::pool::{self, Jobs, Pool};
use crate::engine::split::{self, Split};
use crate::engine::uring::Uring;
use crate::image::{Afterwards, Disk};
use crate::queue::DiskQueue;
use crate::request::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use crate::sandbox::{ERASER, POOL, THREAD};
use crate::shared::Shared;
use crate::topology;
use crate::volume::Volume;

/// The virtio device id of a disk.
const ID: u32 = 2;

/// Largest ring: four full-sized requests of the kernel's driver, or 340 small ones.
const QUEUE_SIZE: u16 = 1024;

/// Most data buffers of one request. A chain has at most as many as its ring, two of which are header and status; drivers choose
/// smaller rings than the largest.
const SEG_MAX: u32 = 126;

/// Bytes of the configuration space (virtio 1.3, 5.2.4), up to the limits of secure erase.
const CONFIG: usize = 72;
const CONFIG_LEN: u32 = 72;

/// The version of a saved state.
const STATE: u8 = 1;

/// The one byte of it that is the driver's.
const WRITEBACK: usize = 32;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_LIFETIME: u64 = 1 << 15;
const F_SECURE_ERASE: u64 = 1 << 16;

/// A virtio-blk device.
#[derive(Debug)]
pub struct Blk {
    workers: Workers,
    shared: Arc<Shared>,
    config: [u8; CONFIG],
    queues: u16,
}

impl Blk {
    /// Starts a thread for each queue, and the threads that wait for the disk if there is no io_uring.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn new(disk: &Arc<Disk>, engines: Engines, limits: Limits, config: &Config, confined: &Confined) -> Result<Blk> {
        limits.begin(config.operations, config.bytes);
        let shared = Arc::new(Shared::new(disk.bytes(), config.serial, disk.direct(), disk.abilities(), limits));
        // Asked once, before there are filters.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let role = if disk.abilities().secure_erase { ERASER } else { THREAD };
        let mut workers = Vec::new();
        for (index, prepare) in engines.start(config.queues, confined)?.into_iter().enumerate() {
            let (worker, mailbox) = Worker::new()?;
            let volume = Volume::new(Arc::clone(disk));
            let shared = Arc::clone(&shared);
            let poller = Poller::new(config.poll, processors);
            confined.spawn_prepared(role, format!("queue{index}"), prepare, move |engine| match engine {
                Ok(engine) => run(DiskQueue::new(volume, engine, shared, poller), mailbox),
                Err(error) => tracing::error!("A queue cannot be served: {error}"),
            })?;
            workers.push(worker);
        }
        let space = space(disk, config.queues);
        Ok(Blk { workers: Workers::new(workers), shared, config: space, queues: config.queues })
    }

    /// Obeys whoever comes in there, on the thread that has read the image.
    pub fn obey(&self, entrance: Entrance, disk: &Arc<Disk>, thread: Afterwards) {
        let commands = Commands::new(Arc::clone(disk), Arc::clone(&self.shared));
        thread.run(move || commands.run(&entrance));
    }

    fn features(&self) -> u64 {
        let limits = self.shared.checks();
        let mut features = feature::RING | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
        features |= if limits.read_only { F_RO } else { F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES };
        features |= if limits.lifetime { F_LIFETIME } else { 0 };
        features | if limits.secure_erase { F_SECURE_ERASE } else { 0 }
    }
}

impl Device for Blk {
    fn identity(&self) -> Identity {
        Identity { id: ID, features: self.features(), queues: self.queues, queue_size: QUEUE_SIZE, config_len: CONFIG_LEN }
    }

    /// A driver that knows of no flushes cannot be asked to make them (virtio 1.3, 5.2.5.1).
    fn negotiate(&mut self, features: u64) {
        self.shared.write_back(features & F_FLUSH != 0);
    }

    fn read_config(&self, offset: u32, buf: &mut [u8]) {
        let mut space = self.config;
        space[..8].copy_from_slice(&(self.shared.bytes() / SECTOR).to_le_bytes());
        space[WRITEBACK] = u8::from(self.shared.writes_back());
        read_config(&space, offset, buf);
    }

    /// The driver's is one byte: whether writes may wait for a flush.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ReadOnly> {
        match (usize::try_from(offset), data) {
            (Ok(WRITEBACK), [choice @ (0 | 1)]) if self.features() & F_CONFIG_WCE != 0 => {
                self.shared.write_back(*choice == 1);
                Ok(())
            }
            _ => Err(ReadOnly),
        }
    }

    fn start(&mut self, index: u16, queue: Queue) -> io::Result<()> {
        self.workers.start(index, queue)
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.workers.stop(index)
    }

    fn reset(&mut self) {
        self.shared.write_back(true);
    }

    /// The driver's choice of whether writes may wait for a flush, after the version of this very format.
    fn save(&mut self) -> Result<Vec<u8>, Immovable> {
        Ok(vec![STATE, u8::from(self.shared.writes_back())])
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Immovable> {
        match state {
            [STATE, choice @ (0 | 1)] => {
                self.shared.write_back(*choice == 1);
                Ok(())
            }
            _ => Err(Immovable::foreign()),
        }
    }

    fn attach(&mut self, host: Host) {
        self.shared.attach(host);
    }
}

/// How each queue comes to its engine.
#[derive(Debug)]
pub enum Engines {
    /// A ring for each.
    Uring(Vec<Uring>),
    /// A way to the same threads for each.
    Pool,
}

impl Engines {
    /// What was asked for, or what can be had. While the process may still do everything.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn open(config: &Config) -> Result<Engines> {
        if config.engine == EngineKind::Threads {
            return Ok(Engines::Pool);
        }
        let rings: io::Result<Vec<Uring>> = (0..config.queues).map(|_| Uring::new()).collect();
        match rings {
            Ok(rings) => Ok(Engines::Uring(rings)),
            Err(error) if config.engine == EngineKind::Auto => {
                tracing::info!("no io_uring ({error}): threads wait for the disk");
                Ok(Engines::Pool)
            }
            Err(error) => {
                Err(error).context("Cannot use io_uring; see /proc/sys/kernel/io_uring_disabled and the limit on locked memory, or leave --engine out")
            }
        }
    }

    /// An engine for each queue, still to be made by its thread. Threads that wait for the disk start now.
    fn start(self, queues: u16, confined: &Confined) -> Result<Vec<Prepare>> {
        let jobs = Arc::new(Jobs::default());
        let threads = if matches!(self, Engines::Pool) { pool::THREADS } else { split::THREADS };
        for index in 0..threads {
            let jobs = Arc::clone(&jobs);
            confined.spawn(POOL, format!("disk{index}"), move || pool::work(&jobs))?;
        }
        let way = || -> Way {
            let jobs = Arc::clone(&jobs);
            Box::new(move || Pool::new(jobs))
        };
        let rings = match self {
            Engines::Uring(rings) => rings,
            Engines::Pool => {
                let one = |way: Way| -> Prepare { Box::new(move || Ok(Box::new(way()?))) };
                return Ok((0..queues).map(|_| one(way())).collect());
            }
        };
        let one = |mut ring: Uring, way: Way| -> Prepare {
            Box::new(move || {
                ring.enable()?;
                Ok(Box::new(Split::new(ring, way()?)))
            })
        };
        Ok(rings.into_iter().map(|ring| one(ring, way())).collect())
    }
}

/// Makes a way to the threads, on the thread that will use it.
type Way = Box<dyn FnOnce() -> io::Result<Pool> + Send>;

/// Makes an engine on the thread that will use it.
type Prepare = Box<dyn FnOnce() -> io::Result<Box<dyn Engine>> + Send>;

/// The configuration space: what of it the offered features make valid.
fn space(disk: &Disk, queues: u16) -> [u8; CONFIG] {
    let mut space = [0; CONFIG];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = space.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let ranges = u32::try_from(MAX_RANGES).unwrap_or(1).to_le_bytes();
    let most = MAX_RANGE_SECTORS.to_le_bytes();
    let alignment = topology::discard_sectors(&disk.topology()).to_le_bytes();
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &topology::config(&disk.topology()));
    put(34, &queues.to_le_bytes());
    // Discards, and zeroes, whose space may be given back.
    for (at, bytes) in [(36, most), (40, ranges), (44, alignment), (48, most), (52, ranges)] {
        put(at, &bytes);
    }
    put(56, &[1]);
    if disk.abilities().secure_erase {
        for (at, bytes) in [(60, most), (64, ranges), (68, alignment)] {
            put(at, &bytes);
        }
    }
    space
}
