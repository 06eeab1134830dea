//! The log of the host, where lines go that are not for standard error.
//!
//! A line is one datagram: `<PRIORITY>program[pid]: text`, to which the receiver adds the time. It is written without waiting: when the
//! receiver does not keep up, lines are lost and nothing is held up. It takes no system call of its own, `write` will do.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Where the host takes lines.
const PATH: &str = "/dev/log";

/// What daemons say (`LOG_DAEMON`).
const FACILITY: u8 = 3 << 3;

static LOG: OnceLock<Syslog> = OnceLock::new();

/// A connection to the host's log.
#[derive(Debug)]
pub(crate) struct Syslog {
    socket: UnixDatagram,
    /// The program, and its number.
    tag: String,
}

/// Connects, while paths are still there.
pub(crate) fn connect(program: &str) -> Result<&'static Syslog> {
    let socket = UnixDatagram::unbound().context("Cannot make a socket")?;
    let connected = socket.connect(PATH).and_then(|()| socket.set_nonblocking(true));
    connected.with_context(|| format!("Cannot reach the host's log at {PATH} (without --syslog it is standard error)"))?;
    // Here the process is number 1. The files of the host say what it is there.
    let pid = std::fs::read_link("/proc/self").unwrap_or_default();
    Ok(LOG.get_or_init(|| Syslog { socket, tag: format!("{program}[{}]", pid.display()) }))
}

/// The connection, if there is one.
pub(crate) fn connected() -> Option<&'static Syslog> {
    LOG.get()
}

impl Syslog {
    /// One line.
    pub(crate) fn say(&self, level: Level, text: &str) {
        let severity = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        let line = format!("<{}>{}: {}", FACILITY | severity, self.tag, text.trim());
        let _nobody_keeps_up = rustix::io::write(&self.socket, line.as_bytes());
    }
}

impl<'a> MakeWriter<'a> for &'static Syslog {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self, Level::INFO)
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line {
        Line(self, *metadata.level())
    }
}

/// A line that is about to come, as a whole.
#[derive(Debug)]
pub(crate) struct Line(&'static Syslog, Level);

impl Write for Line {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.say(self.1, &String::from_utf8_lossy(text));
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
