//! Guest memory: the ranges a frontend has announced, mapped, and the only ways to touch them.
//!
//! A [`Memory`] is immutable: a new memory table is a new `Memory`, made while no ring runs. A queue holds an `Arc` of the one
//! it was started with, so a mapping outlives everything that points into it.
//!
//! A [`Span`] is a checked piece of one region, as numbers. It is meaningless without the `Memory` that made it and is checked
//! again against it at each use (two comparisons), so a span of another table can read the wrong bytes of the guest but never
//! a byte outside of guest memory.
//!
//! **Truncation.** A mapping of a file that its owner then shortens kills the process that touches it (SIGBUS). So a region is
//! mapped only if its file is long enough *now*, and is sealed against shrinking. Files that cannot be sealed at all
//! (`/dev/shm`, hugetlbfs, memfds made without sealing) are refused unless the person who starts the process trusts the
//! frontend ([`Trust::Unsealed`]).

#![expect(unsafe_code, reason = "maps guest memory and hands its pieces to the kernel as I/O vectors")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// Most regions one table may have. The protocol's own messages carry 8; memory slots go further.
pub const MAX_REGIONS: usize = 509;

/// Most pieces of memory given to one I/O call; the caller comes again for the rest. Linux's block driver sends up to 254 pieces
/// in one request but few in most.
pub(crate) const MAX_IOVECS: usize = 64;

/// What can be wrong with announced memory, or with an address in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A region of no bytes, or one that wraps around.
    #[error("A region of {size:#x} bytes at {guest_addr:#x} is no range of addresses")]
    Range {
        /// Its guest physical address.
        guest_addr: u64,
        /// Its size.
        size: u64,
    },
    /// Two regions share addresses.
    #[error("The region at {0:#x} overlaps another one")]
    Overlap(u64),
    /// The table is full.
    #[error("There are more than {MAX_REGIONS} regions")]
    TooMany,
    /// No such region.
    #[error("There is no region of {size:#x} bytes at {guest_addr:#x}")]
    Unknown {
        /// The guest physical address asked for.
        guest_addr: u64,
        /// The size asked for.
        size: u64,
    },
    /// The file ends before the region does.
    #[error("The file behind the region at {guest_addr:#x} has {have:#x} bytes and needs {need:#x}")]
    TooShort {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The file's bytes.
        have: u64,
        /// The bytes up to the region's end.
        need: u64,
    },
    /// The file can be shortened under us.
    #[error("The memory at {0:#x} is not sealed against shrinking (a memfd with F_SEAL_SHRINK is needed)")]
    Unsealed(u64),
    /// The kernel refused.
    #[error("Cannot map the region at {guest_addr:#x}")]
    Map {
        /// The region's guest physical address.
        guest_addr: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest named memory that it does not have.
    #[error("{len:#x} bytes at {addr:#x} are not guest memory")]
    Outside {
        /// The address.
        addr: u64,
        /// The length.
        len: u64,
    },
}

/// Whether memory that its owner could shorten is accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Only sealed memfds.
    #[default]
    Sealed,
    /// Any file. Its owner can end this process at any time.
    Unsealed,
}

/// A region as it is announced: where the guest has it, how the frontend calls it, and the file it is in.
#[derive(Debug)]
pub struct RegionFile {
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// Bytes, at least 1.
    pub size: u64,
    /// The frontend's name for its first byte; ring addresses are given so.
    pub user_addr: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// The file.
    pub fd: OwnedFd,
}

#[derive(Debug)]
struct Mapped {
    guest_addr: u64,
    user_addr: u64,
    size: u64,
    /// Bytes of the mapping before the region's first byte: a mapping begins at a page of its file, a region need not.
    lead: u64,
    mapping: Pages,
}

/// A table of mapped regions, sorted by guest address.
#[derive(Debug, Default)]
pub struct Memory {
    regions: Vec<Arc<Mapped>>,
}

/// A checked piece of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    region: u32,
    len: u32,
    offset: u64,
}

impl Span {
    /// Bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// It has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// At most `most` bytes of it, after the first `skip`; `None` if nothing is left.
    pub(crate) fn cut(&self, skip: u32, most: u32) -> Option<Span> {
        let len = self.len.checked_sub(skip)?.min(most);
        (len > 0).then(|| Span { region: self.region, len, offset: self.offset + u64::from(skip) })
    }
}

