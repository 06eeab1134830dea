//! The walk over a descriptor chain, and views of the memory it names.
//!
//! The walk reads every descriptor once, into spans that are checked against guest memory, and ends in one of two ways: the
//! whole chain, or an error. There is no third, "as much as was readable": a request that is executed truncated is a request
//! the guest did not make. The limits (virtio 1.3, 2.7.4 and 2.7.5):
//!
//! - a chain, the entries of an indirect table included, has at most as many descriptors as the ring, which also ends loops;
//! - an indirect descriptor is the last of its chain, its table holds whole entries, at least one, and no indirect ones;
//! - what the device may write comes after all that it may read.
//!
//! A [`Chain`] is reused from request to request, so a worker allocates at its start and never again.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::dirty::DirtyLog;
use crate::memory::{self, Memory, Patience, Span};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bytes of one descriptor.
pub const DESCRIPTOR: usize = 16;

/// Why a chain is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The index of a descriptor is not in its table.
    #[error("Descriptor {0} is outside of its table of {1}")]
    Index(u16, u16),
    /// Longer than the ring: a loop, or an over-long indirect table.
    #[error("A chain has more than {0} descriptors")]
    TooLong(u16),
    /// An indirect table that is empty, has a broken entry, or is longer than the ring.
    #[error("An indirect table of {0} bytes")]
    Table(u32),
    /// An indirect descriptor in an indirect table, or one with a successor.
    #[error("An indirect descriptor where none may be")]
    Nested,
    /// A readable buffer after a writable one.
    #[error("A readable buffer after a writable one")]
    Order,
    /// More bytes than one chain may have.
    #[error("A chain of more than 4 GiB")]
    TooLarge,
    /// Not guest memory.
    #[error("A descriptor that is not in guest memory")]
    Memory(#[source] memory::Error),
}

/// A request's memory: what the device may read, then what it may write.
#[derive(Debug)]
pub struct Chain {
    memory: Arc<Memory>,
    spans: Vec<Span>,
    readable: usize,
    bytes: [u32; 2],
    descriptors: u16,
}

impl Chain {
    /// An empty chain of this memory, with room for a ring of `size`.
    pub fn new(memory: Arc<Memory>, size: u16) -> Chain {
        // One more than a chain's descriptors: each may be cut in two where regions touch, but few are.
        Chain { memory, spans: Vec::with_capacity(usize::from(size) + 1), readable: 0, bytes: [0; 2], descriptors: 0 }
    }

