//! From the processors to the control thread: what the guest did, and "look at your devices".
//!
//! Processors never wait for anybody. They leave a note and ring; the control thread reads the note when it gets there.
//! Nothing here can grow: a machine has one end at a time (the first one wins), and a device keeps its own work inside
//! its register file, where a second request of the same kind falls together with the first.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::kvm::Event;

/// The end of a run, as far as the guest or the processors are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// ACPI soft-off.
    PowerOff,
    /// One of the reset registers.
    Reset,
    /// pvpanic.
    Panic,
    /// A processor shut down.
    TripleFault,
    /// KVM gave up; the sentence says how.
    Broken(String),
}

/// The note and the bell.
#[derive(Debug)]
pub struct Doorbell {
    event: Event,
    ending: Mutex<Option<Ending>>,
    ended: AtomicBool,
}

impl Doorbell {
    /// One for the whole machine.
    pub fn new() -> io::Result<Self> {
        let event = Event::new()?;
        Ok(Self { event, ending: Mutex::new(None), ended: AtomicBool::new(false) })
    }

    /// A device has work for the control thread.
    pub fn ring(&self) {
        self.event.signal();
    }

    /// The machine stops here. The first reason counts: what other processors say afterwards follows from it.
    pub fn end(&self, ending: Ending) {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ending);
        self.ended.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether a processor should stop instead of entering the guest again.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Takes the note; the control thread calls this when [`Doorbell::event`] becomes readable.
    pub fn answer(&self) -> Option<Ending> {
        self.event.take();
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// After a reset: the note no longer counts.
    pub fn forget(&self) {
        *self.ending.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.ended.store(false, Ordering::Release);
    }

    /// For the poll set.
    pub fn event(&self) -> &Event {
        &self.event
    }
}
