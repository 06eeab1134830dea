//! A process of the machine: started confined, watched by its pidfd, its words on stderr collected.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use sandbox::{Identity, NetNamespace, Spawn};
use virtio::metrics::page;

use crate::machine::Stdio;
use crate::notices;

/// A line longer than this is cut: a process that writes without line feeds must not fill our memory.
const LONGEST_LINE: usize = 4096;
/// What is kept back of a process that has not served yet.
const MOST_HELD_LINES: usize = 64;

/// The first number a process can be given a descriptor under.
const FIRST: i32 = 3;

/// What to start.
#[derive(Debug)]
pub struct Order<'a> {
    /// The program's file.
    pub program: &'a Path,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors, each with its number in the process.
    pub fds: Vec<(BorrowedFd<'a>, i32)>,
    /// What it gets of our stdin and stdout.
    pub stdio: Stdio,
    /// The machine's empty network namespace.
    pub net: &'a NetNamespace,
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    /// In our own PID namespace.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// When it was started.
    pub began: Instant,
    /// When that was by the calendar.
    pub since: SystemTime,
    /// Its stderr.
    pub log: Log,
    /// Where it shows its counters. Each process gets a page of its own, so none can write into its successor's.
    pub counters: OwnedFd,
}

impl Process {
    /// Starts it.
    pub fn start(order: Order<'_>, name: &str, hold: bool) -> Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("Cannot make a pipe")?;
        fcntl_setfl(&reader, fcntl_getfl(&reader)? | OFlags::NONBLOCK).context("Cannot set up a pipe")?;
        let null = File::options().read(true).write(true).open("/dev/null").context("Cannot open /dev/null")?;
        let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
        let (input, output) = match order.stdio {
            Stdio::Terminal => (stdin.as_fd(), stdout.as_fd()),
            Stdio::Output => (null.as_fd(), stdout.as_fd()),
            Stdio::Nothing | Stdio::Attach => (null.as_fd(), null.as_fd()),
        };
        let counters = page::make().context("Cannot make a page for counters")?;
        let Order { mut args, mut fds, .. } = order;
        let number = fds.iter().map(|(_, number)| *number + 1).max().unwrap_or(FIRST);
        args.extend(["--metrics-fd".into(), number.to_string().into()]);
        fds.push((counters.as_fd(), number));
        let child = sandbox::spawn(&Spawn {
            program: order.program,
            args,
            fds,
            stdin: Some(input),
            stdout: Some(output),
            stderr: Some(writer.as_fd()),
            net: Some(order.net),
            identity: Identity::Own,
        })
        .with_context(|| format!("Cannot start {}", order.program.display()))?;
        let log = Log::new(reader, name, hold);
        let (began, since) = (Instant::now(), SystemTime::now());
        Ok(Self { pid: child.pid, pidfd: child.pidfd, began, since, log, counters })
    }

    /// Sends a signal; to a process that has just ended, it makes no difference.
    pub fn signal(&self, signal: Signal) {
        let _has_ended = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Whether it has been stopped, or goes on again, since the last look; `None`: neither.
    ///
    /// The kernel tells a parent of stops by signals only. A process that stands still under a debugger is not told of.
    pub fn stopped(&self) -> Option<bool> {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::CONTINUED | WaitIdOptions::NOHANG;
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), options).ok()??;
        Some(status.stopped())
    }

    /// Collects what is left of an ended process.
    pub fn reap(&mut self) -> Ending {
        self.log.read();
        let options = WaitIdOptions::EXITED;
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Exit(code),
                (None, Some(signal)) => Ending::Signal(signal),
                (None, None) => Ending::Unknown,
            },
            _ => Ending::Unknown,
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// The kernel does not say.
    Unknown,
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "ended with status {code}"),
            Self::Signal(31) => write!(f, "was killed by its system call filter"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => write!(f, "ended"),
        }
    }
}

/// What a process says. It is passed on line by line under the process's name. Until the process serves, its lines are kept
/// back: if it never does, the last one is the reason, and is said once.
#[derive(Debug)]
pub struct Log {
    reader: Option<OwnedFd>,
    name: String,
    partial: Vec<u8>,
    held: Option<Vec<String>>,
    /// The sentence with which a program of ours ends, kept for whoever tells of the end.
    farewell: Option<String>,
}

