//! The one virtio device of this machine: a virtio-pci function whose rings are served by another process.
//!
//! Two sides share [`VirtioPci`]. Processors read and write its registers and never wait: the configuration space is a
//! copy, a kick goes from KVM to the backend's eventfd, an interrupt from the backend's eventfd to KVM. Whatever needs
//! the backend (start at DRIVER_OK, stop at status 0, a configuration write) is left as [`Work`] for the control thread,
//! which talks to the backend ([`remote`]) and writes the outcome back.
//!
//! ```text
//! processor -- registers --> VirtioPci { common, shadow, msix } <-- outcome -- control thread -- vhost-user --> backend
//!                                 |  doorbell: "look at your work" ------------->|
//! ```
//!
//! Work is a set of flags, not a queue, so a guest that repeats itself cannot make it grow. While a reset is under way
//! the status register keeps its old value (a driver polls it for 0) and all writes to registers of rings are ignored.

pub mod common;
pub mod remote;
pub mod shadow;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::common::{Common, Effect};
use self::shadow::Shadow;
use crate::classes::Class;
use crate::events::Doorbell;
use crate::kvm::{Event, Hypervisor};
use crate::memory::Span;
use crate::pci::Function;
use crate::pci::config::{BAR0, COMMAND, ConfigSpace};
use crate::pci::msix::{self, Message, Msix};

/// Queues of one device at most. It bounds the notification area, the vector table, and the descriptors we hold.
pub const MAX_QUEUES: u16 = 256;
/// Size of a ring if nobody asks for another one, and what the split ring allows.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// The largest split ring.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// The base address register: a page for each kind of register, so that each can be found in a trace by its address.
const BAR_SIZE: u64 = 0x8000;
const COMMON: Span = Span { start: 0, size: 0x38 };
const ISR: Span = Span { start: 0x1000, size: 1 };
const DEVICE: Span = Span { start: 0x2000, size: 0x1000 };
const NOTIFY: Span = Span { start: 0x3000, size: 4 * MAX_QUEUES as u64 };
const TABLE: Span = Span { start: 0x4000, size: 0x2000 };
const PENDING: Span = Span { start: 0x6000, size: 0x1000 };
/// Each queue has a notification address of its own, so that KVM needs no datamatch to tell them apart.
const NOTIFY_STRIDE: u64 = 4;

/// The only bit that is ever set: queues interrupt by MSI-X or not at all.
const CONFIG_INTERRUPT: u8 = 2;
/// "Not decoded" in [`VirtioPci::base`].
const NOWHERE: u64 = u64::MAX;

/// The eventfds of one queue, ours; the backend gets duplicates.
#[derive(Debug)]
pub struct Line {
    kick: Event,
    call: Event,
}

/// What the control thread has to do for a device.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// The driver has written 0 to the status: stop the rings, then call [`VirtioPci::stopped`].
    pub stop: bool,
    /// The driver is ready: start the rings with these features.
    pub start: Option<(u64, Vec<vhost_user::Ring>)>,
    /// The driver has written here; these are the bytes now.
    pub config: Option<(u32, Vec<u8>)>,
}

/// What a device is made of.
pub struct Identity {
    /// The name people gave it.
    pub name: String,
    /// Virtio id.
    pub id: u16,
    /// Its row.
    pub class: &'static Class,
    /// Feature bits for the driver.
    pub features: u64,
    /// Number of queues.
    pub queues: u16,
    /// Size of each.
    pub queue_size: u16,
    /// The first interrupt route of its own; it has one for each queue and one more.
    pub first_route: u32,
}

struct Inner {
    config: ConfigSpace,
    msix_at: u16,
    access_at: u16,
    msix: Msix,
    common: Common,
    shadow: Shadow,
    isr: u8,
    /// The route each source (configuration, then queues) is attached to.
    attached: Vec<Option<u32>>,
    /// The message each route was last told.
    routed: Vec<Option<Message>>,
    start: bool,
    /// The rings run, or will as soon as the control thread gets there.
    live: bool,
    dirty: Option<Span>,
    /// What the driver has written to the configuration space since its last reset, byte for byte.
    written: BTreeMap<u64, u8>,
}

/// A virtio-pci function.
pub struct VirtioPci {
    identity: Identity,
    lines: Vec<Line>,
    config_changed: Event,
    base: AtomicU64,
    power_on: ConfigSpace,
    inner: Mutex<Inner>,
    hypervisor: Arc<dyn Hypervisor>,
    doorbell: Arc<Doorbell>,
}

