//! Device processes that die under a running guest: the guest does not notice.

use std::thread::sleep;
use std::time::Duration;

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

#[test]
fn twenty_kills_of_a_disk_under_fio() {
    let scratch = suite::Scratch::new();
    let image = scratch.image("fio.img", 32 << 20);
    let section = format!("[disk.c-fio]\npath = \"{}\"\nqueues = 2\n", image.display());
    let command = format!(
        "set -e; {UNTIL_STOPPED}; do fio --name=storm --filename=/dev/vdc --direct=1 --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio \
         --size=4M --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/log || {{ cat /tmp/log; exit 8; }}; \
         grep -q 'err= 0' /tmp/log; echo pass-done; done; {NO_TROUBLE}"
    );
    let mut machine = Plan::run(&command).with_disk().section(&section).start();
    machine.wait_for("pass-done");
    let mut random = Random::new(20);
    for round in 1..=20 {
        kill(&machine, "c-fio");
        assert!(!machine.console().contains("outboard-run"), "fio failed after kill {round}:\n{}", machine.console());
        sleep(Duration::from_millis(100 + random.below(900)));
    }
    let disk = machine.processes().into_iter().find(|process| process["role"] == "c-fio").unwrap();
    assert_eq!(disk["restarts"], 20);
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
