//! What the process may do.

use daemon::rules::{PROTOCOL, RINGS, RUNTIME};
use sandbox::{Limits, Policy, Rule, When, allow, allow_if};

/// The role of the thread that serves the port and both queues.
pub const THREAD: &str = "port";

/// Descriptors: standard streams, sockets, the log, signals, the port's five, memory, and three for each ring; and 64 for those that
/// come with messages.
const DESCRIPTORS: u64 = 32 + 64;

/// The numbers of ioctls, as the filter sees them.
const TCSETS: u32 = 0x5402;
const TCSETS2: u32 = 0x402c_542b;
const TIOCGWINSZ: u32 = 0x5413;
const FIONBIO: u32 = 0x5421;

const PORT: &[Rule] = &[
    allow(libc::SYS_sendto, "output to a client"),
    allow(libc::SYS_sendmsg, "the notice of a new size"),
    allow(libc::SYS_accept4, "a client of the socket"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, TIOCGWINSZ)], "the terminal's size"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, FIONBIO)], "a client's socket must not block"),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)], "a client is read and written"),
];

const RESTORE: &[Rule] = &[
    allow_if(libc::SYS_ioctl, &[When::Is(1, TCSETS2)], "the terminal is put back at the end"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, TCSETS)], "the terminal is put back at the end"),
];

/// The process opens nothing and reaches nothing but its port.
pub const POLICY: Policy = Policy {
    name: "outboard-console",
    limits: Limits { descriptors: DESCRIPTORS, threads: 4 },
    capabilities: &[],
    control: &[RUNTIME, PROTOCOL, RESTORE],
    threads: &[(THREAD, &[RUNTIME, RINGS, PORT])],
};