/// Eventfds for `queues` queues: ours, and the duplicates for a session.
pub fn lines(queues: u16) -> io::Result<(Vec<Line>, Vec<vhost_user::Notifiers>)> {
    let mut lines = Vec::new();
    let mut notifiers = Vec::new();
    for _ in 0..queues {
        let (kick, call) = (Event::new()?, Event::new()?);
        notifiers
            .push(vhost_user::Notifiers { kick: kick.as_fd().try_clone_to_owned()?, call: call.as_fd().try_clone_to_owned()? });
        lines.push(Line { kick, call });
    }
    Ok((lines, notifiers))
}

impl VirtioPci {
    /// A function at power-on state, with its memory at `address` (see [`VirtioPci::memory_size`]).
    pub fn new(
        identity: Identity,
        lines: Vec<Line>,
        shadow: Shadow,
        address: u64,
        hypervisor: Arc<dyn Hypervisor>,
        doorbell: Arc<Doorbell>,
    ) -> io::Result<Self> {
        let (power_on, msix_at, access_at) = config_space(&identity, address, shadow.len());
        let sources = usize::from(identity.queues) + 1;
        let inner = Inner {
            config: power_on.clone(),
            msix_at,
            access_at,
            msix: Msix::new(identity.queues + 1),
            common: Common::new(identity.features, identity.queues, identity.queue_size),
            shadow,
            isr: 0,
            attached: vec![None; sources],
            routed: vec![None; sources],
            start: false,
            live: false,
            dirty: None,
            written: BTreeMap::new(),
        };
        Ok(Self {
            identity,
            lines,
            config_changed: Event::new()?,
            base: AtomicU64::new(NOWHERE),
            power_on,
            inner: Mutex::new(inner),
            hypervisor,
            doorbell,
        })
    }

