//! virtio-fs (virtio 1.3, 5.11): a directory of the host, shared with a guest.

pub mod abi;
pub mod args;
pub mod device;
pub mod fs;
pub mod identity;
mod magic;
pub mod metrics;
pub mod owner;
pub mod pool;
pub mod queue;
pub mod reply;
pub mod request;
pub mod sandbox;
pub mod share;
mod sys;
mod tree;
pub mod waiting;
