//! The asking end of one connection: a method for each request, each under a deadline.
//!
//! It keeps no memory of the device beyond this connection; [`crate::Session`] does. A request whose answer is an
//! acknowledgement asks for one when the backend knows how to give it (`REPLY_ACK`): without it a backend that refuses, say, a
//! memory table is noticed only when the guest hangs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use crate::features;
use crate::wire::{Channel, Deadline, Message, frontend_name};
use crate::{Error, Result};

/// Most bytes of a configuration space that one request carries (vhost-user, "Virtio device config space").
pub const MAX_CONFIG: u32 = 256;

/// In "ring index and descriptor" bodies: no descriptor comes with the message.
const NO_FD: u64 = 1 << 8;

/// Where a ring lies, in the frontend's own ("user") addresses.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    /// The descriptor table.
    pub desc: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub avail: u64,
}

/// A memory region as it is announced.
#[derive(Clone, Copy, Debug)]
pub struct RegionEntry {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// The address by which rings in it are named.
    pub user_addr: u64,
    /// Where the region begins in its file.
    pub offset: u64,
}

impl RegionEntry {
    /// As the body of the requests about one region: padding, then the region.
    fn single(&self) -> [u8; 40] {
        let mut body = [0; 40];
        if let Some(rest) = body.get_mut(8..) {
            rest.copy_from_slice(&self.bytes());
        }
        body
    }

    fn bytes(&self) -> [u8; 32] {
        let mut out = [0; 32];
        let words = [self.guest_addr, self.size, self.user_addr, self.offset];
        for (chunk, word) in out.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        out
    }
}

/// The shared memory in which a backend notes what is in flight.
#[derive(Debug)]
pub struct Inflight {
    /// The region, as the backend made it.
    pub fd: OwnedFd,
    /// Its bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// Queues it has room for.
    pub queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
}

/// One connection to a backend.
#[derive(Debug)]
pub struct Frontend {
    channel: Channel,
    limit: Duration,
    by: Option<Deadline>,
    acks: bool,
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Frontend {
    /// Speaks on `stream`; each exchange may take `limit`.
    pub fn new(stream: UnixStream, limit: Duration) -> Frontend {
        Frontend { channel: Channel::from(stream), limit, by: None, acks: false }
    }

    /// However long each of them may take, all exchanges from here on have to be done by then. `None` lifts that.
    pub fn finish_by(&mut self, by: Option<Deadline>) {
        self.by = by;
    }

    fn deadline(&self) -> Deadline {
        let this = Deadline::after(self.limit);
        self.by.map_or(this, |by| by.or_sooner(this))
    }

    /// The virtio features the backend offers, bit 30 included.
    pub fn features(&self) -> Result<u64> {
        self.ask(FrontendReq::GET_FEATURES, &[])?.u64()
    }

    /// The protocol features the backend offers.
    pub fn protocol_features(&self) -> Result<u64> {
        self.ask(FrontendReq::GET_PROTOCOL_FEATURES, &[])?.u64()
    }

    /// Settles the protocol features. From here on acknowledgements are asked for, if `bits` has them.
    pub fn set_protocol_features(&mut self, bits: u64) -> Result<()> {
        self.tell(FrontendReq::SET_PROTOCOL_FEATURES, &bits.to_ne_bytes(), &[])?;
        self.acks = bits & features::REPLY_ACK != 0;
        Ok(())
    }

    /// How many queues the backend has (needs `MQ`).
    pub fn queue_count(&self) -> Result<u64> {
        self.ask(FrontendReq::GET_QUEUE_NUM, &[])?.u64()
    }

    /// How many memory regions the backend takes (needs `CONFIGURE_MEM_SLOTS`).
    pub fn max_memory_slots(&self) -> Result<u64> {
        self.ask(FrontendReq::GET_MAX_MEM_SLOTS, &[])?.u64()
    }

    /// Begins the session.
    pub fn set_owner(&self) -> Result<()> {
        self.tell(FrontendReq::SET_OWNER, &[], &[])
    }

    /// Settles the virtio features.
    pub fn set_features(&self, bits: u64) -> Result<()> {
        self.tell(FrontendReq::SET_FEATURES, &bits.to_ne_bytes(), &[])
    }

    /// Hands over the socket on which the backend may ask (needs `BACKEND_REQ`).
    pub fn set_backend_channel(&self, socket: BorrowedFd<'_>) -> Result<()> {
        self.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[socket])
    }

