//! A frontend with bad intentions: it can say everything a correct one can, and anything else.
//!
//! Numbers and layouts are written here from the vhost-user specification. Each message is followed by what tells whether it was
//! taken: its acknowledgement where the backend gives one, the answer to a harmless question otherwise.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_user::features;
use vhost_user::wire::{Channel, Deadline, Message};

use super::guest::{Guest, SIZE};
use super::target::Target;
use super::{Halt, Seen};

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const RESET_OWNER: u32 = 4;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
pub(super) const SET_VRING_ERR: u32 = 14;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const IOTLB: u32 = 22;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;
pub(super) const POSTCOPY_ADVISE: u32 = 28;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
pub(super) const RESET_DEVICE: u32 = 34;
pub(super) const ADD_MEM_REG: u32 = 37;
pub(super) const REM_MEM_REG: u32 = 38;
pub(super) const SET_DEVICE_STATE_FD: u32 = 42;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
const PROTOCOL: u64 = features::VHOST_USER_F_PROTOCOL_FEATURES;
const INDIRECT: u64 = 1 << 28;

/// How long an answer may take. Ours gives an unfinished message one second.
const ANSWER: Duration = Duration::from_secs(3);

/// How long a ring may take for one request while it is attacked.
const RING: Duration = Duration::from_millis(300);

/// Most descriptors that Linux lets one message carry.
pub(super) const MOST_FDS: usize = 253;

pub(super) type Result<T> = std::result::Result<T, Halt>;

/// One connection of the attacker's, and the guest it pretends to be.
pub(super) struct Foe {
    pub(super) stream: UnixStream,
    channel: Channel,
    pub(super) target: Target,
    pub(super) guest: Guest,
    protocol: u64,
    greeted: bool,
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
    pub(super) error: OwnedFd,
}

impl Foe {
    /// Nothing is said yet.
    pub(super) fn new(stream: UnixStream, target: Target) -> anyhow::Result<Foe> {
        stream.set_write_timeout(Some(ANSWER))?;
        let channel = Channel::from(stream.try_clone().context("Cannot copy a socket")?);
        let (kick, call, error) = (event(0)?, event(0)?, event(0)?);
        Ok(Foe { stream, channel, target, guest: Guest::new()?, protocol: 0, greeted: false, kick, call, error })
    }

