//! Signals as something to read, so that the one loop waits for them as for everything else.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use rustix::process::Signal;

/// The kernel's `struct signalfd_siginfo`; the signal's number comes first.
const INFO_BYTES: usize = 128;

/// What a signal asks of the composer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// End the machine.
    End,
    /// The terminal has changed its size.
    Resize,
    /// Look at the processes: one was stopped, goes on, or has ended.
    Look,
}

/// The signals the composer answers.
#[derive(Debug)]
pub struct Signals(File);

impl Signals {
    /// From here on these signals are read, not delivered.
    pub fn new() -> Result<Self> {
        let signals = [Signal::INT, Signal::TERM, Signal::HUP, Signal::WINCH, Signal::CHILD].map(Signal::as_raw);
        Ok(Self(sandbox::signal_fd(&signals).context("Cannot block signals")?.into()))
    }

    /// What to wait for.
    pub fn source(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next one, if there is one.
    pub fn take(&mut self) -> Option<Request> {
        let mut info = [0_u8; INFO_BYTES];
        if self.0.read(&mut info).ok()? != INFO_BYTES {
            return None;
        }
        let number = u32::from_ne_bytes(info.first_chunk().copied()?);
        Some(match i32::try_from(number).ok().and_then(Signal::from_named_raw) {
            Some(Signal::WINCH) => Request::Resize,
            Some(Signal::CHILD) => Request::Look,
            _ => Request::End,
        })
    }
}
