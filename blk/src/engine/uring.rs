//! An io_uring of a queue's own.
//!
//! It is made, with its restrictions, before the process is confined, whose limits leave no room for another. The thread that will use it
//! enables it, before its filter; from then on no other thread can (`SINGLE_ISSUER`). The restrictions cannot be taken back. Operations
//! are finished when the thread enters the kernel anyway, and nothing interrupts it for them (`COOP_TASKRUN`). With `DEFER_TASKRUN` they
//! would be finished only in the ring's own call, and a thread that waits for its ring and its kicks together would not be woken.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use rustix::io::Errno;
use virtio::Buffer;
use virtio::worker::SOURCES;

use crate::engine::{Done, Engine, File, Work};

/// Entries of the submission ring. What does not fit goes to the kernel before the rest.
const ENTRIES: u32 = 256;

/// Outcomes that the completion ring has room for: twice its submissions, as the kernel makes it.
const COMPLETIONS: usize = 512;

/// I/O vectors of what was begun and not yet handed on. The kernel copies them when it takes the operation.
const VECTORS: usize = 2048;

/// Most kernel threads for what would block (ordinary files, then everything else).
pub const WORKERS: u32 = 4;

/// The ring of one queue.
pub struct Uring {
    ring: IoUring,
    vectors: Vec<libc::iovec>,
    /// Outcomes that were taken to make room in the completion ring.
    done: VecDeque<Done>,
    in_flight: usize,
}

// SAFETY: the pointers in `vectors` are those of guest memory, which every thread of the process may use; the ring itself is `Send`.
unsafe impl Send for Uring {}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring that can do nothing but read and write, and not even that before [`Uring::enable`].
    ///
    /// # Errors
    /// When the host has none: forbidden, or too old.
    pub fn new() -> io::Result<Uring> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES)?;
        let submitter = ring.submitter();
        submitter.register_iowq_max_workers(&mut [WORKERS, WORKERS])?;
        let codes = [opcode::Read::CODE, opcode::Readv::CODE, opcode::Write::CODE, opcode::Writev::CODE];
        let mut rules: Vec<Restriction> = codes.into_iter().map(Restriction::sqe_op).collect();
        rules.push(Restriction::sqe_flags_allowed(Flags::empty().bits()));
        submitter.register_restrictions(&mut rules)?;
        Ok(Uring { ring, vectors: Vec::with_capacity(VECTORS), done: VecDeque::new(), in_flight: 0 })
    }

    /// Makes it this thread's, and nobody else's.
    ///
    /// # Errors
    /// The system's.
    pub fn enable(&mut self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    /// The operation as the kernel wants it. `vectors` holds what it points to until it was handed on.
    fn entry(&mut self, file: &File, work: Work<'_>) -> io::Result<Entry> {
        let fd = Fd(file.as_fd().as_raw_fd());
        Ok(match work {
            Work::Read { offset, data } => match self.place(data)? {
                Place::One(at, len) => opcode::Read::new(fd, at, len).offset(offset).build(),
                Place::Many(list, count) => opcode::Readv::new(fd, list, count).offset(offset).build(),
            },
            Work::Write { offset, data } => match self.place(data)? {
                Place::One(at, len) => opcode::Write::new(fd, at, len).offset(offset).build(),
                Place::Many(list, count) => opcode::Writev::new(fd, list, count).offset(offset).build(),
            },
            // The threads beside the ring do that.
            Work::Clear { .. } | Work::Sync => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    fn completed(&mut self) -> Option<Done> {
        let done = self.ring.completion().next()?;
        let result = done.result();
        Some((done.user_data(), u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()))))
    }

    /// Takes what is done out of the completion ring, and waits for something to be done.
    fn make_room(&mut self) {
        self.submit();
        let _interrupted = self.ring.submit_and_wait(1);
        while let Some(done) = self.completed() {
            self.done.push_back(done);
        }
    }

    /// Where a buffer lies: most are in one piece.
    fn place(&mut self, data: Buffer<'_>) -> io::Result<Place> {
        let mut pieces = data.addresses();
        let (Some((at, len)), second) = (pieces.next(), pieces.next()) else { return Err(Errno::INVAL.into()) };
        let Some(second) = second else {
            return Ok(Place::One(at, u32::try_from(len).map_err(|_| Errno::INVAL)?));
        };
        let count = 2 + pieces.clone().count();
        if count > VECTORS {
            return Err(Errno::INVAL.into());
        }
        if self.vectors.len() + count > VECTORS {
            // The vector must not move while something in it is waiting to be handed on.
            self.submit();
        }
        let first = self.vectors.len();
        let list = [(at, len), second].into_iter().chain(pieces);
        self.vectors.extend(list.map(|(at, len)| libc::iovec { iov_base: at.cast(), iov_len: len }));
        let list = self.vectors.get(first..).unwrap_or_default().as_ptr();
        Ok(Place::Many(list, u32::try_from(count).map_err(|_| Errno::INVAL)?))
    }
}

enum Place {
    One(*mut u8, u32),
    Many(*const libc::iovec, u32),
}

impl Engine for Uring {
    fn begin(&mut self, id: u64, file: &File, work: Work<'_>) -> io::Result<()> {
        let entry = self.entry(file, work)?.user_data(id);
        if self.in_flight.saturating_sub(self.done.len()) >= COMPLETIONS {
            self.make_room();
        }
        if self.ring.submission().is_full() {
            self.submit();
        }
        // SAFETY: the entry points at guest memory, which stays mapped until the outcome was taken (`Engine`), and which any thread, the
        // guest and the kernel may read and write at any time; or at `vectors`, which are neither moved nor changed before `submit` has
        // handed the entry on.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::BUSY)?;
        self.in_flight += 1;
        Ok(())
    }

    fn submit(&mut self) {
        let (waiting, finished) = {
            let queue = self.ring.submission();
            (queue.len(), queue.taskrun())
        };
        if waiting == 0 && !finished {
            return;
        }
        // An interrupted or refused call leaves the rest where it is, and is made again. The kernel refuses for want of memory at
        // most: there is always room for the outcomes.
        loop {
            let _what_is_left_shows_it = self.ring.submit();
            if self.ring.submission().is_empty() {
                break;
            }
        }
        self.vectors.clear();
    }

    fn next(&mut self) -> Option<Done> {
        let done = self.done.pop_front().or_else(|| self.completed())?;
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(done)
    }

    fn wait(&mut self) {
        self.submit();
        while self.in_flight > 0 && self.done.is_empty() && self.ring.completion().is_empty() {
            let _interrupted = self.ring.submit_and_wait(1);
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn sources(&self) -> [Option<BorrowedFd<'_>>; SOURCES] {
        // SAFETY: the ring keeps its descriptor open for as long as it lives, and so for as long as it is borrowed.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        [(self.in_flight > 0).then_some(ring), None]
    }
}
