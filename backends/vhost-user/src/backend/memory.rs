//! The memory table, which stays as it is while a ring runs.
//!
//! Single regions may come and go at any time, as they do with a client that registers its buffers (libblkio) and with memory that is
//! plugged in. The rings then rest for that moment: what was in hand is finished in the old memory, the rest is found in the new.

use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;
use virtio::device::Device;
use virtio::memory::{Memory, RegionFile};

use super::{Answer, Backend, refused};
use crate::wire::{MAX_FDS, Message};
use crate::{Error, Result};

/// Bytes of one region in a message: guest address, size, user address, offset.
const ENTRY: usize = 32;

/// Most regions of one `SET_MEM_TABLE`: as many as descriptors can come with it.
const MAX_ENTRIES: usize = MAX_FDS;

struct Entry {
    guest_addr: u64,
    size: u64,
    user_addr: u64,
    offset: u64,
}

impl Entry {
    fn parse(bytes: &[u8]) -> Option<Entry> {
        let word = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Entry { guest_addr: word(0)?, size: word(8)?, user_addr: word(16)?, offset: word(24)? })
    }
}

impl<D: Device> Backend<D> {
    pub(super) fn set_memory_table(&mut self, message: &mut Message) -> Result<Answer> {
        self.must_be_quiet(FrontendReq::SET_MEM_TABLE)?;
        let count = message.body.get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
        let count = count.and_then(|count| usize::try_from(count).ok()).filter(|count| *count <= MAX_ENTRIES);
        let count = count.ok_or_else(|| Error::Malformed("a memory table of too many regions".to_owned()))?;
        // Some frontends (user-mode Linux) send the structure at its full size, with fewer entries in it.
        let entries = message.body.get(8..8 + count * ENTRY).ok_or_else(|| message.wrong_size(8 + count * ENTRY))?;
        if message.fds.len() != count {
            return Err(Error::Malformed(format!("{count} regions with {} descriptors", message.fds.len())));
        }
        let mut memory = Memory::default();
        for (bytes, fd) in entries.chunks_exact(ENTRY).zip(std::mem::take(&mut message.fds)) {
            let entry = Entry::parse(bytes).ok_or_else(|| message.wrong_size(ENTRY))?;
            let Entry { guest_addr, size, user_addr, offset } = entry;
            memory = memory.with(RegionFile { guest_addr, size, user_addr, offset, fd }, self.trust).map_err(Error::Memory)?;
        }
        self.connection.memory = Arc::new(memory);
        Ok(Answer::Done)
    }

    pub(super) fn add_memory_region(&mut self, message: &mut Message) -> Result<Answer> {
        let Entry { guest_addr, size, user_addr, offset } = single(message)?;
        let fd = message.one_fd()?;
        let region = RegionFile { guest_addr, size, user_addr, offset, fd };
        let memory = self.connection.memory.with(region, self.trust).map_err(Error::Memory)?;
        self.between(|connection| connection.memory = Arc::new(memory))
    }

    /// Frontends may send the region's descriptor along; it is closed with the message.
    pub(super) fn remove_memory_region(&mut self, message: &mut Message) -> Result<Answer> {
        let entry = single(message)?;
        let memory = self.connection.memory.without(entry.guest_addr, entry.size);
        let memory = memory.map_err(|error| refused(FrontendReq::REM_MEM_REG, &error.to_string()))?;
        if !self.connection.rings.all_run_in(&memory) {
            return Err(refused(FrontendReq::REM_MEM_REG, "a ring is running there"));
        }
        self.between(|connection| connection.memory = Arc::new(memory))
    }
}

fn single(message: &Message) -> Result<Entry> {
    let bytes = message.body.get(8..).filter(|bytes| bytes.len() == ENTRY);
    bytes.and_then(Entry::parse).ok_or_else(|| message.wrong_size(8 + ENTRY))
}
