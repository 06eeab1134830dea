//! The control thread's side of a device: one vhost-user session, and what to do when it breaks.
//!
//! Every call to the backend is made here, with the deadlines of [`vhost_user::Session`]. What goes wrong costs the
//! guest this one device until somebody plugs in a new connection ([`Remote::replug`]):
//!
//! ```text
//! Connected --(hang-up, refused start, silence)--> Lost --replug--> Connected
//!                                                   ^      \--fails--> Degraded (the reason is reported) --replug--> ...
//! ```

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost_user::{BackendEvent, Deadlines, Error as Refusal, Session, Setup};

use super::shadow::Shadow;
use super::{DEFAULT_QUEUE_SIZE, Identity, MAX_QUEUES, VirtioPci, lines};
use crate::args::DeviceSpec;
use crate::classes::Class;
use crate::events::Doorbell;
use crate::kvm::{Hypervisor, IOAPIC_LINES, MAX_ROUTES};
use crate::memory::Memory;
use crate::pci::Allocator;

const VERSION_1: u64 = 1 << 32;
/// The features of the ring transport that both a backend and this VMM can keep without the VMM's help.
const TRANSPORT: u64 = 1 << 28 // INDIRECT_DESC
    | 1 << 29 // EVENT_IDX
    | VERSION_1
    | 1 << 35; // IN_ORDER
/// Bits 24 to 49 belong to the transport or are reserved for it; all others to the class, so the backend answers for them.
const CLASS: u64 = !(0x3ff_ffff << 24);

/// How long a backend that has spoken is not listened to. One that never stops, with changes of its configuration or errors of
/// its rings, would otherwise have all of the control thread, and its driver an interrupt for each.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a device could not be connected.
#[derive(Debug, Error)]
pub enum Error {
    /// The handshake failed.
    #[error("Device {device} does not answer as a vhost-user backend")]
    Handshake {
        /// Its name.
        device: String,
        /// What it did.
        #[source]
        source: vhost_user::Error,
    },
    /// It is one, but not of this kind.
    #[error("Device {device} cannot be used: {reason}")]
    Unsuitable {
        /// Its name.
        device: String,
        /// Why.
        reason: String,
    },
    /// Something of our own ran out.
    #[error("Cannot make device {device}")]
    Resources {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What people are told about a device's connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It works (again).
    Connected,
    /// The connection is gone.
    Lost(String),
    /// There was a new connection, but it cannot go on with the old one's work.
    Degraded(String),
}

/// One device.
pub struct Remote {
    function: Arc<VirtioPci>,
    session: Session,
    class: &'static Class,
    queues: u16,
    memory: &'static Memory,
    state: Change,
    deaf_until: Option<Instant>,
}

/// What all devices of a machine share while it is put together.
pub struct Site<'a> {
    /// Guest memory.
    pub memory: &'static Memory,
    /// KVM.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// To the control thread.
    pub doorbell: Arc<Doorbell>,
    /// Addresses.
    pub addresses: &'a mut Allocator,
    /// The next free interrupt route.
    pub next_route: &'a mut u32,
}

/// The route numbers MSI begins at.
pub const FIRST_ROUTE: u32 = IOAPIC_LINES;