    /// What the allocator of base addresses is asked for.
    pub const fn memory_size() -> u64 {
        BAR_SIZE
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is to be done. A start is not handed out while a stop is pending.
    pub fn work(&self) -> Work {
        let mut inner = self.inner();
        let config = inner.dirty.take().map(|span| {
            let mut bytes = vec![0; usize::try_from(span.size).unwrap_or(0)];
            inner.shadow.read(span.start, &mut bytes);
            (u32::try_from(span.start).unwrap_or(0), bytes)
        });
        if inner.common.is_resetting() {
            inner.start = false;
            return Work { stop: true, start: None, config };
        }
        let start = std::mem::take(&mut inner.start).then(|| (inner.common.accepted(), inner.common.rings()));
        Work { stop: false, start, config }
    }

    /// What the driver has written to the configuration space since its last reset: runs of bytes, each with its offset.
    pub fn written(&self) -> Vec<(u32, Vec<u8>)> {
        let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
        for (offset, byte) in &self.inner().written {
            let offset = u32::try_from(*offset).unwrap_or(u32::MAX);
            match runs.last_mut() {
                Some((start, bytes)) if u64::from(*start) + bytes.len() as u64 == u64::from(offset) => bytes.push(*byte),
                _ => runs.push((offset, vec![*byte])),
            }
        }
        runs
    }

    /// The rings are quiet: the driver may see status 0 now.
    pub fn stopped(&self) {
        let mut inner = self.inner();
        self.reset_device(&mut inner);
    }

    /// Whether the driver has started the device and not reset it.
    pub fn is_live(&self) -> bool {
        self.inner().live
    }

    /// The backend could not do what the driver was promised: the driver has to reset the device.
    ///
    /// Of a device that does not run the driver need not be told: it is about to begin anyway.
    pub fn needs_reset(&self) {
        let mut inner = self.inner();
        if !inner.live || !inner.common.need_reset() {
            return;
        }
        drop(inner);
        self.signal_config();
    }

    /// The backend has new configuration.
    pub fn refresh(&self, shadow: Shadow) {
        {
            let mut inner = self.inner();
            if inner.shadow == shadow {
                return;
            }
            inner.shadow = shadow;
            inner.common.next_generation();
        }
        self.signal_config();
    }

    fn signal_config(&self) {
        self.inner().isr |= CONFIG_INTERRUPT;
        self.config_changed.signal();
    }

    fn reset_device(&self, inner: &mut Inner) {
        inner.common.reset();
        inner.isr = 0;
        inner.live = false;
        inner.start = false;
        inner.dirty = None;
        inner.written.clear();
        self.sync_interrupts(inner);
        // What the last driver left behind is not for the next one. Nobody reads these eventfds any more.
        for event in self.lines.iter().flat_map(|l| [&l.kick, &l.call]).chain([&self.config_changed]) {
            event.take();
        }
    }

    fn source(&self, index: usize) -> Option<&Event> {
        match index.checked_sub(1) {
            None => Some(&self.config_changed),
            Some(queue) => self.lines.get(queue).map(|l| &l.call),
        }
    }

    /// Makes KVM's view of the interrupts that of the registers. Attaching an eventfd that was signalled while it was
    /// masked raises the interrupt at once; nothing has to be remembered here.
    fn sync_interrupts(&self, inner: &mut Inner) {
        for index in 0..inner.attached.len() {
            let vector = match index.checked_sub(1) {
                None => inner.common.config_vector(),
                Some(queue) => inner.common.queue_vector(queue),
            };
            let message = inner.msix.message(vector);
            let wanted = message.map(|_| self.identity.first_route.saturating_add(u32::from(vector)));
            let (Some(event), Some(attached)) = (self.source(index), inner.attached.get_mut(index)) else { continue };
            if *attached != wanted
                && let Some(route) = attached.take()
            {
                self.report("detach an interrupt", self.hypervisor.detach_irq(event, route));
            }
            let (Some(message), Some(route)) = (message, wanted) else { continue };
            let Some(routed) = inner.routed.get_mut(usize::from(vector)) else { continue };
            if *routed != Some(message) {
                let done = self.hypervisor.route_msi(route, message.address, message.data);
                *routed = done.is_ok().then_some(message);
                self.report("route an interrupt", done);
            }
            if attached.is_none() {
                let done = self.hypervisor.attach_irq(event, route);
                *attached = done.is_ok().then_some(route);
                self.report("attach an interrupt", done);
            }
        }
    }

    /// Makes KVM's view of the notification addresses that of the base address register.
    fn sync_memory(&self, inner: &Inner) {
        let new = inner.config.memory_base().unwrap_or(NOWHERE);
        let old = self.base.swap(new, Ordering::AcqRel);
        if old == new {
            return;
        }
        for (line, at) in self.lines.iter().zip((NOTIFY.start..).step_by(4)) {
            if old != NOWHERE {
                // Fails where attaching has failed.
                let _ = self.hypervisor.detach_kick(&line.kick, old.wrapping_add(at));
            }
            if new != NOWHERE {
                // Without it kicks still arrive, by way of a processor's exit (`notify`).
                self.report("attach a doorbell", self.hypervisor.attach_kick(&line.kick, new.wrapping_add(at)));
            }
        }
    }

    fn report(&self, doing: &str, outcome: io::Result<()>) {
        if let Err(e) = outcome {
            tracing::debug!(device = self.name(), "Cannot {doing}: {e}");
        }
    }

    fn pending(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        let mut bits = vec![0u8; usize::from(inner.msix.vectors()).div_ceil(64) * 8];
        for index in 0..inner.attached.len() {
            let vector = match index.checked_sub(1) {
                None => inner.common.config_vector(),
                Some(queue) => inner.common.queue_vector(queue),
            };
            let signalled = self.source(index).is_some_and(is_signalled);
            if inner.attached.get(index) == Some(&None)
                && signalled
                && let Some(byte) = bits.get_mut(usize::from(vector / 8))
            {
                *byte |= 1 << (vector % 8);
            }
        }
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(bits.iter().skip(skip)) {
            *byte = *value;
        }
    }

    /// A kick that came as an exit, because KVM does not know the address.
    fn notify(&self, offset: u64) {
        if let Some(line) = usize::try_from(offset / NOTIFY_STRIDE).ok().and_then(|q| self.lines.get(q)) {
            line.kick.signal();
        }
    }

    fn common_write(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match inner.common.write(offset, data) {
            Effect::None => {}
            Effect::Vectors => self.sync_interrupts(inner),
            Effect::Start => {
                inner.start = true;
                inner.live = true;
                self.doorbell.ring();
            }
            Effect::Reset if inner.live => {
                inner.common.begin_reset();
                self.doorbell.ring();
            }
            Effect::Reset => self.reset_device(inner),
        }
    }

    fn shadow_write(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        if inner.shadow.write(offset, data) {
            let end = offset.saturating_add(data.len() as u64);
            let (start, end) = inner.dirty.map_or((offset, end), |d| (d.start.min(offset), d.end().max(end)));
            inner.dirty = Some(Span { start, size: end.saturating_sub(start) });
            // Not more than there is: what lies beyond the end was ignored.
            let len = inner.shadow.len() as u64;
            inner.written.extend((offset..len).zip(data.iter().copied()));
            self.doorbell.ring();
        }
    }

    fn access_read(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = COMMON.offset_of(offset) {
            inner.common.read(at, data);
        } else if ISR.offset_of(offset).is_some() {
            if let Some(byte) = data.first_mut() {
                *byte = std::mem::take(&mut inner.isr);
            }
        } else if let Some(at) = DEVICE.offset_of(offset) {
            inner.shadow.read(at, data);
        } else if let Some(at) = TABLE.offset_of(offset) {
            inner.msix.read(at, data);
        } else if let Some(at) = PENDING.offset_of(offset) {
            self.pending(inner, at, data);
        }
    }

    fn access_write(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        if let Some(at) = NOTIFY.offset_of(offset) {
            self.notify(at);
        } else if let Some(at) = COMMON.offset_of(offset) {
            self.common_write(inner, at, data);
        } else if let Some(at) = DEVICE.offset_of(offset) {
            self.shadow_write(inner, at, data);
        } else if let Some(at) = TABLE.offset_of(offset) {
            inner.msix.write(at, data);
            self.sync_interrupts(inner);
        }
    }

    /// The window in configuration space through which firmware reaches the registers without mapping them.
    fn window(inner: &Inner) -> Option<(u64, usize)> {
        let (bar, offset, len) = (
            inner.config.u32(inner.access_at + 4),
            inner.config.u32(inner.access_at + 8),
            inner.config.u32(inner.access_at + 12),
        );
        let len = usize::try_from(len).ok().filter(|l| matches!(l, 1 | 2 | 4))?;
        (bar & 0xff == 0 && u64::from(offset) < BAR_SIZE && (offset as usize).is_multiple_of(len))
            .then_some((u64::from(offset), len))
    }
}

fn is_signalled(event: &Event) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
}

