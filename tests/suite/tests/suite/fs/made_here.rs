//! A virtio-fs server made here, for what upstream's does not do: several request queues, and lies. It shows one file.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use vhost_user::Backend;
use virtio::device::{Device, Identity};
use virtio::memory::Trust;
use virtio::worker::{Attempt, Serve, Served, Worker, Workers, run};
use virtio::{Chain, Queue, QueueState, feature};

/// Request queues.
const QUEUES: u16 = 3;

/// Bytes of the file.
const SIZE: u64 = 8 << 20;

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

/// What is done to an answer to READ: its bytes, and how many the server says there are.
pub(super) type Lie = fn(&mut Vec<u8>, &mut u32);

/// What the server has seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Requests of each queue.
    pub(super) requests: [AtomicU32; 4],
    /// FORGETs, in the queue for what must not wait.
    pub(super) forgotten: AtomicU32,
    /// Whether it heard goodbye.
    pub(super) destroyed: AtomicU32,
    looked_up: AtomicU64,
}

/// The content of the file at an offset that is a multiple of 8.
pub(super) fn content(offset: u64, len: usize) -> Vec<u8> {
    (offset / 8..).flat_map(u64::to_le_bytes).take(len).collect()
}

/// Serves one frontend. `queues` is how many it says it has.
pub(super) fn start(socket: &Path, queues: u32, lie: Lie) -> (Arc<Seen>, JoinHandle<()>) {
    let listener = UnixListener::bind(socket).unwrap();
    let seen = Arc::new(Seen::default());
    let all = Arc::clone(&seen);
    let server = thread::spawn(move || {
        let worker = |_| {
            let (worker, mailbox) = Worker::new().unwrap();
            let serve = OneFile { seen: Arc::clone(&all), lie };
            thread::spawn(move || run(serve, mailbox));
            worker
        };
        let device = Fs { workers: Workers::new((0..=QUEUES).map(worker).collect()), queues };
        let mut backend = Backend::new(device, Trust::Sealed).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let _however = backend.serve(stream, never.as_fd());
    });
    (seen, server)
}

struct Fs {
    workers: Workers,
    queues: u32,
}

impl Device for Fs {
    fn identity(&self) -> Identity {
        Identity { id: 26, features: feature::RING, queues: 1 + QUEUES, queue_size: 256, config_len: 40 }
    }

    fn read_config(&self, offset: u32, buf: &mut [u8]) {
        let mut all = [0; 40];
        all[..9].copy_from_slice(b"made here");
        all[36..].copy_from_slice(&self.queues.to_le_bytes());
        buf.iter_mut().zip(all.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, index: u16, queue: Queue) -> io::Result<()> {
        self.workers.start(index, queue)
    }

    fn stop(&mut self, index: u16) -> Option<QueueState> {
        self.workers.stop(index)
    }

    fn reset(&mut self) {}
}

struct OneFile {
    seen: Arc<Seen>,
    lie: Lie,
}

impl OneFile {
    /// The body of an answer. `None`: there is no answer.
    fn answer(&self, opcode: u32, node: u64, body: &[u8]) -> Option<Result<Vec<u8>, i32>> {
        let long = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
        Some(match opcode {
            1 if body == b"file\0" => Ok(entry(2)),
            // Another one each time: the kernel forgets the one that it has got.
            1 if body == b"changing\0" => Ok(entry(10 + self.seen.looked_up.fetch_add(1, Ordering::SeqCst))),
            1 => Err(ENOENT),
            2 | 42 => {
                self.seen.forgotten.fetch_add(1, Ordering::SeqCst);
                return None;
            }
            3 => Ok([&[0; 16][..], &attributes(node)].concat()),
            // A handle, and FOPEN_DIRECT_IO: nothing is kept in the kernel's cache.
            14 => Ok([1u64, 1].map(u64::to_le_bytes).concat()),
            15 => {
                let (offset, size) = (long(8), u64::from(word(16)));
                Ok(content(offset, usize::try_from(size.min(SIZE.saturating_sub(offset))).unwrap()))
            }
            18 | 25 => Ok(Vec::new()),
            26 => Ok(settle()),
            38 => {
                self.seen.destroyed.fetch_add(1, Ordering::SeqCst);
                Ok(Vec::new())
            }
            _ => Err(ENOSYS),
        })
    }
}

impl Serve for OneFile {
    fn serve(&mut self, index: u16, chain: &Chain, _attempt: &mut Attempt<'_>) -> Served {
        self.seen.requests[usize::from(index)].fetch_add(1, Ordering::SeqCst);
        let mut bytes = vec![0; chain.readable().len() as usize];
        chain.readable().copy_to(&mut bytes);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let node = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        assert_eq!(word(0) as usize, bytes.len(), "a request is as long as it says");
        let urgent = matches!(word(4), 2 | 36 | 42);
        assert_eq!(urgent, index == 0, "request {} in queue {index}", word(4));
        let Some(answer) = self.answer(word(4), node, &bytes[40..]) else { return Served::Done(0) };
        let (error, body) = answer.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
        let len = 16 + u32::try_from(body.len()).unwrap();
        let mut answer = [&len.to_le_bytes()[..], &i32::to_le_bytes(error), &bytes[8..16], &body].concat();
        let mut used = len;
        if word(4) == 15 {
            (self.lie)(&mut answer, &mut used);
        }
        chain.writable().copy_from(&answer);
        Served::Done(used)
    }
}

/// More than can be had: data of 16 MiB, and requests in the kernel's own rings.
fn settle() -> Vec<u8> {
    let words = [7, 38, 131_072, 1 << 30 | 1 << 22, 64, 16 << 20, 1, 4096, 1 << 9];
    [words.map(u32::to_le_bytes).concat(), vec![0; 28]].concat()
}

fn entry(node: u64) -> Vec<u8> {
    [&[node, 0, 0, 0, 0].map(u64::to_le_bytes).concat()[..], &attributes(node)].concat()
}

fn attributes(node: u64) -> Vec<u8> {
    let (size, mode) = if node == 1 { (0, 0o40_755) } else { (SIZE, 0o100_644) };
    let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
    [[node, size, size / 512, 0, 0, 0].map(u64::to_le_bytes).concat(), words.map(u32::to_le_bytes).concat()].concat()
}
