//! The vhost-user protocol, message by message: every feature bit that is offered, and every state a ring can be in.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use probe::device::{Device, Shape};
use probe::ring::Buffer;
use rustix::event::{EventfdFlags, eventfd};
use suite::{Scratch, Server, wait_for};
use vhost_user::frontend::{RegionEntry, RingAddresses};
use vhost_user::{Error, Frontend, features};
use virtio::memory::sealed_memfd;

const PROTOCOL: u64 = features::VHOST_USER_F_PROTOCOL_FEATURES;

/// A frontend that has greeted the server.
pub(super) fn greet(server: &Server) -> Frontend {
    let mut frontend = Frontend::new(UnixStream::connect(&server.socket).unwrap(), Duration::from_secs(5));
    let offered = frontend.features().unwrap();
    assert_ne!(offered & PROTOCOL, 0);
    let protocol = frontend.protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_owner().unwrap();
    frontend.set_features(offered).unwrap();
    frontend
}

/// Memory of one region at guest address 0, and where a ring can be in it.
pub(super) struct Guest {
    pub(super) fd: OwnedFd,
    pub(super) entry: RegionEntry,
}

impl Guest {
    pub(super) fn new() -> Guest {
        let size = 1 << 20;
        let entry = RegionEntry { guest_addr: 0, size, user_addr: 1 << 40, offset: 0 };
        Guest { fd: sealed_memfd("guest", size).unwrap(), entry }
    }

    pub(super) fn ring(&self) -> RingAddresses {
        let base = self.entry.user_addr;
        RingAddresses { desc: base + 0x1000, avail: base + 0x2000, used: base + 0x3000 }
    }
}

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// Starts ring 0 of the server.
pub(super) fn start(frontend: &Frontend, guest: &Guest) -> OwnedFd {
    frontend.add_memory_region(&guest.entry, guest.fd.as_fd()).unwrap();
    frontend.set_ring_size(0, 8).unwrap();
    frontend.set_ring_base(0, 0).unwrap();
    frontend.set_ring_addresses(0, guest.ring()).unwrap();
    let kick = event();
    frontend.set_ring_kick(0, Some(kick.as_fd())).unwrap();
    frontend.set_ring_enable(0, true).unwrap();
    kick
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Failed(_)))
}

#[test]
fn a_running_ring_cannot_be_reconfigured() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let _kick = start(&frontend, &guest);
    assert!(refused(frontend.set_ring_size(0, 16)));
    assert!(refused(frontend.set_ring_base(0, 3)));
    let elsewhere = RingAddresses { desc: guest.ring().desc + 0x4000, ..guest.ring() };
    assert!(refused(frontend.set_ring_addresses(0, elsewhere)));
    assert!(refused(frontend.remove_memory_region(&guest.entry)), "the ring is there");
    assert!(refused(frontend.set_memory_table(&[(guest.entry, guest.fd.as_fd())])));
    assert!(refused(frontend.set_features(PROTOCOL)));
    assert_eq!(frontend.ring_base(0, Duration::from_secs(5)).unwrap(), 0, "it was never disturbed");
    frontend.set_ring_size(0, 16).unwrap();
    frontend.remove_memory_region(&guest.entry).unwrap();
}

/// As libblkio does with its buffers, and QEMU with memory that is plugged in.
#[test]
fn memory_comes_and_goes_while_a_ring_runs() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let kick = start(&frontend, &guest);
    let plugged = Guest { entry: RegionEntry { guest_addr: 1 << 30, user_addr: 1 << 41, ..guest.entry }, ..Guest::new() };
    for round in 1..=3u16 {
        frontend.add_memory_region(&plugged.entry, plugged.fd.as_fd()).unwrap();
        // One request for 64 bytes, in the memory that is new.
        let at = (1u64 << 30) + 64 * u64::from(round);
        let descriptor = [at.to_le_bytes(), [64, 0, 0, 0, 2, 0, 0, 0]].concat();
        rustix::io::pwrite(&guest.fd, &descriptor, 0x1000).unwrap();
        rustix::io::pwrite(&guest.fd, &round.to_le_bytes(), 0x2002).unwrap();
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        wait_for("the answer", || {
            let mut used = [0; 2];
            rustix::io::pread(&guest.fd, &mut used, 0x3002).unwrap();
            (u16::from_le_bytes(used) == round).then_some(())
        });
        let mut bytes = [0; 64];
        rustix::io::pread(&plugged.fd, &mut bytes, 64 * u64::from(round)).unwrap();
        assert!(bytes.iter().filter(|byte| **byte == 0).count() < 48, "random bytes in the new memory");
        assert!(refused(frontend.remove_memory_region(&guest.entry)), "the ring is there");
        frontend.remove_memory_region(&plugged.entry).unwrap();
    }
    assert_eq!(frontend.ring_base(0, Duration::from_secs(5)).unwrap(), 3, "nothing was lost or done twice");
}

