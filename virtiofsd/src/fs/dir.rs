//! Requests that read directories.
//!
//! A place in a directory is whatever the file system says it is: the guest is given it with each entry, and gives it back. A handle
//! remembers where it is, so that a guest that reads on needs no seek.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use crate::abi::init;
use crate::fs::{Done, Io, Outcome, Share, Thread};
use crate::reply::Dirents;
use crate::request::Name;

/// A place that no directory is at: it is not known where the descriptor is.
pub(super) const UNKNOWN: u64 = u64::MAX;

/// The same; and the places that the guest has are of another directory, on the host that it came from.
pub(super) const FOREIGN: u64 = u64::MAX - 1;

/// Bytes of names that are asked for with so many bytes to be told: with what is known of each, an entry is at least five times as long.
const SHARE_OF_NAMES: usize = 5;

/// The least that is asked for: the longest name has to fit.
const LEAST: usize = 512;

/// What a directory is read with.
struct Reading<'a> {
    node: u64,
    dir: Arc<OwnedFd>,
    file: &'a OwnedFd,
    plus: bool,
}

impl Share {
    pub(super) fn read_dir(
        &self,
        thread: &mut Thread,
        (node, number): (u64, u64),
        (offset, size, plus): (u64, u32, bool),
        io: Io<'_>,
    ) -> Outcome {
        let dir = self.tree.directory(node)?;
        if number == 0 && self.agreed(init::NO_OPENDIR_SUPPORT) {
            let file = self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let reading = Reading { node, dir, file: &file, plus };
            return self.read_entries(thread, &reading, &mut UNKNOWN.clone(), offset, size, io);
        }
        let handle = self.tree.handles.get(number, node)?;
        let mut cursor = handle.cursor.as_ref().ok_or(Errno::NOTDIR)?.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = Reading { node, dir, file: &handle.file, plus };
        self.read_entries(thread, &reading, &mut cursor, offset, size, io)
    }

    fn read_entries(
        &self,
        thread: &mut Thread,
        reading: &Reading<'_>,
        cursor: &mut u64,
        offset: u64,
        size: u32,
        io: Io<'_>,
    ) -> Outcome {
        if *cursor == FOREIGN && offset != 0 {
            // To read on somewhere would leave names out, and nobody would know.
            return Err(Errno::STALE);
        }
        if *cursor != offset {
            seek(reading.file, SeekFrom::Start(offset))?;
        }
        *cursor = UNKNOWN;
        let room = thread.told(usize::try_from(size.min(io.room.len())).unwrap_or_default()).len();
        let told = thread.told.get_mut(..room).unwrap_or_default();
        let heard = thread.heard.spare_capacity_mut();
        let names = if reading.plus { room / SHARE_OF_NAMES } else { room };
        let names = names.clamp(LEAST, heard.len());
        let mut entries = Dirents::new(told, size);
        let end = self.pack(reading, heard.get_mut(..names).unwrap_or_default(), &mut entries, offset)?;
        *cursor = end.unwrap_or(UNKNOWN);
        let len = entries.len();
        io.room.copy_from(told.get(..len).unwrap_or_default());
        u32::try_from(len).map(Done::Answer).map_err(|_| Errno::OVERFLOW)
    }

    /// Packs entries until there is no more room, or no more entry. Gives where the descriptor is, if that is where the guest is.
    fn pack(
        &self,
        reading: &Reading<'_>,
        heard: &mut [MaybeUninit<u8>],
        entries: &mut Dirents<'_>,
        offset: u64,
    ) -> Result<Option<u64>, Errno> {
        let mut at = offset;
        let mut raw = RawDir::new(reading.file, heard);
        while let Some(entry) = raw.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) if !entries.is_empty() => return Ok(None),
                Err(errno) => return Err(errno),
            };
            let next = entry.next_entry_cookie();
            if !self.pack_one(reading, entries, (entry.ino(), next, kind(entry.file_type())), entry.file_name())? {
                return Ok(None);
            }
            at = next;
        }
        Ok(Some(at))
    }

    fn pack_one(
        &self,
        reading: &Reading<'_>,
        entries: &mut Dirents<'_>,
        (ino, next, kind): (u64, u64, u32),
        file_name: &CStr,
    ) -> Result<bool, Errno> {
        let bytes = file_name.to_bytes();
        if !reading.plus {
            return Ok(entries.push(ino, next, kind, bytes));
        }
        if !entries.has_room(true, bytes.len()) {
            return Ok(false);
        }
        let entry = match Name::new(file_name) {
            // The directory itself and the one above: the guest knows them.
            None => [0; 128],
            Some(name) => match self.enter(reading.node, &reading.dir, name) {
                Ok(entry) => entry,
                // Gone since.
                Err(Errno::NOENT) => return Ok(true),
                // The name is there all the same; the guest asks about it by itself.
                Err(_) => [0; 128],
            },
        };
        Ok(entries.push_plus(&entry, ino, next, kind, bytes))
    }
}

/// As `d_type` has it.
fn kind(kind: FileType) -> u32 {
    kind.as_raw_mode() >> 12 & 15
}