impl Memory {
    /// This table and one region more.
    ///
    /// # Errors
    /// When the region is no range, overlaps, is not in its file, can be truncated, or cannot be mapped.
    pub fn with(&self, region: RegionFile, trust: Trust) -> Result<Memory, Error> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(Error::TooMany);
        }
        let new = Mapped::map(region, trust)?;
        let overlaps = |old: &Arc<Mapped>| old.guest_addr < new.guest_end() && new.guest_addr < old.guest_end();
        if self.regions.iter().any(overlaps) {
            return Err(Error::Overlap(new.guest_addr));
        }
        let mut regions = self.regions.clone();
        regions.push(Arc::new(new));
        regions.sort_by_key(|region| region.guest_addr);
        Ok(Memory { regions })
    }

    /// This table without the region at `guest_addr`.
    ///
    /// # Errors
    /// When there is none of that address and size.
    pub fn without(&self, guest_addr: u64, size: u64) -> Result<Memory, Error> {
        let mut regions = self.regions.clone();
        regions.retain(|region| region.guest_addr != guest_addr || region.size != size);
        if regions.len() == self.regions.len() {
            return Err(Error::Unknown { guest_addr, size });
        }
        Ok(Memory { regions })
    }

    /// How many regions it has.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// It has no region.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The guest physical address that the frontend calls `user_addr`.
    pub fn guest_address(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let inside = user_addr.checked_sub(region.user_addr)?;
            (inside < region.size).then(|| region.guest_addr.wrapping_add(inside))
        })
    }

    /// The one span of `len` bytes at `addr`, which may not cross from one region into another.
    ///
    /// # Errors
    /// [`Error::Outside`].
    pub fn span(&self, addr: u64, len: u32) -> Result<Span, Error> {
        let span = self.first_span(addr, len)?;
        if span.len == len { Ok(span) } else { Err(Error::Outside { addr, len: len.into() }) }
    }

    /// Calls `each` for the pieces of `len` bytes at `addr`, more than one where regions touch.
    ///
    /// # Errors
    /// [`Error::Outside`] when there is a hole; pieces before it have been given out.
    pub fn spans(&self, addr: u64, len: u32, mut each: impl FnMut(Span)) -> Result<(), Error> {
        let (mut addr, mut left) = (addr, len);
        while left > 0 {
            let span = self.first_span(addr, left)?;
            left -= span.len;
            addr = addr.wrapping_add(span.len.into());
            each(span);
        }
        Ok(())
    }

    fn first_span(&self, addr: u64, len: u32) -> Result<Span, Error> {
        let outside = || Error::Outside { addr, len: len.into() };
        let after = self.regions.partition_point(|region| region.guest_addr <= addr);
        let index = after.checked_sub(1).ok_or_else(outside)?;
        let region = self.regions.get(index).ok_or_else(outside)?;
        let offset = addr - region.guest_addr;
        let room = region.size.checked_sub(offset).filter(|room| *room > 0).ok_or_else(outside)?;
        let len = u32::try_from(room).map_or(len, |room| room.min(len));
        Ok(Span { region: u32::try_from(index).map_err(|_| outside())?, len, offset })
    }

    /// The bytes of a span. Empty if the span is of another table and does not fit this one.
    fn slice(&self, span: Span) -> VolatileSlice<'_> {
        self.piece(span).unwrap_or_else(|| VolatileSlice::from(<&mut [u8]>::default()))
    }

    fn piece(&self, span: Span) -> Option<VolatileSlice<'_>> {
        let region = self.regions.get(span.region as usize)?;
        let end = span.offset.checked_add(span.len.into())?;
        let start = usize::try_from(region.lead.checked_add(span.offset)?).ok()?;
        if end > region.size {
            return None;
        }
        region.mapping.0.get_slice(start, span.len as usize).ok()
    }

    /// Copies from the guest; the number of bytes copied is the shorter of both.
    pub fn read(&self, span: Span, to: &mut [u8]) -> usize {
        self.slice(span).copy_to(to)
    }

    /// Copies to the guest; the number of bytes copied is the shorter of both.
    pub fn write(&self, span: Span, from: &[u8]) -> usize {
        let slice = self.slice(span);
        let len = slice.len().min(from.len());
        slice.copy_from(from.get(..len).unwrap_or_default());
        len
    }

    /// Fills a span with zeroes.
    pub fn zero(&self, span: Span) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let slice = self.slice(span);
        let mut done = 0;
        while let Ok(rest) = slice.offset(done) {
            let len = rest.len().min(ZEROES.len());
            if len == 0 {
                break;
            }
            rest.copy_from(ZEROES.get(..len).unwrap_or_default());
            done += len;
        }
    }

    /// Loads the 16-bit number `at` bytes into the span, in the ring's byte order.
    pub fn load_u16(&self, span: Span, at: usize, order: Ordering) -> u16 {
        let slice = self.slice(span);
        slice.get_atomic_ref::<AtomicU16>(at).map_or(0, |cell| u16::from_le(cell.load(order)))
    }

    /// Stores a 16-bit number `at` bytes into the span, in the ring's byte order.
    pub fn store_u16(&self, span: Span, at: usize, value: u16, order: Ordering) {
        if let Ok(cell) = self.slice(span).get_atomic_ref::<AtomicU16>(at) {
            cell.store(value.to_le(), order);
        }
    }

    /// Loads the byte `at` bytes into the span.
    pub fn load_u8(&self, span: Span, at: usize, order: Ordering) -> u8 {
        self.slice(span).get_atomic_ref::<AtomicU8>(at).map_or(0, |cell| cell.load(order))
    }

    /// Stores a byte `at` bytes into the span.
    pub fn store_u8(&self, span: Span, at: usize, value: u8, order: Ordering) {
        if let Ok(cell) = self.slice(span).get_atomic_ref::<AtomicU8>(at) {
            cell.store(value, order);
        }
    }

    /// Sets bits of the byte `at` bytes into the span, whatever others do to its other bits meanwhile.
    pub fn or_u8(&self, span: Span, at: usize, bits: u8, order: Ordering) {
        if let Ok(cell) = self.slice(span).get_atomic_ref::<AtomicU8>(at) {
            cell.fetch_or(bits, order);
        }
    }

    /// The guest address of a span's first byte.
    pub fn guest_address_of(&self, span: Span) -> Option<u64> {
        let region = self.regions.get(span.region as usize)?;
        region.guest_addr.checked_add(span.offset)
    }

    /// Loads the 64-bit number `at` bytes into the span, which has to be aligned.
    pub fn load_u64(&self, span: Span, at: usize, order: Ordering) -> u64 {
        self.slice(span).get_atomic_ref::<AtomicU64>(at).map_or(0, |cell| u64::from_le(cell.load(order)))
    }

    /// Stores a 64-bit number `at` bytes into the span, which has to be aligned.
    pub fn store_u64(&self, span: Span, at: usize, value: u64, order: Ordering) {
        if let Ok(cell) = self.slice(span).get_atomic_ref::<AtomicU64>(at) {
            cell.store(value.to_le(), order);
        }
    }

    /// Copies bytes to `at` bytes into the span; none if they do not fit.
    pub fn store(&self, span: Span, at: usize, bytes: &[u8]) {
        if let Ok(slice) = self.slice(span).subslice(at, bytes.len()) {
            slice.copy_from(bytes);
        }
    }

    /// Copies bytes that lie `at` bytes into the span. They are fetched once. All zeroes if they are not there.
    pub fn fetch<const N: usize>(&self, span: Span, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if let Ok(slice) = self.slice(span).subslice(at, N) {
            slice.copy_to(&mut bytes);
        }
        bytes
    }

    /// Reads from `file` at `offset` into the spans, as many bytes as one call gives.
    ///
    /// # Errors
    /// The system's. `EFAULT` if the memory has been truncated: the kernel notices, the process lives on.
    pub fn read_file(
        &self,
        spans: impl Iterator<Item = Span>,
        file: BorrowedFd<'_>,
        offset: Option<u64>,
        patience: Patience,
    ) -> io::Result<usize> {
        let mut room = Vectors::ROOM;
        let (vectors, count) = self.vectors(&mut room, spans);
        let at = position(offset)?;
        let flags = if patience == Patience::Never { libc::RWF_NOWAIT } else { 0 };
        // SAFETY: each of the `count` vectors points at `len` bytes of a shared mapping that `self` keeps mapped during the call, writable
        // by construction. Rust has no reference to those bytes (they are only ever touched through volatile accesses), so the
        // kernel's writes alias nothing. The array of vectors lives until the call returns and is only read. The C library's own
        // function is a cancellation point, which costs as much as the kernel's way in; the high half of the position is in the low one.
        let got = unsafe { libc::syscall(libc::SYS_preadv2, file.as_raw_fd(), vectors, count, at, 0, flags) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Writes the spans to `file` at `offset`, as many bytes as one call takes.
    ///
    /// # Errors
    /// As [`Memory::read_file`].
    pub fn write_file(&self, spans: impl Iterator<Item = Span>, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let mut room = Vectors::ROOM;
        let (vectors, count) = self.vectors(&mut room, spans);
        let at = position(offset)?;
        // SAFETY: as in `read_file`; the kernel only reads the bytes. The guest may change them meanwhile, which is its own
        // affair: what reaches the file is then some mixture of what the guest wrote.
        let put = unsafe { libc::syscall(libc::SYS_pwritev2, file.as_raw_fd(), vectors, count, at, 0, 0) };
        usize::try_from(put).map_err(|_| io::Error::last_os_error())
    }

    /// Where a span lies in this process, for as long as this table, or one made from it, lives.
    pub(crate) fn address(&self, span: Span) -> (*mut u8, usize) {
        let slice = self.slice(span);
        (slice.ptr_guard_mut().as_ptr(), slice.len())
    }

    /// As many spans as there is room for: where the vectors begin, and how many there are.
    fn vectors(&self, room: &mut Vectors, spans: impl Iterator<Item = Span>) -> (*const libc::iovec, usize) {
        let mut count = 0;
        for (vector, span) in room.0.iter_mut().zip(spans) {
            let slice = self.slice(span);
            vector.write(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            count += 1;
        }
        (room.0.as_ptr().cast(), count)
    }
}

/// Whether a call may wait for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes.
    Wait,
    /// Not at all.
    Never,
}

/// Room for the vectors of one call, on the stack. Most calls have one, so the rest is not even cleared.
struct Vectors([MaybeUninit<libc::iovec>; MAX_IOVECS]);

impl Vectors {
    const ROOM: Vectors = Vectors([const { MaybeUninit::uninit() }; MAX_IOVECS]);
}

fn position(offset: Option<u64>) -> io::Result<i64> {
    offset.map_or(Ok(-1), |offset| i64::try_from(offset).map_err(|_| Errno::INVAL.into()))
}

impl Mapped {
    fn guest_end(&self) -> u64 {
        self.guest_addr.wrapping_add(self.size)
    }

    fn map(region: RegionFile, trust: Trust) -> Result<Mapped, Error> {
        let RegionFile { guest_addr, size, user_addr, offset, fd } = region;
        let range = || Error::Range { guest_addr, size };
        let need = offset.checked_add(size).filter(|_| size > 0).ok_or_else(range)?;
        guest_addr.checked_add(size).ok_or_else(range)?;
        user_addr.checked_add(size).ok_or_else(range)?;
        let block = check_file(&fd, guest_addr, need, trust)?;
        let lead = offset % block;
        let length = usize::try_from(size.checked_add(lead).ok_or_else(range)?).map_err(|_| range())?;
        let mapping = Pages::map(fd.as_fd(), offset - lead, length);
        let mapping = mapping.map_err(|source| Error::Map { guest_addr, source })?;
        Ok(Mapped { guest_addr, user_addr, size, lead, mapping })
    }
}

/// A shared mapping of a file. It does not keep the file's descriptor: a table may have more regions than the process may have
/// descriptors.
#[derive(Debug)]
struct Pages(MmapRegion);

impl Pages {
    fn map(fd: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Pages> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: the kernel chooses the address, so no mapping that exists is replaced.
        let addr = unsafe { mmap(ptr::null_mut(), length, prot, flags, fd, offset) }?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: `addr` is a mapping of `length` bytes, readable and writable, that nobody else knows and that is only removed
        // when this value is dropped.
        let region = unsafe { MmapRegion::build_raw(addr.cast(), length, prot, flags) };
        region.map(Pages).map_err(io::Error::other)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and every pointer into it is made of a borrow of this value.
        let _cannot_fail = unsafe { munmap(self.0.as_ptr().cast(), self.0.size()) };
    }
}

/// Looks at a file before it is mapped. Returns the alignment its mapping needs.
fn check_file(fd: &OwnedFd, guest_addr: u64, need: u64, trust: Trust) -> Result<u64, Error> {
    let map = |errno: Errno| Error::Map { guest_addr, source: errno.into() };
    let stat = fstat(fd).map_err(map)?;
    let have = u64::try_from(stat.st_size).unwrap_or_default();
    if have < need {
        return Err(Error::TooShort { guest_addr, have, need });
    }
    let sealed = fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    if !sealed && trust == Trust::Sealed {
        return Err(Error::Unsealed(guest_addr));
    }
    // Huge pages show as the block size of the file.
    Ok(u64::try_from(stat.st_blksize).unwrap_or(4096).max(4096))
}

/// A shared memory file of `size` bytes that can neither shrink nor grow, nor be sealed any further: a peer that adds a seal of
/// its own could keep the next process from mapping it.
///
/// # Errors
/// The system's.
pub fn sealed_memfd(name: &str, size: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, size)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Turns every byte of a shared memory file to zero and gives its pages back.
///
/// # Errors
/// The system's.
pub fn clear_memfd(fd: BorrowedFd<'_>) -> io::Result<()> {
    let size = u64::try_from(fstat(fd)?.st_size).unwrap_or_default();
    Ok(fallocate(fd.as_fd(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, size)?)
}

#[cfg(test)]
pub(crate) mod tests;
