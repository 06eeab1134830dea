//! Data that is not aligned as a file wants it that is used past the page cache.
//!
//! Drivers align their buffers to blocks, and those move straight to and from the disk. What is not aligned takes a detour over
//! memory that is, on the queue's own thread: right, and slow, which is the driver's choice.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use image::{read_at, write_at};
use virtio::Buffer;

/// Larger than what any file wants.
const ALIGNMENT: usize = 4096;

/// Bytes that make a detour at a time.
const PIECE: usize = 256 * 1024;

/// What a file wants: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of addresses in memory.
    pub memory: u32,
    /// Of offsets and lengths.
    pub offset: u32,
}

impl Alignment {
    /// Whether all of a buffer can be moved as it is.
    pub fn fits(self, offset: u64, data: Buffer<'_>) -> bool {
        let (memory, block) = (self.memory as usize, self.offset as usize);
        let whole = |number: usize, unit: usize| number & unit.wrapping_sub(1) == 0;
        offset.is_multiple_of(self.offset.into())
            && data.addresses().all(|(at, len)| whole(at.addr(), memory) && whole(len, block))
    }
}

/// Moves a buffer over memory that is aligned.
///
/// # Errors
/// The system's; `InvalidInput` for parts of blocks, which cannot be written alone.
pub fn detour(file: impl AsFd, write: bool, offset: u64, data: Buffer<'_>, alignment: Alignment) -> io::Result<()> {
    let block = u64::from(alignment.offset);
    if !offset.is_multiple_of(block) || !u64::from(data.len()).is_multiple_of(block) {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            format!("Past the page cache, blocks of {block} bytes cannot be moved in parts"),
        ));
    }
    let mut memory = vec![0; PIECE.min(data.len() as usize) + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let room = memory.get_mut(start..).unwrap_or_default();
    let (mut at, mut rest) = (offset, data);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(u32::try_from(PIECE).unwrap_or(u32::MAX));
        let room = room.get_mut(..piece.len() as usize).unwrap_or_default();
        if write {
            piece.copy_to(room);
            write_at(&file, room, at)?;
        } else {
            if read_at(&file, room, at)? < room.len() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            piece.copy_from(room);
        }
        (at, rest) = (at.saturating_add(piece.len().into()), after);
    }
    Ok(())
}
