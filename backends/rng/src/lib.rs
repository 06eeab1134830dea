//! virtio-rng (virtio 1.3, 5.4): the example device. All others are built the same way.
//!
//! # Theory of operation
//!
//! The driver puts buffers into the one queue, the device fills them with random bytes. That is all, so this is the place to
//! learn how a device process is made. Seven files, the same in every one:
//!
//! | file | what lives there |
//! |---|---|
//! | `main` | the order of the process's life: read the arguments, open, confine, serve |
//! | `lib` | this page |
//! | [`args`] | arguments as they are written, and what they mean |
//! | [`request`] | guest bytes to a checked request; no I/O; the fuzz target |
//! | [`device`] | the device's identity, and its thread: request in, answer out |
//! | [`sandbox`] | what each thread may call, and why |
//! | [`metrics`] | what is counted |
//!
//! and one or more for the host resource the process exists for, here [`source`]: the host's random numbers, and a token bucket that
//! keeps a guest from using up more than its share. When the bucket is empty, requests stay in the ring and the thread sleeps
//! until it is filled again; it never sleeps with a request in its hands.

#![forbid(unsafe_code)]

pub mod args;
pub mod device;
pub mod metrics;
pub mod request;
pub mod sandbox;
pub mod source;