#[test]
fn nonsense_is_refused_and_the_connection_goes_on() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let (frontend, guest) = (greet(&server), Guest::new());
    assert!(refused(frontend.set_features(1 << 50)));
    assert!(refused(frontend.set_ring_size(0, 3)));
    assert!(refused(frontend.set_ring_size(0, 0)));
    assert!(refused(frontend.set_ring_size(0, 512)), "larger than the device's largest");
    assert!(refused(frontend.set_ring_size(1, 8)), "there is no second ring");
    assert_eq!(frontend.protocol_features().unwrap() & features::CONFIG, 0, "this device has no configuration");
    assert!(refused(frontend.set_config(0, &[1])), "and nothing in it to write");
    assert!(refused(frontend.remove_memory_region(&guest.entry)));
    frontend.add_memory_region(&guest.entry, guest.fd.as_fd()).unwrap();
    assert!(refused(frontend.add_memory_region(&guest.entry, guest.fd.as_fd())), "it overlaps");
    frontend.set_ring_size(0, 8).unwrap();
    let outside = RingAddresses { desc: 1 << 60, ..guest.ring() };
    frontend.set_ring_addresses(0, outside).unwrap();
    frontend.set_ring_enable(0, true).unwrap();
    assert!(refused(frontend.set_ring_kick(0, Some(event().as_fd()))), "a ring outside of memory does not start");
    assert_eq!(frontend.queue_count().unwrap(), 1);
}

#[test]
fn a_ring_can_be_disabled_and_enabled_and_loses_nothing() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let mut device = Device::connect(UnixStream::connect(&server.socket).unwrap(), Shape::default(), 0).unwrap();
    let at = device.memory_mut().take(64, 1, 0).unwrap();
    device.start().unwrap();
    let limit = Duration::from_secs(10);
    for _ in 0..20 {
        let used = device.exchange(0, &[Buffer { addr: at, len: 64, write: true }], limit).unwrap();
        assert_eq!(used.len, 64);
        device.session().stop().unwrap();
        assert!(device.submit(0, &[Buffer { addr: at, len: 32, write: true }]).is_some());
        device.kick(0);
        assert!(device.completion(0).unwrap().is_none(), "a stopped ring is not served");
        device.start().unwrap();
        let used = wait_for("the request that waited", || device.completion(0).unwrap());
        assert_eq!(used.len, 32);
    }
}

#[test]
fn interrupts_can_be_redirected_while_the_ring_runs() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let _kick = start(&frontend, &guest);
    for _ in 0..10 {
        frontend.set_ring_call(0, Some(event().as_fd())).unwrap();
        frontend.set_ring_error(0, Some(event().as_fd())).unwrap();
        frontend.set_ring_call(0, None).unwrap();
    }
    assert_eq!(frontend.ring_base(0, Duration::from_secs(5)).unwrap(), 0);
}

#[test]
fn a_reset_makes_the_device_as_new() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let _kick = start(&frontend, &guest);
    frontend.reset_device().unwrap();
    frontend.set_ring_size(0, 16).unwrap();
}

#[test]
fn the_in_flight_region_is_sealed_and_empty_when_it_is_new() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let frontend = greet(&server);
    let region = frontend.inflight(1, 128).unwrap();
    let seals = rustix::fs::fcntl_get_seals(&region.fd).unwrap();
    assert!(seals.contains(rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::SEAL));
    frontend.set_inflight(&region).unwrap();
    rustix::io::pwrite(&region.fd, &[0xff; 64], 0).unwrap();
    let again = frontend.inflight(1, 128).unwrap();
    let mut bytes = [1; 64];
    rustix::io::pread(&again.fd, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 64]);
    assert!(frontend.inflight(9, 128).is_err(), "more queues than the device has");
}

#[test]
fn it_listens_again_when_a_frontend_has_gone() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    for _ in 0..30 {
        let frontend = greet(&server);
        assert_eq!(frontend.max_memory_slots().unwrap(), 509);
    }
    assert_eq!(server.terminate(), Some(0), "and ends in order");
}

