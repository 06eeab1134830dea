//! What the process may do.

use daemon::rules::{PROTOCOL, RINGS, RUNTIME};
use sandbox::{Limits, Policy, Rule, allow};

use crate::args::MAX_QUEUES;

/// The role of the threads that serve queues.
pub const THREAD: &str = "queue";

/// Descriptors of each queue: the image, two ends of a bell, and three of the ring.
const PER_QUEUE: u64 = 6;

const QUEUE: &[Rule] = &[
    allow(libc::SYS_preadv2, "reads, straight into guest memory"),
    allow(libc::SYS_pwritev2, "writes, straight from guest memory; zeroes, where the file system has no better way"),
    allow(libc::SYS_fdatasync, "flushes"),
    allow(libc::SYS_fallocate, "discards and zeroes"),
];

/// The process opens nothing and reaches nothing.
pub const POLICY: Policy = Policy {
    name: "outboard-blk",
    limits: Limits { descriptors: 32 + PER_QUEUE * MAX_QUEUES as u64 + 64, threads: MAX_QUEUES as u64 + 2 },
    control: &[RUNTIME, PROTOCOL],
    threads: &[(THREAD, &[RUNTIME, RINGS, QUEUE])],
};
