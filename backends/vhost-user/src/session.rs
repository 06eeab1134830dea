//! What a frontend remembers of one device, across as many connections as it takes.
//!
//! A [`Session`] is made once, with the guest's memory and the event descriptors of the rings, and lives as long as the
//! machine. A connection to a backend comes and goes:
//!
//! 1. [`Session::connect`]: features, protocol features, the number of queues. Nothing of the guest is given away yet.
//! 2. [`Session::start`] (the driver is ready): memory, a fresh in-flight region, the rings.
//! 3. the backend dies. The rings stay where they are, the guest goes on filling them, kicks gather in the event descriptors.
//! 4. [`Session::reconnect`]: the same again with the *old* in-flight region, from which the successor learns what its
//!    predecessor had taken and not finished. Every ring is kicked once, and called once: a notification that was lost with
//!    the dead process would otherwise be waited for for ever.
//! 5. [`Session::stop`] (the driver resets the device): afterwards no ring is served, or the call fails and the owner has to end
//!    the backend before it lets the guest reuse the memory.
//!
//! A backend learns no address of the frontend: the "user addresses" of the protocol are synthetic, guest physical address
//! plus 2^52, so that an untranslated use of either fails loudly.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::BackendReq;
use virtio::dirty::LOG_ALL;
use virtio::event;

use crate::features::{self, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::frontend::{Frontend, Inflight, MAX_CONFIG, RegionEntry, RingAddresses};
use crate::wire::{Channel, Deadline, backend_name};
use crate::{Error, Result};

/// Distance between a guest physical address and the address the backend is told.
pub const USER_ADDRESS_BASE: u64 = 1 << 52;

/// How long a backend may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For one exchange of messages.
    pub exchange: Duration,
    /// For all that a greeting, or a start of the rings, consists of.
    pub whole: Duration,
    /// For a ring to stop, which waits for what is in flight.
    pub stop: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines { exchange: Duration::from_secs(2), whole: Duration::from_secs(4), stop: Duration::from_secs(10) }
    }
}

/// A range of guest memory and the file that holds it.
#[derive(Clone, Debug)]
pub struct Region {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// The (sealed) memfd.
    pub fd: Arc<OwnedFd>,
    /// Where the region begins in it.
    pub offset: u64,
}

impl Region {
    fn entry(&self) -> RegionEntry {
        let user_addr = self.guest_addr.wrapping_add(USER_ADDRESS_BASE);
        RegionEntry { guest_addr: self.guest_addr, size: self.size, user_addr, offset: self.offset }
    }
}

/// A ring the driver has set up, in guest physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Index of the queue.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

/// The two event descriptors of a queue. They belong to the frontend and outlive every backend.
#[derive(Debug)]
pub struct Notifiers {
    /// Signalled by the guest, read by the backend.
    pub kick: OwnedFd,
    /// Signalled by the backend, turned into an interrupt.
    pub call: OwnedFd,
}

/// What a session is made from.
#[derive(Debug)]
pub struct Setup {
    /// The memory the device may see.
    pub memory: Vec<Region>,
    /// One pair for each queue that may be started.
    pub notifiers: Vec<Notifiers>,
    /// Limits of time.
    pub deadlines: Deadlines,
}

/// What a backend said on its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendEvent {
    /// The configuration space changed: read it again.
    ConfigChanged,
    /// It asked for something this frontend does not do; it was told so.
    Refused(String),
}

#[derive(Debug)]
struct Link {
    frontend: Frontend,
    requests: Option<Channel>,
    memory_sent: bool,
}

#[derive(Debug)]
struct Active {
    features: u64,
    rings: Vec<Ring>,
    inflight: Option<Inflight>,
}

/// A device as its frontend knows it.
#[derive(Debug)]
pub struct Session {
    setup: Setup,
    errors: OwnedFd,
    offered: u64,
    protocol: u64,
    queues: u16,
    link: Option<Link>,
    active: Option<Active>,
    /// Of the configuration space: what the driver has written, to be sent again.
    written: Vec<(u32, Vec<u8>)>,
}

