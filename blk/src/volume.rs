//! Where the bytes of a disk are: one queue's view of the image, in the terms of the queue.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::Arc;

pub use image::Barrier;
use image::{Compressed, Error, FileId, Lookup, Shared};
use sandbox::secure_erase;

use crate::engine::File;
use crate::image::Disk;
use crate::request::Range;

/// Somebody has a range alone, and may be waiting for this queue.
#[derive(Clone, Copy, Debug)]
pub struct Busy;

/// Keeps others from having a range alone.
pub type Guard = Shared;

/// Where a piece of the disk is.
#[derive(Debug)]
pub enum Place {
    /// In a file, at this byte.
    File(File, u64),
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In a compressed cluster.
    Compressed(Compressed),
    /// On a disk that keeps nothing.
    Nothing,
}

/// What makes a flush.
#[derive(Debug)]
pub enum Flush {
    /// Nothing more.
    Done,
    /// A sync of the top file, and then perhaps [`Volume::settle`].
    Sync(Option<Barrier>),
}

/// One queue's view of an image.
#[derive(Debug)]
pub struct Volume {
    disk: Arc<Disk>,
    lookup: Lookup,
    /// Files that were met, the last first: there are one or two in most images.
    files: Vec<(FileId, File)>,
    epoch: u64,
}

impl Volume {
    /// Of this disk.
    pub fn new(disk: Arc<Disk>) -> Volume {
        let lookup = disk.image().lookup();
        Volume { epoch: disk.epoch(), disk, lookup, files: Vec::new() }
    }

    /// The file that a flush has to reach, where a flush is nothing else.
    pub fn top(&mut self) -> Option<File> {
        let top = self.lookup.image().top_file().ok()?;
        self.file(top).ok()
    }

    /// Data and tables have a file each, so a sync of one is not enough.
    pub fn is_in_two_files(&self) -> bool {
        self.disk.is_in_two_files()
    }

    fn file(&mut self, id: FileId) -> io::Result<File> {
        if let Some((_, file)) = self.files.iter().find(|(one, _)| *one == id) {
            return Ok(file.clone());
        }
        let file = self.disk.file(id).ok_or(ErrorKind::NotFound)?;
        self.files.push((id, file.clone()));
        Ok(file)
    }

    /// Enters a range, together with others.
    ///
    /// # Errors
    /// [`Busy`]: let go of all ranges and claims, then ask again.
    pub fn share(&mut self, offset: u64, len: u64) -> Result<Guard, Busy> {
        let epoch = self.disk.epoch();
        if epoch != self.epoch {
            (self.files, self.epoch) = (Vec::new(), epoch);
        }
        self.lookup.share(offset, len).map_err(|_| Busy)
    }

    /// Where the first bytes of a range are, and how many of them are there together.
    ///
    /// # Errors
    /// The image's.
    pub fn map_read(&mut self, offset: u64, len: u32) -> io::Result<(u32, Place)> {
        if self.disk.is_null() {
            return Ok((len, Place::Nothing));
        }
        let extent = self.lookup.map_read(offset, len.into()).map_err(told)?;
        let len = u32::try_from(extent.len).unwrap_or(len).min(len);
        let place = match extent.place {
            image::Place::Data { file, offset } => Place::File(self.file(file)?, offset),
            image::Place::Zero => Place::Zero,
            image::Place::Compressed(place) => Place::Compressed(place),
        };
        Ok((len, place))
    }

    /// The bytes of a compressed cluster from there to its end.
    ///
    /// # Errors
    /// The image's.
    pub fn inflate(&mut self, place: Compressed) -> io::Result<&[u8]> {
        self.lookup.inflate(place).map_err(told)
    }

    /// Where the first bytes of a range are to be written, and how many of them go there.
    ///
    /// # Errors
    /// The image's; `ResourceBusy`: let go of all ranges and claims, then ask again.
    pub fn map_write(&mut self, offset: u64, len: u32) -> io::Result<(u32, Place)> {
        if self.disk.is_null() {
            return Ok((len, Place::Nothing));
        }
        let extent = self.lookup.map_write(offset, len.into()).map_err(told)?;
        let len = u32::try_from(extent.len).unwrap_or(len).min(len);
        match extent.place {
            image::Place::Data { file, offset } => Ok((len, Place::File(self.file(file)?, offset))),
            _ => Err(io::Error::other("The image gives no place to write to")),
        }
    }

