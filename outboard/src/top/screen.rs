//! The terminal as a page that is written again and again, and keys that are read at once. It is put back however we end, short
//! of SIGKILL.

use std::io::{Read, Write, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use rustix::termios::{LocalModes, OptionalActions, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::supervisor::terminal::Terminal;

const CTRL_C: u8 = 3;

/// What came while we waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Nothing.
    None,
    /// `q`, Ctrl-C or a signal.
    Leave,
}

/// The page.
#[derive(Debug)]
pub struct Screen {
    signals: OwnedFd,
    /// While it lives, the page is shown instead of what was there before.
    terminal: Option<Terminal>,
    shown: bool,
}

impl Screen {
    /// No page, only signals.
    pub fn none() -> Result<Self> {
        let signals = [Signal::INT, Signal::TERM, Signal::HUP].map(Signal::as_raw);
        let signals = sandbox::signal_fd(&signals).context("Cannot block signals")?;
        Ok(Self { signals, terminal: None, shown: false })
    }

    /// Takes the terminal.
    pub fn enter() -> Result<Self> {
        let mut screen = Self::none()?;
        if isatty(stdin()) {
            screen.terminal = Terminal::remember(stdin());
            let mut settings = tcgetattr(stdin()).context("Cannot use the terminal")?;
            settings.local_modes &= !(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
            tcsetattr(stdin(), OptionalActions::Now, &settings).context("Cannot use the terminal")?;
        }
        screen.shown = true;
        write("\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }

    /// Shows as much of a text as there is room for.
    pub fn show(&self, text: &str) -> Result<()> {
        let size = tcgetwinsize(stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
        let (rows, columns) = size.map_or((24, 80), |size| (usize::from(size.ws_row), usize::from(size.ws_col)));
        let mut page = "\x1b[H".to_owned();
        let lines: Vec<String> = text.lines().take(rows).map(|line| line.chars().take(columns).collect()).collect();
        page.push_str(&lines.join("\x1b[K\r\n"));
        page.push_str("\x1b[K\x1b[J");
        write(&page)
    }

    /// Waits so long, or until a key or a signal says that it is enough.
    pub fn wait(&mut self, limit: Duration) -> Result<Key> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Key::None);
            }
            let stdin = stdin();
            let mut polled = vec![PollFd::new(&self.signals, PollFlags::IN)];
            if self.terminal.is_some() {
                polled.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
            }
            let limit = Timespec::try_from(left).ok();
            let _interrupted = poll(&mut polled, limit.as_ref());
            let ready = |index: usize| polled.get(index).is_some_and(|one| !one.revents().is_empty());
            if ready(0) || (ready(1) && leaves()) {
                return Ok(Key::Leave);
            }
        }
    }
}

/// Whether the key is one by which people leave. A terminal that is gone is one, too.
fn leaves() -> bool {
    let mut byte = [0];
    match stdin().lock().read(&mut byte) {
        Ok(1) => matches!(byte, [b'q' | b'Q' | CTRL_C]),
        _ => true,
    }
}

fn write(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("Cannot write to the terminal")
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.shown {
            drop(write("\x1b[?25h\x1b[?1049l"));
        }
    }
}
