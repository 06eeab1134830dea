//! What the owner of a disk may ask for while it is in use: JSON lines on a socket of its own.
//!
//! # Theory of operation
//!
//! The thread that has read the image listens, reads a line, does what it says, and answers with a line. One client at a time: changes of a disk come one
//! after the other anyway. Who reaches the socket is trusted with the disk, but not with the process: lines have a greatest length,
//! and whatever is not understood is answered with an error.
//!
//! | command | with | does |
//! |---|---|---|
//! | `status` | | says what the disk is |
//! | `resize` | `bytes` | makes the disk larger; the guest is told |
//! | `limit` | `operations`, `bytes`: each `per_second` and `burst` | sets how much the disk may be used |
//! | `snapshot` | an overlay, as a descriptor | what was written so far stays as it is; the overlay takes what comes |
//! | `reset` | an overlay, as a descriptor | what was written to the top image is given up; the overlay begins anew |
//!
//! An overlay is a fresh qcow2 image of the disk's size, made by whoever asks: this process cannot make files. It comes as one descriptor, or
//! as two of the same file, the second of which was opened past the page cache.
//!
//! A snapshot or a reset is made between requests: the thread makes what was written last, then has the whole disk alone (all queues finish
//! what they are in, and wait), and puts the overlay in its place. That is a pause of milliseconds, which the guest sees as a slow request.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use image::Lookup;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio::limit::Rate;

use crate::image::Disk;
use crate::shared::Shared;

/// The longest line is a limit with four numbers.
const LONGEST_LINE: usize = 4096;

/// Descriptors of one command.
const MOST_FDS: usize = 2;

/// Where commands come from.
#[derive(Debug)]
pub enum Entrance {
    /// Whoever connects, one after the other.
    Listening(UnixListener),
    /// The one at the other end.
    Connected(UnixStream),
}

/// One command.
#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    Status,
    Resize {
        bytes: u64,
    },
    Limit {
        #[serde(default)]
        operations: Bound,
        #[serde(default)]
        bytes: Bound,
    },
    Snapshot,
    Reset,
}

/// What is allowed in a second; nothing is limited by zero.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Bound {
    per_second: u64,
    #[serde(default)]
    burst: u64,
}

impl From<Bound> for Rate {
    fn from(bound: Bound) -> Rate {
        Rate { per_second: bound.per_second, burst: bound.burst }
    }
}

/// The thread's own.
#[derive(Debug)]
pub struct Commands {
    disk: Arc<Disk>,
    shared: Arc<Shared>,
    lookup: Lookup,
}

impl Commands {
    /// For this disk.
    pub fn new(disk: Arc<Disk>, shared: Arc<Shared>) -> Commands {
        let lookup = disk.image().lookup();
        Commands { disk, shared, lookup }
    }

    /// Obeys for as long as the process lives, or its one client does.
    pub fn run(mut self, entrance: &Entrance) {
        match entrance {
            Entrance::Connected(stream) => self.talk(stream),
            Entrance::Listening(listener) => loop {
                let _interrupted = poll(&mut [PollFd::new(listener, PollFlags::IN)], None);
                match listener.accept() {
                    Ok((stream, _)) => self.talk(&stream),
                    Err(error) => tracing::warn!("Cannot accept whoever has a command: {error}"),
                }
            },
        }
    }

