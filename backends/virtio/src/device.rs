//! The contract between a device and whoever drives it: the vhost-user backend in a device process, or a test.
//!
//! All calls come from one thread, the control thread. A queue is *handed over* with [`Device::start`] and *given back* with
//! [`Device::stop`]: in between it belongs to the device, which serves it from a thread of its own, so no lock lies on the data
//! path. Whoever drives the device promises that rings are started only with memory and features settled, that nothing of
//! these changes while a ring runs, and that every ring is stopped before [`Device::reset`].

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::queue::{Queue, QueueState};

/// What a device is, before any negotiation.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The virtio device id (virtio 1.3, 5).
    pub id: u32,
    /// The features it offers, those of the ring layer ([`crate::feature::RING`]) included.
    pub features: u64,
    /// How many queues it has.
    pub queues: u16,
    /// The largest ring it serves.
    pub queue_size: u16,
    /// Bytes of its configuration space.
    pub config_len: u32,
}

/// One virtio device. It knows rings; it knows nothing of sockets, processes or machines.
pub trait Device: Send {
    /// What it is. Always the same answer.
    fn identity(&self) -> Identity;

    /// The driver has chosen these features, all of them offered. Rings are stopped.
    fn negotiate(&mut self, _features: u64) {}

    /// Fills `buf` from the configuration space at `offset`. What lies beyond its end reads as zero.
    fn read_config(&self, offset: u32, buf: &mut [u8]);

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// When these bytes are not the driver's to write. Nothing has changed then.
    fn write_config(&mut self, _offset: u32, _data: &[u8]) -> Result<(), ReadOnly> {
        Err(ReadOnly)
    }

    /// Takes queue `index`, which is not running, and returns at once.
    ///
    /// # Errors
    /// When there is nobody to serve it.
    fn start(&mut self, index: u16, queue: Queue) -> io::Result<()>;

    /// Gives queue `index` back, with nothing of it in flight. `None` if it is not running; asking again is allowed.
    fn stop(&mut self, index: u16) -> Option<QueueState>;

    /// Forgets what a driver has set. Rings are stopped.
    fn reset(&mut self);

    /// Most bytes of a state that it saves, or takes.
    fn most_state(&self) -> usize {
        4096
    }

    /// What a successor on another host has to know that its frontend does not tell it: what the driver has set. Rings are stopped.
    ///
    /// # Errors
    /// When there is something that cannot be had there. Nothing has changed then.
    fn save(&mut self) -> Result<Vec<u8>, Immovable> {
        Ok(Vec::new())
    }

    /// Becomes what another one was when it was saved. Rings are stopped.
    ///
    /// # Errors
    /// When this was saved by something else, or cannot be had here. What the driver had set may be forgotten then.
    fn load(&mut self, state: &[u8]) -> Result<(), Immovable> {
        if state.is_empty() { Ok(()) } else { Err(Immovable::foreign()) }
    }

    /// Here is how to tell the frontend something.
    fn attach(&mut self, _host: Host) {}
}

/// The configuration space, or this part of it, is not the driver's to write.
#[derive(Debug, thiserror::Error)]
#[error("The configuration space cannot be written there")]
pub struct ReadOnly;

/// Why a state cannot be saved, or not be taken over.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Immovable(pub String);

impl Immovable {
    /// The state is not one of this kind of device, or not of this version.
    pub fn foreign() -> Immovable {
        Immovable("it was not saved by such a device".to_owned())
    }
}

/// What a device may tell its frontend, from any thread.
pub trait Notices: Send + Sync {
    /// The configuration space has changed.
    fn config_changed(&self);
}

/// A device's way to its frontend. It stays valid while frontends come and go.
#[derive(Clone)]
pub struct Host(Arc<dyn Notices>);

impl Host {
    /// Notices go to `notices`.
    pub fn new(notices: Arc<dyn Notices>) -> Host {
        Host(notices)
    }

    /// The configuration space has changed.
    pub fn config_changed(&self) {
        self.0.config_changed();
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Host")
    }
}

/// Fills `buf` from `config` at `offset`, with zeroes beyond its end: what most devices do in
/// [`Device::read_config`].
pub fn read_config(config: &[u8], offset: u32, buf: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (index, byte) in buf.iter_mut().enumerate() {
        *byte = from.get(index).copied().unwrap_or_default();
    }
}