    /// Sends bytes as they are.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(|_| Halt::Closed)
    }

    /// Sends a header of these three words.
    pub(super) fn header(&mut self, request: u32, flags: u32, size: u32) -> Result<()> {
        self.raw(&[request, flags, size].map(u32::to_ne_bytes).concat())
    }

    /// Sends a whole message with any number of descriptors.
    pub(super) fn send(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let flags = VERSION | if self.acks() { NEED_REPLY } else { 0 };
        let size = u32::try_from(body.len()).map_err(|_| Halt::Closed)?;
        let bytes = [&[request, flags, size].map(u32::to_ne_bytes).concat()[..], body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Halt::Trouble(anyhow!("Too many descriptors for one message")));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|_| Halt::Closed)
    }

    /// Sends a message and finds out what the backend thought of it.
    pub(super) fn tell(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Seen> {
        self.send(request, body, fds)?;
        if !self.acks() {
            return Ok(self.still_answers());
        }
        match self.receive(request) {
            Ok(message) => Ok(if message.u64().is_ok_and(|value| value == 0) { Seen::Taken } else { Seen::Refused }),
            Err(seen) => Ok(seen),
        }
    }

    /// Sends what a correct frontend would send. A backend that does not take it has said all it has to say.
    pub(super) fn must(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        match self.tell(request, body, fds)? {
            Seen::Taken => Ok(()),
            Seen::Closed => Err(Halt::Closed),
            other => Err(Halt::Saw(other)),
        }
    }

    /// Asks for an answer of its own.
    pub(super) fn ask(&self, request: u32, body: &[u8]) -> std::result::Result<Message, Seen> {
        self.send(request, body, &[]).map_err(|_| Seen::Closed)?;
        self.receive(request)
    }

    fn receive(&self, request: u32) -> std::result::Result<Message, Seen> {
        let deadline = Deadline::after(ANSWER);
        loop {
            match self.channel.receive("a message", deadline) {
                Ok(message) if message.request == request && message.reply => return Ok(message),
                // An answer to something that was sent before.
                Ok(_) => {}
                Err(vhost_user::Error::Deadline { .. }) => return Err(Seen::Waits),
                Err(_) => return Err(Seen::Closed),
            }
        }
    }

    /// Asks a harmless question.
    pub(super) fn still_answers(&self) -> Seen {
        self.ask(GET_FEATURES, &[]).map_or_else(|seen| seen, |_| Seen::Taken)
    }

    /// Waits for the connection's end, without a word.
    pub(super) fn wait_for_close(&mut self, limit: Duration) -> Seen {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        if poll(&mut fds, limit.as_ref()).unwrap_or(0) > 0 { Seen::Closed } else { Seen::Waits }
    }

    fn acks(&self) -> bool {
        self.protocol & features::REPLY_ACK != 0
    }

    /// Whether the backend has a feature of the protocol.
    pub(super) fn needs(&self, feature: u64, name: &'static str) -> Result<()> {
        if self.protocol & feature == 0 { Err(Halt::NotOffered(name)) } else { Ok(()) }
    }

    /// Features, as a correct frontend settles them.
    pub(super) fn greet(&mut self) -> Result<()> {
        if self.greeted {
            return Ok(());
        }
        let number = |answer: std::result::Result<Message, Seen>| -> Result<u64> {
            let message = answer.map_err(|_| Halt::Closed)?;
            message.u64().map_err(|error| Halt::Trouble(error.into()))
        };
        let offered = number(self.ask(GET_FEATURES, &[]))?;
        if offered & PROTOCOL == 0 {
            return Err(Halt::NotOffered("protocol features"));
        }
        let protocol = number(self.ask(GET_PROTOCOL_FEATURES, &[]))? & features::WANTED;
        self.must(SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        self.protocol = protocol;
        self.must(SET_OWNER, &[], &[])?;
        let wanted = offered & (1 << 32 | INDIRECT | PROTOCOL);
        self.must(SET_FEATURES, &wanted.to_ne_bytes(), &[])?;
        self.greeted = true;
        Ok(())
    }

    /// Everything up to the kick descriptor, which would start the ring.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.greet()?;
        self.send_memory()?;
        self.place_ring()
    }

    /// The memory table, as it is.
    pub(super) fn send_memory(&self) -> Result<()> {
        let (body, fds) = self.guest.table();
        self.must(SET_MEM_TABLE, &body, &fds)
    }

    /// Size, base and addresses of the ring; the descriptors for interrupts and errors.
    pub(super) fn place_ring(&mut self) -> Result<()> {
        let ring = self.target.queue;
        self.must(SET_VRING_NUM, &pair(ring, SIZE.into()), &[])?;
        self.must(SET_VRING_BASE, &pair(ring, 0), &[])?;
        self.must(SET_VRING_ADDR, &self.guest.addresses(ring), &[])?;
        self.must(SET_VRING_CALL, &u64::from(ring).to_ne_bytes(), &[self.call.as_fd()])?;
        self.must(SET_VRING_ERR, &u64::from(ring).to_ne_bytes(), &[self.error.as_fd()])
    }

    /// Starts the ring that was prepared.
    pub(super) fn run(&self) -> Result<()> {
        let ring = self.target.queue;
        self.must(SET_VRING_KICK, &u64::from(ring).to_ne_bytes(), &[self.kick.as_fd()])?;
        self.must(SET_VRING_ENABLE, &pair(ring, 1), &[])
    }

    /// A running ring.
    pub(super) fn start(&mut self) -> Result<()> {
        self.prepare()?;
        self.run()
    }

    /// Stops the ring, as a correct frontend does.
    pub(super) fn stop(&self) -> Seen {
        self.ask(GET_VRING_BASE, &pair(self.target.queue, 0)).map_or_else(|seen| seen, |_| Seen::Taken)
    }

    /// Stops the ring and starts it again, empty. `Some`: the backend did not go along with the stop.
    pub(super) fn begin_again(&mut self) -> Result<Option<Seen>> {
        if let seen @ (Seen::Closed | Seen::Waits) = self.stop() {
            return Ok(Some(seen));
        }
        self.guest.rewind();
        self.place_ring()?;
        self.run()?;
        Ok(None)
    }

    /// Tells the backend to look at the ring.
    pub(super) fn ring(&self) {
        let _already_signalled = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Puts one ordinary request in and waits for it. `false`: it did not come back.
    pub(super) fn exchange(&mut self, limit: Duration) -> bool {
        let before = self.guest.used();
        !self.submit() || self.wait_for_used(before, limit)
    }

    /// Puts one ordinary request in. `false`: none is known.
    pub(super) fn submit(&mut self) -> bool {
        let Some(buffers) = self.target.request(&self.guest) else { return false };
        let head = self.guest.chain(&buffers);
        self.guest.offer(head);
        self.ring();
        true
    }

    fn wait_for_used(&mut self, before: u16, limit: Duration) -> bool {
        let start = Instant::now();
        while self.guest.used() == before {
            let mut fds = [PollFd::new(&self.call, PollFlags::IN), PollFd::new(&self.stream, PollFlags::RDHUP)];
            let _interrupted = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
            let closed = !fds[1].revents().is_empty();
            let _nothing = rustix::io::read(&self.call, &mut [0; 8]);
            if start.elapsed() > limit || (closed && self.guest.used() == before) {
                return false;
            }
        }
        true
    }

    /// What became of a ring that was filled with something bad and kicked.
    pub(super) fn ring_outcome(&mut self) -> Result<Seen> {
        self.ring();
        let start = Instant::now();
        let before = self.guest.used();
        let waits = self.guest.available() != before;
        while waits && start.elapsed() < RING && !self.is_declared_broken() && self.guest.used() == before {
            if self.wait_for_close(Duration::from_millis(5)) == Seen::Closed {
                return Ok(Seen::Closed);
            }
        }
        if self.is_declared_broken() {
            return Ok(if self.still_answers() == Seen::Closed { Seen::Closed } else { Seen::Broke });
        }
        if self.exchange(RING) {
            return Ok(self.still_answers());
        }
        match self.still_answers() {
            Seen::Taken => Ok(Seen::Broke),
            other => Ok(other),
        }
    }

    fn is_declared_broken(&self) -> bool {
        let mut fds = [PollFd::new(&self.error, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap_or(0) > 0
    }

    /// Reads away what the backend has sent, without looking at it.
    pub(super) fn swallow(&mut self) -> Result<()> {
        self.stream.set_nonblocking(true).map_err(|_| Halt::Closed)?;
        let mut piece = [0; 65536];
        while self.stream.read(&mut piece).is_ok_and(|count| count > 0) {}
        self.stream.set_nonblocking(false).map_err(|_| Halt::Closed)
    }
}

/// An event descriptor that does not block.
pub(super) fn event(count: u32) -> anyhow::Result<OwnedFd> {
    eventfd(count, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("Cannot make an event descriptor")
}

/// A ring's index and a number.
pub(super) fn pair(ring: u32, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&ring.to_ne_bytes());
    body[4..].copy_from_slice(&value.to_ne_bytes());
    body
}

/// 64-bit words as a body.
pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
