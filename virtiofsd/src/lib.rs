//! virtio-fs (virtio 1.3, 5.11): a directory of the host, shared with a guest.

pub mod abi;
pub mod reply;
pub mod request;
