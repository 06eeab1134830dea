//! The device: two queues, one thread, and the terminal's size as configuration.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::Result;
use daemon::{Confined, Stopper};
use rustix::event::PollFlags;
use virtio::device::{Device, Host, Identity, read_config};
use virtio::worker::{Attempt, SOURCES, Serve, Served, Slots, Source, Worker, Workers, run};
use virtio::{Chain, Queue, QueueState, feature};

use crate::metrics;
use crate::port::{Port, Size, Typed};
use crate::request::{Input, Output};
use crate::sandbox::THREAD;

/// The virtio device id of a console.
const ID: u32 = 3;

/// Largest ring.
const QUEUE_SIZE: u16 = 256;

/// From the port to the guest. The other one is from the guest to the port.
const RECEIVE: u16 = 0;

/// `VIRTIO_CONSOLE_F_SIZE`: columns and rows are valid.
const F_SIZE: u64 = 1;

/// Bytes of the configuration space (virtio 1.3, 5.3.4).
const CONFIG_LEN: u32 = 12;

/// What a console without a terminal says of itself.
const NO_TERMINAL: Size = Size { columns: 80, rows: 25 };

/// Bytes moved at once.
const PIECE: usize = 4096;

/// What thread and device share: the size, and the way to the frontend.
#[derive(Debug, Default)]
struct Shared {
    size: AtomicU32,
    host: OnceLock<Host>,
}

impl Shared {
    fn set(&self, size: Size) {
        self.size.store(u32::from(size.columns) | u32::from(size.rows) << 16, Ordering::Relaxed);
    }
}

/// A virtio-console device with one port.
#[derive(Debug)]
pub struct Console {
    workers: Workers,
    shared: Arc<Shared>,
}

impl Console {
    /// Starts the device's thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn new(port: Port, confined: &Confined) -> Result<Console> {
        let shared = Arc::new(Shared::default());
        shared.set(port.size().unwrap_or(NO_TERMINAL));
        let (worker, mailbox) = Worker::new()?;
        let stopper = confined.stopper()?;
        let server = Relay { port, typed: [0; PIECE], waiting: 0, shared: Arc::clone(&shared), stopper };
        confined.spawn(THREAD, "port0".to_owned(), move || run(server, mailbox))?;
        Ok(Console { workers: Workers::new(vec![worker]), shared })
    }
}

impl Device for Console {
    fn identity(&self) -> Identity {
        Identity { id: ID, features: feature::RING | F_SIZE, queues: 2, queue_size: QUEUE_SIZE, config_len: CONFIG_LEN }
    }

    fn read_config(&self, offset: u32, buf: &mut [u8]) {
        let mut config = [0; CONFIG_LEN as usize];
        let (size, rest) = config.split_at_mut(4);
        size.copy_from_slice(&self.shared.size.load(Ordering::Relaxed).to_le_bytes());
        if let Some(ports) = rest.get_mut(..4) {
            ports.copy_from_slice(&1u32.to_le_bytes());
        }
        read_config(&config, offset, buf);
    }

    fn start(&mut self, index: u16, queue: Queue) -> io::Result<()> {
        self.workers.start(index, queue)
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.workers.stop(index)
    }

    fn reset(&mut self) {}

    fn attach(&mut self, host: Host) {
        let _attached_once = self.shared.host.set(host);
    }
}

/// What the thread does.
#[derive(Debug)]
struct Relay {
    port: Port,
    /// Typed, and not delivered yet: the first `waiting` bytes.
    typed: [u8; PIECE],
    waiting: usize,
    shared: Arc<Shared>,
    stopper: Stopper,
}

impl Relay {
    /// Delivers what was typed into a buffer the guest has put out for it.
    fn deliver(&mut self, chain: &Chain) -> u32 {
        let Ok(Input(room)) = Input::read(chain) else {
            metrics::BAD_REQUESTS.add(1);
            return 0;
        };
        let count = room.copy_from(self.typed.get(..self.waiting).unwrap_or_default());
        self.typed.copy_within(count..self.waiting, 0);
        self.waiting -= count;
        metrics::TYPED_BYTES.add(count as u64);
        u32::try_from(count).unwrap_or(0)
    }

    /// Shows what the guest has written. Where the port can tell how far it was written, a successor goes on from there; elsewhere
    /// it shows the whole request again, because twice is better than never.
    fn show(&mut self, chain: &Chain, attempt: &mut Attempt<'_>) {
        let Ok(Output(bytes)) = Output::read(chain) else {
            metrics::BAD_REQUESTS.add(1);
            return;
        };
        let mut rest = bytes;
        if let Some(position) = self.port.position() {
            match attempt.noted() {
                Some(began) => rest = bytes.split_at(position.wrapping_sub(began).min(bytes.len())).1,
                None => attempt.note(position),
            }
        }
        let mut piece = [0; PIECE];
        while !rest.is_empty() {
            let count = rest.copy_to(&mut piece);
            self.port.write(piece.get(..count).unwrap_or_default());
            metrics::SHOWN_BYTES.add(count as u64);
            rest = rest.split_at(u32::try_from(count).unwrap_or(u32::MAX)).1;
        }
    }

    fn read_port(&mut self, slots: &mut Slots) {
        let room = self.typed.get_mut(self.waiting..).unwrap_or_default();
        match self.port.read(room) {
            Typed::Bytes(count) => self.waiting += count,
            Typed::Leave => self.stopper.stop(),
            Typed::Nothing | Typed::Ended => {}
        }
        if let Some(slot) = slots.get(RECEIVE) {
            // A ring that has nowhere to put it will be kicked when it has.
            let _more = slot.drain(self);
        }
    }

    fn size_changed(&mut self) {
        self.port.acknowledge_size();
        let Some(size) = self.port.size() else { return };
        self.shared.set(size);
        if let Some(host) = self.shared.host.get() {
            host.config_changed();
        }
    }
}

impl Serve for Relay {
    fn serve(&mut self, index: u16, chain: &Chain, attempt: &mut Attempt<'_>) -> Served {
        if index == RECEIVE {
            return Served::Done(self.deliver(chain));
        }
        self.show(chain, attempt);
        Served::Done(0)
    }

    fn can_serve(&mut self, index: u16) -> bool {
        index != RECEIVE || self.waiting > 0
    }

    fn sources(&self, slots: &Slots) -> [Option<Source<'_>>; SOURCES] {
        // Nothing is read that could not be delivered: the typist waits. A client is let in at any time.
        let wanted = self.waiting == 0 && (slots.has(RECEIVE) || self.port.is_listening());
        let input = self.port.source().filter(|_| wanted);
        let other = match self.port.behind() {
            Some(client) => Some((client, PollFlags::OUT)),
            None => self.port.size_changes().map(|changes| (changes, PollFlags::IN)),
        };
        [input.map(|fd| (fd, PollFlags::IN)), other]
    }

    fn ready(&mut self, which: usize, _events: PollFlags, slots: &mut Slots) {
        match which {
            0 => self.read_port(slots),
            // Only a terminal has a size, and only a client can be behind.
            _ if self.port.behind().is_some() => self.port.catch_up(),
            _ => self.size_changed(),
        }
    }
}
