//! The probe's guest memory.
//!
//! Three regions in one sealed memfd: none begins at 0, none at a round number, two touch each other and one lies behind a hole. The
//! place of a region in the file has nothing to do with its address.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, anyhow};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost_user::Region;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const PAGE: u64 = 4096;

/// Guest addresses and the part of the memory that lies there, in sixteenths. The first two touch.
const LAYOUT: [(u64, u64); 3] = [(0x1_2345_7000, 3), (0, 5), (0x7f_0000_3000, 8)];

/// Guest memory, and a simple allocator over it.
#[derive(Debug)]
pub struct Memory {
    map: GuestMemoryMmap,
    regions: Vec<Region>,
    free: Vec<(u64, u64)>,
}

impl Memory {
    /// About `size` bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn new(size: u64) -> Result<Memory> {
        let part = (size / 16).next_multiple_of(PAGE).max(16 * PAGE);
        let lead = 3 * PAGE;
        let total = lead + 16 * part;
        let fd = memfd_create("probe", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).context("Cannot make memory")?;
        ftruncate(&fd, total).context("Cannot make memory")?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).context("Cannot seal memory")?;
        let fd = Arc::new(fd);
        // The last region comes first in the file.
        let mut offset = total;
        let mut regions = Vec::new();
        let mut next = 0;
        for (address, parts) in LAYOUT {
            let (guest_addr, size) = (if address == 0 { next } else { address }, parts * part);
            next = guest_addr + size;
            offset -= size;
            regions.push(Region { guest_addr, size, fd: Arc::clone(&fd), offset });
        }
        let mapped = regions.iter().map(map).collect::<Result<Vec<_>>>()?;
        let map = GuestMemoryMmap::from_regions(mapped).context("Cannot lay out memory")?;
        let [first, second, third] = regions.as_slice() else { return Err(anyhow!("Three regions are laid out")) };
        let free = vec![(first.guest_addr, first.size + second.size), (third.guest_addr, third.size)];
        Ok(Memory { map, regions, free })
    }

    /// The regions, for the backend.
    pub fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    /// Takes `size` bytes, aligned to `align`, from where `place` (any number) says: a hole on each side of most.
    ///
    /// # Errors
    /// When there is no room.
    pub fn take(&mut self, size: u64, align: u64, place: u64) -> Result<u64> {
        let count = self.free.len();
        for step in 0..count {
            let index = (usize::try_from(place).unwrap_or(0) + step) % count;
            let Some((start, len)) = self.free.get_mut(index) else { continue };
            let at = start.next_multiple_of(align);
            let end = at + size;
            if end <= *start + *len {
                *len -= end - *start;
                *start = end;
                return Ok(at);
            }
        }
        Err(anyhow!("The probe's memory is too small for this ring and queue depth"))
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(at)).expect("the probe's own addresses are in its memory");
    }

    /// Reads bytes.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        self.map.read_slice(bytes, GuestAddress(at)).expect("the probe's own addresses are in its memory");
    }

    /// The same memory for another thread, which writes while the backend reads.
    pub fn view(&self) -> View {
        View(self.map.clone())
    }

    /// Stores a number the backend reads at the same time.
    pub fn store(&self, at: u64, value: u16, order: Ordering) {
        self.map.store(value.to_le(), GuestAddress(at), order).expect("the probe's own addresses are in its memory");
    }

    /// Loads a number the backend writes at the same time.
    pub fn load(&self, at: u64, order: Ordering) -> u16 {
        let value: u16 = self.map.load(GuestAddress(at), order).expect("the probe's own addresses are in its memory");
        u16::from_le(value)
    }
}

/// Guest memory as another thread of the guest has it.
#[derive(Clone, Debug)]
pub struct View(GuestMemoryMmap);

impl View {
    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.0.write_slice(bytes, GuestAddress(at)).expect("the probe's own addresses are in its memory");
    }
}

fn map(region: &Region) -> Result<GuestRegionMmap> {
    let fd: OwnedFd = region.fd.try_clone().context("Cannot map memory")?;
    let size = usize::try_from(region.size)?;
    let file = FileOffset::new(File::from(fd), region.offset);
    let mapping = MmapRegion::build(Some(file), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)?;
    GuestRegionMmap::new(mapping, GuestAddress(region.guest_addr)).context("Cannot place memory")
}
