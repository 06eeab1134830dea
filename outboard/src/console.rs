//! `outboard console`: this terminal on the console of a running machine, and off it again.
//!
//! The console's own process keeps what nobody has read yet and holds the socket we connect to; the composer has no part in it
//! and reads no byte of the guest. One terminal at a time is attached: a lock on a file beside the socket says so, and ends with
//! whoever holds it. When the console's process is started again its socket is a new one, to which we connect again.

use std::fs::File;
use std::io::{ErrorKind, Read, Write, stdin, stdout};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::args::Console;
use crate::supervisor::terminal::Terminal;
use crate::{notices, runtime};

/// How long a console's process may take to be back, after which the machine counts as ended.
const BACK_LIMIT: Duration = Duration::from_secs(15);
const TRY_AGAIN: Duration = Duration::from_millis(50);
/// What is on its way when we leave is still shown.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// `Ctrl-]`, as on every console of ours.
const ESCAPE: u8 = 0x1d;

/// The command.
pub fn run(args: &Console) -> Result<u8> {
    let dir = runtime::find(&args.name)?;
    let path = dir.join(runtime::CONSOLE);
    if !path.exists() {
        bail!("`{}` has no console to attach to: give it one with output = \"attach\"", args.name);
    }
    let _lock = lock(&dir, &args.name)?;
    let mut stream = connect(&path)?;
    let signals = [Signal::INT, Signal::TERM, Signal::HUP].map(Signal::as_raw);
    let signals = sandbox::signal_fd(&signals).context("Cannot block signals")?;
    let terminal = Terminal::remember(stdin());
    notices::show(&format!("outboard: This is the console of `{}`; Ctrl-] q detaches.", args.name));
    if terminal.is_some() {
        let mut settings = tcgetattr(stdin()).context("Cannot use the terminal")?;
        settings.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &settings).context("Cannot use the terminal")?;
    }
    let mut keys = Keys { is_terminal: terminal.is_some(), seen: false, open: true };
    let attached = loop {
        match relay(&stream, signals.as_fd(), &mut keys)? {
            Left::Person => break true,
            Left::Console => match again(&path) {
                Some(new) => stream = new,
                None => break false,
            },
        }
    };
    drop(terminal);
    notices::show(&match attached {
        true => format!("\noutboard: Detached; `{}` goes on.", args.name),
        false => format!("\noutboard: `{}` has ended.", args.name),
    });
    Ok(0)
}

fn lock(dir: &Path, name: &str) -> Result<File> {
    let path = dir.join(runtime::CONSOLE_LOCK);
    let open = File::options().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = open.with_context(|| format!("Cannot open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("Another terminal is attached to the console of `{name}`; detach it there with Ctrl-] q");
    }
    Ok(file)
}

fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).with_context(|| format!("Cannot connect to {}", path.display()))
}

/// The console's process was started again, or the machine has ended and its directory goes.
fn again(path: &Path) -> Option<UnixStream> {
    let began = Instant::now();
    while began.elapsed() < BACK_LIMIT && path.parent().is_some_and(Path::exists) {
        if let Ok(stream) = connect(path) {
            return Some(stream);
        }
        thread::sleep(TRY_AGAIN);
    }
    None
}

/// Why a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Person,
    Console,
}

/// What is typed.
#[derive(Debug)]
struct Keys {
    is_terminal: bool,
    /// The last key was `Ctrl-]`.
    seen: bool,
    open: bool,
}

impl Keys {
    /// What of these keys is for the guest. `None`: the person leaves.
    fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        if !self.is_terminal {
            return Some(typed.to_vec());
        }
        let mut kept = Vec::with_capacity(typed.len());
        for key in typed {
            match (std::mem::take(&mut self.seen), *key) {
                (true, b'q' | b'Q') => return None,
                (false, ESCAPE) => self.seen = true,
                (_, key) => kept.push(key),
            }
        }
        Some(kept)
    }
}

fn relay(stream: &UnixStream, signals: std::os::fd::BorrowedFd<'_>, keys: &mut Keys) -> Result<Left> {
    loop {
        let input = stdin();
        let mut polled = vec![PollFd::new(stream, PollFlags::IN), PollFd::from_borrowed_fd(signals, PollFlags::IN)];
        if keys.open {
            polled.push(PollFd::from_borrowed_fd(input.as_fd(), PollFlags::IN));
        }
        let _interrupted = poll(&mut polled, None);
        let ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        let is_ready = |index: usize| ready.get(index).copied().unwrap_or(false);
        if is_ready(0) && !show(stream)? {
            return Ok(Left::Console);
        }
        if is_ready(1) || (is_ready(2) && type_in(stream, keys)) {
            say_goodbye(stream)?;
            return Ok(Left::Person);
        }
    }
}

/// Shows what the guest has written. `false`: nothing will come any more.
fn show(mut stream: &UnixStream) -> Result<bool> {
    let mut piece = [0; 4096];
    match stream.read(&mut piece) {
        Ok(0) => Ok(false),
        Ok(count) => {
            let mut out = stdout().lock();
            let written = out.write_all(piece.get(..count).unwrap_or_default()).and_then(|()| out.flush());
            written.map(|()| true).context("Cannot write to the terminal")
        }
        Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => Ok(true),
        Err(_) => Ok(false),
    }
}

/// Passes keys on. `true`: the person leaves.
fn type_in(mut stream: &UnixStream, keys: &mut Keys) -> bool {
    let mut piece = [0; 1024];
    match stdin().lock().read(&mut piece) {
        Ok(0) | Err(_) => {
            // A terminal that is gone leaves; a file that has been read may still want the answer.
            keys.open = false;
            keys.is_terminal
        }
        Ok(count) => match keys.filter(piece.get(..count).unwrap_or_default()) {
            None => true,
            Some(kept) => {
                // A connection that has ended is seen by reading from it.
                let _ended = stream.write_all(&kept);
                false
            }
        },
    }
}

/// Says that nothing more is typed, and shows what was on its way: it is lost otherwise.
fn say_goodbye(stream: &UnixStream) -> Result<()> {
    let _gone_already = stream.shutdown(Shutdown::Write);
    let until = Instant::now() + LAST_BYTES;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(stream, PollFlags::IN)];
        let limit = Timespec::try_from(left).ok();
        if left.is_zero() || poll(&mut polled, limit.as_ref()).unwrap_or(0) == 0 || !show(stream)? {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_leave_are_not_for_the_guest() {
        let mut keys = Keys { is_terminal: true, seen: false, open: true };
        assert_eq!(keys.filter(b"ls\x1d").unwrap(), b"ls");
        assert_eq!(keys.filter(b"\x1dx").unwrap(), b"\x1dx");
        assert_eq!(keys.filter(b"a\x1dq"), None);
        let mut pipe = Keys { is_terminal: false, seen: false, open: true };
        assert_eq!(pipe.filter(b"\x1dq").unwrap(), b"\x1dq");
    }
}
