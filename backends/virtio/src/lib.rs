//! RINGS: virtqueues as a device sees them, and the contract of a device.
//!
//! # Theory of operation
//!
//! Everything in guest memory is written by an attacker, at any moment, also between two reads of ours. So nothing is read
//! twice: a descriptor is fetched once into an owned [`Chain`], and all later work is on that copy. Nothing is believed: a
//! broken chain is an error that stops its ring, never a shorter chain. Nothing is unbounded: a chain has at most as many
//! descriptors as its ring, and a kick has a budget.
//!
//! | file | what lives there | who may write it |
//! |---|---|---|
//! | [`memory`] | guest memory: mapping, checking, copying, and I/O straight into it | the mapping is frozen while a ring runs |
//! | [`chain`] | the single-fetch walk over descriptors, and views of what it found | the worker that popped it |
//! | [`queue`] | a split ring: pop, complete, publish, re-arm | the one worker that was given the queue |
//! | [`event`] | notifications, through descriptors that somebody else has, too | any thread |
//! | [`inflight`] | the in-flight log of the vhost-user specification, and what a successor makes of it | the queue it belongs to |
//! | [`worker`] | the loop of a thread that serves queues, and the hand-over of a queue to it and back | worker and control thread, by messages |
//! | [`device`] | the contract between a device and whoever drives it | - |
//! | [`metrics`] | counters | any thread |
//! | [`words`] | numbers that processes share | any thread of any of them |
//!
//! The way of one request: [`Queue::pop`] fetches a chain and notes its head in the log; the device turns its bytes into a
//! checked request, moves data, and calls [`Queue::complete`] with the token; after the batch [`Queue::publish`] advances the
//! used index once, decides once about an interrupt and signals once.
//!
//! Only split rings are implemented, and `virtio-queue` is not used: publishing each element by itself, as its `add_used`
//! does, is one cache line and one barrier too many per request and leaves no place for the order of writes the in-flight
//! log needs; its iterator is what [`chain`] replaces; what would be left of it is a struct of setters.

pub mod chain;
pub mod device;
pub mod dirty;
pub mod event;
pub mod inflight;
pub mod limit;
pub mod memory;
pub mod metrics;
pub mod queue;
pub mod words;
pub mod worker;

pub use chain::{Buffer, Chain, OwnedBuffer};
pub use device::{Device, Host, Identity};
pub use memory::Memory;
pub use queue::{Queue, QueueState, Token};

/// The target of log lines that a guest or a peer can cause at will. Whoever writes the log limits their rate.
pub const GUEST: &str = "guest";

/// Virtio feature bits that belong to the ring layer and are offered by every device (virtio 1.3, 6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides say at which index they want to be notified next.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: the device is not a legacy one.
    pub const VERSION_1: u64 = 1 << 32;
    /// What the ring layer knows.
    pub const RING: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}
