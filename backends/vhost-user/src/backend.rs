//! The serving end: a device, and the state machine that decides which request is allowed when.
//!
//! One thread, the control thread, receives requests and carries them out one by one. A ring is in one of three states:
//!
//! ```text
//!              SET_VRING_{NUM,BASE,ADDR,KICK,CALL,ERR}        kick known and enabled
//!   stopped ──────────────────────────────────────▶ (configured) ──────────────────▶ running
//!      ▲                                                                               │
//!      └──────────────── GET_VRING_BASE, SET_VRING_ENABLE 0, RESET_DEVICE, end of connection ─┘
//! ```
//!
//! While a ring runs, its size, addresses and base are refused, and so is every change of the memory table and of the
//! features: the thread that serves the ring owns them. The event descriptors may change (a frontend masks interrupts so);
//! the queue is taken back for that moment and handed over again, with nothing in flight in between.
//!
//! A request that is refused is answered with a failure if the frontend asked for an acknowledgement; either way it is
//! logged and the connection goes on. A message that is malformed ends the connection. When it ends, for whatever reason, all
//! rings are stopped and the device is as new; [`Backend::serve`] may then be called with the next one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{io, mem};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tracing::{debug, info, warn};
use vhost::vhost_user::message::{BackendReq, FrontendReq};
use virtio::device::{Device, Host, Identity, Notices};
use virtio::dirty::{DirtyLog, LOG_ALL};
use virtio::inflight;
use virtio::memory::{Memory, Trust, clear_memfd, sealed_memfd};

use crate::features::{self, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::wire::{Channel, Deadline, Message, frontend_name};
use crate::{Error, Result};

mod memory;
mod migration;
mod ring;

use migration::State;
use ring::Rings;

/// How long a frontend may take for one message once it has begun it, and for taking an answer.
const MESSAGE_LIMIT: Duration = Duration::from_secs(1);

/// How long a notice to the frontend may take. It is sent from a device's own thread.
const NOTICE_LIMIT: Duration = Duration::from_millis(100);

/// Bytes before the content in messages about the configuration space.
const CONFIG_HEADER: usize = 12;

/// Why [`Backend::serve`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The frontend went away. Another may come.
    Closed,
    /// The stop descriptor became readable.
    Stopped,
}

/// A device behind a vhost-user socket.
#[derive(Debug)]
pub struct Backend<D> {
    device: D,
    identity: Identity,
    trust: Trust,
    notices: Arc<Requests>,
    /// Made at the start, for the largest rings: a confined process cannot make memory files.
    spare_log: OwnedFd,
    spare_log_size: u64,
    connection: Connection,
}

/// What a frontend has set. Gone with it.
#[derive(Debug, Default)]
struct Connection {
    features: u64,
    protocol: u64,
    memory: Arc<Memory>,
    rings: Rings,
    inflight: Option<InflightRegion>,
    /// Where written pages are noted, while [`LOG_ALL`] is set.
    dirty: Option<Arc<DirtyLog>>,
    /// A pipe out of which the device's state is still to be read.
    state: Option<State>,
}

#[derive(Debug)]
struct InflightRegion {
    memory: Arc<Memory>,
    queue_size: u16,
}

/// The answer a request has of its own.
enum Answer {
    /// None; an acknowledgement, if one was asked for.
    Done,
    Number(u64),
    Body(Vec<u8>),
    WithFd(Vec<u8>, OwnedFd),
}

/// The socket on which the backend asks, for whichever thread has something to say.
#[derive(Debug, Default)]
struct Requests(Mutex<Option<Channel>>);

impl Requests {
    fn set(&self, channel: Option<Channel>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = channel;
    }
}

impl Notices for Requests {
    fn config_changed(&self) {
        let channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(channel) = channel.as_ref() else { return };
        let sent = channel.request(BackendReq::CONFIG_CHANGE_MSG.into(), false, &[], &[], Deadline::after(NOTICE_LIMIT));
        if let Err(error) = sent {
            debug!("The frontend does not take a notice: {error}");
        }
    }
}

impl<D: Device> Backend<D> {
    /// Puts `device` behind a socket that is yet to come.
    ///
    /// # Errors
    /// When the memory for the in-flight log cannot be had.
    pub fn new(mut device: D, trust: Trust) -> io::Result<Backend<D>> {
        let identity = device.identity();
        let spare_log_size = inflight::region_size(identity.queues, identity.queue_size);
        let spare_log = sealed_memfd("inflight", spare_log_size)?;
        let notices = Arc::new(Requests::default());
        device.attach(Host::new(Arc::clone(&notices) as Arc<dyn Notices>));
        let connection = Connection::default();
        Ok(Backend { device, identity, trust, notices, spare_log, spare_log_size, connection })
    }

