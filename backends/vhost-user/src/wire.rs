//! One message on a stream socket: header, body and the descriptors that come with it.
//!
//! A message is received whole or not at all, and under a deadline that covers all of it: a peer that sends half a header
//! and falls silent costs the receiver that deadline and nothing more. Reads never go past the end of the message, so that the
//! descriptors of the next one are never taken for this one's. Every descriptor that was received is owned from the first
//! moment; what no one takes out of the [`Message`] is closed with it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use crate::{Error, Result};

/// Bytes of a header: request, flags, size of the body, each 32 bits in the machine's own byte order.
pub const HEADER: usize = 12;

/// Most bytes of a body. The largest legal message is a configuration space of 4 KiB with its own small header.
pub const MAX_BODY: usize = MAX_MSG_SIZE;

/// Most descriptors with one message.
pub const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;
const KNOWN_FLAGS: u32 = 0xf;

/// A message that was received whole.
#[derive(Debug)]
pub struct Message {
    /// The number of the request; which space it is from depends on the socket.
    pub request: u32,
    /// It answers a request.
    pub reply: bool,
    /// The sender waits for an acknowledgement.
    pub need_reply: bool,
    /// The body, at most [`MAX_BODY`] bytes.
    pub body: Vec<u8>,
    /// The descriptors that came with it, at most [`MAX_FDS`].
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The 64-bit number that the body is.
    pub fn u64(&self) -> Result<u64> {
        let body = <[u8; 8]>::try_from(self.body.as_slice());
        body.map(u64::from_ne_bytes).map_err(|_| self.wrong_size(8))
    }

    /// The two 32-bit numbers that the body is (a ring's index and something of it).
    pub fn u32_pair(&self) -> Result<(u32, u32)> {
        let both = self.u64()?.to_ne_bytes();
        let [a, b, c, d, e, f, g, h] = both;
        Ok((u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])))
    }

    /// The one descriptor that has to be there, no more and no less.
    pub fn one_fd(&mut self) -> Result<OwnedFd> {
        let count = self.fds.len();
        match (self.fds.pop(), self.fds.is_empty()) {
            (Some(fd), true) => Ok(fd),
            _ => Err(Error::Malformed(format!("request {} came with {count} descriptors instead of one", self.request))),
        }
    }

    /// The error that says the body should have had `expected` bytes.
    pub fn wrong_size(&self, expected: usize) -> Error {
        Error::Malformed(format!("request {} has {} bytes instead of {expected}", self.request, self.body.len()))
    }
}

/// The name of a frontend's request, for messages to people.
pub fn frontend_name(request: u32) -> String {
    FrontendReq::try_from(request).map_or_else(|_| format!("number {request}"), |known| format!("{known:?}"))
}

/// The name of a backend's request, for messages to people.
pub fn backend_name(request: u32) -> String {
    BackendReq::try_from(request).map_or_else(|_| format!("number {request}"), |known| format!("{known:?}"))
}

/// A point in time by which something has to be done, and the span it was given.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    span: Duration,
}

impl Deadline {
    /// `span` from now.
    pub fn after(span: Duration) -> Deadline {
        Deadline { at: Instant::now() + span, span }
    }

    /// The earlier one of both.
    pub fn or_sooner(self, other: Deadline) -> Deadline {
        if other.at < self.at { other } else { self }
    }

    pub(crate) fn left(&self) -> Option<Timespec> {
        let left = self.at.checked_duration_since(Instant::now())?;
        Timespec::try_from(left).ok()
    }
}

/// A stream socket on which whole messages travel.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl From<UnixStream> for Channel {
    fn from(stream: UnixStream) -> Channel {
        Channel { stream }
    }
}

