//! A request of the guest, read once and checked (virtio 1.3, 5.2.6). No I/O here.
//!
//! ```text
//! readable: header (type, reserved, sector) | data to write, or ranges
//! writable: data to read | status (the last byte)
//! ```
//!
//! The specification does not say how these are spread over descriptors, so only their order counts.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use virtio::{Buffer, Chain};

/// Bytes of a sector: the unit of all addresses, whatever the block size.
pub const SECTOR: u64 = 512;

/// Bytes of a serial number.
pub const SERIAL: usize = 20;

/// Most ranges of one discard, write-zeroes or secure-erase request. The kernel merges neighbours before it sends them.
pub const MAX_RANGES: usize = 16;

/// Most sectors of one range: 1 GiB, so that one request keeps a queue for a bounded time.
pub const MAX_RANGE_SECTORS: u32 = 2 * 1024 * 1024;

const HEADER: usize = 16;
const RANGE: usize = 16;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const GET_LIFETIME: u32 = 10;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECURE_ERASE: u32 = 14;

/// Bytes of the answer to a question about wear.
pub const LIFETIME: usize = 4;

const UNMAP: u32 = 1;

/// What the device is, as far as requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the disk, a multiple of [`SECTOR`].
    pub bytes: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// The host's device tells how worn it is.
    pub lifetime: bool,
    /// The host's device can erase so that nobody finds what was there.
    pub secure_erase: bool,
}

/// A piece of the disk, inside of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Its first byte.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
    /// The space may be given back.
    pub unmap: bool,
}

/// Up to [`MAX_RANGES`] pieces of the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ranges {
    list: [Range; MAX_RANGES],
    count: usize,
}

impl Ranges {
    /// The pieces.
    pub fn iter(&self) -> impl Iterator<Item = &Range> {
        self.list.iter().take(self.count)
    }

    /// The piece with this number among those that are not empty.
    pub fn get(&self, index: usize) -> Option<&Range> {
        self.iter().filter(|range| range.len > 0).nth(index)
    }

    /// The first byte of all of them, and the bytes from there to the last. `None`: there is nothing in them.
    pub fn span(&self) -> Option<(u64, u64)> {
        let some = || self.iter().filter(|range| range.len > 0);
        let start = some().map(|range| range.offset).min()?;
        let end = some().map(|range| range.offset.saturating_add(range.len)).max()?;
        Some((start, end.saturating_sub(start)))
    }

    pub(crate) fn push(&mut self, range: Range) -> Option<()> {
        *self.list.get_mut(self.count)? = range;
        self.count = self.count.saturating_add(1);
        Some(())
    }
}

/// What is asked for. The data is where the chain has it. Ranges are rare and large, so they are kept apart: reads and writes would be
/// copied with room for them.
#[derive(Clone, Debug)]
pub enum Request<'a> {
    /// Disk to guest.
    Read {
        /// First byte.
        offset: u64,
        /// Where to.
        data: Buffer<'a>,
    },
    /// Guest to disk.
    Write {
        /// First byte.
        offset: u64,
        /// From where.
        data: Buffer<'a>,
    },
    /// Make all completed writes durable.
    Flush,
    /// The content does not matter any more.
    Discard(Box<Ranges>),
    /// The content becomes zero.
    WriteZeroes(Box<Ranges>),
    /// The content is gone, from wherever the device has kept it.
    SecureErase(Box<Ranges>),
    /// The serial number.
    GetId(Buffer<'a>),
    /// How worn the medium is.
    GetLifetime(Buffer<'a>),
}

/// How a request ended, in the numbers of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoError = 1,
    /// Not known to this device.
    Unsupported = 2,
}

/// Answers the request of a chain: writes the status into the last byte, wherever the driver has put it. Gives the number of bytes that
/// were written in all: `data` bytes, if the request went well, and the status.
pub fn finish(chain: &Chain, status: Status, data: u32) -> u32 {
    let Some((_, place)) = chain.writable().split_last(1) else { return 0 };
    place.copy_from(&[status as u8]);
    if status == Status::Ok { data.saturating_add(1) } else { 1 }
}

/// The data of a chain that was found to be a read, or a write.
pub fn data(chain: &Chain, write: bool) -> Buffer<'_> {
    if write {
        chain.readable().split_at(u32::try_from(HEADER).unwrap_or(0)).1
    } else {
        chain.writable().split_last(1).map_or(chain.writable(), |(data, _)| data)
    }
}

