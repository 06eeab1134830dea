//! LIFE: how every process of ours starts, serves and ends.
//!
//! # Theory of operation
//!
//! [`main`] is the whole `main` of a program. It parses the arguments, and if the process is not yet in namespaces of its own,
//! starts itself again inside of them and stays behind as a small waiting parent (`parent.rs`). In the namespaces it
//! calls the program with a [`Startup`]. The order is in the types:
//!
//! ```text
//! Startup   paths can be opened, nothing is served          startup.confine()
//! Confined  no paths, no new sockets; threads can start     confined.spawn(..), then confined.serve(..) or .run(..)
//! (filter)  the first byte of a peer is read
//! ```
//!
//! There is no way from a `Startup` to serving but through `Confined`. An error is a sentence, printed once, here, as a chain. Log
//! lines go to standard error; those that a guest or a peer can cause at will (target `guest`) are limited in their rate.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage. The VMM has more of its own.

mod args;
mod endpoint;
mod logging;
mod parent;
mod startup;
mod syslog;

pub use args::{Arguments, Base, Capabilities, LogFormat, LogLevel, Socket};
pub use endpoint::listen;
pub use startup::{Confined, Server, Startup, Stopper, main};

/// System calls that every thread of ours needs, with the reason.
pub mod rules {
    use sandbox::{Rule, When, allow, allow_if};

    /// Memory that is neither executable nor made so.
    const NOT_EXECUTABLE: &[When] = &[When::HasNone(2, libc::PROT_EXEC as u64)];

    /// What any thread does.
    pub const RUNTIME: &[Rule] = &[
        allow(libc::SYS_futex, "a lock that another thread holds at this moment"),
        allow(libc::SYS_brk, "the allocator's heap grows and shrinks"),
        allow(libc::SYS_write, "log lines and event descriptors"),
        allow(libc::SYS_read, "event and signal descriptors"),
        allow(libc::SYS_close, "descriptors that a peer has sent"),
        allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFD as u32)], "debug builds look whether what they close is open"),
        allow(libc::SYS_ppoll, "waiting"),
        allow(libc::SYS_clock_gettime, "the time, where the kernel offers no faster way"),
        allow(libc::SYS_exit_group, "the end of the process"),
    ];

    const UNMAP: Rule = allow(libc::SYS_munmap, "guest memory that is given up, by whoever had it last");

    /// What a thread that serves queues does besides.
    pub const RINGS: &[Rule] =
        &[UNMAP, allow_if(libc::SYS_preadv2, &[When::Is(5, libc::RWF_NOWAIT as u32)], "kicks, without waiting for one")];

    /// What the control thread of a device process does besides: the vhost-user protocol.
    pub const PROTOCOL: &[Rule] = &[
        allow_if(libc::SYS_mmap, NOT_EXECUTABLE, "guest memory"),
        UNMAP,
        allow(libc::SYS_recvmsg, "requests of the frontend, with their descriptors"),
        allow(libc::SYS_sendmsg, "answers"),
        allow(libc::SYS_fstat, "looking at files before they are mapped, and at event descriptors"),
        allow_if(libc::SYS_fcntl, &[When::Is(1, GET_SEALS)], "looking for the seal that keeps memory from shrinking"),
        allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFL as u32)], "event descriptors must not block"),
        allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_SETFL as u32)], "event descriptors must not block"),
        allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)], "handing out the in-flight log"),
        allow(libc::SYS_fallocate, "emptying the in-flight log"),
        allow(libc::SYS_accept4, "the next frontend, where the process listens"),
    ];

    const GET_SEALS: u32 = libc::F_GET_SEALS as u32;
}