/// The header and the capabilities; with the places of the two that have writable bits.
fn config_space(identity: &Identity, address: u64, config_len: usize) -> (ConfigSpace, u16, u16) {
    const VIRTIO: u16 = 0x1af4;
    const MODERN: u16 = 0x1040;
    const VENDOR: u8 = 9;
    let device = MODERN.saturating_add(identity.id);
    let mut space = ConfigSpace::new(VIRTIO, device, identity.class.pci, 0x40u16.saturating_add(identity.id));
    space.memory_bar(address, BAR_SIZE);
    let low = |v: u64| u32::try_from(v).unwrap_or(0);
    let table = Msix::capability(identity.queues + 1, low(TABLE.start), low(PENDING.start));
    let msix_at = space.capability(msix::CAPABILITY, &table);
    space.allow(msix_at + usize::from(msix::CONTROL), &msix::CONTROL_WRITABLE.to_le_bytes());

    let location = |kind: u8, span: Span, extra: &[u8]| {
        let mut body = vec![u8::try_from(16 + extra.len()).unwrap_or(16), kind, 0, 0, 0, 0];
        body.extend(low(span.start).to_le_bytes());
        body.extend(low(span.size).to_le_bytes());
        body.extend(extra);
        body
    };
    space.capability(VENDOR, &location(1, COMMON, &[]));
    space.capability(VENDOR, &location(2, NOTIFY, &low(NOTIFY_STRIDE).to_le_bytes()));
    space.capability(VENDOR, &location(3, ISR, &[]));
    if config_len > 0 {
        space.capability(VENDOR, &location(4, Span { size: config_len as u64, ..DEVICE }, &[]));
    }
    let access_at = space.capability(VENDOR, &location(5, Span { start: 0, size: 0 }, &[0; 4]));
    // Base address register, offset, length and data are the guest's.
    space.allow(access_at + 4, &[0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let place = |at: usize| u16::try_from(at).unwrap_or(0);
    (space, place(msix_at), place(access_at))
}

impl Function for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = self.inner();
        if offset == inner.access_at + 16
            && let Some((at, len)) = Self::window(&inner)
            && len == data.len()
        {
            return self.access_read(&mut inner, at, data);
        }
        inner.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.inner();
        if offset == inner.access_at + 16
            && let Some((at, len)) = Self::window(&inner)
            && len == data.len()
        {
            return self.access_write(&mut inner, at, data);
        }
        inner.config.write(offset, data);
        let control = inner.msix_at + msix::CONTROL;
        if offset & !3 == control & !3 {
            let value = inner.config.u16(control);
            inner.msix.set_control(value);
            self.sync_interrupts(&mut inner);
        }
        if (COMMAND..BAR0 + 8).contains(&offset) {
            self.sync_memory(&inner);
        }
    }

    fn memory(&self) -> Option<Span> {
        let start = self.base.load(Ordering::Acquire);
        (start != NOWHERE).then_some(Span { start, size: BAR_SIZE })
    }

    fn memory_read(&self, offset: u64, data: &mut [u8]) {
        self.access_read(&mut self.inner(), offset, data);
    }

    fn memory_write(&self, offset: u64, data: &[u8]) {
        self.access_write(&mut self.inner(), offset, data);
    }

    fn reset(&self) {
        let mut inner = self.inner();
        inner.config = self.power_on.clone();
        inner.msix = Msix::new(self.identity.queues + 1);
        self.sync_memory(&inner);
        self.reset_device(&mut inner);
    }
}

#[cfg(test)]
mod tests;
