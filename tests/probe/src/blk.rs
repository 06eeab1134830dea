//! A driver for virtio-blk (virtio 1.3, 5.2).
//!
//! A [`Disk`] has a number of slots, each with its own header, data and status memory, so as many requests can be out at once. Where
//! the pieces lie and into how many buffers the data is cut is random: backends see every layout.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::device::{Device, Shape};
use crate::random::{Random, mix};
use crate::ring::Buffer;

pub mod bench;
pub mod nbd;
pub mod verify;

/// Bytes of a sector, the unit of addresses on the wire.
pub const SECTOR: u64 = 512;

/// How long a request may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Bytes of a configuration space with all that is asked about.
const CONFIG: u32 = 60;

const PAGE: u64 = 4096;
const HEADER: u32 = 16;
const STATUS_NONE: u8 = 0xff;

/// Features of virtio-blk, their bits and names.
pub const FEATURES: [(u64, &str); 13] = [
    (1 << 1, "SIZE_MAX"),
    (1 << 2, "SEG_MAX"),
    (1 << 4, "GEOMETRY"),
    (1 << 5, "RO"),
    (1 << 6, "BLK_SIZE"),
    (1 << 9, "FLUSH"),
    (1 << 10, "TOPOLOGY"),
    (1 << 11, "CONFIG_WCE"),
    (1 << 12, "MQ"),
    (1 << 13, "DISCARD"),
    (1 << 14, "WRITE_ZEROES"),
    (1 << 15, "LIFETIME"),
    (1 << 16, "SECURE_ERASE"),
];

