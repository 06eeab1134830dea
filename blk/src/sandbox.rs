//! What the process may do.

use daemon::rules::{PROTOCOL, RINGS, RUNTIME};
use sandbox::{Limits, Policy, Rule, SECURE_ERASE, When, allow, allow_if};

use crate::args::MAX_QUEUES;
use crate::engine::pool::THREADS;
use crate::engine::uring::WORKERS;

/// The role of the threads that serve queues.
pub const THREAD: &str = "queue";

/// The role of the same threads where the host's device erases securely: nobody else is allowed the request for it.
pub const ERASER: &str = "erasing queue";

/// The role of the threads that wait for the disk: for flushes and for space that is given back, and without io_uring for all of it.
pub const POOL: &str = "disk";

/// Descriptors of each queue: an engine's, two ends of a bell, three of the ring, and one to spare.
const PER_QUEUE: u64 = 7;

/// What an image takes of whichever thread is at it: a queue's, the control thread that closes it, the one that has read it.
const TABLES: &[Rule] = &[
    allow(libc::SYS_preadv2, "an image's tables, and data straight into guest memory"),
    allow(libc::SYS_pwritev2, "an image's tables, and data straight from guest memory; zeroes, where there is no better way"),
    allow(libc::SYS_fallocate, "space that is given back, and zeroes"),
    allow(libc::SYS_fdatasync, "the order in which an image's tables reach the disk"),
    allow(libc::SYS_ftruncate, "images that grow"),
    allow(libc::SYS_fstat, "how long an image is"),
];

const QUEUE: &[Rule] =
    &[allow(libc::SYS_io_uring_enter, "reads and writes that have to wait for the disk; the ring can do nothing else")];

const ERASE: &[Rule] =
    &[allow_if(libc::SYS_ioctl, &[When::Is(1, SECURE_ERASE)], "erasing a range so that nobody finds what was there")];

/// The role of the thread that reads what the image says, and then obeys the disk's owner.
pub const IMAGE: &str = "image";

const OBEY: &[Rule] = &[
    allow(libc::SYS_lseek, "how long a block device is"),
    allow(libc::SYS_accept4, "whoever has a command"),
    allow(libc::SYS_recvmsg, "commands, with the overlays they bring"),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_OFD_SETLK as u32)], "locking an overlay"),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)], "two uses of an overlay"),
    allow(libc::SYS_sendmsg, "telling the frontend that the disk has grown"),
];

const DISK: &[Rule] = &[
    allow(libc::SYS_preadv2, "reads, straight into guest memory"),
    allow(libc::SYS_pwritev2, "writes, straight from guest memory"),
    allow(libc::SYS_fallocate, "space that is given back, and zeroes"),
    allow(libc::SYS_fdatasync, "flushes"),
];

/// The process opens nothing and reaches nothing.
pub const POLICY: Policy = Policy {
    name: "outboard-blk",
    limits: Limits {
        descriptors: 32 + PER_QUEUE * MAX_QUEUES as u64 + 64,
        threads: MAX_QUEUES as u64 * (1 + 2 * WORKERS as u64) + THREADS as u64 + 3,
    },
    capabilities: &[],
    control: &[RUNTIME, PROTOCOL, TABLES],
    threads: &[
        (THREAD, &[RUNTIME, RINGS, TABLES, QUEUE]),
        (ERASER, &[RUNTIME, RINGS, TABLES, QUEUE, ERASE]),
        (POOL, &[RUNTIME, DISK]),
        (IMAGE, &[RUNTIME, TABLES, OBEY]),
    ],
};
