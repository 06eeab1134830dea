//! The rings of a connection: what was set of each, and the moments of hand-over.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;
use virtio::device::Device;
use virtio::dirty::LOG_ALL;
use virtio::inflight::Log;
use virtio::memory::{Memory, Trust};
use virtio::queue::{Config, MAX_SIZE, Queue, check_call, check_kick, check_socket};

use super::{Answer, Backend, Connection, refused};
use crate::features::VHOST_USER_F_PROTOCOL_FEATURES;
use crate::wire::Message;
use crate::{Error, Result};

/// In "ring index and descriptor" bodies: no descriptor comes with the message.
const NO_FD: u64 = 1 << 8;
const INDEX_MASK: u64 = 0xff;

/// In the flags of `SET_VRING_ADDR`: writes to the used ring are logged.
const LOG_USED: u64 = 1;

/// Bytes of `SET_VRING_ADDR`.
const ADDRESSES: usize = 40;

#[derive(Debug, Default)]
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    base: u16,
    enabled: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    running: bool,
    /// Where writes to the used ring are logged, if they are.
    used_address: Option<u64>,
}

/// All rings of a device.
#[derive(Debug, Default)]
pub(super) struct Rings(Vec<Ring>);

impl Rings {
    pub(super) fn new(count: u16) -> Rings {
        Rings((0..count).map(|_| Ring::default()).collect())
    }

    pub(super) fn any_running(&self) -> bool {
        self.0.iter().any(|ring| ring.running)
    }

    /// No running ring would lose its own place.
    pub(super) fn all_run_in(&self, memory: &Memory) -> bool {
        let there = |ring: &Ring| [ring.desc, ring.avail, ring.used].iter().all(|at| memory.guest_address(*at).is_some());
        self.0.iter().filter(|ring| ring.running).all(there)
    }

    pub(super) fn indices(&self) -> impl Iterator<Item = u16> + use<> {
        0..u16::try_from(self.0.len()).unwrap_or(u16::MAX)
    }

    fn get(&mut self, request: FrontendReq, index: u32) -> Result<(u16, &mut Ring)> {
        let outside = || refused(request, &format!("there is no ring {index}"));
        let ring = usize::try_from(index).ok().and_then(|index| self.0.get_mut(index));
        Ok((u16::try_from(index).map_err(|_| outside())?, ring.ok_or_else(outside)?))
    }

    /// Takes a ring back from the device, if it has it. Its descriptors stay for the next start.
    pub(super) fn suspend(&mut self, index: u16, device: &mut impl Device) -> bool {
        let Some(ring) = self.0.get_mut(usize::from(index)).filter(|ring| ring.running) else { return false };
        ring.running = false;
        if let Some(state) = device.stop(index) {
            ring.base = state.next_avail;
            (ring.kick, ring.call, ring.error) = (state.kick, state.call, state.error);
        }
        true
    }
}

impl Connection {
    /// Hands a ring to the device if all it takes is there.
    fn resume(&mut self, index: u16, device: &mut impl Device) -> Result<()> {
        let with_protocol = self.features & VHOST_USER_F_PROTOCOL_FEATURES != 0;
        let Some(ring) = self.rings.0.get_mut(usize::from(index)) else { return Ok(()) };
        // Without the protocol's features a ring is enabled from the start.
        if ring.running || ring.kick.is_none() || (with_protocol && !ring.enabled) {
            return Ok(());
        }
        let broken = |reason: String| refused(FrontendReq::SET_VRING_KICK, &format!("ring {index} cannot start: {reason}"));
        let guest = |user: u64| self.memory.guest_address(user).ok_or_else(|| broken(format!("no memory at {user:#x}")));
        let log = self.inflight.as_ref().map(|region| Log::new(Arc::clone(&region.memory), index, region.queue_size, ring.size));
        let (desc, avail, used) = (guest(ring.desc)?, guest(ring.avail)?, guest(ring.used)?);
        let config = Config {
            index,
            size: ring.size,
            desc,
            avail,
            used,
            event_idx: self.features & virtio::feature::EVENT_IDX != 0,
            next_avail: ring.base,
            kick: ring.kick.take(),
            call: ring.call.take(),
            error: ring.error.take(),
            log: log.transpose().map_err(|error| broken(error.to_string()))?,
            dirty: self.dirty.clone().filter(|_| self.features & LOG_ALL != 0),
            used_address: ring.used_address,
        };
        let queue = Queue::new(Arc::clone(&self.memory), config).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|source| format!(" ({source})")).unwrap_or_default();
            broken(format!("{error}{cause}"))
        })?;
        device.start(index, queue).map_err(|error| broken(error.to_string()))?;
        ring.running = true;
        Ok(())
    }
}

