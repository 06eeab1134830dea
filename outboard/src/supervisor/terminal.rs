//! The user's terminal, put back as it was.
//!
//! A console process makes the terminal raw and may be killed before it makes it sane. The composer has seen the settings
//! before and restores them however the machine ends; the janitor does the same if the composer is killed.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The terminal on stdin with its settings of now, restored when this is dropped.
#[derive(Debug)]
pub struct Terminal {
    file: File,
    settings: Termios,
}

impl Terminal {
    /// Remembers the settings, if `fd` is a terminal.
    pub fn remember(fd: impl AsFd) -> Option<Self> {
        if !isatty(&fd) {
            return None;
        }
        let settings = tcgetattr(&fd).ok()?;
        let file = fd.as_fd().try_clone_to_owned().ok()?.into();
        Some(Self { file, settings })
    }

    /// The terminal, for the janitor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts the settings back.
    pub fn restore(&self) {
        let _ = tcsetattr(&self.file, OptionalActions::Now, &self.settings);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.restore();
    }
}
