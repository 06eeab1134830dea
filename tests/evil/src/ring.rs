//! What is done to rings, event descriptors and memory. Memory is read and written as a file.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, OFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_getfl, fcntl_setfl, ftruncate};
use rustix::io::{pread, pwrite};
use vhost_user::wire::Message;

use crate::backend::index;
use crate::behaviour::Act;

const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;

/// What is written into a buffer of the guest's.
const BYTES: [u8; 64] = *b"not so random bytes, but bytes, which is what a test asks for...";

struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
    fd: OwnedFd,
}

#[derive(Default)]
pub(crate) struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

impl Ring {
    /// Rings at most.
    pub(crate) const MOST: usize = 4;
}

/// All rings, and the memory they are in.
#[derive(Default)]
pub(crate) struct Rings {
    regions: Vec<Region>,
    rings: [Ring; Ring::MOST],
}

impl Rings {
    /// Takes regions in, from either of the two requests; and does to them what the act is.
    pub(crate) fn memory(&mut self, message: &mut Message, act: Act) {
        let word = |bytes: &[u8], at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
        let body = message.body.clone();
        for (entry, fd) in body.get(8..).unwrap_or_default().chunks_exact(32).zip(message.fds.drain(..)) {
            if act == Act::Memory {
                let _refused = ftruncate(&fd, 0);
                let _refused = ftruncate(&fd, 1 << 40);
                for seal in [SealFlags::FUTURE_WRITE, SealFlags::WRITE, SealFlags::SHRINK, SealFlags::SEAL] {
                    let _refused = fcntl_add_seals(&fd, seal);
                }
            }
            let (guest, size, user, offset) = (word(entry, 0), word(entry, 8), word(entry, 16), word(entry, 24));
            self.regions.push(Region { guest, size, user, offset, fd });
        }
    }

    /// Takes in what a request says of a ring.
    pub(crate) fn learn(&mut self, message: &mut Message, act: Act) {
        let Some(ring) = index(message).and_then(|index| self.rings.get_mut(index)) else { return };
        let body = &message.body;
        let word = |at: usize| body.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
        let half = || u16::try_from(word(0) >> 32 & 0xffff).unwrap_or(0);
        match message.request {
            SET_VRING_NUM => ring.size = half(),
            SET_VRING_BASE => ring.next = half(),
            SET_VRING_ADDR => (ring.desc, ring.used, ring.avail) = (word(8), word(16), word(24)),
            SET_VRING_KICK => ring.kick = spoil(message.fds.pop(), message.request, act),
            SET_VRING_CALL => ring.call = spoil(message.fds.pop(), message.request, act),
            SET_VRING_ERR => ring.error = spoil(message.fds.pop(), message.request, act),
            _ => {}
        }
    }

    /// The answer to `GET_VRING_BASE`; the ring is left alone from here on.
    pub(crate) fn stop(&mut self, message: &Message) -> Vec<u8> {
        let mut body = message.body.clone();
        if let Some(ring) = index(message).and_then(|index| self.rings.get_mut(index)) {
            body.truncate(4);
            body.extend_from_slice(&u32::from(ring.next).to_ne_bytes());
            *ring = Ring::default();
        }
        body
    }

    /// Fills what the guest asks to be filled, as an entropy source does.
    pub(crate) fn serve(&mut self, act: Act) {
        for ring in &mut self.rings {
            if ring.kick.is_none() || ring.size == 0 || act == Act::Used {
                continue;
            }
            let regions = &self.regions;
            let get = |at: u64| -> u16 {
                let mut bytes = [0; 2];
                at_user(regions, at).map(|(file, at)| pread(&file, &mut bytes, at));
                u16::from_le_bytes(bytes)
            };
            let mut served = 0;
            while get(ring.avail + 2) != ring.next && served < ring.size {
                let slot = u64::from(ring.next % ring.size);
                let head = get(ring.avail + 4 + 2 * slot);
                let len = fill(regions, ring.desc + 16 * u64::from(head));
                let element = [u32::from(head), len].map(u32::to_le_bytes).concat();
                put(regions, ring.used + 4 + 8 * slot, &element);
                ring.next = ring.next.wrapping_add(1);
                put(regions, ring.used + 2, &ring.next.to_le_bytes());
                // Every kick is wanted: the event index follows.
                put(regions, ring.used + 4 + 8 * u64::from(ring.size), &ring.next.to_le_bytes());
                served += 1;
            }
            if served > 0 {
                signal(ring.call.as_ref());
            }
        }
    }

    /// What is done without end.
    pub(crate) fn storm(&mut self, act: Act) {
        for ring in self.rings.iter().filter(|ring| ring.kick.is_some()) {
            match act {
                Act::Interrupts => (0..1000).for_each(|_| signal(ring.call.as_ref())),
                Act::Errors => (0..1000).for_each(|_| signal(ring.error.as_ref())),
                Act::Used => {
                    put(&self.regions, ring.used + 4, &[0xa5; 64]);
                    put(&self.regions, ring.used + 2, &ring.next.wrapping_add(0x1234).to_le_bytes());
                    signal(ring.call.as_ref());
                }
                Act::Memory => {
                    // What nobody can forbid: a hole is the same as zeroes, and only the used ring's are written here.
                    if let Some((file, at)) = at_user(&self.regions, ring.used) {
                        let _refused = fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, 4);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Makes a descriptor block for everybody who has it: a kick that is full, so that it cannot be written; others that are empty, so
/// that they cannot be read.
fn spoil(fd: Option<OwnedFd>, request: u32, act: Act) -> Option<OwnedFd> {
    let fd = fd?;
    if act != Act::Blocking {
        return Some(fd);
    }
    let _empty = rustix::io::read(&fd, &mut [0; 8]);
    if request == SET_VRING_KICK {
        let _full = rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes());
    }
    if let Ok(flags) = fcntl_getfl(&fd) {
        let _done = fcntl_setfl(&fd, flags - OFlags::NONBLOCK);
    }
    None
}

fn signal(fd: Option<&OwnedFd>) {
    if let Some(fd) = fd {
        let _full = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}

fn at_user(regions: &[Region], user: u64) -> Option<(File, u64)> {
    find(regions, user, |region| region.user)
}

fn find(regions: &[Region], at: u64, base: impl Fn(&Region) -> u64) -> Option<(File, u64)> {
    let region = regions.iter().find(|region| at.checked_sub(base(region)).is_some_and(|inside| inside < region.size))?;
    let fd = region.fd.as_fd().try_clone_to_owned().ok()?;
    Some((File::from(fd), region.offset + (at - base(region))))
}

fn put(regions: &[Region], user: u64, bytes: &[u8]) {
    if let Some((file, at)) = at_user(regions, user) {
        let _outside = pwrite(&file, bytes, at);
    }
}

/// Writes into the first buffer of a chain; gives the number of bytes.
fn fill(regions: &[Region], desc: u64) -> u32 {
    let mut bytes = [0; 16];
    let Some((file, at)) = at_user(regions, desc) else { return 0 };
    let _short = pread(&file, &mut bytes, at);
    let addr = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
    let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default()).min(64);
    let Some((file, at)) = find(regions, addr, |region| region.guest) else { return 0 };
    let _outside = pwrite(&file, BYTES.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default(), at);
    len
}