    /// Serves the frontend on `stream` until it goes away or `stop` becomes readable. Every ring is stopped then.
    ///
    /// # Errors
    /// What ended the connection, if it was not the frontend's orderly leave. Serving the next one is possible.
    pub fn serve(&mut self, stream: UnixStream, stop: BorrowedFd<'_>) -> Result<End> {
        let channel = Channel::from(stream);
        self.connection.rings = Rings::new(self.identity.queues);
        let end = self.converse(&channel, stop);
        self.stop_all();
        self.notices.set(None);
        self.connection = Connection::default();
        self.device.reset();
        end
    }

    fn converse(&mut self, channel: &Channel, stop: BorrowedFd<'_>) -> Result<End> {
        loop {
            // Where no state is on its way, nothing is waited for a second time.
            let (pipe, events) = self.connection.state.as_ref().and_then(State::waits_for).unwrap_or((stop, PollFlags::empty()));
            let mut fds = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(channel, PollFlags::IN),
                PollFd::from_borrowed_fd(pipe, events),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Error::socket("wait for the frontend")(errno)),
            }
            let [stopped, readable, moves] = fds.map(|fd| !fd.revents().is_empty());
            if let Some(state) = self.connection.state.as_mut().filter(|_| moves) {
                state.advance();
            }
            if stopped {
                return Ok(End::Stopped);
            }
            if !readable {
                continue;
            }
            match channel.receive("the rest of its message", Deadline::after(MESSAGE_LIMIT)) {
                Ok(message) => self.answer(channel, message)?,
                Err(Error::Closed) => return Ok(End::Closed),
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(&mut self, channel: &Channel, mut message: Message) -> Result<()> {
        let name = frontend_name(message.request);
        let negotiated = |connection: &Connection| connection.protocol & features::REPLY_ACK != 0;
        let before = negotiated(&self.connection);
        let deadline = Deadline::after(MESSAGE_LIMIT);
        let answer = self.handle(&mut message);
        // The request that negotiates acknowledgements may ask for its own (user-mode Linux), and would be waited for for ever.
        let acknowledge = message.need_reply && (before || negotiated(&self.connection));
        debug!(request = name, ok = answer.is_ok());
        match answer {
            Ok(Answer::Done) if acknowledge => channel.reply(message.request, &0u64.to_ne_bytes(), &[], deadline),
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Number(number)) => channel.reply(message.request, &number.to_ne_bytes(), &[], deadline),
            Ok(Answer::Body(body)) => channel.reply(message.request, &body, &[], deadline),
            Ok(Answer::WithFd(body, fd)) => channel.reply(message.request, &body, &[fd.as_fd()], deadline),
            Err(error @ (Error::Malformed(_) | Error::Closed | Error::Deadline { .. } | Error::Socket { .. })) => Err(error),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
                warn!(target: virtio::GUEST, "The frontend's {name} is refused: {error}{cause}");
                // A request with an answer of its own cannot be refused in a way the frontend would notice.
                match (has_answer(message.request), acknowledge) {
                    (true, _) => Err(error),
                    (false, true) => channel.reply(message.request, &1u64.to_ne_bytes(), &[], deadline),
                    (false, false) => Ok(()),
                }
            }
        }
    }

    /// The table of contents: one arm a request.
    fn handle(&mut self, message: &mut Message) -> Result<Answer> {
        let request = FrontendReq::try_from(message.request)
            .map_err(|_| Error::Malformed(format!("request number {}", message.request)))?;
        if message.reply {
            return Err(Error::Malformed("an answer to nothing".to_owned()));
        }
        match request {
            FrontendReq::GET_FEATURES => Ok(Answer::Number(self.identity.features | VHOST_USER_F_PROTOCOL_FEATURES | LOG_ALL)),
            FrontendReq::SET_FEATURES => self.set_features(message.u64()?),
            FrontendReq::GET_PROTOCOL_FEATURES => Ok(Answer::Number(self.offered())),
            FrontendReq::SET_PROTOCOL_FEATURES => self.set_protocol_features(message.u64()?),
            FrontendReq::GET_QUEUE_NUM => Ok(Answer::Number(self.identity.queues.into())),
            FrontendReq::SET_OWNER => Ok(Answer::Done),
            FrontendReq::RESET_OWNER => {
                self.stop_all();
                Ok(Answer::Done)
            }
            FrontendReq::RESET_DEVICE => self.reset_device(),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Answer::Number(virtio::memory::MAX_REGIONS as u64)),
            FrontendReq::SET_MEM_TABLE => self.set_memory_table(message),
            FrontendReq::ADD_MEM_REG => self.add_memory_region(message),
            FrontendReq::REM_MEM_REG => self.remove_memory_region(message),
            FrontendReq::SET_VRING_NUM => self.set_ring_size(message),
            FrontendReq::SET_VRING_ADDR => self.set_ring_addresses(message),
            FrontendReq::SET_VRING_BASE => self.set_ring_base(message),
            FrontendReq::GET_VRING_BASE => self.ring_base(message),
            FrontendReq::SET_VRING_KICK => self.set_ring_kick(message),
            FrontendReq::SET_VRING_CALL => self.set_ring_call(message),
            FrontendReq::SET_VRING_ERR => self.set_ring_error(message),
            FrontendReq::SET_VRING_ENABLE => self.set_ring_enable(message),
            FrontendReq::GET_CONFIG => self.config(message),
            FrontendReq::SET_CONFIG => self.set_config(message),
            FrontendReq::SET_BACKEND_REQ_FD => self.set_backend_channel(message),
            FrontendReq::GET_INFLIGHT_FD => self.inflight(message),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight(message),
            FrontendReq::SET_LOG_BASE => self.set_log(message),
            FrontendReq::SET_LOG_FD => self.set_log_notices(message),
            FrontendReq::SET_DEVICE_STATE_FD => self.transfer_state(message),
            FrontendReq::CHECK_DEVICE_STATE => self.check_state(),
            other => Err(refused(other, "this backend does not offer the feature it belongs to")),
        }
    }

    /// A device without a configuration space does not offer to have it read.
    fn offered(&self) -> u64 {
        if self.identity.config_len == 0 { features::OFFERED & !features::CONFIG } else { features::OFFERED }
    }

    fn set_features(&mut self, features: u64) -> Result<Answer> {
        let device = features & !(VHOST_USER_F_PROTOCOL_FEATURES | LOG_ALL);
        if device & !self.identity.features != 0 {
            let extra = device & !self.identity.features;
            return Err(refused(FrontendReq::SET_FEATURES, &format!("the bits {extra:#x} were not offered")));
        }
        if self.connection.features == features {
            return Ok(Answer::Done);
        }
        if self.connection.features ^ features == LOG_ALL {
            // A frontend begins to log, or ends it, while the guest runs.
            return self.between(|connection| connection.features = features);
        }
        self.must_be_quiet(FrontendReq::SET_FEATURES)?;
        self.connection.features = features;
        self.device.negotiate(device);
        Ok(Answer::Done)
    }

    fn set_protocol_features(&mut self, protocol: u64) -> Result<Answer> {
        if protocol & !self.offered() != 0 {
            let extra = features::names(protocol & !self.offered()).join(", ");
            return Err(refused(FrontendReq::SET_PROTOCOL_FEATURES, &format!("not offered: {extra}")));
        }
        self.connection.protocol = protocol;
        Ok(Answer::Done)
    }

    fn reset_device(&mut self) -> Result<Answer> {
        self.stop_all();
        self.connection.rings = Rings::new(self.identity.queues);
        self.device.reset();
        // The next driver's features are told to the device even if they are the same: it has forgotten them.
        self.connection.features = 0;
        Ok(Answer::Done)
    }

    fn config(&mut self, message: &Message) -> Result<Answer> {
        let (offset, size) = config_range(message)?;
        let mut body = vec![0; CONFIG_HEADER + size];
        let (head, content) = body.split_at_mut(CONFIG_HEADER);
        head.copy_from_slice(message.body.get(..CONFIG_HEADER).unwrap_or_default());
        self.device.read_config(offset, content);
        Ok(Answer::Body(body))
    }

    fn set_config(&mut self, message: &Message) -> Result<Answer> {
        let (offset, _) = config_range(message)?;
        let content = message.body.get(CONFIG_HEADER..).unwrap_or_default();
        let written = self.device.write_config(offset, content);
        written.map_err(|error| refused(FrontendReq::SET_CONFIG, &error.to_string()))?;
        Ok(Answer::Done)
    }

    fn set_backend_channel(&mut self, message: &mut Message) -> Result<Answer> {
        let fd = message.one_fd()?;
        let stat = rustix::fs::fstat(&fd).map_err(Error::socket("look at the backend's socket"))?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Socket {
            return Err(refused(FrontendReq::SET_BACKEND_REQ_FD, "the descriptor is no socket"));
        }
        self.notices.set(Some(Channel::from(UnixStream::from(fd))));
        Ok(Answer::Done)
    }

    /// Gives out the log made at the start, empty: a frontend asks when it begins anew.
    fn inflight(&mut self, message: &Message) -> Result<Answer> {
        self.must_be_quiet(FrontendReq::GET_INFLIGHT_FD)?;
        let wanted = InflightBody::parse(message)?;
        let size = inflight::region_size(wanted.queues, wanted.queue_size);
        if wanted.queues == 0 || wanted.queue_size == 0 || size > self.spare_log_size {
            return Err(refused(FrontendReq::GET_INFLIGHT_FD, "more or larger queues than this device has"));
        }
        self.connection.inflight = None;
        let made = clear_memfd(self.spare_log.as_fd()).and_then(|()| self.spare_log.try_clone());
        let fd = made.map_err(|source| Error::Socket { what: "clear the in-flight log", source })?;
        Ok(Answer::WithFd(InflightBody { size, offset: 0, ..wanted }.bytes(), fd))
    }

    fn set_inflight(&mut self, message: &mut Message) -> Result<Answer> {
        self.must_be_quiet(FrontendReq::SET_INFLIGHT_FD)?;
        let given = InflightBody::parse(message)?;
        let fd = message.one_fd()?;
        if given.queues > self.identity.queues || given.size < inflight::region_size(given.queues, given.queue_size) {
            return Err(refused(FrontendReq::SET_INFLIGHT_FD, "the region does not fit the queues it names"));
        }
        let region = virtio::memory::RegionFile { guest_addr: 0, size: given.size, user_addr: 0, offset: given.offset, fd };
        let memory = Memory::default().with(region, self.trust).map_err(Error::Memory)?;
        self.connection.inflight = Some(InflightRegion { memory: Arc::new(memory), queue_size: given.queue_size });
        Ok(Answer::Done)
    }

    fn must_be_quiet(&self, request: FrontendReq) -> Result<()> {
        if self.connection.rings.any_running() { Err(refused(request, "a ring is running")) } else { Ok(()) }
    }

    fn stop_all(&mut self) {
        let mut rings = mem::take(&mut self.connection.rings);
        for index in rings.indices() {
            if rings.suspend(index, &mut self.device) {
                info!(queue = index, "stopped");
            }
        }
        self.connection.rings = rings;
    }
}

