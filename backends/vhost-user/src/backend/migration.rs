//! What a frontend needs that moves its guest to another host: the log of written pages, and the device's state.
//!
//! The state is what the device's driver has set and no other message says again ([`Device::save`]): a few bytes. To save it, the frontend
//! gives a pipe, into which all of it is written at once. To load it, the frontend gives a pipe and writes into it when it likes; the
//! state is read when the frontend asks how it went. Either end of a pipe is the frontend's, so nothing is read beyond [`MOST`], and
//! nobody is waited for longer than [`STATE_LIMIT`].

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;
use virtio::device::Device;
use virtio::dirty::DirtyLog;
use virtio::memory::RegionFile;

use super::{Answer, Backend, refused};
use crate::features::LOG_SHMFD;
use crate::wire::{Deadline, Message};
use crate::{Error, Result};

/// Most bytes of a device's state. A pipe takes as many at once.
const MOST: usize = 4096;

/// How long a frontend may take to write a state, or to take one.
const STATE_LIMIT: Duration = Duration::from_secs(1);

/// Directions of a transfer.
const SAVE: u32 = 0;
const LOAD: u32 = 1;

/// In the answer: the frontend's own descriptor is used, none comes back.
const NO_FD: u64 = 1 << 8;

/// A transfer that was begun.
#[derive(Debug)]
pub(super) enum State {
    /// It is still to be read.
    Loading(OwnedFd),
    /// It is saved, or that went wrong.
    Saved(bool),
}

impl<D: Device> Backend<D> {
    /// The log may be given, and taken away, while rings run.
    pub(super) fn set_log(&mut self, message: &mut Message) -> Result<Answer> {
        let word = |at: usize| message.body.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
        let (Some(size), Some(offset), 16) = (word(0), word(8), message.body.len()) else { return Err(message.wrong_size(16)) };
        let fd = message.one_fd()?;
        let region = RegionFile { guest_addr: 0, size, user_addr: 0, offset, fd };
        let log = Arc::new(DirtyLog::new(region, self.trust).map_err(Error::Memory)?);
        self.between(|connection| connection.dirty = Some(log))?;
        // With the protocol feature the request has an answer of its own, whose number means nothing.
        Ok(if self.connection.protocol & LOG_SHMFD != 0 { Answer::Number(0) } else { Answer::Done })
    }

    /// A frontend may give a descriptor to be told of log entries by. It looks at the log when it likes anyway.
    pub(super) fn set_log_notices(&mut self, message: &mut Message) -> Result<Answer> {
        message.one_fd()?;
        Ok(Answer::Done)
    }

    pub(super) fn transfer_state(&mut self, message: &mut Message) -> Result<Answer> {
        self.must_be_quiet(FrontendReq::SET_DEVICE_STATE_FD)?;
        let (direction, phase) = message.u32_pair()?;
        let fd = message.one_fd()?;
        if phase != 0 {
            return Err(refused(FrontendReq::SET_DEVICE_STATE_FD, &format!("there is no phase {phase}")));
        }
        let failed = |errno: Errno| Error::socket("use the pipe for the device's state")(errno);
        let flags = fcntl_getfl(&fd).map_err(failed)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(failed)?;
        self.connection.state = Some(match direction {
            SAVE => State::Saved(save(&fd, &self.device.save())),
            LOAD => State::Loading(fd),
            other => return Err(refused(FrontendReq::SET_DEVICE_STATE_FD, &format!("there is no direction {other}"))),
        });
        Ok(Answer::Number(NO_FD))
    }

    /// Zero: it went well.
    pub(super) fn check_state(&mut self) -> Result<Answer> {
        self.must_be_quiet(FrontendReq::CHECK_DEVICE_STATE)?;
        let well = match self.connection.state.take() {
            Some(State::Saved(well)) => well,
            Some(State::Loading(fd)) => load(&fd).is_some_and(|state| self.device.load(&state).is_ok()),
            None => false,
        };
        Ok(Answer::Number(u64::from(!well)))
    }
}

/// Writes all of a state. `false`: the pipe does not take it.
fn save(fd: &OwnedFd, state: &[u8]) -> bool {
    let (deadline, mut rest) = (Deadline::after(STATE_LIMIT), state);
    while !rest.is_empty() {
        match rustix::io::write(fd, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if ready(fd, PollFlags::OUT, deadline) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Reads a state to its end. `None`: there is no end, or not in time.
fn load(fd: &OwnedFd) -> Option<Vec<u8>> {
    let deadline = Deadline::after(STATE_LIMIT);
    let (mut state, mut piece) = (Vec::new(), [0; 512]);
    loop {
        match rustix::io::read(fd, &mut piece) {
            Ok(0) => return Some(state),
            Ok(read) => state.extend_from_slice(piece.get(..read)?),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if ready(fd, PollFlags::IN, deadline) => {}
            Err(_) => return None,
        }
        if state.len() > MOST {
            return None;
        }
    }
}

fn ready(fd: &OwnedFd, events: PollFlags, deadline: Deadline) -> bool {
    let Some(left) = deadline.left() else { return false };
    matches!(poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), events)], Some(&left)), Ok(1) | Err(Errno::INTR))
}
