//! The VMM's side of a device against every backend that breaks the rules (`tests/evil`): it never waits where a processor would,
//! it says what is wrong, it keeps nothing, and the good backend that comes afterwards works.
//!
//! Here the control thread's part ([`Remote`]) is driven without KVM: a thread that plays a processor reads and writes the
//! device's registers all the time and measures how long each access takes.

#![expect(clippy::unwrap_used, reason = "what fails to be set up is a failed test")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use evil::{Act, Behaviour};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::args::{DeviceSpec, Reach};
use vmm::classes;
use vmm::events::Doorbell;
use vmm::kvm::{Event, Hypervisor};
use vmm::memory::Memory;
use vmm::pci::{Allocator, Function};
use vmm::virtio::remote::{Change, Remote, Site};

/// What a processor may wait for one access to a register.
const STALL: Duration = Duration::from_millis(100);

/// How long an evil backend is let do what it does.
const EVIL: Duration = Duration::from_millis(600);

/// Where the rings are in guest memory.
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x10_1000;
const USED: u64 = 0x10_2000;
const BUFFER: u64 = 0x10_3000;

/// KVM that agrees to everything.
struct Agreeable;

impl Hypervisor for Agreeable {
    fn route_msi(&self, _: u32, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn attach_irq(&self, _: &Event, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn detach_irq(&self, _: &Event, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn attach_kick(&self, _: &Event, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn detach_kick(&self, _: &Event, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// A backend in a thread of its own, and the other end of its connection.
fn backend(act: Act, turn: u64) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || evil::serve(theirs, act, turn, Duration::from_secs(60)));
    ours
}

struct Machine {
    memory: &'static Memory,
    remote: Remote,
}

/// A machine with one device, connected to this.
fn machine(class: &str, stream: UnixStream) -> Result<Machine, String> {
    let class = classes::named(class).unwrap();
    let memory: &'static Memory = Box::leak(Box::new(Memory::new(4 << 20).unwrap()));
    let (mut addresses, mut next_route) = (Allocator::default(), 24);
    let mut site = Site {
        memory,
        hypervisor: Arc::new(Agreeable),
        doorbell: Arc::new(Doorbell::new().unwrap()),
        addresses: &mut addresses,
        next_route: &mut next_route,
    };
    let (name, reach) = ("evil".to_owned(), Reach::Fd(-1));
    let spec = DeviceSpec { name, id: class.id, class, reach, queues: Some(1), queue_size: Some(16) };
    let remote = Remote::connect(&spec, stream, &mut site).map_err(|error| error.to_string())?;
    Ok(Machine { memory, remote })
}

impl Machine {
    fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.remote.function().memory_write(at, &bytes);
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.remote.function().memory_read(0x14, &mut byte);
        byte[0]
    }

    /// What a driver does up to DRIVER_OK, with a fresh ring and one buffer in it.
    fn bring_up(&self) {
        self.memory.write(DESC, &[0; 0x3000]).unwrap();
        self.memory.write(DESC, &BUFFER.to_le_bytes()).unwrap();
        self.memory.write(DESC + 8, &[64, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        self.memory.write(AVAIL + 2, &1u16.to_le_bytes()).unwrap();
        for status in [1, 3] {
            self.put(0x14, [status]);
        }
        self.put(0x08, 1u32.to_le_bytes());
        self.put(0x0c, 1u32.to_le_bytes());
        self.put(0x14, [11]);
        self.put(0x16, 0u16.to_le_bytes());
        self.put(0x18, 16u16.to_le_bytes());
        for (at, addr) in [(0x20, DESC), (0x28, AVAIL), (0x30, USED)] {
            self.put(at, u32::try_from(addr).unwrap().to_le_bytes());
        }
        self.put(0x1c, 1u16.to_le_bytes());
        self.put(0x14, [15]);
    }

    /// What the control thread does, for a while. Gives what it would have told people.
    fn run(&mut self, time: Duration) -> Vec<Change> {
        let (start, mut told) = (Instant::now(), Vec::new());
        while start.elapsed() < time {
            told.extend(self.remote.serve());
            let remote = &self.remote;
            let mut fds = Vec::new();
            let mut watch = |fd: Option<BorrowedFd<'_>>, flags| {
                let all = fd.map(|fd| fd.try_clone_to_owned().unwrap());
                fds.push((all, flags));
            };
            watch(remote.connection(), PollFlags::RDHUP);
            watch(remote.requests(), PollFlags::IN);
            watch(remote.ring_errors(), PollFlags::IN);
            let ready: Vec<bool> =
                fds.iter().map(|(fd, flags)| fd.as_ref().is_some_and(|fd| is_ready(fd.as_fd(), *flags))).collect();
            match ready.as_slice() {
                [_, true, _] => told.extend(self.remote.listen()),
                [_, _, true] => told.extend(self.remote.ring_error()),
                [true, ..] => told.extend(self.remote.hang_up()),
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
        told
    }

    /// Whether the one buffer came back.
    fn is_served(&self) -> bool {
        let mut index = [0; 2];
        self.memory.read(USED + 2, &mut index).unwrap();
        u16::from_le_bytes(index) == 1
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// A processor that touches every kind of register, until it is told to stop; gives its longest access.
fn processor(function: Arc<vmm::virtio::VirtioPci>, stop: Arc<AtomicBool>) -> thread::JoinHandle<Duration> {
    thread::spawn(move || {
        let mut longest = Duration::ZERO;
        while !stop.load(Ordering::Relaxed) {
            for at in [0x14, 0x1000, 0x2000, 0x6000] {
                let start = Instant::now();
                function.memory_read(at, &mut [0; 4]);
                longest = longest.max(start.elapsed());
            }
            let start = Instant::now();
            function.memory_write(0x3000, &[0; 2]);
            longest = longest.max(start.elapsed());
            thread::sleep(Duration::from_micros(200));
        }
        longest
    })
}

/// A device that has served well meets this behaviour, then a reset by its driver, then a good backend again.
fn meets(one: &Behaviour) {
    let Behaviour { name, act, .. } = one;
    let class = if name.starts_with("config") || name.ends_with("get-config") { "blk" } else { "rng" };
    let mut machine = machine(class, backend(Act::Good, 0)).unwrap_or_else(|error| panic!("{name}: {error}"));
    machine.bring_up();
    machine.run(Duration::from_millis(100));
    assert!(machine.is_served(), "{name}: the good backend serves");
    let stop = Arc::new(AtomicBool::new(false));
    let processor = processor(Arc::clone(machine.remote.function()), Arc::clone(&stop));
    let replugged = machine.remote.replug(backend(*act, 1));
    let mut told = vec![replugged];
    told.extend(machine.run(EVIL));
    // The driver begins again under it, as a reboot does.
    machine.put(0x14, [0]);
    told.extend(machine.run(Duration::from_millis(50)));
    assert_eq!(machine.status(), 0, "{name}: the driver's reset is answered");
    machine.bring_up();
    told.extend(machine.run(EVIL / 2));
    // It is gone, and a good one comes.
    told.extend(machine.remote.hang_up());
    let mut last = machine.remote.replug(backend(Act::Good, 2));
    machine.run(Duration::from_millis(100));
    // What the evil one has left is not always something to go on from: then the driver is told, and begins again.
    let told_driver = machine.status() & 64 != 0;
    if last != Change::Connected || !machine.is_served() {
        assert!(told_driver || *act == Act::Used, "{name}: {last:?}, and the driver is not told");
        machine.put(0x14, [0]);
        machine.run(Duration::from_millis(50));
        machine.bring_up();
        last = machine.remote.replug(backend(Act::Good, 3));
    }
    machine.run(Duration::from_millis(200));
    stop.store(true, Ordering::Relaxed);
    let longest = processor.join().unwrap();
    assert!(longest < STALL, "{name}: a processor waited {} ms", longest.as_millis());
    assert_eq!(last, Change::Connected, "{name}: after {told:?}");
    assert!(machine.is_served(), "{name}: the good backend serves again, after {told:?}");
}

/// In parallel, since most of it is waiting.
fn all_meet(which: impl Fn(&Behaviour) -> bool) {
    let all: Vec<Behaviour> = evil::all().into_iter().filter(which).collect();
    assert!(!all.is_empty());
    let threads: Vec<_> = all.into_iter().map(|one| (one.name.clone(), thread::spawn(move || meets(&one)))).collect();
    let failed: Vec<String> = threads.into_iter().filter_map(|(name, thread)| thread.join().is_err().then_some(name)).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn silence_at_every_step() {
    all_meet(|one| matches!(one.act, Act::Silent(_)));
}

#[test]
fn death_at_every_step() {
    all_meet(|one| matches!(one.act, Act::Dies(_)));
}

#[test]
fn lies_in_answers() {
    let lies = ["slow", "refuses", "half", "twice", "unasked", "size", "huge", "flags", "number", "descriptors"];
    all_meet(|one| lies.contains(&one.name.as_str()));
}

#[test]
fn lies_about_the_device() {
    let lies = ["features", "features-change", "queues", "slots", "config", "config-storm", "config-short", "requests"];
    all_meet(|one| lies.contains(&one.name.as_str()));
}

#[test]
fn in_flight_regions_that_lie() {
    all_meet(|one| one.name.starts_with("inflight"));
}

#[test]
fn rings_and_descriptors() {
    let abuses = ["good", "interrupts", "errors", "blocking", "used", "memory"];
    all_meet(|one| abuses.contains(&one.name.as_str()));
}

/// At the start of a machine there is nobody to go on with: a sentence, in bounded time.
#[test]
fn a_machine_with_an_evil_backend_starts_or_says_why_not() {
    let threads: Vec<_> = evil::all()
        .into_iter()
        .map(|one| {
            thread::spawn(move || {
                let start = Instant::now();
                let made = machine("rng", backend(one.act, 0));
                assert!(start.elapsed() < Duration::from_secs(20), "{}: {:?}", one.name, start.elapsed());
                assert!(made.is_ok() || made.is_err_and(|error| error.starts_with("Device evil")), "{}", one.name);
            })
        })
        .collect();
    assert!(threads.into_iter().map(thread::JoinHandle::join).all(|ended| ended.is_ok()));
}

/// A backend that uses up each of its limits takes the control thread from everybody else, but not for longer than this.
#[test]
fn a_slow_backend_is_given_up_as_a_whole() {
    let mut machine = machine("rng", backend(Act::Good, 0)).unwrap();
    machine.bring_up();
    machine.run(Duration::from_millis(50));
    let start = Instant::now();
    let came_out = machine.remote.replug(backend(Act::Slow, 1));
    assert!(matches!(came_out, Change::Degraded(_)), "{came_out:?}");
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
}

#[test]
fn nothing_is_kept_of_connections_that_are_gone() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut machine = machine("rng", backend(Act::Good, 0)).unwrap();
    machine.bring_up();
    machine.run(Duration::from_millis(50));
    let before = open();
    for act in [Act::Descriptors, Act::Requests, Act::InflightGarbage, Act::Dies(37)] {
        for turn in 0..10 {
            machine.remote.replug(backend(act, turn));
            machine.run(Duration::from_millis(20));
            machine.remote.hang_up();
        }
    }
    // Each of 40 connections had several; the threads at their other ends close theirs a moment later.
    let start = Instant::now();
    while open() > before && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(open() <= before, "{} descriptors instead of {before}", open());
}
