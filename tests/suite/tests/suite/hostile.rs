//! Hostile frontends and guests. Each attack is followed by the judge: the next frontend gets its random bytes, from the same process.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use probe::device::Shape;
use probe::rng;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use suite::{Scratch, Server, status, wait_for};
use vhost_user::frontend::{Inflight, RegionEntry};
use vhost_user::wire::{Channel, Deadline};
use vhost_user::{Error, Frontend};
use virtio::memory::sealed_memfd;

use super::protocol::{Guest, event, greet, start};

/// Runs an attack, and asks the judge.
fn survives(name: &str, attack: impl FnOnce(&Server)) {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let worker = server.worker();
    attack(&server);
    let stream = UnixStream::connect(&server.socket).unwrap();
    let bytes = rng::fetch(stream, 64, 64, Shape::default()).unwrap_or_else(|error| panic!("{name}: {error:#}")).bytes;
    assert_eq!(bytes.len(), 64);
    assert_eq!(server.worker(), worker, "{name}: the same process");
    assert_eq!(status(worker, "Seccomp"), "2");
}

fn unsealed(size: u64) -> OwnedFd {
    let fd = memfd_create("lie", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

#[test]
fn memory_that_is_shorter_than_announced() {
    survives("short memory", |server| {
        let frontend = greet(server);
        let entry = RegionEntry { guest_addr: 0, size: 1 << 30, user_addr: 0, offset: 0 };
        let fd = sealed_memfd("short", 4096).unwrap();
        assert!(matches!(frontend.set_memory_table(&[(entry, fd.as_fd())]), Err(Error::Failed(_))));
        assert!(matches!(frontend.add_memory_region(&entry, fd.as_fd()), Err(Error::Failed(_))));
    });
}

#[test]
fn memory_that_can_be_taken_away() {
    survives("unsealed memory", |server| {
        let frontend = greet(server);
        let entry = RegionEntry { guest_addr: 0, size: 1 << 20, user_addr: 0, offset: 0 };
        let fd = unsealed(1 << 20);
        assert!(matches!(frontend.add_memory_region(&entry, fd.as_fd()), Err(Error::Failed(_))));
        ftruncate(&fd, 0).unwrap();
    });
}

#[test]
fn an_in_flight_region_that_lies() {
    survives("in-flight region", |server| {
        let frontend = greet(server);
        let lie =
            |size, queues, queue_size| Inflight { fd: sealed_memfd("log", 4096).unwrap(), size, offset: 0, queues, queue_size };
        assert!(frontend.set_inflight(&lie(1 << 30, 1, 128)).is_err(), "longer than its file");
        assert!(frontend.set_inflight(&lie(64, 1, 128)).is_err(), "too small for its queue");
        assert!(frontend.set_inflight(&lie(4096, 7, 8)).is_err(), "for more queues than there are");
        let fd = unsealed(4096);
        assert!(frontend.set_inflight(&Inflight { fd, size: 4096, offset: 0, queues: 1, queue_size: 128 }).is_err());
        // Garbage in a region that is big enough: the ring does not start from it.
        let garbage = lie(4096, 1, 128);
        rustix::io::pwrite(&garbage.fd, &[0xa5; 4096], 0).unwrap();
        frontend.set_inflight(&garbage).unwrap();
        let guest = Guest::new();
        frontend.add_memory_region(&guest.entry, guest.fd.as_fd()).unwrap();
        frontend.set_ring_size(0, 8).unwrap();
        frontend.set_ring_addresses(0, guest.ring()).unwrap();
        frontend.set_ring_enable(0, true).unwrap();
        assert!(frontend.set_ring_kick(0, Some(event().as_fd())).is_err());
    });
}

/// The processor time of a process, in clock ticks.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_kick_that_never_ends() {
    survives("semaphore kick", |server| {
        let frontend = greet(server);
        let semaphore = eventfd(u32::MAX - 1, EventfdFlags::SEMAPHORE).unwrap();
        assert!(matches!(frontend.set_ring_kick(0, Some(semaphore.as_fd())), Err(Error::Failed(_))));
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(matches!(frontend.set_ring_kick(0, Some(pipe.as_fd())), Err(Error::Failed(_))));
        assert!(matches!(frontend.set_ring_call(0, Some(pipe.as_fd())), Err(Error::Failed(_))));
        let before = ticks(server.worker());
        std::thread::sleep(Duration::from_millis(300));
        assert!(ticks(server.worker()) - before < 10, "it does not spin");
    });
}

#[test]
fn half_a_message_and_silence() {
    survives("half a message", |server| {
        let mut stream = UnixStream::connect(&server.socket).unwrap();
        stream.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
        let start = Instant::now();
        let channel = Channel::from(stream);
        let answer = channel.receive("the end", Deadline::after(Duration::from_secs(10)));
        assert!(matches!(answer, Err(Error::Closed)), "{answer:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "it does not wait for ever");
    });
}

#[test]
fn messages_that_are_none() {
    for (name, bytes) in [
        ("version", [1u32, 0x2, 0].map(u32::to_ne_bytes).concat()),
        ("flags", [1u32, 0x11, 0].map(u32::to_ne_bytes).concat()),
        ("size", [1u32, 0x1, 0xffff_ffff].map(u32::to_ne_bytes).concat()),
        ("number", [9999u32, 0x1, 0].map(u32::to_ne_bytes).concat()),
        ("reply", [1u32, 0x5, 0].map(u32::to_ne_bytes).concat()),
        ("body", [8u32, 0x1, 3, 0].map(u32::to_ne_bytes).concat()[..15].to_vec()),
        ("enable", [18u32, 0x1, 8, 0, 2].map(u32::to_ne_bytes).concat()),
    ] {
        survives(name, |server| {
            let mut stream = UnixStream::connect(&server.socket).unwrap();
            stream.write_all(&bytes).unwrap();
            let answer = Channel::from(stream).receive("the end", Deadline::after(Duration::from_secs(10)));
            assert!(answer.is_err(), "{name}: {answer:?}");
        });
    }
}

#[test]
fn a_flood_of_descriptors() {
    survives("descriptors", |server| {
        // Root sees them one by one; for anybody else the process would run out of them, which is what the judge notices.
        let open = || std::fs::read_dir(format!("/proc/{}/fd", server.worker())).map_or(0, Iterator::count);
        let before = open();
        for _ in 0..50 {
            let channel = Channel::from(UnixStream::connect(&server.socket).unwrap());
            let fds: Vec<OwnedFd> = (0..32).map(|_| event()).collect();
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let deadline = Deadline::after(Duration::from_secs(5));
            channel.request(1, false, &[], &borrowed, deadline).unwrap();
            assert!(channel.receive("features", deadline).is_ok(), "descriptors nobody asked for are closed");
        }
        wait_for("them to be closed", || (open() <= before + 2).then_some(()));
    });
}

/// Lets a guest break its ring with descriptors written by hand, and sees that this is reported and goes no further.
fn broken_ring(name: &str, write: impl FnOnce(&Guest)) {
    survives(name, |server| {
        let (frontend, guest) = (greet(server), Guest::new());
        let error = event();
        frontend.set_ring_error(0, Some(error.as_fd())).unwrap();
        write(&guest);
        let kick = start(&frontend, &guest);
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        wait_for("the report", || rustix::io::read(&error, &mut [0; 8]).ok());
        let before = ticks(server.worker());
        for _ in 0..1000 {
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        assert!(ticks(server.worker()) - before < 20, "{name}: a broken ring costs nothing");
        assert!(rustix::io::read(&error, &mut [0; 8]).is_err(), "{name}: reported once");
        frontend.ring_base(0, Duration::from_secs(5)).unwrap();
    });
}

fn put(guest: &Guest, at: u64, bytes: &[u8]) {
    rustix::io::pwrite(&guest.fd, bytes, at).unwrap();
}

fn describe(guest: &Guest, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
    put(guest, at, &addr.to_le_bytes());
    put(guest, at + 8, &len.to_le_bytes());
    put(guest, at + 12, &flags.to_le_bytes());
    put(guest, at + 14, &next.to_le_bytes());
}

#[test]
fn rings_that_break_the_rules() {
    let available = |guest: &Guest| put(guest, 0x2002, &1u16.to_le_bytes());
    broken_ring("index jump", |guest| put(guest, 0x2002, &9u16.to_le_bytes()));
    broken_ring("head outside", |guest| {
        put(guest, 0x2004, &8u16.to_le_bytes());
        available(guest);
    });
    broken_ring("loop", |guest| {
        describe(guest, 0x1000, 0x8000, 16, 1 | 2, 0);
        available(guest);
    });
    broken_ring("outside of memory", |guest| {
        describe(guest, 0x1000, (1 << 20) - 8, 16, 2, 0);
        available(guest);
    });
    broken_ring("wrapping address", |guest| {
        describe(guest, 0x1000, u64::MAX - 4, 16, 2, 0);
        available(guest);
    });
    broken_ring("nested indirect", |guest| {
        describe(guest, 0x1000, 0x9000, 16, 4, 0);
        describe(guest, 0x9000, 0xa000, 16, 4, 0);
        available(guest);
    });
    broken_ring("over-long indirect", |guest| {
        describe(guest, 0x1000, 0x9000, 16 * 9, 4, 0);
        available(guest);
    });
    broken_ring("ragged indirect", |guest| {
        describe(guest, 0x1000, 0x9000, 17, 4, 0);
        available(guest);
    });
    broken_ring("readable after writable", |guest| {
        describe(guest, 0x1000, 0x8000, 16, 1 | 2, 1);
        describe(guest, 0x1010, 0x8000, 16, 0, 0);
        available(guest);
    });
}

#[test]
fn a_frontend_that_vanishes_at_every_step() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let guest = Guest::new();
    let steps: [fn(&Frontend, &Guest); 6] = [
        |_, _| {},
        |frontend, guest| frontend.add_memory_region(&guest.entry, guest.fd.as_fd()).unwrap(),
        |frontend, _| frontend.set_ring_size(0, 8).unwrap(),
        |frontend, guest| frontend.set_ring_addresses(0, guest.ring()).unwrap(),
        |frontend, _| frontend.set_ring_kick(0, Some(event().as_fd())).unwrap(),
        |frontend, _| frontend.set_ring_enable(0, true).unwrap(),
    ];
    for last in 0..steps.len() {
        let frontend = greet(&server);
        steps.iter().take(last + 1).for_each(|step| step(&frontend, &guest));
    }
    let bytes = rng::fetch(UnixStream::connect(&server.socket).unwrap(), 64, 64, Shape::default()).unwrap().bytes;
    assert_eq!(bytes.len(), 64);
}