impl Remote {
    /// Greets the backend and makes the PCI function for it.
    pub fn connect(spec: &DeviceSpec, stream: UnixStream, site: &mut Site<'_>) -> Result<Self, Error> {
        let device = || spec.name.clone();
        let resources = |source| Error::Resources { device: device(), source };
        let handshake = |source| Error::Handshake { device: device(), source };
        let unsuitable = |reason| Error::Unsuitable { device: device(), reason };

        let wanted = spec.queues.unwrap_or(spec.class.queues).min(MAX_QUEUES);
        let (mut lines, notifiers) = lines(wanted).map_err(resources)?;
        let setup = Setup { memory: site.memory.regions(), notifiers, deadlines: Deadlines::default() };
        let mut session = Session::connect(stream, setup).map_err(handshake)?;
        let queues = Self::queues(spec, &session).map_err(unsuitable)?;
        lines.truncate(usize::from(queues));
        let features = session.offered() & (TRANSPORT | CLASS);
        if features & VERSION_1 == 0 {
            return Err(unsuitable("it does not offer virtio 1 (VIRTIO_F_VERSION_1)".to_owned()));
        }
        let shadow = configuration(&mut session, spec.class, &spec.name, queues).map_err(handshake)?;

        let first_route = *site.next_route;
        *site.next_route = first_route.saturating_add(u32::from(queues) + 1);
        let address = site.addresses.take(VirtioPci::memory_size());
        let Some(address) = address.filter(|_| *site.next_route <= MAX_ROUTES) else {
            return Err(unsuitable("the machine has too many queues".to_owned()));
        };
        let identity = Identity {
            name: device(),
            id: spec.id,
            class: spec.class,
            features,
            queues,
            queue_size: spec.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE),
            first_route,
        };
        let (hypervisor, doorbell) = (Arc::clone(&site.hypervisor), Arc::clone(&site.doorbell));
        let function = VirtioPci::new(identity, lines, shadow, address, hypervisor, doorbell).map_err(resources)?;
        let (class, memory) = (spec.class, site.memory);
        Ok(Self { function: Arc::new(function), session, class, queues, memory, state: Change::Connected, deaf_until: None })
    }

    /// A backend that does not negotiate multiple queues has as many as its class says; one that does has as many as it
    /// says, and we use no more of them than were asked for.
    fn queues(spec: &DeviceSpec, session: &Session) -> Result<u16, String> {
        let has = match session.protocol_features() & vhost_user::features::MQ {
            0 => spec.queues.unwrap_or(spec.class.queues),
            _ => session.queue_count(),
        };
        match spec.queues {
            Some(wanted) if wanted > has => Err(format!("{wanted} queues were asked for and it has {has}")),
            Some(wanted) => Ok(wanted),
            None if has == 0 => Err("it has no queues".to_owned()),
            None => Ok(spec.class.queues.min(has)),
        }
    }

    /// The processors' side.
    pub fn function(&self) -> &Arc<VirtioPci> {
        &self.function
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        self.function.name()
    }

    /// The socket to be watched for its end.
    pub fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.session.connection()
    }

    /// The socket on which the backend speaks first.
    pub fn requests(&self) -> Option<BorrowedFd<'_>> {
        self.session.backend_requests().filter(|_| self.deaf_for().is_none())
    }

    /// How many rings run.
    pub fn rings(&self) -> usize {
        self.session.running()
    }

    /// Does what the driver has asked for since the last time.
    pub fn serve(&mut self) -> Option<Change> {
        let work = self.function.work();
        let mut outcome = match work.config.map(|(offset, bytes)| self.session.write_config(offset, &bytes)) {
            // A backend may keep no such space, or refuse; the driver has been served from the copy.
            None | Some(Ok(()) | Err(Refusal::Missing(_) | Refusal::Failed(_))) => Ok(()),
            Some(Err(e)) => Err(e),
        };
        if work.stop {
            outcome = outcome.and(self.session.stop());
            self.function.stopped();
        }
        if let Some((features, rings)) = work.start {
            tracing::debug!(device = self.name(), features, rings = rings.len(), "starting");
            self.session.keep_config(self.function.written());
            outcome = outcome.and(self.session.start(features, &rings));
        }
        match outcome {
            Ok(()) => None,
            // Without a connection the rings are remembered, and started when there is one again.
            Err(vhost_user::Error::Disconnected) => None,
            Err(e) => self.lose(sentence(&e)),
        }
    }

    /// The machine is being reset: whatever runs is stopped. Processors do not run meanwhile.
    pub fn reset(&mut self) -> Option<Change> {
        let live = self.function.is_live();
        let outcome = if live { self.session.stop() } else { Ok(()) };
        self.function.stopped();
        outcome.err().and_then(|e| self.lose(sentence(&e)))
    }

    /// The connection has ended.
    pub fn hang_up(&mut self) -> Option<Change> {
        self.lose("the device process has closed the connection".to_owned())
    }

    /// Once: a process that dies is noticed on each of its sockets.
    fn lose(&mut self, reason: String) -> Option<Change> {
        self.session.disconnect();
        if self.state != Change::Connected {
            return None;
        }
        self.become_state(Change::Lost(reason))
    }

    fn become_state(&mut self, state: Change) -> Option<Change> {
        (self.state != state).then(|| {
            self.state = state.clone();
            state
        })
    }

    /// Continues with another process.
    pub fn replug(&mut self, stream: UnixStream) -> Change {
        let memory = self.memory;
        self.session.keep_config(self.function.written());
        let outcome = self.session.reconnect(stream, |used| used_index(memory, used));
        self.state = match outcome.and_then(|()| self.refresh()) {
            Ok(()) => Change::Connected,
            Err(e) => {
                self.session.disconnect();
                // What the old one has left is nothing to go on from. A driver that begins again leaves it behind. A newcomer that
                // dies in the middle says nothing of that: the next one may go on.
                if matches!(e, Refusal::Failed(_)) {
                    self.function.needs_reset();
                }
                Change::Degraded(sentence(&e))
            }
        };
        self.state.clone()
    }

    /// The backend speaks.
    pub fn listen(&mut self) -> Option<Change> {
        self.deaf_until = Instant::now().checked_add(PAUSE);
        let outcome = match self.session.handle_backend_request() {
            Ok(BackendEvent::ConfigChanged) => self.refresh(),
            Ok(BackendEvent::Refused(what)) => {
                tracing::debug!(device = self.name(), "refused {what}");
                Ok(())
            }
            Err(e) => Err(e),
        };
        outcome.err().and_then(|e| self.lose(sentence(&e)))
    }

    /// Where the backend says that a ring makes no sense.
    pub fn ring_errors(&self) -> Option<BorrowedFd<'_>> {
        self.connection().filter(|_| self.deaf_for().is_none()).map(|_| self.session.ring_errors())
    }

    /// How long the backend is not listened to, if it has just spoken. The connection's end is noticed all the same.
    pub fn deaf_for(&self) -> Option<Duration> {
        self.deaf_until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// It has said so: the driver, which wrote that ring, has to begin again.
    pub fn ring_error(&mut self) -> Option<Change> {
        self.deaf_until = Instant::now().checked_add(PAUSE);
        let _is_one = vhost_user::event::take(self.session.ring_errors());
        tracing::debug!(device = self.name(), "the backend has declared a ring broken");
        self.function.needs_reset();
        None
    }

    /// An exchange that failed half way leaves a connection nobody can trust: the caller gives it up.
    fn refresh(&mut self) -> Result<(), vhost_user::Error> {
        let shadow = configuration(&mut self.session, self.class, self.function.name(), self.queues)?;
        self.function.refresh(shadow);
        Ok(())
    }
}