/// `VIRTIO_BLK_F_RO`.
pub const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_FLUSH`.
pub const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_DISCARD`.
pub const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`.
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// `VIRTIO_BLK_F_LIFETIME`.
pub const F_LIFETIME: u64 = 1 << 15;
/// `VIRTIO_BLK_F_SECURE_ERASE`.
pub const F_SECURE_ERASE: u64 = 1 << 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read.
    In,
    /// Write.
    Out,
    /// Make what was written durable.
    Flush,
    /// The serial number.
    GetId,
    /// Forget a range.
    Discard,
    /// Zero a range.
    WriteZeroes,
    /// How worn the medium is.
    GetLifetime,
    /// Erase a range so that nobody finds what was there.
    SecureErase,
    /// Anything else.
    Other(u32),
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Kind::In => 0,
            Kind::Out => 1,
            Kind::Flush => 4,
            Kind::GetId => 8,
            Kind::GetLifetime => 10,
            Kind::Discard => 11,
            Kind::WriteZeroes => 13,
            Kind::SecureErase => 14,
            Kind::Other(number) => number,
        }
    }

    fn device_writes(self) -> bool {
        matches!(self, Kind::In | Kind::GetId | Kind::GetLifetime)
    }
}

/// What the device says about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed.
    IoError,
    /// Not known to this device.
    Unsupported,
    /// A number that is none of these.
    Invalid(u8),
}

impl From<u8> for Status {
    fn from(number: u8) -> Status {
        match number {
            0 => Status::Ok,
            1 => Status::IoError,
            2 => Status::Unsupported,
            other => Status::Invalid(other),
        }
    }
}

/// A request that was completed.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// The slot it was made with.
    pub slot: usize,
    /// How it went.
    pub status: Status,
    /// Bytes the device says it wrote, the status included.
    pub written: u32,
}

#[derive(Debug)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
    /// The queue and the head, while it is out.
    out: Option<(u16, u16)>,
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Geometry {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Most data buffers of a request.
    pub seg_max: u32,
    /// Bytes of a block.
    pub block_size: u32,
    /// Queues.
    pub queues: u16,
    /// Most sectors of one discard.
    pub max_discard: u32,
    /// Most sectors of one write-zeroes.
    pub max_zeroes: u32,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// The device underneath.
    pub device: Device,
    /// What it says of itself.
    pub geometry: Geometry,
    slots: Vec<Slot>,
    slot_bytes: u32,
    random: Random,
}

impl Disk {
    /// Connects to a disk and starts it, with `slots` requests of up to `slot_bytes` each. The data of every other slot lies on a page, as
    /// drivers have it; the others' lies anywhere.
    ///
    /// # Errors
    /// When the backend is none, or is no disk.
    pub fn open(stream: UnixStream, shape: Shape, slots: usize, slot_bytes: u32, seed: u64) -> Result<Disk> {
        Disk::open_aligned(stream, shape, slots, slot_bytes, seed, 1)
    }

    /// The same with all data at multiples of `alignment`, as drivers have it: backends need not copy it.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open_aligned(
        stream: UnixStream,
        shape: Shape,
        slots: usize,
        slot_bytes: u32,
        seed: u64,
        alignment: u64,
    ) -> Result<Disk> {
        let known = FEATURES.iter().fold(0, |all, (bit, _)| all | bit);
        let mut random = Random::new(seed);
        let mut device = Device::connect(stream, shape, known)?;
        let config = device.session().config(CONFIG).context("Cannot read the configuration of the disk")?;
        let geometry = Geometry::parse(&config)?;
        let mut list = Vec::with_capacity(slots);
        for place in 0..slots {
            let alignment = if place % 2 == 1 { alignment.max(PAGE) } else { alignment };
            let memory = device.memory_mut();
            let header = memory.take(HEADER.into(), 1, random.number())?;
            let data = memory.take(slot_bytes.into(), alignment, random.number())?;
            let status = memory.take(1, 1, random.number())?;
            list.push(Slot { header, data, status, out: None });
        }
        device.start()?;
        Ok(Disk { device, geometry, slots: list, slot_bytes, random })
    }

    /// A slot that is not out.
    pub fn idle(&self) -> Option<usize> {
        self.slots.iter().position(|slot| slot.out.is_none())
    }

    /// How many requests are out.
    pub fn outstanding(&self) -> usize {
        self.slots.iter().filter(|slot| slot.out.is_some()).count()
    }

    /// Writes into a slot's data memory.
    pub fn fill(&self, slot: usize, bytes: &[u8]) {
        if let Some(slot) = self.slots.get(slot) {
            self.device.memory().write(slot.data, bytes);
        }
    }

    /// Reads from a slot's data memory.
    pub fn data(&self, slot: usize, bytes: &mut [u8]) {
        if let Some(slot) = self.slots.get(slot) {
            self.device.memory().read(slot.data, bytes);
        }
    }

    /// Sends a request of `len` bytes of data at `sector` on `queue`. `false`: the ring has no room.
    pub fn submit(&mut self, queue: u16, slot: usize, kind: Kind, sector: u64, len: u32) -> bool {
        let Some(place) = self.slots.get(slot) else { return false };
        let (header, data, status) = (place.header, place.data, place.status);
        let mut bytes = [0; 16];
        let (number, rest) = bytes.split_at_mut(4);
        number.copy_from_slice(&kind.number().to_le_bytes());
        if let Some(place) = rest.get_mut(4..12) {
            place.copy_from_slice(&sector.to_le_bytes());
        }
        self.device.memory().write(header, &bytes);
        self.device.memory().write(status, &[STATUS_NONE]);
        let mut buffers = vec![Buffer { addr: header, len: HEADER, write: false }];
        self.cut(data, len, kind.device_writes(), &mut buffers);
        buffers.push(Buffer { addr: status, len: 1, write: true });
        let head = self.device.submit(queue, &buffers);
        if let (Some(head), Some(slot)) = (head, self.slots.get_mut(slot)) {
            slot.out = Some((queue, head));
        }
        head.is_some()
    }

    /// Cuts data into one to four buffers, at multiples of a sector.
    fn cut(&mut self, at: u64, len: u32, write: bool, buffers: &mut Vec<Buffer>) {
        let (mut at, mut left) = (at, len);
        let step = u32::try_from(SECTOR).unwrap_or(512);
        for _ in 0..self.random.below(4) {
            let piece = step * u32::try_from(self.random.below(u64::from(left / step) + 1)).unwrap_or(0);
            if piece > 0 && piece < left {
                buffers.push(Buffer { addr: at, len: piece, write });
                at += u64::from(piece);
                left -= piece;
            }
        }
        if left > 0 {
            buffers.push(Buffer { addr: at, len: left, write });
        }
    }

    /// The next completion on any queue.
    ///
    /// # Errors
    /// When the device gives back what it has not, or does so without a status.
    pub fn completion(&mut self) -> Result<Option<Done>> {
        for queue in 0..self.device.queues() {
            let Some(used) = self.device.completion(queue)? else { continue };
            let slot = self.slots.iter().position(|slot| slot.out == Some((queue, used.head)));
            let Some(index) = slot else { bail!("a completion on queue {queue} that belongs to no request") };
            let Some(slot) = self.slots.get_mut(index) else { continue };
            slot.out = None;
            let mut status = [0];
            self.device.memory().read(slot.status, &mut status);
            let [status] = status;
            return Ok(Some(Done { slot: index, status: status.into(), written: used.len }));
        }
        Ok(None)
    }

    /// Waits for the next completion.
    ///
    /// # Errors
    /// Also when none comes.
    pub fn wait(&mut self) -> Result<Done> {
        loop {
            if let Some(done) = self.completion()? {
                return Ok(done);
            }
            if !self.device.wait(LIMIT) && self.completion()?.is_none() {
                bail!("the disk did not answer within {} s", LIMIT.as_secs());
            }
        }
    }

    /// One request, alone, on queue 0.
    ///
    /// # Errors
    /// When it fails.
    pub fn request(&mut self, kind: Kind, sector: u64, data: &mut [u8]) -> Result<Status> {
        let len = u32::try_from(data.len()).ok().filter(|len| *len <= self.slot_bytes).context("The request is too long")?;
        let slot = self.idle().context("All slots are out")?;
        self.fill(slot, data);
        if !self.submit(0, slot, kind, sector, len) {
            bail!("the ring has no room");
        }
        self.device.kick(0);
        let done = self.wait()?;
        if kind.device_writes() {
            self.data(slot, data);
        }
        Ok(done.status)
    }

    /// Reads at a byte offset that is a multiple of a sector.
    ///
    /// # Errors
    /// When the disk says so.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.transfer(Kind::In, offset, data)
    }

    /// Writes at a byte offset that is a multiple of a sector.
    ///
    /// # Errors
    /// When the disk says so.
    pub fn write(&mut self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.transfer(Kind::Out, offset, data)
    }

    fn transfer(&mut self, kind: Kind, offset: u64, data: &mut [u8]) -> Result<()> {
        let piece = usize::try_from(self.slot_bytes)?;
        let mut at = offset;
        for part in data.chunks_mut(piece) {
            match self.request(kind, at / SECTOR, part)? {
                Status::Ok => at += part.len() as u64,
                status => bail!("the disk answered {status:?} to {kind:?} at {at}"),
            }
        }
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When the disk says so.
    pub fn flush(&mut self) -> Result<()> {
        match self.request(Kind::Flush, 0, &mut [])? {
            Status::Ok => Ok(()),
            status => bail!("the disk answered {status:?} to a flush"),
        }
    }

    /// The disk's serial number.
    ///
    /// # Errors
    /// When it has none.
    pub fn serial(&mut self) -> Result<String> {
        let mut id = [0; 20];
        match self.request(Kind::GetId, 0, &mut id)? {
            Status::Ok => Ok(String::from_utf8_lossy(&id).trim_end_matches('\0').to_owned()),
            status => bail!("the disk answered {status:?} to the question for its serial number"),
        }
    }
}

impl Geometry {
    fn parse(config: &[u8]) -> Result<Geometry> {
        let word = |at: usize| config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
        let capacity = config.get(..8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        Ok(Geometry {
            capacity: capacity.context("The backend has no configuration space: it is no disk")?,
            seg_max: word(12),
            block_size: word(20),
            queues: config.get(34..36).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes),
            max_discard: word(36),
            max_zeroes: word(48),
        })
    }
}

/// One range of a discard or of zeroes, as it goes over the wire. The first flag allows zeroes to give their space back.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    let (first, rest) = bytes.split_at_mut(8);
    let (count, last) = rest.split_at_mut(4);
    first.copy_from_slice(&sector.to_le_bytes());
    count.copy_from_slice(&sectors.to_le_bytes());
    last.copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// What a block holds after its `generation`th write: every byte depends on where it is and how often it was written.
pub fn pattern(block: u64, generation: u64, seed: u64, bytes: &mut [u8]) {
    let start = mix(seed ^ mix(block) ^ mix(generation.wrapping_mul(0x2545_f491_4f6c_dd1d)));
    for (index, chunk) in bytes.chunks_mut(8).enumerate() {
        let word = mix(start.wrapping_add(index as u64)).to_le_bytes();
        let len = chunk.len();
        chunk.copy_from_slice(word.get(..len).unwrap_or_default());
    }
}