impl Channel {
    /// Receives the next message. `what` names it in an error.
    ///
    /// # Errors
    /// [`Error::Closed`] when the peer ended between two messages; [`Error::Deadline`]; [`Error::Malformed`] for a header no
    /// peer may send, too many descriptors, or an end in the middle.
    pub fn receive(&self, what: &str, deadline: Deadline) -> Result<Message> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER];
        self.fill(&mut header, &mut fds, what, deadline, true)?;
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = header;
        let request = u32::from_ne_bytes([r0, r1, r2, r3]);
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        let size = usize::try_from(u32::from_ne_bytes([s0, s1, s2, s3])).unwrap_or(usize::MAX);
        if flags & VERSION_MASK != VERSION || flags & !KNOWN_FLAGS != 0 {
            return Err(Error::Malformed(format!("flags {flags:#x} in a header")));
        }
        if size > MAX_BODY {
            return Err(Error::Malformed(format!("a body of {size} bytes")));
        }
        let mut body = vec![0; size];
        self.fill(&mut body, &mut fds, what, deadline, false)?;
        Ok(Message { request, reply: flags & REPLY != 0, need_reply: flags & NEED_REPLY != 0, body, fds })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`Error::Deadline`] when the peer does not take it, [`Error::Closed`] when it is gone.
    pub fn request(&self, request: u32, need_reply: bool, body: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<()> {
        let flags = if need_reply { NEED_REPLY } else { 0 };
        self.send(request, flags, body, fds, deadline)
    }

    /// Answers the request `request`.
    ///
    /// # Errors
    /// As [`Channel::request`].
    pub fn reply(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<()> {
        self.send(request, REPLY, body, fds, deadline)
    }

    fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<()> {
        let size = u32::try_from(body.len()).map_err(|_| Error::Malformed("an over-long body".to_owned()))?;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        for word in [request, flags | VERSION, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        let mut rest = bytes.as_slice();
        let mut fds = fds;
        while !rest.is_empty() {
            match self.send_some(rest, fds) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, &frontend_name(request), deadline)?,
                Err(Errno::INTR) => {}
                // Other processes of this user have many descriptors on their way; the kernel counts them all together.
                Err(Errno::TOOMANYREFS) => self.pause(&frontend_name(request), deadline)?,
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(Error::Closed),
                Err(errno) => return Err(Error::socket("send a vhost-user message")(errno)),
            }
        }
        Ok(())
    }

    fn send_some(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
    }

    fn fill(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>, what: &str, deadline: Deadline, at_start: bool) -> Result<()> {
        let mut have = 0;
        while let Some(rest) = buf.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match self.receive_some(rest, fds) {
                Ok(0) if at_start && have == 0 => return Err(Error::Closed),
                Ok(0) => return Err(Error::Malformed("the connection ended in the middle of a message".to_owned())),
                Ok(got) => have += got,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, what, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(Error::Closed),
                Err(Errno::TOOBIG) => {
                    return Err(Error::Malformed(format!("more than {MAX_FDS} descriptors, or more than this process may hold")));
                }
                Err(errno) => return Err(Error::socket("receive a vhost-user message")(errno)),
            }
        }
        Ok(())
    }

    fn receive_some(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.stream, &mut [IoSliceMut::new(buf)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        // A truncated control message means that descriptors are missing: which ones cannot be told.
        if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(Errno::TOOBIG);
        }
        Ok(got.bytes)
    }

    /// Waits a moment, for something that no descriptor tells.
    fn pause(&self, what: &str, deadline: Deadline) -> Result<()> {
        deadline.left().ok_or_else(|| Error::Deadline { what: what.to_owned(), limit: deadline.span })?;
        let _interrupted = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
        Ok(())
    }

    fn wait(&self, events: PollFlags, what: &str, deadline: Deadline) -> Result<()> {
        let late = || Error::Deadline { what: what.to_owned(), limit: deadline.span };
        let left = deadline.left().ok_or_else(late)?;
        match poll(&mut [PollFd::new(&self.stream, events)], Some(&left)) {
            Ok(0) => Err(late()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(Error::socket("wait for the peer")(errno)),
        }
    }
}