#[test]
fn an_old_frontend_without_protocol_features_is_served() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let frontend = Frontend::new(UnixStream::connect(&server.socket).unwrap(), Duration::from_secs(5));
    let guest = Guest::new();
    frontend.set_owner().unwrap();
    frontend.set_features(features::VERSION_1).unwrap();
    frontend.set_memory_table(&[(guest.entry, guest.fd.as_fd())]).unwrap();
    frontend.set_ring_size(0, 8).unwrap();
    frontend.set_ring_base(0, 0).unwrap();
    frontend.set_ring_addresses(0, guest.ring()).unwrap();
    let (kick, call) = (event(), Arc::new(event()));
    frontend.set_ring_call(0, Some(call.as_fd())).unwrap();
    // One buffer of 16 bytes at 0x8000, available.
    for (at, bytes) in [
        (0x1000, &0x8000u64.to_le_bytes()[..]),
        (0x1008, &16u32.to_le_bytes()),
        (0x100c, &2u16.to_le_bytes()),
        (0x2002, &1u16.to_le_bytes()),
    ] {
        rustix::io::pwrite(&guest.fd, bytes, at).unwrap();
    }
    frontend.set_ring_kick(0, Some(kick.as_fd())).unwrap();
    wait_for("the completion", || {
        let mut used = [0; 2];
        rustix::io::pread(&guest.fd, &mut used, 0x3002).unwrap();
        (u16::from_le_bytes(used) == 1).then_some(())
    });
    wait_for("the interrupt", || rustix::io::read(call.as_ref(), &mut [0; 8]).ok());
}

#[test]
fn a_table_may_have_as_many_regions_as_it_says() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--log-level", "error"]);
    let (frontend, guest) = (greet(&server), Guest::new());
    let slots = frontend.max_memory_slots().unwrap();
    for slot in 1..slots {
        let at = slot << 32;
        let entry = RegionEntry { guest_addr: at, size: 4096, user_addr: (1 << 45) + at, offset: 0 };
        frontend.add_memory_region(&entry, guest.fd.as_fd()).unwrap_or_else(|error| panic!("region {slot} of {slots}: {error}"));
    }
    let _kick = start(&frontend, &guest);
    assert_eq!(frontend.ring_base(0, Duration::from_secs(5)).unwrap(), 0, "and rings run in it");
}

/// Our frontend against a backend that shares no line with ours: all rings it can make, one frontend after the other.
#[test]
fn other_people_s_backend_is_driven() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-peer-rng", &scratch, &[]);
    for shape in super::device::shapes(1) {
        // It makes its socket anew for each frontend; who connects to the old one in between is hung up on.
        let connect = || Device::connect(UnixStream::connect(&server.socket).ok()?, shape, 0).ok();
        let mut device = wait_for("it to listen again", connect);
        let (event_idx, indirect) = (1 << 29, 1 << 28);
        assert_eq!(
            device.features() & (event_idx | indirect),
            if shape.event_idx { event_idx } else { 0 } | if shape.indirect { indirect } else { 0 }
        );
        let at = device.memory_mut().take(64, 1, 0).unwrap();
        device.start().unwrap();
        for _ in 0..200 {
            let used = device.exchange(0, &[Buffer { addr: at, len: 64, write: true }], Duration::from_secs(10)).unwrap();
            assert_eq!(used.len, 64);
        }
        let mut bytes = [0; 64];
        device.memory().read(at, &mut bytes);
        assert!(bytes.iter().filter(|byte| **byte == 0).count() < 48, "random, not zeroes");
        device.session().stop().unwrap();
    }
}

/// User-mode Linux does: without the acknowledgement it would wait for ever.
#[test]
fn the_request_that_negotiates_acknowledgements_is_acknowledged() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let mut stream = UnixStream::connect(&server.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let (set_protocol_features, version_1_with_reply): (u32, u32) = (16, 0x9);
    let header = [set_protocol_features, version_1_with_reply, 8].map(u32::to_ne_bytes).concat();
    stream.write_all(&[header, features::REPLY_ACK.to_ne_bytes().to_vec()].concat()).unwrap();
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *[16_u32, 0x5, 8, 0, 0].map(u32::to_ne_bytes).concat(), "a reply, and the number 0");
}

/// That, too, is user-mode Linux, which cannot be interrupted by an event descriptor; it is served when it is trusted.
#[test]
fn a_socket_is_a_call_only_of_a_trusted_frontend() {
    for (flags, expected) in [(&[][..], false), (&["--allow-unsealed-memory"], true)] {
        let scratch = Scratch::new();
        let server = Server::start("outboard-rng", &scratch, flags);
        let frontend = greet(&server);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(frontend.set_ring_call(0, Some(theirs.as_fd())).is_ok(), expected);
    }
}
