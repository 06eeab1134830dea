//! The host resource: where the console is shown and typed.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};
use sandbox::signal_fd;

use crate::args::Config;
use crate::metrics;

mod escape;
mod kept;
mod terminal;

use escape::Escape;
use kept::Kept;
pub use terminal::Raw;

/// How long a port that takes nothing is waited for, once.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// What came from a port.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// So many bytes for the guest.
    Bytes(usize),
    /// Nothing at the moment.
    Nothing,
    /// The user wants to leave.
    Leave,
    /// Nothing will come from here any more.
    Ended,
}

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// An open port.
#[derive(Debug)]
pub struct Port {
    input: Option<File>,
    output: Option<Sink>,
    listener: Option<UnixListener>,
    escape: Option<Escape>,
    /// Where to ask for the size, and where its changes are told.
    screen: Option<Screen>,
    stuck: bool,
    /// How long the file is that is written. It belongs to this process alone, so that what is counted stays true.
    position: Option<u64>,
    /// What is kept for the next client, instead of being dropped.
    kept: Option<Kept>,
    /// Keeps a pseudo-terminal from hanging up when nobody has it open.
    _slave: Option<OwnedFd>,
}

#[derive(Debug)]
struct Screen {
    terminal: OwnedFd,
    changes: OwnedFd,
}

#[derive(Debug)]
enum Sink {
    File(File),
    Client(UnixStream),
}

impl Port {
    /// Opens what the arguments name. A terminal is in raw mode until the second value is dropped.
    ///
    /// # Errors
    /// With the path.
    pub fn open(config: &Config) -> Result<(Port, Option<Raw>)> {
        match config {
            Config::Terminal => Port::terminal(),
            Config::Pty => Ok((Port::pty()?, None)),
            Config::File(path) => Ok((Port::file(path)?, None)),
            Config::Socket(path, keep) => Ok((Port::socket(path, *keep)?, None)),
        }
    }

    fn new() -> Port {
        Port {
            input: None,
            output: None,
            listener: None,
            escape: None,
            screen: None,
            stuck: false,
            position: None,
            kept: None,
            _slave: None,
        }
    }

    fn terminal() -> Result<(Port, Option<Raw>)> {
        let stdin = io::stdin();
        let mut port = Port::new();
        let mut raw = None;
        if stdin.is_terminal() {
            raw = Some(Raw::enter(stdin.as_fd()).context("Cannot switch the terminal to raw mode")?);
            let changes = signal_fd(&[libc::SIGWINCH]).context("Cannot watch the terminal's size")?;
            let terminal = stdin.as_fd().try_clone_to_owned().context("Cannot use the terminal")?;
            port.screen = Some(Screen { terminal, changes });
            port.escape = Some(Escape::default());
        }
        port.input = Some(reopen(stdin.as_fd(), 0, OFlags::RDONLY).context("Cannot use standard input")?);
        port.output = Some(Sink::File(reopen(io::stdout().as_fd(), 1, OFlags::WRONLY).context("Cannot use standard output")?));
        Ok((port, raw))
    }

