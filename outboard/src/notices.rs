//! What the composer tells the person at the terminal.
//!
//! Two things can go wrong with something as simple as a line on stderr. The console process may have made the terminal
//! raw, where a line feed does not return to the margin. And whoever reads our stderr may have stopped reading: a
//! supervisor that blocks in a write no longer supervises, so a line that does not fit is dropped and counted.

use std::io::{ErrorKind, Write, stderr, stdout};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OutputModes, tcgetattr};

use crate::journal::Journal;
use crate::moment;

static DROPPED: AtomicU64 = AtomicU64::new(0);
static KEPT: OnceLock<Mutex<Journal>> = OnceLock::new();

/// What was said is kept there, too.
pub fn keep(journal: Journal) {
    let _kept_already = KEPT.set(Mutex::new(journal));
}

/// A line that is kept and not shown.
pub fn note(text: &str) {
    if let Some(journal) = KEPT.get() {
        let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.append(&format!("{} {text}", moment::now()));
    }
}

/// One line on stderr, and in what is kept.
pub fn line(text: &str) {
    note(text);
    show(text);
}

/// One line (or several) on stderr.
pub fn show(text: &str) {
    let stderr = stderr();
    let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut ready, Some(&now)).unwrap_or(0) == 0 {
        DROPPED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let end = if is_raw() { "\r\n" } else { "\n" };
    let mut whole = String::new();
    let dropped = DROPPED.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        whole.push_str(&format!("outboard: {dropped} notices were dropped because nobody read them{end}"));
    }
    for line in text.lines() {
        whole.push_str(line);
        whole.push_str(end);
    }
    // There is nobody left to tell if this fails.
    drop(stderr.lock().write_all(whole.as_bytes()));
}

/// An answer on stdout. `false`: nobody reads it any more, which is no error.
pub fn answer(text: &str) -> Result<bool> {
    match stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("Cannot write to stdout"),
    }
}

fn is_raw() -> bool {
    tcgetattr(stderr()).is_ok_and(|settings| !settings.output_modes.contains(OutputModes::OPOST))
}

/// The printable part of what another process wrote: a guest can make a device log its bytes, and escape sequences must not
/// reach the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_lose_their_power() {
        assert_eq!(printable("a\x1b[2Jb\t"), "a\u{fffd}[2Jb\t");
    }
}
