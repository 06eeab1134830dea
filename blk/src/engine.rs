//! Who moves the data, where a queue's own thread should not wait for it.
//!
//! # Theory of operation
//!
//! A queue's thread *begins* operations, each under an id of its own choice, hands all it has begun on in one go
//! ([`Engine::submit`]), and later takes the outcomes ([`Engine::next`]) in whatever order they come. It waits for
//! [`Engine::sources`] together with its ring.
//!
//! There are two engines, and what a guest sees is the same with either:
//!
//! - [`split`]: one io_uring per queue ([`uring`]), made before the process is confined, and restricted to reads and writes, so that a
//!   thread that was taken over gets nothing through it that its filter forbids; and a few threads for what a ring is slow to let go of;
//! - [`pool`]: a few threads, where the host forbids io_uring (as distributions and container engines do).
//!
//! Not everything goes through an engine. What is in the page cache is read by the queue's thread itself, and so is written what only
//! has to get there: handing it on costs more than doing it (`docs/performance.md`).
//!
//! # A write that outlives its process
//!
//! A process that is killed is gone before the writes it had given to io_uring are: the kernel finishes them afterwards. Such a write
//! could land on top of one that the successor has made since, and so could zeroes. They cannot, because of the image's lock: it belongs
//! to the *open file*, which those writes hold, so the successor, which locks the image before it serves, gets it when the last of them
//! is done. (A ring that knows files by numbers holds them until it is taken apart, which is some 25 ms after the process; so it is told
//! of none.) `tests/suite` measures just that, on disks that take two seconds for a write, or for zeroes.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use virtio::Buffer;
use virtio::worker::SOURCES;

pub mod pool;
pub mod split;
#[expect(unsafe_code, reason = "the kernel is given addresses of guest memory that outlive the call")]
pub mod uring;

/// A file that data moves to and from.
#[derive(Clone, Debug)]
pub struct File(Arc<OwnedFd>);

impl File {
    /// The file of this descriptor.
    pub fn new(fd: Arc<OwnedFd>) -> File {
        File(fd)
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What can be done to a file.
#[derive(Clone, Copy, Debug)]
pub enum Work<'a> {
    /// File to guest.
    Read {
        /// First byte.
        offset: u64,
        /// Where to.
        data: Buffer<'a>,
    },
    /// Guest to file.
    Write {
        /// First byte.
        offset: u64,
        /// From where.
        data: Buffer<'a>,
    },
    /// Bytes of the file become zeroes.
    Clear {
        /// First byte.
        offset: u64,
        /// How many.
        len: u32,
        /// In which way.
        how: Clear,
    },
    /// What was written is on the disk afterwards.
    Sync,
}

/// How bytes of a file become zeroes. Not every file system can do all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// Their space is given back.
    Punch,
    /// They keep their space.
    Zero,
    /// Zeroes are written, as many as one operation takes. It moves that many bytes.
    Write,
}

impl Clear {
    /// As `fallocate` has it, for what is not written.
    fn mode(self) -> FallocateFlags {
        let how = if self == Clear::Punch { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        how | FallocateFlags::KEEP_SIZE
    }
}

/// What [`Clear::Write`] writes: aligned as a file that is used past the page cache wants it.
#[repr(align(4096))]
struct Zeroes([u8; 64 * 1024]);

static ZEROES: Zeroes = Zeroes([0; 64 * 1024]);

/// Up to so many of them.
fn zeroes(len: u32) -> &'static [u8] {
    let all = &ZEROES.0;
    all.get(..len as usize).unwrap_or(all)
}

/// The outcome of an operation: its id, and the bytes that were moved or what went wrong.
pub type Done = (u64, io::Result<u32>);

/// See the module.
///
/// Whoever begins an operation keeps the memory of its buffer until the operation's outcome was taken. A [`virtio::worker::Slot`]
/// does so for the chain of a request that is not finished.
pub trait Engine: Send + Debug {
    /// Begins an operation. Nothing may happen before [`Engine::submit`].
    ///
    /// # Errors
    /// When it cannot be begun; there is no outcome to come then.
    fn begin(&mut self, id: u64, file: &File, work: Work<'_>) -> io::Result<()>;

    /// Hands on all that was begun.
    fn submit(&mut self);

    /// The outcome of one operation that is done.
    fn next(&mut self) -> Option<Done>;

    /// Waits until there is an outcome, if anything is in flight.
    fn wait(&mut self);

    /// How many operations are begun, with no outcome taken.
    fn in_flight(&self) -> usize;

    /// What becomes readable when there is an outcome, as far as anything is in flight.
    fn sources(&self) -> [Option<BorrowedFd<'_>>; SOURCES];
}