/// There is no place for an answer: not even a status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A request without a header or a status byte")]
pub struct Unanswerable;

impl<'a> Request<'a> {
    /// Reads the request of a chain. The inner error is the answer to a request that can be given one.
    ///
    /// # Errors
    /// [`Unanswerable`].
    pub fn read(chain: &'a Chain, limits: &Limits) -> Result<Result<Request<'a>, Status>, Unanswerable> {
        let (header, sent) = chain.readable().take_array::<HEADER>().ok_or(Unanswerable)?;
        let (room, _) = chain.writable().split_last(1).ok_or(Unanswerable)?;
        let [k0, k1, k2, k3, _, _, _, _, s @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(s);
        Ok(Request::of(kind, sector, sent, room, limits))
    }

    /// Bytes that the guest gets, besides the status, if all goes well.
    pub fn answer_len(&self) -> u32 {
        match self {
            Request::Read { data, .. } | Request::GetId(data) | Request::GetLifetime(data) => data.len(),
            _ => 0,
        }
    }

    fn of(kind: u32, sector: u64, sent: Buffer<'a>, room: Buffer<'a>, limits: &Limits) -> Result<Request<'a>, Status> {
        match kind {
            IN => Ok(Request::Read { offset: extent(sector, room.len(), limits)?, data: room }),
            OUT => {
                writable(limits)?;
                Ok(Request::Write { offset: extent(sector, sent.len(), limits)?, data: sent })
            }
            FLUSH => Ok(Request::Flush),
            GET_ID => {
                let (id, _) = room.split_at(u32::try_from(SERIAL).unwrap_or(0));
                Ok(Request::GetId(id))
            }
            DISCARD => Ok(Request::Discard(ranges(sent, 0, limits)?)),
            WRITE_ZEROES => Ok(Request::WriteZeroes(ranges(sent, UNMAP, limits)?)),
            SECURE_ERASE if limits.secure_erase => Ok(Request::SecureErase(erased(sent, room, limits)?)),
            GET_LIFETIME if limits.lifetime => {
                let (wear, _) = room.split_at(u32::try_from(LIFETIME).unwrap_or(0));
                Ok(Request::GetLifetime(wear))
            }
            _ => Err(Status::Unsupported),
        }
    }
}

fn writable(limits: &Limits) -> Result<(), Status> {
    if limits.read_only { Err(Status::IoError) } else { Ok(()) }
}

/// The first byte of so many bytes at a sector, if they are whole sectors of the disk.
fn extent(sector: u64, len: u32, limits: &Limits) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(len.into()).ok_or(Status::IoError)?;
    if end > limits.bytes || !u64::from(len).is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    Ok(offset)
}

/// The ranges of a secure erase. Linux's driver takes a type of request for a write where its number is odd, and this one is even: it
/// offers its ranges as room for an answer (`virtblk_add_req`, Linux 6.12). They are as much the guest's word there. Without any
/// ranges there is nothing to erase, and "done" would make a guest believe in an erasure that nobody has seen.
fn erased(sent: Buffer<'_>, room: Buffer<'_>, limits: &Limits) -> Result<Box<Ranges>, Status> {
    let sent = if sent.is_empty() { room } else { sent };
    if sent.is_empty() { Err(Status::IoError) } else { ranges(sent, 0, limits) }
}

/// The ranges of a discard, write-zeroes or secure-erase request, of whose flags only `known` ones may be set.
fn ranges(sent: Buffer<'_>, known: u32, limits: &Limits) -> Result<Box<Ranges>, Status> {
    writable(limits)?;
    let mut ranges = Box::<Ranges>::default();
    let mut rest = sent;
    while !rest.is_empty() {
        let (bytes, after) = rest.take_array::<RANGE>().ok_or(Status::IoError)?;
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, f2, f3] = bytes;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let sectors = u32::from_le_bytes([l0, l1, l2, l3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let len = sectors.checked_mul(u32::try_from(SECTOR).unwrap_or(0)).ok_or(Status::IoError)?;
        let offset = extent(sector, len, limits)?;
        ranges.push(Range { offset, len: len.into(), unmap: flags & UNMAP != 0 }).ok_or(Status::IoError)?;
        rest = after;
    }
    Ok(ranges)
}
