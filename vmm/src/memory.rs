//! Guest memory: one sealed memfd, and where it appears in the guest's address space.
//!
//! The whole of guest RAM is one shared memfd, because every device process maps the same file. It is sealed before
//! anybody else can see it: without SHRINK a backend could cut it short and make the next access of the VMM a SIGBUS,
//! without GROW it could be used to eat the host, and without SEAL a backend could add a seal that keeps its own
//! successor from mapping it.
//!
//! ```text
//! 0            3 GiB      3.5 GiB                      4 GiB                    top of RAM, rounded up to 1 GiB
//! | RAM, first | PCI MMIO | ECAM .. IOAPIC .. LAPIC .. | RAM, the rest          | PCI MMIO, 64 bit
//! ```
//!
//! The mapping is lazy (`MAP_NORESERVE`, no prefault): a page costs the host nothing before the guest touches it, and
//! [`Memory::discard`] gives all of them back at a reset, so that a rebooted guest starts from zeroes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// RAM below 4 GiB ends here at the latest; above it lies what every PC keeps there.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Base addresses below 4 GiB for PCI memory.
pub const MMIO32: Span = Span { start: 0xc000_0000, size: 0x2000_0000 };
/// PCI configuration space, 4 KiB for each function of bus 0.
pub const ECAM: Span = Span { start: 0xe000_0000, size: 0x10_0000 };
/// Three pages that KVM needs on Intel processors without unrestricted guest mode, and one for its identity map.
pub const KVM_PRIVATE: Span = Span { start: 0xfffb_c000, size: 0x4000 };
/// RAM that does not fit below the hole goes on here.
pub const HIGH_RAM_START: u64 = 1 << 32;

const GIB: u64 = 1 << 30;
/// What the 64-bit PCI window may take at most: far more than the BARs of 31 devices need.
const MMIO64_MAX: u64 = 64 * GIB;

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first address.
    pub start: u64,
    /// How many bytes.
    pub size: u64,
}

impl Span {
    /// The first address after it.
    pub const fn end(self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// How far inside the span `addr` lies, if it does.
    pub fn offset_of(self, addr: u64) -> Option<u64> {
        addr.checked_sub(self.start).filter(|&o| o < self.size)
    }
}

/// Why guest memory could not be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel refused a memfd of this size.
    #[error("Cannot create {} MiB of guest memory", .size >> 20)]
    Create {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The memfd could not be mapped.
    #[error("Cannot map {} MiB of guest memory: {reason}", .size >> 20)]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What went wrong.
        reason: String,
    },
    /// Something was to be written where the guest has no RAM.
    #[error("The guest has no {len} bytes of memory at {addr:#x}")]
    Range {
        /// Guest physical address.
        addr: u64,
        /// Length.
        len: u64,
    },
    /// A file could not be read into guest memory.
    #[error("Cannot read into guest memory")]
    Read(#[source] io::Error),
    /// The pages could not be given back at a reset.
    #[error("Cannot clear guest memory")]
    Discard(#[source] Errno),
}

/// Where RAM of this size lies: guest ranges in the order of the memfd.
pub fn ram_ranges(size: u64) -> Vec<Span> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![Span { start: 0, size: low }];
    if size > low {
        ranges.push(Span { start: HIGH_RAM_START, size: size - low });
    }
    ranges
}

/// The PCI window above RAM, or nothing if the processor cannot address any.
pub fn mmio64(ram: u64, physical_bits: u8) -> Option<Span> {
    let top = ram_ranges(ram).last().map_or(HIGH_RAM_START, |r| r.end()).max(HIGH_RAM_START);
    let start = top.checked_next_multiple_of(GIB)?;
    let limit = 1u64.checked_shl(u32::from(physical_bits)).unwrap_or(u64::MAX);
    let size = limit.saturating_sub(start).min(MMIO64_MAX);
    (size >= GIB).then_some(Span { start, size })
}

/// Guest RAM, mapped.
#[derive(Debug)]
pub struct Memory {
    map: GuestMemoryMmap<()>,
    file: Arc<OwnedFd>,
    /// The same memory with a cursor of its own: the one of `file` belongs to every process that was given it.
    cursor: File,
    size: u64,
}

impl Memory {
    /// Creates, seals and maps `size` bytes of guest RAM.
    pub fn new(size: u64) -> Result<Self, Error> {
        let create = |source| Error::Create { size, source };
        let file = rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(create)?;
        rustix::fs::ftruncate(&file, size).map_err(create)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(create)?;
        let cursor = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(Error::Read)?;

        let map_error = |reason: String| Error::Map { size, reason };
        let shared = Arc::new(File::from(file.try_clone().map_err(|e| map_error(e.to_string()))?));
        let mut offset = 0;
        let mut ranges = Vec::new();
        for range in ram_ranges(size) {
            let len = usize::try_from(range.size).map_err(|e| map_error(e.to_string()))?;
            ranges.push((GuestAddress(range.start), len, Some(FileOffset::from_arc(Arc::clone(&shared), offset))));
            offset += range.size;
        }
        let map = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|e| map_error(e.to_string()))?;
        Ok(Self { map, file: Arc::new(file), cursor, size })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The end of the RAM below the hole.
    pub fn low_end(&self) -> u64 {
        self.size.min(LOW_RAM_END)
    }

    /// What a device process is given: the same memfd, region by region.
    pub fn regions(&self) -> Vec<vhost_user::Region> {
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in ram_ranges(self.size) {
            regions.push(vhost_user::Region { guest_addr: range.start, size: range.size, fd: Arc::clone(&self.file), offset });
            offset += range.size;
        }
        regions
    }

