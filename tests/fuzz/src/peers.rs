//! Conversations with a hostile peer. All that the peer will say is put into the socket before our end begins to read, so one
//! input is one thread, no waiting, and the same each time.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user::wire::{Channel, Deadline};
use vhost_user::{Backend, Deadlines, Notifiers, Region, Ring, Session, Setup};
use virtio::device::{Device, Identity};
use virtio::dirty::LOG_ALL;
use virtio::memory::{Trust, sealed_memfd};
use virtio::{Queue, QueueState, feature};

use crate::bytes::Bytes;

const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 16;
const RAM: u64 = 0x4000;
/// What the frontend calls its memory.
const USER: u64 = 1 << 52;
/// More than these do not fit the buffer of a socket together.
const MESSAGES: usize = 24;
const LIMIT: Duration = Duration::from_millis(200);

/// A device that serves a queue the moment it gets it.
#[derive(Debug, Default)]
struct Toy(Vec<Option<Queue>>);

impl Device for Toy {
    fn identity(&self) -> Identity {
        Identity { id: 4, features: feature::RING, queues: QUEUES, queue_size: QUEUE_SIZE, config_len: 8 }
    }

    fn read_config(&self, offset: u32, buf: &mut [u8]) {
        virtio::device::read_config(&[1; 8], offset, buf);
    }

    fn start(&mut self, index: u16, mut queue: Queue) -> io::Result<()> {
        let mut chain = queue.chain();
        // Two times around: what a driver that is not alive can have put there is one.
        for _ in 0..u32::from(QUEUE_SIZE) * 2 {
            let Some(token) = queue.pop(&mut chain) else { break };
            let written = chain.writable().copy_from(&[7; 64]);
            queue.complete(token, u32::try_from(written).expect("at most 64"));
        }
        queue.publish();
        queue.arm();
        self.0.resize_with(usize::from(QUEUES), || None);
        let slot = self.0.get_mut(usize::from(index)).expect("an index that was offered");
        assert!(slot.is_none(), "a queue is handed over once");
        *slot = Some(queue);
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.0.get_mut(usize::from(index))?.take().map(Queue::into_state)
    }

    fn reset(&mut self) {
        assert!(self.0.iter().all(Option::is_none), "every ring is stopped before a reset");
    }
}

fn pair() -> (Channel, UnixStream) {
    let (peer, ours) = UnixStream::pair().expect("a socket pair");
    (Channel::from(peer), ours)
}

fn event(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, flags | EventfdFlags::CLOEXEC).expect("an event descriptor")
}

fn unsealed(size: u64) -> OwnedFd {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&fd, size).expect("room");
    fd
}

/// A descriptor of one of the kinds that have been tried on somebody.
fn descriptor(kind: u8) -> OwnedFd {
    match kind % 8 {
        0 | 1 => event(EventfdFlags::NONBLOCK),
        2 => event(EventfdFlags::SEMAPHORE),
        3 => sealed_memfd("fuzz", RAM).expect("a memfd"),
        4 => sealed_memfd("fuzz", 4096).expect("a memfd"),
        5 => unsealed(RAM),
        6 => pipe_with(PipeFlags::CLOEXEC).expect("a pipe").0,
        _ => UnixStream::pair().expect("a socket pair").0.into(),
    }
}

/// Any message.
fn anything(bytes: &mut Bytes<'_>) -> (u32, Vec<u8>, Vec<OwnedFd>) {
    let request = u32::from(bytes.byte() % 48);
    let len = usize::from(bytes.byte());
    let body = bytes.take(len).to_vec();
    let fds = (0..bytes.byte() % 5).map(|_| descriptor(bytes.byte())).collect();
    (request, body, fds)
}

/// Changes one byte, now and then.
fn spoil(body: &mut [u8], bytes: &mut Bytes<'_>) {
    if bytes.byte().is_multiple_of(8)
        && let Some(byte) = body.get_mut(usize::from(bytes.byte()))
    {
        *byte ^= bytes.byte();
    }
}

