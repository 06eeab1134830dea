//! The ordinary backend, and where it deviates.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost_user::features;
use vhost_user::wire::{Channel, Deadline, Message};
use virtio::memory::sealed_memfd;

use crate::behaviour::Act;
use crate::ring::{Ring, Rings};

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;

/// A little less than what our frontend waits for one answer.
const SLOW: Duration = Duration::from_millis(1500);

/// How often endless things are done between two looks at the socket.
const PULSE: Duration = Duration::from_millis(1);

/// Features of an ordinary device: VERSION_1, INDIRECT_DESC, EVENT_IDX, and the protocol's.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29 | features::VHOST_USER_F_PROTOCOL_FEATURES;

/// A body, and a descriptor that goes with it.
type Answer = (Vec<u8>, Option<OwnedFd>);

/// One connection.
struct Evil {
    act: Act,
    channel: Channel,
    stream: UnixStream,
    requests: Option<Channel>,
    rings: Rings,
    /// Which connection it is.
    turn: u64,
    looks: u64,
    silent: bool,
}

/// Serves the frontend on `stream` until it goes away or `limit` is over. `turn` counts connections.
///
/// # Errors
/// What a frontend does to it in return.
pub fn serve(stream: UnixStream, act: Act, turn: u64, limit: Duration) -> Result<()> {
    let channel = Channel::from(stream.try_clone().context("Cannot copy a socket")?);
    let mut evil = Evil { act, channel, stream, requests: None, rings: Rings::default(), turn, looks: 0, silent: false };
    let start = Instant::now();
    while start.elapsed() < limit {
        if evil.wait()? {
            match evil.channel.receive("a request", Deadline::after(Duration::from_secs(1))) {
                Ok(message) => evil.answer(message)?,
                Err(vhost_user::Error::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        evil.storm();
    }
    Ok(())
}

impl Evil {
    /// Waits a little for a request, and serves the rings meanwhile.
    fn wait(&mut self) -> Result<bool> {
        self.rings.serve(self.act);
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        let limit = Timespec::try_from(PULSE)?;
        Ok(poll(&mut fds, Some(&limit)).unwrap_or(0) > 0)
    }

    /// What is done without end.
    fn storm(&mut self) {
        self.rings.storm(self.act);
        let soon = Deadline::after(PULSE);
        let unknown = [9999u32, 5, 0].map(u32::to_ne_bytes).concat();
        match (self.act, &self.requests) {
            (Act::ConfigStorm, Some(requests)) => {
                for _ in 0..50 {
                    let _full = requests.request(2, false, &[], &[], soon);
                }
            }
            (Act::Requests, Some(requests)) => {
                let one = event();
                let fds: Vec<BorrowedFd<'_>> = one.iter().flat_map(|fd| [fd.as_fd(); 32]).collect();
                for number in 0..50 {
                    let _full = requests.request(number, true, &[0xa5; 64], &fds, soon);
                }
            }
            (Act::Unasked, _) => {
                let _full = self.stream.set_write_timeout(Some(PULSE)).and_then(|()| self.stream.write_all(&unknown));
            }
            _ => {}
        }
    }

    fn answer(&mut self, mut message: Message) -> Result<()> {
        let request = message.request;
        match self.act {
            Act::Silent(at) if at == request => self.silent = true,
            Act::Dies(at) if at == request => bail!("dies"),
            Act::Slow => sleep(SLOW),
            _ => {}
        }
        if self.silent {
            return Ok(());
        }
        let failed = u64::from(self.act == Act::Refuses || (self.act == Act::Good && !is_fine(&message)));
        self.learn(&mut message);
        let own = self.own_answer(&message)?;
        let answer = own.or_else(|| message.need_reply.then(|| (failed.to_ne_bytes().to_vec(), None)));
        answer.map_or(Ok(()), |(body, fd)| self.send(request, body, fd.as_ref().map(AsFd::as_fd)))
    }

    /// What a backend takes from requests.
    fn learn(&mut self, message: &mut Message) {
        match message.request {
            SET_BACKEND_REQ_FD => self.requests = message.fds.pop().map(|fd| Channel::from(UnixStream::from(fd))),
            SET_MEM_TABLE | ADD_MEM_REG => self.rings.memory(message, self.act),
            _ => self.rings.learn(message, self.act),
        }
    }

    /// The answer to a question.
    fn own_answer(&mut self, message: &Message) -> Result<Option<Answer>> {
        let number = |value: u64| Ok(Some((value.to_ne_bytes().to_vec(), None)));
        match message.request {
            GET_FEATURES if self.act == Act::Features => number(u64::MAX),
            GET_FEATURES if self.act == Act::FeaturesChange => number(FEATURES ^ (self.turn & 1) << 29),
            GET_FEATURES => number(FEATURES),
            GET_PROTOCOL_FEATURES if self.act == Act::Features => number(u64::MAX),
            GET_PROTOCOL_FEATURES => number(features::WANTED),
            GET_QUEUE_NUM => number(if self.act == Act::Queues { u64::MAX } else { 1 }),
            GET_MAX_MEM_SLOTS => number(if self.act == Act::Slots { 0 } else { 8 }),
            GET_VRING_BASE => Ok(Some((self.rings.stop(message), None))),
            GET_CONFIG => Ok(Some((self.config(message), None))),
            GET_INFLIGHT_FD => self.inflight(message).map(Some),
            _ => Ok(None),
        }
    }

    fn config(&mut self, message: &Message) -> Vec<u8> {
        let mut body = message.body.clone();
        self.looks += 1;
        match self.act {
            Act::Config => body.iter_mut().skip(12).for_each(|byte| *byte = 0xa5),
            Act::ConfigStorm => {
                let value = self.looks.to_le_bytes();
                body.iter_mut().skip(12).zip(value.iter().cycle()).for_each(|(byte, new)| *byte = *new);
            }
            Act::ConfigShort => body.truncate(13),
            _ => {}
        }
        body
    }

    fn inflight(&self, message: &Message) -> Result<Answer> {
        let mut body = message.body.clone();
        body.resize(24, 0);
        let real = 8192u64;
        let size = if self.act == Act::InflightAbsurd { u64::MAX } else { real };
        body[..8].copy_from_slice(&size.to_ne_bytes());
        let fd = match self.act {
            Act::InflightNone => None,
            Act::InflightShort => Some(sealed_memfd("log", 16)?),
            Act::InflightPipe => Some(rustix::pipe::pipe()?.0),
            Act::InflightUnsealed => {
                let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::ALLOW_SEALING)?;
                rustix::fs::ftruncate(&fd, real)?;
                Some(fd)
            }
            _ => Some(sealed_memfd("log", real)?),
        };
        if self.act == Act::InflightGarbage
            && let Some(fd) = &fd
        {
            rustix::io::pwrite(fd, &[0xa5; 4096], 0)?;
        }
        Ok((body, fd))
    }

    fn send(&mut self, request: u32, mut body: Vec<u8>, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let size = u32::try_from(body.len())?;
        let raw = |number: u32, flags: u32, size: u32, body: &[u8]| {
            [&[number, flags, size].map(u32::to_ne_bytes).concat()[..], body].concat()
        };
        let bytes = match self.act {
            Act::Half => raw(request, 5, size, &[0; 1]),
            Act::Flags => raw(request, 1, size, &body),
            Act::Huge => raw(request, 5, u32::MAX, &body),
            Act::Number => raw(request + 1, 5, size, &body),
            Act::Size => {
                body.push(0);
                raw(request, 5, size + 1, &body)
            }
            Act::Twice => raw(request, 5, size, &body).repeat(2),
            Act::Descriptors => {
                let one = event();
                let fds: Vec<BorrowedFd<'_>> = one.iter().flat_map(|fd| [fd.as_fd(); 32]).collect();
                return Ok(self.channel.reply(request, &body, &fds, Deadline::after(SLOW))?);
            }
            _ => return Ok(self.channel.reply(request, &body, fd.as_slice(), Deadline::after(SLOW))?),
        };
        self.silent = self.act == Act::Half;
        Ok(self.stream.write_all(&bytes)?)
    }
}

/// Whether an in-flight region, if this is about one, is one to continue from: whole, sealed, and as this backend leaves it.
fn is_fine(message: &Message) -> bool {
    if message.request != SET_INFLIGHT_FD {
        return true;
    }
    let Some(fd) = message.fds.first() else { return false };
    let whole = rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_size >= 8192);
    let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(rustix::fs::SealFlags::SHRINK));
    let mut head = [0; 64];
    whole && sealed && rustix::io::pread(fd, &mut head, 0).is_ok() && head == [0; 64]
}

fn event() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()
}

/// Which ring a message is about.
pub(crate) fn index(message: &Message) -> Option<usize> {
    message.body.first().map(|index| usize::from(*index)).filter(|index| *index < Ring::MOST)
}