impl Log {
    fn new(reader: OwnedFd, name: &str, hold: bool) -> Self {
        let held = if hold { Some(Vec::new()) } else { None };
        Self { reader: Some(reader), name: name.to_owned(), partial: Vec::new(), held, farewell: None }
    }

    /// What to wait for, until the process has closed its end.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        self.reader.as_ref().map(AsFd::as_fd)
    }

    /// Reads what there is.
    pub fn read(&mut self) {
        let mut buffer = [0_u8; LONGEST_LINE];
        let Some(reader) = self.reader.take() else {
            return;
        };
        let mut file = File::from(reader);
        // One process that never stops writing must not keep us from the others: a few buffers, then the loop goes on.
        for _ in 0..4 {
            match file.read(&mut buffer) {
                Ok(0) => {
                    self.take_line();
                    return;
                }
                Ok(count) => self.add(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
        }
        self.reader = Some(OwnedFd::from(file));
    }

    /// The process serves: from here on its lines are passed on.
    pub fn release(&mut self) {
        for line in self.held.take().unwrap_or_default().into_iter().chain(self.farewell.take()) {
            self.pass(&line);
        }
    }

    /// The last thing a process said that never served, or the sentence it ended with, without its own name in front.
    pub fn last_words(&mut self) -> Option<String> {
        let lines = self.held.take().or_else(|| self.farewell.take().map(|line| vec![line]))?;
        // The command line parser ends its error with advice that would be of no use here.
        if let Some(error) = lines.iter().find_map(|line| line.strip_prefix("error: ")) {
            return Some(error.to_owned());
        }
        let last = lines.iter().rev().find(|line| !line.trim().is_empty())?;
        let program = last.strip_prefix("outboard-").and_then(|rest| rest.split_once(": "));
        Some(program.map_or(last.as_str(), |(_, sentence)| sentence).to_owned())
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' || self.partial.len() >= LONGEST_LINE {
                self.take_line();
            }
            if *byte != b'\n' {
                self.partial.push(*byte);
            }
        }
    }

    fn take_line(&mut self) {
        let bytes = mem::take(&mut self.partial);
        if bytes.is_empty() {
            return;
        }
        let line = notices::printable(&String::from_utf8_lossy(&bytes));
        match &mut self.held {
            Some(held) if held.len() < MOST_HELD_LINES => held.push(line),
            Some(held) => {
                held.remove(0);
                held.push(line);
            }
            None if line.starts_with("outboard-") => {
                if let Some(earlier) = self.farewell.replace(line) {
                    self.pass(&earlier);
                }
            }
            None => self.pass(&line),
        }
    }

    fn pass(&self, line: &str) {
        notices::line(&format!("{}: {line}", self.name));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_last_words_of_a_process_that_never_served() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut log = Log::new(reader, "root", true);
        let mut writer = File::from(writer);
        writer.write_all(b"starting\noutboard-blk: Cannot open image /x: Permission denied (os error 13)\n").unwrap();
        drop(writer);
        log.read();
        log.read();
        assert!(log.source().is_none());
        assert_eq!(log.last_words().unwrap(), "Cannot open image /x: Permission denied (os error 13)");
    }

    #[test]
    fn the_sentence_at_the_end_is_kept_for_who_tells_of_it() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut log = Log::new(reader, "vmm", true);
        log.release();
        File::from(writer).write_all(b"outboard-vmm: This machine's KVM cannot run this guest\n").unwrap();
        log.read();
        assert_eq!(log.last_words().unwrap(), "This machine's KVM cannot run this guest");
    }

    #[test]
    fn endless_lines_are_cut() {
        let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut log = Log::new(reader, "root", true);
        log.add(&vec![b'x'; 3 * LONGEST_LINE]);
        assert!(log.partial.len() <= LONGEST_LINE);
        assert_eq!(log.held.unwrap().len(), 2);
    }
}
