//! virtio-console (virtio 1.3, 5.3): a guest's console on a terminal, a pseudo-terminal, a file or a socket.
//!
//! # Theory of operation
//!
//! One thread serves both queues and the port, so nothing is shared. From port to guest: bytes are read only while the guest's
//! receive queue runs and what was read before has been delivered, so a guest that does not listen makes the typist wait and
//! nothing grows. From guest to port: Linux writes to its console with a lock held and spins until the buffer comes back, so a
//! port that does not take the bytes must not keep them. A port is waited for once ([`port::PATIENCE`]); after that what it does not
//! take is dropped and counted until it takes something again.
//!
//! A terminal is switched to raw mode while the process runs and put back at its end. Whoever started the process does so
//! again, in case it was killed. `Ctrl-] q` leaves: the process ends with status 0.

#![forbid(unsafe_code)]

pub mod args;
pub mod device;
pub mod metrics;
pub mod port;
pub mod request;
pub mod sandbox;
