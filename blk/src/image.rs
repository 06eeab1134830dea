//! The host resource: a raw image file, or a block device.
//!
//! All I/O is positional and goes through the page cache, on the thread of the queue that asks for it: that is the fastest way
//! where the data is in memory, and the queue's own time where it is not.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, fallocate, open, seek};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use sandbox::lock_file;

use crate::args::Config;
use crate::direct::Alignment;
use crate::request::{Range, SECTOR};
use crate::shared::Abilities;
use crate::topology::{self, Topology};

/// How long a lock is waited for: a predecessor that was killed may still be on its way out.
const LOCK_TRIES: u32 = 100;
const LOCK_WAIT: Duration = Duration::from_millis(10);

/// Zeroes for files whose file system cannot zero a range by itself.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: Arc<OwnedFd>,
    bytes: u64,
    topology: Topology,
    direct: Option<Alignment>,
    abilities: Abilities,
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
        if config.direct {
            flags |= OFlags::DIRECT;
        }
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
        let direct = config.direct.then(|| topology::alignment(&file));
        let topology = topology::of(&file, device, config.direct);
        let lifetime = if device { topology::lifetime(&file) } else { None };
        let abilities = Abilities { read_only: config.read_only, secure_erase: false, lifetime };
        Ok(Image { file: Arc::new(file), bytes, topology, direct, abilities })
    }

    /// The open file.
    pub fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.file)
    }

    /// Its bytes, a multiple of a sector.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sizes of its blocks.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Data moves past the page cache, if it is so aligned.
    pub fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    /// What can be done with it.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// The guest may not write.
    pub fn read_only(&self) -> bool {
        self.abilities.read_only
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
