//! What a frontend needs that moves its guest to another host: the log of written pages, and the device's state.
//!
//! The state is what the device's driver has set and no other message says again ([`Device::save`]): a few bytes of a disk, many of a file
//! server. It goes through a pipe that the frontend gives, in pieces, as the pipe takes or gives them: between the frontend's messages,
//! since a frontend fills a pipe before it says more. What a device was given is looked at when the frontend asks how it went. Either end
//! of a pipe is the frontend's, so nothing is read beyond what the device has a use for ([`Device::most_state`]), and when the frontend
//! asks, nobody is waited for longer than [`STATE_LIMIT`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use tracing::warn;
use vhost::vhost_user::message::FrontendReq;
use virtio::device::Device;
use virtio::dirty::DirtyLog;
use virtio::memory::RegionFile;

use super::{Answer, Backend, refused};
use crate::features::LOG_SHMFD;
use crate::wire::{Deadline, Message};
use crate::{Error, Result};

/// Bytes of a piece, and pieces that are moved before the frontend is listened to again.
const PIECE: usize = 64 * 1024;
const PIECES: usize = 64;

/// How long a frontend may take over the rest of a state, once it has asked how it went.
const STATE_LIMIT: Duration = Duration::from_secs(1);

/// Directions of a transfer.
const SAVE: u32 = 0;
const LOAD: u32 = 1;

/// In the answer: the frontend's own descriptor is used, none comes back.
const NO_FD: u64 = 1 << 8;

/// A transfer that was begun.
#[derive(Debug)]
pub(super) enum State {
    /// It is still to be written from here on.
    Saving { pipe: OwnedFd, state: Vec<u8>, at: usize },
    /// It is still to be read to its end, and may have so many bytes.
    Loading { pipe: OwnedFd, state: Vec<u8>, most: usize },
    /// It was read to its end.
    Came(Vec<u8>),
    /// It was written.
    Saved,
    /// That went wrong.
    Failed,
}

impl State {
    /// What is waited for.
    pub(super) fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match self {
            State::Saving { pipe, .. } => Some((pipe.as_fd(), PollFlags::OUT)),
            State::Loading { pipe, .. } => Some((pipe.as_fd(), PollFlags::IN)),
            State::Came(_) | State::Saved | State::Failed => None,
        }
    }

    /// Moves what the pipe takes or gives now. The pipe is closed with what ends it.
    pub(super) fn advance(&mut self) {
        for _ in 0..PIECES {
            match self.piece() {
                Ok(Some(ended)) => *self = ended,
                Ok(None) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    warn!(target: virtio::GUEST, "The pipe for the device's state fails: {errno}");
                    *self = State::Failed;
                }
            }
            if self.waits_for().is_none() {
                return;
            }
        }
    }

    fn piece(&mut self) -> std::result::Result<Option<State>, Errno> {
        match self {
            State::Saving { pipe, state, at } => {
                let rest = state.get(*at..).unwrap_or_default();
                let piece = rest.get(..PIECE).unwrap_or(rest);
                if piece.is_empty() {
                    return Ok(Some(State::Saved));
                }
                *at = at.saturating_add(rustix::io::write(pipe, piece)?);
            }
            State::Loading { pipe, state, most } => {
                let mut piece = [0; PIECE];
                let read = rustix::io::read(pipe, &mut piece)?;
                if read == 0 {
                    return Ok(Some(State::Came(std::mem::take(state))));
                }
                state.extend_from_slice(piece.get(..read).unwrap_or_default());
                if state.len() > *most {
                    warn!(target: virtio::GUEST, "The device's state is longer than {most} bytes, which no such device has");
                    return Ok(Some(State::Failed));
                }
            }
            State::Came(_) | State::Saved | State::Failed => {}
        }
        Ok(None)
    }

    /// Moves the rest, if it does not take long.
    fn finish(mut self) -> State {
        let deadline = Deadline::after(STATE_LIMIT);
        loop {
            self.advance();
            match self.waits_for() {
                None => return self,
                Some((pipe, events)) if ready(pipe, events, deadline) => {}
                Some(_) => return State::Failed,
            }
        }
    }
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
        let pipe = message.one_fd()?;
        if phase != 0 {
            return Err(refused(FrontendReq::SET_DEVICE_STATE_FD, &format!("there is no phase {phase}")));
        }
        let failed = |errno: Errno| Error::socket("use the pipe for the device's state")(errno);
        let flags = fcntl_getfl(&pipe).map_err(failed)?;
        fcntl_setfl(&pipe, flags | OFlags::NONBLOCK).map_err(failed)?;
        let state = match direction {
            SAVE => match self.device.save() {
                Ok(state) => State::Saving { pipe, state, at: 0 },
                Err(why) => {
                    warn!(target: virtio::GUEST, "The device's state cannot be saved: {why}");
                    self.connection.state = Some(State::Failed);
                    return Ok(Answer::Number(NO_FD | 1));
                }
            },
            LOAD => State::Loading { pipe, state: Vec::new(), most: self.device.most_state() },
            other => return Err(refused(FrontendReq::SET_DEVICE_STATE_FD, &format!("there is no direction {other}"))),
        };
        self.connection.state.insert(state).advance();
        Ok(Answer::Number(NO_FD))
    }

    /// Zero: it went well.
    pub(super) fn check_state(&mut self) -> Result<Answer> {
        self.must_be_quiet(FrontendReq::CHECK_DEVICE_STATE)?;
        let well = match self.connection.state.take().map(State::finish) {
            Some(State::Saved) => true,
            Some(State::Came(state)) => match self.device.load(&state) {
                Ok(()) => true,
                Err(why) => {
                    warn!(target: virtio::GUEST, "The device's state cannot be taken over: {why}");
                    false
                }
            },
            _ => false,
        };
        Ok(Answer::Number(u64::from(!well)))
    }
}

fn ready(pipe: BorrowedFd<'_>, events: PollFlags, deadline: Deadline) -> bool {
    let Some(left) = deadline.left() else { return false };
    matches!(poll(&mut [PollFd::from_borrowed_fd(pipe, events)], Some(&left)), Ok(1) | Err(Errno::INTR))
}
