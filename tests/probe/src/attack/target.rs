//! What is attacked: which ring, and what an ordinary request on it looks like.

use clap::ValueEnum;

use super::guest::{DATA, Guest};

/// The kind of a device, as far as the attacker has to know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Not known: only the protocol and the start and stop of ring 0 judge
    #[default]
    Any,
    /// virtio-rng
    Rng,
    /// virtio-blk. What is on it may be lost
    Blk,
    /// virtio-console, whose transmit ring is attacked
    Console,
    /// virtio-fs, whose first request ring is attacked
    Fs,
}

/// A ring of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) kind: Kind,
    pub(super) queue: u32,
}

impl From<Kind> for Target {
    fn from(kind: Kind) -> Target {
        let queue = if matches!(kind, Kind::Console | Kind::Fs) { 1 } else { 0 };
        Target { kind, queue }
    }
}

/// Where an ordinary request has its answer.
const ANSWER: u64 = DATA + 0x1000;

impl Target {
    /// The buffers of an ordinary request (address, bytes, written by the device), its content in memory. `None`: not known.
    pub(super) fn request(&self, guest: &Guest) -> Option<Vec<(u64, u32, bool)>> {
        match self.kind {
            Kind::Any => None,
            Kind::Rng => Some(vec![(ANSWER, 64, true)]),
            // Read sector 0.
            Kind::Blk => {
                guest.put(DATA, &[0; 16]);
                Some(vec![(DATA, 16, false), (ANSWER, 512, true), (ANSWER + 512, 1, true)])
            }
            Kind::Console => {
                guest.put(DATA, b"ok\r\n");
                Some(vec![(DATA, 4, false)])
            }
            // GETATTR of the root: length, opcode 3, unique, node, ids; then flags and handle.
            Kind::Fs => {
                let mut bytes = [56u32, 3, 7, 0, 1, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
                bytes.extend([0; 16]);
                guest.put(DATA, &bytes);
                Some(vec![(DATA, 56, false), (ANSWER, 120, true)])
            }
        }
    }
}
