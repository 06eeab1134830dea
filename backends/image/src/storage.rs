//! One open file below a format. Positional calls only: there is no file offset that two threads could fight over.

use std::fmt::Debug;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, ftruncate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

/// The number of a file, never used twice in a process: an engine that keeps files registered knows them by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u64);

impl FileId {
    /// The next one.
    pub fn new() -> FileId {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        FileId(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// As a number.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl Default for FileId {
    fn default() -> FileId {
        FileId::new()
    }
}

/// One open file.
pub trait Storage: Send + Sync + Debug {
    /// Its number.
    fn id(&self) -> FileId;

    /// Its descriptor, for callers that do I/O by themselves.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Its bytes.
    ///
    /// # Errors
    /// The system's.
    fn len(&self) -> io::Result<u64>;

    /// Reads up to so many bytes; less only at the end.
    ///
    /// # Errors
    /// The system's.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of the bytes.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes all that was written durable. Once that has failed, it fails.
    ///
    /// # Errors
    /// The system's.
    fn sync(&self) -> io::Result<()>;

    /// Turns a range into zeroes and gives its space back, as far as the file system can. It is zeroes afterwards in any case.
    ///
    /// # Errors
    /// The system's.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Turns a range into zeroes and keeps its space.
    ///
    /// # Errors
    /// The system's.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the file longer, with zeroes, or shorter.
    ///
    /// # Errors
    /// The system's.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Somebody else's sync of it has failed, and the system will not say so again.
    fn lost(&self) {}

    /// No sync of it has failed.
    ///
    /// # Errors
    /// When one has.
    fn nothing_lost(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether the length cannot be changed: a block device.
    fn fixed(&self) -> bool {
        false
    }

    /// Whether there is nothing in it.
    ///
    /// # Errors
    /// The system's.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills the whole buffer; what is beyond the end of the file reads as zeroes.
    ///
    /// # Errors
    /// The system's.
    fn read_padded(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let read = self.read_at(buffer, offset)?;
        if let Some(rest) = buffer.get_mut(read..) {
            rest.fill(0);
        }
        Ok(())
    }

    /// Fills the whole buffer, or fails.
    ///
    /// # Errors
    /// The system's, or that the file is too short.
    fn read_exact(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.read_at(buffer, offset)? < buffer.len() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

/// Zeroes for files whose file system cannot zero a range by itself.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A file of the system, or a block device.
#[derive(Debug)]
pub struct FileStorage {
    id: FileId,
    file: OwnedFd,
    fixed: bool,
    volatile: bool,
    /// A sync failed.
    lost: AtomicBool,
}

impl FileStorage {
    /// An open file. Whoever opens it also locks it.
    ///
    /// # Errors
    /// The system's, or that it is neither a file nor a block device.
    pub fn new(file: OwnedFd) -> io::Result<FileStorage> {
        let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
        if kind != FileType::RegularFile && kind != FileType::BlockDevice {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "It is neither a file nor a block device"));
        }
        Ok(FileStorage {
            id: FileId::new(),
            file,
            fixed: kind == FileType::BlockDevice,
            volatile: false,
            lost: AtomicBool::new(false),
        })
    }

    /// The same, with `sync` doing nothing: for what need not outlive this machine's run.
    #[must_use]
    pub fn without_sync(self) -> FileStorage {
        FileStorage { volatile: true, ..self }
    }

    fn zero_by_hand(&self, offset: u64, len: u64) -> io::Result<()> {
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            self.write_at(ZEROES.get(..piece).unwrap_or_default(), at)?;
            (at, left) = (at.saturating_add(piece as u64), left.saturating_sub(piece as u64));
        }
        Ok(())
    }

    fn change(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match retry(|| fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.zero_by_hand(offset, len),
            other => Ok(other?),
        }
    }
}

impl Storage for FileStorage {
    fn id(&self) -> FileId {
        self.id
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn len(&self) -> io::Result<u64> {
        if self.fixed {
            return Ok(seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(u64::try_from(fstat(&self.file)?.st_size).unwrap_or(0))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        read_at(&self.file, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        write_at(&self.file, bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        if self.volatile {
            return Ok(());
        }
        self.nothing_lost()?;
        let done = retry(|| fdatasync(&self.file));
        self.lost.fetch_or(done.is_err(), Ordering::Relaxed);
        Ok(done?)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(FallocateFlags::ZERO_RANGE, offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.fixed {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "A block device cannot change its length"));
        }
        Ok(retry(|| ftruncate(&self.file, len))?)
    }

    fn lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// After a failure the system takes what it could not write for written: a later success would mean nothing.
    fn nothing_lost(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "An earlier attempt to make the file durable failed, and what was lost then is not known",
            ));
        }
        Ok(())
    }

    fn fixed(&self) -> bool {
        self.fixed
    }
}

/// Reads up to so many bytes of a file; less only at its end.
///
/// # Errors
/// The system's.
pub fn read_at(file: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0_usize;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(done as u64);
        match preadv2(&file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::empty()) {
            Ok(0) => break,
            Ok(read) => done = done.saturating_add(read),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

/// Writes all of the bytes to a file.
///
/// # Errors
/// The system's.
pub fn write_at(file: impl AsFd, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0_usize;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(done as u64);
        match pwritev2(&file, &[IoSlice::new(rest)], at, ReadWriteFlags::empty()) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done = done.saturating_add(written),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
