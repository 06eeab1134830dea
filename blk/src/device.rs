//! The device: its configuration, and a thread for each queue.

use std::io;

use anyhow::{Context, Result};
use daemon::Confined;
use virtio::device::{Device, Identity, read_config};
use virtio::worker::{Attempt, Serve, Served, Worker, Workers, run};
use virtio::{Chain, Queue, QueueState, feature};

use crate::args::Config;
use crate::image::Image;
use crate::metrics;
use crate::request::{Limits, MAX_RANGE_SECTORS, MAX_RANGES, Request, SECTOR, SERIAL, Status};
use crate::sandbox::THREAD;

/// The virtio device id of a disk.
const ID: u32 = 2;

/// Largest ring: four full-sized requests of the kernel's driver, or 340 small ones.
const QUEUE_SIZE: u16 = 1024;

/// Most data buffers of one request. A chain has at most as many as its ring, two of which are header and status; drivers choose
/// smaller rings than the largest.
const SEG_MAX: u32 = 126;

/// Bytes of the configuration space (virtio 1.3, 5.2.4), up to the limits of write-zeroes.
const CONFIG: usize = 60;
const CONFIG_LEN: u32 = 60;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// A virtio-blk device.
#[derive(Debug)]
pub struct Blk {
    workers: Workers,
    config: [u8; CONFIG],
    queues: u16,
    read_only: bool,
}

impl Blk {
    /// Starts a thread for each queue.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn new(image: Image, config: &Config, confined: &Confined) -> Result<Blk> {
        let limits = Limits { bytes: image.bytes(), read_only: image.read_only() };
        let mut workers = Vec::new();
        for index in 0..config.queues {
            let (worker, mailbox) = Worker::new()?;
            let disk = Disk { image: image.share().context("Cannot share the image")?, limits, serial: config.serial };
            confined.spawn(THREAD, format!("queue{index}"), move || run(disk, mailbox))?;
            workers.push(worker);
        }
        Ok(Blk {
            workers: Workers::new(workers),
            config: space(&image, config.queues),
            queues: config.queues,
            read_only: limits.read_only,
        })
    }
}

impl Device for Blk {
    fn identity(&self) -> Identity {
        let writing = if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        let features = feature::RING | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ | writing;
        Identity { id: ID, features, queues: self.queues, queue_size: QUEUE_SIZE, config_len: CONFIG_LEN }
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

    fn reset(&mut self) {}
}

/// The configuration space: what of it the offered features make valid.
fn space(image: &Image, queues: u16) -> [u8; CONFIG] {
    let mut space = [0; CONFIG];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = space.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let ranges = u32::try_from(MAX_RANGES).unwrap_or(1);
    let alignment = image.block_size() / u32::try_from(SECTOR).unwrap_or(512);
    put(0, &(image.bytes() / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &image.block_size().to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &ranges.to_le_bytes());
    put(44, &alignment.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &ranges.to_le_bytes());
    // The space of a range of zeroes may be given back.
    put(56, &[1]);
    space
}

/// What the thread of a queue does.
#[derive(Debug)]
struct Disk {
    image: Image,
    limits: Limits,
    serial: [u8; SERIAL],
}

impl Disk {
    fn answer(&self, chain: &Chain, carry_out: impl FnOnce(&Request<'_>) -> Status) -> u32 {
        let Ok((request, answer)) = Request::read(chain, &self.limits) else {
            metrics::BAD_REQUESTS.add(1);
            tracing::warn!(target: virtio::GUEST, "A request without a header or a status byte is given back empty");
            return 0;
        };
        let status = match request {
            Ok(request) => carry_out(&request),
            Err(status) => {
                metrics::REFUSED.add(1);
                status
            }
        };
        answer.finish(status)
    }

    fn carry_out(&self, request: &Request<'_>) -> Status {
        let done = match request {
            Request::Read { offset, data } => {
                metrics::READS.add(1);
                metrics::READ_BYTES.add(data.len().into());
                self.image.read(*offset, *data)
            }
            Request::Write { offset, data } => {
                metrics::WRITES.add(1);
                metrics::WRITTEN_BYTES.add(data.len().into());
                self.image.write(*offset, *data)
            }
            Request::Flush => {
                metrics::FLUSHES.add(1);
                self.image.flush()
            }
            Request::Discard(ranges) => {
                metrics::DISCARDS.add(1);
                ranges.iter().try_for_each(|range| self.image.discard(range))
            }
            Request::WriteZeroes(ranges) => {
                metrics::ZEROES.add(1);
                ranges.iter().try_for_each(|range| self.image.write_zeroes(range))
            }
            Request::GetId(room) => {
                room.copy_from(&self.serial);
                Ok(())
            }
        };
        done.map_or_else(
            |error| {
                metrics::FAILED.add(1);
                tracing::warn!(target: virtio::GUEST, "The image gives an error: {error}");
                Status::IoError
            },
            |()| Status::Ok,
        )
    }
}

impl Serve for Disk {
    fn serve(&mut self, _index: u16, chain: &Chain, _attempt: &mut Attempt<'_>) -> Served {
        Served::Done(self.answer(chain, |request| self.carry_out(request)))
    }

    fn refuse(&mut self, _index: u16, chain: &Chain) -> u32 {
        self.answer(chain, |_| Status::IoError)
    }
}
