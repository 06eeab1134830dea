//! The driver's side of a split virtqueue (virtio 1.3, 2.7), written from the specification.

use std::sync::atomic::{Ordering, fence};

use anyhow::{Result, bail};
use vhost_user::Ring as Place;

use crate::memory::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

/// What the device gave back.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// The head that [`Ring::submit`] returned.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A split ring.
#[derive(Debug)]
pub struct Ring {
    place: Place,
    event_idx: bool,
    indirect: Option<u64>,
    free: Vec<u16>,
    /// For each head that is out: its descriptors.
    out: Vec<Option<Vec<u16>>>,
    next_avail: u16,
    kicked: u16,
    last_used: u16,
}

impl Ring {
    /// Lays a ring of `size` out in `memory`. With `indirect`, each request is put into a table of its own.
    ///
    /// # Errors
    /// When there is no room.
    pub fn new(memory: &mut Memory, index: u16, size: u16, event_idx: bool, indirect: bool) -> Result<Ring> {
        let entries = u64::from(size);
        let part = u64::from(index);
        let desc = memory.take(16 * entries, 16, part)?;
        let avail = memory.take(6 + 2 * entries, 2, part + 1)?;
        let used = memory.take(6 + 8 * entries, 4, part)?;
        for (at, len) in [(desc, 16 * entries), (avail, 6 + 2 * entries), (used, 6 + 8 * entries)] {
            memory.write(at, &vec![0; usize::try_from(len)?]);
        }
        // Each head has a table as long as the ring.
        let indirect = if indirect { Some(memory.take(16 * entries * entries, 16, part + 1)?) } else { None };
        let place = Place { index, size, desc, avail, used };
        let free = (0..size).rev().collect();
        let out = vec![None; usize::from(size)];
        Ok(Ring { place, event_idx, indirect, free, out, next_avail: 0, kicked: 0, last_used: 0 })
    }

    /// Where it lies, for the backend.
    pub fn place(&self) -> Place {
        self.place
    }

    /// How many requests are out.
    pub fn outstanding(&self) -> usize {
        self.out.iter().flatten().count()
    }

    /// Puts a request into the ring; `None` if there is no room. The device is told by [`Ring::needs_kick`].
    pub fn submit(&mut self, memory: &Memory, buffers: &[Buffer]) -> Option<u16> {
        let head = self.prepare(memory, buffers)?;
        self.offer(memory, head);
        Some(head)
    }

    /// Lays a request out without offering it; `None` if there is no room.
    pub fn prepare(&mut self, memory: &Memory, buffers: &[Buffer]) -> Option<u16> {
        let descriptors = if self.indirect.is_some() { 1 } else { buffers.len() };
        if self.free.len() < descriptors || buffers.is_empty() {
            return None;
        }
        let taken: Vec<u16> = self.free.split_off(self.free.len() - descriptors);
        let head = *taken.first()?;
        match self.indirect {
            Some(tables) => {
                let bytes = 16 * u64::from(self.place.size);
                let table = tables + u64::from(head) * bytes;
                let inside: Vec<u16> = (0..u16::try_from(buffers.len()).ok()?).collect();
                chain(memory, table, &inside, buffers);
                let len = 16 * u32::try_from(buffers.len()).ok()?;
                put(memory, self.place.desc, head, table, len, INDIRECT, 0);
            }
            None => chain(memory, self.place.desc, &taken, buffers),
        }
        *self.out.get_mut(usize::from(head))? = Some(taken);
        Some(head)
    }

    /// Offers a request that is laid out: for the first time, or again after [`Ring::used`].
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let slot = u64::from(self.next_avail % self.place.size);
        memory.store(self.place.avail + 4 + 2 * slot, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        memory.store(self.place.avail + 2, self.next_avail, Ordering::Release);
    }

    /// Whether the device wants to be told of what was put in since the last time.
    pub fn needs_kick(&mut self, memory: &Memory) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (std::mem::replace(&mut self.kicked, self.next_avail), self.next_avail);
        if old == new {
            return false;
        }
        if self.event_idx {
            let event = memory.load(self.place.used + 4 + 8 * u64::from(self.place.size), Ordering::Relaxed);
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        memory.load(self.place.used, Ordering::Relaxed) & 1 == 0
    }

    /// Takes the next completion. An error is a broken promise of the device: a head that was not out (given back twice, or
    /// never given).
    ///
    /// # Errors
    /// See above.
    pub fn completion(&mut self, memory: &Memory) -> Result<Option<Used>> {
        let Some(used) = self.used(memory)? else { return Ok(None) };
        let descriptors = self.out.get_mut(usize::from(used.head)).and_then(Option::take);
        let Some(descriptors) = descriptors else { bail!("descriptor {} was given back without being out", used.head) };
        self.free.extend(descriptors);
        Ok(Some(used))
    }

    /// Takes the next completion of a request that stays laid out, to be offered again.
    ///
    /// # Errors
    /// An index or a head that cannot be.
    pub fn used(&mut self, memory: &Memory) -> Result<Option<Used>> {
        let index = memory.load(self.place.used + 2, Ordering::Acquire);
        if index == self.last_used {
            return Ok(None);
        }
        if index.wrapping_sub(self.last_used) > self.place.size {
            bail!("the used index jumped from {} to {index}", self.last_used);
        }
        let at = self.place.used + 4 + 8 * u64::from(self.last_used % self.place.size);
        let mut element = [0; 8];
        memory.read(at, &mut element);
        let [a, b, c, d, e, f, g, h] = element;
        let (id, len) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        self.last_used = self.last_used.wrapping_add(1);
        let Some(head) = u16::try_from(id).ok().filter(|head| *head < self.place.size) else {
            bail!("descriptor {id} was given back without being out")
        };
        Ok(Some(Used { head, len }))
    }

    /// Asks to be interrupted for the next completion. `true`: there is one already, do not wait.
    pub fn arm(&mut self, memory: &Memory) -> bool {
        if self.event_idx {
            memory.store(self.place.avail + 4 + 2 * u64::from(self.place.size), self.last_used, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        memory.load(self.place.used + 2, Ordering::Acquire) != self.last_used
    }

    /// The used index, as a frontend reads it for a backend without an in-flight log.
    pub fn used_index(memory: &Memory, used: u64) -> u16 {
        memory.load(used + 2, Ordering::Acquire)
    }
}

fn chain(memory: &Memory, table: u64, indices: &[u16], buffers: &[Buffer]) {
    for (step, (index, buffer)) in indices.iter().zip(buffers).enumerate() {
        let next = indices.get(step + 1);
        let flags = if buffer.write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        put(memory, table, *index, buffer.addr, buffer.len, flags, next.copied().unwrap_or(0));
    }
}

fn put(memory: &Memory, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    for (at, part) in
        [(0, &addr.to_le_bytes()[..]), (8, &len.to_le_bytes()), (12, &flags.to_le_bytes()), (14, &next.to_le_bytes())]
    {
        if let Some(place) = bytes.get_mut(at..at + part.len()) {
            place.copy_from_slice(part);
        }
    }
    memory.write(table + 16 * u64::from(index), &bytes);
}