impl Session {
    /// Greets the backend on `stream` and learns what it is.
    ///
    /// # Errors
    /// When the peer is no vhost-user backend, is silent, or dies meanwhile.
    pub fn connect(stream: UnixStream, setup: Setup) -> Result<Session> {
        let errors =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::socket("make an event descriptor"))?;
        let mut session =
            Session { setup, errors, offered: 0, protocol: 0, queues: 0, link: None, active: None, written: Vec::new() };
        let greeting = session.greet(stream)?;
        (session.offered, session.protocol, session.queues) = (greeting.offered, greeting.protocol, greeting.queues);
        session.link = Some(greeting.link);
        Ok(session)
    }

    /// The virtio features the backend offers; the protocol's own bit is taken out.
    pub fn offered(&self) -> u64 {
        self.offered & !(VHOST_USER_F_PROTOCOL_FEATURES | LOG_ALL)
    }

    /// The protocol features that were settled, see [`crate::features`].
    pub fn protocol_features(&self) -> u64 {
        self.protocol
    }

    /// How many queues the backend has; 1 if it did not say.
    pub fn queue_count(&self) -> u16 {
        self.queues
    }

    /// The first `len` bytes of the configuration space; none if the backend keeps no such space.
    pub fn config(&mut self, len: u32) -> Result<Vec<u8>> {
        if self.protocol & features::CONFIG == 0 || len == 0 {
            return Ok(Vec::new());
        }
        self.frontend()?.config(len.min(MAX_CONFIG))
    }

    /// Writes to the configuration space.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<()> {
        if self.protocol & features::CONFIG == 0 {
            return Err(Error::Missing("a configuration space".to_owned()));
        }
        self.frontend()?.set_config(offset, data)
    }

    /// What the driver has written to the configuration space since it last reset the device, by offset. A backend learns it again
    /// each time that features are settled and rings are started: a newcomer does not know it, and features may bring defaults with
    /// them. What it refuses it has refused its predecessor's driver, too.
    pub fn keep_config(&mut self, written: Vec<(u32, Vec<u8>)>) {
        self.written = written;
    }

    /// Starts the device with the settled virtio features and the rings the driver has set up.
    ///
    /// # Errors
    /// What the backend refuses or does not answer. The session remembers the rings all the same, so that a later
    /// [`Session::reconnect`] starts them.
    pub fn start(&mut self, features: u64, rings: &[Ring]) -> Result<()> {
        self.active = Some(Active { features, rings: rings.to_vec(), inflight: None });
        self.activate(|_| 0)
    }

    /// Stops every ring and waits until nothing is in flight.
    ///
    /// # Errors
    /// When the backend does not confirm it. Its connection is closed then; it may still be writing to guest memory until its
    /// process is ended.
    pub fn stop(&mut self) -> Result<()> {
        let Some(active) = self.active.take() else { return Ok(()) };
        let Some(link) = &self.link else { return Ok(()) };
        let stopped =
            active.rings.iter().try_for_each(|ring| link.frontend.ring_base(ring.index, self.setup.deadlines.stop).map(drop));
        let reset = stopped.and_then(|()| match self.protocol & features::RESET_DEVICE {
            0 => Ok(()),
            _ => link.frontend.reset_device(),
        });
        if reset.is_err() {
            self.link = None;
        }
        reset
    }

    /// Continues with another process in the place of the one that is gone. `used_index` reads the index field of a ring's used
    /// part (by guest physical address): it is where a backend without an in-flight log has to begin.
    ///
    /// # Errors
    /// When the newcomer is not what the old one was, or does not answer.
    pub fn reconnect(&mut self, stream: UnixStream, used_index: impl Fn(u64) -> u16) -> Result<()> {
        self.link = None;
        let greeting = self.greet(stream)?;
        let gone = self.offered & !greeting.offered;
        let used = self.active.as_ref().map_or(self.offered, |active| active.features);
        if gone & used != 0 {
            return Err(Error::Missing(format!("virtio features {:#x} that its predecessor had", gone & used)));
        }
        if greeting.protocol != self.protocol {
            let missing = features::names(self.protocol & !greeting.protocol).join(", ");
            return Err(Error::Missing(format!("the protocol features of its predecessor ({missing})")));
        }
        if greeting.queues < self.queues {
            return Err(Error::Missing(format!("{} of {} queues", self.queues - greeting.queues, self.queues)));
        }
        self.link = Some(greeting.link);
        if self.active.is_none() {
            return Ok(());
        }
        self.activate(used_index)?;
        self.signal_rings();
        Ok(())
    }

    /// Closes the connection. The rings are remembered.
    pub fn disconnect(&mut self) {
        self.link = None;
    }

    /// How many rings the other end serves.
    pub fn running(&self) -> usize {
        self.link.as_ref().and(self.active.as_ref()).map_or(0, |active| active.rings.len())
    }

    /// The connection, to be watched for its end.
    pub fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(|link| link.frontend.as_fd())
    }

    /// The socket on which the backend asks; readable when [`Session::handle_backend_request`] has something to do.
    pub fn backend_requests(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().and_then(|link| link.requests.as_ref()).map(AsFd::as_fd)
    }

    /// An event descriptor that becomes readable when the backend has declared a ring broken.
    pub fn ring_errors(&self) -> BorrowedFd<'_> {
        self.errors.as_fd()
    }

    /// The event descriptors of queue `index`.
    pub fn notifiers(&self, index: u16) -> Option<&Notifiers> {
        self.setup.notifiers.get(usize::from(index))
    }

    /// Receives one request of the backend and answers it.
    ///
    /// # Errors
    /// Any error means that the backend is not to be listened to any more: [`Session::disconnect`] it.
    pub fn handle_backend_request(&mut self) -> Result<BackendEvent> {
        let limit = self.setup.deadlines.exchange;
        let channel = self.link.as_ref().and_then(|link| link.requests.as_ref()).ok_or(Error::Disconnected)?;
        let message = channel.receive("a request of the backend", Deadline::after(limit))?;
        let (event, status) = match BackendReq::try_from(message.request) {
            Ok(BackendReq::CONFIG_CHANGE_MSG) => (BackendEvent::ConfigChanged, 0u64),
            _ => (BackendEvent::Refused(backend_name(message.request)), 1),
        };
        if message.need_reply {
            channel.reply(message.request, &status.to_ne_bytes(), &[], Deadline::after(limit))?;
        }
        Ok(event)
    }

    /// The other end, for what a session has no words for.
    ///
    /// # Errors
    /// When it is gone.
    pub fn frontend(&self) -> Result<&Frontend> {
        self.link.as_ref().map(|link| &link.frontend).ok_or(Error::Disconnected)
    }

    fn greet(&self, stream: UnixStream) -> Result<Greeting> {
        let mut frontend = Frontend::new(stream, self.setup.deadlines.exchange);
        frontend.finish_by(Some(Deadline::after(self.setup.deadlines.whole)));
        let offered = frontend.features()?;
        let mut protocol = 0;
        if offered & VHOST_USER_F_PROTOCOL_FEATURES != 0 {
            protocol = frontend.protocol_features()? & features::WANTED;
            frontend.set_protocol_features(protocol)?;
        }
        let mut queues = 1;
        if protocol & features::MQ != 0 {
            queues = u16::try_from(frontend.queue_count()?).unwrap_or(u16::MAX);
        }
        if protocol & features::CONFIGURE_MEM_SLOTS != 0 {
            let slots = frontend.max_memory_slots()?;
            if slots < self.setup.memory.len() as u64 {
                return Err(Error::Missing(format!("room for {} memory regions (it has {slots})", self.setup.memory.len())));
            }
        }
        let requests = self.open_requests(&frontend, protocol)?;
        frontend.set_owner()?;
        frontend.finish_by(None);
        Ok(Greeting { offered, protocol, queues, link: Link { frontend, requests, memory_sent: false } })
    }

    fn open_requests(&self, frontend: &Frontend, protocol: u64) -> Result<Option<Channel>> {
        if protocol & features::BACKEND_REQ == 0 {
            return Ok(None);
        }
        let (ours, theirs) = UnixStream::pair().map_err(|source| Error::Socket { what: "make a socket pair", source })?;
        frontend.set_backend_channel(theirs.as_fd())?;
        Ok(Some(Channel::from(ours)))
    }

    fn activate(&mut self, used_index: impl Fn(u64) -> u16) -> Result<()> {
        let by = Deadline::after(self.setup.deadlines.whole);
        if let Some(link) = &mut self.link {
            link.frontend.finish_by(Some(by));
        }
        let activated = self.start_rings(used_index);
        if let Some(link) = &mut self.link {
            link.frontend.finish_by(None);
        }
        activated
    }

    fn start_rings(&mut self, used_index: impl Fn(u64) -> u16) -> Result<()> {
        let with_protocol = self.offered & VHOST_USER_F_PROTOCOL_FEATURES;
        let (Some(link), Some(active)) = (&mut self.link, &mut self.active) else { return Err(Error::Disconnected) };
        let frontend = &link.frontend;
        frontend.set_features(active.features | with_protocol)?;
        if self.protocol & features::CONFIG != 0 {
            for (offset, bytes) in &self.written {
                match frontend.set_config(*offset, bytes) {
                    Ok(()) | Err(Error::Missing(_) | Error::Failed(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if !link.memory_sent {
            send_memory(frontend, &self.setup.memory, self.protocol)?;
            link.memory_sent = true;
        }
        if self.protocol & features::INFLIGHT_SHMFD != 0 {
            let size = active.rings.iter().map(|ring| ring.size).max().unwrap_or_default();
            let queues = active.rings.iter().map(|ring| ring.index.saturating_add(1)).max().unwrap_or_default();
            if active.inflight.is_none() {
                active.inflight = Some(frontend.inflight(queues, size)?);
            }
            if let Some(region) = &active.inflight {
                frontend.set_inflight(region)?;
            }
        }
        for ring in &active.rings {
            let notifiers = self.setup.notifiers.get(usize::from(ring.index));
            let notifiers = notifiers.ok_or_else(|| Error::Missing(format!("a queue {}", ring.index)))?;
            start_ring(frontend, ring, used_index(ring.used), notifiers, self.errors.as_fd())?;
        }
        if with_protocol != 0 {
            active.rings.iter().try_for_each(|ring| frontend.set_ring_enable(ring.index, true))?;
        }
        Ok(())
    }

    /// Kicks and calls each ring once.
    fn signal_rings(&self) {
        let rings = self.active.as_ref().map(|active| active.rings.as_slice()).unwrap_or_default();
        for ring in rings {
            if let Some(pair) = self.setup.notifiers.get(usize::from(ring.index)) {
                event::signal(pair.kick.as_fd());
                event::signal(pair.call.as_fd());
            }
        }
    }
}

struct Greeting {
    offered: u64,
    protocol: u64,
    queues: u16,
    link: Link,
}

fn send_memory(frontend: &Frontend, memory: &[Region], protocol: u64) -> Result<()> {
    if protocol & features::CONFIGURE_MEM_SLOTS != 0 {
        return memory.iter().try_for_each(|region| frontend.add_memory_region(&region.entry(), region.fd.as_fd()));
    }
    let table: Vec<_> = memory.iter().map(|region| (region.entry(), region.fd.as_fd())).collect();
    frontend.set_memory_table(&table)
}

/// The kick descriptor comes last: it is what starts the ring.
fn start_ring(frontend: &Frontend, ring: &Ring, base: u16, notifiers: &Notifiers, errors: BorrowedFd<'_>) -> Result<()> {
    let user = |addr: u64| addr.wrapping_add(USER_ADDRESS_BASE);
    frontend.set_ring_size(ring.index, ring.size)?;
    frontend.set_ring_base(ring.index, base)?;
    let at = RingAddresses { desc: user(ring.desc), used: user(ring.used), avail: user(ring.avail) };
    frontend.set_ring_addresses(ring.index, at)?;
    frontend.set_ring_error(ring.index, Some(errors))?;
    frontend.set_ring_call(ring.index, Some(notifiers.call.as_fd()))?;
    frontend.set_ring_kick(ring.index, Some(notifiers.kick.as_fd()))
}