impl<D: Device> Backend<D> {
    /// Changes something of the connection that rings are made with, with all of them in our own hands for that moment.
    pub(super) fn between(&mut self, change: impl FnOnce(&mut Connection)) -> Result<Answer> {
        let mut running = Vec::new();
        for index in self.connection.rings.indices() {
            if self.connection.rings.suspend(index, &mut self.device) {
                running.push(index);
            }
        }
        change(&mut self.connection);
        running.into_iter().try_for_each(|index| self.connection.resume(index, &mut self.device))?;
        Ok(Answer::Done)
    }

    pub(super) fn set_ring_size(&mut self, message: &Message) -> Result<Answer> {
        let largest = self.identity.queue_size.min(MAX_SIZE);
        let (index, size) = message.u32_pair()?;
        let ring = self.stopped_ring(FrontendReq::SET_VRING_NUM, index)?;
        let size = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= largest);
        ring.size = size.ok_or_else(|| refused(FrontendReq::SET_VRING_NUM, &format!("a ring has 1 to {largest} descriptors")))?;
        Ok(Answer::Done)
    }

    pub(super) fn set_ring_addresses(&mut self, message: &Message) -> Result<Answer> {
        if message.body.len() != ADDRESSES {
            return Err(message.wrong_size(ADDRESSES));
        }
        let word = |at: usize| message.body.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
        let (Some(head), Some(desc), Some(used), Some(avail), Some(log)) = (word(0), word(8), word(16), word(24), word(32))
        else {
            return Err(message.wrong_size(ADDRESSES));
        };
        let index = u32::try_from(head & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let used_address = (head >> 32 & LOG_USED != 0).then_some(log);
        let (_, ring) = self.connection.rings.get(FrontendReq::SET_VRING_ADDR, index)?;
        // A frontend that begins to log says it all again, while the guest runs.
        if ring.running && (ring.desc, ring.used, ring.avail) == (desc, used, avail) {
            return self.replace(FrontendReq::SET_VRING_ADDR, index, |ring| ring.used_address = used_address);
        }
        let ring = self.stopped_ring(FrontendReq::SET_VRING_ADDR, index)?;
        (ring.desc, ring.used, ring.avail, ring.used_address) = (desc, used, avail, used_address);
        Ok(Answer::Done)
    }

    pub(super) fn set_ring_base(&mut self, message: &Message) -> Result<Answer> {
        let (index, base) = message.u32_pair()?;
        let ring = self.stopped_ring(FrontendReq::SET_VRING_BASE, index)?;
        ring.base = u16::try_from(base & 0xffff).unwrap_or_default();
        Ok(Answer::Done)
    }

    /// Stops the ring: that is what the request is for.
    pub(super) fn ring_base(&mut self, message: &Message) -> Result<Answer> {
        let (index, _) = message.u32_pair()?;
        let (number, _) = self.connection.rings.get(FrontendReq::GET_VRING_BASE, index)?;
        self.connection.rings.suspend(number, &mut self.device);
        let (_, ring) = self.connection.rings.get(FrontendReq::GET_VRING_BASE, index)?;
        (ring.kick, ring.call, ring.error) = (None, None, None);
        let mut body = index.to_ne_bytes().to_vec();
        body.extend_from_slice(&u32::from(ring.base).to_ne_bytes());
        Ok(Answer::Body(body))
    }

    pub(super) fn set_ring_kick(&mut self, message: &mut Message) -> Result<Answer> {
        let (index, fd) = ring_fd(FrontendReq::SET_VRING_KICK, message)?;
        if let Some(fd) = &fd {
            let checked = check_kick(fd.as_fd());
            checked.map_err(|error| refused(FrontendReq::SET_VRING_KICK, &error.to_string()))?;
        }
        self.replace(FrontendReq::SET_VRING_KICK, index, |ring| ring.kick = fd)
    }

    pub(super) fn set_ring_call(&mut self, message: &mut Message) -> Result<Answer> {
        let (index, fd) = ring_fd(FrontendReq::SET_VRING_CALL, message)?;
        check_event(FrontendReq::SET_VRING_CALL, fd.as_ref(), self.trust)?;
        self.replace(FrontendReq::SET_VRING_CALL, index, |ring| ring.call = fd)
    }

    pub(super) fn set_ring_error(&mut self, message: &mut Message) -> Result<Answer> {
        let (index, fd) = ring_fd(FrontendReq::SET_VRING_ERR, message)?;
        check_event(FrontendReq::SET_VRING_ERR, fd.as_ref(), Trust::Sealed)?;
        self.replace(FrontendReq::SET_VRING_ERR, index, |ring| ring.error = fd)
    }

    pub(super) fn set_ring_enable(&mut self, message: &Message) -> Result<Answer> {
        let (index, enable) = message.u32_pair()?;
        if enable > 1 {
            return Err(Error::Malformed(format!("a ring is enabled by 1 or disabled by 0, not by {enable}")));
        }
        let (number, ring) = self.connection.rings.get(FrontendReq::SET_VRING_ENABLE, index)?;
        ring.enabled = enable == 1;
        if enable == 0 {
            self.connection.rings.suspend(number, &mut self.device);
        }
        self.connection.resume(number, &mut self.device)?;
        Ok(Answer::Done)
    }

    /// Changes a descriptor of a ring, with the ring in our own hands for that moment.
    fn replace(&mut self, request: FrontendReq, index: u32, change: impl FnOnce(&mut Ring)) -> Result<Answer> {
        let (number, _) = self.connection.rings.get(request, index)?;
        self.connection.rings.suspend(number, &mut self.device);
        let (_, ring) = self.connection.rings.get(request, index)?;
        change(ring);
        self.connection.resume(number, &mut self.device)?;
        Ok(Answer::Done)
    }

    fn stopped_ring(&mut self, request: FrontendReq, index: u32) -> Result<&mut Ring> {
        let (_, ring) = self.connection.rings.get(request, index)?;
        if ring.running { Err(refused(request, "the ring is running")) } else { Ok(ring) }
    }
}

