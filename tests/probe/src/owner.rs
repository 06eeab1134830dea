//! The owner of a disk: what is said on the control socket of `outboard-blk`.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Says one line, perhaps with an overlay, and does not wait. The answer comes on the stream.
///
/// # Errors
/// When nobody listens.
pub fn say(control: &Path, line: &str, overlay: Option<BorrowedFd<'_>>) -> Result<UnixStream> {
    let stream = UnixStream::connect(control).context("Cannot reach the backend's control socket")?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    if let Some(fd) = &overlay {
        with.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
    }
    let words = [IoSlice::new(line.as_bytes()), IoSlice::new(b"\n")];
    sendmsg(&stream, &words, &mut with, SendFlags::NOSIGNAL).with_context(|| format!("Cannot say {line}"))?;
    Ok(stream)
}
