//! What the VMM keeps of backends that break the rules does not grow with how often or how long they do it.
//!
//! A test program of its own: other tests beside it would be part of what it measures.

#![expect(clippy::unwrap_used, reason = "what fails to be set up is a failed test")]

#[path = "support/device.rs"]
mod device;

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use device::{Machine, backend, machine};
use evil::{Act, Behaviour};

/// How long each behaviour is let do what it does on one connection.
const EVIL: Duration = Duration::from_millis(120);
/// How long all of it is repeated. Those that are silent cost seconds each time.
const WARM: Duration = Duration::from_secs(4);
const REPEATED: Duration = Duration::from_secs(10);
/// What may be added meanwhile, in bytes: the allocator's slack, not a page for each connection.
const GROWTH: u64 = 1 << 20;
/// Connections that make a page for each of them noticeable.
const ENOUGH: usize = 1000;

/// Memory of this process that no file stands behind. The guest's is in a file.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// A connection to this backend again and again, each with a driver that begins; gives how many there were.
fn repeat(machine: &mut Machine, act: Act, time: Duration) -> usize {
    let (start, mut rounds) = (Instant::now(), 0);
    while rounds == 0 || start.elapsed() < time {
        machine.remote.replug(backend(act, rounds));
        machine.bring_up();
        machine.run(EVIL);
        machine.put(0x14, [0]);
        machine.run(Duration::from_millis(5));
        machine.remote.hang_up();
        rounds += 1;
    }
    usize::try_from(rounds).unwrap()
}

fn class(one: &Behaviour) -> &'static str {
    if one.name.starts_with("config") || one.name.ends_with("get-config") { "blk" } else { "rng" }
}

#[test]
fn nothing_grows_with_what_backends_do() {
    // As in the program itself.
    sandbox::one_heap();
    let all = evil::all();
    let meet = Arc::new(Barrier::new(all.len() + 1));
    let threads: Vec<_> = all
        .into_iter()
        .map(|one| {
            let meet = Arc::clone(&meet);
            thread::spawn(move || {
                let mut machine = machine(class(&one), backend(Act::Good, 0)).unwrap();
                repeat(&mut machine, one.act, WARM);
                meet.wait();
                meet.wait();
                let rounds = repeat(&mut machine, one.act, REPEATED);
                // What it keeps is there until both have been looked at.
                meet.wait();
                meet.wait();
                rounds
            })
        })
        .collect();
    meet.wait();
    let before = anonymous();
    meet.wait();
    meet.wait();
    let grown = anonymous().saturating_sub(before);
    meet.wait();
    let rounds: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    println!("{grown} bytes more after {rounds} connections, with {before} before");
    assert!(rounds > ENOUGH, "{rounds} connections show nothing");
    assert!(grown < GROWTH, "{grown} bytes more after {rounds} connections");
}
