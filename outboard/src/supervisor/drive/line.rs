//! The composer's end of a disk process's control socket: a line of JSON each way. Nothing here waits.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

/// A disk process says a few hundred bytes. One that says more without a line's end is not one of ours any more.
const LONGEST: usize = 64 * 1024;

/// The socket, and what has come of a line.
#[derive(Debug)]
pub(super) struct Line {
    stream: UnixStream,
    heard: Vec<u8>,
}

impl Line {
    /// A pair: our end, and the process's.
    pub(super) fn pair() -> Result<(Self, OwnedFd)> {
        let about = "Cannot make a disk's control socket";
        let (ours, theirs) = UnixStream::pair().context(about)?;
        ours.set_nonblocking(true).context(about)?;
        Ok((Self { stream: ours, heard: Vec::new() }, theirs.into()))
    }

    /// What to wait for.
    pub(super) fn source(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Sends a command, with what goes with it. A process that does not read is not waited for.
    pub(super) fn send(&self, command: &Value, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let text = format!("{command}\n");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.stream, &[IoSlice::new(text.as_bytes())], &mut control, flags)
            .context("Cannot reach the disk's process")?;
        Ok(())
    }

    /// What has come in the meantime. `false`: there will be no more.
    pub(super) fn hear(&mut self) -> (Vec<Value>, bool) {
        let mut buffer = [0_u8; 4096];
        let mut more = true;
        while self.heard.len() < LONGEST {
            match self.stream.read(&mut buffer) {
                Ok(0) => more = false,
                Ok(count) => {
                    self.heard.extend_from_slice(buffer.get(..count).unwrap_or_default());
                    continue;
                }
                Err(error) => more = matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted),
            }
            break;
        }
        let mut lines = Vec::new();
        while let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
            let rest = self.heard.split_off(end + 1);
            lines.push(serde_json::from_slice(&std::mem::replace(&mut self.heard, rest)).unwrap_or_default());
        }
        (lines, more && self.heard.len() < LONGEST)
    }
}
