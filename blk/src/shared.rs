//! What the control thread and the threads of the queues both know.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio::Host;
use virtio::limit;

use crate::direct::Alignment;
use crate::request::{LIFETIME, Limits, SERIAL};

/// One disk's.
#[derive(Debug)]
pub struct Shared {
    /// The serial number, filled up with zeroes.
    pub serial: [u8; SERIAL],
    /// Data moves past the page cache, if it is so aligned.
    pub direct: Option<Alignment>,
    read_only: bool,
    /// The driver's choice: it flushes what has to last. Otherwise every write lasts.
    writes_back: AtomicBool,
    bytes: AtomicU64,
    /// A flush has failed.
    lost: AtomicBool,
    lifetime: Option<[u8; LIFETIME]>,
    secure_erase: bool,
    /// How much it may be used.
    pub limits: limit::Limits,
    /// How to tell the frontend that the configuration has changed.
    host: OnceLock<Host>,
}

/// What a disk can do, found out when it was opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Abilities {
    /// The guest may not write.
    pub read_only: bool,
    /// How worn it is, in the specification's four bytes.
    pub lifetime: Option<[u8; LIFETIME]>,
    /// It can erase so that nobody finds what was there.
    pub secure_erase: bool,
}

impl Shared {
    /// For a disk of so many bytes.
    pub fn new(
        bytes: u64,
        serial: [u8; SERIAL],
        direct: Option<Alignment>,
        abilities: Abilities,
        limits: limit::Limits,
    ) -> Shared {
        let Abilities { read_only, lifetime, secure_erase } = abilities;
        let (writes_back, bytes) = (AtomicBool::new(true), AtomicU64::new(bytes));
        Shared {
            serial,
            direct,
            read_only,
            writes_back,
            bytes,
            lost: AtomicBool::new(false),
            lifetime,
            secure_erase,
            limits,
            host: OnceLock::new(),
        }
    }

    /// What requests are checked against.
    pub fn checks(&self) -> Limits {
        Limits {
            bytes: self.bytes(),
            read_only: self.read_only,
            lifetime: self.lifetime.is_some(),
            secure_erase: self.secure_erase,
        }
    }

    /// Bytes of the disk at this moment.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// The disk has grown; the guest is told.
    pub fn resized(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Release);
        if let Some(host) = self.host.get() {
            host.config_changed();
        }
    }

    /// Here is how to tell the frontend something.
    pub fn attach(&self, host: Host) {
        let _attached_once = self.host.set(host);
    }

    /// Whether writes may be acknowledged before they are on the disk.
    pub fn writes_back(&self) -> bool {
        self.writes_back.load(Ordering::Relaxed)
    }

    /// The driver has chosen.
    pub fn write_back(&self, yes: bool) {
        self.writes_back.store(yes, Ordering::Relaxed);
    }

    /// A flush has failed: what was written before it may be lost.
    pub fn lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// No flush has failed. The kernel tells of a lost write once, and forgets it: the next flush would succeed without it.
    ///
    /// # Errors
    /// When one has.
    pub fn nothing_lost(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Relaxed) { Err(io::Error::other("An earlier flush has failed")) } else { Ok(()) }
    }

    /// How worn the host's device is; zeroes if it does not tell.
    pub fn lifetime(&self) -> [u8; LIFETIME] {
        self.lifetime.unwrap_or_default()
    }
}
