//! The attacker's guest memory, written with plain file writes: no rule about rings is kept here unless a case wants it.
//!
//! Two regions that touch in guest addresses and nowhere else: what crosses the border between them lies in two places.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::foe::words;

/// Bytes of each of the two regions.
pub(super) const HALF: u64 = 0x8_0000;
/// Guest address of the first.
pub(super) const BASE: u64 = 0x4000_0000;
/// The first address behind both.
pub(super) const END: u64 = BASE + 2 * HALF;
/// The frontend's addresses of the two.
pub(super) const USER: [u64; 2] = [0x10_0000_0000, 0x7100_0000_0000];

/// Descriptors of the ring.
pub(super) const SIZE: u16 = 16;

/// Where things are, from [`BASE`]: the ring, an indirect table, buffers.
pub(super) const DESC: u64 = BASE + 0x1000;
pub(super) const AVAIL: u64 = BASE + 0x2000;
pub(super) const USED: u64 = BASE + 0x3000;
pub(super) const TABLE: u64 = BASE + 0x10000;
pub(super) const DATA: u64 = BASE + 0x40000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Desc {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// Shorthand.
pub(super) fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// A memory file that cannot shrink.
pub(super) fn sealed(size: u64) -> Result<OwnedFd> {
    let fd = unsealed(size)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).context("Cannot seal memory")?;
    Ok(fd)
}

/// A memory file that can.
pub(super) fn unsealed(size: u64) -> Result<OwnedFd> {
    let fd = memfd_create("foe", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).context("Cannot make memory")?;
    ftruncate(&fd, size).context("Cannot size memory")?;
    Ok(fd)
}

/// The memory and the driver's side of one ring in it.
pub(super) struct Guest {
    pub(super) fd: OwnedFd,
    avail: u16,
    head: u16,
}

impl Guest {
    pub(super) fn new() -> Result<Guest> {
        Ok(Guest { fd: sealed(2 * HALF)?, avail: 0, head: 0 })
    }

    /// The two regions as the body of `SET_MEM_TABLE`, and its descriptors.
    pub(super) fn table(&self) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
        // The second region comes first in the file.
        let first = [BASE, HALF, USER[0], HALF];
        let second = [BASE + HALF, HALF, USER[1], 0];
        (table(&[first, second]), vec![self.fd.as_fd(), self.fd.as_fd()])
    }

    /// The ring's addresses as the body of `SET_VRING_ADDR`.
    pub(super) fn addresses(&self, ring: u32) -> Vec<u8> {
        addresses(ring, user(DESC), user(USED), user(AVAIL))
    }

    /// Writes anywhere in guest memory.
    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        for (step, byte) in bytes.chunks(2).enumerate() {
            let at = file_offset(at + 2 * step as u64);
            let _outside_is_the_case_s_own_affair = rustix::io::pwrite(&self.fd, byte, at);
        }
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        let _all_zeroes = rustix::io::pread(&self.fd, &mut bytes, file_offset(at));
        u16::from_le_bytes(bytes)
    }

    /// Writes entry `index` of the descriptor table at `table`.
    pub(super) fn describe(&self, table: u64, index: u16, desc: Desc) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        let _whole = rustix::io::pwrite(&self.fd, &bytes, file_offset(table + 16 * u64::from(index)));
    }

    /// Writes an ordinary chain into descriptors not used last, and gives its head.
    pub(super) fn chain(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        // The upper half of the table: the lower one is the attack's.
        let count = u16::try_from(buffers.len()).unwrap_or(1);
        let start = SIZE / 2;
        self.head = if self.head < start || self.head + 2 * count > SIZE { start } else { self.head + count };
        for (step, (addr, len, write)) in (0..count).zip(buffers) {
            let flags = if *write { WRITE } else { 0 } | if step + 1 < count { NEXT } else { 0 };
            self.describe(DESC, self.head + step, desc(*addr, *len, flags, self.head + step + 1));
        }
        self.head
    }

    /// Makes a head available.
    pub(super) fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, &self.avail.to_le_bytes());
    }

    /// Makes the available index any number.
    pub(super) fn jump(&mut self, index: u16) {
        self.avail = index;
        self.put(AVAIL + 2, &index.to_le_bytes());
    }

    /// Where the available index is.
    pub(super) fn available(&self) -> u16 {
        self.avail
    }

    /// Forgets what was offered: the ring is to begin anew.
    pub(super) fn rewind(&mut self) {
        (self.avail, self.head) = (0, 0);
        for at in [DESC, AVAIL, USED] {
            let _whole = rustix::io::pwrite(&self.fd, &[0; 0x400], file_offset(at));
        }
    }

    /// The used index.
    pub(super) fn used(&self) -> u16 {
        self.get(USED + 2)
    }
}

/// The frontend's address of a guest address.
pub(super) fn user(at: u64) -> u64 {
    if at < BASE + HALF { at - BASE + USER[0] } else { at - BASE - HALF + USER[1] }
}

fn file_offset(at: u64) -> u64 {
    if at < BASE + HALF { at - BASE + HALF } else { at - BASE - HALF }
}

/// A memory table of regions, each guest address, size, user address, offset.
pub(super) fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = words(&[regions.len() as u64]);
    regions.iter().for_each(|region| body.extend(words(region)));
    body
}

/// The body of `SET_VRING_ADDR`.
pub(super) fn addresses(ring: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    words(&[u64::from(ring), desc, used, avail, 0])
}