fn refused(request: FrontendReq, reason: &str) -> Error {
    Error::Refused { request: format!("{request:?}"), reason: reason.to_owned() }
}

/// Requests that a frontend waits for an answer to in any case.
fn has_answer(request: u32) -> bool {
    const ASKING: [FrontendReq; 9] = [
        FrontendReq::GET_FEATURES,
        FrontendReq::GET_PROTOCOL_FEATURES,
        FrontendReq::GET_QUEUE_NUM,
        FrontendReq::GET_VRING_BASE,
        FrontendReq::GET_CONFIG,
        FrontendReq::GET_INFLIGHT_FD,
        FrontendReq::SET_LOG_BASE,
        FrontendReq::SET_DEVICE_STATE_FD,
        FrontendReq::CHECK_DEVICE_STATE,
    ];
    FrontendReq::try_from(request).is_ok_and(|request| ASKING.contains(&request))
}

/// Offset and size of a message about the configuration space, whose body has to have just that size.
fn config_range(message: &Message) -> Result<(u32, usize)> {
    let content = message.body.len().checked_sub(CONFIG_HEADER).ok_or_else(|| message.wrong_size(CONFIG_HEADER))?;
    let word = |at: usize| message.body.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    match (word(0), word(4)) {
        (Some(offset), Some(size)) if usize::try_from(size) == Ok(content) => Ok((offset, content)),
        _ => Err(message.wrong_size(CONFIG_HEADER)),
    }
}

/// The body of the two requests about the in-flight region.
#[derive(Clone, Copy, Debug)]
struct InflightBody {
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl InflightBody {
    /// Peers send 20 bytes, or 24 where their compiler pads the structure.
    fn parse(message: &Message) -> Result<InflightBody> {
        let body = message.body.get(..20).filter(|_| message.body.len() <= 24).ok_or_else(|| message.wrong_size(20))?;
        let mut bytes = body.iter().copied();
        let mut next =
            |count: usize| bytes.by_ref().take(count).enumerate().fold(0u64, |sum, (at, byte)| sum | u64::from(byte) << (8 * at));
        let (size, offset) = (next(8), next(8));
        let (queues, queue_size) = (u16::try_from(next(2)).unwrap_or_default(), u16::try_from(next(2)).unwrap_or_default());
        Ok(InflightBody { size, offset, queues, queue_size })
    }

    fn bytes(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(24);
        body.extend_from_slice(&self.size.to_ne_bytes());
        body.extend_from_slice(&self.offset.to_ne_bytes());
        body.extend_from_slice(&self.queues.to_ne_bytes());
        body.extend_from_slice(&self.queue_size.to_ne_bytes());
        body.extend_from_slice(&[0; 4]);
        body
    }
}
