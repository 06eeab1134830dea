//! Where the bytes of a disk are: one queue's view of the image.

use std::io;
use std::sync::Arc;

use crate::engine::File;
use crate::image::Image;
use crate::request::Range;

/// Somebody has a range alone, and may be waiting for this queue.
#[derive(Clone, Copy, Debug)]
pub struct Busy;

/// Keeps others from having a range alone.
#[derive(Debug)]
pub struct Guard;

/// Where a piece of the disk is.
#[derive(Debug)]
pub enum Place {
    /// In a file, at this byte.
    File(File, u64),
    /// Nowhere: it reads as zeroes.
    Zero,
}

/// One queue's view of an image.
#[derive(Debug)]
pub struct Volume {
    image: Arc<Image>,
    file: File,
}

impl Volume {
    /// Of this image.
    pub fn new(image: Arc<Image>) -> Volume {
        let file = File::registered(image.file(), 0);
        Volume { image, file }
    }

    /// The file that a flush has to reach.
    pub fn top(&self) -> Option<File> {
        Some(self.file.clone())
    }

    /// Enters a range, together with others.
    ///
    /// # Errors
    /// [`Busy`]: let go of all ranges and claims, then ask again.
    pub fn share(&mut self, _offset: u64, _len: u32) -> Result<Option<Guard>, Busy> {
        Ok(None)
    }

    /// Where the first bytes of a range are, and how many of them are there together.
    ///
    /// # Errors
    /// The image's.
    pub fn map_read(&mut self, offset: u64, len: u32) -> io::Result<(u32, Place)> {
        Ok((len, Place::File(self.file.clone(), offset)))
    }

    /// Where the first bytes of a range are to be written, how many of them go there, and whether that place is claimed.
    ///
    /// # Errors
    /// The image's; `ResourceBusy`: let go of all ranges and claims, then ask again.
    pub fn map_write(&mut self, offset: u64, len: u32) -> io::Result<(u32, File, u64, bool)> {
        Ok((len, self.file.clone(), offset, false))
    }

    /// Whether there are claimed places.
    pub fn has_claims(&self) -> bool {
        false
    }

    /// Makes claimed places, whose data is written, part of the image.
    ///
    /// # Errors
    /// The image's. The claims are gone.
    pub fn commit(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Prepares for what was written to last. `true`: the top file has to be synced.
    ///
    /// # Errors
    /// The image's.
    pub fn flush(&mut self) -> io::Result<bool> {
        Ok(!self.image.read_only())
    }

    /// Gives the space of a range back.
    ///
    /// # Errors
    /// The image's.
    pub fn discard(&mut self, range: &Range) -> io::Result<()> {
        self.image.discard(range)
    }

    /// Turns a range into zeroes.
    ///
    /// # Errors
    /// The image's.
    pub fn write_zeroes(&mut self, range: &Range) -> io::Result<()> {
        self.image.write_zeroes(range)
    }

    /// Erases a range.
    ///
    /// # Errors
    /// The image's.
    pub fn secure_erase(&mut self, _range: &Range) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
