//! Device processes that die under a running guest: the guest does not notice.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use probe::random::Random;
use rustix::process::{Pid, Signal, kill_process};

use super::boot::NO_TROUBLE;
use super::machine::{Machine, Plan, UNTIL_STOPPED};

fn kill(machine: &Machine, role: &str) -> i32 {
    let pid = machine.pid(role);
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    suite::wait_for("the successor", || {
        let now = machine.pid(role);
        (now != pid).then_some(now)
    })
}

/// A guest that writes to this disk and verifies what it has written, again and again.
fn under_fio(image: &Path) -> Machine {
    let section = format!("[disk.c-fio]\npath = \"{}\"\nqueues = 2\n", image.display());
    let command = format!(
        "set -e; {UNTIL_STOPPED}; do fio --name=storm --filename=/dev/vdc --direct=1 --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio \
         --size=4M --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/log || {{ cat /tmp/log; exit 8; }}; \
         grep -q 'err= 0' /tmp/log; echo pass-done; done; {NO_TROUBLE}"
    );
    let mut machine = Plan::run(&command).with_disk().section(&section).start();
    machine.wait_for("pass-done");
    machine
}

#[test]
fn a_hundred_kills_of_a_disk_under_fio() {
    let scratch = suite::Scratch::new();
    let image = scratch.image("fio.img", 32 << 20);
    let machine = under_fio(&image);
    let mut random = Random::new(20);
    for round in 1..=100 {
        kill(&machine, "c-fio");
        assert!(!machine.console().contains("outboard-run"), "fio failed after kill {round}:\n{}", machine.console());
        // The composer waits longer and longer for one that does not live for a second.
        sleep(Duration::from_millis(1100 + random.below(400)));
    }
    let disk = machine.processes().into_iter().find(|process| process["role"] == "c-fio").unwrap();
    assert_eq!(disk["restarts"], 100);
    assert_eq!(disk["state"], "connected");
    machine.stop_loop();
    let ended = machine.finish().passed();
    println!("{} passes of fio", ended.console.matches("pass-done").count());
}

#[test]
fn entropy_and_console_are_restarted_at_once() {
    let command = format!(
        "i=0; while [ $i -lt 40 ]; do dd if=/dev/hwrng bs=512 count=1 status=none | od -An -tx1 -N4; i=$((i+1)); echo round-$i; sleep 0.3; done; {NO_TROUBLE}"
    );
    let mut machine = Plan::run(&command).with_disk().start();
    machine.wait_for("round-2");
    for _ in 0..3 {
        kill(&machine, "entropy");
        kill(&machine, "main");
        sleep(Duration::from_millis(500));
    }
    let ended = machine.finish().passed();
    let rounds = (1..=40).filter(|round| ended.console.contains(&format!("round-{round}\r"))).count();
    assert_eq!(rounds, 40, "no line of the console is lost:\n{}", ended.console);
}

#[test]
fn all_devices_at_once() {
    let mut machine =
        Plan::run("echo here; i=0; while [ $i -lt 15 ]; do ls /usr/bin | wc -l; i=$((i+1)); sleep 0.5; done").with_disk().start();
    machine.wait_for("here");
    let pids: Vec<i32> = ["a-root", "b-script", "entropy", "main"].iter().map(|role| machine.pid(role)).collect();
    for pid in &pids {
        kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL).unwrap();
    }
    machine.finish().passed();
}

/// Stopped is worse than dead: the connection stays and nothing comes back. It is replaced like a dead one.
#[test]
fn a_stopped_disk_is_replaced_under_fio() {
    let scratch = suite::Scratch::new();
    let image = scratch.image("fio.img", 32 << 20);
    let machine = under_fio(&image);
    for _ in 0..3 {
        let pid = machine.pid("c-fio");
        let began = Instant::now();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
        suite::wait_for("its end", || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        // Within a second on a processor of one's own; here everything is emulated.
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        suite::wait_for("the successor", || (machine.pid("c-fio") != pid).then_some(()));
        let passes = machine.console().matches("pass-done").count();
        suite::wait_for("work again", || (machine.console().matches("pass-done").count() > passes).then_some(()));
    }
    let events = machine.outboard(&["events", &machine.name]);
    assert_eq!(events.matches("it is stopped").count(), 3, "{events}");
    machine.stop_loop();
    machine.finish().passed();
}
