//! The VMM's side of a device against every backend that breaks the rules (`tests/evil`): it never waits where a processor would,
//! it says what is wrong, it keeps nothing, and the good backend that comes afterwards works.
//!
//! Here the control thread's part ([`Remote`]) is driven without KVM: a thread that plays a processor reads and writes the
//! device's registers all the time and measures how long each access takes.

#![expect(clippy::unwrap_used, reason = "what fails to be set up is a failed test")]

#[path = "support/device.rs"]
mod device;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use device::{backend, machine};
use evil::{Act, Behaviour};
use vmm::pci::Function;
use vmm::virtio::remote::Change;

/// What a processor may wait for one access to a register.
const STALL: Duration = Duration::from_millis(100);

/// How long an evil backend is let do what it does.
const EVIL: Duration = Duration::from_millis(600);

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
