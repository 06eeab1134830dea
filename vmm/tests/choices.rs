//! What a driver has chosen in the configuration space is known to every successor before it serves a request.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/device.rs"]
mod device;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use device::{Machine, machine};
use virtio::device::{Device, Identity, ReadOnly};
use virtio::memory::Trust;
use virtio::{Queue, QueueState, feature};
use vmm::virtio::remote::Change;

/// Where a disk's driver chooses whether writes wait for a flush.
const CHOICE: u32 = 32;
const CONFIG: u64 = 0x2000;

/// A disk that serves nothing, and notes how the choice stood when its ring was started.
#[derive(Debug, Default)]
struct Chooser {
    choice: Arc<AtomicU8>,
    at_start: Arc<Mutex<Vec<u8>>>,
    queue: Option<Queue>,
}

impl Device for Chooser {
    fn identity(&self) -> Identity {
        Identity { id: 2, features: feature::RING, queues: 1, queue_size: 256, config_len: 60 }
    }

    /// As disks do: the features bring a default with them.
    fn negotiate(&mut self, _features: u64) {
        self.choice.store(1, Ordering::Relaxed);
    }

    fn read_config(&self, offset: u32, buf: &mut [u8]) {
        let mut space = [0; 60];
        space[32] = self.choice.load(Ordering::Relaxed);
        virtio::device::read_config(&space, offset, buf);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ReadOnly> {
        match (offset, data) {
            (CHOICE, [choice]) => {
                self.choice.store(*choice, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(ReadOnly),
        }
    }

    fn start(&mut self, _index: u16, queue: Queue) -> io::Result<()> {
        self.queue = Some(queue);
        self.at_start.lock().unwrap().push(self.choice.load(Ordering::Relaxed));
        Ok(())
    }

    fn stop(&mut self, _index: u16) -> Option<QueueState> {
        self.queue.take().map(Queue::into_state)
    }

    fn reset(&mut self) {}
}

/// A backend, and how the choice stood each time that its ring was started.
fn backend() -> (UnixStream, Arc<Mutex<Vec<u8>>>) {
    let chooser = Chooser::default();
    let at_start = Arc::clone(&chooser.at_start);
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let (_stop, never) = io::pipe().map(|(reader, writer)| (writer, reader)).unwrap();
        vhost_user::Backend::new(chooser, Trust::Sealed).unwrap().serve(theirs, never.as_fd())
    });
    (ours, at_start)
}

fn started(machine: &mut Machine, at_start: &Mutex<Vec<u8>>, times: usize) -> Vec<u8> {
    let began = Instant::now();
    while at_start.lock().unwrap().len() < times {
        assert!(began.elapsed() < Duration::from_secs(20), "the ring is not started");
        machine.run(Duration::from_millis(20));
    }
    at_start.lock().unwrap().clone()
}

#[test]
fn a_successor_knows_the_choice_before_its_rings_start_and_a_new_driver_begins_anew() {
    let (stream, first) = backend();
    let mut machine = machine("blk", stream).unwrap();
    // Before the features are settled, as a driver may.
    machine.put(CONFIG + u64::from(CHOICE), [0]);
    // That is not the driver's to write, and nobody minds.
    machine.put(CONFIG + 50, [9]);
    machine.bring_up();
    assert_eq!(started(&mut machine, &first, 1), [0]);

    let (stream, second) = backend();
    assert_eq!(machine.remote.replug(stream), Change::Connected);
    assert_eq!(started(&mut machine, &second, 1), [0]);
    let mut seen = [7];
    pci_read(&machine, CONFIG + u64::from(CHOICE), &mut seen);
    assert_eq!(seen, [0], "the driver reads its choice");

    // Another driver knows nothing of it.
    machine.put(0x14, [0]);
    machine.run(Duration::from_millis(300));
    machine.bring_up();
    assert_eq!(started(&mut machine, &second, 2), [0, 1]);
    let (stream, third) = backend();
    assert_eq!(machine.remote.replug(stream), Change::Connected);
    assert_eq!(started(&mut machine, &third, 1), [1]);
}

fn pci_read(machine: &Machine, at: u64, data: &mut [u8]) {
    vmm::pci::Function::memory_read(&**machine.remote.function(), at, data);
}
