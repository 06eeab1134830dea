//! What the process may do.

use daemon::rules::{PROTOCOL, RINGS, RUNTIME};
use sandbox::{Limits, Policy, Rule, allow};

/// The role of the thread that serves the queue.
pub const THREAD: &str = "queue";

/// Descriptors: standard streams, sockets, the log, signals, one region of memory for each of a few, and three for the ring; and 64
/// for those that come with messages.
const DESCRIPTORS: u64 = 16 + 64;

const QUEUE: &[Rule] = &[allow(libc::SYS_getrandom, "the random numbers")];

/// The process opens nothing and reaches nothing.
pub const POLICY: Policy = Policy {
    name: "outboard-rng",
    limits: Limits { descriptors: DESCRIPTORS, threads: 4 },
    capabilities: &[],
    control: &[RUNTIME, PROTOCOL],
    threads: &[(THREAD, &[RUNTIME, RINGS, QUEUE])],
};
