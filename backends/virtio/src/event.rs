//! Event descriptors that somebody else has, too.
//!
//! That one does not block is a property of the open file, and whoever else holds it can change that: then empty it before it is
//! read, or fill it before it is written, and the thread that trusted it waits for ever. So nothing here relies on it.

use std::io::IoSliceMut;
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2, write};

/// The position of a file that has none.
const WHEREVER: u64 = u64::MAX;

/// Signals it, if it has room: a full counter means that nobody has looked since the last time.
///
/// For writing to an event descriptor Linux has no flag that asks not to wait, as it has for reading, so the room is looked at
/// first. A holder that fills it in just that moment can still stop this thread; it has to be fast, again and again.
pub fn signal(fd: BorrowedFd<'_>) {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    // A socket nobody reads any more is ready, too, for an error.
    if poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents() == PollFlags::OUT) {
        let _already_signalled = write(fd, &1u64.to_ne_bytes());
    }
}

/// Takes what it has counted, without ever waiting for it.
///
/// # Errors
/// When it is no event descriptor any more. That there was nothing to take is no error.
pub fn take(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut count = [0; 8];
    match preadv2(fd, &mut [IoSliceMut::new(&mut count)], WHEREVER, ReadWriteFlags::NOWAIT) {
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}