/// Index field of a used ring.
fn used_index(memory: &Memory, used: u64) -> u16 {
    const INDEX: u64 = 2;
    let mut index = [0; 2];
    match memory.read(used.saturating_add(INDEX), &mut index) {
        Ok(()) => u16::from_le_bytes(index),
        Err(_) => 0,
    }
}

/// An error with its causes, as the second half of a sentence.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Reads the whole configuration space: once, or once for every selector.
fn configuration(session: &mut Session, class: &Class, name: &str, queues: u16) -> Result<Shadow, vhost_user::Error> {
    let len = class.config_len(session.offered());
    if !class.selectors.is_empty() && session.protocol_features() & vhost_user::features::CONFIG != 0 {
        let mut banks = BTreeMap::new();
        for (select, range) in class.selectors {
            for subselect in range.clone() {
                session.write_config(0, &[*select, subselect])?;
                let answer = session.config(len.into())?;
                // The third byte is the size of the answer: most selectors have none, and are not kept.
                if answer.get(2).is_some_and(|size| *size > 0) {
                    banks.insert([*select, subselect], answer);
                }
            }
        }
        return Ok(Shadow::banks(len, banks));
    }
    let mut bytes = session.config(len.into())?;
    if bytes.is_empty()
        && let Some(fallback) = class.fallback
    {
        bytes = fallback(name, queues);
    }
    Ok(Shadow::new(bytes, len))
}