    /// Guest ranges with the host address each is mapped at, for KVM's memory slots.
    pub(crate) fn slots(&self) -> Vec<(Span, u64)> {
        let slot =
            |r: &vm_memory::GuestRegionMmap<()>| (Span { start: r.start_addr().0, size: r.len() }, r.get_mmap().as_ptr() as u64);
        self.map.iter().map(slot).collect()
    }

    /// Copies `data` to guest physical address `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), Error> {
        self.map.write_slice(data, GuestAddress(addr)).map_err(|_| Error::Range { addr, len: data.len() as u64 })
    }

    /// Copies from guest physical address `addr`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), Error> {
        let len = data.len() as u64;
        self.map.read_slice(data, GuestAddress(addr)).map_err(|_| Error::Range { addr, len })
    }

    /// Copies `len` bytes at `offset` of `file` to guest physical address `addr`, from one file to the other inside the
    /// host's kernel. Through the mapping it takes twice as long: each page would fault, and be cleared before it is filled.
    pub fn read_file(&self, addr: u64, file: &File, mut offset: u64, len: u64) -> Result<(), Error> {
        let to = self.place(addr, len).ok_or(Error::Range { addr, len })?;
        (&self.cursor).seek(SeekFrom::Start(to)).map_err(Error::Read)?;
        let mut left = usize::try_from(len).map_err(|_| Error::Range { addr, len })?;
        while left > 0 {
            match rustix::fs::sendfile(&self.cursor, file, Some(&mut offset), left) {
                Ok(0) => return Err(Error::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(done) => left = left.saturating_sub(done),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::Read(e.into())),
            }
        }
        Ok(())
    }

    /// Where in the memfd a range lies that is RAM from its beginning to its end.
    fn place(&self, addr: u64, len: u64) -> Option<u64> {
        let mut before = 0u64;
        for range in ram_ranges(self.size) {
            if let Some(inside) = range.offset_of(addr) {
                return (len <= range.size - inside).then(|| before + inside);
            }
            before += range.size;
        }
        None
    }

    /// Gives every page back to the host. The guest reads zeroes afterwards.
    pub fn discard(&self) -> Result<(), Error> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, 0, self.size).map_err(Error::Discard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        assert_eq!(ram_ranges(512 << 20), [Span { start: 0, size: 512 << 20 }]);
        assert_eq!(ram_ranges(LOW_RAM_END).len(), 1);
    }

    #[test]
    fn memory_beyond_three_gib_goes_on_at_four() {
        let ranges = ram_ranges(5 * GIB);
        assert_eq!(ranges, [Span { start: 0, size: 3 * GIB }, Span { start: 4 * GIB, size: 2 * GIB }]);
        assert_eq!(ranges.iter().map(|r| r.size).sum::<u64>(), 5 * GIB);
    }

    #[test]
    fn the_hole_holds_its_tenants_without_overlap() {
        assert_eq!(MMIO32.start, LOW_RAM_END);
        assert!(MMIO32.end() <= ECAM.start);
        assert!(ECAM.end() <= 0xfec0_0000);
        assert!(KVM_PRIVATE.end() <= HIGH_RAM_START);
    }

    #[test]
    fn the_wide_window_lies_above_ram_and_inside_the_processor() {
        let window = mmio64(5 * GIB, 40).unwrap();
        assert_eq!(window.start, 6 * GIB);
        assert!(mmio64(512 << 20, 32).is_none());
        assert!(mmio64(512 << 20, 36).unwrap().end() <= 1 << 36);
    }

    #[test]
    fn a_file_lands_where_it_is_to_be_and_nowhere_else() {
        let path = std::env::temp_dir().join(format!("outboard-memory-{}", std::process::id()));
        std::fs::write(&path, [1, 2, 3, 4, 5]).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        let memory = Memory::new(1 << 20).unwrap();
        memory.read_file(0x1fff, &file, 1, 3).unwrap();
        let mut back = [9; 5];
        memory.read(0x1ffe, &mut back).unwrap();
        assert_eq!(back, [0, 2, 3, 4, 0]);
        assert!(matches!(memory.read_file(0, &file, 3, 3), Err(Error::Read(_))));
        assert!(matches!(memory.read_file((1 << 20) - 2, &file, 0, 3), Err(Error::Range { .. })));
        assert!(matches!(memory.read_file(1 << 20, &file, 0, 1), Err(Error::Range { .. })));
    }

    #[test]
    fn what_lies_above_the_hole_follows_in_the_file_what_lies_below_it() {
        let memory = Memory::new(LOW_RAM_END + GIB).unwrap();
        assert_eq!(memory.place(HIGH_RAM_START, GIB), Some(LOW_RAM_END));
        assert_eq!(memory.place(LOW_RAM_END - 1, 2), None);
        assert_eq!(memory.place(HIGH_RAM_START, GIB + 1), None);
    }

    #[test]
    fn discard_zeroes_and_seals_hold() {
        let memory = Memory::new(2 << 20).unwrap();
        memory.write(0x1000, &[7; 16]).unwrap();
        memory.discard().unwrap();
        let mut back = [1; 16];
        memory.read(0x1000, &mut back).unwrap();
        assert_eq!(back, [0; 16]);
        assert!(rustix::fs::ftruncate(&memory.file, 1 << 20).is_err());
        assert!(memory.write(2 << 20, &[1]).is_err());
    }
}