fn words<const N: usize>(values: [u64; N]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn pair_of(a: u32, b: u32) -> Vec<u8> {
    [a.to_ne_bytes(), b.to_ne_bytes()].concat()
}

/// Memory as a frontend has it, with a ring's worth of whatever the input says in it.
fn ram(bytes: &mut Bytes<'_>) -> OwnedFd {
    let fd = sealed_memfd("fuzz", RAM).expect("a memfd");
    for at in [0u64, 0x1000, 0x2000] {
        let len = usize::from(bytes.byte());
        rustix::io::pwrite(&fd, bytes.take(len), at).expect("room");
    }
    fd
}

/// One message of a frontend: usually nearly right, sometimes anything.
fn say(channel: &Channel, bytes: &mut Bytes<'_>) {
    let ring = u32::from(bytes.byte() % 3);
    let (request, mut body, fds) = match bytes.byte() % 16 {
        0 => (2, words([feature::RING | 1 << 30]), vec![]),
        1 => (16, words([bytes.u64()]), vec![]),
        2 => (16, words([1 << 3 | 1 << 9 | 1 << 12 | 1]), vec![]),
        3 | 4 => {
            let fd = ram(bytes);
            (5, [pair_of(1, 0), words([0, RAM, USER, 0])].concat(), vec![fd])
        }
        5 => (37, words([0, u64::from(bytes.byte()) << 12, RAM, USER, 0]), vec![ram(bytes)]),
        6 => (8, pair_of(ring, 1 << (bytes.byte() % 6)), vec![]),
        7 => (10, pair_of(ring, u32::from(bytes.u16())), vec![]),
        8 => (9, [pair_of(ring, 0), words([USER, USER + 0x2000, USER + 0x1000, 0])].concat(), vec![]),
        9 => (12, words([ring.into()]), vec![descriptor(0)]),
        10 => (13 + u32::from(bytes.byte() % 2), words([ring.into()]), vec![descriptor(0)]),
        11 => (18, pair_of(ring, u32::from(bytes.byte() % 2)), vec![]),
        12 => (11, pair_of(ring, 0), vec![]),
        13 => {
            let size = virtio::inflight::region_size(QUEUES, QUEUE_SIZE);
            let fd = sealed_memfd("fuzz", size).expect("a memfd");
            let len = usize::from(bytes.byte());
            rustix::io::pwrite(&fd, bytes.take(len), 0).expect("room");
            let sizes = [QUEUES.to_ne_bytes(), QUEUE_SIZE.to_ne_bytes()].concat();
            (32, [words([size, 0]), sizes].concat(), vec![fd])
        }
        14 => (21, descriptor_body(bytes), vec![descriptor(7)]),
        _ => anything(bytes),
    };
    spoil(&mut body, bytes);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    // A full buffer means that nobody reads what comes after.
    let _full = channel.request(request, bytes.byte() & 1 != 0, &body, &fds, Deadline::after(Duration::ZERO));
}

fn descriptor_body(bytes: &mut Bytes<'_>) -> Vec<u8> {
    bytes.take(usize::from(bytes.clone().byte() % 9)).to_vec()
}

/// A frontend against our backend.
pub fn frontend(mut bytes: Bytes<'_>) {
    let (channel, ours) = pair();
    for _ in 0..MESSAGES {
        if bytes.is_empty() {
            break;
        }
        say(&channel, &mut bytes);
    }
    finish(&channel);
    let stop = event(EventfdFlags::NONBLOCK);
    let mut backend = Backend::new(Toy::default(), Trust::Sealed).expect("a backend");
    let _any_end = backend.serve(ours, stop.as_fd());
    // Whatever the first one did, the next one is served.
    let (channel, ours) = pair();
    channel.request(1, false, &[], &[], Deadline::after(LIMIT)).expect("room");
    finish(&channel);
    let end = backend.serve(ours, stop.as_fd()).expect("an orderly conversation");
    assert_eq!(end, vhost_user::backend::End::Closed);
    let answer = channel.receive("an answer", Deadline::after(LIMIT)).expect("an answer");
    assert_eq!(answer.u64().expect("a number"), feature::RING | 1 << 30 | LOG_ALL);
}

/// Nothing more comes from this side.
fn finish(channel: &Channel) {
    let stream = UnixStream::from(channel.as_fd().try_clone_to_owned().expect("a duplicate"));
    stream.shutdown(Shutdown::Write).expect("an open socket");
}

/// Answers of a backend: in the order our frontend asks, or not.
fn answer(channel: &Channel, bytes: &mut Bytes<'_>) {
    let (request, mut body, fds) = match bytes.byte() % 8 {
        0 => (1, words([feature::RING | 1 << 30]), vec![]),
        1 => (15, words([1 << 3 | 1 << 9 | 1 << 12 | 1 << 5 | 1]), vec![]),
        2 => (17, words([u64::from(bytes.byte() % 4)]), vec![]),
        3 => (11, pair_of(u32::from(bytes.byte() % 3), bytes.u32()), vec![]),
        4 => (24, [pair_of(0, 16), pair_of(0, 0)[..4].to_vec(), vec![3; 16]].concat(), vec![]),
        5 => {
            let size = virtio::inflight::region_size(QUEUES, QUEUE_SIZE);
            let sizes = [QUEUES.to_ne_bytes(), QUEUE_SIZE.to_ne_bytes()].concat();
            let kind = bytes.byte();
            let fd = if kind & 1 == 0 { sealed_memfd("fuzz", size).expect("a memfd") } else { descriptor(kind >> 1) };
            (31, [words([size, 0]), sizes, vec![0; 4]].concat(), vec![fd])
        }
        6 => (u32::from(bytes.byte() % 48), words([0]), vec![]),
        _ => anything(bytes),
    };
    spoil(&mut body, bytes);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let _full = channel.reply(request, &body, &fds, Deadline::after(Duration::ZERO));
}

fn setup(memory: &Arc<OwnedFd>) -> Setup {
    let region = Region { guest_addr: 0, size: RAM, fd: Arc::clone(memory), offset: 0 };
    let notifiers = (0..QUEUES).map(|_| {
        let (kick, call) = (event(EventfdFlags::NONBLOCK), event(EventfdFlags::NONBLOCK));
        Notifiers { kick, call }
    });
    let deadlines = Deadlines { exchange: LIMIT, whole: LIMIT, stop: LIMIT };
    Setup { memory: vec![region], notifiers: notifiers.collect(), deadlines }
}

/// The answers of one connection, all of them said already.
fn prepared(bytes: &mut Bytes<'_>) -> (Channel, UnixStream) {
    let (channel, ours) = pair();
    for _ in 0..bytes.byte() % 24 {
        answer(&channel, bytes);
    }
    finish(&channel);
    (channel, ours)
}

/// A backend against our frontend: what the VMM does with a device, from greeting to greeting its successor.
pub fn backend(mut bytes: Bytes<'_>) {
    let memory = Arc::new(sealed_memfd("fuzz", RAM).expect("a memfd"));
    let (_peer, ours) = prepared(&mut bytes);
    let Ok(mut session) = Session::connect(ours, setup(&memory)) else { return };
    if let Ok(config) = session.config(16) {
        assert!(config.len() <= 16, "no more than was asked for");
    }
    let ring = |index| Ring { index, size: QUEUE_SIZE, desc: 0, avail: 0x2000, used: 0x1000 };
    let rings: Vec<Ring> = (0..QUEUES).map(ring).collect();
    let _started = session.start(session.offered(), &rings);
    let (_peer, ours) = prepared(&mut bytes);
    let _reconnected = session.reconnect(ours, |_| 0);
    if session.backend_requests().is_some() && bytes.byte() & 1 != 0 {
        session.disconnect();
    }
    let _stopped = session.stop();
    assert!(session.notifiers(QUEUES).is_none());
}