    /// What the driver has written for the device.
    pub fn readable(&self) -> Buffer<'_> {
        Buffer::new(&self.memory, self.spans.get(..self.readable).unwrap_or_default(), self.bytes[0])
    }

    /// Where the device writes its answer.
    pub fn writable(&self) -> Buffer<'_> {
        Buffer::new(&self.memory, self.spans.get(self.readable..).unwrap_or_default(), self.bytes[1])
    }

    /// Notes that all of what the device may write was written.
    pub fn log(&self, dirty: &DirtyLog) {
        for span in self.spans.get(self.readable..).unwrap_or_default() {
            if let Some(addr) = self.memory.guest_address_of(*span) {
                dirty.mark(addr, span.len().into());
            }
        }
    }

    /// How many descriptors were fetched.
    pub fn descriptors(&self) -> u16 {
        self.descriptors
    }

    /// Fetches the chain that begins at `head` of a ring's table of `size` descriptors.
    ///
    /// # Errors
    /// When it is no valid chain. The content is meaningless then.
    pub fn walk(&mut self, table: Span, size: u16, head: u16) -> Result<(), Error> {
        self.spans.clear();
        (self.readable, self.bytes, self.descriptors) = (0, [0; 2], 0);
        let mut at = Cursor { table, entries: size, index: head, indirect: false };
        loop {
            let next = self.visit(&mut at, size)?;
            match next {
                Some(index) => at.index = index,
                None => return Ok(()),
            }
        }
    }

    /// One descriptor: takes its memory in, or steps into its table. Gives the index of the one to visit next.
    fn visit(&mut self, at: &mut Cursor, size: u16) -> Result<Option<u16>, Error> {
        if at.index >= at.entries {
            return Err(Error::Index(at.index, at.entries));
        }
        if self.descriptors >= size {
            return Err(Error::TooLong(size));
        }
        let descriptor = Descriptor::fetch(&self.memory, at.table, at.index);
        if descriptor.flags & INDIRECT != 0 {
            at.enter(&self.memory, &descriptor, size)?;
            return Ok(Some(0));
        }
        self.descriptors += 1;
        self.take(&descriptor)?;
        Ok((descriptor.flags & NEXT != 0).then_some(descriptor.next))
    }

    fn take(&mut self, descriptor: &Descriptor) -> Result<(), Error> {
        let writable = descriptor.flags & WRITE != 0;
        let [readable_bytes, writable_bytes] = &mut self.bytes;
        let (total, other) = if writable { (writable_bytes, *readable_bytes) } else { (readable_bytes, *writable_bytes) };
        let sum = total.checked_add(descriptor.len).ok_or(Error::TooLarge)?;
        sum.checked_add(other).ok_or(Error::TooLarge)?;
        if !writable && self.readable < self.spans.len() {
            return Err(Error::Order);
        }
        *total = sum;
        let spans = &mut self.spans;
        self.memory.spans(descriptor.addr, descriptor.len, |span| spans.push(span)).map_err(Error::Memory)?;
        if !writable {
            self.readable = self.spans.len();
        }
        Ok(())
    }
}

/// Where the walk is: a table, and the entry of it to be visited next.
struct Cursor {
    table: Span,
    entries: u16,
    index: u16,
    indirect: bool,
}

impl Cursor {
    fn enter(&mut self, memory: &Memory, descriptor: &Descriptor, size: u16) -> Result<(), Error> {
        if self.indirect || descriptor.flags & NEXT != 0 {
            return Err(Error::Nested);
        }
        let bad = || Error::Table(descriptor.len);
        let entry = u32::try_from(DESCRIPTOR).map_err(|_| bad())?;
        let entries = u16::try_from(descriptor.len / entry).map_err(|_| bad())?;
        if !descriptor.len.is_multiple_of(entry) || entries == 0 || entries > size {
            return Err(bad());
        }
        self.table = memory.span(descriptor.addr, descriptor.len).map_err(Error::Memory)?;
        (self.entries, self.index, self.indirect) = (entries, 0, true);
        Ok(())
    }
}

/// A descriptor, as it was at the one moment it was read.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn fetch(memory: &Memory, table: Span, index: u16) -> Descriptor {
        let at = usize::from(index) * DESCRIPTOR;
        Descriptor {
            addr: u64::from_le_bytes(memory.fetch(table, at)),
            len: u32::from_le_bytes(memory.fetch(table, at + 8)),
            flags: u16::from_le_bytes(memory.fetch(table, at + 12)),
            next: u16::from_le_bytes(memory.fetch(table, at + 14)),
        }
    }
}

/// A run of guest bytes in one direction: a view of a chain, cheap to copy and to cut.
#[derive(Clone, Copy, Debug)]
pub struct Buffer<'a> {
    memory: &'a Arc<Memory>,
    spans: &'a [Span],
    /// Bytes of the first span that are not part of this view.
    skip: u32,
    len: u32,
}