    /// Announces the whole memory table.
    pub fn set_memory_table(&self, regions: &[(RegionEntry, BorrowedFd<'_>)]) -> Result<()> {
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let mut body = Vec::with_capacity(8 + regions.len() * 32);
        body.extend_from_slice(&count.to_ne_bytes());
        body.extend_from_slice(&0u32.to_ne_bytes());
        let mut fds = Vec::with_capacity(regions.len());
        for (region, fd) in regions {
            body.extend_from_slice(&region.bytes());
            fds.push(*fd);
        }
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// Adds one memory region (needs `CONFIGURE_MEM_SLOTS`).
    pub fn add_memory_region(&self, region: &RegionEntry, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(FrontendReq::ADD_MEM_REG, &region.single(), &[fd])
    }

    /// Takes one memory region away (needs `CONFIGURE_MEM_SLOTS`).
    pub fn remove_memory_region(&self, region: &RegionEntry) -> Result<()> {
        self.tell(FrontendReq::REM_MEM_REG, &region.single(), &[])
    }

    /// Sets the number of descriptors of a ring.
    pub fn set_ring_size(&self, ring: u16, size: u16) -> Result<()> {
        self.tell(FrontendReq::SET_VRING_NUM, &pair(ring, size.into()), &[])
    }

    /// Sets where in the available ring the backend begins.
    pub fn set_ring_base(&self, ring: u16, base: u16) -> Result<()> {
        self.tell(FrontendReq::SET_VRING_BASE, &pair(ring, base.into()), &[])
    }

    /// Stops a ring and asks where it stopped. `limit` replaces the connection's own: the backend may have to wait for a disk.
    pub fn ring_base(&self, ring: u16, limit: Duration) -> Result<u16> {
        let deadline = Deadline::after(limit);
        let body = pair(ring, 0);
        self.channel.request(FrontendReq::GET_VRING_BASE.into(), false, &body, &[], deadline)?;
        let (index, base) = self.answer(FrontendReq::GET_VRING_BASE, deadline)?.u32_pair()?;
        if index != u32::from(ring) {
            return Err(Error::Malformed(format!("asked for ring {ring}, got ring {index}")));
        }
        Ok(u16::try_from(base & 0xffff).unwrap_or_default())
    }

    /// Sets where a ring lies.
    pub fn set_ring_addresses(&self, ring: u16, at: RingAddresses) -> Result<()> {
        self.set_ring_addresses_logged(ring, at, None)
    }

    /// The same; writes to the used ring are logged under this guest address.
    pub fn set_ring_addresses_logged(&self, ring: u16, at: RingAddresses, used: Option<u64>) -> Result<()> {
        let mut body = Vec::with_capacity(40);
        body.extend_from_slice(&u32::from(ring).to_ne_bytes());
        body.extend_from_slice(&u32::from(used.is_some()).to_ne_bytes());
        for word in [at.desc, at.used, at.avail, used.unwrap_or(0)] {
            body.extend_from_slice(&word.to_ne_bytes());
        }
        self.tell(FrontendReq::SET_VRING_ADDR, &body, &[])
    }

    /// Gives the event descriptor by which the guest announces requests. The ring starts.
    pub fn set_ring_kick(&self, ring: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_ring_fd(FrontendReq::SET_VRING_KICK, ring, fd)
    }

    /// Gives the event descriptor by which the backend announces completions.
    pub fn set_ring_call(&self, ring: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_ring_fd(FrontendReq::SET_VRING_CALL, ring, fd)
    }

    /// Gives the event descriptor by which the backend announces a broken ring.
    pub fn set_ring_error(&self, ring: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_ring_fd(FrontendReq::SET_VRING_ERR, ring, fd)
    }

    /// Lets a ring be served, or not.
    pub fn set_ring_enable(&self, ring: u16, enable: bool) -> Result<()> {
        self.tell(FrontendReq::SET_VRING_ENABLE, &pair(ring, enable.into()), &[])
    }

    /// Reads `len` bytes of the configuration space from its beginning (needs `CONFIG`).
    pub fn config(&self, len: u32) -> Result<Vec<u8>> {
        let len = len.min(MAX_CONFIG);
        let wanted = usize::try_from(len).unwrap_or_default();
        let mut answer = self.ask(FrontendReq::GET_CONFIG, &config_body(0, &vec![0; wanted]))?;
        // A backend that cannot answer sends back an empty payload.
        if answer.body.len() != wanted + 12 {
            return Err(Error::Failed(format!("{} of {len} bytes", frontend_name(FrontendReq::GET_CONFIG.into()))));
        }
        Ok(answer.body.split_off(12))
    }

    /// Writes to the configuration space (needs `CONFIG`).
    pub fn set_config(&self, offset: u32, data: &[u8]) -> Result<()> {
        self.tell(FrontendReq::SET_CONFIG, &config_body(offset, data), &[])
    }

    /// Asks for a fresh in-flight region (needs `INFLIGHT_SHMFD`).
    pub fn inflight(&self, queues: u16, queue_size: u16) -> Result<Inflight> {
        let mut answer = self.ask(FrontendReq::GET_INFLIGHT_FD, &inflight_body(0, 0, queues, queue_size))?;
        let fd = answer.one_fd()?;
        let body = answer.body.as_slice();
        let (Some(size), Some(offset)) = (word_at(body, 0), word_at(body, 8)) else {
            return Err(answer.wrong_size(24));
        };
        Ok(Inflight { fd, size, offset, queues, queue_size })
    }

    /// Hands an in-flight region back, with whatever the last backend left in it (needs `INFLIGHT_SHMFD`).
    pub fn set_inflight(&self, region: &Inflight) -> Result<()> {
        let body = inflight_body(region.size, region.offset, region.queues, region.queue_size);
        self.tell(FrontendReq::SET_INFLIGHT_FD, &body, &[region.fd.as_fd()])
    }

    /// Resets the device, all rings being stopped (needs `RESET_DEVICE`).
    pub fn reset_device(&self) -> Result<()> {
        self.tell(FrontendReq::RESET_DEVICE, &[], &[])
    }

    /// Gives memory in which written pages are noted, a bit for each (needs `LOG_SHMFD`).
    pub fn set_log(&self, size: u64, offset: u64, fd: BorrowedFd<'_>) -> Result<()> {
        let mut body = size.to_ne_bytes().to_vec();
        body.extend_from_slice(&offset.to_ne_bytes());
        self.ask_with(FrontendReq::SET_LOG_BASE, &body, &[fd]).map(drop)
    }

    /// Has the device's state written into a pipe, or read from it (needs `DEVICE_STATE`). [`Frontend::check_state`] says how it went.
    pub fn transfer_state(&self, load: bool, pipe: BorrowedFd<'_>) -> Result<()> {
        let body = pair(u16::from(load), 0);
        match self.ask_with(FrontendReq::SET_DEVICE_STATE_FD, &body, &[pipe])?.u64()? & 0xff {
            0 => Ok(()),
            _ => Err(Error::Failed("SET_DEVICE_STATE_FD".to_owned())),
        }
    }

    /// Whether the state that was transferred has arrived.
    pub fn check_state(&self) -> Result<bool> {
        Ok(self.ask(FrontendReq::CHECK_DEVICE_STATE, &[])?.u64()? == 0)
    }

    fn set_ring_fd(&self, request: FrontendReq, ring: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let body = u64::from(ring) | if fd.is_none() { NO_FD } else { 0 };
        self.tell(request, &body.to_ne_bytes(), fd.as_slice())
    }

    /// Sends a request that has no answer of its own, and waits for the acknowledgement if there is one to be had.
    fn tell(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let deadline = self.deadline();
        self.channel.request(request.into(), self.acks, body, fds, deadline)?;
        if !self.acks {
            return Ok(());
        }
        match self.answer(request, deadline)?.u64()? {
            0 => Ok(()),
            _ => Err(Error::Failed(frontend_name(request.into()))),
        }
    }

    fn ask(&self, request: FrontendReq, body: &[u8]) -> Result<Message> {
        self.ask_with(request, body, &[])
    }

    fn ask_with(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        let deadline = self.deadline();
        self.channel.request(request.into(), false, body, fds, deadline)?;
        self.answer(request, deadline)
    }

    fn answer(&self, request: FrontendReq, deadline: Deadline) -> Result<Message> {
        let name = frontend_name(request.into());
        let message = self.channel.receive(&name, deadline)?;
        if !message.reply || message.request != u32::from(request) {
            return Err(Error::Malformed(format!("asked {name}, got {}", frontend_name(message.request))));
        }
        Ok(message)
    }
}

fn pair(ring: u16, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    let (index, rest) = body.split_at_mut(4);
    index.copy_from_slice(&u32::from(ring).to_ne_bytes());
    rest.copy_from_slice(&value.to_ne_bytes());
    body
}

fn config_body(offset: u32, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut body = Vec::with_capacity(12 + data.len());
    for word in [offset, size, 0] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    body.extend_from_slice(data);
    body
}

fn inflight_body(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut body = Vec::with_capacity(24);
    body.extend_from_slice(&size.to_ne_bytes());
    body.extend_from_slice(&offset.to_ne_bytes());
    body.extend_from_slice(&queues.to_ne_bytes());
    body.extend_from_slice(&queue_size.to_ne_bytes());
    // The structure ends with padding in the C headers that peers are built from.
    body.extend_from_slice(&[0; 4]);
    body
}

fn word_at(body: &[u8], at: usize) -> Option<u64> {
    let bytes = body.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}
