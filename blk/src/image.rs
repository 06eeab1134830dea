//! The host resource: a raw image file, or a block device.
//!
//! All I/O is positional and goes through the page cache, on the thread of the queue that asks for it: that is the fastest way
//! where the data is in memory, and the queue's own time where it is not.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, fallocate, fdatasync, open, seek};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use sandbox::lock_file;
use virtio::Buffer;

use crate::args::Config;
use crate::request::{Range, SECTOR};

/// How long a lock is waited for: a predecessor that was killed may still be on its way out.
const LOCK_TRIES: u32 = 100;
const LOCK_WAIT: Duration = Duration::from_millis(10);

/// Zeroes for files whose file system cannot zero a range by itself.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: OwnedFd,
    bytes: u64,
    block_size: u32,
    read_only: bool,
}

impl Image {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// With its path: not there, no right to it, in use, or no image.
    pub fn open(config: &Config) -> Result<Image> {
        let path = config.path.display();
        let metadata = config.path.metadata().with_context(|| format!("Cannot open image {path}"))?;
        let device = metadata.file_type().is_block_device();
        if !device && !metadata.is_file() {
            bail!("Cannot open image {path}: It is neither a file nor a block device");
        }
        let mut flags = OFlags::CLOEXEC | if config.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if device && !config.read_only {
            // A block device that is mounted, or part of something else, is refused by the kernel.
            flags |= OFlags::EXCL;
        }
        let file = open(&config.path, flags, Mode::empty()).with_context(|| format!("Cannot open image {path}"))?;
        lock(&file, config.read_only).with_context(|| format!("Cannot use image {path}"))?;
        let bytes = seek(&file, SeekFrom::End(0)).with_context(|| format!("Cannot find the size of image {path}"))?;
        let bytes = bytes - bytes % SECTOR;
        if bytes == 0 {
            bail!("Cannot use image {path}: It has less than one sector of {SECTOR} bytes");
        }
        let block_size = if device { rustix::fs::ioctl_blksszget(&file).unwrap_or(512) } else { 512 };
        Ok(Image { file, bytes, block_size, read_only: config.read_only })
    }

    /// Another handle of the same image, for another thread.
    ///
    /// # Errors
    /// The system's.
    pub fn share(&self) -> io::Result<Image> {
        Ok(Image { file: self.file.try_clone()?, ..*self })
    }

    /// Its bytes, a multiple of a sector.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a block: what is written in one piece.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// The guest may not write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Reads into the guest.
    ///
    /// # Errors
    /// The system's; `UnexpectedEof` if the file has become shorter.
    pub fn read(&self, offset: u64, data: Buffer<'_>) -> io::Result<()> {
        self.transfer(offset, data, io::ErrorKind::UnexpectedEof, |rest, at| rest.read_from(self.file.as_fd(), Some(at)))
    }

    /// Writes from the guest.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, offset: u64, data: Buffer<'_>) -> io::Result<()> {
        self.transfer(offset, data, io::ErrorKind::WriteZero, |rest, at| rest.write_to(self.file.as_fd(), Some(at)))
    }

    /// Makes completed writes durable.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { Ok(fdatasync(&self.file)?) }
    }

    /// Gives the space of a range back; it reads as zeroes then. Where that cannot be done, nothing happens: a discard is a hint.
    ///
    /// # Errors
    /// The system's.
    pub fn discard(&self, range: &Range) -> io::Result<()> {
        match self.allocate(range, FallocateFlags::PUNCH_HOLE) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Turns a range into zeroes.
    ///
    /// # Errors
    /// The system's.
    pub fn write_zeroes(&self, range: &Range) -> io::Result<()> {
        let how = if range.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(range, how) {
            Err(Errno::OPNOTSUPP) => self.write_zeroes_by_hand(range),
            other => Ok(other?),
        }
    }

    fn allocate(&self, range: &Range, how: FallocateFlags) -> rustix::io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        retry(|| fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, range.offset, range.len))
    }

    fn write_zeroes_by_hand(&self, range: &Range) -> io::Result<()> {
        let (mut at, mut left) = (range.offset, range.len);
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            let zeroes = ZEROES.get(..piece).unwrap_or_default();
            // The call that ordinary writes make, so that the filter needs no other.
            let written = retry(|| pwritev2(&self.file, &[IoSlice::new(zeroes)], at, ReadWriteFlags::empty()))?;
            let put = u64::try_from(written).unwrap_or_default();
            if put == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            (at, left) = (at.saturating_add(put), left.saturating_sub(put));
        }
        Ok(())
    }

    fn transfer(
        &self,
        offset: u64,
        data: Buffer<'_>,
        none: io::ErrorKind,
        step: impl Fn(Buffer<'_>, u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let moved = match step(rest, at) {
                Ok(0) => return Err(none.into()),
                Ok(moved) => u32::try_from(moved).unwrap_or(u32::MAX),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            at = at.saturating_add(moved.into());
            rest = rest.split_at(moved).1;
        }
        Ok(())
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// One writer, or many readers. The lock goes with the process.
fn lock(file: &OwnedFd, read_only: bool) -> Result<()> {
    for _ in 0..LOCK_TRIES {
        match lock_file(file.as_fd(), !read_only) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(LOCK_WAIT),
            Err(error) => return Err(error).context("It cannot be locked"),
        }
    }
    bail!("Another process has it open for writing")
}