    /// Whether there are claimed places.
    pub fn has_claims(&self) -> bool {
        self.lookup.is_pending()
    }

    /// Makes claimed places, whose data is written, part of the image.
    ///
    /// # Errors
    /// The image's. The claims are gone.
    pub fn commit(&mut self) -> io::Result<()> {
        self.lookup.commit().map_err(told)
    }

    /// Begins to make what was written last.
    ///
    /// # Errors
    /// The image's.
    pub fn flush(&mut self) -> io::Result<Flush> {
        if self.disk.is_null() || !self.lookup.image().is_writable() {
            return Ok(Flush::Done);
        }
        if self.is_in_two_files() {
            return self.flush_both().map(|()| Flush::Done);
        }
        Ok(Flush::Sync(self.lookup.image().barrier().map_err(told)?))
    }

    /// Makes what was written last, of data and tables in a file each, and waits for it.
    ///
    /// # Errors
    /// The image's.
    pub fn flush_both(&mut self) -> io::Result<()> {
        self.lookup.flush().map_err(told)
    }

    /// The sync that was the rest of a flush is done.
    ///
    /// # Errors
    /// The image's.
    pub fn settle(&mut self, barrier: Barrier) -> io::Result<()> {
        self.lookup.image().settle(barrier).map_err(told)
    }

    /// A sync has failed that the image does not know of: what it makes last from now on would only seem to last.
    pub fn lost(&self) {
        self.lookup.image().lost();
    }

    /// No sync that the image has made itself has failed.
    ///
    /// # Errors
    /// When one has.
    pub fn nothing_lost(&self) -> io::Result<()> {
        self.lookup.image().nothing_lost().map_err(told)
    }

    /// Whether the file system knows the ranges of the disk as ranges of a file: it has no tables.
    pub fn is_plain(&self) -> bool {
        !self.disk.is_null() && !self.disk.has_tables()
    }

    /// The file in which a range of the disk lies as it is. It does so for as long as the range is shared.
    ///
    /// # Errors
    /// The image's.
    pub fn plain(&mut self, offset: u64, len: u64) -> io::Result<Option<File>> {
        let file = self.lookup.plain(offset, len).map_err(told)?;
        file.map(|id| self.file(id)).transpose()
    }

    /// Gives the space of a range back.
    ///
    /// # Errors
    /// The image's.
    pub fn discard(&mut self, range: &Range) -> io::Result<()> {
        if range.len == 0 { Ok(()) } else { self.lookup.discard(range.offset, range.len).map_err(told) }
    }

    /// Erases a range of the device so that nobody finds what was there. What an overlay hides is not erased: whoever has the image below
    /// wants it as it is, and in the overlay there is nothing that a device could erase.
    ///
    /// # Errors
    /// The device's; also when an overlay has come onto it.
    pub fn secure_erase(&mut self, range: &Range) -> io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        let _range = self.share(range.offset, range.len).map_err(|Busy| ErrorKind::ResourceBusy)?;
        let device = self.plain(range.offset, range.len)?.ok_or(ErrorKind::Unsupported)?;
        let erased = secure_erase(device.as_fd(), range.offset, range.len);
        erased.map_err(|error| io::Error::new(error.kind(), format!("Cannot erase a range of the device: {error}")))
    }

    /// Turns a range into zeroes.
    ///
    /// # Errors
    /// The image's.
    pub fn write_zeroes(&mut self, range: &Range) -> io::Result<()> {
        if range.len == 0 { Ok(()) } else { self.lookup.zero(range.offset, range.len, range.unmap).map_err(told) }
    }
}

/// An image's error in the terms of a queue.
fn told(error: Error) -> io::Error {
    match error {
        Error::Busy => ErrorKind::ResourceBusy.into(),
        Error::Io(tried, error) => io::Error::new(error.kind(), format!("{tried}: {error}")),
        other => io::Error::other(other),
    }
}
