//! virtio-blk (virtio 1.3, 5.2): a disk image, or a block device, as a guest's disk.
//!
//! # Theory of operation
//!
//! ```text
//! chain ──▶ request.rs: Request (owned, checked)  ──▶ queue.rs, engine.rs: read, write, sync, clear ──▶ status byte
//! ```
//!
//! Each queue has a thread of its own, which shares nothing with the others but the image's descriptor: positional I/O needs no
//! lock. Data moves once, between the page cache and guest memory. A request is parsed once, from its own header; when it is
//! done, the outcome goes to the status byte that was found then.
//!
//! The process is killed and started again while requests are in flight, so every operation may run twice: reading, writing,
//! zeroing and discarding a range, and flushing, give the same result then. The ring layer keeps the log of what was in flight.
//!
//! The format of an image is declared, never guessed: a guest that writes another format's header into its raw disk gets its raw
//! disk back. An image has one writer: it is locked, in a way that QEMU's own locks notice and that notices them.

#![deny(unsafe_code)]

pub mod args;
pub mod commands;
pub mod device;
pub mod direct;
pub mod engine;
pub mod image;
pub mod metrics;
pub mod queue;
pub mod request;
pub mod sandbox;
pub mod shared;
pub mod topology;
pub mod volume;