impl<'a> Buffer<'a> {
    fn new(memory: &'a Arc<Memory>, spans: &'a [Span], len: u32) -> Buffer<'a> {
        Buffer { memory, spans, skip: 0, len }
    }

    /// Bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// It has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `at` bytes and the rest; all and nothing if there are not that many.
    pub fn split_at(&self, at: u32) -> (Buffer<'a>, Buffer<'a>) {
        let at = at.min(self.len);
        let front = Buffer { len: at, ..*self };
        let mut back = Buffer { len: self.len - at, ..*self };
        let mut left = at;
        while let Some((first, rest)) = back.spans.split_first() {
            let here = first.len() - back.skip;
            if left < here {
                break;
            }
            left -= here;
            (back.spans, back.skip) = (rest, 0);
        }
        back.skip += left;
        (front, back)
    }

    /// All but the last `len` bytes, and those. `None` if there are fewer.
    pub fn split_last(&self, len: u32) -> Option<(Buffer<'a>, Buffer<'a>)> {
        Some(self.split_at(self.len.checked_sub(len)?))
    }

    /// The first `N` bytes, fetched once, and what comes after them. `None` if there are fewer.
    pub fn take_array<const N: usize>(&self) -> Option<([u8; N], Buffer<'a>)> {
        let (front, back) = self.split_at(u32::try_from(N).ok()?);
        let mut bytes = [0; N];
        (front.copy_to(&mut bytes) == N).then_some((bytes, back))
    }

    /// Copies out of the guest as much as fits; gives the number of bytes.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for span in self.pieces() {
            let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += self.memory.read(span, rest);
        }
        done
    }

    /// Copies into the guest as much as fits; gives the number of bytes.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for span in self.pieces() {
            let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) else { break };
            done += self.memory.write(span, rest);
        }
        done
    }

    /// Fills it with zeroes.
    pub fn zero(&self) {
        self.pieces().for_each(|span| self.memory.zero(span));
    }

    /// Reads from `file` into the guest, with as many bytes as one call gives: at `offset`, or wherever a stream is.
    ///
    /// # Errors
    /// The system's.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        self.memory.read_file(self.pieces(), file, offset, Patience::Wait)
    }

    /// The same, with as many bytes as are there without waiting for a disk.
    ///
    /// # Errors
    /// The system's; `WouldBlock` if there is nothing without waiting.
    pub fn read_at_once(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.memory.read_file(self.pieces(), file, Some(offset), Patience::Never)
    }

    /// Most bytes that one call reads or writes: a buffer in many pieces takes several.
    pub fn in_one_call(&self) -> u32 {
        self.pieces().take(memory::MAX_IOVECS).map(|piece| piece.len()).fold(0, u32::saturating_add)
    }

    /// Its pieces as they lie in this process, for whoever has the kernel move the data: the first byte and the number of bytes of
    /// each. They stay mapped for as long as the chain, or the [`OwnedBuffer`], is kept.
    pub fn addresses(&self) -> impl Iterator<Item = (*mut u8, usize)> + Clone + use<'a> {
        let memory = self.memory;
        self.pieces().map(move |span| memory.address(span))
    }

    /// The same bytes, in a value that keeps the memory by itself and can go to another thread.
    pub fn detached(&self) -> OwnedBuffer {
        OwnedBuffer { memory: Arc::clone(self.memory), spans: self.pieces().collect(), len: self.len }
    }

    /// Writes the guest's bytes to `file`, as many as one call takes: at `offset`, or wherever a stream is.
    ///
    /// # Errors
    /// The system's.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        self.memory.write_file(self.pieces(), file, offset)
    }

    /// The spans it consists of.
    fn pieces(&self) -> impl Iterator<Item = Span> + Clone + use<'a> {
        let (mut skip, mut left) = (self.skip, self.len);
        self.spans.iter().map_while(move |span| {
            let piece = span.cut(skip, left)?;
            skip = 0;
            left -= piece.len();
            Some(piece)
        })
    }
}

/// A [`Buffer`] that keeps guest memory by itself.
#[derive(Debug)]
pub struct OwnedBuffer {
    memory: Arc<Memory>,
    spans: Vec<Span>,
    len: u32,
}

impl OwnedBuffer {
    /// Its bytes.
    pub fn as_buffer(&self) -> Buffer<'_> {
        Buffer::new(&self.memory, &self.spans, self.len)
    }
}

#[cfg(test)]
mod tests;