    fn talk(&mut self, stream: &UnixStream) {
        let mut heard = Heard::default();
        while let Some(line) = heard.line(stream) {
            let began = Instant::now();
            let answer = match self.obey(&line, std::mem::take(&mut heard.fds)) {
                Ok(Value::Object(mut said)) => {
                    said.insert("ok".to_owned(), true.into());
                    said.insert("microseconds".to_owned(), u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX).into());
                    Value::Object(said)
                }
                Ok(other) => other,
                Err(error) => {
                    let chain = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
                    json!({"ok": false, "error": chain})
                }
            };
            if say(stream, &answer).is_err() {
                return;
            }
        }
    }

    fn obey(&mut self, line: &[u8], fds: Vec<OwnedFd>) -> Result<Value> {
        let command: Command = serde_json::from_slice(line).map_err(|error| anyhow!("This is no command: {error}"))?;
        match command {
            Command::Status => Ok(self.status()),
            Command::Resize { bytes } => self.resize(bytes),
            Command::Limit { operations, bytes } => {
                self.shared.limits.set(operations.into(), bytes.into());
                tracing::info!(?operations, ?bytes, "the disk has new limits");
                Ok(self.status())
            }
            Command::Snapshot => self.put(fds, false),
            Command::Reset => self.put(fds, true),
        }
    }

    fn status(&self) -> Value {
        let (operations, bytes) = self.shared.limits.rates();
        let bound = |rate: Rate| Bound { per_second: rate.per_second, burst: rate.burst };
        json!({
            "bytes": self.shared.bytes(),
            "read-only": self.shared.checks().read_only,
            "images": self.disk.image().files().len(),
            "direct": self.shared.direct.is_some(),
            "limits": {"operations": bound(operations), "bytes": bound(bytes)},
        })
    }

    fn resize(&mut self, bytes: u64) -> Result<Value> {
        self.disk.image().resize(bytes)?;
        self.shared.resized(bytes);
        tracing::info!(bytes, "the disk has a new size");
        Ok(self.status())
    }

    /// Puts an overlay on the image, or in the place of its top.
    fn put(&mut self, fds: Vec<OwnedFd>, instead: bool) -> Result<Value> {
        ensure!(!self.shared.checks().read_only, "The disk is read-only");
        let layer = self.disk.overlay(fds)?;
        // As much as can be done while the guest goes on.
        if !instead {
            self.lookup.flush()?;
        }
        let began = Instant::now();
        let alone = self.lookup.exclude(0, self.shared.bytes()).context("The disk cannot be had alone")?;
        let put = if instead { self.disk.image().replace(&layer) } else { self.disk.image().overlay(&layer) };
        drop(alone);
        self.disk.sweep();
        let pause = began.elapsed();
        put.context("The overlay cannot be used")?;
        let micros = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        tracing::info!(pause_us = micros, "{}", if instead { "the disk was reset" } else { "the disk goes on in an overlay" });
        let mut status = self.status();
        status["pause-microseconds"] = micros.into();
        Ok(status)
    }
}

/// What a client has said and nobody has obeyed yet.
#[derive(Debug, Default)]
struct Heard {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Heard {
    /// The next line, with what came with it left in `fds`. `None`: the client is gone, or says what nobody should.
    fn line(&mut self, stream: &UnixStream) -> Option<Vec<u8>> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let rest = self.bytes.split_off(end + 1);
                return Some(std::mem::replace(&mut self.bytes, rest));
            }
            if self.bytes.len() > LONGEST_LINE {
                let _gone_anyway = say(stream, &json!({"ok": false, "error": "This line is too long"}));
                return None;
            }
            if !self.hear(stream) {
                return None;
            }
        }
    }

    fn hear(&mut self, stream: &UnixStream) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 1024];
        let _interrupted = poll(&mut [PollFd::new(stream, PollFlags::IN)], None);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = match recvmsg(stream, &mut [io::IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(received) => received,
            Err(errno) => return matches!(errno, rustix::io::Errno::INTR | rustix::io::Errno::AGAIN),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        self.fds.truncate(MOST_FDS);
        self.bytes.extend_from_slice(bytes.get(..received.bytes).unwrap_or_default());
        received.bytes > 0
    }
}

fn say(stream: &UnixStream, answer: &Value) -> Result<()> {
    let mut line = answer.to_string().into_bytes();
    line.push(b'\n');
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        match rustix::io::write(stream.as_fd(), rest) {
            Ok(0) => bail!("The client takes no answer"),
            Ok(said) => rest = rest.get(said..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
