//! What a frontend needs that moves its guest to another host: written pages, a device's state, and rings that stop at once.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use suite::{Scratch, Server, wait_for};
use vhost_user::Frontend;
use virtio::dirty::LOG_ALL;
use virtio::memory::sealed_memfd;

use super::protocol::{Guest, greet, start};

const PAGE: u64 = 4096;

/// Where the rings of [`Guest`] are, in guest addresses.
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;

/// Where the data of request `n` goes.
fn data(n: u16) -> u64 {
    0x10000 + u64::from(n) * 2 * PAGE
}

fn put(guest: &Guest, at: u64, bytes: &[u8]) {
    rustix::io::pwrite(&guest.fd, bytes, at).unwrap();
}

/// Makes request `n` available: 64 random bytes, on the border of two pages.
fn ask(guest: &Guest, kick: &OwnedFd, n: u16) {
    let mut descriptor = Vec::new();
    descriptor.extend_from_slice(&(data(n) + PAGE - 32).to_le_bytes());
    descriptor.extend_from_slice(&64u32.to_le_bytes());
    descriptor.extend_from_slice(&[2, 0, 0, 0]);
    put(guest, DESC + u64::from(n) * 16, &descriptor);
    put(guest, AVAIL + 4 + u64::from(n) * 2, &n.to_le_bytes());
    put(guest, AVAIL + 2, &(n + 1).to_le_bytes());
    rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
}

fn used(guest: &Guest) -> u16 {
    let mut index = [0; 2];
    rustix::io::pread(&guest.fd, &mut index, USED + 2).unwrap();
    u16::from_le_bytes(index)
}

fn answered(guest: &Guest, count: u16) {
    wait_for("the answer", || (used(guest) == count).then_some(()));
}

/// The pages whose bits are set.
fn marked(log: &OwnedFd) -> Vec<u64> {
    let mut bytes = [0; 32];
    rustix::io::pread(log, &mut bytes, 0).unwrap();
    (0..256).filter(|page| bytes[usize::try_from(page / 8).unwrap()] & 1 << (page % 8) != 0).collect()
}

/// A frontend begins to log while the guest runs, takes the bits as it goes, and ends it.
#[test]
fn written_pages_are_noted_while_the_frontend_wants_that() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let offered = frontend.features().unwrap();
    assert_ne!(offered & LOG_ALL, 0);
    frontend.set_features(offered & !LOG_ALL).unwrap();
    let kick = start(&frontend, &guest);
    ask(&guest, &kick, 0);
    answered(&guest, 1);

    let log = sealed_memfd("log", PAGE).unwrap();
    frontend.set_log(32, 0, log.as_fd()).unwrap();
    frontend.set_features(offered).unwrap();
    frontend.set_ring_addresses_logged(0, guest.ring(), Some(USED)).unwrap();
    virtio::memory::clear_memfd(log.as_fd()).unwrap();
    ask(&guest, &kick, 1);
    answered(&guest, 2);
    let (first, ring) = (data(1) / PAGE, USED / PAGE);
    wait_for("the bits", || (marked(&log) == [ring, first, first + 1]).then_some(()));

    frontend.set_features(offered & !LOG_ALL).unwrap();
    virtio::memory::clear_memfd(log.as_fd()).unwrap();
    ask(&guest, &kick, 2);
    answered(&guest, 3);
    assert!(marked(&log).is_empty(), "nobody wants to know any more");
}

fn disk(scratch: &Scratch, name: &str) -> Server {
    let image = scratch.image(name, 1 << 20);
    Server::start("outboard-blk", scratch, &["--format", "raw", "--blk-file", image.to_str().unwrap()])
}

fn writeback(frontend: &Frontend) -> u8 {
    frontend.config(60).unwrap()[32]
}

/// What the driver has chosen goes along; what is none of the device's own is refused, and changes nothing.
#[test]
fn a_device_s_state_goes_through_a_pipe() {
    let (here, there) = (Scratch::new(), Scratch::new());
    let (source, target) = (disk(&here, "a"), disk(&there, "b"));
    let (source, target) = (greet(&source), greet(&target));
    source.set_config(32, &[0]).unwrap();
    let (mut out, into) = UnixStream::pair().unwrap();
    source.transfer_state(false, into.as_fd()).unwrap();
    assert!(source.check_state().unwrap());
    drop(into);
    let mut state = Vec::new();
    out.read_to_end(&mut state).unwrap();

    assert_eq!(writeback(&target), 1);
    let load = |state: &[u8]| {
        let (mut into, out) = UnixStream::pair().unwrap();
        target.transfer_state(true, out.as_fd()).unwrap();
        drop(out);
        into.write_all(state).unwrap();
        drop(into);
        target.check_state().unwrap()
    };
    assert!(!load(b"something else"));
    assert!(!load(&[1; 8192]), "more than a state has");
    assert_eq!(writeback(&target), 1);
    assert!(load(&state));
    assert_eq!(writeback(&target), 0);
    assert!(!target.check_state().unwrap(), "there was nothing more to check");

    // A frontend that never writes its state is not waited for.
    let (_into, out) = UnixStream::pair().unwrap();
    target.transfer_state(true, out.as_fd()).unwrap();
    drop(out);
    let asked = Instant::now();
    assert!(!target.check_state().unwrap());
    assert!(asked.elapsed() < Duration::from_secs(3));
}

/// What is not begun when a ring is stopped is not waited for, and is served when it starts again.
#[test]
fn a_ring_stops_at_once_whatever_waits_in_it() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--max-bytes", "64", "--period", "3000"]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let region = frontend.inflight(1, 8).unwrap();
    frontend.set_inflight(&region).unwrap();
    let kick = start(&frontend, &guest);
    (0..3).for_each(|n| ask(&guest, &kick, n));
    answered(&guest, 1);
    let asked = Instant::now();
    let base = frontend.ring_base(0, Duration::from_secs(5)).unwrap();
    assert!(asked.elapsed() < Duration::from_secs(1), "what waits for its limit was waited for");
    assert_eq!((base, used(&guest)), (1, 1));

    frontend.set_inflight(&region).unwrap();
    frontend.set_ring_base(0, base).unwrap();
    let again = super::protocol::event();
    frontend.set_ring_kick(0, Some(again.as_fd())).unwrap();
    frontend.set_ring_enable(0, true).unwrap();
    answered(&guest, 2);
}