/// The only frontend that gives something else than event descriptors, user-mode Linux with its sockets, has to be trusted anyway.
fn check_event(request: FrontendReq, fd: Option<&OwnedFd>, trust: Trust) -> Result<()> {
    let check = |fd: &OwnedFd| match trust {
        Trust::Unsealed => check_call(fd.as_fd()).or_else(|_| check_socket(fd.as_fd())),
        Trust::Sealed => check_call(fd.as_fd()),
    };
    let checked = fd.map_or(Ok(()), check);
    checked.map_err(|error| refused(request, &error.to_string()))
}

/// The ring's index and the descriptor, if the message says that there is one.
fn ring_fd(request: FrontendReq, message: &mut Message) -> Result<(u32, Option<OwnedFd>)> {
    let body = message.u64()?;
    if body & !(INDEX_MASK | NO_FD) != 0 {
        return Err(Error::Malformed(format!("{request:?} with the body {body:#x}")));
    }
    let index = u32::try_from(body & INDEX_MASK).unwrap_or(u32::MAX);
    if body & NO_FD == 0 {
        return Ok((index, Some(message.one_fd()?)));
    }
    if message.fds.is_empty() {
        Ok((index, None))
    } else {
        Err(Error::Malformed(format!("{request:?} with an unannounced descriptor")))
    }
}