    fn pty() -> Result<Port> {
        let what = "Cannot make a pseudo-terminal";
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context(what)?;
        grantpt(&master).context(what)?;
        unlockpt(&master).context(what)?;
        let path = ptsname(&master, Vec::new()).context(what)?;
        let slave = open(path.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).context(what)?;
        let mut modes = tcgetattr(&slave).context(what)?;
        modes.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &modes).context(what)?;
        let flags = rustix::fs::fcntl_getfl(&master).context(what)?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK).context(what)?;
        println!("{}", path.to_string_lossy());
        let output = master.try_clone().context(what)?;
        Ok(Port { input: Some(master.into()), output: Some(Sink::File(output.into())), _slave: Some(slave), ..Port::new() })
    }

    fn file(path: &Path) -> Result<Port> {
        let file = File::options().append(true).create(true).open(path);
        let file = file.with_context(|| format!("Cannot open {}", path.display()))?;
        let about = file.metadata().with_context(|| format!("Cannot look at {}", path.display()))?;
        // Of a device or a pipe nobody can tell later how much of a request went into it.
        let position = about.is_file().then_some(about.len());
        Ok(Port { output: Some(Sink::File(file)), position, ..Port::new() })
    }

    fn socket(path: &Path, keep: Option<usize>) -> Result<Port> {
        let what = || format!("Cannot listen on {}", path.display());
        let listener = daemon::listen(path)?;
        listener.set_nonblocking(true).with_context(what)?;
        Ok(Port { listener: Some(listener), kept: keep.map(Kept::new), ..Port::new() })
    }

    /// How far the file is written, modulo 2^32: a request is far shorter. `None` if this is no file.
    pub fn position(&self) -> Option<u32> {
        let [a, b, c, d, ..] = self.position?.to_le_bytes();
        Some(u32::from_le_bytes([a, b, c, d]))
    }

    /// What becomes readable when something was typed, or someone connects.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        match (&self.input, &self.listener) {
            (Some(input), _) => Some(input.as_fd()),
            (None, Some(listener)) => Some(listener.as_fd()),
            (None, None) => None,
        }
    }

    /// It waits for a client.
    pub fn is_listening(&self) -> bool {
        self.input.is_none() && self.listener.is_some()
    }

    /// What becomes writable when more of what is kept can be shown.
    pub fn behind(&self) -> Option<BorrowedFd<'_>> {
        match (&self.output, &self.kept) {
            (Some(Sink::Client(client)), Some(kept)) if !kept.first().is_empty() => Some(client.as_fd()),
            _ => None,
        }
    }

    /// What becomes readable when the size changes.
    pub fn size_changes(&self) -> Option<BorrowedFd<'_>> {
        self.screen.as_ref().map(|screen| screen.changes.as_fd())
    }

    /// The size, if this is a terminal.
    pub fn size(&self) -> Option<Size> {
        let screen = self.screen.as_ref()?;
        let size = tcgetwinsize(&screen.terminal).ok()?;
        Some(Size { columns: size.ws_col, rows: size.ws_row })
    }

    /// Takes the notice of a change of size away.
    pub fn acknowledge_size(&self) {
        let mut signal = [0; 128];
        if let Some(screen) = &self.screen {
            let _nothing = rustix::io::read(&screen.changes, &mut signal);
        }
    }

    /// Takes what was typed, or a client that has come.
    pub fn read(&mut self, to: &mut [u8]) -> Typed {
        let Some(input) = &mut self.input else { return self.accept() };
        match input.read(to) {
            Ok(count) if count > 0 => match self.escape.as_mut().map_or(Some(count), |escape| escape.filter(to, count)) {
                Some(0) => Typed::Nothing,
                Some(count) => Typed::Bytes(count),
                None => Typed::Leave,
            },
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Typed::Nothing,
            _ => self.input_ended(),
        }
    }

    fn accept(&mut self) -> Typed {
        let Some(listener) = &self.listener else { return Typed::Ended };
        let client = listener.accept().and_then(|(client, _)| {
            client.set_nonblocking(true)?;
            Ok((File::from(OwnedFd::from(client.try_clone()?)), client))
        });
        if let Ok((input, client)) = client {
            (self.input, self.output, self.stuck) = (Some(input), Some(Sink::Client(client)), false);
            self.catch_up();
        }
        Typed::Nothing
    }

    /// A client may be followed by another; a terminal that hangs up is gone.
    fn input_ended(&mut self) -> Typed {
        self.input = None;
        if self.listener.is_some() {
            self.output = None;
            return Typed::Nothing;
        }
        if self.screen.take().is_some() {
            tracing::error!("The terminal is gone; the guest goes on without it");
            self.output = None;
        }
        Typed::Ended
    }

    /// Shows bytes. What the port does not take is dropped.
    pub fn write(&mut self, bytes: &[u8]) {
        if let Some(kept) = &mut self.kept {
            metrics::DROPPED_BYTES.add(kept.add(bytes) as u64);
            return self.catch_up();
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some(sink) = &mut self.output else { break };
            match sink.write(rest) {
                Ok(0) => break,
                Ok(count) => {
                    self.stuck = false;
                    self.position = self.position.map(|position| position.wrapping_add(count as u64));
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.stuck || !sink.wait() {
                        self.stuck = true;
                        break;
                    }
                }
                // Gone, or full: the input's end tells more, if there is one.
                Err(_) => break,
            }
        }
        metrics::DROPPED_BYTES.add(rest.len() as u64);
    }
}

impl Port {
    /// Shows of what is kept as much as the client takes now. Nothing is waited for: the rest stays.
    pub fn catch_up(&mut self) {
        let (Some(kept), Some(sink)) = (&mut self.kept, &mut self.output) else { return };
        while !kept.first().is_empty() {
            match sink.write(kept.first()) {
                Ok(0) => return,
                Ok(count) => kept.take(count),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
                Err(_) => {
                    (self.input, self.output) = (None, None);
                    return;
                }
            }
        }
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::File(file) => file.write(bytes),
            Sink::Client(client) => {
                let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
                Ok(rustix::net::send(client, bytes, flags)?)
            }
        }
    }

    /// Waits until it takes something again. `false`: it did not.
    fn wait(&self) -> bool {
        let fd = match self {
            Sink::File(file) => file.as_fd(),
            Sink::Client(client) => client.as_fd(),
        };
        let limit = Timespec::try_from(PATIENCE).ok();
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], limit.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

/// The same file with a state of its own: reads and writes that do not block, without changing that for whoever else has the
/// terminal open. What cannot be opened again (a socket) is used as it is.
fn reopen(fd: BorrowedFd<'_>, number: i32, how: OFlags) -> Result<File> {
    let path = format!("/proc/self/fd/{number}");
    let flags = how | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::APPEND;
    let file = open(path, flags, Mode::empty()).or_else(|_| rustix::io::fcntl_dupfd_cloexec(fd, 3))?;
    Ok(File::from(file))
}
