//! A terminal's modes, for as long as the console has it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// A terminal in raw mode. Dropping it puts the terminal back.
#[derive(Debug)]
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Switches `terminal` to raw mode: every key goes to the guest, and nothing is changed on the way.
    ///
    /// # Errors
    /// The system's.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Raw> {
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        let terminal = terminal.try_clone_to_owned()?;
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Raw { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _gone = tcsetattr(self.terminal.as_fd(), OptionalActions::Now, &self.before);
    }
}
